"""Models that the servers compute otherwise than the trainer are refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mapo.errors import ConfigError
from megatron_mapo.rollout.served import check_served


@pytest.mark.parametrize(
    "hf",
    [
        {"model_type": "mistral", "sliding_window": 99},
        {"model_type": "mixtral", "sliding_window": 99},
        {"model_type": "qwen2", "sliding_window": 99, "use_sliding_window": True},
    ],
)
def test_a_window_that_bites_is_refused(hf: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.max_response_tokens must be at most 99, got 100"):
        check_served(hf, 100, on_cpu=False)
    check_served(hf, 99, on_cpu=False)


@pytest.mark.parametrize(
    "hf",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2", "sliding_window": 99, "use_sliding_window": False},
        {"model_type": "gemma3_text", "sliding_window": 99},
        {"model_type": "llama"},
    ],
)
def test_what_is_served_as_it_is_passes(hf: dict[str, Any]) -> None:
    check_served(hf, 100, on_cpu=True)


def test_capped_scores_need_cuda() -> None:
    hf = {"model_type": "gemma2", "sliding_window": 99, "attn_logit_softcapping": 50.0}
    with pytest.raises(ConfigError, match="on a CPU"):
        check_served(hf, 10, on_cpu=True)
    check_served(hf, 10, on_cpu=False)
    check_served(hf | {"attn_logit_softcapping": None}, 10, on_cpu=True)
