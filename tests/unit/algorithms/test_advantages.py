"""Advantages against an independent reference in plain Python, and the invariants users rely on."""

import math
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mapo.algorithms.advantages import estimate_advantages, group_statistics
from megatron_mapo.config import AdvNormConfig, AggregationMode, Std
from megatron_mapo.errors import ConfigError, DataError, RewardError

MODES = list(AggregationMode)
BINARY_INVARIANT = [
    AggregationMode.native,
    AggregationMode.mix,
    AggregationMode.mean_only,
    AggregationMode.treerpo,
]


def config(mode="mix", std="population", eps=1e-6, threshold=None) -> AdvNormConfig:
    return AdvNormConfig(AggregationMode(mode), Std(std), eps, threshold)


def advantages(rewards, group_ids, cfg) -> list[float]:
    return estimate_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(group_ids), cfg).tolist()


def reference(rewards, group_ids, cfg) -> list[float]:
    """One group at a time, exact fractions up to the square root."""
    members = defaultdict(list)
    for i, g in enumerate(group_ids):
        members[g].append(i)
    mixed = sum(len({rewards[i] for i in m}) > 1 for m in members.values())
    out = [0.0] * len(rewards)
    for indices in members.values():
        r = [Fraction(rewards[i]) for i in indices]
        if len(set(r)) == 1:
            continue
        mode = cfg.aggregation_mode.value
        size = len(r)
        success = [x >= Fraction(cfg.success_threshold) for x in r] if cfg.success_threshold is not None else None
        if success is None and mode in ("mix", "mean_only", "treerpo"):
            success = [x == max(r) for x in r]
            r = [Fraction(int(s)) for s in success]
        mean = sum(r) / size
        squares = sum((x - mean) ** 2 for x in r)
        variance = squares / (size if cfg.std is Std.population else size - 1)
        z = [float(x - mean) / (math.sqrt(variance) + cfg.eps) for x in r]
        for place, i in enumerate(indices):
            centred = r[place] - mean
            if mode == "native":
                out[i] = z[place]
            elif mode == "mix":
                p = Fraction(sum(success), size)
                lam = float(1 - 4 * p * (1 - p))
                out[i] = (1 - lam) * z[place] + lam * float(centred / mean)
            elif mode == "mean_only":
                out[i] = float(centred / mean)
            elif mode == "center":
                out[i] = float(centred)
            elif mode == "rloo":
                others = [x for j, x in enumerate(r) if j != place]
                out[i] = float(r[place] - sum(others) / len(others))
            elif mode == "gpg":
                out[i] = float(centred * len(members) / mixed)
            else:
                out[i] = float(centred / (mean * (1 - mean)))
    return out


def close(got, expected):
    assert got == pytest.approx(expected, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("k", "right", "wrong"),
    [(1, 5.02, -0.717), (2, 1.965, -0.655), (4, 0.935, -0.935), (6, 0.488, -1.465), (7, 0.235, -1.645)],
)
def test_mapo_reference_values(k, right, wrong):
    rewards = [1.0] * k + [0.0] * (8 - k)
    got = advantages(rewards, [3] * 8, config(std="unbiased"))
    assert got[:k] == pytest.approx([right] * k, abs=1.2e-3)
    assert got[k:] == pytest.approx([wrong] * (8 - k), abs=1.2e-3)


def test_mapo_equals_grpo_at_even_odds_and_mean_relative_at_the_extremes():
    even = [1.0, 0.0] * 4
    assert advantages(even, [0] * 8, config("mix")) == advantages(even, [0] * 8, config("native"))
    # λ → 1 as p → 0: with one success in many, MAPO is close to the mean-relative advantage.
    rare = [1.0] + [0.0] * 999
    assert advantages(rare, [0] * 1000, config("mix"))[0] == pytest.approx(
        advantages(rare, [0] * 1000, config("mean_only"))[0], rel=0.01
    )


ragged = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    groups=ragged,
    mode=st.sampled_from(MODES),
    std=st.sampled_from(list(Std)),
    values=st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 5.0), (-3.0, -1.0), (0.1, 0.7)]),
    data=st.data(),
)
def test_binary_rewards_match_reference_in_any_order(groups, mode, std, values, data):
    ids = data.draw(st.lists(st.integers(-(2**40), 2**40), min_size=len(groups), max_size=len(groups), unique=True))
    flat = [(i, values[ok]) for i, group in zip(ids, groups, strict=True) for ok in group]
    flat = data.draw(st.permutations(flat))
    group_ids, rewards = [i for i, _ in flat], [r for _, r in flat]
    cfg = AdvNormConfig(mode, std, 1e-6, None)
    got = advantages(rewards, group_ids, cfg)
    close(got, reference(rewards, group_ids, cfg))
    assert all(math.isfinite(x) for x in got)


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9), min_size=1, max_size=6),
    mode=st.sampled_from(MODES),
    std=st.sampled_from(list(Std)),
    threshold=st.floats(0.0, 1.0),
)
def test_shaped_rewards_match_reference(groups, mode, std, threshold):
    rewards = [r for group in groups for r in group]
    group_ids = [7 * i for i, group in enumerate(groups) for _ in group]
    cfg = AdvNormConfig(mode, std, 1e-6, threshold)
    got = advantages(rewards, group_ids, cfg)
    assert got == pytest.approx(reference(rewards, group_ids, cfg), rel=1e-5, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=9), min_size=2, max_size=6),
    mode=st.sampled_from([AggregationMode.native, AggregationMode.center, AggregationMode.rloo]),
    data=st.data(),
)
def test_other_sequences_and_their_order_do_not_change_a_bit(groups, mode, data):
    rewards = [r for group in groups for r in group]
    group_ids = [i for i, group in enumerate(groups) for _ in group]
    cfg = AdvNormConfig(mode)
    whole = advantages(rewards, group_ids, cfg)
    order = data.draw(st.permutations(range(len(rewards))))
    shuffled = advantages([rewards[i] for i in order], [group_ids[i] for i in order], cfg)
    assert shuffled == [whole[i] for i in order]
    # Re-balancing over ranks: every group computed in another company, under another id.
    rank = [i for i in order if group_ids[i] % 2]
    if rank:
        assert advantages([rewards[i] for i in rank], [100 - group_ids[i] for i in rank], cfg) == [
            whole[i] for i in rank
        ]


@pytest.mark.parametrize("mode", [m for m in BINARY_INVARIANT if m is not AggregationMode.native])
@settings(deadline=None, max_examples=40)
@given(groups=ragged, scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_any_two_values_give_the_same_advantages(mode, groups, scale, shift):
    binary = [float(ok) for group in groups for ok in group]
    group_ids = [i for i, group in enumerate(groups) for _ in group]
    cfg = AdvNormConfig(mode)
    assert advantages([scale * r + shift for r in binary], group_ids, cfg) == advantages(binary, group_ids, cfg)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 5.0)])
@pytest.mark.parametrize("mode", BINARY_INVARIANT)
def test_usual_binary_codes(mode, values):
    ok = [1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]
    group_ids = [0] * 8 + [1] * 4
    cfg = AdvNormConfig(mode)
    close(advantages([values[x] for x in ok], group_ids, cfg), advantages([float(x) for x in ok], group_ids, cfg))


def test_mean_only_keeps_its_sign_with_negative_rewards():
    got = advantages([1.0, -1.0, -1.0, -1.0], [0] * 4, config("mean_only"))
    assert got == [3.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("std", list(Std))
@pytest.mark.parametrize("mode", MODES)
def test_equal_rewards_and_single_responses_give_exactly_zero(mode, std, threshold):
    # 0.1 three times: its mean is not 0.1 in floating point, so only an exact test gives an exact 0.
    rewards = [0.1, 0.1, 0.1, 1.0, 0.0, 0.0, 0.0]
    group_ids = [5, 5, 5, 2, 9, 9, 1]
    assert advantages(rewards, group_ids, AdvNormConfig(mode, std, 1e-6, threshold)) == [0.0] * 7


@pytest.mark.parametrize("mode", MODES)
def test_zero_eps_gives_no_nan(mode):
    got = advantages([1.0, 1.0, 0.0, 1.0, 0.0], [0, 0, 1, 2, 2], AdvNormConfig(mode, Std.unbiased, 0.0))
    assert got[:3] == [0.0] * 3
    assert all(map(math.isfinite, got))


def test_gpg_makes_up_for_groups_without_gradient():
    rewards = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert advantages(rewards, [0, 0, 1, 1, 2, 2, 3, 3], config("gpg")) == [2.0, -2.0, 0, 0, 0, 0, 0, 0]


def test_dtypes():
    got = estimate_advantages(torch.tensor([1, 0]), torch.tensor([0, 0], dtype=torch.int32), config("center"))
    assert got.dtype == torch.float32
    assert got.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("mode", ["mix", "mean_only", "treerpo"])
def test_more_than_two_values_need_a_threshold(mode):
    with pytest.raises(ConfigError, match=r"group 4 has 3 .*0, 0\.5, 1.*actor\.adv_norm\.success_threshold"):
        advantages([0.0, 1.0, 0.0, 0.5, 1.0], [0, 0, 4, 4, 4], config(mode))


@pytest.mark.parametrize("mode", ["mix", "mean_only"])
def test_threshold_needs_a_positive_mean(mode):
    with pytest.raises(ConfigError, match=r"group 8 is -0\.25.*actor\.adv_norm\.success_threshold"):
        advantages([-1.0, 0.5, 1.0, 1.0], [8, 8, 9, 9], config(mode, threshold=0.5))
    # A group without any reward has the mean 0, and it is no error: it is all-equal.
    assert advantages([0.0, 0.0], [8, 8], config(mode, threshold=0.5)) == [0.0, 0.0]


def test_treerpo_with_threshold_needs_rewards_from_0_to_1():
    with pytest.raises(ConfigError, match=r"group 3 has 2.*actor\.adv_norm\.success_threshold"):
        advantages([2.0, 0.0], [3, 3], config("treerpo", threshold=1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_rewards(bad):
    with pytest.raises(RewardError, match=r"1 of 3 .*response 1 in group 6.*reward\.name"):
        advantages([1.0, bad, 0.0], [6, 6, 6], config())


def test_wrong_shapes():
    ones = torch.ones
    with pytest.raises(DataError, match="one length"):
        estimate_advantages(ones(3), ones(2, dtype=torch.int64), config())
    with pytest.raises(DataError, match="flat"):
        estimate_advantages(ones(2, 2), ones(2, 2, dtype=torch.int64), config())
    with pytest.raises(DataError, match="integers"):
        estimate_advantages(ones(2), ones(2), config())
    with pytest.raises(DataError, match="no rewards"):
        estimate_advantages(ones(0), ones(0, dtype=torch.int64), config())


def test_group_statistics():
    rewards = torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    stats = group_statistics(rewards, torch.tensor([9, 9, 9, 9, 2, 2, 30]), config())
    assert stats.ids.tolist() == [2, 9, 30]
    assert stats.sizes.tolist() == [2, 4, 1]
    assert stats.p.tolist() == [0.0, 0.75, 1.0]
    assert stats.lam.tolist() == [1.0, 0.25, 1.0]
    assert stats.varied.tolist() == [False, True, False]


def test_group_statistics_of_graded_rewards_and_of_one_value():
    graded, ids = torch.tensor([0.0, 0.2, 0.9, 1.0]), torch.zeros(4, dtype=torch.int64)
    assert group_statistics(graded, ids, config("native")).p.tolist() == [0.5]
    assert group_statistics(graded, ids, config("native", threshold=1.0)).p.tolist() == [0.25]
    for value, p in [(1.0, 1.0), (0.0, 0.0), (-1.0, 0.0)]:
        assert group_statistics(torch.full((4,), value), ids, config()).p.tolist() == [p]
