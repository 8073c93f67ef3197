"""Read a run's folder: plain files, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mapo.errors import DataError
from megatron_mapo.tracking.jsonl import Row, read_rows


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint of a run.

    Attributes:
        step: finished steps.
        path: its folder.
        size: bytes of its files.
    """

    step: int
    path: Path
    size: int


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder tells.

    Attributes:
        config: text of ``config.yaml``.
        step: last step in ``metrics.jsonl``; None if there is none.
        checkpoints: oldest first.
        metrics: the last value of every metric, and the step that it is of.
        evaluation: the same of ``evaluations.jsonl``.
    """

    config: str
    step: int | None
    checkpoints: list[Checkpoint]
    metrics: dict[str, tuple[Any, int]]
    evaluation: dict[str, tuple[Any, int]]


def read_run(folder: str | Path) -> RunSummary:
    """Read the folder of a run, finished or not.

    Raises:
        DataError: it is not a run's folder, or a line of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} is not the folder of a run: it has no config.yaml")
    steps = read_rows(folder / "metrics.jsonl")
    return RunSummary(
        config=(folder / "config.yaml").read_text(),
        step=steps[-1].get("step") if steps else None,
        checkpoints=list_checkpoints(folder),
        metrics=_last_values(steps),
        evaluation=_last_values(read_rows(folder / "evaluations.jsonl")),
    )


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints of the run in ``folder``, oldest first."""
    found = []
    for path in (folder / "checkpoints").glob("step_*"):
        match = re.fullmatch(r"step_(\d{6,})", path.name)
        if match and path.is_dir():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(Checkpoint(int(match[1]), path, size))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _last_values(rows: list[Row]) -> dict[str, tuple[Any, int]]:
    """Last value of every key, and the step that it is of."""
    values: dict[str, tuple[Any, int]] = {}
    for row in rows:
        values |= {name: (value, row.get("step", 0)) for name, value in row.items() if name != "step"}
    return values
