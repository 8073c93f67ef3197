"""Token ids outside the vocabulary are an error of their request.

Upstream hands them to the embedding, whose error ends the server and all that it was generating.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def apply() -> None:
    """Check the ids of every request where its length is checked."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    upstream = TokenizerManager._validate_one_request

    def validate(self: Any, request: Any, input_ids: Sequence[int] | None) -> None:
        size = self.model_config.vocab_size
        if input_ids and not 0 <= min(input_ids) <= max(input_ids) < size:
            raise ValueError(f"input_ids has a token outside the vocabulary of {size}")
        upstream(self, request, input_ids)

    TokenizerManager._validate_one_request = validate
