"""Verifier ``reasoning_gym``: the task's own scorer (github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from reasoning_gym import get_score_answer_fn

from megatron_mapo.rewards.answers import final_statement

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def verify(response: str, answer: str, metadata: dict[str, Any]) -> float:
    """Score from 0 to 1, as the task gives it; many tasks give partial scores.

    The scorer sees what stands in the last ``<answer>...</answer>``, else the last marked answer (see
    ``answers``), else the whole response.

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
    return float(_scorer(task)(answer=_stated(response), entry=entry))


def extract(response: str) -> str | None:
    """What the task's scorer is shown, with white space made even; None if that is nothing."""
    return " ".join(_stated(response).split()) or None


@lru_cache
def _scorer(task: str) -> Callable[..., float]:
    return get_score_answer_fn(task)


def _stated(response: str) -> str:
    tagged = _TAGGED.findall(response.rpartition("</think>")[2])
    return tagged[-1].strip() if tagged else final_statement(response).text
