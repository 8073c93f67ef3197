"""All that rank 0 holds to turn prompts into scored sequences: data, servers, verifier, weight sync."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from megatron_mapo.algorithms.advantages import group_statistics
from megatron_mapo.algorithms.evaluation import is_right
from megatron_mapo.algorithms.filters import filters
from megatron_mapo.config import Config
from megatron_mapo.data.prompts import Prompt, PromptSet, PromptStream, load_prompts
from megatron_mapo.data.sequences import REWARD_PART, RIGHT, SUCCESS, SequenceBatch
from megatron_mapo.errors import MapoError, RolloutError
from megatron_mapo.hardware import has_accelerator
from megatron_mapo.rewards.pool import RewardPool
from megatron_mapo.rollout.client import RolloutClient, read_api_key
from megatron_mapo.rollout.dynamic_sampling import collect
from megatron_mapo.rollout.evaluation import Evaluator, Row, Tally
from megatron_mapo.rollout.pool import ServerPool, read_urls_file
from megatron_mapo.rollout.records import rollout_columns
from megatron_mapo.rollout.sampler import Sampler, sample_seed
from megatron_mapo.rollout.scoring import Scorer
from megatron_mapo.rollout.served import check_served
from megatron_mapo.rollout.weight_sync import WeightSync

# Which stream of random numbers a seed is for.
_TRAIN, _EVAL = 0, 1


def server_urls(config: Config) -> list[str]:
    """Servers to use: ``rollout.urls`` and those of ``rollout.urls_file``, else where ``rollout.server`` would listen.

    Raises:
        RolloutError: the file cannot be used.
    """
    rollout, server = config.rollout, config.rollout.server
    if rollout.urls_file is not None:
        return [*rollout.urls, *read_urls_file(rollout.urls_file)]
    return rollout.urls or [f"http://{server.host}:{server.port + i}" for i in range(server.count)]


def stop_token_ids(model_path: Path, eos_token_id: int | None) -> list[int]:
    """Ids that end a response: those of ``generation_config.json`` and the tokenizer's end of sequence."""
    ids = {eos_token_id}
    file = model_path / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text()).get("eos_token_id")
        ids |= set(listed) if isinstance(listed, list) else {listed}
    return sorted(i for i in ids if i is not None)


def overlong(lengths: Tensor, truncated: Tensor, longest: int, buffer: int) -> Tensor:
    """Share of the overlong penalty that responses get, float64 ``[N]``.

    1 for a truncated response; before, it grows from 0 over the last ``buffer`` tokens (DAPO, arXiv 2503.14476,
    eq. 13).

    Args:
        lengths: int64 ``[N]``, response tokens.
        truncated: bool ``[N]``.
        longest: ``rollout.max_response_tokens``.
        buffer: ``reward.overlong_buffer``; 0: truncated responses only.
    """
    grown = (lengths - (longest - buffer)).double() / buffer if buffer else torch.zeros(len(lengths)).double()
    return torch.where(truncated, 1.0, grown.clamp(0, 1))


def right_responses(batch: SequenceBatch, config: Config) -> Tensor:
    """Which responses are right by what the verifier gave, bool ``[N]``; in evaluations: ``right_verdicts``."""
    return batch.extra[SUCCESS] if SUCCESS in batch.extra else is_right(batch.rewards, config.right_from)


def open_client(
    config: Config, model_path: Path, servers: ServerPool | list[str], api_key: str | None
) -> RolloutClient:
    """A client of servers that hold the model of ``model_path``."""
    hf, rollout = json.loads((model_path / "config.json").read_text()), config.rollout
    check_served(hf, rollout.max_prompt_tokens + rollout.max_response_tokens, on_cpu=not has_accelerator())
    if not isinstance(servers, ServerPool):
        servers = ServerPool(servers, rollout.max_failures, straggler_ratio=rollout.straggler_ratio)
    # The model's vocabulary, not the tokenizer's: many models have rows that no text leads to.
    return RolloutClient(
        servers, api_key, rollout.timeout, rollout.retries, hf["vocab_size"], probe_timeout=rollout.probe_timeout
    )


class RolloutSession:
    """Prompts in, scored sequences out, and new weights to the servers.

    Args:
        config: the whole configuration.
        model_path: folder of the model (tokenizer, generation config).
        device: where the trainer's weights live.

    Attributes:
        prompts: the training prompts and where they stand.
        pool: the servers and their states.
    """

    def __init__(self, config: Config, model_path: Path, device: torch.device) -> None:
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(str(model_path), trust_remote_code=False)
        train = self._load(config.data.train, config.data.train_split, "data.train", None)
        self.prompts = PromptStream(train, config.run.seed, config.data.shuffle, config.data.curriculum)
        self.held_out: PromptSet | None = None
        if config.data.eval is not None:
            self.held_out = self._load(config.data.eval, config.data.eval_split, "data.eval", config.data.eval_limit)
        self.rewards = RewardPool(config.reward)
        self.scorer = Scorer(self.tokenizer, self.rewards)
        api_key = read_api_key(config.rollout.api_key_file)
        rollout = config.rollout
        ratio = rollout.straggler_ratio
        self.pool = ServerPool(server_urls(config), rollout.max_failures, straggler_ratio=ratio, log=_say)
        client = open_client(config, model_path, self.pool, api_key)
        stop = stop_token_ids(model_path, self.tokenizer.eos_token_id)
        self.sampler = Sampler(client, rollout, self.scorer, stop)
        self.weight_sync = WeightSync(
            rollout.sync, self.pool, api_key, model_path, config.run_dir, device, rollout.probe_timeout
        )
        self._last_prompts: list[Prompt] = []
        self._rounds: tuple[int, list[SequenceBatch]] = (-1, [])
        self._sampled: dict[str, float] = {}
        # A tokenizer must not be used by two threads.
        self._records_tokenizer = copy.deepcopy(self.tokenizer)
        self._tally: tuple[int, Tally] | None = None

    def _load(self, source: str, split: str, key: str, limit: int | None) -> PromptSet:
        longest = self.config.rollout.max_prompt_tokens
        return load_prompts(source, split, self.config.data, self.tokenizer, longest, key=key, limit=limit)

    def sample(self, version: int) -> SequenceBatch:
        """The next rollout batch, sampled with weights of ``version``.

        Raises:
            ServersOut: no server holds them (any more). The next call gives the same batch, and goes on with it.
            MapoError: the run ends; a checkpoint that is made now begins with the same batch.
        """
        here, rollout = self.prompts.state_dict(), self.config.rollout
        if self._rounds[0] != version:
            self._rounds = (version, [])
        try:
            if filters(rollout.filter):
                found = collect(self._draw, rollout.prompts_per_step, rollout.filter, self.config.actor.adv_norm)
                self._last_prompts, batch, self._sampled = found.prompts, found.batch, found.metrics
            else:
                self._last_prompts, batch = self._draw(0, rollout.prompts_per_step)
        except MapoError:
            self.prompts.load_state_dict(here)
            raise
        self._rounds = (-1, [])
        reward = self.config.reward
        if not reward.overlong_penalty:
            return batch
        excess = overlong(batch.response_lens, batch.truncated, rollout.max_response_tokens, reward.overlong_buffer)
        return replace(batch, rewards=batch.rewards - reward.overlong_penalty * excess.float())

    def _draw(self, number: int, count: int) -> tuple[list[Prompt], SequenceBatch]:
        """Round ``number`` of this step: the next ``count`` prompts and their groups. None is sampled twice."""
        version, done = self._rounds
        prompts = self.prompts.next(count)
        if number == len(done):
            seed = sample_seed(self.config.run.seed, _TRAIN, version)
            base = sum(len(batch.group_ids.unique()) for batch in done)
            done.append(
                self.sampler.sample(prompts, version, seed if number == 0 else sample_seed(seed, number, 0), base)
            )
        batch = done[number]
        batch.extra[RIGHT] = right_responses(batch, self.config)
        groups = group_statistics(batch.rewards, batch.group_ids, self.config.actor.adv_norm, batch.extra[RIGHT])
        self.prompts.record([prompt.id for prompt in prompts], groups.p.tolist())
        return prompts, batch

    def evaluate(self, version: int, write: Callable[[list[Row]], None]) -> dict[str, float]:
        """Evaluate the servers' weights on the held-out prompts (see ``Tally.metrics``).

        Args:
            version: of the weights; part of the seed.
            write: called with the samples of a prompt, as soon as it is finished.

        Raises:
            ServersOut: as ``sample``. The next call goes on with the prompts that are missing.
        """
        assert self.held_out is not None
        if self._tally is None or self._tally[0] != version:
            samples = self.config.trainer.evaluation.samples
            tally = Tally(len(self.held_out), samples, greedy=True, extracts=self.rewards.extracts)
            self._tally = (version, tally)
        tally = self._tally[1]
        evaluator = Evaluator(self.sampler, self.scorer, self.config.right_from)
        evaluator.run(self.held_out, tally, sample_seed(self.config.run.seed, _EVAL, version), write)
        self._tally = None
        return tally.metrics(self.config.run.seed)

    def describe(self, batch: SequenceBatch, advantages: Tensor, count: int) -> list[dict[str, Any]]:
        """Text, reward and advantage of the first ``count`` sequences of the last batch.

        ``response`` is what the verifier saw; the components of a mixture and the success stand beside the reward.
        """
        n, shown = self.config.rollout.responses_per_prompt, range(min(count, len(batch)))
        starts, ends = (batch.offsets[:-1] + batch.prompt_lens).tolist(), batch.offsets[1:].tolist()
        texts = self.scorer.texts([batch.tokens[starts[i] : ends[i]].tolist() for i in shown])
        scored = [name for name in batch.extra if name == SUCCESS or name.startswith(REWARD_PART)]
        return [
            {
                "prompt": self._last_prompts[i // n].question,
                "answer": self._last_prompts[i // n].answer,
                "response": texts[i],
                "reward": float(batch.rewards[i]),
                **{name: batch.extra[name][i].item() for name in scored},
                "advantage": float(advantages[i]),
                "group": int(batch.group_ids[i]),
                "truncated": bool(batch.truncated[i]),
            }
            for i in shown
        ]

    def record(
        self, batch: SequenceBatch, advantages: Tensor, trainer_logprobs: Tensor
    ) -> Callable[[], dict[str, Any]]:
        """The last batch as columns (see ``records.rollout_columns``), to be made by another thread."""
        prompts = self._last_prompts

        def columns() -> dict[str, list[Any]]:
            adv_norm = self.config.actor.adv_norm
            return rollout_columns(batch, advantages, trainer_logprobs, prompts, self._records_tokenizer, adv_norm)

        return columns

    def await_servers(self) -> None:
        """Let servers of ``rollout.urls_file`` join and leave, and wait until one can take weights.

        Raises:
            ServersLost: none came within ``rollout.wait_timeout``.
        """
        if self.config.rollout.urls_file is not None:
            try:
                self.pool.set_members(server_urls(self.config))
            except RolloutError as error:  # somebody may just be writing it
                _say(f"{error}; the servers stay the same")
        self.weight_sync.await_servers(self.config.rollout.wait_timeout, _say)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Send ``weights`` to the servers that answer as ``version``, and check that they arrived.

        Raises:
            ServersOut: none of them has got all.
            WeightSyncError: another try would fail in the same way.
        """
        self.weight_sync.update(weights, version)

    def server_metrics(self) -> dict[str, float]:
        """Servers and failed requests since the last call (see ``ServerPool.metrics``), what the last batch's filter
        did (see ``dynamic_sampling.Collected``), and with a curriculum ``curriculum/resting``, prompts that rest."""
        curriculum = self.config.data.curriculum
        rests = curriculum.min_p is not None or curriculum.max_p is not None
        resting = {"curriculum/resting": float(self.prompts.resting)} if rests else {}
        return self.pool.metrics() | self._sampled | resting

    def close(self) -> None:
        """Close connections and verifier processes."""
        self.weight_sync.close()
        self.sampler.close()
        self.rewards.close()


def _say(line: str) -> None:
    print(line, flush=True)
