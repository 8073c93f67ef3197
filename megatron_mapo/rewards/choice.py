r"""Verifier ``choice``: the letter of one option, as in MMLU, ARC or GPQA.

A response states a letter by ``\boxed{B}``, "Answer: (B)", "the answer is B", "the correct option is B", "B is correct"
or "I choose B" (the last of these counts, as in ``answers``), or by ending with it on a line of its own. "A or B",
"B (but could be C)", "either is possible" and a list of all options state none.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_mapo.rewards.answers import MARKER, final_statement

_NAMED = r"[\s*({$]{0,6}(?:(?:the\s)?(?:letter|option|choice|answer(?:\schoice)?)\s)?[*({$]{0,4}(?-i:[A-Z])[)}*$.]{0,4}"
_IS_RIGHT = r"""\s(?:is|would\sbe|must\sbe)\s(?:(?!not|never|also)\w{1,15}\s)?(?:the\s)?(?:most\s)?
    (?:correct|right|best|accurate|appropriate)\b(?!\s(?:about|in|only|if|distractor)\b)"""
_MARKER = re.compile(
    rf"""{MARKER}
    | \banswer\s+(?:(?:should|must)\s+be|choice\s+is)\b
    | \b(?:correct|right|best|final|chosen)\s+(?:option|choice|letter|one)
      (?:\s+(?:is|would\s+be)\b|\s*:)[ \t]*:?(?:\*\*(?=\s))?
    | \bI(?:['’]d|['’]ll|\s+would|\s+will)?\s+(?:choose|pick|select|go\s+with)\b(?:\s+answer\b)?
    # One of several that are right: the statement is what follows, and has no letter.
    | \b(?:or|and|nor|not|(?:unlikely|doubt|untrue)(?:\sthat)?)\b{_NAMED}{_IS_RIGHT}
    | (?<![A-Za-z])(?-i:[A-Z])[)}}*$.]{{0,4}}\s(?:is|could\sbe|might\sbe)\salso\s(?:correct|right)\b
    # Not "vitamin C is the best".
    | (?:\A|[\n.,:;!?*(>]|\b(?:option|choice|letter|answer|that|so|therefore|thus|hence|think|believe|only|case)\b)
      (?={_NAMED}{_IS_RIGHT})
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LETTER = r"[\s$({\[]*(?:(?:the\s+)?(?:letter|option|choice)\s+)?[\s$({\[]*(?P<letter>[A-Za-z])[\s$)}\]]*"
_ALONE = re.compile(rf"{_LETTER}[.:,!]?\s*", re.IGNORECASE)
"""Nothing but the letter."""
_FIRST = re.compile(r"(?i:(?:the\s+)?(?:letter|option|choice)\s+)?[$({\[]*(?P<letter>[A-Z])(?![A-Za-z0-9_'’])[$)}\]]*")
"""A capital letter, and then a reason or the option's text."""
_NEXT = r"[$({\[]*(?:[A-Z](?![A-Za-z0-9_'’])(?!\s+[a-z])|[a-z](?=[)}\]]|[.,;]?$))"
"""A letter that no word follows, as words do "A" and "I"."""
_HEDGE = r"(?:(?:or|and|maybe|perhaps|possibly|also|option|choice|it|could|might|be)\s+){0,4}"
_SECOND = re.compile(rf"[\s({{\[]*(?:[,/;&+|-]|\b(?:or|and)\b)*\s*(?!not\b){_HEDGE}{_NEXT}")
"""Right behind it another letter: a choice is left open."""
_LATER = re.compile(
    rf"\b(?i:or|and|but|maybe|perhaps|possibly|alternatively|wait|actually|(?:could|might|may) be),?\s+{_HEDGE}{_NEXT}"
    r"|(?<![A-Za-z])[A-Z]\)?\s(?:is\salso\s(?:possible|plausible|correct|right)|(?:could|might|may)\s(?:also\s)?be)\b"
)
"""Behind an option's text another letter: "A) Paris or B) Rome"."""
_QUOTED = re.compile(r"(?<![A-Za-z0-9])[\"'“‘*_<]([A-Za-z])[\"'”’*_>](?![A-Za-z0-9])")
_LONGEST = 1000
"""Letters of a statement that are looked at: some of these patterns take quadratic time."""
_WORDS = frozenset("AI")
"""Letters that are English words, too: "the answer is A dog", "Answer: I think it is B"."""
_REASON = re.compile(r"[\s,;:(-]+(?:because|since|as|for|given|due|which|that|where|is|by|from|in|on|with)\b")
_OPTION = re.compile(r"[\s$*({\[]*(?:(?:[Oo]ption|[Cc]hoice)\s[*$({\[]*)?(?P<letter>[A-Z])[)}\].:][\s*]*\S.*")
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
    statement = final_statement(response, _MARKER)
    text = _QUOTED.sub(r"\1", statement.text)
    if statement.marked:
        return _lone_letter(text) or _letter_with_reason(text)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and _OPTION.fullmatch(lines[0]) is not None:
        return _letter_with_reason(lines[0].lstrip("* "))
    # One of several letters in a column is a list of options.
    listed = len(lines) > 1 and _lone_letter(lines[-2]) is not None
    return None if listed or not lines else _lone_letter(lines[-1])


def _lone_letter(text: str) -> str | None:
    alone = _ALONE.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    return None if alone is None else alone["letter"].upper()


def _letter_with_reason(text: str) -> str | None:
    text = " ".join(text.split())[:_LONGEST]
    first = _FIRST.match(text)
    if first is None:
        return None
    letter, rest = first["letter"], text[first.end() :]
    reason = _REASON.match(rest) is not None
    bare = text[: first.end()].endswith(letter)
    if bare and letter in _WORDS and re.match(r"\s+[a-z]", rest) and not reason:
        return None
    open_choice = _SECOND.match(rest) or (not reason and _LATER.search(rest))
    return None if open_choice else letter
