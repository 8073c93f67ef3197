"""Start servers again that ended or hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_mapo.config import ServerConfig
from megatron_mapo.errors import RolloutError
from megatron_mapo.rollout.server import Server, ServerGroup, log_tail

POLL_SECONDS = 0.5
PROBE_SECONDS = 5.0
"""Between two requests to a server that runs."""
STEADY_SECONDS = 600.0
"""A server that answers for as long as this is well again: what it did before does not count any more."""


@dataclass
class _Watch:
    """One server and what happened to it.

    Attributes:
        answered: when it answered last, or was started.
        probed: when it was asked last.
        ready: it has answered since it was started.
        since: when it was found ready.
        restarts: how often it was started again since it was well.
        start_at: when it is to be started again; None: it runs.
        reason: why it was ended, or given up.
        given_up: it is not started any more.
    """

    server: Server
    answered: float
    probed: float
    since: float
    ready: bool = True
    restarts: int = 0
    start_at: float | None = None
    reason: str = ""
    given_up: bool = False


class Supervisor:
    """Keeps the servers of a group running, in a thread of its own; a context manager.

    A server that ended, does not answer ``/model_info`` for ``hang_timeout`` seconds, or does not come up within
    ``startup_timeout``, is ended with all its processes and started again at the same address, at most ``restarts``
    times, with a delay that doubles; both begin anew when it has been well for ``STEADY_SECONDS``. It starts with the
    weights of the model folder: whoever trains gives it newer ones before it serves.

    Args:
        group: servers that answer.
        log: called with one line for every event, in the thread.
    """

    def __init__(self, group: ServerGroup, log: Callable[[str], None]) -> None:
        now = time.monotonic()
        self._config: ServerConfig = group.config
        self._watches = [_Watch(server, now, now, now) for server in group.servers]
        self._log = log
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server-supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Start nothing any more. The servers that run go on."""
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raise if no server is left, or nobody watches them.

        Raises:
            RolloutError: all were given up; with the end of the last one's log.
            RuntimeError: a bug ended the thread.
        """
        if self._failure is not None:
            raise RuntimeError("the supervisor of the servers has ended") from self._failure
        if all(watch.given_up for watch in self._watches):
            last = self._watches[-1]
            raise RolloutError(
                f"all servers were given up (rollout.server.restarts={self._config.restarts}). {last.server.url} "
                f"{last.reason}; the end of {last.server.log}:\n{log_tail(last.server.log)}"
            )

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_SECONDS):
                for watch in self._watches:
                    if not watch.given_up and not self._stop.is_set():
                        self._tend(watch)
        except BaseException as error:
            self._failure = error
            raise

    def _tend(self, watch: _Watch) -> None:
        now = time.monotonic()
        if watch.start_at is not None:
            if now >= watch.start_at:
                self._start(watch)
            return
        if (status := watch.server.status()) is not None:
            self._end(watch, f"ended with status {status}")
        elif now - watch.probed >= (PROBE_SECONDS if watch.ready else POLL_SECONDS):
            self._probe(watch)

    def _probe(self, watch: _Watch) -> None:
        answers = watch.server.ready()
        now = watch.probed = time.monotonic()
        if answers:
            if not watch.ready:
                self._log(f"server {watch.server.url} answers again")
                watch.since = now
            elif now - watch.since >= STEADY_SECONDS:
                watch.restarts = 0
            watch.answered, watch.ready = now, True
            return
        limit = self._config.hang_timeout if watch.ready else self._config.startup_timeout
        if now - watch.answered > limit and watch.server.status() is None:
            name = "hang_timeout" if watch.ready else "startup_timeout"
            self._end(watch, f"did not answer for {now - watch.answered:.0f} s (rollout.server.{name})")

    def _end(self, watch: _Watch, reason: str) -> None:
        """Clear away what is left of a server, and plan its next start."""
        watch.server.stop()
        watch.reason = reason
        if watch.restarts >= self._config.restarts:
            watch.given_up = True
            self._log(
                f"server {watch.server.url} {reason}; it is given up (rollout.server.restarts={self._config.restarts})"
                f", see {watch.server.log}"
            )
            return
        delay = self._config.restart_delay * 2.0**watch.restarts
        watch.restarts += 1
        watch.start_at = time.monotonic() + delay
        self._log(
            f"server {watch.server.url} {reason}; start {watch.restarts} of {self._config.restarts} in {delay:g} s, "
            f"see {watch.server.log}"
        )

    def _start(self, watch: _Watch) -> None:
        watch.start_at, watch.ready = None, False
        watch.answered = watch.probed = time.monotonic()
        try:
            watch.server.start()
        except OSError as error:  # no memory for a process, or a full disk under its log
            self._end(watch, f"could not be started: {error}")
