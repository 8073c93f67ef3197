"""The frozen trainer in which one thing goes wrong, once: at a place, on a rank, in a step.

    torchrun ... tests/faults/faulty_trainer.py CONFIG PLACE ACTION RANK STEP MARKER [section.key=value ...]

MARKER is the file that tells the next start that it has happened (and when). The faults are real: SIGKILL, SIGSTOP, a
call that never returns, a NaN in the loss.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("distributed", ".", "..")]

import torch  # noqa: E402
from frozen_trainer import FrozenSession, FrozenTrainer  # noqa: E402

from megatron_mapo.config import load_config  # noqa: E402
from megatron_mapo.errors import MapoError  # noqa: E402
from megatron_mapo.megatron import checkpoint, policy, runtime  # noqa: E402
from megatron_mapo.train import Trainer  # noqa: E402

ACTIONS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(1e6),
    "slow": lambda: time.sleep(3),
    "full disk": lambda: _fail(OSError(28, "No space left on device")),
}


HANG_SECONDS = 4.0
"""What a phase of the step may take in which a rank hangs; others may take longer on a busy machine."""


def _fail(error: Exception) -> None:
    raise error


@dataclass
class Fault:
    """What goes wrong.

    Attributes:
        place: see ``PLACES``.
        action: see ``ACTIONS``; ``nan`` and ``nan for ever`` for the place ``loss``. ``slow`` and ``nan for ever`` do
            not end.
        rank, step: where and when.
        marker: written when it happens; while it exists nothing goes wrong.
    """

    place: str
    action: str
    rank: int
    step: int
    marker: Path

    def due(self, trainer: FrozenTrainer) -> bool:
        """It is time, on this rank, for the first time."""
        here = trainer.runtime.rank == self.rank and trainer.step + 1 >= self.step
        return here and (self.action in ("slow", "nan for ever") or not self.marker.exists())

    def strike(self, trainer: FrozenTrainer) -> None:
        """Do it, if it is due."""
        if self.due(trainer):
            self.mark(trainer)
            ACTIONS[self.action]()

    def mark(self, trainer: FrozenTrainer) -> None:
        """Remember that it happened, and when it began."""
        if self.marker.exists():
            return
        mark(self.marker, trainer)


def mark(marker: Path, trainer: Trainer) -> None:
    """Write what a run has at this moment: finished steps, and the step of its newest complete checkpoint."""
    saved = checkpoint.checkpoint_files.complete_checkpoints(trainer.checkpoints)
    newest = saved[-1][0] if saved else 0
    text = json.dumps({"step": trainer.step, "saved": newest, "time": time.time()})
    unfinished = marker.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.rename(marker)


def _before(owner: Any, name: str, act: Callable[[], None]) -> None:
    """Call ``act`` before every call of ``owner.name``."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _in_backward(trainer: FrozenTrainer, fault: Fault) -> None:
    original = policy.policy_loss

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = original(*args, **kwargs)
        if fault.action.startswith("nan"):
            if fault.due(trainer):
                fault.mark(trainer)
                value = value * torch.nan
        elif value.requires_grad:
            value.register_hook(lambda _: fault.strike(trainer))
        return value

    policy.policy_loss = loss  # type: ignore[assignment]


def _beside(trainer: FrozenTrainer, fault: Fault) -> None:
    """While the main thread does something else, such as waiting for rank 0's rollout."""

    def watch() -> None:
        while not fault.due(trainer):
            time.sleep(0.005)
        fault.strike(trainer)

    threading.Thread(target=watch, daemon=True).start()


def install(trainer: FrozenTrainer, fault: Fault) -> None:
    """Arm the fault. ``trainer`` is open."""

    def act() -> None:
        fault.strike(trainer)

    session: Any = trainer.rollout or FrozenSession
    places: dict[str, Callable[[], None]] = {
        "rollout": lambda: _before(session, "sample", act),
        "anywhere": lambda: _beside(trainer, fault),
        "forward": lambda: _before(policy, "forward_microbatch", act),
        "backward": lambda: _in_backward(trainer, fault),
        "loss": lambda: _in_backward(trainer, fault),
        "gradient reduction": lambda: _before(trainer.ddp_config, "finalize_model_grads_func", act),
        "optimizer step": lambda: _before(trainer.policy.optimizer, "step_with_ready_grads", act),
        "weight sync": lambda: _before(policy, "named_weights", act),
        "evaluation": lambda: _before(session, "evaluate", act),
        "save, staging": lambda: _before(checkpoint, "stage", act),
        "save, writing": lambda: _before(checkpoint, "write", act),
        "save, manifest": lambda: _before(checkpoint.checkpoint_files, "write_manifest", act),
        "save, name": lambda: _before(checkpoint.checkpoint_files, "publish", act),
        "save, clean-up": lambda: _before(checkpoint.checkpoint_files, "retain", act),
    }
    places[fault.place]()


class FaultyTrainer(FrozenTrainer):
    """``FrozenTrainer`` that arms a fault when it is open."""

    fault: Fault

    def train_step(self) -> None:
        """A step; all ranks are impatient in the one in which a rank is about to hang."""
        hangs = self.fault.action in ("hang", "stop") and not self.fault.marker.exists()
        if hangs and self.step + 1 >= self.fault.step:
            self.watchdog.set_timeout(HANG_SECONDS)
        super().train_step()

    @property
    def ddp_config(self) -> Any:
        """megatron's configuration, which holds the function that reduces gradients."""
        return self.policy.chunks[0].config

    def open(self) -> None:
        """Open, then arm."""
        super().open()
        install(self, self.fault)


def main() -> int:
    """One rank's life."""
    config, place, action, rank, step, marker, *overrides = sys.argv[1:]
    try:
        settings = load_config(config, overrides)
        trainer = FaultyTrainer(settings, runtime.initialize(settings))
        trainer.fault = Fault(place, action, int(rank), int(step), Path(marker))
        trainer.open_and_run()
    except MapoError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
