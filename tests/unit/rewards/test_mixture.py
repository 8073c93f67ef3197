"""Weighted sums of verifiers, and what counts as a success."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import make_tokenizer

from megatron_mapo.config import OnFailure, RewardComponent, RewardConfig, single_verifier
from megatron_mapo.data.prompts import Prompt
from megatron_mapo.errors import RewardError
from megatron_mapo.rewards.pool import RewardPool
from megatron_mapo.rollout.scoring import Scorer

GOOD, RIGHT, WRONG = "<think>so</think><answer>\\boxed{42}</answer>", "\\boxed{42}", "41"
TWO = [RewardComponent("math", weight=1.0), RewardComponent("format", weight=0.25, label="form")]


@pytest.fixture(autouse=True)
def _cases_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def judge(config, responses, prompts=None):
    n = len(responses)
    with RewardPool(config) as pool:
        return asyncio.run(pool.judge(responses, ["42"] * n, [{}] * n, prompts)), pool.failures


def test_the_reward_is_the_weighted_sum_and_success_is_a_component():
    verdicts, _ = judge(RewardConfig(mixture=TWO, success="math", workers=2), [GOOD, RIGHT, WRONG] * 4)
    assert [v.reward for v in verdicts] == [1.25, 1.0, 0.0] * 4
    assert [v.success for v in verdicts] == [True, True, False] * 4
    assert verdicts[0].parts == {"math": 1.0, "form": 1.0}
    assert verdicts[1].parts == {"math": 1.0, "form": 0.0}


def test_a_sum_is_that_of_exact_numbers():
    mixture = [RewardComponent("exact", weight, label=f"part{i}") for i, weight in enumerate((0.7, 0.2, 0.1))]
    assert 0.7 + 0.2 + 0.1 < 1
    verdicts, _ = judge(RewardConfig(mixture=mixture), ["42"])
    assert [v.reward for v in verdicts] == [1.0]


def test_a_success_score_is_compared_as_rewards_are():
    mixture = [RewardComponent("reward_cases:score")]
    verdicts, _ = judge(RewardConfig(mixture=mixture, success="score"), ["0.9999999999999999", "0.99999"])
    assert [v.success for v in verdicts] == [True, False]


def test_success_may_be_another_component_or_none():
    verdicts, _ = judge(RewardConfig(mixture=TWO, success="form"), [GOOD, RIGHT, WRONG])
    assert [v.success for v in verdicts] == [True, False, False]
    verdicts, _ = judge(RewardConfig(mixture=TWO), [GOOD, RIGHT, WRONG])
    assert [v.success for v in verdicts] == [None] * 3


def test_right_and_wrong_mean_the_same_in_every_component():
    config = RewardConfig(mixture=TWO, success="math", correct=2.0, wrong=-1.0)
    verdicts, _ = judge(config, [GOOD, RIGHT, WRONG])
    assert [v.reward for v in verdicts] == [2.5, 1.75, -1.25]
    assert [v.success for v in verdicts] == [True, True, False]


@pytest.mark.parametrize(("least", "success"), [(None, [False, True, True]), (0.5, [True, True, True])])
def test_a_score_is_a_success_from_a_score_on(least, success):
    mixture = [RewardComponent("math"), RewardComponent("reward_cases:score", weight=2.0)]
    config = RewardConfig(mixture=mixture, success="score", success_score=least)
    verdicts, _ = judge(config, ["0.5", "1", "42"])
    assert [v.success for v in verdicts] == success
    assert [v.reward for v in verdicts] == [1.0, 2.0, 85.0]


def test_sync_async_and_prompts_go_together():
    mixture = [
        RewardComponent("exact"),
        RewardComponent("async_cases:obey", weight=-0.5),
        RewardComponent("async_cases:of_prompt", weight=0.1, options={"factor": 10}),
        RewardComponent("reward_cases:process_id", weight=0, label="pid"),
    ]
    verdicts, _ = judge(RewardConfig(mixture=mixture, timeout=20.0), ["42", "41"], ["ab", "abc"])
    assert [v.reward for v in verdicts] == pytest.approx([2.5, 3.0])
    assert {name for v in verdicts for name in v.parts} == {"exact", "obey", "of_prompt", "pid"}


def test_a_component_that_fails_is_wrong_alone():
    mixture = [RewardComponent("reward_cases:obey"), RewardComponent("exact", weight=0.5)]
    config = RewardConfig(mixture=mixture, success="obey", timeout=1.0, on_failure=OnFailure.wrong)
    verdicts, failures = judge(config, ["42", "sleep", "die", "raise"])
    assert [v.reward for v in verdicts] == [1.5, 0.0, 0.0, 0.0]
    assert [v.success for v in verdicts] == [True, False, False, False]
    assert [v.failure.kind if v.failure else None for v in verdicts] == [None, "timeout", "died", "ValueError"]
    assert failures == 3
    with pytest.raises(RewardError, match=r"reward\.mixture\[0\]\.name='reward_cases:obey': the verifier raised"):
        judge(replace(config, on_failure=OnFailure.error), ["42", "raise"])


def test_a_penalty_cannot_be_escaped_by_making_its_verifier_fail():
    penalty = RewardComponent("reward_cases:obey", weight=-0.5, label="penalty")
    mixture = [RewardComponent("exact"), penalty, replace(penalty, weight=0.25, label="bonus")]
    config = RewardConfig(
        mixture=mixture, success="penalty", timeout=60.0, correct=2.0, wrong=-1.0, on_failure=OnFailure.wrong
    )
    verdicts, failures = judge(config, ["42", "41", "raise", "die"])
    assert [v.reward for v in verdicts] == [1.5, -0.75, -2.25, -2.25]
    assert [v.parts["penalty"] for v in verdicts] == [2.0, -1.0, 2.0, 2.0]
    assert [v.parts["bonus"] for v in verdicts] == [2.0, -1.0, -1.0, -1.0]
    assert [v.success for v in verdicts] == [True, False, False, False]
    assert failures == 4


def test_the_first_failure_ends_the_call_and_the_pool_works_afterwards():
    mixture = [RewardComponent("async_cases:obey"), RewardComponent("reward_cases:score")]
    with RewardPool(RewardConfig(mixture=mixture, timeout=5.0, concurrency=2)) as pool:
        # Were the others waited for, it would take 200 time limits.
        with pytest.raises(RewardError, match=r"reward\.mixture\[1\].*could not convert string to float: 'wait'"):
            asyncio.run(pool.judge(["wait"] * 400, ["42"] * 400, [{}] * 400))
        assert asyncio.run(pool.score(["42"], ["42"], [{}])) == [43.0]


def test_answers_are_extracted_by_the_success_component():
    config = RewardConfig(mixture=[RewardComponent("format"), RewardComponent("math", label="m")], success="m")
    with RewardPool(config) as pool:
        assert asyncio.run(pool.extract([GOOD, "x=1/2"])) == ["42", "1/2"]
    with RewardPool(replace(config, success=None)) as pool:
        assert not pool.extracts


def test_the_scorer_gives_columns():
    tokenizer = make_tokenizer()
    prompt = Prompt(0, [1], "6*7?", "42", {})
    responses = [tokenizer(text)["input_ids"] for text in (GOOD, RIGHT, WRONG)]
    with RewardPool(RewardConfig(mixture=TWO, success="math")) as pool:
        scores = asyncio.run(Scorer(tokenizer, pool)(prompt, responses))
    assert scores.rewards == [1.25, 1.0, 0.0]
    assert scores.columns == {
        "reward/math": [1.0, 1.0, 0.0],
        "reward/form": [1.0, 0.0, 0.0],
        "success": [True, True, False],
    }
    with RewardPool(RewardConfig(mixture=TWO)) as pool:
        assert set(asyncio.run(Scorer(tokenizer, pool)(prompt, responses)).columns) == {"reward/math", "reward/form"}
    with RewardPool(RewardConfig(name="math")) as pool:
        assert asyncio.run(Scorer(tokenizer, pool)(prompt, responses)).columns == {}


def test_one_verifier_in_place_of_a_mixture():
    regex = {"pattern": "(?P<answer>x)"}
    mixture = [RewardComponent("math"), RewardComponent("regex", 0.5, regex, "form")]
    reward = RewardConfig(mixture=mixture, success="math", success_score=0.5, workers=3)
    for name in ("regex", "form"):
        single = single_verifier(reward, name, [])
        assert (single.name, single.options, single.mixture, single.success, single.success_score, single.workers) == (
            *("regex", regex, [], None, None),
            3,
        )
    assert single_verifier(reward, "gsm8k", []).options == {}
    alone = RewardConfig(name="regex", options=regex)
    assert single_verifier(alone, "regex", []).options == regex
    assert single_verifier(alone, "math", []).options == {}
    assert single_verifier(alone, "mine:verify", ["reward.options.pattern=y"]).options == regex
