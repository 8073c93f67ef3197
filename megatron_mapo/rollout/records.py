"""A rollout batch as a table to read: text beside reward, advantage and what the trainer thought of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mapo.algorithms.advantages import group_statistics
from megatron_mapo.config import AdvNormConfig
from megatron_mapo.data.prompts import Prompt
from megatron_mapo.data.sequences import RIGHT, SequenceBatch, ragged_indices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rollout_columns(
    batch: SequenceBatch,
    advantages: Tensor,
    trainer_logprobs: Tensor,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    config: AdvNormConfig,
) -> dict[str, list[Any]]:
    """The columns of ``tracking.rollouts.COLUMNS`` but ``step``.

    Args:
        batch: N sequences in the order of ``prompts``, equally many of each; R response tokens.
        advantages: float32 ``[N]``.
        trainer_logprobs: float32 ``[R]`` (nat), under the weights that sampled; NaN where not computed.
        prompts: what was asked.
        tokenizer: of the model; used by nobody else at the same time.
        config: section ``actor.adv_norm``.
    """
    n, each = len(batch), len(batch) // len(prompts)
    groups = group_statistics(batch.rewards, batch.group_ids, config, batch.extra.get(RIGHT))
    place = torch.searchsorted(groups.ids, batch.group_ids)
    responses = batch.tokens[ragged_indices(batch.offsets[:-1] + batch.prompt_lens, batch.response_lens)]
    parts = [part.tolist() for part in responses.split(batch.response_lens.tolist())]
    gap = batch.rollout_logprobs.double() - trainer_logprobs.double()
    versions, lens = batch.weight_versions.long(), batch.response_lens
    asked = [prompts[i // each] for i in range(n)]
    return {
        "group": batch.group_ids.tolist(),
        "prompt_id": [prompt.id for prompt in asked],
        "prompt": [prompt.question for prompt in asked],
        "answer": [prompt.answer for prompt in asked],
        "response": tokenizer.batch_decode(parts),
        "reward": batch.rewards.tolist(),
        "advantage": advantages.tolist(),
        "p": groups.p[place].tolist(),
        "lambda": groups.lam[place].tolist(),
        "weight_version_min": _nullable(torch.segment_reduce(versions.double(), "min", lengths=lens), int),
        "weight_version_max": _nullable(torch.segment_reduce(versions.double(), "max", lengths=lens), int),
        "truncated": batch.truncated.tolist(),
        "prompt_length": batch.prompt_lens.tolist(),
        "length": lens.tolist(),
        "logprob_diff_mean": _nullable(torch.segment_reduce(gap, "mean", lengths=lens), float),
        "logprob_diff_abs_mean": _nullable(torch.segment_reduce(gap.abs(), "mean", lengths=lens), float),
    }


def _nullable(values: Tensor, kind: type) -> list[Any]:
    """None for what is not known: of an empty response, or of one that was not scored."""
    return [
        kind(value) if known else None for value, known in zip(values.tolist(), values.isfinite().tolist(), strict=True)
    ]
