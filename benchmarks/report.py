"""Results as JSON and Markdown files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, all others to the right."""
    rule = [":--", *(["--:"] * (len(head) - 1))]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def write_results(name: str, result: dict[str, Any], markdown: str, folder: Path | None = None) -> None:
    """Print the Markdown and write ``NAME.json`` and ``NAME.md`` into ``folder`` (default: ``RESULTS``)."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown)
    print(markdown)
    print(f"written: {folder / name}.json, {folder / name}.md")
