"""All faults of a trainer, one run each, as the table of ``docs/faults.md``.

    python tests/faults/fault_table.py

Every run is two ranks under ``torchrun --max-restarts=1``; a quarter of an hour on two cores.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent, HERE.parents[1] / "benchmarks")]

import torch  # noqa: E402
from fault_runs import CASES, UNDISTURBED, Case, Outcome, make_workspace, run_case  # noqa: E402
from machine import describe_machine, machine_lines  # noqa: E402
from report import markdown_table  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def same_weights(one: Path, other: Path) -> bool:
    """The exports of two runs are equal bit for bit."""
    if not (one / "export/model.safetensors").exists():
        return False
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def what_happened(case: Case, outcome: Outcome, straight: Path) -> str:
    """The end of the run in words."""
    skipped = len(set(re.findall(r"step (\d+): loss or gradient is not finite", outcome.log)))
    if outcome.code != 0:
        return f"stops after {skipped} skipped updates" if skipped else "stops"
    if skipped:
        return f"goes on, {skipped} update skipped"
    weights = "weights equal the undisturbed run's" if same_weights(outcome.folder, straight) else "other weights"
    return f"{'starts again' if outcome.resumed_from is not None else 'goes on'}, {weights}"


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        workspace = make_workspace(Path(name))
        straight = run_case(UNDISTURBED, workspace)
        assert straight.code == 0, straight.log
        rows = []
        for case in CASES:
            outcome = run_case(case, workspace)
            found = what_happened(case, outcome, straight.folder)
            seconds = "-" if math.isnan(outcome.recovered) else f"{outcome.recovered:.0f}"
            told = "yes" if not case.says or re.search(case.says, outcome.log) else "**no**"
            rows.append([f"{case.action} in: {case.place}", str(case.rank), found, str(outcome.lost), seconds, told])
            print(rows[-1], file=sys.stderr, flush=True)
    head = ["fault", "rank", "outcome", "steps done again", "seconds to the next step", "told as it should be"]
    print("\n".join(markdown_table(head, rows)))
    print("\nMeasured on:\n")
    print("\n".join(machine_lines(describe_machine())))


if __name__ == "__main__":
    main()
