"""Where SGLang computes another model than the trainer: refused before the first rollout.

The trainer's scores equal those of transformers. SGLang 0.5.23 leaves two things out without saying so, and a
rollout of it would come from another distribution than the one that is trained. A third, another form of GELU in Gemma
(1), is small and stays: docs/models.md, and every step's ``mismatch`` metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mapo.errors import ConfigError

_WINDOWS_SERVED = ("gemma2", "gemma3_text")


def check_served(hf: Mapping[str, Any], longest: int, *, on_cpu: bool) -> None:
    """Refuse a model that the servers would compute otherwise.

    Args:
        hf: content of the model's ``config.json``.
        longest: most tokens of a prompt and its response.
        on_cpu: the servers compute on a CPU.

    Raises:
        ConfigError: names the key to change.
    """
    kind, window = hf.get("model_type"), hf.get("sliding_window")
    ignored = kind not in _WINDOWS_SERVED and hf.get("use_sliding_window", True)
    if window is not None and ignored and longest > window:
        raise ConfigError(
            f"model.path: {kind} attends to the last {window} tokens only, and SGLang serves it without that window: "
            f"rollout.max_prompt_tokens + rollout.max_response_tokens must be at most {window}, got {longest}"
        )
    if kind == "gemma2" and hf.get("attn_logit_softcapping") and on_cpu:
        raise ConfigError(
            "model.path: gemma2 caps its attention scores, which SGLang's attention on a CPU leaves out: "
            "use CUDA, or another model"
        )
