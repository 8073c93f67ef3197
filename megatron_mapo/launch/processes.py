"""Supervise commands: pass an exit code through, watch what they depend on, leave no process behind."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from megatron_mapo.launch.keeper import SAVE, exit_code

STOP_SECONDS = 30.0
"""Until a keeper that was asked to end its command is killed (the kernel then kills the command)."""
POLL_SECONDS = 0.2
FAILURE_SECONDS = 10.0
"""How long the other commands may take to end by themselves (and say why) after one has failed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end.

    A ``KeyboardInterrupt``, because asyncio lets no other exception out of an event loop's callbacks.

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
    """Raise ``Stopped`` at the first Ctrl-C, SIGTERM or SIGHUP; further ones do not disturb the clean-up.

    Where an event loop runs, it is raised between two of the loop's callbacks: within one it could end up in a
    transport or a task that takes it for an error of its own.
    """
    stopped = False

    def end(number: int) -> None:
        raise Stopped(number)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            return
        stopped = True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            end(number)
        else:
            loop.call_soon_threadsafe(end, number)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SaveRequest:
    """Whether a signal has asked for a checkpoint and an end (see ``save_request``)."""

    def __init__(self) -> None:
        self.asked = False
        self._passed_on = False

    def pass_on(self, commands: Iterable[CanSave]) -> None:
        """Hand a request on, once. To be called now and then."""
        if self.asked and not self._passed_on:
            self._passed_on = True
            print("asking the trainers to save and end after this step", file=sys.stderr, flush=True)
            for command in commands:
                command.ask_to_save()


class CanSave(Protocol):
    """A trainer, or several, on this machine or another."""

    def ask_to_save(self) -> None:
        """Make it finish its step, save, and end."""


@contextmanager
def save_request() -> Iterator[SaveRequest]:
    """The first SIGTERM or SIGUSR1 is a request to save. SIGTERM again does what it did before, as does Ctrl-C."""
    request = SaveRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        request.asked = True
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, SAVE)}
    try:
        yield request
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
        with open(log, "wb") if log is not None else nullcontext() as output, _blocked(SAVE):
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

    def ask_to_save(self) -> None:
        """Make a trainer finish its step, save, and end (``preemption``)."""
        self._keeper.send_signal(SAVE)

    def hang_up(self) -> None:
        """Have the command ended, without waiting."""
        self._pipe.close()

    def stop(self) -> None:
        """End the command and wait until it and its descendants are gone. May be called again."""
        self.hang_up()
        try:
            self._keeper.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Processes that are started inside do not get the signal before they look for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Child(Protocol):
    """What ``supervise`` watches."""

    def poll(self) -> int | None:
        """Exit code; None while it runs."""


def supervise(children: Sequence[Child], check: Callable[[], None]) -> int:
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


def _first_failure(children: Sequence[Child]) -> int:
    return next((code for child in children if (code := child.poll())), 0)
