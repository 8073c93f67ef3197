"""What a check says: a line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    ok = "ok"
    warning = "warning"
    fails = "fails"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: ``fails`` if a run cannot work like this; ``warning`` if it may not do what one expects.
        detail: what was found.
        fix: command or setting that mends it; empty where nothing is to be mended.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Finding:
    """All is well."""
    return Finding(name, Status.ok, detail)


def warning(name: str, detail: str, fix: str) -> Finding:
    """Worth knowing; a run may still work."""
    return Finding(name, Status.warning, detail, fix)


def failure(name: str, detail: str, fix: str) -> Finding:
    """A run cannot work like this."""
    return Finding(name, Status.fails, detail, fix)


def gib(count: float) -> str:
    """Bytes as text."""
    return f"{count / 2**30:.2f} GiB"
