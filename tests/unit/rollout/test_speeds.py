"""Which servers are slow, told from the requests that they answered and from those that they have."""

from __future__ import annotations

import pytest

from megatron_mapo.rollout import speeds as speeds_module
from megatron_mapo.rollout.pool import ServerPool
from megatron_mapo.rollout.speeds import Speeds

A, B, C, D = URLS = [f"http://{name}:1" for name in "abcd"]


class Clock:
    """Instead of ``time.monotonic``."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speeds_module.time, "monotonic", clock.monotonic)
    return clock


def answer(speeds: Speeds, clock: Clock, url: str, seconds: float, tokens: int, times: int = 2) -> None:
    for _ in range(times):
        work = speeds.begin(url, 1000)
        clock.now += seconds
        speeds.answered(work, tokens)


def test_the_length_of_responses_makes_no_server_slow(clock: Clock) -> None:
    speeds = Speeds(3.0)
    assert speeds.compare(URLS) == ({}, 1.0)
    for url, tokens in ((A, 10), (B, 100), (C, 1000)):
        answer(speeds, clock, url, 0.02 * tokens, tokens)
    answer(speeds, clock, D, 0.02 * 5 * 100, 100)
    slow, slowest = speeds.compare(URLS)
    assert slow == {D: pytest.approx(5)}
    assert slowest == pytest.approx(5)
    assert speeds.milliseconds(D) == pytest.approx(100)
    # as fast as others again: the last answers count most
    answer(speeds, clock, D, 2.0, 100, times=2)
    assert speeds.compare(URLS)[0] == {}
    assert speeds.compare([A, B]) == ({}, pytest.approx(1))


def test_short_requests_and_a_single_answer_tell_nothing(clock: Clock) -> None:
    speeds = Speeds(3.0)
    answer(speeds, clock, A, 0.1, 10)
    answer(speeds, clock, B, 0.9, 10)  # less than SLOW_SECONDS
    answer(speeds, clock, C, 60.0, 10, times=1)
    assert speeds.compare(URLS) == ({}, pytest.approx(9))


def test_a_request_that_runs_tells_at_least_its_age(clock: Clock) -> None:
    speeds = Speeds(3.0)
    for url in (A, B):
        answer(speeds, clock, url, 1.0, 100)
    work = speeds.begin(C, 1000)
    clock.now += 29.0  # 2.9 times what 1000 tokens take elsewhere
    assert speeds.compare(URLS)[0] == {}
    clock.now += 2.0
    assert list(speeds.compare(URLS)[0]) == [C]
    # another server gave 100 tokens meanwhile, so it is known to be slow when the request is gone
    speeds.beaten(work, 100)
    assert speeds.compare(URLS)[0] == {C: pytest.approx(31)}
    speeds.drop(work)
    speeds.forget(C)
    assert speeds.compare(URLS)[0] == {}


def test_all_that_wait_in_line_are_equal(clock: Clock) -> None:
    speeds = Speeds(3.0)
    for url in URLS:
        answer(speeds, clock, url, 1.0, 100)
    for url in URLS:
        speeds.begin(url, 100)
    clock.now += 500.0
    assert speeds.compare(URLS) == ({}, pytest.approx(1))


def test_a_slow_server_has_one_prompt_at_a_time_and_is_named(clock: Clock) -> None:
    lines: list[str] = []
    pool = ServerPool([A, B], log=lines.append)
    answer(pool.speeds, clock, B, 1.0, 100)
    answer(pool.speeds, clock, A, 8.0, 100)
    assert pool.name_slow() == pool.name_slow() == {A}
    assert pool.pick() == A
    pool[A].load, pool[B].load = 4, 400
    assert pool.pick() == B
    assert pool.pick([B]) == A
    assert pool.metrics()["servers/slowest"] == pytest.approx(8)
    pool.restarted(A)
    assert pool.name_slow() == set()
    assert lines[0] == f"server {A} is slow: 80 ms a token, 8.0 times the median"
    assert f"server {A} is not slow any more" in lines[-1]
