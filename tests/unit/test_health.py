"""Slow ranks are named once, and only when they stay slow."""

from __future__ import annotations

import pytest

from megatron_mapo.health import PATIENCE, Stragglers


def test_a_rank_that_stays_slow_is_named_once() -> None:
    followed = Stragglers(ratio=2.0)
    times = [1.0, 1.1, 3.0, 0.9]
    found = [followed.observe(times) for _ in range(PATIENCE + 3)]
    assert found == [{}] * (PATIENCE - 1) + [{2: 3.0}] + [{}] * 3


def test_a_rank_that_is_slow_now_and_then_is_not() -> None:
    followed = Stragglers(ratio=2.0)
    for step in range(20):
        assert followed.observe([1.0, 5.0 if step % PATIENCE else 1.0]) == {}


def test_a_difference_too_small_to_matter_is_not_told() -> None:
    followed = Stragglers(ratio=2.0, least=1.0)
    assert [followed.observe([0.1, 1.0]) for _ in range(PATIENCE)] == [{}] * PATIENCE
    assert [followed.observe([0.1, 1.2]) for _ in range(PATIENCE)][-1] == {1: pytest.approx(12)}


def test_of_two_ranks_the_slow_one_is_named() -> None:
    followed = Stragglers(ratio=2.0)
    found = [followed.observe([4.0, 1.0]) for _ in range(PATIENCE)]
    assert found[-1] == {0: 4.0}
