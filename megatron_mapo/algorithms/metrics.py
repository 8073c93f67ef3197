"""Numbers to log about a batch of rollouts and about an update. Flat names, Python floats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_mapo.algorithms.advantages import group_statistics
from megatron_mapo.algorithms.correction import correction_weights
from megatron_mapo.algorithms.kl import MAX_LOG_RATIO, kl_penalty
from megatron_mapo.algorithms.objectives import TokenTerms, clipped_tokens, dual_clipped_tokens
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.config import AdvNormConfig, CorrectionConfig, KLEstimator, LossConfig
from megatron_mapo.data.sequences import REWARD_PART, RIGHT, SequenceBatch

HISTOGRAM_BINS = 9
"""Equal bins over [0, 1], the last one closed. With groups of 8 each possible success rate k/8 has its own bin."""


def rollout_metrics(
    batch: SequenceBatch, advantages: Tensor, adv_config: AdvNormConfig, current_version: int
) -> dict[str, float]:
    """What was sampled.

    Args:
        batch: N sequences in K groups.
        advantages: float32 ``[N]``.
        adv_config: section ``actor.adv_norm``; says what a success is (see ``group_statistics``).
        current_version: version of the trainer's weights.

    Returns:
        * ``reward/``: ``mean``, ``std`` (population), ``min``, ``max`` over sequences; ``accuracy``, the mean over
          groups of the success rate p; ``reward/LABEL/mean`` of every verifier of a mixture.
        * ``group/``: ``count``; ``zero_advantage``, share of groups that give no gradient; ``p_hist_00`` ...
          ``p_hist_08`` and ``lambda_hist_00`` ..., share of groups in each of ``HISTOGRAM_BINS`` bins of p and λ.
        * ``advantage/``: ``abs_mean``, ``min``, ``max``.
        * ``response/``: ``length_mean``, ``length_min``, ``length_max`` (tokens), ``truncated`` (share).
        * ``prompt/length_mean`` (tokens).
        * ``staleness/mean``, ``staleness/max``: versions that the weights of a response token are behind.
        * ``weights/version``.

    Raises:
        DataError: the batch is empty.
    """
    groups = group_statistics(batch.rewards, batch.group_ids, adv_config, batch.extra.get(RIGHT))
    index = torch.searchsorted(groups.ids, batch.group_ids)
    active = torch.zeros(len(groups.ids), dtype=torch.bool).index_fill_(0, index[advantages != 0], True)
    rewards, lengths = batch.rewards.double(), batch.response_lens.double()
    behind = (current_version - batch.weight_versions).double()
    return {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std(correction=0)),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "reward/accuracy": _mean(groups.p),
        **{f"{name}/mean": _mean(part) for name, part in batch.extra.items() if name.startswith(REWARD_PART)},
        "group/count": float(len(groups.ids)),
        "group/zero_advantage": 1 - _mean(active),
        **_histogram("group/p_hist", groups.p),
        **_histogram("group/lambda_hist", groups.lam),
        "advantage/abs_mean": _mean(advantages.abs()),
        "advantage/min": float(advantages.min()),
        "advantage/max": float(advantages.max()),
        "response/length_mean": _mean(lengths),
        "response/length_min": float(lengths.min()),
        "response/length_max": float(lengths.max()),
        "response/truncated": _mean(batch.truncated),
        "prompt/length_mean": _mean(batch.prompt_lens),
        "staleness/mean": _mean(behind),
        "staleness/max": _max(behind),
        "weights/version": float(current_version),
    }


def mismatch_metrics(logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, float]:
    """How far trainer and server are apart on the same weights, over R response tokens.

    Args:
        logprobs: ``[R]``, under the trainer's policy before it was updated (nat).
        rollout_logprobs: ``[R]``, as the server sampled them.

    Returns:
        * ``mismatch/abs_mean``, ``abs_p99`` (nearest rank), ``abs_max``: |server − trainer| log-prob.
        * ``mismatch/kl``, ``mismatch/kl_k1``: the k3 and k1 estimates of KL(server || trainer).
        * ``mismatch/tokens``: R. All are 0 when it is 0.
    """
    trainer, server = logprobs.detach().double(), rollout_logprobs.double()
    gap = (server - trainer).abs()
    return {
        "mismatch/abs_mean": _mean(gap),
        "mismatch/abs_p99": _percentile(gap, 0.99),
        "mismatch/abs_max": _max(gap),
        "mismatch/kl": _mean(kl_penalty(server, trainer, KLEstimator.k3)),
        "mismatch/kl_k1": _mean(kl_penalty(server, trainer, KLEstimator.k1)),
        "mismatch/tokens": float(len(gap)),
    }


def update_metrics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    config: LossConfig,
    ref_logprobs: Tensor | None = None,
    sequences: TokenSequences | None = None,
) -> dict[str, float]:
    """What an update did, over R response tokens.

    Args:
        logprobs: ``[R]``, under the policy as the update saw it (nat).
        old_logprobs: ``[R]``, that the ratio is relative to.
        advantages: ``[R]``, of each token's sequence.
        entropy: ``[R]``, of the policy's distribution (nat).
        config: section ``actor.loss``.
        ref_logprobs: ``[R]``, under the reference, where there is one.
        sequences: which sequence each token is of; ``objective=gspo`` needs it.

    Returns:
        * ``loss/clip_fraction_low``, ``_high``: share of tokens that the lower, the upper bound acts on (see
          ``objectives.clipped_tokens``); ``loss/clip_fraction``: their sum. ``loss/clip_fraction_dual``: share of
          tokens that ``dual_clip`` acts on, which are in none of these; only with it.
        * ``loss/kl_old``: k3 estimate of KL(old || policy). ``loss/kl_ref``: KL(policy || reference) by
          ``kl_estimator``; only with ``ref_logprobs``.
        * ``loss/entropy``, ``loss/ratio_mean``, ``loss/ratio_max``.

        All are 0 when R is 0.
    """
    logprobs, old = logprobs.detach().double(), old_logprobs.double()
    ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    counts = torch.ones_like(logprobs, dtype=torch.bool)
    terms = TokenTerms(logprobs, logprobs - old, advantages, counts, sequences)
    below, above = clipped_tokens(terms, config)
    low, high = _mean(below), _mean(above)
    metrics = {
        "loss/clip_fraction": low + high,
        "loss/clip_fraction_low": low,
        "loss/clip_fraction_high": high,
        "loss/kl_old": _mean(kl_penalty(old, logprobs, KLEstimator.k3)),
        "loss/entropy": _mean(entropy.detach()),
        "loss/ratio_mean": _mean(ratio),
        "loss/ratio_max": _max(ratio),
    }
    if config.dual_clip is not None:
        metrics["loss/clip_fraction_dual"] = _mean(dual_clipped_tokens(terms, config.dual_clip))
    if ref_logprobs is not None:
        metrics["loss/kl_ref"] = _mean(kl_penalty(logprobs, ref_logprobs.double(), config.kl_estimator, old))
    return metrics


def correction_metrics(
    old_logprobs: Tensor, rollout_logprobs: Tensor, config: CorrectionConfig, sequences: TokenSequences
) -> dict[str, float]:
    """How much ``actor.correction`` changes, over R response tokens.

    Args:
        old_logprobs: ``[R]``, that the loss starts from (nat).
        rollout_logprobs: ``[R]``, as the server sampled them.
        config: section ``actor.correction``.
        sequences: which sequence each token is of.

    Returns:
        ``correction/weight_mean``, ``correction/weight_max``, and ``correction/left_out``, the share of tokens of
        weight 0. All are 0 when R is 0.
    """
    counts = torch.ones_like(old_logprobs, dtype=torch.bool)
    weights = correction_weights(old_logprobs.double(), rollout_logprobs.double(), counts, config, sequences)
    return {
        "correction/weight_mean": _mean(weights),
        "correction/weight_max": _max(weights),
        "correction/left_out": _mean(weights == 0),
    }


def success_bins(p: Tensor) -> Tensor:
    """The bin of ``HISTOGRAM_BINS`` that each success rate (or λ) in [0, 1] is in, int64."""
    return (p * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


def _max(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def _percentile(values: Tensor, share: float) -> float:
    """Nearest-rank percentile. ``torch.quantile`` refuses more than 16 million values; selection does not."""
    if not len(values):
        return 0.0
    return float(values.kthvalue(max(1, math.ceil(share * len(values)))).values)


def _histogram(name: str, values: Tensor) -> dict[str, float]:
    """Share of ``values`` in [0, 1] in each bin."""
    shares = torch.bincount(success_bins(values), minlength=HISTOGRAM_BINS) / len(values)
    return {f"{name}_{i:02d}": share for i, share in enumerate(shares.tolist())}
