"""Findings on a terminal, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from megatron_mapo.doctor.finding import Finding, Status

_STYLES = {Status.ok: "green", Status.warning: "yellow", Status.fails: "bold red"}
_NAME_WIDTH = 22


def print_report(findings: Iterable[Finding]) -> bool:
    """A line as soon as a check is done, its mending below, and a count at the end.

    Returns:
        whether nothing fails.
    """
    console = Console(highlight=False)
    counts = dict.fromkeys(Status, 0)
    for finding in findings:
        counts[finding.status] += 1
        line = Text.assemble(
            (f"{finding.status.value:<8}", _STYLES[finding.status]),
            (f"{finding.name:<{_NAME_WIDTH}} ", "cyan"),
            finding.detail,
        )
        console.print(line, soft_wrap=True)
        if finding.fix:
            console.print(Text(f"{'':8}{'':{_NAME_WIDTH}} -> {finding.fix}"), soft_wrap=True)
    console.print(", ".join(f"{count} {status.value}" for status, count in counts.items()))
    return counts[Status.fails] == 0


def print_json(findings: Iterable[Finding]) -> bool:
    """One object: ``ok`` (nothing fails), and ``checks`` with name, status, detail and fix each.

    Returns:
        whether nothing fails.
    """
    found = list(findings)
    good = all(finding.status is not Status.fails for finding in found)
    print(json.dumps({"ok": good, "checks": [asdict(finding) for finding in found]}, indent=1))
    return good
