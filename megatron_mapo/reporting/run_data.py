"""What a run's folder holds, read for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mapo.checkpoint_files import read_manifest
from megatron_mapo.config import flatten
from megatron_mapo.errors import CheckpointError, DataError
from megatron_mapo.launch.run_folder import list_checkpoints
from megatron_mapo.tracking.jsonl import Row, read_rows
from megatron_mapo.tracking.rollouts import rollout_files

TRAINING_ACCURACY = ("filter/accuracy", "reward/accuracy")
"""The success rate of what a step sampled: with ``rollout.filter`` the second one is that of the groups kept."""


def first_of(row: Row, names: Sequence[str]) -> float | None:
    """The first of these numbers that a row has."""
    return next((row[name] for name in names if row.get(name) is not None), None)


@dataclass(frozen=True)
class RunData:
    """A run, finished or not.

    Attributes:
        folder: of the run.
        config: its options by dotted key, as plain values.
        metrics: a row a step.
        evaluations: a row an evaluation.
        starts: a row a start of the trainers; empty for runs of earlier versions.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[Row]
    evaluations: list[Row]
    starts: list[Row]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def steps(self) -> int:
        """``trainer.steps``."""
        return int(self.config["trainer.steps"])

    @property
    def finished(self) -> bool:
        """All steps are done, and so is the evaluation after the last one if there is to be one."""
        if self.step < self.steps:
            return False
        wanted = self.config.get("data.eval") is not None and self.config.get("trainer.evaluation.at_end")
        return not wanted or any(row["step"] == self.steps for row in self.evaluations)

    @property
    def last_evaluation(self) -> Row | None:
        """The last evaluation of weights that were trained."""
        return next((row for row in reversed(self.evaluations) if row["step"] > 0), None)

    @property
    def moments(self) -> list[float]:
        """When the trainers were started and when a row was written (seconds since 1970)."""
        return [row["time"] for row in (*self.starts, *self.metrics, *self.evaluations) if "time" in row]

    @property
    def rollouts(self) -> list[Path]:
        """Files of the sequences trained on, first step first."""
        return rollout_files(self.folder / "rollouts")

    def evaluation_samples(self, step: int) -> list[Row]:
        """All responses of the evaluation after ``step`` steps; none if they were not kept."""
        return read_rows(self.folder / "evaluation_samples" / f"step_{step:06d}.jsonl")

    def made_with(self) -> tuple[str, str]:
        """Layout and versions of the last start, in words; by the newest checkpoint for runs of earlier versions."""
        if self.starts:
            last = self.starts[-1]
            sizes = {name: size for name, size in last["layout"].items() if size not in (1, False)}
            return _layout(last["ranks"], sizes) + f" on {last['device']}", _words(last["versions"])
        for checkpoint in reversed(list_checkpoints(self.folder)):
            try:
                manifest = read_manifest(checkpoint.path)
            except CheckpointError:  # `inspect` is the command that tells of damage
                continue
            if manifest is not None:
                sizes = dict(manifest.layout)
                ranks = sizes.pop("world_size")
                return _layout(ranks, {k: v for k, v in sizes.items() if v != 1}), _words(manifest.versions)
        return "not recorded", "not recorded"


def load_run(folder: str | Path) -> RunData:
    """Read a run's folder.

    Raises:
        DataError: it is not a run's folder, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or (folder / "config.json").is_file():
        raise DataError(f"{folder} is not the folder of a run: it has no config.yaml")
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{folder / 'config.yaml'} cannot be read: {' '.join(str(error).split())}") from error
    config = flatten(tree) if isinstance(tree, dict) else {}
    if not isinstance(config.get("trainer.steps"), int):
        raise DataError(f"{folder / 'config.yaml'} is not the configuration of a run: it has no trainer.steps")
    return RunData(
        folder,
        config,
        read_rows(folder / "metrics.jsonl"),
        read_rows(folder / "evaluations.jsonl"),
        read_rows(folder / "starts.jsonl"),
    )


def _layout(ranks: int, sizes: Mapping[str, Any]) -> str:
    parts = " x ".join(f"{name} {size}" for name, size in sizes.items())
    return f"{ranks} rank{'s' if ranks > 1 else ''}" + (f": {parts}" if parts else "")


def _words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
