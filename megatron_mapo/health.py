"""What the loop checks after each step: numbers that are not finite, and ranks whose machine has become slow."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from megatron_mapo.config import TrainerConfig
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import TrainingError
from megatron_mapo.megatron.runtime import Runtime

PATIENCE = 3
"""Steps in a row that a rank has to be slow before it is named."""
LEAST_SECONDS = 0.1
"""Of an update: a rank that takes less longer than others is not slow, whatever the ratio."""


class Stragglers:
    """Follows the ranks' times for the same local work.

    All ranks of a step wait for each other, so the clocks of its phases say the same everywhere. What tells are times
    in which nobody is waited for: a fixed piece of work, and a replica's way to the reduction of gradients.

    Args:
        ratio: a rank is slow when it takes this many times the (lower) median,
        least: and at least this many seconds longer.
    """

    def __init__(self, ratio: float, least: float = 0.0) -> None:
        self.ratio, self.least = ratio, least
        self._slow_for: dict[int, int] = {}

    def observe(self, seconds: list[float]) -> dict[int, float]:
        """Take in one step's times, by rank.

        Returns:
            ranks that have just been slow ``PATIENCE`` times in a row, and how many times the median they took.
        """
        usual = statistics.median_low(seconds)
        named = {}
        for rank, value in enumerate(seconds):
            times = value / usual if usual > 0 else 1.0
            slow = times >= self.ratio and value - usual >= self.least
            self._slow_for[rank] = self._slow_for.get(rank, 0) + 1 if slow else 0
            if self._slow_for[rank] == PATIENCE:
                named[rank] = times
        return named


class Health:
    """The checks of one run, on every rank.

    Args:
        runtime: this rank.
        config: section ``trainer``.
        run_dir: the run's folder.
    """

    def __init__(self, runtime: Runtime, config: TrainerConfig, run_dir: Path) -> None:
        self.runtime, self.config, self.run_dir = runtime, config, run_dir
        self.slow_machines = Stragglers(config.straggler_ratio)
        self.slow_updates = Stragglers(config.straggler_ratio, LEAST_SECONDS)
        self.skipped_in_a_row = 0

    def compare_ranks(self, update_seconds: float) -> dict[str, float]:
        """Memory of the fullest rank and slowness of the slowest, to be logged; names a slow one. Collective.

        Args:
            update_seconds: of this rank's forward and backward passes in the step (``Policy.take_own_seconds``).
        """
        mine = (self.runtime.peak_memory_gib(), self.runtime.probe_seconds(), update_seconds, socket.gethostname())
        memory, probe, update, hosts = zip(*self.runtime.gather(mine), strict=True)
        watched = (
            (self.slow_machines, probe, "the same work"),
            (self.slow_updates, update, "the forward and backward passes of a step"),
        )
        for stragglers, seconds, what in watched:
            for rank, times in stragglers.observe(list(seconds)).items():
                self._warn(f"rank {rank} on {hosts[rank]} takes {times:.1f} times as long as others for {what}")
        return {
            "memory/peak_gib": max(memory),
            "speed/slowest_rank": _slowest(probe),
            "speed/slowest_update": _slowest(update),
        }

    def check_finite(self, step: int, skipped: bool, batch: SequenceBatch) -> None:
        """Tell of a skipped update, keep its batch, and stop when that does not end.

        Args:
            step: the step that was just finished.
            skipped: an update of it was skipped, because loss or gradient were not finite.
            batch: its batch.

        Raises:
            TrainingError: it was the ``trainer.max_skipped``-th step in a row.
        """
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        file = self.run_dir / "skipped" / f"step_{step:06d}.safetensors"
        found = f"step {step}: loss or gradient is not finite, the update was skipped; its batch: {file}"
        if self.runtime.is_main:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                batch.save(file)
            except (OSError, SafetensorError) as error:
                found += f" (could not be written: {error})"
        self._warn(found)
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise TrainingError(
                f"{found}. This was number {self.skipped_in_a_row} in a row (trainer.max_skipped): lower "
                "actor.optim.lr, or look at the batch. The last checkpoint is not touched"
            )

    def _warn(self, text: str) -> None:
        if self.runtime.is_main:
            print(f"warning: {text}", flush=True)


def _slowest(seconds: Sequence[float]) -> float:
    """The longest over the (lower) median."""
    return max(seconds) / max(statistics.median_low(seconds), 1e-9)
