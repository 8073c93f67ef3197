"""Writes what rank 0 reports about a run into the run folder.

========================  ==========================================================
``metrics.jsonl``         one row per step
``samples.jsonl``         a few sequences per step
``rollouts/``             all sequences, one parquet file per step (see ``rollouts.py``)
``evaluations.jsonl``     one row per evaluation
``evaluation_samples/``   one file per evaluation, ``step_NNNNNN.jsonl``: all of its responses
``starts.jsonl``          one row per start of the trainers: when, after which step, layout, versions
``tensorboard/``          the same numbers as event files
``curves.png``            the picture of ``plots.plot_run``, renewed while training
========================  ==========================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mapo.tracking.jsonl import JsonlWriter, Row, read_rows, replace_rows
from megatron_mapo.tracking.plots import accuracy_names, plot_run
from megatron_mapo.tracking.progress import ProgressView, duration, open_progress
from megatron_mapo.tracking.rollouts import Columns, RolloutWriter

if TYPE_CHECKING:
    from megatron_mapo.config import TrackingConfig

_SECONDS_BETWEEN_PLOTS = 30.0
_PLOT_SHARE = 0.02


class Tracker:
    """Everything that is written beside checkpoints. Only rank 0 has one.

    Steps are numbered by what is finished: the first training step is logged as 1, an evaluation before it as 0.

    Args:
        run_dir: the run folder; exists.
        config: section ``tracking``.
        total_steps: ``trainer.steps``.
        start_step: finished steps, by the checkpoint that the run goes on from. Rows of later steps are cut, so
            that no step stands twice in a file; at 0 all rows are.

    Raises:
        DataError: a file of an earlier start is damaged before its last line.
    """

    def __init__(self, run_dir: str | Path, config: TrackingConfig, total_steps: int, start_step: int) -> None:
        self._run_dir, self._config = Path(run_dir), config
        self._total_steps, self._start_step = total_steps, start_step
        self._metrics = JsonlWriter(self._run_dir / "metrics.jsonl", start_step)
        self._samples = JsonlWriter(self._run_dir / "samples.jsonl", start_step)
        self._evaluations = JsonlWriter(self._run_dir / "evaluations.jsonl", start_step)
        self._rollouts = RolloutWriter(self._run_dir / "rollouts", start_step)
        for file in (self._run_dir / "evaluation_samples").glob("step_*.jsonl"):
            if not start_step or int(file.stem.removeprefix("step_")) > start_step:
                file.unlink()
        self._first: Row | None = self._metrics.kept[0] if self._metrics.kept else None
        self._last: Row | None = self._metrics.kept[-1] if self._metrics.kept else None
        self._evaluated: list[Row] = list(self._evaluations.kept)
        self._board = self._open_tensorboard()
        self._view: ProgressView | None = open_progress(total_steps, start_step) if config.progress else None
        self._started = self._next_plot = time.monotonic()
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a finished step's metrics."""
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._metrics.write(row)
        self._first, self._last = self._first or row, row
        self._log_to_tensorboard(step, metrics)
        if self._view is not None:
            self._view.show(step, metrics)
        if self._config.plots and time.monotonic() >= self._next_plot:
            self._plot()

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write sequences as the caller describes them (JSON types)."""
        for row in rows:
            self._samples.write({"step": step, **row})

    def log_rollouts(self, step: int, columns: Callable[[], Columns]) -> None:
        """Write all sequences of a step while the next one begins (see ``RolloutWriter.write``)."""
        if self._config.rollouts:
            self._rollouts.write(step, columns)

    def log_start(self, start: Mapping[str, Any]) -> None:
        """Write that trainers were started. These rows stay when a run goes on."""
        path = self._run_dir / "starts.jsonl"
        row = {"time": round(time.time(), 3), "step": self._start_step, **start}
        replace_rows(path, [*read_rows(path), row])

    def flush(self) -> None:
        """Wait for what is still being written: a checkpoint must not be ahead of the files of its steps."""
        self._rollouts.flush()

    def evaluated(self, step: int) -> bool:
        """Whether the weights after ``step`` steps have been evaluated."""
        return any(row["step"] == step for row in self._evaluated)

    def log_evaluation(
        self, step: int, evaluation: Mapping[str, Any], samples: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Write an evaluation of the weights after ``step`` steps and its samples, and say its accuracies."""
        folder = self._run_dir / "evaluation_samples"
        folder.mkdir(exist_ok=True)
        replace_rows(folder / f"step_{step:06d}.jsonl", samples)
        row = {"step": step, "time": round(time.time(), 3), **evaluation}
        self._evaluations.write(row)
        self._evaluated.append(row)
        numbers = {name: value for name, value in evaluation.items() if isinstance(value, int | float)}
        self._log_to_tensorboard(step, {_under("eval", name): value for name, value in numbers.items()})
        if self._view is not None:
            self._view.note(f"evaluation after step {step}:  {_accuracies(row)}")

    def close(self) -> None:
        """Renew the picture, close all files, print a summary. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._view is not None:
            self._view.close()
        for writer in (self._metrics, self._samples, self._evaluations):
            writer.close()
        if self._board is not None:
            self._board.close()
        if self._config.plots and self._last is not None:
            self._plot()
        print(self._summary(), flush=True)
        self._rollouts.close()

    def _open_tensorboard(self) -> Any:
        if not self._config.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the events of steps that are done again.
        purge = self._start_step + 1 if self._start_step else 0
        return SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=purge)

    def _log_to_tensorboard(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._board is None:
            return
        for name, value in metrics.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def _plot(self) -> None:
        """Draw the picture; the next one waits long enough to cost at most ``_PLOT_SHARE`` of the time."""
        started = time.monotonic()
        plot_run(self._run_dir, self._run_dir / "curves.png")
        seconds = time.monotonic() - started
        self._next_plot = time.monotonic() + max(_SECONDS_BETWEEN_PLOTS, seconds / _PLOT_SHARE)

    def _summary(self) -> str:
        if self._last is None:
            return f"{self._run_dir}: no step finished"
        took = duration(time.monotonic() - self._started)
        lines = [f"{self._run_dir}: step {self._last['step']} of {self._total_steps}, {took}"]
        for label, name in (("reward", "reward/mean"), ("accuracy", "reward/accuracy")):
            first, last = (self._first or {}).get(name), self._last.get(name)
            if first is not None and last is not None:
                lines.append(f"  {label:12}{first:.3f} -> {last:.3f}")
        if self._evaluated:
            lines.append(f"  evaluation  {_accuracies(self._evaluated[0])} (step {self._evaluated[0]['step']})")
        if len(self._evaluated) > 1:
            lines.append(f"           -> {_accuracies(self._evaluated[-1])} (step {self._evaluated[-1]['step']})")
        return "\n".join(lines)


def _under(section: str, name: str) -> str:
    return name if name.startswith(f"{section}/") else f"{section}/{name}"


def _accuracies(evaluation: Mapping[str, Any]) -> str:
    """The accuracies of an evaluation, or all its numbers if none is called so."""
    numbers = {
        name: value
        for name, value in evaluation.items()
        if isinstance(value, int | float) and name not in ("step", "time")
    }
    chosen = {name: numbers[name] for name in accuracy_names(numbers)} or numbers
    return "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in chosen.items())
