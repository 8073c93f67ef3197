"""A run that is asked to end: it finishes its step, saves, and exits with the code of ``errors.Preempted``.

SIGUSR1 or SIGTERM to any rank is enough. A second SIGTERM ends the process at once.

Batch systems send their signals to every process of a job, verifiers and servers included. A launcher therefore
blocks both signals before it starts a rank (``launch.slurm_task``). A blocked signal stays pending, cannot end the
rank's children, which inherit the mask, and is not lost while the rank is still starting.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # launchers import this module too, where there may be no megatron
    from megatron_mapo.megatron.runtime import Runtime

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_received: set[int] = set()


def install() -> None:
    """Take note of the signals from now on. For the main thread of a process."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _received.add(number)
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)


def requested(runtime: Runtime) -> bool:
    """Whether any rank was asked to end; the same on every rank. A collective."""
    mine = bool(_received or signal.sigpending() & set(SIGNALS))
    return any(runtime.gather(mine))
