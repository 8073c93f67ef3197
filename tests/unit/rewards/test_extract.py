"""The answer that a response states: the classes that majority voting counts."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from megatron_mapo.config import OnFailure, RewardConfig
from megatron_mapo.errors import ConfigError, RewardError
from megatron_mapo.rewards import exact, gsm8k, math, reasoning_gym
from megatron_mapo.rewards.pool import RewardPool

SAME = [
    ["12", "The answer is 12.", r"\boxed{12.0}", "#### 12", "so 24/2 = 12", "I said 3, but it is $12"],
    [r"\boxed{1/2}", r"\boxed{\frac{1}{2}}", "0.5", "Answer: 0.50"],
    ["1,200", "1200", r"\boxed{1{,}200}"],
    ["The answer is yes.", "Yes", "answer: YES"],
]
SAME_IN_MATH = [
    [r"\boxed{\frac{\sqrt{2}}{2}}", r"\boxed{\frac{1}{\sqrt{2}}}", r"Answer: $\sqrt{2}/2$"],
    [r"\boxed{(x+1)^2}", r"\boxed{x^2+2x+1}", r"\boxed{y = 1 + 2x + x^2}"],
    [r"\boxed{\frac{x^2-y^2}{x-y}}", r"\boxed{y+x}"],
    [r"\boxed{\{2, 1\}}", r"\boxed{1, 2}"],
    [r"\boxed{[2,3)}", "It is so.\n\\boxed{\\left[2, 3\\right)}"],
    [r"\boxed{3\pi}", r"Answer: $3 \pi$."],
]


@pytest.mark.parametrize("extract", [gsm8k.extract, math.extract])
@pytest.mark.parametrize("responses", SAME)
def test_the_same_answer_is_the_same_text(extract, responses):
    assert len({extract(response) for response in responses}) == 1
    assert extract(responses[0]) is not None


@pytest.mark.parametrize("extract", [gsm8k.extract, math.extract])
def test_different_answers_are_different_texts(extract):
    found = [extract(responses[0]) for responses in SAME]
    assert len(set(found)) == len(SAME)


@pytest.mark.parametrize("responses", SAME_IN_MATH)
def test_math_knows_equal_expressions(responses):
    assert len({math.extract(response) for response in responses}) == 1


def test_math_keeps_unequal_expressions_apart():
    found = [math.extract(responses[0]) for responses in SAME_IN_MATH]
    assert None not in found
    assert len(set(found)) == len(SAME_IN_MATH)


@pytest.mark.parametrize(
    ("left", "right"), [*itertools.permutations([r"\boxed{12}", r"\boxed{7+5}", r"\boxed{\sqrt{144}}"], 2)]
)
def test_only_a_stated_number_is_a_number(left, right):
    """``verify`` accepts 12 and not 7+5 for the reference 12: one class must not hold both."""
    if r"\boxed{12}" in (left, right):
        assert math.extract(left) != math.extract(right)
    assert math.verify(left, "12", {}) is (left == r"\boxed{12}")


@pytest.mark.parametrize("extract", [gsm8k.extract, math.extract, exact.extract, reasoning_gym.extract])
@pytest.mark.parametrize("response", ["", "  \n "])
def test_nothing_is_no_answer(extract, response):
    assert extract(response) is None


@pytest.mark.parametrize("extract", [gsm8k.extract, math.extract])
def test_thinking_that_does_not_end_is_no_answer(extract):
    assert extract("<think> it could be 12") is None


def test_a_long_text_without_a_number_states_nothing():
    assert gsm8k.extract("I do not know.\nLet me think.") is None


@pytest.mark.parametrize(
    "response",
    [r"\boxed{(x+1)^{100000000}}", r"\boxed{10^{10^{10}}}", r"\boxed{\frac{}{0}}", r"\boxed{\int}", "x" * 9999],
)
def test_math_answers_odd_text_at_once(response):
    assert math.extract(response)


def test_exact_and_reasoning_gym():
    assert exact.extract(" a b \n") == "a b"
    assert reasoning_gym.extract("I think <answer> 1  2\n3 </answer>") == "1 2 3"
    assert reasoning_gym.extract("The answer is 5.") == reasoning_gym.extract("Answer: 5.")


class TestPool:
    @pytest.fixture(autouse=True)
    def _cases_importable(self, monkeypatch):
        monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def test_runs_beside_the_verifier(self):
        with RewardPool(RewardConfig(name="reward_cases:equal", workers=2, timeout=20.0)) as pool:
            assert pool.extracts
            responses = [f"A{i}" for i in range(20)]
            assert asyncio.run(pool.extract([*responses, ""])) == [r.lower() for r in responses] + [None]
            assert asyncio.run(pool.score(["x"], ["x"], [{}])) == [1.0]

    @pytest.mark.parametrize("response", ["spin", "hold the interpreter lock", "die", "eat"])
    def test_limits_hold_and_cost_only_that_response(self, response, caplog):
        with RewardPool(RewardConfig(name="reward_cases:equal", timeout=1.0, memory_mb=1024)) as pool:
            assert asyncio.run(pool.extract(["A", response, "B"])) == ["a", None, "b"]
            assert "its process is replaced" in caplog.text

    @pytest.mark.parametrize(
        ("response", "text"), [("raise in extract", "raised ValueError: cannot read"), ("number", "returned 3")]
    )
    def test_a_mistake_in_the_extractor_is_not_hidden(self, response, text):
        strict = RewardConfig(name="reward_cases:equal", timeout=20.0)
        with RewardPool(strict) as pool, pytest.raises(RewardError, match=rf"verifier's `extract` {text}"):
            asyncio.run(pool.extract([response]))
        lenient = RewardConfig(name="reward_cases:equal", timeout=20.0, on_failure=OnFailure.wrong)
        with RewardPool(lenient) as pool:
            assert asyncio.run(pool.extract([response, "A"])) == [None, "a"]

    def test_a_verifier_without_one_says_so(self, tmp_path):
        (tmp_path / "bare.py").write_text("def verify(response, answer, metadata):\n    return True\n")
        with RewardPool(RewardConfig(name=f"{tmp_path}/bare.py:verify")) as pool:
            assert not pool.extracts

    def test_a_name_that_is_taken(self, tmp_path):
        (tmp_path / "taken.py").write_text("extract = 3\ndef verify(response, answer, metadata):\n    return True\n")
        with pytest.raises(ConfigError, match="`extract` that is no function"):
            RewardPool(RewardConfig(name=f"{tmp_path}/taken.py:verify"))
