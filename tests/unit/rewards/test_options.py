"""Options of verifiers, and what a verifier is given."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from megatron_mapo.config import RewardComponent, RewardConfig
from megatron_mapo.errors import ConfigError
from megatron_mapo.rewards.pool import RewardPool
from megatron_mapo.rewards.registry import VERIFIERS, get_verifier


@pytest.fixture(autouse=True)
def _cases_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_options_and_the_prompt_reach_the_verifier():
    config = RewardConfig(name="async_cases:of_prompt", options={"factor": 0.5}, timeout=20.0)
    with RewardPool(config) as pool:
        verdicts = asyncio.run(pool.judge(["x", "x"], ["", ""], [{}, {}], ["four", "twelve chars"]))
        assert [v.reward for v in verdicts] == [2.0, 6.0]
        assert asyncio.run(pool.score(["x"], [""], [{}])) == [0.0]


def test_a_verifier_may_take_any_option():
    with RewardPool(RewardConfig(name="async_cases:free", options={"a": 1, "b": 2.5}, timeout=20.0)) as pool:
        assert asyncio.run(pool.score(["x"], [""], [{}])) == [3.5]


WRONG = [
    ("math", {"tolerance": 1}, "reward.name='math' has no option 'tolerance' (reward.options): it takes none"),
    ("regex", {}, "reward.name='regex' needs the option 'pattern' (reward.options.pattern)"),
    ("regex", {"patern": "x"}, "no option 'patern' (reward.options): it takes pattern, flags, ignore_case, compare"),
    ("regex", {"pattern": "a"}, "pattern 'a' has no group (?P<answer>...)"),
    ("regex", {"pattern": "("}, "is no regular expression"),
    ("regex", {"pattern": 3}, "must be text, got 3"),
    ("regex", {"pattern": "(?P<answer>a)", "flags": "q"}, "flags must be some of imsx, got 'q'"),
    ("regex", {"pattern": "(?P<answer>a)", "compare": "sound"}, "compare must be text or number, got 'sound'"),
    ("regex", {"pattern": "(?P<answer>a)", "ignore_case": "no"}, "ignore_case must be true or false"),
    ("format", {"tags": "think"}, "tags must be a list of different names"),
    ("format", {"tags": []}, "tags must be a list of different names"),
    ("format", {"tags": ["a", "a"]}, "tags must be a list of different names"),
    ("format", {"tags": ["<a>"]}, "tags must hold names such as think, got '<a>'"),
    ("format", {"opened": 1}, "opened must be true or false"),
    ("http", {}, "needs the option 'url'"),
    ("http", {"url": "ftp://a/b"}, "url must be an address"),
    ("http", {"url": "host:80"}, "url must be an address"),
    ("http", {"url": "http://me:secret@host/"}, "must not hold a user or password"),
    ("http", {"url": "http://a/", "timeout": 0}, "timeout must be greater than 0"),
    ("http", {"url": "http://a/", "retries": -1}, "retries must be 0 or more"),
    ("http", {"url": "http://a/", "api_key_env": "NO_SUCH_VARIABLE"}, "the environment has no NO_SUCH_VARIABLE"),
    ("http", {"url": "http://a/", "api_key_file": "/no/such"}, "No such file"),
    ("http", {"url": "http://a/", "prompt": "x"}, "has no option 'prompt'"),
    ("async_cases:free", {"response": "x"}, "has no option 'response'"),
    ("async_cases:meet", {}, "needs the option 'others'"),
    ("async_cases:of_prompt", {"factor": 0}, "reward.options: factor must not be 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        get_verifier(name, options)
    assert "secret" not in str(error.value)


def test_wrong_options_end_the_start_of_a_pool_and_name_the_component():
    mixture = [RewardComponent("math"), RewardComponent("format", options={"tag": "x"})]
    with pytest.raises(ConfigError, match=re.escape("reward.mixture[1].name='format' has no option 'tag'")):
        RewardPool(RewardConfig(mixture=mixture))


@pytest.mark.parametrize("name", sorted(set(VERIFIERS) - {"regex", "http"}))
def test_registered_verifiers_need_no_options(name):
    assert get_verifier(name).extracts is (name != "format")
