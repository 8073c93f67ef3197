r"""The answer that a response states, and numbers in it.

A response marks an answer by ``\boxed{...}``, ``#### ...``, "the answer is ..." or "Answer: ...". The **last**
of these counts, whatever came before. Without any, the last number of the response counts. Only what follows
``</think>`` is read; thinking that does not end states nothing.

So a response cannot be right by listing many numbers, and what is stated must be *one number*: "12 or 13", "12 (perhaps
13)", "\boxed{12} or \boxed{13}", "7 + 5", "10-12", "2x", "x < 12", "log 12", "not 12" and "12:1" state none. Working
before it is fine ("7 + 5 = 12" states 12), and so is a reason behind it ("12, because 5 and 7 make 12").

Numbers: sign (also ``−``, "minus", "negative"), currency, thousands separators, decimals, ``a/b``, ``\frac{a}{b}``,
mixed numbers, ``1e3``, "2 thousand". A per cent sign and a dozen are units like any other: 50% is 50, not 0.5. They
are compared as exact fractions.

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

MARKER = r"""
      \\(?:boxed|fbox)\s*(?=\{)
    | \#{4}(?=[ \t]*[-−+$€£¥(\\.\d*])          # a number
    | \#{4}(?=[^\n#]*\s*\Z)                     # or the last line, lest a Markdown heading counts as an answer
    | \banswer\*{0,2}(?:\s+(?:is|are|was|equals|would\s+be)\b|\s*[:=])[ \t]*:?(?:\*\*(?=\s))?
    """
"""What marks an answer; a verbose pattern."""
_MARKER = re.compile(MARKER, re.IGNORECASE | re.VERBOSE)
_SENTENCE_END = re.compile(r"\n|(?<!\bRs)(?<!\bapprox)[.!?](?=\s|$)", re.IGNORECASE)
_MAYBE = r"or|perhaps|maybe|possibly|alternatively|could|might|may"
# Behind a statement: it is not the last word. The statement then goes on.
_HEDGE = re.compile(
    r"[\s.,;:!?…$)*-]*\(?\s*(?:(?:or|perhaps|maybe|possibly|alternatively|wait|actually)\b|no,"
    rf"|but\s+(?:\w+\s+)?(?:{_MAYBE})\b|and\s+[$€£¥]?\d)",
    re.IGNORECASE,
)
# On the marker's line "- 18" is negative; on the next it is a bullet.
_LEADING_SIGN = re.compile(r"\A([ \t]*\$?)[-−–][ \t]*(?=[$€£¥]?[\d.\\])")
# Between two boxes: they are one list.
_JOIN = re.compile(r"(?:[\s$]|[,;&/}]|\\text\s?\{|\\[,;: ]|\\q?quad|\b(?:or|and|maybe|perhaps|possibly)\b)*")
_LONGEST_JOIN = 60

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
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"(?:[\s-]+(?:{'|'.join(_SCALES)})s?(?![A-Za-z])){{1,3}}", re.IGNORECASE)
_NEGATIVE = re.compile(
    r"(?:\bnegative|(?:^|[=:(]|\b(?:is|are|was|be|of|to|equals))\s*\b(?P<minus>minus))\s+$", re.IGNORECASE
)
# Behind a marked number: what follows explains it. After the words of the second line, and in brackets, only if no
# other candidate stands there.
_REASON = re.compile(r"\b(?:because|since|as|given|due|where|which)\b", re.IGNORECASE)
_ASIDE = re.compile(r"\b(?:in|for|from|per|each|every|after|out\s+of)\b|(?<=\s)\((?=\s*[A-Za-z]{3})", re.IGNORECASE)
_OTHER = re.compile(rf"\b(?:{_MAYBE}|and|but|not|otherwise)\b|[,;]\s*[$€£¥]?\d|=", re.IGNORECASE)
# Between the last two numbers of an unmarked response: what makes them one expression or a choice.
_OPERATOR = r"[-−–+*/×÷^|]|\\[a-zA-Z]+"
_CHOICE = re.compile(
    rf"^\s*[a-zA-Z%°)]*(?:\s*(?:{_OPERATOR})|[\s.,;(…-]*(?:but\s+)?(?:it\s+)?\b(?:{_MAYBE})\b(?:\s+\w+){{0,2}})"
    r"[\s$€£¥(\{]*$|^:$",
    re.IGNORECASE,
)
# Between two marked numbers: one in another form ("3/4, or 0.75").
_SAME = re.compile(r"[\s%°$€£¥,;(.a-zA-Z]*\bor[\s$€£¥]+", re.IGNORECASE)
# Behind a number: it is a factor or a term ("2\pi", "2^x", "2x", "7 +", "2(a+b)"), or not all of it is read.
_GOES_ON = re.compile(
    r"\s*(?:[\^*+/²³_]|\\[a-zA-Z])|\.\\|[abceijknpqrtuvwxyz](?![A-Za-z])|\(|\s?[-−]\s?[b-z](?![\w'])|[KMB](?![A-Za-z])"
    r"|\s+(?:[bijknquvwxyz](?![A-Za-z'’]|\.[A-Za-z])|\([A-Za-z](?![A-Za-z'’]|\s+[a-z]))"
    r"|\s+(?:squared|cubed|factorial|and\s+(?:a|one|three))\b"
)
# Before a number: it is the second operand of something that is not a number ("x + 1", "\\pi \\cdot 3", "b-1"). With
# spaces around it a dash is an operator only where an expression is expected.
_TERM = r"[A-Za-z)\]}]\s*(?:[*/×÷|+]|\\(?:cdot|times|div|pm|mp|ast)(?![a-zA-Z])"
_COMES_AFTER = {False: re.compile(rf"{_TERM})\s*$|[A-Za-z)\]}}][-−]$"), True: re.compile(rf"{_TERM}|[-−])\s*$")}
# Before a number: a function, a relation or a word that makes another number of it.
_CHANGED = re.compile(
    r"(?:[<>≠≤≥±]|!=|[A-Za-z]\(|\\(?!(?:[Rr]ightarrow|implies|therefore|approx|to|sim)(?![a-zA-Z]))[a-zA-Z]+"
    r"|(?:\b(?:not|never|than|minus|negative|plus|half|twice|double|triple|root|sqrt|log|ln|exp|a?(?:sin|cos|tan))|n['’]t)"
    r"(?:\s+of)?(?:\s+(?:a|exactly|about|the))?)[\s$€£¥({]*$",
    re.IGNORECASE,
)
# Anywhere in a marked statement, and right around its number: there is more to it than a number.
_RELATION = re.compile(
    r"[<>≠≤≥]|!=|\\(?:n?[lg]eq?q?|[lg]eqslant|neq?|lt|gt|in|pm|infty)(?![a-zA-Z])|\bor\s+(?:more|less|fewer|greater)\b"
    r"|(?:\b(?:or|and)\b|[,;])[\s$]*[A-Za-z]\w{0,9}(?:_\{\w+\})?\s*="
)
_DENIED = re.compile(r"\b(?:not|never|cannot|neither|nor)\b|n['’]t\b", re.IGNORECASE)
_PART_OF = re.compile(
    r"(?:(?:^|[^A-Za-z])[A-Za-z]\s*[,;]|\b(?:at\s+(?:least|most)|over|under|above|below|up\s+to))[\s$(]*$",
    re.IGNORECASE,
)
_HAS_PART = re.compile(r"!|:\s?\d|[\s$]*(?:[,;]|\band\b|\bor\b)\s*(?:\\|\$?(?![aI]\b)[A-Za-z](?![A-Za-z'’]))")

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|boldsymbol)\s?\{([^{}]*)\}")
_BLANK = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad|bf|rm)(?![a-zA-Z])|(?<!\\)\\[()\[\]]|(?<=\\\\)\[\d\w*\]|`"
)
_TAG = re.compile(r"</?(?:[bs]|[a-z]{2,12})>|<\|\w{1,20}\|>")
_BOLD = re.compile(r"(?<!\d)\*\*|\*\*(?!\s*\d)")
_DEGREES = re.compile(r"\^\s?(?:\\circ|\{\s?\\circ\s?\})|\\degree(?![a-zA-Z])")
_UNIT_POWER = re.compile(
    r"(\\(?:text|mathrm|mbox)\s?\{\s?[a-zA-Z/. ]{2,}\}|(?<=\d )(?:[ckm]m|ft|in|yd))\s?\^\s?(?:[23]|\{[23]\})"
)
_UNITS = re.compile(r"[%°$€£¥)}.]*(?:\s+[A-Za-z]{2,}[A-Za-z ./]*)?\s*")


class Statement(NamedTuple):
    """The final answer of a response.

    Attributes:
        text: what was stated, cleaned of LaTeX wrapping.
        marked: it was marked as the answer; otherwise ``text`` is the whole response.
        raw: all that stands behind the marker, or in the box, as it was written.
    """

    text: str
    marked: bool
    raw: str


class Number(NamedTuple):
    """A number in a text, from ``start`` (sign included) to ``end``."""

    start: int
    end: int
    value: Fraction


def final_statement(response: str, marker: re.Pattern[str] = _MARKER) -> Statement:
    """The last marked answer in ``response``, or all of it if none is marked; "" if its thinking never ends.

    What takes it back or adds another belongs to it: "18. Or 19" is one statement.
    """
    _, end, text = response.rpartition("</think>")
    if not end and "<think>" in response:
        return Statement("", False, "")
    markers = list(marker.finditer(text))
    if not markers:
        return Statement(clean(text), False, text)
    raw = text[markers[-1].end() :]
    if not raw.startswith("{"):
        stated, after = _first_sentence(clean(_LEADING_SIGN.sub(r"\1-", raw)))
    else:
        inside = _braced(raw)
        after = clean(raw[len(inside) + 2 :])
        raw, stated = inside, clean(_LEADING_SIGN.sub(r"\1-", inside))
        other = _joined_box(text, markers)
        if other is not None and other != stated:
            stated = f"{other}, {stated}"
    hedge = _HEDGE.match(after[:_LONGEST_JOIN])
    if hedge is not None:
        stated += after[: hedge.end()] + _first_sentence(after[hedge.end() :])[0]
    return Statement(stated, True, raw)


def stated_number(statement: Statement) -> Fraction | None:
    """The one number that is stated, or None.

    Of a marked answer that is the only number of the last equation's right side, up to a reason ("12 because 5 and 7
    make 12"), of an unmarked response the last number.
    """
    if not statement.marked:
        numbers = _numbers(statement.text)
        between = statement.text[numbers[-2].end : numbers[-1].start] if len(numbers) > 1 else ""
        choice = between and len(between) <= _LONGEST_JOIN and _CHOICE.search(between)
        unknown = not numbers or choice or _is_operand(statement.text, numbers[-1], marked=False)
        return None if unknown else numbers[-1].value
    text = _without_reason(statement.text)
    if _RELATION.search(text):
        return None
    text = _right_side(text)
    numbers = _numbers(text)
    between = text[numbers[0].end : numbers[1].start] if len(numbers) == 2 else ""
    twice = len(numbers) == 2 and numbers[0].value == numbers[1].value and _SAME.fullmatch(between) is not None
    if len(numbers) != 1 + twice or _is_operand(text, numbers[0], marked=True):
        return None
    before = text[: numbers[0].start]
    partial = _PART_OF.search(before[-_CONTEXT:]) or _HAS_PART.match(text, numbers[-1].end)
    return None if partial or _DENIED.search(before.rpartition(",")[2]) else numbers[0].value


def number(text: str) -> Fraction | None:
    """``text`` as one number, perhaps with currency and a unit ("$1,200", "12 apples"); None if it is not."""
    text = clean(text)
    numbers = _numbers(text)
    if len(numbers) != 1:
        return None
    start, end, value = numbers[0]
    plain = not text[:start].strip(" \t\n$€£¥+({") and _UNITS.fullmatch(text, end) is not None
    return value if plain and not _is_operand(text, numbers[0], marked=True) else None


def clean(text: str) -> str:
    r"""Remove what only decorates: ``\text{}``, ``\left``, ``\,``, ``\$``, bold, back quotes, math delimiters, tags."""
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("\\!", "").replace("~", " ")
    # The second half of a line break of a matrix is not the start of a space.
    text = re.sub(r"(?<=\d)\\[,;: ]\s?(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<!\\)\\[,;: ]", " ", text)
    text = _DEGREES.sub("°", _WRAPPED.sub(r"\1", _WRAPPED.sub(r"\1", _UNIT_POWER.sub(r"\1", text))))
    return _BOLD.sub("", _BLANK.sub("", _TAG.sub("", text))).strip()


def _braced(text: str) -> str:
    """What stands between the first brace of ``text`` and the one that closes it (or the end)."""
    depth = 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[1 : brace.start()]
    return text[1:]


def _joined_box(text: str, markers: list[re.Match[str]]) -> str | None:
    """What stands in the box before the last one, if the two are one list."""
    if len(markers) < 2 or not text.startswith("{", markers[-2].end()):
        return None
    inside = _braced(text[markers[-2].end() : markers[-1].start()])
    gap = text[markers[-2].end() + len(inside) + 2 : markers[-1].start()]
    joined = len(gap) <= _LONGEST_JOIN and _JOIN.fullmatch(gap) and ("\n" not in gap or gap.strip(" \n$"))
    return clean(inside) if joined else None


def _first_sentence(text: str) -> tuple[str, str]:
    """The first sentence without its full stop, and the rest."""
    end = _SENTENCE_END.search(text)
    return (text[: end.start()], text[end.start() :]) if end else (text, "")


def _without_reason(text: str) -> str:
    """``text`` up to where the reason for its first number begins."""
    numbers = _numbers(text)
    if not numbers:
        return text
    reason = _REASON.search(text, numbers[0].end)
    text = text[: reason.start()] if reason else text
    aside = _ASIDE.search(text, numbers[0].end)
    return text[: aside.start()] if aside and not _OTHER.search(text, aside.start()) else text


def _right_side(text: str) -> str:
    """The right side of the last equation that has a number there."""
    parts = re.split(r"=|≈|\\approx", text)
    return next((part for part in reversed(parts) if re.search(r"\d", part)), text)


def _is_operand(text: str, number: Number, marked: bool) -> bool:
    r"""The number is an argument or exponent (``\sqrt{3}``, ``x^2``), or the expression goes on on either side."""
    if _COMES_AFTER[marked].search(text[max(0, number.start - _CONTEXT) : number.start]):
        return True
    before = text[max(0, number.start - _CONTEXT) : number.start]
    if _CHANGED.search(before):
        return True
    before = before.rstrip(" \t\n$€£¥+−-")
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
            end = match.end()
            scale = _SCALE.match(text, end)
            if scale is not None:
                for word in scale[0].lower().replace("-", " ").split():
                    value *= _SCALES[word.rstrip("s")]
                end = scale.end()
            found.append(Number(start, end, -value if negative else value))
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
    word = _NEGATIVE.search(bare) if bare[-1:].isspace() else None
    if word is not None:
        return start - len(head) + (word.start("minus") if word["minus"] else word.start()), True
    if not bare.endswith(("-", "−")):
        return start, False
    left = bare[:-1]
    operator = left[-1:].isalnum() or re.search(r"[)\]}%.]$|[\d)\]}%]\s+$", left) is not None
    return (start, False) if operator else (start - len(head) + len(left), True)
