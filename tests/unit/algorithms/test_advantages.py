"""Advantages against an independent reference in plain Python, and the invariants users rely on."""

import itertools
import math
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mapo.algorithms.advantages import ESTIMATORS, estimate_advantages, get_estimator, group_statistics
from megatron_mapo.config import ADVANTAGE_MODES, AdvNormConfig, Std
from megatron_mapo.errors import ConfigError, DataError, RewardError

MODES = list(ADVANTAGE_MODES)
BINARY_INVARIANT = ["native", "mix", "mean_only", "treerpo", "pass_at_k"]
BATCH_MODES = ["lite_ppo", "reinforce++", "reinforce++_baseline"]


def config(mode="mix", std="population", eps=1e-6, threshold=None, pass_k=1) -> AdvNormConfig:
    return AdvNormConfig(mode, Std(std), eps, threshold, pass_k)


def advantages(rewards, group_ids, cfg) -> list[float]:
    return estimate_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(group_ids), cfg).tolist()


def deviation(values, cfg) -> float:
    mean = sum(values) / len(values)
    squares = sum((x - mean) ** 2 for x in values)
    return math.sqrt(squares / (len(values) if cfg.std is Std.population else max(len(values) - 1, 1)))


def batch_reference(rewards, group_ids, cfg) -> list[float]:
    """The modes that look at the whole batch."""
    r = [Fraction(x) for x in rewards]
    mean = {
        g: Fraction(sum(x for x, h in zip(r, group_ids, strict=True) if h == g), group_ids.count(g)) for g in group_ids
    }
    centred = [x - mean[g] for x, g in zip(r, group_ids, strict=True)]
    if cfg.aggregation_mode == "reinforce++":
        centred = [x - sum(r) / len(r) for x in r]
    std = deviation(centred if cfg.aggregation_mode == "reinforce++_baseline" else r, cfg) + cfg.eps
    return [float(x) / std if x else 0.0 for x in centred]


def pass_at_k_reference(ok, cfg) -> list[float]:
    """Over all sets of k responses, not by the formula."""
    sets = list(itertools.combinations(range(len(ok)), cfg.pass_k))
    rewards = [Fraction(int(any(ok[i] for i in chosen))) for chosen in sets]
    mean = sum(rewards) / len(sets)
    std = math.sqrt(mean * (1 - mean)) + cfg.eps
    of = [[r - mean for r, chosen in zip(rewards, sets, strict=True) if i in chosen] for i in range(len(ok))]
    return [float(sum(a) / len(a)) / std if 0 < mean < 1 else 0.0 for a in of]


def reference(rewards, group_ids, cfg) -> list[float]:
    """One group at a time, exact fractions up to the square root."""
    if cfg.aggregation_mode in BATCH_MODES:
        return batch_reference(rewards, group_ids, cfg)
    members = defaultdict(list)
    for i, g in enumerate(group_ids):
        members[g].append(i)
    mixed = sum(len({rewards[i] for i in m}) > 1 for m in members.values())
    out = [0.0] * len(rewards)
    for indices in members.values():
        r = [Fraction(rewards[i]) for i in indices]
        if len(set(r)) == 1:
            continue
        mode = cfg.aggregation_mode
        size = len(r)
        success = [x >= Fraction(cfg.success_threshold) for x in r] if cfg.success_threshold is not None else None
        if success is None and mode in ("mix", "mean_only", "treerpo", "pass_at_k"):
            success = [x == max(r) for x in r]
            r = [Fraction(int(s)) for s in success]
        if mode == "pass_at_k":
            for i, value in zip(indices, pass_at_k_reference(success, cfg), strict=True):
                out[i] = value
            continue
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
    cfg = config(mode, std)
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
    cfg = config(mode, std, 1e-6, threshold)
    got = advantages(rewards, group_ids, cfg)
    assert got == pytest.approx(reference(rewards, group_ids, cfg), rel=1e-5, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=9), min_size=2, max_size=6),
    mode=st.sampled_from(["native", "center", "rloo"]),
    data=st.data(),
)
def test_other_sequences_and_their_order_do_not_change_a_bit(groups, mode, data):
    rewards = [r for group in groups for r in group]
    group_ids = [i for i, group in enumerate(groups) for _ in group]
    cfg = config(mode)
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


@pytest.mark.parametrize("mode", [m for m in BINARY_INVARIANT if m != "native"])
@settings(deadline=None, max_examples=40)
@given(groups=ragged, scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_any_two_values_give_the_same_advantages(mode, groups, scale, shift):
    binary = [float(ok) for group in groups for ok in group]
    group_ids = [i for i, group in enumerate(groups) for _ in group]
    cfg = config(mode)
    assert advantages([scale * r + shift for r in binary], group_ids, cfg) == advantages(binary, group_ids, cfg)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 5.0)])
@pytest.mark.parametrize("mode", BINARY_INVARIANT)
def test_usual_binary_codes(mode, values):
    ok = [1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]
    group_ids = [0] * 8 + [1] * 4
    cfg = config(mode)
    close(advantages([values[x] for x in ok], group_ids, cfg), advantages([float(x) for x in ok], group_ids, cfg))


def test_mean_only_keeps_its_sign_with_negative_rewards():
    got = advantages([1.0, -1.0, -1.0, -1.0], [0] * 4, config("mean_only"))
    assert got == [3.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("std", list(Std))
@pytest.mark.parametrize("mode", [m for m in MODES if m != "reinforce++"])
def test_equal_rewards_and_single_responses_give_exactly_zero(mode, std, threshold):
    # 0.1 three times: its mean is not 0.1 in floating point, so only an exact test gives an exact 0.
    rewards = [0.1, 0.1, 0.1, 1.0, 0.0, 0.0, 0.0]
    group_ids = [5, 5, 5, 2, 9, 9, 1]
    assert advantages(rewards, group_ids, config(mode, std, 1e-6, threshold)) == [0.0] * 7


@pytest.mark.parametrize("mode", MODES)
def test_zero_eps_gives_no_nan(mode):
    got = advantages([1.0, 1.0, 0.0, 1.0, 0.0], [0, 0, 1, 2, 2], config(mode, Std.unbiased, 0.0))
    assert got[:3] == [0.0] * 3 or mode == "reinforce++"
    assert all(map(math.isfinite, got))
    assert advantages([1.0] * 3, [0, 1, 1], config(mode, Std.unbiased, 0.0)) == [0.0] * 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_many_responses_are_worked_on_in_blocks_of_whole_groups(mode, shuffled, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(4, 9, (50,), generator=generator)
    ids = torch.repeat_interleave(torch.randperm(50, generator=generator) if shuffled else torch.arange(50), sizes)
    order = torch.randperm(len(ids), generator=generator) if shuffled else torch.arange(len(ids))
    ids, rewards = ids[order], (torch.rand(len(ids), generator=generator) < 0.4).float()
    whole = estimate_advantages(rewards, ids, AdvNormConfig(aggregation_mode=mode))
    monkeypatch.setattr("megatron_mapo.algorithms.advantages.BLOCK", 20)
    assert torch.equal(estimate_advantages(rewards, ids, AdvNormConfig(aggregation_mode=mode)), whole)


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


def test_a_threshold_is_rounded_as_the_rewards_are():
    rewards, ids = torch.tensor([0.9, 0.0, 0.7, 0.0]), torch.tensor([0, 0, 1, 1])
    assert group_statistics(rewards[:2], ids[:2], config(threshold=0.9)).p.tolist() == [0.5]
    assert group_statistics(rewards[2:], ids[2:], config(threshold=0.7)).p.tolist() == [0.5]


def test_group_statistics_of_graded_rewards_and_of_one_value():
    graded, ids = torch.tensor([0.0, 0.2, 0.9, 1.0]), torch.zeros(4, dtype=torch.int64)
    assert group_statistics(graded, ids, config("native")).p.tolist() == [0.5]
    assert group_statistics(graded, ids, config("native", threshold=1.0)).p.tolist() == [0.25]
    for value, p in [(1.0, 1.0), (0.0, 0.0), (-1.0, 0.0)]:
        assert group_statistics(torch.full((4,), value), ids, config()).p.tolist() == [p]


def test_success_of_the_verifier_counts_and_the_rewards_stay():
    rewards, ids = [1.2, 0.2, 0.0, 0.0], torch.zeros(4, dtype=torch.int64)
    success = torch.tensor([True, False, False, False])
    cfg = config("mix")
    got = estimate_advantages(torch.tensor(rewards, dtype=torch.float64), ids, cfg, success).tolist()
    close(got, reference(rewards, [0] * 4, config("mix", threshold=1.0)))
    assert group_statistics(torch.tensor(rewards), ids, cfg, success).p.tolist() == [0.25]
    # in any order of the responses
    order = torch.tensor([2, 0, 3, 1])
    shuffled = estimate_advantages(torch.tensor(rewards, dtype=torch.float64)[order], ids, cfg, success[order])
    assert shuffled.tolist() == [got[i] for i in order.tolist()]


@settings(deadline=None, max_examples=60)
@given(ok=st.lists(st.booleans(), min_size=2, max_size=9), data=st.data())
def test_pass_at_k_is_the_mean_over_all_sets(ok, data):
    cfg = config("pass_at_k", pass_k=data.draw(st.integers(1, len(ok))))
    close(advantages([float(x) for x in ok], [0] * len(ok), cfg), reference([float(x) for x in ok], [0] * len(ok), cfg))


def test_pass_at_1_is_native_and_k_must_fit():
    rewards, ids = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0], [0] * 4 + [1] * 4
    close(advantages(rewards, ids, config("pass_at_k")), advantages(rewards, ids, config("native")))
    with pytest.raises(ConfigError, match=r"pass_k=5 .*rollout\.responses_per_prompt"):
        advantages(rewards, ids, config("pass_at_k", pass_k=5))


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_batch_modes_have_the_scale_of_the_batch(mode):
    rewards, ids = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 3.0], [0] * 4 + [1] * 4 + [2]
    got = torch.tensor(advantages(rewards, ids, config(mode, eps=0.0)))
    centred = torch.tensor(advantages(rewards, ids, config("center")))
    if mode == "reinforce++":
        assert float(got.mean()) == pytest.approx(0, abs=1e-6)
    if mode != "lite_ppo":
        assert float(got.square().mean()) == pytest.approx(1)
    if mode != "reinforce++":
        scale = (got[centred != 0] / centred[centred != 0]).tolist()
        assert scale == pytest.approx([scale[0]] * len(scale), rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(mode=st.sampled_from(MODES), ok=st.lists(st.booleans(), min_size=8, max_size=8), data=st.data())
def test_binary_rewards_give_the_same_bits_in_any_order(mode, ok, data):
    ids, cfg = [0, 0, 0, 0, 7, 7, 7, 9], config(mode)
    whole = advantages([0.3 * x for x in ok], ids, cfg)
    order = data.draw(st.permutations(range(8)))
    assert advantages([0.3 * ok[i] for i in order], [ids[i] for i in order], cfg) == [whole[i] for i in order]


ragged_grades = st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9), min_size=1, max_size=6)


def flat(groups) -> tuple[list[float], list[int]]:
    return [float(r) for group in groups for r in group], [i for i, group in enumerate(groups) for _ in group]


@settings(deadline=None, max_examples=60)
@given(groups=ragged, mode=st.sampled_from(MODES), std=st.sampled_from(list(Std)), data=st.data())
def test_advantages_of_a_group_add_up_to_zero(groups, mode, std, data):
    pass_k = data.draw(st.integers(1, min(map(len, groups))))
    rewards, ids = flat(groups)
    found = advantages(rewards, ids, config(mode, std, pass_k=pass_k))
    if mode == "reinforce++":  # its baseline is the batch's
        ids = [0] * len(ids)
    sums = torch.zeros(max(ids) + 1, dtype=torch.float64).index_add_(0, torch.tensor(ids), torch.tensor(found).double())
    assert float(sums.abs().max()) <= 1e-5


@settings(deadline=None, max_examples=60)
@given(groups=ragged_grades, mode=st.sampled_from(["native", "center", "rloo", "gpg", "lite_ppo"]))
def test_so_do_those_of_graded_rewards(groups, mode):
    rewards, ids = flat(groups)
    found = torch.tensor(advantages(rewards, ids, config(mode, eps=0.01))).double()
    sums = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, torch.tensor(ids), found)
    assert float(sums.abs().max()) <= 1e-5


@settings(deadline=None, max_examples=60)
@given(groups=ragged, std=st.sampled_from(list(Std)))
def test_exchanging_right_and_wrong(groups, std):
    """λ is the same, the z-score changes its sign; the mean-relative advantage does not."""
    (rewards, ids), cfg = flat(groups), config("native", std)
    right, wrong = torch.tensor(rewards), 1 - torch.tensor(rewards)
    one, other = (group_statistics(r, torch.tensor(ids), cfg, r > 0.5) for r in (right, wrong))
    assert one.lam.tolist() == pytest.approx(other.lam.tolist(), abs=1e-12)
    assert one.p.tolist() == pytest.approx((1 - other.p).tolist(), abs=1e-12)
    assert advantages(rewards, ids, cfg) == pytest.approx([-a for a in advantages(wrong.tolist(), ids, cfg)], rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(groups=st.one_of(ragged, ragged_grades), std=st.sampled_from(list(Std)))
def test_no_advantage_is_larger_than_that_of_one_against_the_rest(groups, std):
    rewards, ids = flat(groups)
    size = torch.tensor([float(len(group)) for group in groups])[torch.tensor(ids)]
    z = torch.tensor(advantages(rewards, ids, config("native", std, eps=0.0)))
    bound = (size - 1).sqrt() if std is Std.population else (size - 1) / size.sqrt()
    assert (z.abs() <= bound * (1 + 1e-6)).all()
    relative = torch.tensor(advantages(rewards, ids, config("mean_only", threshold=0.5)))
    assert (relative <= (size - 1) * (1 + 1e-6)).all()
    assert (relative >= -1 - 1e-6).all()


@settings(deadline=None, max_examples=60)
@given(group=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=9), std=st.sampled_from(list(Std)))
def test_of_one_group_the_batch_modes_are_the_z_score(group, std):
    expected = advantages(group, [4] * len(group), config("native", std, eps=1e-3))
    for mode in BATCH_MODES:
        found = advantages(group, [4] * len(group), config(mode, std, eps=1e-3))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(groups=ragged_grades)
def test_gpg_without_equal_groups_is_the_centred_reward(groups):
    varied = [group for group in groups if len(set(group)) > 1]
    if varied:
        rewards, ids = flat(varied)
        assert advantages(rewards, ids, config("gpg")) == advantages(rewards, ids, config("center"))


CUSTOM = """
import torch

def median(groups, config):
    middle = torch.stack([groups.rewards[groups.index == i].median() for i in range(len(groups.ids))])
    return groups.rewards - groups.per_response(middle)

def short(groups, config):
    return groups.mean

def infinite(groups, config):
    return groups.rewards / 0
"""


def test_an_estimator_of_the_user(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM)
    rewards, ids = [0.0, 3.0, 1.0, 5.0], [4, 2, 4, 4]
    assert advantages(rewards, ids, config(f"{file}:median")) == [-1.0, 0.0, 0.0, 4.0]
    for name, words in [
        ("short", r"\[4\]; it returned \(2,\)"),
        ("infinite", "not finite"),
        ("none", "no function none"),
    ]:
        with pytest.raises(ConfigError, match=f"actor.adv_norm.aggregation_mode=.*{words}"):
            advantages(rewards, ids, config(f"{file}:{name}"))
    with pytest.raises(ConfigError, match="is unknown: it is one of native, mix"):
        get_estimator("grpo")
    with pytest.raises(ConfigError, match="there is no file"):
        get_estimator(f"{tmp_path}/other.py:median")


def test_the_configuration_knows_all_estimators():
    assert tuple(ESTIMATORS) == ADVANTAGE_MODES
