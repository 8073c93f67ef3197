"""How the trainer's side of a weight update gets out of a group."""

from __future__ import annotations

import asyncio
import threading

import pytest

from megatron_mapo.rollout import weight_transport


def test_a_group_of_nccl_is_aborted_and_not_waited_for_longer_than_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    released, aborted = threading.Event(), []

    def abort(group: object) -> None:
        aborted.append(group)
        released.wait(60)

    monkeypatch.setattr(weight_transport, "_abort_process_group", abort)
    monkeypatch.setattr(weight_transport, "CLEANUP_SECONDS", 0.1)
    group = object()
    asyncio.run(weight_transport._break(group, "nccl"))  # type: ignore[arg-type]
    assert (aborted, released.is_set()) == ([group], False)
    released.set()
