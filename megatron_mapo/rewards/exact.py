"""Verifier ``exact``: the response is the reference answer, letter by letter."""

from __future__ import annotations

from typing import Any


def verify(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """Equal after white space at both ends is removed."""
    return response.strip() == answer.strip()


def extract(response: str) -> str | None:
    """The whole response; None if it is blank."""
    return response.strip() or None
