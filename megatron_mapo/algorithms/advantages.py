"""Advantages within a group of responses to one prompt."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mapo.config import RIGHT_OR_WRONG_MODES, AdvNormConfig, Std
from megatron_mapo.errors import ConfigError, DataError, RewardError
from megatron_mapo.import_path import import_function, is_import_path

_THRESHOLD_KEY = "actor.adv_norm.success_threshold"
_MODE_KEY = "actor.adv_norm.aggregation_mode"
BLOCK = 1 << 17
"""Responses that are worked on at a time, where groups do not depend on each other."""


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
class Groups:
    """N responses in K groups: what an estimator sees.

    The responses of a group stand together, the groups in the order of their ids. What belongs to a group is
    ``[K]``, what belongs to a response ``[N]``; ``per_response`` goes from the first to the second, and ``combine``
    computes with both.

    Every statistic is the same to the last bit in whatever order the responses came, and whatever other groups
    there are: for a group of two different rewards it follows from counts, for others the sums run over the
    sorted rewards.

    Attributes:
        rewards: float64 ``[N]``.
        success: bool ``[N]``, which responses are successes, where that is known.
        threshold: the lowest reward of a success, where it is not.
        ids: int64 ``[K]``, ascending.
        index: int64 ``[N]``, the place in ``ids`` of each response's group.
        sizes: int64 ``[K]``.
        low, high: float64 ``[K]``, the group's extreme rewards.
        uniform: the size that all groups have, or None.
    """

    rewards: Tensor
    success: Tensor | None
    threshold: float | None
    ids: Tensor
    index: Tensor
    sizes: Tensor
    low: Tensor
    high: Tensor
    uniform: int | None

    @property
    def varied(self) -> Tensor:
        """bool ``[K]``: the group's rewards are not all equal."""
        return self.high > self.low

    def per_response(self, statistic: Tensor) -> Tensor:
        """A group's statistic ``[K]`` at each of its responses, ``[N]``."""
        if self.uniform is not None:
            return statistic.unsqueeze(1).expand(-1, self.uniform).reshape(-1)
        return statistic.index_select(0, self.index)

    def combine(self, operation: Callable[[Tensor, Tensor], Tensor], values: Tensor, statistic: Tensor) -> Tensor:
        """``operation(values, per_response(statistic))``, ``[N]``; groups of one size need no copy of the statistic."""
        if self.uniform is not None:
            return operation(values.view(-1, self.uniform), statistic.unsqueeze(1)).view(-1)
        return operation(values, self.per_response(statistic))

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the groups, ``[K]``, of ``values`` ``[N]``."""
        if self.uniform is not None:
            return values.view(-1, self.uniform).sum(1)
        return torch.zeros(len(self.ids), dtype=values.dtype, device=values.device).index_add_(0, self.index, values)

    def divide(self, values: Tensor, divisor: Tensor) -> Tensor:
        """``values`` ``[N]`` over the group's ``divisor`` ``[K]``; 0 in all-equal groups, whatever the divisor."""
        return self.scale(values, 1 / divisor)

    def scale(self, values: Tensor, factor: Tensor) -> Tensor:
        """``values`` ``[N]`` times the group's ``factor`` ``[K]``; 0 in all-equal groups, whatever the factor."""
        return self.combine(torch.mul, values, torch.where(self.varied, factor, 0.0))

    @functools.cached_property
    def succeeded(self) -> Tensor:
        """bool ``[N]``: which responses are successes (see ``group_statistics``)."""
        return _success(self) if self.success is None else self.success

    @functools.cached_property
    def p(self) -> Tensor:
        """float64 ``[K]``: share of successes."""
        return self.sum(self.succeeded.double()) / self.sizes

    @functools.cached_property
    def mean(self) -> Tensor:
        """float64 ``[K]``: mean reward."""
        of_two = self.low + self._high_share * (self.high - self.low)
        return of_two if self.all_two_valued else torch.where(self.two_valued, of_two, self._summed_mean)

    @functools.cached_property
    def variance(self) -> Tensor:
        """float64 ``[K]``: population variance of the rewards."""
        of_two = self._high_share * (1 - self._high_share) * (self.high - self.low).square()
        if self.all_two_valued:
            return of_two
        summed = self.sum(self.combine(torch.sub, self.rewards, self._summed_mean).square()) / self.sizes
        return torch.where(self.two_valued, of_two, summed)

    def std(self, config: AdvNormConfig) -> Tensor:
        """float64 ``[K]``: standard deviation as ``actor.adv_norm.std`` says, without ``eps``."""
        if config.std is Std.population:
            return self.variance.sqrt()
        return (self.variance * self.sizes / (self.sizes - 1).clamp(min=1)).sqrt()

    @functools.cached_property
    def batch_mean(self) -> Tensor:
        """Mean reward of all responses, a scalar."""
        return (self.mean * self.sizes).sum() / len(self.rewards)

    def batch_std(self, config: AdvNormConfig, within: bool = False) -> Tensor:
        """Standard deviation of all rewards, a scalar; ``within``: of their distances to their group's mean."""
        between = 0.0 if within else (self.mean - self.batch_mean).square()
        variance = ((self.variance + between) * self.sizes).sum() / len(self.rewards)
        n = len(self.rewards)
        return (variance * n / max(n - 1, 1) if config.std is Std.unbiased else variance).sqrt()

    @functools.cached_property
    def centred(self) -> Tensor:
        """float64 ``[N]``: distance of each reward to its group's mean; exactly 0 in all-equal groups."""
        return self.combine(torch.sub, self.rewards, self.mean)

    @functools.cached_property
    def highest(self) -> Tensor:
        """bool ``[N]``: no reward of the group is higher."""
        return self.combine(torch.eq, self.rewards, self.high)

    @functools.cached_property
    def two_valued(self) -> Tensor:
        """bool ``[K]``: the group has at most two different rewards: each is one of its extremes."""
        return self.sum((~self._extreme).double()) == 0

    @functools.cached_property
    def all_two_valued(self) -> bool:
        """Every group has at most two different rewards."""
        return bool(self._extreme.all())

    @functools.cached_property
    def _extreme(self) -> Tensor:
        return self.highest | self.combine(torch.eq, self.rewards, self.low)

    @functools.cached_property
    def _high_share(self) -> Tensor:
        return self.sum(self.highest.double()) / self.sizes

    @functools.cached_property
    def _summed_mean(self) -> Tensor:
        return self.sum(self.rewards) / self.sizes


Estimator = Callable[[Groups, AdvNormConfig], Tensor]
"""``estimate(groups, config)``: the advantage of each of the N responses, float64 ``[N]``, in their order there."""


def estimate_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    config: AdvNormConfig,
    success: Tensor | None = None,
    graded: bool | None = None,
) -> Tensor:
    """Advantage of every response relative to its group.

    With a group's size G, rewards r, mean μ, standard deviation σ, success rate p, λ = 1 − 4p(1−p):

    ====================  ===============================================  =======================================
    mode                  advantage                                        source
    ====================  ===============================================  =======================================
    native                (r−μ)/(σ+ε)                                      GRPO, arXiv 2402.03300, section 4.1.2
    mix                   (1−λ)·(r−μ)/(σ+ε) + λ·(r−μ)/μ                    MAPO, arXiv 2509.18849, eq. 6
    mean_only             (r−μ)/μ                                          MAPO's APD; MaxRL, arXiv 2602.02710
    center                r−μ                                              Dr. GRPO, arXiv 2503.20783
    rloo                  r − mean of the others = (r−μ)·G/(G−1)           arXiv 2402.14740
    gpg                   (r−μ)·B/(B−M): B groups, M of them all-equal     GPG, arXiv 2504.02546, eq. 7, F_norm = 1
    treerpo               (r−μ)/(μ(1−μ))                                   TreeRPO, arXiv 2506.05183
    lite_ppo              (r−μ)/(σ_B+ε), σ_B of all rewards of the batch   Lite PPO, arXiv 2508.08221
    reinforce++           (r−μ_B)/(σ_B+ε), both over the batch             REINFORCE++, arXiv 2501.03262
    reinforce++_baseline  (r−μ)/(σ_B+ε), σ_B of r−μ over the batch         the same, with a group baseline
    pass_at_k             see ``_pass_at_k``                               arXiv 2508.10751, eqs. 8 to 15
    ====================  ===============================================  =======================================

    ``mix``, ``mean_only`` and ``treerpo`` divide by the mean, and ``pass_at_k`` counts successes, which has a meaning
    only for rewards in {0, 1}: a group's two values, whatever they are, are first mapped to {0, 1} (the higher is
    success), so μ = p.
    With ``success_threshold``, or where the rewards are ``graded``, they are used as they are, and p is the share of
    successes.

    A group whose rewards are all equal, hence a group of one, gets exactly 0 (but for ``reinforce++``, whose
    baseline is the batch's). Groups are found by id: their sizes, ids and order are free, and an advantage
    depends on its own group only, but for the modes that name the batch.

    Args:
        rewards: floating point or integer ``[N]``.
        group_ids: integer ``[N]``, equal for the responses to one prompt.
        config: section ``actor.adv_norm``.
        success: bool ``[N]``, which responses are successes, where that is known: what ``Groups.p`` counts. Modes that
            map a group's two values to {0, 1} go by these values.
        graded: a success does not follow from the rewards, as in a mixture whose verifier says what one is. Unset: if
            ``success`` is given.

    Returns:
        float32 ``[N]``, on the device of ``rewards``; computed in float64.

    Raises:
        DataError: the shapes do not fit, or there is no response.
        RewardError: a reward is not finite.
        ConfigError: the rewards do not suit the mode (the message names the key to change), or an estimator of
            the user does not return one finite number a response.
    """
    _check(rewards, group_ids, success)
    order = _order(group_ids)
    if order is not None:
        rewards, group_ids = rewards[order], group_ids[order]
        success = None if success is None else success[order]
    as_given = config.success_threshold is not None or (success is not None if graded is None else graded)
    parts = [
        _estimate(rewards[part], group_ids[part], config, None if success is None else success[part], as_given)
        for part in _blocks(group_ids, config.aggregation_mode)
    ]
    advantages = torch.cat(parts) if len(parts) > 1 else parts[0]
    return advantages if order is None else torch.empty_like(advantages).index_copy_(0, order, advantages)


def _order(group_ids: Tensor) -> Tensor | None:
    """What brings the responses of each group together, in the order of ids; None where they are so already."""
    return None if bool((group_ids[1:] >= group_ids[:-1]).all()) else group_ids.argsort(stable=True)


def _blocks(group_ids: Tensor, mode: str) -> list[slice]:
    """Whole groups, about ``BLOCK`` responses at a time where no advantage depends on another group.

    What an estimator computes on the way then stays in the processor's caches.
    """
    if mode not in _GROUP_ALONE or len(group_ids) < 2 * BLOCK:
        return [slice(None)]
    starts = torch.searchsorted(group_ids, group_ids[::BLOCK].contiguous()).unique().tolist()
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(group_ids)])]


def _estimate(
    rewards: Tensor, group_ids: Tensor, config: AdvNormConfig, success: Tensor | None, as_given: bool
) -> Tensor:
    """``estimate_advantages`` of whole groups that stand in the order of their ids."""
    two_valued = not as_given and config.aggregation_mode in RIGHT_OR_WRONG_MODES
    groups, order = _group(rewards, group_ids, config, None if two_valued else success)
    if two_valued:
        groups = _right_or_wrong(groups, config)
    advantages = get_estimator(config.aggregation_mode)(groups, config)
    if config.aggregation_mode not in ESTIMATORS:
        _check_estimate(advantages, groups, config)
    advantages = advantages.to(torch.float32)
    return advantages if order is None else torch.empty_like(advantages).index_copy_(0, order, advantages)


def get_estimator(mode: str) -> Estimator:
    """The estimator that ``actor.adv_norm.aggregation_mode`` names.

    Args:
        mode: a name of the table in ``estimate_advantages``, ``package.module:function`` or
            ``path/to/file.py:function``.

    Raises:
        ConfigError: there is none of this name, or it cannot be imported.
    """
    if mode in ESTIMATORS:
        return ESTIMATORS[mode]
    if not is_import_path(mode):
        raise ConfigError(
            f"{_MODE_KEY}={mode!r} is unknown: it is one of {', '.join(ESTIMATORS)}, or an import path "
            "`package.module:function` or `path/to/file.py:function`"
        )
    return import_function(mode, f"{_MODE_KEY}={mode!r}")[1]


def group_statistics(
    rewards: Tensor, group_ids: Tensor, config: AdvNormConfig, success: Tensor | None = None
) -> GroupStatistics:
    """Size, success rate p and λ of every group, for metrics; defined in every mode.

    Success is what ``success`` says; without it ``r >= success_threshold`` where that is set. Otherwise it is a
    reward in the upper half of its group's range; for an all-equal group in the upper half of the batch's range;
    and if the whole batch has one value, a positive one.

    Args:
        rewards: floating point or integer ``[N]``.
        group_ids: integer ``[N]``.
        config: section ``actor.adv_norm``.
        success: bool ``[N]``, or None.

    Raises:
        DataError, RewardError: as ``estimate_advantages``.
    """
    _check(rewards, group_ids, success)
    if (order := _order(group_ids)) is not None:
        rewards, group_ids = rewards[order], group_ids[order]
        success = None if success is None else success[order]
    groups, _ = _group(rewards, group_ids, config, success)
    return GroupStatistics(groups.ids, groups.sizes, groups.p, _lambda(groups.p), groups.varied)


def _group(
    rewards: Tensor, group_ids: Tensor, config: AdvNormConfig, success: Tensor | None
) -> tuple[Groups, Tensor | None]:
    """The groups of responses in the order of their ids, and the place in ``rewards`` of each response there (None:
    the same)."""
    threshold = config.success_threshold
    if threshold is not None and rewards.is_floating_point():
        # As the rewards are rounded: a reward of 0.9 in float32 reaches a threshold of 0.9.
        threshold = float(torch.tensor(threshold, dtype=rewards.dtype))
    groups = _with_extremes(rewards.double(), group_ids, success, threshold)
    if groups.all_two_valued:
        return groups, None
    # Sums in the order of the rewards, not of the responses.
    by_reward = groups.rewards.argsort(stable=True)
    order = by_reward[groups.index[by_reward].argsort(stable=True)]
    return replace(groups, rewards=groups.rewards[order], success=None if success is None else success[order]), order


def _check(rewards: Tensor, group_ids: Tensor, success: Tensor | None) -> None:
    if (
        rewards.dim() != 1
        or rewards.shape != group_ids.shape
        or (success is not None and success.shape != rewards.shape)
    ):
        also = "" if success is None else f" and {tuple(success.shape)}"
        raise DataError(
            f"rewards, group_ids and success must be flat and of one length, got {tuple(rewards.shape)} "
            f"and {tuple(group_ids.shape)}{also}"
        )
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise DataError(f"group_ids must be integers, got {group_ids.dtype}")
    if len(rewards) == 0:
        raise DataError("no rewards: the batch has no responses")
    # One pass when all is well: a sum is finite only if its terms are, and in float64 float32 terms cannot overflow.
    if bool(torch.isfinite(rewards.sum())):
        return
    bad = (~torch.isfinite(rewards)).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        raise RewardError(
            f"{len(bad)} of {len(rewards)} rewards are not finite, the first is {float(rewards[first])} of response "
            f"{first} in group {int(group_ids[first])}: the verifier of `reward.name` must return finite numbers"
        )


def _with_extremes(values: Tensor, group_ids: Tensor, success: Tensor | None, threshold: float | None) -> Groups:
    """Groups of values that stand group by group."""
    ids, index, sizes = torch.unique_consecutive(group_ids, return_inverse=True, return_counts=True)
    largest = int(sizes.max())
    uniform = largest if largest * len(ids) == len(values) else None
    if uniform is not None:
        low, high = values.view(-1, uniform).aminmax(dim=1)
    else:
        low = torch.segment_reduce(values, "min", lengths=sizes)
        high = torch.segment_reduce(values, "max", lengths=sizes)
    return Groups(values, success, threshold, ids, index, sizes, low, high, uniform)


def _success(groups: Groups) -> Tensor:
    """bool ``[N]``, as ``group_statistics`` says when the verifier does not."""
    if groups.threshold is not None:
        return groups.rewards >= groups.threshold
    worst, best = groups.low.min(), groups.high.max()
    # Compared as distances: the midpoint of two neighbouring floats would round to one of them.
    equal_and_good = best - groups.high < groups.high - worst if bool(best > worst) else groups.high > 0
    if groups.all_two_valued:
        return groups.highest & groups.per_response(groups.varied | equal_and_good)
    low = groups.per_response(torch.where(groups.varied, groups.low, worst))
    high = groups.per_response(torch.where(groups.varied, groups.high, best))
    return high - groups.rewards < groups.rewards - low


def _lambda(p: Tensor) -> Tensor:
    return 1 - 4 * p * (1 - p)


def _right_or_wrong(groups: Groups, config: AdvNormConfig) -> Groups:
    """The same groups with rewards in {0, 1}, so that they may be divided by their mean."""
    if not groups.all_two_valued:
        _refuse_graded(groups, config)
    binary = groups.succeeded.double()
    low, high = (torch.where(groups.varied, edge, groups.p) for edge in (0.0, 1.0))
    return replace(groups, rewards=binary, success=groups.succeeded, low=low, high=high)


def _refuse_graded(groups: Groups, config: AdvNormConfig) -> None:
    group = (~groups.two_valued).nonzero().flatten()[0]
    values = groups.rewards[groups.index == group].unique().tolist()
    raise ConfigError(
        f"{_MODE_KEY}={config.aggregation_mode} needs right-or-wrong rewards, but group "
        f"{int(groups.ids[group])} has {len(values)} different ones ({', '.join(f'{v:g}' for v in values[:5])}"
        f"{', ...' if len(values) > 5 else ''}): set {_THRESHOLD_KEY} to the lowest reward that is a success, or "
        f"choose another {_MODE_KEY}"
    )


def _check_estimate(advantages: Tensor, groups: Groups, config: AdvNormConfig) -> None:
    mode = f"{_MODE_KEY}={config.aggregation_mode}"
    if not isinstance(advantages, Tensor) or advantages.shape != groups.rewards.shape:
        shape = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
        raise ConfigError(f"{mode} must return one advantage a response, [{len(groups.rewards)}]; it returned {shape}")
    if not bool(torch.isfinite(advantages).all()):
        raise ConfigError(f"{mode} returned an advantage that is not finite; `Groups.divide` leaves all-equal groups 0")


def _positive_mean(groups: Groups, config: AdvNormConfig) -> Tensor:
    """Mean ``[K]`` of every group; an error where it cannot be divided by."""
    bad = (groups.varied & (groups.mean <= 0)).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        raise ConfigError(
            f"{_MODE_KEY}={config.aggregation_mode} divides by a group's mean reward, but that of group "
            f"{int(groups.ids[first])} is {float(groups.mean[first]):g}: with {_THRESHOLD_KEY} rewards must be "
            f"positive on average; raise `reward.correct` and `reward.wrong`, or unset {_THRESHOLD_KEY} if rewards "
            "are binary"
        )
    return groups.mean


def _native(groups: Groups, config: AdvNormConfig) -> Tensor:
    return groups.divide(groups.centred, groups.std(config) + config.eps)


def _mix(groups: Groups, config: AdvNormConfig) -> Tensor:
    lam = _lambda(groups.p)
    return groups.scale(
        groups.centred, (1 - lam) / (groups.std(config) + config.eps) + lam / _positive_mean(groups, config)
    )


def _mean_only(groups: Groups, config: AdvNormConfig) -> Tensor:
    return groups.divide(groups.centred, _positive_mean(groups, config))


def _center(groups: Groups, config: AdvNormConfig) -> Tensor:
    return groups.centred


def _rloo(groups: Groups, config: AdvNormConfig) -> Tensor:
    return groups.scale(groups.centred, groups.sizes / (groups.sizes - 1).clamp(min=1))


def _gpg(groups: Groups, config: AdvNormConfig) -> Tensor:
    return groups.centred * (len(groups.ids) / groups.varied.sum().clamp(min=1))


def _treerpo(groups: Groups, config: AdvNormConfig) -> Tensor:
    outside = (groups.rewards < 0) | (groups.rewards > 1)
    if bool(outside.any()):
        first = int(outside.nonzero().flatten()[0])
        raise ConfigError(
            f"{_MODE_KEY}=treerpo with {_THRESHOLD_KEY} needs rewards from 0 to 1, but group "
            f"{int(groups.ids[groups.index[first]])} has {float(groups.rewards[first]):g}: unset {_THRESHOLD_KEY} or "
            "rescale the rewards"
        )
    return groups.divide(groups.centred, groups.mean * (1 - groups.mean))


def _lite_ppo(groups: Groups, config: AdvNormConfig) -> Tensor:
    return groups.divide(groups.centred, (groups.batch_std(config) + config.eps).expand_as(groups.mean))


def _reinforce_pp(groups: Groups, config: AdvNormConfig) -> Tensor:
    centred = groups.rewards - groups.batch_mean
    return (
        centred / (groups.batch_std(config) + config.eps) if bool(groups.high.max() > groups.low.min()) else 0 * centred
    )


def _reinforce_pp_baseline(groups: Groups, config: AdvNormConfig) -> Tensor:
    std = groups.batch_std(config, within=True) + config.eps
    return groups.divide(groups.centred, std.expand_as(groups.mean))


def _pass_at_k(groups: Groups, config: AdvNormConfig) -> Tensor:
    """Advantage for the chance that one of k responses is right (arXiv 2508.10751, the analytical form).

    Of a group's G responses F are failures. A set of k of them is rewarded if it holds a success, which has the
    mean M = 1 − C(F,k)/C(G,k) and the deviation S = √(M(1−M)). A response's advantage is that of the sets it is in:
    (1−M)/(S+ε) for a success, (1 − M − C(F−1,k−1)/C(G−1,k−1))/(S+ε) for a failure. With k = 1 this is ``native``.
    """
    smallest, k = int(groups.sizes.min()), config.pass_k
    if smallest < k:
        raise ConfigError(
            f"actor.adv_norm.pass_k={k} is more than the {smallest} responses of a group: lower it, or raise "
            "rollout.responses_per_prompt"
        )
    failures = groups.sizes - groups.sum(groups.succeeded.double())
    mean = 1 - _all_from(failures, groups.sizes, k)
    weight = 1 / ((mean * (1 - mean)).sqrt() + config.eps)
    right = (1 - mean) * weight
    wrong = (1 - mean - _all_from(failures - 1, groups.sizes - 1, k - 1)) * weight
    # A group without any set of k failures has nothing left to learn.
    right, wrong = (torch.where((mean > 0) & (mean < 1), value, 0.0) for value in (right, wrong))
    return torch.where(groups.succeeded, groups.per_response(right), groups.per_response(wrong))


def _all_from(part: Tensor, whole: Tensor, k: int) -> Tensor:
    """C(part, k)/C(whole, k): the chance that k different ones of ``whole`` are all of ``part``."""
    share = torch.ones_like(part)
    for i in range(k):
        share = share * (part - i).clamp(min=0) / (whole - i).clamp(min=1)
    return share


ESTIMATORS: dict[str, Estimator] = {
    "native": _native,
    "mix": _mix,
    "mean_only": _mean_only,
    "center": _center,
    "rloo": _rloo,
    "gpg": _gpg,
    "treerpo": _treerpo,
    "lite_ppo": _lite_ppo,
    "reinforce++": _reinforce_pp,
    "reinforce++_baseline": _reinforce_pp_baseline,
    "pass_at_k": _pass_at_k,
}
_GROUP_ALONE = frozenset({"native", "mix", "mean_only", "center", "rloo", "treerpo", "pass_at_k"})
"""Modes in which an advantage depends on its own group only."""
