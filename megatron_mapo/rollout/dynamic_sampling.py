"""Rollout batches of groups that pass a filter, within a budget of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_mapo.algorithms.advantages import group_statistics
from megatron_mapo.algorithms.filters import keep_groups
from megatron_mapo.config import AdvNormConfig, FilterConfig
from megatron_mapo.data.prompts import Prompt
from megatron_mapo.data.sequences import RIGHT, SequenceBatch

Draw = Callable[[int, int], tuple[list[Prompt], SequenceBatch]]
"""``draw(round, count)``: the next ``count`` prompts and the groups sampled for them, in the same order."""


@dataclass(frozen=True)
class Collected:
    """What a step trains on.

    Attributes:
        prompts: one a group.
        batch: their groups, in that order; group ids are places among all groups that were sampled.
        metrics: ``filter/rounds``; ``filter/sampled`` and ``filter/kept`` (groups); ``filter/all_right`` and
            ``filter/all_wrong``, shares of the sampled groups; ``filter/accuracy``, the mean success rate of all
            that was sampled, which the filter does not bias; ``filter/response_tokens`` of all that was sampled.
    """

    prompts: list[Prompt]
    batch: SequenceBatch
    metrics: dict[str, float]


def collect(draw: Draw, wanted: int, config: FilterConfig, adv_config: AdvNormConfig) -> Collected:
    """Sample round after round until ``wanted`` groups pass the filter, or the budget is used up.

    A round asks for as many prompts as the share kept so far lets expect to be needed. Groups above ``wanted``
    are dropped from the end. When the budget ends first, the step has fewer groups; when none passed, it has one
    that did not, so that a step is a step.

    Args:
        draw: samples.
        wanted: groups of a step.
        config: section ``rollout.filter``; the budget is ``oversample * wanted`` prompts.
        adv_config: section ``actor.adv_norm``; says what a success is.
    """
    budget, sampled, rounds = config.oversample * wanted, 0, 0
    prompts: list[Prompt] = []
    parts: list[SequenceBatch] = []
    rates: list[torch.Tensor] = []
    kept = tokens = 0
    while kept < wanted and sampled < budget:
        share = max(kept / sampled, 1 / config.oversample) if sampled else 1.0
        count = min(math.ceil((wanted - kept) / share), budget - sampled)
        drawn, batch = draw(rounds, count)
        groups = group_statistics(batch.rewards, batch.group_ids, adv_config, batch.extra.get(RIGHT))
        keep = keep_groups(batch, groups, config)
        last = sampled + count == budget
        if last and not kept and not keep.any():
            keep[0] = True
        # Group ids ascend with the prompts.
        chosen = keep.nonzero().flatten()[: wanted - kept]
        prompts += [drawn[i] for i in chosen.tolist()]
        parts.append(batch.select(torch.isin(batch.group_ids, groups.ids[chosen])))
        rates.append(groups.p)
        tokens += int(batch.response_lens.sum())
        kept, sampled, rounds = kept + len(chosen), sampled + count, rounds + 1
    p = torch.cat(rates)
    metrics = {
        "filter/rounds": float(rounds),
        "filter/sampled": float(sampled),
        "filter/kept": float(kept),
        "filter/all_right": float((p == 1).double().mean()),
        "filter/all_wrong": float((p == 0).double().mean()),
        "filter/accuracy": float(p.mean()),
        "filter/response_tokens": float(tokens),
    }
    return Collected(prompts, SequenceBatch.concat(parts), metrics)
