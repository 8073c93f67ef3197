"""Advantages within a group of responses to one prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mapo.config import AdvNormConfig, AggregationMode, Std
from megatron_mapo.errors import ConfigError, DataError, RewardError

_THRESHOLD_KEY = "actor.adv_norm.success_threshold"
_MODE_KEY = "actor.adv_norm.aggregation_mode"


@dataclass(frozen=True)
class GroupStatistics:
    """K groups, ordered by id.

    Attributes:
        ids: int64 ``[K]``, the group ids.
        sizes: int64 ``[K]``, responses in each group.
        p: float64 ``[K]``, share of successes (see ``group_statistics``).
        lam: float64 ``[K]``, ``1 - 4p(1-p)``, MAPO's weight of the mean-relative term.
        varied: bool ``[K]``, the group's rewards are not all equal.
    """

    ids: Tensor
    sizes: Tensor
    p: Tensor
    lam: Tensor
    varied: Tensor


@dataclass(frozen=True)
class _Groups:
    """Rewards in float64, and what every estimator needs of their groups (K groups, N responses)."""

    rewards: Tensor  # [N]
    ids: Tensor  # [K]
    index: Tensor  # [N], the group's place in ids
    order: Tensor  # [N], responses sorted by group, then reward
    sizes: Tensor  # [K]
    low: Tensor  # [K]
    high: Tensor  # [K]

    @property
    def varied(self) -> Tensor:
        return self.high > self.low

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` float64 ``[N]`` in every group, ``[K]``.

        Summed in the order of the rewards, so that the order of the responses does not change a bit of it.
        """
        total = torch.zeros(len(self.ids), dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.index[self.order], values[self.order]) / self.sizes


def estimate_advantages(rewards: Tensor, group_ids: Tensor, config: AdvNormConfig) -> Tensor:
    """Advantage of every response relative to its group.

    With a group's size G, rewards r, mean μ, standard deviation σ, success rate p, λ = 1 − 4p(1−p):

    ===========  ===================================================  =======================================
    mode         advantage                                            source
    ===========  ===================================================  =======================================
    native       (r−μ)/(σ+ε)                                          GRPO, arXiv 2402.03300, section 4.1.2
    mix          (1−λ)·(r−μ)/(σ+ε) + λ·(r−μ)/μ                        MAPO, arXiv 2509.18849, eq. 6
    mean_only    (r−μ)/μ                                              MAPO's APD; MaxRL, arXiv 2602.02710
    center       r−μ                                                  Dr. GRPO, arXiv 2503.20783
    rloo         r − mean of the others = (r−μ)·G/(G−1)               arXiv 2402.14740
    gpg          (r−μ)·B/(B−M): B groups, M of them all-equal         GPG, arXiv 2504.02546, eq. 7, F_norm = 1
    treerpo      (r−μ)/(μ(1−μ))                                       TreeRPO, arXiv 2506.05183
    ===========  ===================================================  =======================================

    ``mix``, ``mean_only`` and ``treerpo`` divide by the mean, which has a meaning only for rewards in {0, 1}:
    a group's two values, whatever they are, are first mapped to {0, 1} (the higher is success), so μ = p.
    With ``success_threshold`` the rewards are used as they are, and p is the share of ``r >= threshold``.

    A group whose rewards are all equal, hence a group of one, gets exactly 0. Groups are found by id: their
    sizes, ids and order are free, and an advantage depends on its own group only (``gpg`` also on B and M).

    Args:
        rewards: floating point or integer ``[N]``.
        group_ids: integer ``[N]``, equal for the responses to one prompt.
        config: section ``actor.adv_norm``.

    Returns:
        float32 ``[N]``, on the device of ``rewards``; computed in float64.

    Raises:
        DataError: the shapes do not fit, or there is no response.
        RewardError: a reward is not finite.
        ConfigError: the rewards do not suit the mode (the message names the key to change).
    """
    groups = _group(rewards, group_ids)
    advantages = _ESTIMATORS[config.aggregation_mode](groups, config)
    return torch.where(groups.varied[groups.index], advantages, 0.0).to(torch.float32)


def group_statistics(rewards: Tensor, group_ids: Tensor, config: AdvNormConfig) -> GroupStatistics:
    """Size, success rate p and λ of every group, for metrics; defined in every mode.

    Success is ``r >= success_threshold`` where that is set. Otherwise it is a reward in the upper half of its
    group's range; for an all-equal group in the upper half of the batch's range; and if the whole batch has one
    value, a positive one.

    Args:
        rewards: floating point or integer ``[N]``.
        group_ids: integer ``[N]``.
        config: section ``actor.adv_norm``.

    Raises:
        DataError, RewardError: as ``estimate_advantages``.
    """
    groups = _group(rewards, group_ids)
    p = groups.mean(_success(groups, config).double())
    return GroupStatistics(groups.ids, groups.sizes, p, _lambda(p), groups.varied)


def _group(rewards: Tensor, group_ids: Tensor) -> _Groups:
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise DataError(
            f"rewards and group_ids must be flat and of one length, got {tuple(rewards.shape)} "
            f"and {tuple(group_ids.shape)}"
        )
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise DataError(f"group_ids must be integers, got {group_ids.dtype}")
    if len(rewards) == 0:
        raise DataError("no rewards: the batch has no responses")
    values = rewards.double()
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        raise RewardError(
            f"{len(bad)} of {len(values)} rewards are not finite, the first is {float(values[first])} of response "
            f"{first} in group {int(group_ids[first])}: the verifier of `reward.name` must return finite numbers"
        )
    ids, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    by_reward = values.argsort(stable=True)
    order = by_reward[index[by_reward].argsort(stable=True)]
    empty = values.new_zeros(len(ids))
    low = empty.scatter_reduce(0, index, values, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, values, "amax", include_self=False)
    return _Groups(values, ids, index, order, sizes, low, high)


def _success(groups: _Groups, config: AdvNormConfig) -> Tensor:
    """bool ``[N]``, as ``group_statistics`` says."""
    rewards = groups.rewards
    if config.success_threshold is not None:
        return rewards >= config.success_threshold
    varied = groups.varied[groups.index]
    low = torch.where(varied, groups.low[groups.index], rewards.min())
    high = torch.where(varied, groups.high[groups.index], rewards.max())
    # Compared as distances: the midpoint of two neighbouring floats would round to one of them.
    return torch.where(high > low, high - rewards < rewards - low, rewards > 0)


def _lambda(p: Tensor) -> Tensor:
    return 1 - 4 * p * (1 - p)


def _safe(divisor: Tensor, groups: _Groups) -> Tensor:
    """The divisor of each response ``[N]``, 1 in all-equal groups, whose advantage is 0 anyway."""
    return torch.where(groups.varied, divisor, 1.0)[groups.index]


def _std(rewards: Tensor, mean: Tensor, groups: _Groups, config: AdvNormConfig) -> Tensor:
    variance = groups.mean((rewards - mean[groups.index]).square())
    if config.std is Std.unbiased:
        variance = variance * groups.sizes / (groups.sizes - 1).clamp(min=1)
    return variance.sqrt()


def _relative_rewards(groups: _Groups, config: AdvNormConfig) -> Tensor:
    """Rewards ``[N]`` that may be divided by their mean: in {0, 1}, or as they are above a threshold."""
    if config.success_threshold is None:
        _check_two_values(groups, config)
        return _success(groups, config).double()
    return groups.rewards


def _check_two_values(groups: _Groups, config: AdvNormConfig) -> None:
    between = (groups.rewards != groups.low[groups.index]) & (groups.rewards != groups.high[groups.index])
    if not bool(between.any()):
        return
    group = groups.index[between.nonzero().flatten()[0]]
    values = groups.rewards[groups.index == group].unique().tolist()
    raise ConfigError(
        f"{_MODE_KEY}={config.aggregation_mode.value} needs right-or-wrong rewards, but group "
        f"{int(groups.ids[group])} has {len(values)} different ones ({', '.join(f'{v:g}' for v in values[:5])}"
        f"{', ...' if len(values) > 5 else ''}): set {_THRESHOLD_KEY} to the lowest reward that is a success, or "
        f"choose another {_MODE_KEY}"
    )


def _positive_mean(rewards: Tensor, groups: _Groups, config: AdvNormConfig) -> Tensor:
    """Mean ``[K]`` of every group; an error where it cannot be divided by."""
    mean = groups.mean(rewards)
    bad = (groups.varied & (mean <= 0)).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        raise ConfigError(
            f"{_MODE_KEY}={config.aggregation_mode.value} divides by a group's mean reward, but that of group "
            f"{int(groups.ids[first])} is {float(mean[first]):g}: with {_THRESHOLD_KEY} rewards must be positive on "
            f"average; raise `reward.correct` and `reward.wrong`, or unset {_THRESHOLD_KEY} if rewards are binary"
        )
    return mean


def _native(groups: _Groups, config: AdvNormConfig) -> Tensor:
    return _z_score(groups.rewards, groups.mean(groups.rewards), groups, config)


def _z_score(rewards: Tensor, mean: Tensor, groups: _Groups, config: AdvNormConfig) -> Tensor:
    std = _std(rewards, mean, groups, config) + config.eps
    return (rewards - mean[groups.index]) / _safe(std, groups)


def _mix(groups: _Groups, config: AdvNormConfig) -> Tensor:
    rewards = _relative_rewards(groups, config)
    mean = _positive_mean(rewards, groups, config)
    lam = _lambda(groups.mean(_success(groups, config).double()))[groups.index]
    relative = (rewards - mean[groups.index]) / _safe(mean, groups)
    return (1 - lam) * _z_score(rewards, mean, groups, config) + lam * relative


def _mean_only(groups: _Groups, config: AdvNormConfig) -> Tensor:
    rewards = _relative_rewards(groups, config)
    mean = _positive_mean(rewards, groups, config)
    return (rewards - mean[groups.index]) / _safe(mean, groups)


def _center(groups: _Groups, config: AdvNormConfig) -> Tensor:
    return groups.rewards - groups.mean(groups.rewards)[groups.index]


def _rloo(groups: _Groups, config: AdvNormConfig) -> Tensor:
    scale = groups.sizes / (groups.sizes - 1).clamp(min=1)
    return _center(groups, config) * scale[groups.index]


def _gpg(groups: _Groups, config: AdvNormConfig) -> Tensor:
    return _center(groups, config) * (len(groups.ids) / groups.varied.sum().clamp(min=1))


def _treerpo(groups: _Groups, config: AdvNormConfig) -> Tensor:
    rewards = _relative_rewards(groups, config)
    outside = (rewards < 0) | (rewards > 1)
    if bool(outside.any()):
        first = int(outside.nonzero().flatten()[0])
        raise ConfigError(
            f"{_MODE_KEY}=treerpo with {_THRESHOLD_KEY} needs rewards from 0 to 1, but group "
            f"{int(groups.ids[groups.index[first]])} has {float(rewards[first]):g}: unset {_THRESHOLD_KEY} or rescale "
            "the rewards"
        )
    mean = groups.mean(rewards)
    return (rewards - mean[groups.index]) / _safe(mean * (1 - mean), groups)


_ESTIMATORS: dict[AggregationMode, Callable[[_Groups, AdvNormConfig], Tensor]] = {
    AggregationMode.native: _native,
    AggregationMode.mix: _mix,
    AggregationMode.mean_only: _mean_only,
    AggregationMode.center: _center,
    AggregationMode.rloo: _rloo,
    AggregationMode.gpg: _gpg,
    AggregationMode.treerpo: _treerpo,
}
