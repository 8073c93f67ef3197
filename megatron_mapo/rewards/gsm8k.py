"""Verifier ``gsm8k``: one number, as the answers of GSM8K (arXiv 2110.14168) are."""

from __future__ import annotations

from typing import Any

from megatron_mapo.rewards.answers import clean, final_statement, number, stated_number


def verify(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """The number that the response states last is exactly the reference number.

    What "states" means is in ``answers``. The reference is the bare answer or a whole GSM8K solution ending in
    ``#### 42``. A reference that is no number must be stated word for word, apart from case.

    Raises:
        ValueError: the reference answer is empty.
    """
    reference = reference_answer(answer)
    statement = final_statement(response)
    expected = number(reference)
    if expected is None:
        return same_words(statement.text, reference)
    return stated_number(statement) == expected


def extract(response: str) -> str | None:
    """The number that the response states, as an exact fraction; else its words.

    A marked answer that is no number counts with its words, and so does an unmarked response of one line. None for
    anything longer: it states nothing.
    """
    statement = final_statement(response)
    value = stated_number(statement)
    if value is not None:
        return str(value)
    return None if not statement.marked and "\n" in statement.text else normal_words(statement.text) or None


def reference_answer(answer: str) -> str:
    """The final answer in a dataset's answer column."""
    reference = answer.rpartition("####")[2].strip()
    if not reference:
        raise ValueError(f"the reference answer is empty (data.answer_key): {answer[-100:]!r}")
    return reference


def same_words(left: str, right: str) -> bool:
    """Equal apart from case, white space and a final full stop."""
    return normal_words(left) == normal_words(right)


def normal_words(text: str) -> str:
    """``text`` without decoration, case, uneven white space and a final full stop."""
    return " ".join(clean(text).strip("$").split()).rstrip(".").casefold()
