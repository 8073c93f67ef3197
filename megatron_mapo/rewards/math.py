r"""Verifier ``math``: numbers as in ``gsm8k``, everything else by math-verify (github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import logging
import re
from typing import Any

import sympy
from math_verify import parse
from math_verify import verify as equal

from megatron_mapo.rewards.answers import final_statement, number, stated_number
from megatron_mapo.rewards.gsm8k import normal_words, reference_answer, same_words

# math-verify warns when its timeouts are off. They need signals and the main thread; the pool has its own limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
"""Ordinary words, which the parser would read as products of letters."""
_LONGEST, _TIMES_LONGER = 400, 4
"""A statement longer than this, and than so many times the reference, is not parsed: that can take minutes."""
_DIGITS, _MOST_EXPANDED, _MOST_OPERATIONS = 12, 32, 200


def verify(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    r"""The answer that the response states last is the reference answer.

    A number must be stated as a number: ``\boxed{7+5}`` is not the answer 12, or repeating the question would be
    rewarded. Any other reference (an expression, a set, an interval, an equation) is compared symbolically with
    what is stated, so an equal expression in another form is right, unless it runs on for ever.

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
    if len(stated) > max(_LONGEST, _TIMES_LONGER * len(reference)):
        return False
    return equal(_parse(reference), _parse(stated), timeout_seconds=None)


def extract(response: str) -> str | None:
    r"""The answer that the response states, in a form that equal answers share as far as that is decidable.

    A stated number is an exact fraction. Other constants are written with twelve digits (``\sqrt{2}/2`` and
    ``1/\sqrt{2}`` are both ``≈0.707106781187``), never like a stated number, because ``verify`` tells the two apart.
    Expressions become quotients of expanded polynomials, equations of one symbol their right side, and words stay
    words. Forms beyond that, such as ``\sin^2 x + \cos^2 x`` and 1, count as different answers.
    """
    statement = final_statement(response)
    value = stated_number(statement)
    if value is not None:
        return str(value)
    stated = statement.text if statement.marked else _last_line(statement.text)
    words = normal_words(stated) or None
    if words is None or len(stated) > _LONGEST or _WORD.search(stated):
        return words
    try:
        return next((_normal_form(item) for item in _parse(stated) if isinstance(item, sympy.Basic)), words)
    except Exception:  # sympy raises many kinds of errors on odd expressions; as text they are still an answer
        return words


def _normal_form(value: sympy.Basic) -> str:
    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        return _normal_form(value.rhs)
    if isinstance(value, sympy.FiniteSet):
        return "{" + ", ".join(sorted(map(_normal_form, value.args))) + "}"
    if isinstance(value, sympy.Tuple):
        return "(" + ", ".join(map(_normal_form, value.args)) + ")"
    if not isinstance(value, sympy.Expr):
        return str(value)
    if not value.free_symbols:
        return str(value) if value.is_Rational else f"≈{sympy.N(value, _DIGITS)}"
    powers = [abs(power.exp) for power in value.atoms(sympy.Pow) if power.exp.is_Integer]
    # Expanding these could take forever.
    if max(powers, default=0) > _MOST_EXPANDED or value.count_ops() > _MOST_OPERATIONS:
        return str(value)
    return str(sympy.cancel(sympy.together(value)))


def _unboxed(answer: str) -> str:
    return final_statement(answer).text if "\\boxed" in answer else answer


def _last_line(text: str) -> str:
    lines = text.splitlines()
    return lines[-1].strip() if lines else ""


def _parse(text: str) -> list[Any]:
    inner = text.strip().strip("$").rstrip(".").strip()
    return parse(f"\\boxed{{{inner}}}", parsing_timeout=None)
