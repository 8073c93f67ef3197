"""Every layout of the tests beside one process, in both types, as the table of ``docs/layouts.md``.

    python tests/distributed/layout_table.py > docs/layouts.md
    python tests/distributed/layout_table.py tp2 dp2-overlap      # some rows alone

It runs all cases of ``test_layouts.py``, the slow ones too: minutes on two cores. A row above its bound fails.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent, HERE.parents[1] / "benchmarks")]

from frozen_batch import build_frozen  # noqa: E402
from harness import Launcher  # noqa: E402
from machine import describe_machine, machine_lines  # noqa: E402
from report import markdown_table  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_layouts import (  # noqa: E402
    BOUNDS,
    CASES,
    HALF_CASES,
    SLOW_CASES,
    WIDER,
    Case,
    bound_of,
    relative_difference,
    run_cases,
)
from torch import Tensor  # noqa: E402

TEXT = f"""# Parallel layouts

The gradient does not depend on the layout, on how sequences fall on ranks, or on how they are cut into microbatches:
the loss is a plain sum whose weights carry every average (see [batches.md](batches.md)). This table is the evidence.

Each row trains a tiny random model twice on one frozen batch, through megatron's real schedules and gloo, and is
compared with the same two updates in one process: the largest difference, as a share of the largest value.
`sequence_kl` has a KL term to the reference model, an entropy bonus, a temperature and the `sequence` aggregation;
`token` and `constant` are the other aggregations; `gspo` and `gmpo` look at whole responses, with corrections by token
and response. Gradients are clipped, ratios lie on both sides of the clip range.
Microbatches of some rows are small, so that there are several; fillers are ranks that get no sequence at all.

Where reductions overlap they go bucket by bucket, as in a large model. `zeros-left-out` leaves out the sequences of
advantage 0 (`actor.skip_zero_advantage`), and is compared with an update on all of them.

`tests/distributed/test_layouts.py` holds every row of float32 below 1e-5. In bfloat16 each sum is rounded in another
order, and two large updates amplify that: the command that makes this table fails above {BOUNDS["bfloat16"]:g}
({", ".join(f"{bound:g} in `{name}`" for name, bound in WIDER.items())}); the tests repeat {len(HALF_CASES)} of the
rows.
"""
COLUMNS = ("loss", "grad norm", "logged metrics", "log-probs", "updated weights")


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[float]:
    """Largest relative difference of each of ``COLUMNS``."""
    groups: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for name, value in expected.items():
        if name.endswith("computed"):
            continue
        kind = "log-probs" if "scores" in name or name.startswith("after") else "updated weights"
        if not name.startswith(("weight.", "after")):
            kind = {"loss": "loss", "grad_norm": "grad norm", "metric": "logged metrics"}.get(name.split(".")[1], kind)
        groups[kind].append(relative_difference(found[name], value))
    return [max(values) for values in groups.values()]


def rows(launcher: Launcher, cases: dict[str, Case], frozen: Path) -> dict[str, list[float]]:
    """Each case's differences from its reference."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        run_cases(launcher, cases, frozen, out)
        runs = {file.stem: load_file(file) for file in out.iterdir()}
    return {name: differences(runs[name], runs[case.reference]) for name, case in cases.items()}


def main() -> None:
    """Print the document, or the rows of the cases that are named."""
    cases = dict(sorted((CASES | SLOW_CASES).items(), key=lambda item: item[1].ranks))
    cases = {name: cases[name] for name in sys.argv[1:] or cases}
    half = {name: dataclasses.replace(case, dtype="bfloat16") for name, case in cases.items()}
    launcher = Launcher()
    try:
        with tempfile.TemporaryDirectory() as folder:
            frozen = build_frozen(launcher, Path(folder))
            found = {"float32": rows(launcher, cases, frozen), "bfloat16": rows(launcher, half, frozen)}
    finally:
        launcher.close()
    print(TEXT)
    for dtype, measured in found.items():
        body = [
            [name, str(case.ranks), case.model, case.loss, *(f"{value:.0e}" for value in measured[name])]
            for name, case in cases.items()
        ]
        table = markdown_table(["layout", "processes", "model", "loss terms", *COLUMNS], body)
        print(f"## {dtype}", "", *table, "", sep="\n")
    print("Measured with `python tests/distributed/layout_table.py` on:\n")
    print("\n".join(machine_lines(describe_machine())))
    above = [
        f"{name} in {dtype}: {max(measured[name]):.2e}, the bound is {bound_of(name, dtype)}"
        for dtype, measured in found.items()
        for name in cases
        if not max(measured[name]) <= bound_of(name, dtype)
    ]
    if above:
        sys.exit("\n".join(above))


if __name__ == "__main__":
    main()
