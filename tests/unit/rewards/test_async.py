"""Asynchronous verifiers in worker processes."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pool import PARENT, alive, wait_until_gone

from megatron_mapo.config import OnFailure, RewardConfig
from megatron_mapo.errors import RewardError
from megatron_mapo.rewards.pool import RewardPool

HERE = Path(__file__).parent
LIMIT = 6.0
"""Seconds for a response where a test waits for the limit: many times what a good one takes, on a busy machine, too."""
GENEROUS = 120.0
"""Seconds that nothing waits for."""


@pytest.fixture(autouse=True)
def _cases_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def pool(case, **options) -> RewardPool:
    return RewardPool(RewardConfig(name=f"async_cases:{case}", **{"timeout": 20.0} | options))


def judge(p, responses):
    return asyncio.run(p.judge(responses, ["42"] * len(responses), [{}] * len(responses)))


def score(p, responses):
    return [verdict.reward for verdict in judge(p, responses)]


def test_responses_are_judged_in_order_and_extracted():
    responses = [str(40 + i % 4) for i in range(30)]
    with pool("obey", workers=2) as p:
        assert score(p, responses) == [float(r == "42") for r in responses]
        assert asyncio.run(p.extract(["a", "", "b"])) == ["A", None, "B"]
    with pool("instance") as p:
        assert score(p, ["42", "41"]) == [1.0, 0.0]


def test_many_are_at_work_together_and_not_more_than_allowed():
    with pool("meet", concurrency=8, options={"others": 8}) as p:
        assert score(p, ["x"] * 8) == [1.0] * 8
    with pool("together", concurrency=3) as p:
        assert max(score(p, ["x"] * 12)) == 3.0


def test_each_has_its_own_time_limit():
    with pool("obey", timeout=LIMIT, on_failure=OnFailure.wrong) as p:
        before = p.process_ids()
        verdicts = judge(p, ["42", "wait", "42", "raise TimeoutError", "42"])
        assert [v.reward for v in verdicts] == [1.0, 0.0, 1.0, 0.0, 1.0]
        kinds = [v.failure.kind if v.failure else None for v in verdicts]
        assert kinds == [None, "timeout", None, "TimeoutError", None]
        assert p.failures == 2
        assert p.process_ids() == before


MISBEHAVIOUR = [
    ("raise", r"raised ValueError: bad response \(async_cases\.py:\d+\)"),
    ("cancel", r"raised CancelledError"),
    ("wait", r"took longer than reward\.timeout="),
    ("block the loop", r"took longer than reward\.timeout="),
    ("die", r"ended its process: exit code 7"),
    ("eat", r"needed more than reward\.memory_mb=1024"),
    ("none", r"returned None, which is no bool"),
]


@pytest.mark.parametrize(("response", "message"), MISBEHAVIOUR)
def test_a_failure_is_of_its_own_response_alone(response, message):
    timeout = LIMIT if response in ("wait", "block the loop") else GENEROUS
    with pool("obey", timeout=timeout, memory_mb=1024, on_failure=OnFailure.wrong, concurrency=4) as p:
        verdicts = judge(p, ["42", "42", response, "42", "41", "42"])
        assert [v.reward for v in verdicts] == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
        assert [v.failure is not None for v in verdicts] == [False, False, True, False, False, False]
        assert p.failures == 1
        assert re.search(message, verdicts[2].failure.text)
        assert score(p, ["42", "41"]) == [1.0, 0.0]


def test_a_failure_is_an_error_unless_it_counts_as_wrong():
    with pool("obey") as p, pytest.raises(RewardError, match=r"reward\.name='async_cases:obey'.*bad response"):
        judge(p, ["42", "raise"])


def test_no_standing_event_loop_outlives_a_killed_parent():
    code = PARENT.replace("reward_cases:obey", "async_cases:obey")
    parent = subprocess.Popen(
        [sys.executable, "-c", code, "block the loop", "500"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[2])])},
    )
    workers = list(map(int, parent.stdout.readline().split()))[:2]
    assert all(map(alive, workers))
    time.sleep(0.5)  # let the verifications begin
    parent.kill()
    parent.wait()
    wait_until_gone(workers)
    parent.stdout.close()
