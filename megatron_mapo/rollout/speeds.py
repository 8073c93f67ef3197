"""How fast the generation servers are, compared with each other.

The measure is seconds a token of a request's longest response. Whether a response is long or short hardly changes it,
so a server is not called slow for the responses that it happens to write. A request that runs tells at least this much:
it has taken its age for no more than the tokens that it may give.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

KEEP = 0.5
"""Weight of all earlier answers when a new one comes."""
ANSWERS = 2
"""Answers before a server's speed counts."""
SLOW_SECONDS = 1.0
"""A server whose requests take less is not called slow."""
LATE_SECONDS = 20.0
"""The age of a running request tells nothing before."""


@dataclass(eq=False)
class Work:
    """A request that a server works on.

    Attributes:
        url: the server.
        tokens: length that its longest response may have.
        since: when it was sent (``time.monotonic``).
    """

    url: str
    tokens: int
    since: float

    @property
    def age(self) -> float:
        """Seconds since it was sent."""
        return time.monotonic() - self.since


@dataclass
class _Record:
    """What is known of one server: fading sums over its answers, the last one's seconds, and requests that run."""

    answers: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    last: float = 0.0
    running: dict[Work, None] = field(default_factory=dict)

    def add(self, seconds: float, tokens: int) -> None:
        self.answers += 1
        self.seconds = KEEP * self.seconds + seconds
        self.tokens = KEEP * self.tokens + tokens
        self.last = seconds

    @property
    def measured(self) -> float:
        """Seconds a token; 0 if not known."""
        return self.seconds / self.tokens if self.answers >= ANSWERS else 0.0

    def pace(self) -> tuple[float, float]:
        """Seconds a token, as far as known (else 0), and of the request that tells."""
        oldest = next(iter(self.running), None)
        found = self.measured, self.last
        if oldest is None or (age := oldest.age) < LATE_SECONDS:
            return found
        return max(found, (age / oldest.tokens, age))


class Speeds:
    """Seconds a token of every server.

    Args:
        ratio: a server is slow when it takes this many times the (lower) median of all.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self._records: dict[str, _Record] = {}

    def begin(self, url: str, tokens: int) -> Work:
        """A request is sent whose responses may have ``tokens`` tokens."""
        work = Work(url, tokens, time.monotonic())
        self._records.setdefault(url, _Record()).running[work] = None
        return work

    def answered(self, work: Work, tokens: int) -> None:
        """The longest response that came back has ``tokens`` tokens."""
        self.drop(work)
        self._records[work.url].add(work.age, tokens)

    def beaten(self, work: Work, tokens: int) -> None:
        """Another server was done with the same request while this one worked on it: it is no faster than that."""
        self.drop(work)
        record, age = self._records[work.url], work.age
        if age / tokens > record.measured:
            record.answers, record.seconds, record.tokens, record.last = ANSWERS, age, float(tokens), age

    def drop(self, work: Work) -> None:
        """A request has ended without an answer."""
        self._records.setdefault(work.url, _Record()).running.pop(work, None)

    def forget(self, url: str) -> None:
        """Measure a server anew."""
        running = self._records[url].running if url in self._records else {}
        self._records[url] = _Record(running=running)

    def compare(self, urls: Iterable[str]) -> tuple[dict[str, float], float]:
        """Compare servers with each other.

        Returns:
            the slow ones and how many times the median they take; and the slowest's times, 1 with nothing to compare.
        """
        paces = {url: record.pace() for url in urls if (record := self._records.get(url)) is not None}
        known = {url: (pace, seconds) for url, (pace, seconds) in paces.items() if pace > 0}
        if not known:
            return {}, 1.0
        usual = statistics.median_low([pace for pace, _ in known.values()])
        slow = {
            url: pace / usual
            for url, (pace, seconds) in known.items()
            if pace / usual >= self.ratio and seconds >= SLOW_SECONDS
        }
        return slow, max(pace for pace, _ in known.values()) / usual

    def milliseconds(self, url: str) -> float:
        """Milliseconds a token of a server; 0 if not known."""
        return 1000.0 * self._records[url].pace()[0] if url in self._records else 0.0
