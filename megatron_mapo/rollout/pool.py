"""What rank 0 knows about the generation servers: who serves, who is in doubt, who is out, and why.

A server *serves* when it holds the trainer's current weights. One whose request failed is *suspect*: it gets no
requests until it has answered ``/model_info`` with the right weight version. One that does not answer, that fails again
and again, or that reports another version is *out*: it comes back only with a weight update that was verified. A
serving one that is *slow* has one request at a time, which tells when it is slow no more.

Plain bookkeeping, without requests of its own: ``RolloutClient`` and ``WeightSync`` find the facts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from megatron_mapo.config import server_url_problem
from megatron_mapo.errors import RolloutError
from megatron_mapo.rollout.speeds import Speeds

NEVER_UPDATED = -1
"""Weight version of a server that still has the weights that it was started with."""
FIRST_BACKOFF = 5.0
"""Seconds before a server is tried again that was taken out twice without a good answer in between; then doubled."""
LONGEST_BACKOFF = 300.0
LONG_WAIT = 1.0
"""Seconds that a weight update may wait, again and again, for a server that does not answer."""


class State(StrEnum):
    """Whether a server gets requests."""

    serving = "serving"
    suspect = "suspect"
    out = "out"


@dataclass
class Member:
    """One server.

    Attributes:
        url: base address.
        state: see the module.
        reason: why it is not serving.
        since: when it got into this state (``time.monotonic``).
        failures: failed requests since the last good one.
        times_out: how often it was taken out, or kept others waiting while it was, since the last good answer.
        load: responses that it is working on.
    """

    url: str
    state: State = State.serving
    reason: str = ""
    since: float = field(default_factory=time.monotonic)
    failures: int = 0
    times_out: int = 0
    load: int = 0

    def backoff(self) -> float:
        """Seconds from being taken out until it is worth another try: 0 at the first time."""
        return 0.0 if self.times_out < 2 else min(FIRST_BACKOFF * 2.0 ** (self.times_out - 2), LONGEST_BACKOFF)


class ServerPool:
    """The servers of a run.

    Args:
        urls: base addresses.
        max_failures: failed requests in a row after which a server is out.
        max_staleness: how many versions older than the current one the weights of a response may be.
        straggler_ratio: see ``Speeds``.
        log: called with one line for every change of state.

    Attributes:
        version: of the trainer's weights; None before the first update (then no version is asked for).
        stalled_since: since when no response came because no server serves (``time.monotonic``); else None.
        speeds: how fast the servers are.
    """

    def __init__(
        self,
        urls: Iterable[str],
        max_failures: int = 3,
        max_staleness: int = 0,
        straggler_ratio: float = 3.0,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.max_failures, self.max_staleness = max_failures, max_staleness
        self.speeds = Speeds(straggler_ratio)
        self.version: int | None = None
        self.stalled_since: float | None = None
        self._log = log
        self._members = {member.url: member for member in map(Member, _trimmed(urls))}
        self._counts = dict.fromkeys(("servers/taken_out", "servers/restarts", "rollout/retries", "rollout/copies"), 0)
        self._slow: dict[str, float] = {}

    @classmethod
    def of(cls, servers: ServerPool | Sequence[str]) -> ServerPool:
        """A pool that others share, or a new one in which all of the given addresses serve."""
        return servers if isinstance(servers, cls) else cls(servers)  # type: ignore[arg-type]

    def __getitem__(self, url: str) -> Member:
        return self._members[url]

    def __contains__(self, url: object) -> bool:
        return url in self._members

    @property
    def urls(self) -> list[str]:
        """All servers, in order."""
        return list(self._members)

    def in_state(self, state: State) -> list[str]:
        """Servers in one state."""
        return [url for url, member in self._members.items() if member.state is state]

    def expects(self, version: int) -> bool:
        """Whether weights of ``version`` may sample for the current step."""
        return self.version is None or self.version - self.max_staleness <= version <= self.version

    # ------------------------------------------------------------------------------------- requests

    def pick(self, failed: Sequence[str] = ()) -> str | None:
        """The serving server that failed least often in ``failed`` and, of these, has the least to do.

        A slow one that has something to do comes after all others.
        """
        serving = self.in_state(State.serving)
        slow, _ = self.speeds.compare(serving)

        def order(url: str) -> tuple[int, bool, int]:
            load = self._members[url].load
            return failed.count(url), url in slow and load > 0, load

        return min(serving, key=order, default=None)

    def name_slow(self) -> set[str]:
        """Serving servers that are slow now; says which have become so, and which are not any more."""
        serving = self.in_state(State.serving)
        slow, _ = self.speeds.compare(serving)
        for url in slow.keys() - self._slow.keys():
            took = self.speeds.milliseconds(url)
            self._log(f"server {url} is slow: {took:.3g} ms a token, {slow[url]:.1f} times the median")
        for url in self._slow.keys() - slow.keys():
            if url in serving:
                self._log(f"server {url} is not slow any more: {self.speeds.milliseconds(url):.3g} ms a token")
        self._slow = slow
        return set(slow)

    def copied(self) -> None:
        """A request that a slow server works on went to another one as well."""
        self._counts["rollout/copies"] += 1

    def succeeded(self, url: str) -> None:
        """A server gave a good response."""
        self.stalled_since = None
        if url in self._members:
            self._members[url].failures = self._members[url].times_out = 0

    def failed(self, url: str, reason: str) -> bool:
        """A request to a server failed.

        Returns:
            whether the server is suspect now, because of this failure.
        """
        self._counts["rollout/retries"] += 1
        member = self._members.get(url)
        if member is None or member.state is State.out:
            return False
        member.failures += 1
        if member.failures >= self.max_failures:
            self.take_out(url, f"{member.failures} failures in a row, the last: {reason}")
            return False
        return self._move(member, State.suspect, reason)

    def clear(self, url: str) -> None:
        """A suspect answered as it should."""
        member = self._members.get(url)
        if member is not None and member.state is State.suspect:
            self._move(member, State.serving, "")

    def take_out(self, url: str, reason: str, waited: float = 0.0) -> None:
        """No more requests for a server until ``admit``.

        Args:
            url: the server.
            reason: why.
            waited: seconds that others waited to learn this. One that is out already and makes them wait again is
                left alone for longer.
        """
        member = self._members.get(url)
        if member is None:
            return
        if self._move(member, State.out, reason):
            member.times_out += 1
            self._counts["servers/taken_out"] += 1
        elif waited >= LONG_WAIT:
            member.times_out += 1
        member.since = time.monotonic()

    # -------------------------------------------------------------------------------------- weights

    def candidates(self) -> list[str]:
        """Servers that are worth a weight update: all but those that failed again a short time ago."""
        now = time.monotonic()
        return [
            url
            for url, member in self._members.items()
            if member.state is not State.out or now - member.since >= member.backoff()
        ]

    def admit(self, url: str, version: int) -> None:
        """A server holds the verified weights of ``version``."""
        self.version = version
        member = self._members[url]
        member.failures = 0
        self._move(member, State.serving, "")

    def restarted(self, url: str) -> None:
        """A server lost the weights that it was given before."""
        self._counts["servers/restarts"] += 1
        self.speeds.forget(url)
        self._log(f"server {url} was restarted; it gets the weights before it serves")

    # ----------------------------------------------------------------------------------- membership

    def set_members(self, urls: Iterable[str]) -> None:
        """Servers that are new join without weights; those that are not named any more leave."""
        wanted = _trimmed(urls)
        for url in [url for url in self._members if url not in wanted]:
            del self._members[url]
            self.speeds.forget(url)
            self._log(f"server {url} leaves")
        for url in wanted:
            if url not in self._members:
                self._members[url] = Member(url, State.out, "it has no weights yet")
                self._log(f"server {url} joins; it gets the weights before it serves")

    # --------------------------------------------------------------------------------------- report

    def stalled(self) -> float:
        """Seconds since no server serves; the clock starts with the first call, and ends with a good response."""
        now = time.monotonic()
        if self.stalled_since is None:
            self.stalled_since = now
        return now - self.stalled_since

    def describe(self) -> str:
        """Servers that do not serve, and why."""
        waiting = [member for member in self._members.values() if member.state is not State.serving]
        return "; ".join(f"{member.url} is {member.state}: {member.reason}" for member in waiting) or "there are none"

    def metrics(self) -> dict[str, float]:
        """``servers/total``, ``servers/serving``, ``servers/slowest`` (its seconds a token over the median) now;
        ``servers/taken_out``, ``servers/restarts``, ``rollout/retries`` (failed requests) and ``rollout/copies``
        (requests of slow servers that others got too) since the last call."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        serving = self.in_state(State.serving)
        _, slowest = self.speeds.compare(serving)
        gauges = {"servers/total": len(self._members), "servers/serving": len(serving), "servers/slowest": slowest}
        return {name: float(value) for name, value in (gauges | counts).items()}

    def _move(self, member: Member, state: State, reason: str) -> bool:
        """Change a state and say so; whether it changed."""
        changed = member.state is not state
        member.reason = reason
        if changed:
            member.state, member.since = state, time.monotonic()
            self._log(f"server {member.url} is {state}" + (f": {reason}" if reason else ""))
        return changed


def _trimmed(urls: Iterable[str]) -> list[str]:
    """Without a final slash, each once."""
    return list(dict.fromkeys(url.rstrip("/") for url in urls))


def read_urls_file(path: str | Path) -> list[str]:
    """The servers that a file names: one address a line; blank lines and ``#`` comments are passed over.

    Raises:
        RolloutError: it cannot be read, or a line is not an address.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RolloutError(f"rollout.urls_file={path}: {error}") from error
    urls = [text for line in lines if (text := line.partition("#")[0].strip())]
    for url in urls:
        if problem := server_url_problem(url):
            raise RolloutError(f"rollout.urls_file={path}: {problem}")
    return urls
