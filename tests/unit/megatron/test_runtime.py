"""Which device a rank takes."""

from __future__ import annotations

import pytest
import torch

from megatron_mapo.megatron import runtime


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (8, 3)])
def test_a_rank_that_sees_one_gpu_takes_it(visible: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert runtime._own_gpu(3) == torch.device("cuda", index)
