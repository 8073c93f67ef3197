"""Verifier ``regex``: a pattern of the configuration finds the answer.

A pattern can take time that grows exponentially with the response. ``reward.timeout`` ends the process then; with
``reward.on_failure=wrong`` the response is wrong.
"""

from __future__ import annotations

import re
from collections import deque
from enum import StrEnum
from functools import lru_cache
from typing import Any

from megatron_mapo.rewards.answers import number

GROUP = "answer"


class Compare(StrEnum):
    text = "text"
    number = "number"


def verify(
    response: str,
    answer: str,
    metadata: dict[str, Any],
    *,
    pattern: str,
    flags: str = "",
    ignore_case: bool = False,
    compare: str = "text",
) -> bool:
    """What the pattern's last match has in its group ``answer`` is the reference answer.

    Args:
        response: searched as a whole, thinking included.
        answer: reference answer.
        metadata: not used.
        pattern: Python regular expression with a group ``(?P<answer>...)``.
        flags: of the pattern, some of ``imsx``.
        ignore_case: answers are equal whatever their case.
        compare: ``text``: equal apart from white space at both ends; ``number``: equal as numbers, as ``answers``
            reads them.
    """
    found = extract(response, pattern=pattern, flags=flags)
    if found is None:
        return False
    if Compare(compare) is Compare.number:
        value = number(found)
        return value is not None and value == number(answer)
    expected = answer.strip()
    return found.casefold() == expected.casefold() if ignore_case else found == expected


def extract(response: str, *, pattern: str, flags: str = "") -> str | None:
    """What the last match has in its group, without white space at both ends; None if it is nothing."""
    matches = deque(_compiled(pattern, flags).finditer(response), maxlen=1)
    return (matches[0][GROUP] or "").strip() or None if matches else None


def check_options(
    *, pattern: str, flags: str = "", ignore_case: bool = False, compare: str = Compare.text.value
) -> None:
    """Raise ``ValueError`` for a pattern or a setting that cannot be used."""
    if GROUP not in _compiled(pattern, flags).groupindex:
        raise ValueError(f"pattern {pattern!r} has no group (?P<{GROUP}>...)")
    if compare not in tuple(Compare):
        raise ValueError(f"compare must be {' or '.join(Compare)}, got {compare!r}")
    if not isinstance(ignore_case, bool):
        raise ValueError(f"ignore_case must be true or false, got {ignore_case!r}")


@lru_cache
def _compiled(pattern: str, flags: str) -> re.Pattern[str]:
    if not isinstance(pattern, str) or not isinstance(flags, str):
        raise ValueError(f"pattern and flags must be text, got {pattern!r} and {flags!r}")
    known = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}
    unknown = set(flags) - set(known)
    if unknown:
        raise ValueError(f"flags must be some of {''.join(known)}, got {flags!r}")
    try:
        return re.compile(pattern, sum(known[letter] for letter in set(flags)))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
