"""Clipped policy-gradient loss on flat ``[T]`` tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mapo.algorithms.kl import MAX_LOG_RATIO, kl_penalty
from megatron_mapo.config import LossConfig


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    config: LossConfig,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of ``w_t · l_t``, with ``ratio = exp(logprobs − old_logprobs)`` and

    ``l = −min(ratio·A, clip(ratio, 1−clip_low, 1+clip_high)·A) + kl_coef·KL − entropy_coef·H``.

    The aggregation is in ``token_weight`` alone, which is made of global counts: the sum over all microbatches
    and ranks is the loss of the batch, however it was cut. Tokens of weight 0 (prompts, padding) may hold
    anything, NaN included; they add neither value nor gradient.

    Sources: PPO, arXiv 1707.06347, eq. 7; two clip bounds, DAPO, arXiv 2503.14476, eq. 8; KL as a loss term,
    GRPO, arXiv 2402.03300, eq. 3.

    Args:
        logprobs: ``[T]``, log-probs of the label tokens under the policy in training (nat).
        old_logprobs: ``[T]``, under the policy that the ratio is relative to.
        advantages: ``[T]``.
        token_weight: ``[T]``.
        config: section ``actor.loss``.
        ref_logprobs: ``[T]``, under the reference; needed when ``kl_coef`` is not 0.
        entropy: ``[T]``, of the policy's distribution (nat); needed when ``entropy_coef`` is not 0.

    Returns:
        Scalar, in float32 or the wider type of the inputs. Log-ratios are cut at ±``MAX_LOG_RATIO``.

    Raises:
        ValueError: ``ref_logprobs`` or ``entropy`` is needed and missing.
    """
    counts = token_weight != 0
    dtype = torch.promote_types(torch.promote_types(logprobs.dtype, token_weight.dtype), torch.float32)

    def counted(values: Tensor) -> Tensor:
        # Selecting before any arithmetic keeps NaN and inf out of the backward pass too, where 0·inf is NaN.
        return torch.where(counts, values, 0.0).to(dtype)

    logprobs, advantages = counted(logprobs), counted(advantages)
    log_ratio = logprobs - counted(old_logprobs)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if config.kl_coef != 0:
        if ref_logprobs is None:
            raise ValueError("actor.loss.kl_coef is not 0, so policy_loss needs ref_logprobs")
        loss = loss + config.kl_coef * kl_penalty(logprobs, counted(ref_logprobs), config.kl_estimator)
    if config.entropy_coef != 0:
        if entropy is None:
            raise ValueError("actor.loss.entropy_coef is not 0, so policy_loss needs entropy")
        loss = loss - config.entropy_coef * counted(entropy)
    return (token_weight.to(dtype) * loss).sum()
