r"""Verifier ``math``: numbers as in ``gsm8k``, everything else by math-verify (github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import logging
from typing import Any

from math_verify import parse
from math_verify import verify as equal

from megatron_mapo.rewards.answers import final_statement, number, stated_number
from megatron_mapo.rewards.gsm8k import reference_answer, same_words

# math-verify warns when its timeouts are off. They need signals and the main thread; the pool has its own limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    r"""The answer that the response states last is the reference answer.

    A number must be stated as a number: ``\boxed{7+5}`` is not the answer 12, or repeating the question would be
    rewarded. Any other reference (an expression, a set, an interval, an equation) is compared symbolically with
    what is stated, so an equal expression in another form is right.

    Raises:
        ValueError: the reference answer is empty.
    """
    reference = reference_answer(_unboxed(answer))
    statement = final_statement(response)
    expected = number(reference)
    if expected is not None:
        return stated_number(statement) == expected
    stated = statement.text if statement.marked else _last_line(statement.text)
    if not stated:
        return False
    if same_words(stated, reference):
        return True
    return equal(_parse(reference), _parse(stated), timeout_seconds=None)


def _unboxed(answer: str) -> str:
    return final_statement(answer).text if "\\boxed" in answer else answer


def _last_line(text: str) -> str:
    lines = text.splitlines()
    return lines[-1].strip() if lines else ""


def _parse(text: str) -> list[Any]:
    inner = text.strip().strip("$").rstrip(".").strip()
    return parse(f"\\boxed{{{inner}}}", parsing_timeout=None)
