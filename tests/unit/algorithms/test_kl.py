"""KL estimators against exact sums over a small vocabulary."""

import pytest
import torch

from megatron_mapo.algorithms.kl import MAX_LOG_RATIO, kl_penalty, rewards_with_kl
from megatron_mapo.config import KLEstimator


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 7, dtype=torch.float64, generator=generator)


def kl(p_log, q_log):
    return (p_log.exp() * (p_log - q_log)).sum()


@pytest.mark.parametrize("estimator", [KLEstimator.k1, KLEstimator.k3])
def test_expectation_is_the_kl(logits, estimator):
    policy, ref = logits.log_softmax(-1)
    expectation = (policy.exp() * kl_penalty(policy, ref, estimator)).sum()
    assert expectation.item() == pytest.approx(kl(policy, ref).item(), rel=1e-12)


def test_k2_agrees_to_second_order(logits):
    base = logits[0].log_softmax(-1)
    near = (logits[0] + 1e-4 * logits[1]).log_softmax(-1)
    expectation = (base.exp() * kl_penalty(base, near, KLEstimator.k2)).sum()
    assert expectation.item() == pytest.approx(kl(base, near).item(), rel=1e-3)


@pytest.mark.parametrize("estimator", [KLEstimator.k2, KLEstimator.k3])
def test_never_negative_and_zero_when_equal(logits, estimator):
    policy, ref = logits.log_softmax(-1)
    assert (kl_penalty(policy, ref, estimator) > 0).all()
    assert (kl_penalty(policy, policy, estimator) == 0).all()


def expected_gradient(logits, estimator):
    """Gradient of the penalty at sampled tokens, the sampling held fixed, in expectation."""
    free = logits[0].clone().requires_grad_()
    policy = free.log_softmax(-1)
    (policy.detach().exp() * kl_penalty(policy, logits[1].log_softmax(-1), estimator)).sum().backward()
    return free.grad


def test_gradients_are_what_the_docstring_says(logits):
    free = logits[0].clone().requires_grad_()
    policy, ref = free.log_softmax(-1), logits[1].log_softmax(-1)
    (reverse,) = torch.autograd.grad(kl(policy, ref), free, retain_graph=True)
    (forward,) = torch.autograd.grad(kl(ref, policy), free)
    torch.testing.assert_close(expected_gradient(logits, KLEstimator.k1), torch.zeros_like(reverse))
    torch.testing.assert_close(expected_gradient(logits, KLEstimator.k2), reverse)
    torch.testing.assert_close(expected_gradient(logits, KLEstimator.k3), forward)


def test_weighted_k3_is_right_away_from_the_old_policy(logits):
    """Sampled from an old policy: its mean and its gradient are those of the reverse KL."""
    generator = torch.Generator().manual_seed(2)
    old = torch.randn(7, dtype=torch.float64, generator=generator).log_softmax(-1)
    free = logits[0].clone().requires_grad_()
    policy, ref = free.log_softmax(-1), logits[1].log_softmax(-1)
    expectation = (old.exp() * kl_penalty(policy, ref, KLEstimator.k3_unbiased, old)).sum()
    torch.testing.assert_close(expectation, kl(policy, ref))
    (found,) = torch.autograd.grad(expectation, free, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(kl(policy, ref), free)[0])
    # On the old policy itself the value is that of k3.
    torch.testing.assert_close(
        kl_penalty(policy, ref, KLEstimator.k3_unbiased, policy), kl_penalty(policy, ref, KLEstimator.k3)
    )
    with pytest.raises(ValueError, match="old_logprobs"):
        kl_penalty(policy, ref, KLEstimator.k3_unbiased)


def test_kl_in_the_reward():
    old, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    rewards = rewards_with_kl(torch.tensor([1.0, 0.0, 2.0]), old, ref, torch.tensor([0, 0, 2]), 0.1, KLEstimator.k1)
    assert rewards.tolist() == pytest.approx([1 - 0.1 * (0.5 - 1.0), 0.0, 2.0])


def test_far_off_tokens_stay_finite():
    far = torch.tensor([-200.0], requires_grad=True)
    value = kl_penalty(far, torch.zeros(1), KLEstimator.k3)
    value.sum().backward()
    assert value.item() == pytest.approx(torch.expm1(torch.tensor(MAX_LOG_RATIO)).item() - MAX_LOG_RATIO)
    assert far.grad is not None
    assert far.grad.isfinite().all()


def test_small_differences_keep_their_digits():
    # e^d − 1 − d is d²/2: in float32 the naive form gives 0 or noise here.
    value = kl_penalty(torch.zeros(1), torch.tensor([1e-3]), KLEstimator.k3)
    assert value.item() == pytest.approx(5.0017e-7, rel=1e-3)
