"""The table of ``docs/faults.md`` is that of ``fault_table.py``."""

from __future__ import annotations

from pathlib import Path

from fault_runs import CASES
from fault_table import HEAD, name
from server_faults import SERVER_CASES
from slurm_faults import SLURM_CASES

DOCS = Path(__file__).parents[2] / "docs/faults.md"


def documented() -> list[list[str]]:
    """The cells of the measured rows."""
    lines = iter(DOCS.read_text().splitlines())
    assert f"| {' | '.join(HEAD)} |" in lines, "the head of the table"
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_case_is_measured_and_lost_no_step() -> None:
    rows = documented()
    assert [row[0] for row in rows] == [name(case) for case in (*CASES, *SERVER_CASES, *SLURM_CASES)]
    assert len(rows) >= 25
    assert {row[HEAD.index("steps lost")] for row in rows} == {"0"}
    assert all("**" not in row[HEAD.index("outcome")] for row in rows)
