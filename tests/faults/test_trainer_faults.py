"""A rank dies, hangs or computes nonsense: what the others do, and what is left of the run.

Each case takes two starts of torchrun; ``fault_table.py`` runs all of ``fault_runs.CASES``, these are one of a kind.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import CASES, STEPS, Case, Outcome, run_case
from safetensors.torch import load_file

VARIES = ("time", "seconds", "speed", "memory")
QUICK = ("hang in gradient reduction, rank 0", "slow in forward, rank 1")
SLOW = (
    *("kill in optimizer step, rank 1", "nan in loss, rank 1"),
    *("kill in rollout, rank 0", "kill in weight sync, rank 1", "kill in save, writing, rank 1"),
    *("kill in save, name, rank 0", "stop in backward, rank 1", "nan for ever in loss, rank 0"),
    "full disk in save, manifest, rank 0",
)


def logged(folder: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` without clocks."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VARIES)} for row in rows]


def test_the_names_are_those_of_cases() -> None:
    assert {*QUICK, *SLOW} <= {case.name for case in CASES}


def check(case: Case, outcome: Outcome, straight: Outcome) -> None:
    assert (outcome.code == 0) == case.ends_well, outcome.log[-6000:]
    assert re.search(case.says, outcome.log), outcome.log[-6000:]
    if not case.ends_well:
        return
    assert [row["step"] for row in logged(outcome.folder)] == list(range(1, STEPS + 1))
    assert outcome.lost == 0, "more than the steps since the last complete checkpoint"
    if case.same:
        assert logged(outcome.folder) == logged(straight.folder)
        ours, theirs = (load_file(o.folder / "export/model.safetensors") for o in (outcome, straight))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in QUICK], ids=lambda c: c.name)
def test_a_fault(case: Case, workspace: Path, straight: Outcome) -> None:
    check(case, run_case(case, workspace), straight)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.name in SLOW], ids=lambda c: c.name)
def test_a_rarer_fault(case: Case, workspace: Path, straight: Outcome) -> None:
    check(case, run_case(case, workspace), straight)
