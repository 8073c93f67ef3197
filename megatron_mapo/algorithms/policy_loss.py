"""Policy-gradient loss on flat ``[T]`` tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mapo.algorithms.correction import correction_weights, corrects
from megatron_mapo.algorithms.kl import kl_penalty
from megatron_mapo.algorithms.objectives import TokenTerms, policy_gain
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.config import CorrectionConfig, CorrectionWeight, KLPlacement, LossConfig, Objective


@dataclass(frozen=True)
class LossInputs:
    """What the loss needs to know of T tokens besides the policy's own log-probs.

    Attributes:
        old_logprobs: ``[T]``, under the policy that the ratio is relative to (nat).
        advantages: ``[T]``.
        token_weight: ``[T]``.
        ref_logprobs: ``[T]``, under the reference; needed when there is a KL term.
        rollout_logprobs: ``[T]``, as the server sampled them; needed when ``actor.correction`` is on.
        sequences: which sequence each token is of; needed by what looks at whole sequences.
    """

    old_logprobs: Tensor
    advantages: Tensor
    token_weight: Tensor
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    sequences: TokenSequences | None = None


def needs_sequences(config: LossConfig, correction: CorrectionConfig) -> bool:
    """Whether the loss looks at whole sequences, not at tokens alone."""
    by_sequence = correction.weight is CorrectionWeight.sequence
    rejects = correction.reject_low is not None or correction.reject_high is not None
    return config.objective in (Objective.gspo, Objective.gmpo) or by_sequence or rejects


def policy_loss(
    logprobs: Tensor,
    inputs: LossInputs,
    config: LossConfig,
    correction: CorrectionConfig,
    entropy: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of ``w_t · l_t``, with

    ``l = −c·gain + kl_coef·KL − entropy_coef·H``,

    the gain that of ``objectives`` (PPO's clipped surrogate and its relatives), and c the weight of ``correction``.

    The aggregation is in ``token_weight`` alone, which is made of global counts: the sum over all microbatches
    and ranks is the loss of the batch, however it was cut. Tokens of weight 0 (prompts, padding) may hold
    anything, NaN included; they add neither value nor gradient.

    Sources: of the KL term GRPO, arXiv 2402.03300, eq. 3, and of the importance-weighted one see ``kl_penalty``; of the
    entropy bonus A3C, arXiv 1602.01783, section 4, and PPO, arXiv 1707.06347, eq. 9.

    Args:
        logprobs: ``[T]``, log-probs of the label tokens under the policy in training (nat).
        inputs: what else is known of the tokens.
        config: section ``actor.loss``.
        correction: section ``actor.correction``.
        entropy: ``[T]``, of the policy's distribution (nat); needed when ``entropy_coef`` is not 0.

    Returns:
        Scalar, in float32 or the wider type of the inputs. Log-ratios are cut at ±``MAX_LOG_RATIO``.

    Raises:
        ValueError: an input is needed and missing.
    """
    counts = inputs.token_weight != 0
    dtype = torch.promote_types(torch.promote_types(logprobs.dtype, inputs.token_weight.dtype), torch.float32)

    def counted(values: Tensor) -> Tensor:
        # Selecting before any arithmetic keeps NaN and inf out of the backward pass too, where 0·inf is NaN.
        return torch.where(counts, values, 0.0).to(dtype)

    logprobs, advantages = counted(logprobs), counted(inputs.advantages)
    old = counted(inputs.old_logprobs)
    loss = -policy_gain(TokenTerms(logprobs, logprobs - old, advantages, counts, inputs.sequences), config)
    if corrects(correction):
        if inputs.rollout_logprobs is None:
            raise ValueError("actor.correction is on, so policy_loss needs rollout_logprobs")
        loss = loss * correction_weights(old, counted(inputs.rollout_logprobs), counts, correction, inputs.sequences)
    if config.kl_coef != 0 and config.kl_in is KLPlacement.loss:
        if inputs.ref_logprobs is None:
            raise ValueError("actor.loss.kl_coef is not 0, so policy_loss needs ref_logprobs")
        loss = loss + config.kl_coef * kl_penalty(logprobs, counted(inputs.ref_logprobs), config.kl_estimator, old)
    if config.entropy_coef != 0:
        if entropy is None:
            raise ValueError("actor.loss.entropy_coef is not 0, so policy_loss needs entropy")
        loss = loss - config.entropy_coef * counted(entropy)
    return (inputs.token_weight.to(dtype) * loss).sum()
