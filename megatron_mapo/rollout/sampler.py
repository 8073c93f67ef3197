"""From prompts to a scored ``SequenceBatch``: groups, concurrency, seeds, staleness."""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_mapo.config import RolloutConfig
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import DataError, MapoError, RewardError, RolloutError
from megatron_mapo.rollout.client import Response, RolloutClient, Sampling
from megatron_mapo.rollout.scoring import Scores

T = TypeVar("T")


class PromptLike(Protocol):
    """What the sampler reads of a prompt; a ``data.prompts.Prompt`` has more, for the verifier."""

    @property
    def id(self) -> int:
        """Row in the data."""

    @property
    def token_ids(self) -> list[int]:
        """Tokens to send to the server."""


Score = Callable[[Any, list[list[int]]], Awaitable[Scores]]
"""``score(prompt, responses' token ids)`` gives one reward a response, and what goes with it."""


Arrived = Callable[[Any, list[Response], list[Response]], Awaitable[None]]
"""``arrived(prompt, sampled, greedy)`` takes the responses of an evaluation, prompt by prompt as they come."""


@dataclass(frozen=True)
class _Group:
    responses: list[Response]
    scores: Scores


def sample_seed(seed: int, position: int, index: int) -> int:
    """Seed of sample ``index`` of the prompt at ``position``: 63 bits that differ for all triples."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, position, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_prompts(prompts: Sequence[PromptLike], limit: int) -> None:
    if not prompts:
        raise DataError("the sampler was given no prompts")
    for prompt in prompts:
        if not 0 < len(prompt.token_ids) <= limit:
            raise DataError(
                f"prompt {prompt.id} has {len(prompt.token_ids)} tokens; "
                f"it needs 1 to rollout.max_prompt_tokens={limit}"
            )


class Sampler:
    """Samples and scores groups of responses. Synchronous outside; one event loop of its own inside.

    Args:
        client: the servers; the sampler closes it.
        config: section ``rollout``.
        score: the verifier.
        stop_token_ids: ids that end a response.
        max_staleness: how many versions older than asked for a token's weights may be.
        watch: raises when a server that this process started has ended (``ServerGroup.check``), so that
            a failed request is reported with that server's log.
        progress: called with finished and total groups.
    """

    def __init__(
        self,
        client: RolloutClient,
        config: RolloutConfig,
        score: Score,
        stop_token_ids: Sequence[int],
        max_staleness: int = 0,
        watch: Callable[[], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config
        self.max_staleness = max_staleness
        self._client = client
        self._score = score
        self._stop = tuple(stop_token_ids)
        self._watch = watch or (lambda: None)
        self._progress = progress or (lambda done, total: None)
        self._runner = asyncio.Runner()
        self._finished: dict[int, _Group] = {}
        self._finished_of: tuple[int, ...] = ()

    def close(self) -> None:
        """Close the client and the event loop."""
        self._runner.run(self._end())
        self._runner.close()

    async def _end(self) -> None:
        """Requests that a signal has left behind end before the connections that they use."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._client.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(work)
        except RolloutError:
            self._watch()
            raise

    def sample(self, prompts: Sequence[PromptLike], version: int, seed: int, group_base: int = 0) -> SequenceBatch:
        """Sample ``responses_per_prompt`` responses to every prompt, and score them as groups arrive.

        Args:
            prompts: P prompts.
            version: version that the servers' weights have now.
            seed: of this batch; the same seed, prompts and weights give the same tokens on servers
                that honour seeds (see ``RolloutClient.generate``).
            group_base: group id of the first prompt; the next ones follow.

        Returns:
            ``P * responses_per_prompt`` sequences, in the order of prompts, then of samples, whatever
            the order of arrival. ``extra["prompt_id"]`` is int64 ``[N]``; the columns of ``Scores`` are beside it,
            bool or float32 ``[N]``.

        Raises:
            DataError: a prompt is empty or too long.
            ServersOut: no server holds the weights (any more). Called again with the same arguments, it keeps
                the groups that are finished.
            RolloutError: a server failed, or sampled with weights that are too old.
            RewardError: the verifier failed.
        """
        _check_prompts(prompts, self.config.max_prompt_tokens)
        n = self.config.responses_per_prompt
        sampling = Sampling(self.config.max_response_tokens, self.config.temperature, self._stop)
        key = (version, seed, *(prompt.id for prompt in prompts))
        if key != self._finished_of:
            self._finished, self._finished_of = {}, key
        groups = self._run(self._groups(prompts, n, sampling, seed))
        self._finished, self._finished_of = {}, ()
        responses = [response for group in groups for response in group.responses]
        batch = SequenceBatch.from_responses(
            [prompt.token_ids for prompt in prompts for _ in range(n)],
            [r.token_ids for r in responses],
            rollout_logprobs=[r.logprobs for r in responses],
            weight_versions=[r.weight_versions for r in responses],
            rewards=[reward for group in groups for reward in group.scores.rewards],
            group_ids=[group_base + i for i in range(len(prompts)) for _ in range(n)],
            truncated=[r.truncated for r in responses],
            extra={"prompt_id": torch.tensor([p.id for p in prompts], dtype=torch.int64).repeat_interleave(n)}
            | _columns([group.scores for group in groups]),
        )
        self._check_versions(batch.weight_versions, version)
        return batch

    def evaluate(self, prompts: Sequence[PromptLike], samples: int, greedy: bool, seed: int, arrived: Arrived) -> None:
        """Sample ``samples`` responses to every prompt, and one greedy response if asked for.

        A prompt's seeds come from its id, so any part of the prompts gets the same responses as all of them.

        Args:
            prompts: P prompts.
            samples: sampled responses to each; may be 0.
            greedy: also the greedy response.
            seed: of this evaluation.
            arrived: called once a prompt; its failure ends the evaluation.

        Raises:
            DataError, RolloutError: as ``sample``.
            Whatever ``arrived`` raises.
        """
        _check_prompts(prompts, self.config.max_prompt_tokens)
        tempered = Sampling(self.config.max_response_tokens, self.config.temperature, self._stop, logprobs=False)
        plain = Sampling(self.config.max_response_tokens, 0.0, self._stop, logprobs=False)
        slots = asyncio.Semaphore(self.config.concurrency)

        async def one(_: int, prompt: PromptLike) -> None:
            async with slots:
                sampled = await self._responses(prompt, prompt.id, samples, tempered, seed)
                single = await self._responses(prompt, prompt.id, int(greedy), plain, seed)
            await arrived(prompt, sampled, single)

        self._run(self._each(prompts, one))

    def _check_versions(self, versions: Tensor, version: int) -> None:
        oldest, newest = int(versions.min()), int(versions.max())
        if oldest < version - self.max_staleness or newest > version:
            raise RolloutError(
                f"responses were sampled with weight versions {oldest} to {newest}, but the trainer is at {version}: "
                "does something else update these servers, or was one restarted (rollout.urls)?"
            )

    async def _groups(self, prompts: Sequence[PromptLike], n: int, sampling: Sampling, seed: int) -> list[_Group]:
        """All groups, in the order of ``prompts``."""
        slots = asyncio.Semaphore(self.config.concurrency)

        async def one(position: int, prompt: PromptLike) -> _Group:
            if position not in self._finished:
                async with slots:
                    responses = await self._responses(prompt, position, n, sampling, seed)
                self._finished[position] = _Group(responses, await self._scores(prompt, responses))
            return self._finished[position]

        return await self._each(prompts, one)

    async def _responses(
        self, prompt: PromptLike, position: int, n: int, sampling: Sampling, seed: int
    ) -> list[Response]:
        if n == 0:
            return []
        seeds = [sample_seed(seed, position, index) for index in range(n)]
        return await self._client.generate(prompt.token_ids, n, sampling, seeds)

    async def _each(
        self, prompts: Sequence[PromptLike], work: Callable[[int, PromptLike], Coroutine[Any, Any, T]]
    ) -> list[T]:
        """``work(position, prompt)`` for all prompts, in order. The first failure cancels the rest."""
        done = 0

        async def counted(position: int, prompt: PromptLike) -> T:
            nonlocal done
            result = await work(position, prompt)
            done += 1
            self._progress(done, len(prompts))
            return result

        try:
            async with self._client.watched(), asyncio.TaskGroup() as tasks:
                pending = [tasks.create_task(counted(i, prompt)) for i, prompt in enumerate(prompts)]
        except BaseExceptionGroup as failures:
            raise _first(failures) from failures
        return [task.result() for task in pending]

    async def _scores(self, prompt: PromptLike, responses: list[Response]) -> Scores:
        scores = await self._score(prompt, [r.token_ids for r in responses])
        rewards = scores.rewards
        if len(rewards) != len(responses) or not all(math.isfinite(reward) for reward in rewards):
            raise RewardError(
                f"the verifier (reward.name) gave {rewards!r} for the {len(responses)} responses "
                f"to prompt {prompt.id}; it must give one finite number for each"
            )
        return scores


def _columns(scores: Sequence[Scores]) -> dict[str, Tensor]:
    """The groups' columns one after another; lists of bools become bool, others float32."""
    joined = {name: [value for one in scores for value in one.columns[name]] for name in scores[0].columns}
    return {
        name: torch.tensor(values, dtype=torch.bool if isinstance(values[0], bool) else torch.float32)
        for name, values in joined.items()
    }


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The error to show: a user's own mistake rather than one that may follow from it."""
    flat: list[BaseException] = []
    for failure in failures.exceptions:
        flat.append(_first(failure) if isinstance(failure, BaseExceptionGroup) else failure)
    return next((f for f in flat if isinstance(f, MapoError)), flat[0])
