"""Verifier ``reasoning_gym``: the task's own scorer (github.com/open-thought/reasoning-gym).

Some scorers hand the answer to Python's ``eval``, or to sympy's ``parse_expr``, which does so too. A response that
calls anything must not get there: it is wrong, whatever the task.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from reasoning_gym import get_score_answer_fn

from megatron_mapo.rewards.answers import final_statement

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCED = re.compile(r"\s*```\w*\n(.*?)\n[ \t]*```", re.DOTALL)

EVALUATED_AS_PYTHON = frozenset({"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"})
"""Tasks that ``eval`` an answer, for it may be a list."""
EVALUATED_BY_SYMPY = frozenset(
    {"countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication"}
)
"""Tasks that ``parse_expr`` an answer."""
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop, ast.Name, ast.Load)
_CONTAINERS = (ast.List, ast.Tuple, ast.Set, ast.Dict)
_FUNCTIONS = {
    *("sqrt", "exp", "log", "ln", "Abs", "erf", "Integral"),
    *("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh"),
    *("asin", "acos", "atan", "asinh", "acosh", "atanh"),
}
"""What a formula may call; the tasks' own answers use some of these."""


def verify(response: str, answer: str, metadata: dict[str, Any]) -> float:
    """Score from 0 to 1, as the task gives it; many tasks give partial scores.

    The scorer sees what stands in the last ``<answer>...</answer>``, else the last marked answer (see ``answers``),
    else the whole response, as it was written: white space and asterisks mean something in grids and formulas.
    Where a marked answer ends is not known, so it is read as all that follows, as the paragraph, the line, and the
    sentence without decoration. The best score counts; all begin with the same words.

    Args:
        response: the response.
        answer: the task's own answer.
        metadata: the ``metadata`` of the task's entry (it names the task in ``source_dataset``), or the whole
            entry with ``question``, ``answer`` and ``metadata``.

    Raises:
        ValueError: ``metadata`` does not name a task.
    """
    inner = metadata.get("metadata", metadata)
    task = inner.get("source_dataset")
    if task is None:
        raise ValueError(
            "the row has no `source_dataset`: reward.name=reasoning_gym needs data.train=reasoning_gym:TASK"
        )
    entry = {"question": metadata.get("question", ""), "answer": answer, "metadata": inner}
    return max(_score(task, text, entry) if _is_data(task, text) else 0.0 for text in _readings(response))


def extract(response: str) -> str | None:
    """What the task's scorer is shown, with white space made even; None if that is nothing."""
    readings = _readings(response)
    # Words without decoration, but every line of a grid.
    return " ".join(readings[0 if "\n" in readings[0] else -1].split()) or None


def _score(task: str, text: str, entry: dict[str, Any]) -> float:
    score = _scorer(task)
    try:
        return float(score(answer=text, entry=entry))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        # Some scorers raise on what they cannot read. The task's own answer they can, unless the row is broken.
        score(answer=entry["answer"], entry=entry)
        return 0.0


@lru_cache
def _scorer(task: str) -> Callable[..., float]:
    return get_score_answer_fn(task)


def _readings(response: str) -> list[str]:
    """What may be the answer; the first is the longest."""
    tagged = _TAGGED.findall(response.rpartition("</think>")[2])
    if tagged:
        return [tagged[-1].strip()]
    statement = final_statement(response)
    fenced = _FENCED.match(statement.raw)
    raw = (fenced[1] if fenced else statement.raw).strip()
    cut = [raw.partition("\n\n")[0], raw.partition("\n")[0].strip("`$* .")] if statement.marked else []
    # Without white space at the ends: `eval` takes it, and `_is_data` would not see what it takes.
    return list(dict.fromkeys(text.strip() for text in (raw, *cut, statement.text)))


def _is_data(task: str, text: str) -> bool:
    """Whether the task's scorer can have this answer without running code that stands in it."""
    if task in EVALUATED_AS_PYTHON:
        try:
            tree = ast.parse(text, mode="eval")
        except SyntaxError:
            return True  # for `eval` too; such answers are compared as text
        except (ValueError, MemoryError, RecursionError):
            return False
        return all(isinstance(node, (*_ARITHMETIC, *_CONTAINERS, ast.Constant)) for node in ast.walk(tree))
    if task in EVALUATED_BY_SYMPY:
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False  # sympy reads more than Python, such as 5!, and it is not known here what it would run
        return all(_is_formula(node) for node in ast.walk(tree))
    return True


def _is_formula(node: ast.AST) -> bool:
    """Numbers, names, operators, known functions. No strings: sympy's functions evaluate those."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    return isinstance(node, _ARITHMETIC)
