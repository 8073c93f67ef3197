"""Supervise commands: pass an exit code through, watch what they depend on, leave no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import IO

from megatron_mapo.launch.keeper import exit_code

STOP_SECONDS = 30.0
"""Until a keeper that was asked to end its command is killed (the kernel then kills the command)."""
POLL_SECONDS = 0.2
FAILURE_SECONDS = 10.0
"""How long the other commands may take to end by themselves (and say why) after one has failed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked this process to end.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells report it."""
        return 128 + self.signal


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise ``Stopped`` at the first Ctrl-C, SIGTERM or SIGHUP; further ones do not disturb the clean-up."""
    stopped = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise Stopped(number)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Kept:
    """A command under a keeper; a context manager that ends it, with all descendants, on the way out.

    The command shares this process's standard output and error, not its terminal's signals.

    Args:
        command: program and arguments.
        env: environment; None: this process's.
        log: file for what it prints; None: this process's output.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, log: Path | None = None) -> None:
        with open(log, "wb") if log is not None else nullcontext() as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "megatron_mapo.launch.keeper", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=None if env is None else dict(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the keeper."""
        return self._keeper.pid

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._keeper.stdin is not None
        return self._keeper.stdin

    def poll(self) -> int | None:
        """Exit code of the command; None while it runs."""
        status = self._keeper.poll()
        return None if status is None else exit_code(status)

    def stop(self) -> None:
        """End the command and wait until it and its descendants are gone. May be called again."""
        self._pipe.close()
        try:
            self._keeper.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def supervise(children: Sequence[Kept], check: Callable[[], None]) -> int:
    """Wait until all children have ended, or one has failed.

    After a failure the others get ``FAILURE_SECONDS`` to end by themselves: the one that failed first is
    not always the one that knows why. The caller ends those that are left.

    Args:
        children: commands that work together.
        check: raises if something that they depend on is gone. It is also called once after a failure,
            which is often the consequence.

    Returns:
        0, or the exit code of the first that failed.

    Raises:
        Whatever ``check`` raises.
    """
    failed, deadline = 0, float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        check()
        failed = failed or _first_failure(children)
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + FAILURE_SECONDS
        time.sleep(POLL_SECONDS)
    failed = failed or _first_failure(children)
    if failed:
        check()
    return failed


def _first_failure(children: Sequence[Kept]) -> int:
    return next((code for child in children if (code := child.poll())), 0)
