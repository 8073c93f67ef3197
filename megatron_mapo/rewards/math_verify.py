r"""Verifier ``math_verify``: the library's own judgement (github.com/huggingface/Math-Verify), to compare others with.

It is more lenient than ``math``: it takes ``\boxed{7+5}`` for 12, and any formula of a response that marks no answer.
"""

from __future__ import annotations

import logging
from typing import Any

from math_verify import parse
from math_verify import verify as equal

from megatron_mapo.rewards.gsm8k import reference_answer

# The library's own timeouts need signals and the main thread; the pool has its own limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """The answer that math-verify finds in the response is equal to the one that it finds in the reference.

    Raises:
        ValueError: it finds none in the reference.
    """
    text = reference_answer(answer)
    # Outside of mathematics the library looks for numbers only: the reference \frac{1}{2} would be 2.
    formula = text if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")) else f"${text}$"
    reference = parse(formula, parsing_timeout=None)
    if not reference:
        raise ValueError(f"math-verify finds no answer in the reference (data.answer_key): {answer[-100:]!r}")
    return equal(reference, parse(response, parsing_timeout=None), timeout_seconds=None)


def extract(response: str) -> str | None:
    """What math-verify finds in the response, as the library writes it; None if that is nothing."""
    found = parse(response, parsing_timeout=None)
    return str(found[0]) if found else None
