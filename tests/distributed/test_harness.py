"""The harness itself: results in rank order, and a failure that ends everything and is shown."""

from __future__ import annotations

import re

import pytest
from harness import Launcher, RankFailed


def test_results_come_in_rank_order(launcher: Launcher) -> None:
    found = launcher.run(2, "who", {"greeting": "hello"})
    assert found == [["hello", 0, 2], ["hello", 1, 2]]


def test_a_failing_rank_ends_the_others_and_is_shown(launcher: Launcher) -> None:
    with pytest.raises(RankFailed, match=r"rank 1 stumbled in process \d+") as failure:
        launcher.run(2, "fail_on_rank", {"rank": 1})
    assert re.search(r"rank \d failed", str(failure.value))
