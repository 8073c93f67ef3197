r"""Verifier ``choice``: the letter of one option, as in MMLU, ARC or GPQA.

A response states a letter by ``\boxed{B}``, "Answer: (B)" or "the answer is B" (the last of these counts, as in
``answers``), or by ending with it on a line of its own. "A or B", "either is possible" and a list of all options state
none.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_mapo.rewards.answers import final_statement

_LETTER = r"[\s$({\[]*(?:(?:the\s+)?(?:letter|option|choice)\s+)?[\s$({\[]*(?P<letter>[A-Za-z])[\s$)}\]]*"
_ALONE = re.compile(rf"{_LETTER}[.:,!]?\s*", re.IGNORECASE)
"""Nothing but the letter."""
_FIRST = re.compile(r"(?:(?:the\s+)?(?:letter|option|choice)\s+)?[$({\[]*(?P<letter>[A-Z])(?![A-Za-z0-9_'’])[$)}\]]*")
"""A capital letter, and then a reason or the option's text."""
_SECOND = re.compile(
    r"\s*(?:[,/;&+|-]|\b(?:or|and)\b)+\s*(?!not\b)(?:(?:or|and|maybe|perhaps|possibly|also|option|choice)\s+)*"
    r"[$({\[]*[A-Z](?![A-Za-z0-9_'’])"
)
"""Behind it another letter: a choice is left open."""
_WORDS = frozenset("AI")
"""Letters that are English words, too: "the answer is A dog", "Answer: I think it is B"."""
_REASON = re.compile(r"\s+(?:because|since|as|for|given|due|which|that|where|is|by|from|in|on|with)\b")
_OPTION = re.compile(r"[\s$*({\[]*(?P<letter>[A-Z])[)}\].:][\s*]*\S.*")
"""A line such as "B) Paris"."""
_REFERENCE = re.compile(r"\s*[({\[]?(?P<letter>[A-Za-z])(?:[)}\].:].*|\s*)", re.DOTALL)


def verify(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """The letter that the response states is that of the reference answer ("B", "(b)" or "B. Paris").

    Raises:
        ValueError: the reference answer is no letter.
    """
    reference = _REFERENCE.fullmatch(answer)
    if reference is None:
        raise ValueError(f"the reference answer is no letter of an option (data.answer_key): {answer[:100]!r}")
    return extract(response) == reference["letter"].upper()


def extract(response: str) -> str | None:
    """The letter that the response states, as a capital; None if it states none or several."""
    statement = final_statement(response)
    text = statement.text.strip()
    if statement.marked:
        alone = _ALONE.fullmatch(text)
        return alone["letter"].upper() if alone is not None else _letter_with_reason(text)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    alone = _ALONE.fullmatch(lines[-1])
    if alone is not None:
        # One of several letters in a column is a list of options.
        listed = len(lines) > 1 and _ALONE.fullmatch(lines[-2]) is not None
        return None if listed else alone["letter"].upper()
    only = _OPTION.fullmatch(lines[0]) if len(lines) == 1 else None
    return _letter_with_reason(text.lstrip("* ")) if only is not None else None


def _letter_with_reason(text: str) -> str | None:
    first = _FIRST.match(text)
    if first is None:
        return None
    letter, rest = first["letter"], text[first.end() :]
    bare = text[: first.end()].endswith(letter)
    if bare and letter in _WORDS and re.match(r"\s+[a-z]", rest) and not _REASON.match(rest):
        return None
    return None if _SECOND.match(rest) else letter
