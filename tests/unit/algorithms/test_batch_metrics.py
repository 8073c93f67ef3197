"""Metrics against counts by hand and plain Python."""

import math
import random

import pytest
import torch

from megatron_mapo.algorithms.advantages import estimate_advantages
from megatron_mapo.algorithms.metrics import HISTOGRAM_BINS, mismatch_metrics, rollout_metrics, update_metrics
from megatron_mapo.config import AdvNormConfig, KLEstimator, LossConfig
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import DataError


def batch_of(rewards, group_ids, response_lens, versions, truncated):
    return SequenceBatch.from_responses(
        [[1, 2]] * len(rewards),
        [[3] * n for n in response_lens],
        rewards=rewards,
        group_ids=group_ids,
        weight_versions=versions,
        truncated=truncated,
    )


def test_rollout_metrics():
    batch = batch_of(
        rewards=[1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0],
        group_ids=[4, 4, 4, 4, 2, 2, 11, 11],
        response_lens=[1, 2, 3, 4, 5, 6, 0, 3],
        versions=[[9], [9] * 2, [9] * 3, [8] * 4, [9] * 5, [7] * 3 + [9] * 3, [], [9] * 3],
        truncated=[False, True] + [False] * 5 + [True],
    )
    config = AdvNormConfig()
    advantages = estimate_advantages(batch.rewards, batch.group_ids, config)
    metrics = rollout_metrics(batch, advantages, config, current_version=9)
    assert metrics["reward/mean"] == 0.375
    assert metrics["reward/std"] == pytest.approx(math.sqrt(0.375 * 0.625))
    assert (metrics["reward/min"], metrics["reward/max"]) == (0.0, 1.0)
    assert metrics["reward/accuracy"] == pytest.approx((0.25 + 1.0 + 0.0) / 3)
    assert metrics["group/count"] == 3.0
    assert metrics["group/zero_advantage"] == pytest.approx(2 / 3)
    histogram = [metrics[f"group/p_hist_{i:02d}"] for i in range(HISTOGRAM_BINS)]
    assert histogram == pytest.approx([1 / 3, 0, 1 / 3, 0, 0, 0, 0, 0, 1 / 3])
    lam = [metrics[f"group/lambda_hist_{i:02d}"] for i in range(HISTOGRAM_BINS)]
    assert lam == pytest.approx([0, 0, 1 / 3, 0, 0, 0, 0, 0, 2 / 3])
    assert metrics["response/length_mean"] == 3.0
    assert (metrics["response/length_min"], metrics["response/length_max"]) == (0.0, 6.0)
    assert metrics["response/truncated"] == 0.25
    assert metrics["prompt/length_mean"] == 2.0
    assert metrics["staleness/mean"] == pytest.approx((4 * 1 + 3 * 2) / 24)
    assert metrics["staleness/max"] == 2.0
    assert metrics["weights/version"] == 9.0
    assert all(type(v) is float for v in metrics.values())


def test_every_success_rate_of_eight_has_its_own_bin():
    rewards = [float(i < k) for k in range(9) for i in range(8)]
    ids = [k for k in range(9) for _ in range(8)]
    batch = batch_of(rewards, ids, [1] * 72, [[0]] * 72, [False] * 72)
    metrics = rollout_metrics(batch, torch.zeros(72), AdvNormConfig(), 0)
    assert [metrics[f"group/p_hist_{i:02d}"] for i in range(HISTOGRAM_BINS)] == pytest.approx([1 / 9] * 9)
    assert metrics["group/zero_advantage"] == 1.0


def test_a_mixture_says_what_succeeded_and_what_each_verifier_gave():
    batch = batch_of([0.2, 1.2, 1.0, 0.2], [0, 0, 1, 1], [1] * 4, [[0]] * 4, [False] * 4)
    batch.extra["right"] = torch.tensor([True, True, True, False])
    batch.extra["reward/math"] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    metrics = rollout_metrics(batch, torch.zeros(4), AdvNormConfig(), 0)
    assert metrics["reward/accuracy"] == pytest.approx(0.75)
    assert metrics["reward/math/mean"] == pytest.approx(0.5)


def test_rollout_metrics_of_responses_without_tokens():
    metrics = rollout_metrics(batch_of([1.0], [0], [0], [[]], [False]), torch.zeros(1), AdvNormConfig(), 3)
    assert metrics["staleness/mean"] == 0.0
    with pytest.raises(DataError, match="no responses"):
        rollout_metrics(batch_of([], [], [], [], []), torch.zeros(0), AdvNormConfig(), 3)


def random_columns(n):
    rng = random.Random(5)
    old = [-rng.expovariate(1) for _ in range(n)]
    return {
        "old": old,
        "new": [x + rng.gauss(0, 0.3) for x in old],
        "server": [x + rng.gauss(0, 0.05) for x in old],
        "ref": [x + rng.gauss(0, 0.5) for x in old],
        "adv": [rng.choice([-1.0, 0.0, 1.0]) for _ in range(n)],
        "entropy": [rng.random() for _ in range(n)],
    }


def update(c, config, with_ref=True):
    t = {name: torch.tensor(values, dtype=torch.float64) for name, values in c.items()}
    ref = t["ref"] if with_ref else None
    done = update_metrics(t["new"], t["old"], t["adv"], t["entropy"], config, ref)
    return done | mismatch_metrics(t["old"], t["server"])


def test_update_metrics_match_plain_python():
    n = 1000
    c = random_columns(n)
    config = LossConfig(clip_low=0.1, clip_high=0.3, kl_estimator=KLEstimator.k2)
    metrics = update(c, config)
    gap = sorted(abs(s - o) for s, o in zip(c["server"], c["old"], strict=True))
    ratio = [math.exp(a - b) for a, b in zip(c["new"], c["old"], strict=True)]
    low = sum(a < 0 and r < 0.9 for a, r in zip(c["adv"], ratio, strict=True)) / n
    high = sum(a > 0 and r > 1.3 for a, r in zip(c["adv"], ratio, strict=True)) / n
    assert low > 0.05
    assert high > 0.05
    back = [o - s for s, o in zip(c["server"], c["old"], strict=True)]
    expected = {
        "mismatch/abs_mean": sum(gap) / n,
        "mismatch/abs_p99": gap[989],
        "mismatch/abs_max": gap[-1],
        "mismatch/kl": sum(math.exp(d) - 1 - d for d in back) / n,
        "mismatch/kl_k1": -sum(back) / n,
        "mismatch/tokens": n,
        "loss/clip_fraction": low + high,
        "loss/clip_fraction_low": low,
        "loss/clip_fraction_high": high,
        "loss/kl_old": sum(r - 1 - math.log(r) for r in ratio) / n,
        "loss/entropy": sum(c["entropy"]) / n,
        "loss/ratio_mean": sum(ratio) / n,
        "loss/ratio_max": max(ratio),
        "loss/kl_ref": sum((a - b) ** 2 / 2 for a, b in zip(c["new"], c["ref"], strict=True)) / n,
    }
    assert metrics == pytest.approx(expected, rel=1e-9)


def test_tokens_at_the_second_bound_are_counted():
    n = 1000
    c = random_columns(n)
    plain, dual = update(c, LossConfig()), update(c, LossConfig(dual_clip=1.5))
    ratio = [math.exp(a - b) for a, b in zip(c["new"], c["old"], strict=True)]
    share = sum(a < 0 and r > 1.5 for a, r in zip(c["adv"], ratio, strict=True)) / n
    assert share > 0.01
    assert dual == plain | {"loss/clip_fraction_dual": share}


def test_reference_kl_only_with_a_reference():
    assert "loss/kl_ref" not in update(random_columns(100), LossConfig(), with_ref=False)


def test_no_tokens_give_zeros():
    empty = torch.zeros(0)
    metrics = update_metrics(empty, empty, empty, empty, LossConfig(), empty) | mismatch_metrics(empty, empty)
    assert set(metrics.values()) == {0.0}
    assert "loss/kl_ref" in metrics


def test_percentile_beyond_the_limit_of_torch_quantile():
    n = 2**24 + 1
    zeros = torch.zeros(n)
    server = torch.zeros(n)
    server[: n // 50] = 1.0
    metrics = mismatch_metrics(zeros, server)
    assert metrics["mismatch/abs_p99"] == 1.0
    assert metrics["mismatch/abs_mean"] == pytest.approx(0.02, rel=1e-5)
