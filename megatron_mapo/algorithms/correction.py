"""Weights for tokens that were sampled from another distribution than the one that the loss starts from.

The server samples from μ (another engine's kernels, or older weights), the loss is written for π_old, the trainer's
policy before the update. ``c_t = π_old(t) / μ(t)`` says how far they are apart. No gradient flows through a weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_mapo.algorithms.kl import MAX_LOG_RATIO
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.config import CorrectionConfig, CorrectionWeight


def corrects(config: CorrectionConfig) -> bool:
    """Whether any correction is on."""
    bounds = (config.mask_low, config.mask_high, config.reject_low, config.reject_high)
    return config.weight is not CorrectionWeight.none or any(bound is not None for bound in bounds)


def correction_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    counts: Tensor,
    config: CorrectionConfig,
    sequences: TokenSequences | None,
) -> Tensor:
    """Weight of each token's policy-gradient term.

    * ``weight=token``: min(c_t, ``weight_max``). Truncated importance sampling (F. Yao et al., "Your efficient RL
      framework secretly brings you off-policy RL training", 2025). With the old log-probs recomputed it is the
      decoupled objective of AReaL, arXiv 2505.24298, eq. 5: μ behaves, π_old is proximal.
    * ``weight=sequence``: min(Π c over the response, ``weight_max``), the ratio of the whole responses. Importance
      sampling of trajectories (D. Precup et al., "Eligibility traces for off-policy policy evaluation", 2000),
      truncated as by J. Liu et al. below.
    * ``mask_low``, ``mask_high``: 0 where c_t is outside. With ``weight=token`` and no ``weight_max`` this is IcePop
      (Ring-1T, arXiv 2510.18855, eq. 3).
    * ``reject_low``, ``reject_high``: 0 in a whole response whose geometric mean of c_t is outside (J. Liu et al.,
      "When speed kills stability", 2025).

    Tokens that are left out still count in the averages of the loss.

    Args:
        old_logprobs: ``[T]``, under π_old (nat).
        rollout_logprobs: ``[T]``, under μ.
        counts: bool ``[T]``, tokens of weight other than 0; the others may hold anything.
        config: section ``actor.correction``.
        sequences: which sequence each token is of.

    Returns:
        ``[T]``, 1 everywhere when no correction is on.

    Raises:
        ValueError: a weight or bound is about sequences, and ``sequences`` is missing.
    """
    highest = math.inf if config.weight_max is None else config.weight_max
    gap = torch.where(counts, old_logprobs.detach() - rollout_logprobs, 0.0)
    ratio = _exp(gap)
    weight = torch.ones_like(ratio)
    if config.weight is CorrectionWeight.token:
        weight = ratio.clamp(max=highest)
    elif config.weight is CorrectionWeight.sequence:
        weight = _exp(_known(sequences).sum(gap, counts)).clamp(max=highest)
    weight = weight * _inside(ratio, config.mask_low, config.mask_high)
    if config.reject_low is not None or config.reject_high is not None:
        weight = weight * _inside(_exp(_known(sequences).mean(gap, counts)), config.reject_low, config.reject_high)
    return weight


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _inside(ratio: Tensor, low: float | None, high: float | None) -> Tensor:
    inside = torch.ones_like(ratio, dtype=torch.bool)
    if low is not None:
        inside &= ratio >= low
    if high is not None:
        inside &= ratio <= high
    return inside


def _known(sequences: TokenSequences | None) -> TokenSequences:
    if sequences is None:
        raise ValueError("a correction by sequence needs to know which sequence each token is of")
    return sequences
