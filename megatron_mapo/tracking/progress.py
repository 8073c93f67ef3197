"""Live progress: a bar on a terminal, else one plain line per step."""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_RECENT_STEPS = 10


class ProgressView(Protocol):
    """Shows a finished step."""

    def show(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def open_progress(total_steps: int, finished: int) -> ProgressView:
    """A bar if stdout is a terminal, plain lines otherwise."""
    console = Console(file=sys.stdout, highlight=False)
    return TerminalView(console, total_steps, finished) if console.is_terminal else PlainView(total_steps)


class StatusText:
    """The words about a step: reward, accuracy, speed, time left, server-trainer mismatch."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)

    def of(self, step: int, metrics: Mapping[str, float]) -> str:
        """Only metrics that are there are named. The time left is a median over recent steps: one slow step
        (an evaluation, a checkpoint) does not change it.
        """
        parts = []
        for label, name, form in (
            ("reward", "reward/mean", "{:.3f}"),
            ("accuracy", "reward/accuracy", "{:.3f}"),
            ("tokens/s", "speed/tokens_per_second", "{:,.0f}"),
            ("s/step", "seconds/step", "{:.1f}"),
        ):
            if name in metrics:
                parts.append(f"{label} {form.format(metrics[name])}")
        if "seconds/step" in metrics:
            self._seconds.append(metrics["seconds/step"])
            left = statistics.median(self._seconds) * (self._total_steps - step)
            parts.append(f"left {duration(left)}")
        if "mismatch/abs_mean" in metrics:
            parts.append(f"mismatch {metrics['mismatch/abs_mean']:.2g}")
        return "  ".join(parts)


class PlainView:
    """One line per step: for log files and pipes."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._status = StatusText(total_steps)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the step's line."""
        print(f"step {step}/{self._total_steps}  {self._status.of(step, metrics)}", flush=True)

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing to put back."""


class TerminalView:
    """A bar that stays in place; notes scroll above it."""

    def __init__(self, console: Console, total_steps: int, finished: int) -> None:
        self._status = StatusText(total_steps)
        self._progress = Progress(
            TextColumn("[bold]step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=finished, status="")
        self._progress.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, status=self._status.of(step, metrics))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False)

    def close(self) -> None:
        """Leave the bar as it stands and give the cursor back."""
        self._progress.stop()


def duration(seconds: float) -> str:
    """``45 s``, ``3:05`` (minutes) or ``2:03:05`` (hours)."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"
