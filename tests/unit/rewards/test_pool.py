"""The reward pool with real processes: limits, failures, replacement, and nothing left behind."""

import asyncio
import datetime
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_mapo.config import OnFailure, RewardConfig
from megatron_mapo.errors import ConfigError, RewardError
from megatron_mapo.rewards.pool import RewardPool

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _cases_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def pool(case="equal", **options) -> RewardPool:
    return RewardPool(RewardConfig(name=f"reward_cases:{case}", **{"timeout": 20.0} | options))


def score(p, responses, answers=None, metadata=None) -> list[float]:
    n = len(responses)
    return asyncio.run(p.score(responses, answers or ["42"] * n, metadata or [{}] * n))


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids, seconds=60):
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < end, f"still running: {[p for p in pids if alive(p)]}"
        time.sleep(0.05)


def test_right_and_wrong_become_the_configured_rewards_in_order():
    responses = [str(40 + i % 4) for i in range(50)]
    with pool(workers=2, correct=2.0, wrong=-1.0) as p:
        assert score(p, responses) == [2.0 if r == "42" else -1.0 for r in responses]
        assert score(p, []) == []


def test_scores_pass_through():
    with pool("score", correct=9.0) as p:
        assert score(p, ["0.25", "-3", "1"]) == [0.25, -3.0, 1.0]


def test_metadata_and_odd_texts_arrive_unchanged():
    with pool("by_metadata") as p:
        assert score(p, ["x"], ["2024"], [{"day": datetime.date(2024, 2, 29)}]) == [1.0]
    odd = ["\ud800 \x00 \n \u2028 ü", "x" * 3_000_000]
    with pool() as p:
        assert score(p, odd, odd) == [1.0, 1.0]


def test_registered_verifiers_run_within_the_default_limits():
    with RewardPool(RewardConfig(name="math")) as p:
        assert score(p, ["\\boxed{42}", "\\boxed{x=42}", "41"]) == [1.0, 1.0, 0.0]
    with RewardPool(RewardConfig(name="reasoning_gym")) as p:
        assert score(p, ["<answer>42</answer>"], ["42"], [{"source_dataset": "chain_sum"}]) == [1.0]


def test_file_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def verify(response, answer, metadata):\n    return response.upper() == answer\n")
    with RewardPool(RewardConfig(name=f"{path}:verify")) as p:
        assert score(p, ["a", "b"], ["A", "A"]) == [1.0, 0.0]


def test_workers_are_separate_and_light():
    with pool("process_id", workers=2) as p:
        ids = set(score(p, ["x"] * 40))
        assert os.getpid() not in ids
        assert 1 <= len(ids) <= 2
    with pool("is_loaded") as p:
        assert score(p, ["torch", "omegaconf", "transformers", "megatron_mapo.config", "json"]) == [0, 0, 0, 0, 1]


def test_calls_overlap_and_come_from_several_loops():
    async def many(p):
        rows = [[str(i), "42"] for i in range(30)]
        return await asyncio.gather(*(p.score(r, ["42"] * 2, [{}] * 2) for r in rows))

    with pool(workers=2) as p:
        results = []
        threads = [threading.Thread(target=lambda: results.append(asyncio.run(many(p)))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[[0.0, 1.0]] * 30] * 2


MISBEHAVIOUR = [
    ("raise", r"raised ValueError: bad response \(reward_cases\.py:\d+\)"),
    ("spin", r"took longer than reward\.timeout=1 s"),
    ("hold the interpreter lock", r"took longer than reward\.timeout=1 s"),
    ("sleep", r"took longer than reward\.timeout=1 s"),
    ("die", r"ended its process: exit code 7"),
    ("eat", r"needed more than reward\.memory_mb=1024"),
    ("text", r"returned 'yes', which is no bool and no finite number"),
    ("none", r"returned None, which is no bool"),
]


def test_failures_are_errors_that_name_the_keys_and_the_pool_works_afterwards():
    with pool("obey", timeout=1.0, memory_mb=1024) as p:
        for response, message in MISBEHAVIOUR:
            with pytest.raises(RewardError, match=message) as error:
                score(p, [response])
            text = str(error.value)
            assert "reward.name='reward_cases:obey'" in text
            assert repr(response) in text
            assert "reward.timeout" in text
            assert "reward.on_failure=wrong" in text
            assert score(p, ["42", "41"]) == [1.0, 0.0]
        assert p.failures == 0


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_not_finite_scores_are_errors(bad):
    with pool("score") as p, pytest.raises(RewardError, match="no finite number"):
        score(p, [bad])


def test_only_the_beginning_of_a_response_is_shown():
    with pool("score") as p, pytest.raises(RewardError) as error:
        score(p, ["secret" * 100])
    assert "secret" * 33 in str(error.value).split("on the response")[1]
    assert "secret" * 34 not in str(error.value).split("on the response")[1]


def test_failures_may_count_as_wrong():
    responses = [x for bad, _ in MISBEHAVIOUR for x in (bad, "42")]
    with pool("obey", timeout=1.0, memory_mb=1024, workers=2, wrong=-1.0, on_failure=OnFailure.wrong) as p:
        assert score(p, responses) == [-1.0, 1.0] * len(MISBEHAVIOUR)
        assert p.failures == len(MISBEHAVIOUR)


def test_a_hung_worker_is_killed_and_an_idle_one_that_died_is_replaced():
    with pool("process_id") as p:
        (first,) = score(p, ["x"])
        os.kill(int(first), signal.SIGKILL)
        wait_until_gone([int(first)])
        (second,) = score(p, ["x"])
        assert second != first
    wait_until_gone([int(second)])


def test_other_responses_do_not_wait_for_a_cancelled_call():
    async def give_up_then_score(p):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(p.score(["sleep"] * 20, ["42"] * 20, [{}] * 20), 0.2)
        return await p.score(["42"], ["42"], [{}])

    # Were the 20 not dropped, they would take 20 timeouts and the suite's limit.
    with pool("obey", timeout=3.0) as p:
        assert asyncio.run(give_up_then_score(p)) == [1.0]


def test_close_ends_running_verifications():
    p = pool("obey", timeout=500.0)
    pids = p.process_ids()
    outcome = []

    def wait_for_it():
        try:
            outcome.append(score(p, ["sleep"]))
        except RewardError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    while not p._parts[0]._idle.empty():
        time.sleep(0.01)
    p.close()
    thread.join()
    assert len(outcome) == 1
    assert isinstance(outcome[0], RewardError | asyncio.CancelledError)
    wait_until_gone(pids)
    p.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", r"reward\.name='maths' is unknown.*exact, format, gsm8k, http, math"),
        ("no_such_module:verify", r"cannot import no_such_module: ModuleNotFoundError"),
        ("reward_cases:no_such", r"reward_cases has no function no_such"),
        ("reward_cases:not_a_function", r"is not a function: not_a_function"),
        ("no/such/file.py:verify", r"there is no file no/such/file\.py"),
        ("reward_cases:", r"is unknown"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(ConfigError, match=message) as error:
        RewardPool(RewardConfig(name=name))
    assert "reward.name" in str(error.value)


def test_broken_module(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import json\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"reward\.name=.*ZeroDivisionError"):
        RewardPool(RewardConfig(name=f"{path}:verify"))


def test_memory_limit_too_small_to_start():
    with pytest.raises((ConfigError, RewardError), match=r"reward\.memory_mb=64"):
        RewardPool(RewardConfig(name="math", memory_mb=64))


PARENT = """
import asyncio, os, sys, time
from megatron_mapo.config import RewardConfig
from megatron_mapo.rewards.pool import RewardPool

pool = RewardPool(RewardConfig(name="reward_cases:obey", workers=2, timeout=float(sys.argv[2])))
child = 0
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        time.sleep(1000)
print(*pool.process_ids(), child, flush=True)
if sys.argv[1] not in ("idle", "fork"):
    asyncio.run(pool.score([sys.argv[1]] * 2, ["42"] * 2, [{}] * 2))
time.sleep(1000)
"""


# Whoever holds the interpreter lock is ended by its alarm, a little after its time limit.
@pytest.mark.parametrize(
    ("state", "timeout"),
    [("idle", 500), ("fork", 500), ("spin", 500), ("sleep", 500), ("hold the interpreter lock", 2)],
)
def test_no_worker_outlives_a_killed_parent(state, timeout):
    path = os.pathsep.join([str(HERE), str(HERE.parents[2])])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, state, str(timeout)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    *workers, child = map(int, parent.stdout.readline().split())
    try:
        assert all(map(alive, workers))
        if state not in ("idle", "fork"):
            time.sleep(0.5)  # let the verifications begin
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until_gone(workers)
    finally:
        parent.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


def test_workers_end_with_a_parent_that_forgot_to_close():
    code = re.sub(r"time\.sleep\(1000\)\n$", "", PARENT)
    path = os.pathsep.join([str(HERE), str(HERE.parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code, "idle", "500"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    wait_until_gone(list(map(int, done.stdout.split()))[:2])
