"""The flat loss against a dense, masked [B, L] reference."""

import math

import pytest
import torch

from megatron_mapo.algorithms.aggregation import token_weights
from megatron_mapo.algorithms.kl import MAX_LOG_RATIO
from megatron_mapo.algorithms.policy_loss import LossInputs
from megatron_mapo.algorithms.policy_loss import policy_loss as loss_of_inputs
from megatron_mapo.config import CorrectionConfig, KLEstimator, LossAggregation, LossConfig

OFF = CorrectionConfig()


def policy_loss(logprobs, old, advantages, weight, config, ref=None, entropy=None):
    return loss_of_inputs(logprobs, LossInputs(old, advantages, weight, ref), config, OFF, entropy)


LENGTHS = [5, 1, 9, 3, 7, 2]
B, L = len(LENGTHS), max(LENGTHS)


def dense_inputs(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    logprobs = -randn(B, L).abs()
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.3 * randn(B, L),
        "ref": logprobs + 0.5 * randn(B, L),
        "entropy": randn(B, L).abs(),
        "advantages": randn(B, 1).expand(B, L),
        "mask": (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).double(),
    }


def dense_loss(x, config, aggregation, logprobs, entropy):
    """Written for padded tensors: case by case, with means over masks."""
    ratio = (logprobs - x["old"]).exp()
    adv = x["advantages"]
    above = (adv > 0) & (ratio > 1 + config.clip_high)
    below = (adv < 0) & (ratio < 1 - config.clip_low)
    gain = adv * ratio
    gain = torch.where(above, adv * (1 + config.clip_high), gain)
    gain = torch.where(below, adv * (1 - config.clip_low), gain)
    delta = logprobs - x["ref"]
    k3 = (-delta).exp() - 1 + delta
    kl = {"k1": delta, "k2": delta**2 / 2, "k3": k3, "k3_unbiased": ratio * k3}[config.kl_estimator.value]
    per_token = (config.kl_coef * kl - gain - config.entropy_coef * entropy) * x["mask"]
    if aggregation == "token":
        return per_token.sum() / x["mask"].sum()
    if aggregation == "sequence":
        return (per_token.sum(1) / x["mask"].sum(1)).mean()
    return (per_token.sum(1) / 16).mean()


def flat(x, keep):
    return {name: value[keep] for name, value in x.items()}


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(clip_low=0.2, clip_high=0.28),
        LossConfig(clip_low=0.05, clip_high=0.02, kl_coef=0.1),
        LossConfig(kl_coef=0.3, kl_estimator=KLEstimator.k1, entropy_coef=0.02),
        LossConfig(kl_coef=0.3, kl_estimator=KLEstimator.k2),
        LossConfig(clip_low=1.0, clip_high=100.0, entropy_coef=0.5),
        LossConfig(clip_high=0.1, kl_coef=0.3, kl_estimator=KLEstimator.k3_unbiased),
    ],
    ids=["plain", "clip-higher", "kl3-tight", "kl1-entropy", "kl2", "no-clip", "kl3-unbiased"],
)
def test_value_and_gradient_equal_the_dense_reference(config, aggregation):
    x = dense_inputs(seed=3)
    dense_logprobs, dense_entropy = x["logprobs"].clone().requires_grad_(), x["entropy"].clone().requires_grad_()
    expected = dense_loss(x, config, aggregation, dense_logprobs, dense_entropy)
    expected.backward()

    keep = x["mask"].bool()
    f = flat(x, keep)
    f["weight"] = token_weights(torch.tensor(LENGTHS), LossAggregation(aggregation), 16)
    order = torch.randperm(len(f["weight"]), generator=torch.Generator().manual_seed(0))
    f = {name: value[order] for name, value in f.items()}
    logprobs, entropy = f["logprobs"].clone().requires_grad_(), f["entropy"].clone().requires_grad_()
    parts = []
    for cut in torch.arange(len(order)).tensor_split(4):
        part = policy_loss(
            logprobs[cut], f["old"][cut], f["advantages"][cut], f["weight"][cut], config, f["ref"][cut], entropy[cut]
        )
        part.backward()
        parts.append(part)
    loss = sum(parts)

    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(logprobs.grad, dense_logprobs.grad[keep][order], rtol=1e-12, atol=1e-15)
    if config.entropy_coef:
        torch.testing.assert_close(entropy.grad, dense_entropy.grad[keep][order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_padding_may_hold_anything(junk):
    config = LossConfig(kl_coef=0.1, entropy_coef=0.1)
    clean = [
        torch.tensor([-0.5, -0.2]),
        torch.tensor([-0.4, -0.3]),
        torch.tensor([1.0, -2.0]),
        torch.tensor([0.5, 0.5]),
    ]
    ref, entropy = torch.tensor([-0.6, -0.1]), torch.tensor([0.7, 0.9])

    def run(pad):
        def padded(t, value):
            return torch.cat([t, torch.full((3,), value)]) if pad else t

        logprobs = padded(clean[0], junk).requires_grad_()
        h = padded(entropy, junk).requires_grad_()
        loss = policy_loss(
            logprobs,
            padded(clean[1], junk),
            padded(clean[2], junk),
            padded(clean[3], 0.0),
            config,
            padded(ref, junk),
            h,
        )
        loss.backward()
        return loss, logprobs.grad, h.grad

    loss, grad, h_grad = run(pad=True)
    clean_loss, clean_grad, clean_h_grad = run(pad=False)
    assert loss.item() == clean_loss.item()
    assert grad.tolist() == [*clean_grad.tolist(), 0.0, 0.0, 0.0]
    assert h_grad.tolist() == [*clean_h_grad.tolist(), 0.0, 0.0, 0.0]


def test_first_update_has_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    weight = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    loss = policy_loss(logprobs, logprobs.detach(), advantages, weight, LossConfig())
    loss.backward()
    torch.testing.assert_close(loss.detach(), -(weight * advantages).sum())
    torch.testing.assert_close(logprobs.grad, -weight * advantages)


def test_bfloat16_is_summed_in_float32():
    n = 4096
    ones = torch.ones(n, dtype=torch.bfloat16)
    loss = policy_loss(-ones, -ones, ones, torch.full((n,), 1 / n), LossConfig())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-1.0, rel=1e-6)


def test_far_off_tokens_stay_finite():
    logprobs = torch.tensor([0.0, 0.0, -0.1], requires_grad=True)
    old = torch.tensor([-500.0, -500.0, -0.1])
    loss = policy_loss(logprobs, old, torch.tensor([1.0, -1.0, 1.0]), torch.ones(3), LossConfig())
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(MAX_LOG_RATIO) - 1.2 - 1.0, rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, -1.0])


def test_empty_microbatch():
    logprobs = torch.zeros(0, requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(0), torch.zeros(0), torch.zeros(0), LossConfig())
    loss.backward()
    assert loss.item() == 0.0


def test_missing_inputs_are_errors():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(x, x, x, x, LossConfig(kl_coef=0.1))
    with pytest.raises(ValueError, match="entropy"):
        policy_loss(x, x, x, x, LossConfig(entropy_coef=0.1))
