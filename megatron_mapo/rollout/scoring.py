"""What the verifier is shown of sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from megatron_mapo.algorithms.evaluation import is_right
from megatron_mapo.data.prompts import Prompt
from megatron_mapo.data.sequences import REWARD_PART, SUCCESS
from megatron_mapo.rewards.pool import RewardPool, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def right_verdicts(verdicts: Sequence[Verdict], right_from: float) -> list[bool]:
    """Which responses are right: as ``reward.success`` says, else by their reward (see ``is_right``)."""
    reached = is_right(torch.tensor([verdict.reward for verdict in verdicts], dtype=torch.float64), right_from).tolist()
    return [reaches if v.success is None else v.success for v, reaches in zip(verdicts, reached, strict=True)]


@dataclass(frozen=True)
class Scores:
    """Of the responses to one prompt, in order.

    Attributes:
        rewards: one a response.
        columns: further values, by the name of their column in ``SequenceBatch.extra``: ``success`` (bool) where
            ``reward.success`` is set, and ``reward/LABEL`` (float) of every component of a ``reward.mixture``.
    """

    rewards: list[float]
    columns: dict[str, list[float] | list[bool]] = field(default_factory=dict)


class Scorer:
    """Token ids -> text -> rewards; the ``score`` of a ``Sampler``.

    Attributes:
        tokenizer: of the model.
        pool: verifier processes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pool: RewardPool) -> None:
        self.tokenizer, self.pool = tokenizer, pool

    def texts(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Responses as text, without special tokens."""
        return self.tokenizer.batch_decode([list(tokens) for tokens in responses], skip_special_tokens=True)

    async def judge(self, prompt: Prompt, texts: Sequence[str]) -> list[Verdict]:
        """Verdicts on responses to one prompt."""
        n = len(texts)
        return await self.pool.judge(texts, [prompt.answer] * n, [prompt.metadata] * n, [prompt.question] * n)

    async def extract(self, texts: Sequence[str]) -> list[str | None]:
        """The answers that responses state; all None if the verifier has no extractor."""
        return await self.pool.extract(texts) if self.pool.extracts else [None] * len(texts)

    async def __call__(self, prompt: Prompt, responses: Sequence[Sequence[int]]) -> Scores:
        verdicts = await self.judge(prompt, self.texts(responses))
        columns: dict[str, list[float] | list[bool]] = {
            f"{REWARD_PART}{component.title}": [verdict.parts[component.title] for verdict in verdicts]
            for component in self.pool.config.mixture
        }
        if self.pool.config.success is not None:
            columns[SUCCESS] = [bool(verdict.success) for verdict in verdicts]
        return Scores([verdict.reward for verdict in verdicts], columns)
