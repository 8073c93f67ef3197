r"""The answer that a response states, and numbers in it.

A response marks an answer by ``\boxed{...}``, ``#### ...``, "the answer is ..." or "Answer: ...". The **last**
of these counts, whatever came before. Without any, the last number of the response counts. Only what follows
``</think>`` is read; thinking that does not end states nothing.

So a response cannot be right by listing many numbers, and what is stated must be *one number*: "12 or 13",
"7 + 5", "10-12" and "2x" state none. Working before it is fine ("7 + 5 = 12" states 12).

Numbers: sign (also ``−``), currency, thousands separators, decimals, ``a/b``, ``\frac{a}{b}``, mixed numbers,
``1e3``. A per cent sign is a unit like any other: 50% is 50, not 0.5. They are compared as exact fractions.

Responses are untrusted: all patterns take linear time, and no text makes these functions raise.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_MAX_DIGITS = 300
"""Longer numbers are nonsense, and Python refuses to read integers of more than 4,300 digits."""
_CONTEXT = 40
"""Letters before a number that are looked at; a bound keeps texts with thousands of numbers cheap."""

_MARKER = re.compile(
    r"""
      \\(?:boxed|fbox)\s*(?=\{)
    | \#{4}(?=[ \t]*[-−+$€£¥(\\.\d*])          # a number
    | \#{4}(?=[^\n#]*\s*\Z)                     # or the last line, lest a Markdown heading counts as an answer
    | \banswer\*{0,2}(?:\s+(?:is|are|was|equals)\b|\s*[:=])[ \t]*:?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s)")

_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][+-]?\d{1,3}(?![\d.]))?"
_NUMBER = re.compile(
    rf"""
      (?:(?P<whole>{_PLAIN})\s?)?
      \\[dt]?frac\s?(?:\{{\s?(?P<n>[-−]?\d+)\s?\}}|(?P<n1>\d))\s?(?:\{{\s?(?P<d>\d+)\s?\}}|(?P<d1>\d))
    | (?P<mixed>\d+)[ ](?P<mn>\d+)/(?P<md>\d+)(?![\d/]|\.\d)
    | (?P<top>{_PLAIN})(?:\s?/\s?(?P<over>\d+)(?![\d/]|\.\d))?
    """,
    re.VERBOSE,
)
# Between two numbers: what makes them one expression, a range or a choice instead of an answer.
_OPERATOR = r"[-−–+*/×÷^|]|\\[a-zA-Z]+"
_OPEN, _UNIT = r"[\s$€£¥(\{]*$", r"^\s*[a-zA-Z%°)]*\s*"
_CHOICE = re.compile(rf"{_UNIT}(?:{_OPERATOR}|,?\s*\bor\b(?:\s+\w+)?){_OPEN}", re.IGNORECASE)
_LIST = re.compile(rf"{_UNIT}(?:{_OPERATOR}|[,;&]|,?\s*\b(?:or|and|to)\b(?:\s+\w+)?)?{_OPEN}", re.IGNORECASE)
# Behind a number: it is a factor or a term ("2\pi", "2^x", "2x", "7 +", "2(a+b)").
_GOES_ON = re.compile(r"\s*(?:[\^*+/²³]|\\[a-zA-Z])|[abcijknpqrtuvwxyz](?![A-Za-z])|\(|\s?[-−]\s?[b-z](?![\w'])")
# Before a number: it is the second operand of something that is not a number ("x + 1", "\\pi \\cdot 3", "b-1"). With
# spaces around it a dash is an operator only where an expression is expected.
_TERM = r"[A-Za-z)\]}]\s*(?:[*/×÷|+]|\\(?:cdot|times|div|pm|mp|ast)(?![a-zA-Z])"
_COMES_AFTER = {False: re.compile(rf"{_TERM})\s*$|[A-Za-z)\]}}][-−]$"), True: re.compile(rf"{_TERM}|[-−])\s*$")}

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|boldsymbol)\s?\{([^{}]*)\}")
_BLANK = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[()\[\]]|`")
_BOLD = re.compile(r"(?<!\d)\*\*|\*\*(?!\s*\d)")
_DEGREES = re.compile(r"\^\s?(?:\\circ|\{\s?\\circ\s?\})")
_UNITS = re.compile(r"[%°$€£¥)}.]*(?:\s+[A-Za-z]{2,}[A-Za-z ./]*)?\s*")


class Statement(NamedTuple):
    """The final answer of a response.

    Attributes:
        text: what was stated, cleaned of LaTeX wrapping.
        marked: it was marked as the answer; otherwise ``text`` is the whole response.
    """

    text: str
    marked: bool


class Number(NamedTuple):
    """A number in a text, from ``start`` (sign included) to ``end``."""

    start: int
    end: int
    value: Fraction


def final_statement(response: str) -> Statement:
    """The last marked answer in ``response``, or all of it if none is marked; "" if its thinking never ends."""
    _, end, text = response.rpartition("</think>")
    if not end and "<think>" in response:
        return Statement("", False)
    markers = list(_MARKER.finditer(text))
    if not markers:
        return Statement(clean(text), False)
    rest = text[markers[-1].end() :]
    if rest.startswith("{"):
        return Statement(clean(_braced(rest)), True)
    return Statement(_first_sentence(clean(rest)), True)


def stated_number(statement: Statement) -> Fraction | None:
    """The one number that is stated, or None.

    Of a marked answer that is the first number ("12 because 5 and 7 make 12") of the last equation's right side,
    of an unmarked response the last number.
    """
    text = _right_side(statement.text) if statement.marked else statement.text
    numbers = _numbers(text)
    if not numbers:
        return None
    pair = numbers[:2] if statement.marked else numbers[-2:]
    chosen = pair[0] if statement.marked else pair[-1]
    joins = _LIST if statement.marked else _CHOICE
    if len(pair) == 2 and joins.search(text[pair[0].end : pair[1].start]):
        return None
    return None if _is_operand(text, chosen, statement.marked) else chosen.value


def number(text: str) -> Fraction | None:
    """``text`` as one number, perhaps with currency and a unit ("$1,200", "12 apples"); None if it is not."""
    text = clean(text)
    numbers = _numbers(text)
    if len(numbers) != 1:
        return None
    start, end, value = numbers[0]
    plain = not text[:start].strip(" \t\n$€£¥+({") and _UNITS.fullmatch(text, end) is not None
    return value if plain else None


def clean(text: str) -> str:
    r"""Remove what only decorates: ``\text{}``, ``\left``, ``\,``, ``\$``, bold, back quotes, math delimiters."""
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("\\!", "")
    text = re.sub(r"(?<=\d)\\[,;: ]\s?(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\[,;: ]", " ", text)
    text = _DEGREES.sub("°", _WRAPPED.sub(r"\1", text))
    return _BOLD.sub("", _BLANK.sub("", text)).strip()


def _braced(text: str) -> str:
    """What stands between the first brace of ``text`` and the one that closes it (or the end)."""
    depth = 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[1 : brace.start()]
    return text[1:]


def _first_sentence(text: str) -> str:
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end else text


def _right_side(text: str) -> str:
    """The right side of the last equation that has a number there."""
    parts = re.split(r"=|≈|\\approx", text)
    return next((part for part in reversed(parts) if re.search(r"\d", part)), text)


def _is_operand(text: str, number: Number, marked: bool) -> bool:
    r"""The number is an argument or exponent (``\sqrt{3}``, ``x^2``), or the expression goes on on either side."""
    if _COMES_AFTER[marked].search(text[max(0, number.start - _CONTEXT) : number.start]):
        return True
    before = text[max(0, number.start - _CONTEXT) : number.start].rstrip(" \t\n$€£¥+−-")
    argument = re.search(r"\\[a-zA-Z]+(?:\[[^\[\]]*\])?\{$|[\^_]\{?$", before)
    return argument is not None or _GOES_ON.match(text, number.end) is not None


def _numbers(text: str) -> list[Number]:
    found = []
    for match in _NUMBER.finditer(text):
        begin = match.start()
        # A letter in front makes it a name, like x2.
        named = begin > 0 and (text[begin - 1].isalpha() or text[begin - 1] == "_")
        if named or match.end() - begin > _MAX_DIGITS:
            continue
        value = _value(match)
        if value is not None:
            start, negative = _sign(text, begin)
            found.append(Number(start, match.end(), -value if negative else value))
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    whole = Fraction((part["whole"] or part["mixed"] or part["top"] or "0").replace(",", ""))
    numerator = int((part["n"] or part["n1"] or part["mn"] or "0").replace("−", "-"))
    denominator = int(part["d"] or part["d1"] or part["md"] or part["over"] or "1")
    if denominator == 0:
        return None
    return whole / denominator if part["over"] else whole + Fraction(numerator, denominator)


def _sign(text: str, start: int) -> tuple[int, bool]:
    """Where the number at ``start`` begins with its sign and currency, and whether it is negative.

    A dash after a number, a letter or a closing bracket is an operator or a hyphen. One with a space behind it is
    a sign only after "=" or ":" (otherwise a bullet or a dash between words).
    """
    head = text[max(0, start - _CONTEXT) : start]
    bare = head.rstrip("$€£¥(")
    if re.search(r"[=:≈][ \t]*[-−][ \t]+$", bare):
        return start - len(head) + len(bare.rstrip()) - 1, True
    if not bare.endswith(("-", "−")):
        return start, False
    left = bare[:-1]
    operator = left[-1:].isalnum() or re.search(r"[)\]}%.]$|[\d)\]}%]\s+$", left) is not None
    return (start, False) if operator else (start - len(head) + len(left), True)
