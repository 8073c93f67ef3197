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
    COLUMNS,
    DEFAULT_ADAM,
    HALF_CASES,
    SLOW_CASES,
    WIDER,
    Case,
    bounds_of,
    column_of,
    difference_of,
    run_cases,
)
from torch import Tensor  # noqa: E402


def _words(bounds: dict[str, float]) -> str:
    """Bounds, those that are equal together."""
    columns: dict[float, list[str]] = {}
    for column, bound in bounds.items():
        columns.setdefault(bound, []).append(column)
    return ", ".join(f"{bound:g} ({', '.join(names)})" for bound, names in sorted(columns.items()))


_DEFAULT = "tp2-sp-pp2-default-adam"
_HALF_WIDER = "\n".join(
    f"- `{name}`: {_words(bounds)}" for (dtype, name), bounds in WIDER.items() if dtype == "bfloat16"
)
TEXT = f"""# Parallel layouts

The gradient does not depend on the layout, on how sequences fall on ranks, or on how they are cut into microbatches:
the loss is a plain sum whose weights carry every average (see [batches.md](batches.md)). This table is the evidence.

Each row trains a tiny random model twice on one frozen batch, through megatron's real schedules and gloo, and is
compared with the same two updates in one process: the largest difference, as a share of the largest value. *Update* is
all that the weights have moved, as one vector: the norm of the difference, as a share of its norm.

`sequence_kl` has a KL term to the reference model, an entropy bonus, a temperature and the `sequence` aggregation;
`token` and `constant` are the other aggregations; `gspo` and `gmpo` look at whole responses, with corrections by token
and response. Gradients are clipped, ratios lie on both sides of the clip range.
Microbatches of some rows are small, so that there are several; fillers are ranks that get no sequence at all.

Where reductions overlap they go bucket by bucket, as in a large model. `zeros-left-out` leaves out the sequences of
advantage 0 (`actor.skip_zero_advantage`), and is compared with an update on all of them.

`tests/distributed/test_layouts.py` holds every row of float32 below 1e-5, but for the update of
`{_DEFAULT}`.

**Adam's settings.** The rows train with `actor.optim.lr=0.02` (adapters: 0.1) and `actor.optim.eps=0.01` (`BASE` in
`tests/distributed/distributed_cases.py`): a large step, and a well-conditioned one. Adam divides a gradient by the root
of its second moment plus eps. For a few weights of every batch the gradient is nothing but rounding noise; a tiny eps
makes a step of full size of it, in a direction that depends on the order of sums, and eps=0.01 leaves such a weight
where it is. Loss and gradient norm do not depend on that. `{_DEFAULT}` has the optimizer's settings
of a run that sets none ({", ".join(option.removeprefix("actor.optim.") for option in DEFAULT_ADAM)}): its loss
and gradient norm agree like those of all other rows, and the bound on its update is
{WIDER["float32", _DEFAULT]["update"]:g}.

**bfloat16.** Each sum is rounded in another order, by up to 1/256 of a value, and two large updates amplify that. Loss
and gradient norm are sums over all tokens and weights, in which roundings even out, so their bounds are tighter than
those of single entries. The command that makes this table fails above these bounds; the tests repeat {len(HALF_CASES)}
of the rows.

- all rows: {_words(BOUNDS["bfloat16"])}
{_HALF_WIDER}
"""


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference in each of ``COLUMNS``."""
    largest = dict.fromkeys(COLUMNS, 0.0)
    for name, value in expected.items():
        if not name.endswith("computed"):
            largest[column_of(name)] = max(largest[column_of(name)], difference_of(name, found[name], value))
    return largest


def rows(launcher: Launcher, cases: dict[str, Case], frozen: Path) -> dict[str, dict[str, float]]:
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
            [name, str(case.ranks), case.model, case.loss, *(f"{value:.0e}" for value in measured[name].values())]
            for name, case in cases.items()
        ]
        table = markdown_table(["layout", "processes", "model", "loss terms", *COLUMNS], body)
        print(f"## {dtype}", "", *table, "", sep="\n")
    print("Measured with `python tests/distributed/layout_table.py` on:\n")
    print("\n".join(machine_lines(describe_machine())))
    above = [
        f"{name} in {dtype}, {column}: {value:.2e}, the bound is {bounds_of(name, dtype)[column]:g}"
        for dtype, measured in found.items()
        for name in cases
        for column, value in measured[name].items()
        if not value <= bounds_of(name, dtype)[column]
    ]
    if above:
        sys.exit("\n".join(above))


if __name__ == "__main__":
    main()
