"""What the verifier is shown of sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_mapo.data.prompts import Prompt
from megatron_mapo.rewards.pool import RewardPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    async def judge(self, prompt: Prompt, texts: Sequence[str]) -> list[float]:
        """Rewards of responses to one prompt."""
        n = len(texts)
        return await self.pool.score(texts, [prompt.answer] * n, [prompt.metadata] * n)

    async def extract(self, texts: Sequence[str]) -> list[str | None]:
        """The answers that responses state; all None if the verifier has no extractor."""
        return await self.pool.extract(texts) if self.pool.extracts else [None] * len(texts)

    async def __call__(self, prompt: Prompt, responses: Sequence[Sequence[int]]) -> list[float]:
        return await self.judge(prompt, self.texts(responses))
