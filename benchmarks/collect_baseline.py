"""Keep what a comparison found: its report, and the numbers that it was made from.

    python benchmarks/collect_baseline.py runs/chain_sum build/chain_sum

Into ``results/baseline/NAME/`` go the report (Markdown, pictures, ``summary.json``), the configurations, how the model
was warmed up, every step's metrics and every evaluation's numbers as parquet (a row a step and run), whether each
response of the last evaluation was right, and the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from machine import describe_machine
from report import RESULTS

from megatron_mapo.reporting.arms import Arm, collect


def write_table(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows with their union of columns; a column that a row lacks is null there."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    narrow = [pa.field(f.name, pa.float32() if f.type == pa.float64() else f.type) for f in table.schema]
    pq.write_table(table.cast(pa.schema(narrow)), file, compression="zstd", compression_level=19)


def runs_of(arms: list[Arm], seeds: list[int]) -> list[tuple[dict[str, Any], Any]]:
    """Every run, with the columns that name it."""
    return [({"configuration": arm.label, "seed": seed}, arm.runs[seed]) for arm in arms for seed in seeds]


def main() -> None:
    """Collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder that `megatron-mapo compare` made")
    parser.add_argument("model", type=Path, help="folder that warm_start.py made")
    parser.add_argument("--output", type=Path, default=RESULTS / "baseline", help="default: results/baseline")
    arguments = parser.parse_args()
    summary = json.loads((arguments.comparison / "report" / "summary.json").read_text())
    folders = [arguments.comparison / Path(run).name for arm in summary["runs"].values() for run in arm.values()]
    study = collect(folders, summary["baseline"])
    out = arguments.output / arguments.comparison.name
    out.mkdir(parents=True, exist_ok=True)
    # Folders of the machine that it ran on mean nothing elsewhere.
    local = {f"{folder.resolve().parent}/": "" for folder in (arguments.comparison, arguments.model.parent)}
    texts = [arguments.comparison / "report/report.md", arguments.comparison / "report/summary.json"]
    for file in [*texts, *arguments.comparison.glob("*.yaml"), arguments.model / "warm_start.json"]:
        text = file.read_text()
        for prefix, short in local.items():
            text = text.replace(prefix, short)
        (out / file.name).write_text(text)
    for file in arguments.comparison.glob("report/*.png"):
        shutil.copy(file, out / file.name)
    runs = runs_of(study.arms, study.seeds)
    write_table(out / "metrics.parquet", (name | row for name, run in runs for row in run.metrics))
    write_table(out / "evaluations.parquet", (name | row for name, run in runs for row in run.evaluations))
    write_table(
        out / "final_answers.parquet",
        (
            name | {key: row[key] for key in ("prompt_id", "right")} | {"sample": str(row["sample"])}
            for name, run in runs
            for row in run.evaluation_samples(run.steps)
        ),
    )
    (out / "machine.json").write_text(json.dumps(describe_machine(), indent=2) + "\n")
    print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


if __name__ == "__main__":
    main()
