"""Verifier ``format``: the response has the wanted form, whatever it says. Usually a small part of a mixture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

TAGS = ("think", "answer")
_NAME = re.compile(r"[A-Za-z][\w-]*")


def verify(
    response: str, answer: str, metadata: dict[str, Any], *, tags: Sequence[str] = TAGS, opened: bool = False
) -> bool:
    """The response is ``<think>...</think><answer>...</answer>`` and nothing else but white space.

    Every tag stands exactly once, and something stands inside. All checks take linear time.

    Args:
        response: the response.
        answer: not used.
        metadata: not used.
        tags: names of the elements, in order.
        opened: the prompt ends with the first opening tag, so the response begins inside it.
    """
    text = f"<{tags[0]}>{response}" if opened else response
    for tag in tags:
        begin, end = f"<{tag}>", f"</{tag}>"
        if text.count(begin) != 1 or text.count(end) != 1:
            return False
        before, _, rest = text.partition(begin)
        inside, closed, text = rest.partition(end)
        if before.strip() or not closed or not inside.strip():
            return False
        if any(f"<{other}>" in inside or f"</{other}>" in inside for other in tags):
            return False
    return not text.strip()


def check_options(*, tags: Sequence[str] = TAGS, opened: bool = False) -> None:
    """Raise ``ValueError`` for names that are none, or none at all."""
    if isinstance(tags, str) or not tags or len(set(tags)) != len(tags):
        raise ValueError(f"tags must be a list of different names, got {tags!r}")
    for tag in tags:
        if not isinstance(tag, str) or not _NAME.fullmatch(tag):
            raise ValueError(f"tags must hold names such as think, got {tag!r}")
    if not isinstance(opened, bool):
        raise ValueError(f"opened must be true or false, got {opened!r}")
