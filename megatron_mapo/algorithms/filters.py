"""Which groups of a rollout batch are worth training on."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mapo.algorithms.advantages import GroupStatistics
from megatron_mapo.config import FilterConfig
from megatron_mapo.data.sequences import SequenceBatch


def filters(config: FilterConfig) -> bool:
    """Whether any filter is on."""
    return config.varied or any(v is not None for v in (config.min_p, config.max_p, config.max_truncated))


def keep_groups(batch: SequenceBatch, groups: GroupStatistics, config: FilterConfig) -> Tensor:
    """Groups that pass every filter of ``rollout.filter``.

    * ``varied``: not all rewards are equal. This is DAPO's dynamic sampling, arXiv 2503.14476, eq. 11. As there, the
      rewards are the verifier's, before any overlong penalty.
    * ``min_p``, ``max_p``: bounds of the success rate, both allowed.
    * ``max_truncated``: most of its responses that may be truncated, as a share.

    Args:
        batch: N sequences in K groups.
        groups: statistics of its groups.
        config: section ``rollout.filter``.

    Returns:
        bool ``[K]``, in the order of ``groups.ids``.
    """
    keep = torch.ones(len(groups.ids), dtype=torch.bool)
    if config.varied:
        keep &= groups.varied
    if config.min_p is not None:
        keep &= groups.p >= config.min_p
    if config.max_p is not None:
        keep &= groups.p <= config.max_p
    if config.max_truncated is not None:
        index = torch.searchsorted(groups.ids, batch.group_ids)
        truncated = torch.zeros(len(groups.ids), dtype=torch.float64).index_add_(0, index, batch.truncated.double())
        keep &= truncated / groups.sizes <= config.max_truncated
    return keep
