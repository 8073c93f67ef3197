"""Filters, the budget of a step, and the overlong penalty."""

from __future__ import annotations

import pytest
import torch

from megatron_mapo.algorithms.advantages import group_statistics
from megatron_mapo.algorithms.filters import filters, keep_groups
from megatron_mapo.config import AdvNormConfig, FilterConfig, load_config
from megatron_mapo.data.prompts import Prompt
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.rewards.pool import Verdict
from megatron_mapo.rollout.dynamic_sampling import collect
from megatron_mapo.rollout.scoring import right_verdicts
from megatron_mapo.rollout.session import overlong, right_responses

ADV = AdvNormConfig()


def batch_of(rates: list[int], base: int = 0, truncated: dict[int, int] | None = None) -> SequenceBatch:
    """Groups of 4, of which ``rates[i]`` responses are right; group i's prompt is token ``base + i``."""
    flat = [(base + i, float(j < k)) for i, k in enumerate(rates) for j in range(4)]
    return SequenceBatch.from_responses(
        [[g] for g, _ in flat],
        [[1, 2]] * len(flat),
        rewards=[r for _, r in flat],
        group_ids=[g for g, _ in flat],
        truncated=[j < (truncated or {}).get(i, 0) for i in range(len(rates)) for j in range(4)],
    )


def kept(config: FilterConfig, rates: list[int], **options) -> list[bool]:
    batch = batch_of(rates, **options)
    return keep_groups(batch, group_statistics(batch.rewards, batch.group_ids, ADV), config).tolist()


def test_filters():
    rates = [0, 1, 2, 3, 4]
    assert kept(FilterConfig(varied=True), rates) == [False, True, True, True, False]
    assert kept(FilterConfig(min_p=0.5), rates) == [False, False, True, True, True]
    assert kept(FilterConfig(min_p=0.25, max_p=0.5), rates) == [False, True, True, False, False]
    assert kept(FilterConfig(max_truncated=0.25), rates, truncated={1: 1, 3: 2}) == [True, True, True, False, True]
    assert kept(FilterConfig(), rates) == [True] * 5
    assert not filters(FilterConfig())
    assert all(
        filters(c) for c in (FilterConfig(varied=True), FilterConfig(max_truncated=0.5), FilterConfig(max_p=0.9))
    )


class Source:
    """Groups with these numbers of right answers, one prompt after the other."""

    def __init__(self, rates: list[int]) -> None:
        self.rates, self.asked, self.place = rates, [], 0

    def __call__(self, number: int, count: int) -> tuple[list[Prompt], SequenceBatch]:
        assert number == len(self.asked)
        self.asked.append(count)
        first, self.place = self.place, self.place + count
        prompts = [Prompt(i, [i], f"question {i}", "", {}) for i in range(first, self.place)]
        return prompts, batch_of(self.rates[first : self.place], base=first)


def test_rounds_go_on_until_there_are_enough():
    source = Source([0, 2, 4, 1, 0, 0, 3, 2, 1, 1, 1, 1])
    found = collect(source, 4, FilterConfig(varied=True), ADV)
    # 2 of 4 pass, so the other 2 are expected to need 4 more
    assert source.asked == [4, 4]
    assert [p.id for p in found.prompts] == [1, 3, 6, 7]
    assert found.batch.group_ids.unique().tolist() == [1, 3, 6, 7]
    assert found.batch.tokens[found.batch.offsets[:-1]].tolist() == [i for i in (1, 3, 6, 7) for _ in range(4)]
    assert found.metrics["filter/rounds"] == 2
    assert (found.metrics["filter/sampled"], found.metrics["filter/kept"]) == (8, 4)
    assert found.metrics["filter/accuracy"] == pytest.approx(12 / 32)
    assert found.metrics["filter/all_wrong"] == pytest.approx(3 / 8)
    assert found.metrics["filter/all_right"] == pytest.approx(1 / 8)
    assert found.metrics["filter/response_tokens"] == 8 * 4 * 2
    assert found.batch.response_lens.sum() == 4 * 4 * 2


def test_more_than_wanted_are_dropped():
    source = Source([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    found = collect(source, 4, FilterConfig(varied=True, oversample=3), ADV)
    # A share of 1/4 would ask for 12; the budget leaves 8.
    assert source.asked == [4, 8]
    assert [p.id for p in found.prompts] == [3, 4, 5, 6]
    assert len(found.batch) == 16


def test_the_budget_ends_first():
    source = Source([0, 0, 2, 0, 0, 0, 0, 0])
    found = collect(source, 4, FilterConfig(varied=True, oversample=2), ADV)
    assert source.asked == [4, 4]
    assert [p.id for p in found.prompts] == [2]
    assert found.metrics["filter/kept"] == 1


def test_no_group_passes():
    found = collect(Source([0] * 6), 3, FilterConfig(varied=True, oversample=2), ADV)
    assert [p.id for p in found.prompts] == [3]  # of the last round: a step needs something
    assert len(found.batch) == 4


def test_what_is_right_does_not_depend_on_what_else_was_sampled():
    settings = ["model.path=m", "data.train=d.jsonl", "reward.correct=0", "reward.wrong=-0.9"]
    config = load_config(None, settings)

    def right(*rewards: float) -> list[bool]:
        batch = batch_of([0])
        batch.rewards = torch.tensor(rewards)
        return right_responses(batch, config).tolist()

    assert right(0, 0, 0, 0) == [True] * 4
    assert right(-0.9, -0.9, -0.9, -0.9) == [False] * 4
    assert right(0, -0.9, 0, -0.9) == [True, False, True, False]
    assert right(0, -0.9, -0.3, -0.9) == [True, False, False, False]
    config.actor.adv_norm.success_threshold = -0.3
    assert right(0, -0.9, -0.3, -0.9) == [True, False, True, False]


SETTINGS = ["model.path=m", "data.train=d.jsonl", "actor.adv_norm.aggregation_mode=native"]
THREE = "reward.mixture=[{name: math, weight: 0.7},{name: exact, weight: 0.2},{name: format, weight: 0.1}]"


@pytest.mark.parametrize(
    ("overrides", "rewards", "expected"),
    [
        (["reward.name=reasoning_gym"], [0.0, 0.0, 0.0, 0.01], [False] * 4),
        (
            ["reward.name=reasoning_gym", "actor.adv_norm.success_threshold=0.01"],
            [0.0, 0.0, 0.0, 0.01],
            [False] * 3 + [True],
        ),
        (["reward.name=mine.py:verify", "reward.correct=0.9"], [0.9, 0.5, 0.89, 5.0], [True, False, False, True]),
        # The first component right, two of them well formed.
        (["reward.mixture=[{name: math},{name: format, weight: 0.2}]"], [1.2, 1.2, 1.0, 1.0], [True] * 4),
        # A sum in another order of its terms is a last bit below 1.
        ([THREE, "actor.adv_norm.success_threshold=1.0"], [0.7 + 0.2 + 0.1, 1.0, 0.9, 0.0], [True, True, False, False]),
    ],
)
def test_training_and_evaluation_agree_on_what_is_right(overrides, rewards, expected):
    config = load_config(None, [*SETTINGS, *overrides])
    batch = batch_of([0])
    batch.rewards = torch.tensor(rewards)
    right = right_responses(batch, config)
    assert right.tolist() == expected
    assert right_verdicts([Verdict(reward) for reward in rewards], config.right_from) == expected
    stats = group_statistics(batch.rewards, batch.group_ids, config.actor.adv_norm, right)
    assert stats.p.tolist() == [sum(expected) / 4]
    # A component that says what a success is is believed, whatever the sum.
    batch.extra["success"] = ~right
    assert right_responses(batch, config).tolist() == (~right).tolist()
    verdicts = [Verdict(reward, not is_right) for reward, is_right in zip(rewards, expected, strict=True)]
    assert right_verdicts(verdicts, config.right_from) == (~right).tolist()


def test_overlong_penalty_grows_over_the_buffer():
    lengths, cut = torch.tensor([10, 80, 90, 100, 100]), torch.tensor([False, False, False, False, True])
    assert overlong(lengths, cut, 100, 20).tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    assert overlong(lengths, cut, 100, 0).tolist() == [0, 0, 0, 0, 1]
