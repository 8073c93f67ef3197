"""What a policy-gradient step raises: the clipped surrogate and its relatives, on flat ``[T]`` tokens.

Each function gives a gain per token; the loss is ``−Σ w_t · gain_t``. With ``ρ = exp(log π − log π_old)``, advantage A,
bounds ε₋ (``clip_low``) and ε₊ (``clip_high``), and ⟦x⟧ a value through which no gradient flows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mapo.algorithms.kl import MAX_LOG_RATIO
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.config import LossConfig, Objective


@dataclass(frozen=True)
class TokenTerms:
    """What an objective sees of T tokens.

    Attributes:
        logprobs: ``[T]``, under the policy in training (nat); carries the gradient.
        log_ratio: ``[T]``, log ρ; carries the gradient.
        advantages: ``[T]``.
        counts: bool ``[T]``, tokens of weight other than 0; the others are 0 everywhere.
        sequences: which sequence each is of; None where the objective looks at single tokens.
    """

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    counts: Tensor
    sequences: TokenSequences | None


def policy_gain(terms: TokenTerms, config: LossConfig) -> Tensor:
    """Gain per token of the objective that ``config.objective`` names.

    Returns:
        ``[T]``.

    Raises:
        ValueError: the objective needs ``terms.sequences`` and there is none.
    """
    return _GAINS[config.objective](terms, config)


def clipped_tokens(terms: TokenTerms, config: LossConfig) -> tuple[Tensor, Tensor]:
    """bool ``[T]`` each: tokens that the lower, that the upper bound acts on.

    For ``ppo`` and ``gspo`` they give no gradient; for ``gmpo`` their own ratio stays at the bound; for ``cispo``
    their weight does. ``sapo`` has no bounds.
    """
    if config.objective is Objective.sapo:
        return torch.zeros_like(terms.counts), torch.zeros_like(terms.counts)
    log_ratio = _sequence_log_ratio(terms) if config.objective is Objective.gspo else terms.log_ratio
    if config.objective is Objective.gmpo:
        below, above = log_ratio < -config.clip_low, log_ratio > config.clip_high
    else:
        ratio = _ratio(log_ratio)
        below, above = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
    if config.objective is Objective.cispo:
        return below, above
    return below & (terms.advantages < 0), above & (terms.advantages > 0)


def dual_clipped_tokens(terms: TokenTerms, bound: float) -> Tensor:
    """bool ``[T]``: tokens whose loss ``dual_clip`` bounds; they give no gradient."""
    return (terms.advantages < 0) & (_ratio(terms.log_ratio) > bound)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def _ppo(terms: TokenTerms, config: LossConfig) -> Tensor:
    """min(ρA, clip(ρ, 1−ε₋, 1+ε₊)A): PPO, arXiv 1707.06347, eq. 7; two bounds: DAPO, arXiv 2503.14476, eq. 8.

    With ``dual_clip`` c and A < 0 it is max(min(...), cA): dual-clip PPO, arXiv 1912.09729, eq. 5.
    """
    gain = _clipped_surrogate(_ratio(terms.log_ratio), terms.advantages, config)
    if config.dual_clip is None:
        return gain
    return torch.where(terms.advantages < 0, torch.maximum(gain, config.dual_clip * terms.advantages), gain)


def _cispo(terms: TokenTerms, config: LossConfig) -> Tensor:
    """⟦clip(ρ, 1−ε₋, 1+ε₊)⟧ A log π: MiniMax-M1, arXiv 2506.13585, eqs. 4 and 5. Every token keeps a gradient."""
    weight = _ratio(terms.log_ratio.detach()).clamp(1 - config.clip_low, 1 + config.clip_high)
    return weight * terms.advantages * terms.logprobs


def _gspo(terms: TokenTerms, config: LossConfig) -> Tensor:
    """The clipped surrogate with s = exp(mean over the sequence of log ρ) in the place of ρ: GSPO, arXiv 2507.18071.

    Written per token as ⟦s⟧ π/⟦π⟧ (its eq. 14): where all tokens of a sequence have one advantage, value and gradient
    are those of eq. 5, and the sum over the sequence needs no gradient.
    """
    own = terms.logprobs - terms.logprobs.detach()
    return _clipped_surrogate(_ratio(_sequence_log_ratio(terms) + own), terms.advantages, config)


def _gmpo(terms: TokenTerms, config: LossConfig) -> Tensor:
    """A · exp(mean over the sequence of c), c = log ρ clipped to [−ε₋, ε₊] on the side where it would raise the
    objective: GMPO, arXiv 2507.20673, eq. 4. Bounds are in nat here (the paper: 0.4 and 0.4).

    Written per token as A⟦g⟧(1 + c − ⟦c⟧), whose mean over the sequence has the value A·g and its gradient.
    """
    below, above = terms.log_ratio.clamp(min=-config.clip_low), terms.log_ratio.clamp(max=config.clip_high)
    clipped = torch.where(terms.advantages < 0, below, above)
    mean = _sequences(terms).mean(clipped, terms.counts)
    return terms.advantages * _ratio(mean) * (1 + clipped - clipped.detach())


def _sapo(terms: TokenTerms, config: LossConfig) -> Tensor:
    """σ(τ(ρ − 1)) · 4/τ · A with τ by the advantage's sign: SAPO, arXiv 2511.20347, eqs. 5 and 6. A soft gate in the
    place of the bounds; at ρ = 1 its slope is that of the plain surrogate."""
    tau = torch.full_like(terms.advantages, config.sapo_tau_negative)
    tau = tau.masked_fill(terms.advantages > 0, config.sapo_tau)
    return torch.sigmoid(tau * (_ratio(terms.log_ratio) - 1)) * (4 / tau) * terms.advantages


def _sequence_log_ratio(terms: TokenTerms) -> Tensor:
    return _sequences(terms).mean(terms.log_ratio, terms.counts)


def _sequences(terms: TokenTerms) -> TokenSequences:
    if terms.sequences is None:
        raise ValueError("an objective over sequences needs to know which sequence each token is of")
    return terms.sequences


_GAINS: dict[Objective, Callable[[TokenTerms, LossConfig], Tensor]] = {
    Objective.ppo: _ppo,
    Objective.cispo: _cispo,
    Objective.gspo: _gspo,
    Objective.gmpo: _gmpo,
    Objective.sapo: _sapo,
}
