"""Per-token estimators of a KL divergence from log-probs of sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mapo.config import KLEstimator

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before they are exponentiated (e^20 is 5e8), so that one far-off token cannot make a
whole batch infinite. A token beyond it passes no gradient."""


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(policy || reference) at tokens sampled from the policy.

    With ``d = log π_ref − log π``: k1 is ``−d``, k2 is ``d²/2``, k3 is ``e^d − 1 − d``.
    k1 and k3 are unbiased estimates of KL(π || π_ref), k2 has a small bias; k2 and k3 are never negative.

    As a loss term what counts is the gradient at tokens sampled from π, and its expectation:

    * k1: 0 in expectation, noise only. It belongs in a reward, not in a loss.
    * k2: ∇ KL(π || π_ref), the reverse KL.
    * k3: ∇ KL(π_ref || π), the forward KL; this is GRPO's penalty.

    Sources: J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html;
    GRPO, arXiv 2402.03300, eq. 4.

    Args:
        logprobs: ``[T]``, log-probs of the sampled tokens under the policy (nat).
        ref_logprobs: ``[T]``, under the reference.
        estimator: which one.

    Returns:
        ``[T]``, nat. ``MAX_LOG_RATIO`` bounds d from above in k3.
    """
    if estimator is KLEstimator.k1:
        return logprobs - ref_logprobs
    if estimator is KLEstimator.k2:
        return 0.5 * (logprobs - ref_logprobs).square()
    log_ratio = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio
