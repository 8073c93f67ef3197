"""Per-token estimators of a KL divergence from log-probs of sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mapo.config import KLEstimator

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before they are exponentiated (e^20 is 5e8), so that one far-off token cannot make a
whole batch infinite. A token beyond it passes no gradient."""


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator, old_logprobs: Tensor | None = None
) -> Tensor:
    """Estimate KL(policy || reference) at tokens sampled from the policy.

    With ``d = log π_ref − log π``: k1 is ``−d``, k2 is ``d²/2``, k3 is ``e^d − 1 − d``, and k3_unbiased is
    ``(π/π_old)(e^d − 1 − d)`` for tokens sampled from π_old. k1 and k3 are unbiased estimates of KL(π || π_ref),
    k3_unbiased also when π has moved away from π_old, k2 has a small bias; all but k1 are never negative.

    As a loss term what counts is the gradient at tokens sampled from π, and its expectation:

    * k1: 0 in expectation, noise only. It belongs in a reward, not in a loss.
    * k2: ∇ KL(π || π_ref), the reverse KL.
    * k3: ∇ KL(π_ref || π), the forward KL; this is GRPO's penalty.
    * k3_unbiased: ∇ KL(π || π_ref), because the gradient flows through the importance weight too.

    Sources: J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html;
    GRPO, arXiv 2402.03300, eq. 4; DeepSeek-V3.2, arXiv 2512.02556, eq. 7 (k3_unbiased).

    Args:
        logprobs: ``[T]``, log-probs of the sampled tokens under the policy (nat).
        ref_logprobs: ``[T]``, under the reference.
        estimator: which one.
        old_logprobs: ``[T]``, under π_old; k3_unbiased needs it.

    Returns:
        ``[T]``, nat. ``MAX_LOG_RATIO`` bounds d from above in k3, and the importance weight's logarithm.

    Raises:
        ValueError: ``old_logprobs`` is needed and missing.
    """
    if estimator is KLEstimator.k1:
        return logprobs - ref_logprobs
    if estimator is KLEstimator.k2:
        return 0.5 * (logprobs - ref_logprobs).square()
    log_ratio = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    k3 = torch.expm1(log_ratio) - log_ratio
    if estimator is KLEstimator.k3:
        return k3
    if old_logprobs is None:
        raise ValueError("actor.loss.kl_estimator=k3_unbiased needs old_logprobs")
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * k3


def rewards_with_kl(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    sequence: Tensor,
    coefficient: float,
    estimator: KLEstimator,
) -> Tensor:
    """Rewards less ``coefficient`` times each response's KL to the reference, summed over its tokens.

    Source: the penalty in the reward of RLHF, arXiv 2203.02155, eq. 2, here on whole responses.

    Args:
        rewards: ``[N]``.
        old_logprobs: ``[R]``, of all response tokens under the policy before the update (nat).
        ref_logprobs: ``[R]``, under the reference.
        sequence: int64 ``[R]``, the response of each token.
        coefficient: of the KL.
        estimator: k1, k2 or k3.

    Returns:
        float32 ``[N]``; computed in float64.
    """
    kl = kl_penalty(old_logprobs.double(), ref_logprobs.double(), estimator)
    return (rewards.double().index_add(0, sequence, kl, alpha=-coefficient)).float()
