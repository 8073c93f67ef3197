"""Faults of trainers, servers and Slurm's nodes, one real run each, as the table of ``docs/faults.md``.

    python tests/faults/fault_table.py [trainers] [servers] [slurm]

Without arguments all that this machine can do: half an hour on two cores. A row is printed as soon as its run is over.
Ends with 1 if a run lost a step that a checkpoint held, ended with other weights than the undisturbed one, or did not
say what it must.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent, HERE.parents[1] / "benchmarks")]

import torch  # noqa: E402
from fault_runs import CASES, UNDISTURBED, Case, Outcome, make_workspace, run_case  # noqa: E402
from machine import describe_machine, machine_lines  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from server_faults import SERVER_CASES, ServerCase, run_server_case, two_servers  # noqa: E402
from slurm_faults import SLURM_CASES, SlurmCase, missing_programs, run_slurm_case, slurm_cluster  # noqa: E402

HEAD = ("fault", "outcome", "steps done again", "steps lost", "seconds")


@dataclass(frozen=True)
class Row:
    """A run with a fault.

    Attributes:
        fault: what happened.
        outcome: what became of the run.
        straight: folder of the undisturbed run.
        says: what the run had to print.
        same: it had to end with the undisturbed run's weights.
    """

    fault: str
    outcome: Outcome
    straight: Path
    says: str
    same: bool = True

    def problems(self) -> list[str]:
        """What is not as it should be."""
        wrong = {
            "it did not say what it must": not re.search(self.says, self.outcome.log),
            "saved steps were lost": self.outcome.lost > 0,
            "other weights": self.same and not same_weights(self.outcome.folder, self.straight),
        }
        return [text for text, holds in wrong.items() if holds]

    def cells(self) -> list[str]:
        """The row of the table."""
        outcome, found = self.outcome, "; ".join([self.words(), *(f"**{text}**" for text in self.problems())])
        return [self.fault, found, str(outcome.again), str(outcome.lost), f"{outcome.seconds:.0f}"]

    def words(self) -> str:
        """The end of the run."""
        outcome = self.outcome
        skipped = len(set(re.findall(r"step (\d+): loss or gradient is not finite", outcome.log)))
        if outcome.code != 0:
            return f"ends after {skipped} skipped updates" if skipped else f"ends with code {outcome.code}"
        if skipped:
            return f"goes on, {skipped} update skipped"
        return ("goes on" if outcome.resumed_from is None else "starts again") + ", same weights" * self.same


def name(case: Case | ServerCase | SlurmCase) -> str:
    """What the table calls a case."""
    if isinstance(case, Case):
        return f"rank {case.rank}: {case.action} in {case.place}"
    if isinstance(case, ServerCase):
        return f"servers: {case.name} ({case.place})"
    return f"Slurm: {case.name}"


def same_weights(one: Path, other: Path) -> bool:
    """The exports of two runs are equal bit for bit."""
    if not (one / "export/model.safetensors").exists():
        return False
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def trainers(workspace: Path) -> Iterator[Row]:
    """Two ranks under ``torchrun --max-restarts=1``."""
    straight = run_case(UNDISTURBED, workspace)
    assert straight.code == 0, straight.log
    for case in CASES:
        yield Row(name(case), run_case(case, workspace), straight.folder, case.says, case.same)


def servers(workspace: Path) -> Iterator[Row]:
    """One trainer and two servers under a supervisor; a run that ends with an error is started once more."""
    with two_servers(workspace) as pair:
        straight = run_server_case(None, pair, workspace)
        assert straight.code == 0, straight.log
        for case in SERVER_CASES:
            outcome = run_server_case(case, pair, workspace)
            yield Row(name(case), outcome, straight.folder, case.says)


def slurm(workspace: Path) -> Iterator[Row]:
    """Jobs of three nodes on a Slurm of four: two train, one serves."""
    with slurm_cluster() as cluster:
        straight = run_slurm_case(None, cluster, workspace)
        assert straight.code == 0, straight.log
        for case in SLURM_CASES:
            yield Row(name(case), run_slurm_case(case, cluster, workspace), straight.folder, case.says)


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {"trainers": trainers, "servers": servers, "slurm": slurm}


def main() -> int:
    """Print the table."""
    chosen = sys.argv[1:] or [name for name in PARTS if name != "slurm" or not missing_programs()]
    machine = describe_machine()
    failed = False
    print(f"| {' | '.join(HEAD)} |\n| :-- | :-- | --: | --: | --: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        workspace = make_workspace(Path(folder))
        for part in chosen:
            for row in PARTS[part](workspace):
                print(f"| {' | '.join(row.cells())} |", flush=True)
                if row.problems():
                    failed = True
                    print(f"{row.fault}: {row.outcome.log[-6000:]}", file=sys.stderr, flush=True)
    print("\nMeasured on:\n")
    print("\n".join(machine_lines(machine)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
