"""The real trainer without servers: its responses are made up from the prompt, the seed and the step.

Everything else is real: the prompts and their order, advantages, megatron, checkpoints, tracking, export. Two runs with
the same steps must leave the same bits, however often one of them was killed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from megatron_mapo import preemption
from megatron_mapo.config import Config, load_config
from megatron_mapo.data.prompts import Prompt, PromptStream, load_prompts
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import MapoError
from megatron_mapo.megatron import checkpoint, runtime
from megatron_mapo.megatron.checkpoint_writer import Written
from megatron_mapo.rollout.records import rollout_columns
from megatron_mapo.rollout.sampler import sample_seed
from megatron_mapo.tracking.jsonl import Row
from megatron_mapo.train import Trainer


class FrozenSession:
    """What ``Trainer`` needs of a ``RolloutSession``."""

    def __init__(self, config: Config, model_path: Path) -> None:
        self.config = config
        tokenizer = AutoTokenizer.from_pretrained(str(model_path), trust_remote_code=False)
        data, longest = config.data, config.rollout.max_prompt_tokens
        rows = load_prompts(data.train, data.train_split, data, tokenizer, longest, key="data.train", limit=None)
        self.prompts = PromptStream(rows, config.run.seed, data.shuffle)
        self.held_out = None
        if data.eval is not None:
            self.held_out = load_prompts(
                data.eval, data.eval_split, data, tokenizer, longest, key="data.eval", limit=None
            )
        self.tokenizer = tokenizer
        self.asked: list[Prompt] = []
        self.weights = ""
        self.described: list[dict[str, Any]] = []

    def sample(self, version: int) -> SequenceBatch:
        """Random responses and rewards, the same whenever this step is done."""
        prompts = self.asked = self.prompts.next(self.config.rollout.prompts_per_step)
        n = self.config.rollout.responses_per_prompt
        seed = sample_seed(self.config.run.seed, 0, version)
        generator = torch.Generator().manual_seed(seed)
        lens = torch.randint(1, 9, (len(prompts) * n,), generator=generator).tolist()
        responses = [torch.randint(3, 260, (k,), generator=generator).tolist() for k in lens]
        rewards = torch.randint(0, 2, (len(responses),), generator=generator).float()
        self.described = [{"prompt": p.question, "seed": seed, "weights": self.weights} for p in prompts]
        return SequenceBatch.from_responses(
            [list(p.token_ids) for p in prompts for _ in range(n)],
            responses,
            rewards=rewards.tolist(),
            group_ids=[g for g in range(len(prompts)) for _ in range(n)],
        )

    def describe(self, batch: SequenceBatch, advantages: Tensor, count: int) -> list[dict[str, Any]]:
        return self.described

    def record(
        self, batch: SequenceBatch, advantages: Tensor, trainer_logprobs: Tensor
    ) -> Callable[[], dict[str, list[Any]]]:
        prompts, adv_norm = self.asked, self.config.actor.adv_norm
        return lambda: rollout_columns(batch, advantages, trainer_logprobs, prompts, self.tokenizer, adv_norm)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Remember a checksum in the place of a server."""
        digest = hashlib.sha256()
        for name, value in weights:
            digest.update(name.encode() + value.float().contiguous().numpy().tobytes())
        self.weights = digest.hexdigest()

    def evaluate(self, version: int, write: Callable[[list[Row]], None]) -> dict[str, float]:
        """A number that depends on every bit of the weights."""
        found = int(self.weights[:6], 16) / 2**24
        write([{"prompt_id": 0, "sample": 0, "weights": self.weights}])
        return {"pass_at_1": found}

    def await_servers(self) -> None:
        """There are none."""

    def server_metrics(self) -> dict[str, float]:
        """There are none."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


class FrozenTrainer(Trainer):
    """``Trainer`` with a ``FrozenSession``."""

    def _open_rollout(self) -> None:
        self.rollout = FrozenSession(self.config, self.model_path)  # type: ignore[assignment]


class DisagreeingTrainer(FrozenTrainer):
    """Finds in its second step that server and trainer disagree, while the checkpoint of the first is being written."""

    def _check_mismatch(self, metrics: dict[str, float]) -> None:
        if self.step == 2:
            self.found.set()
            self.config.rollout.max_logprob_diff = 0.0
        super()._check_mismatch(metrics)

    def open(self) -> None:
        """Open, then hold every write back until then."""
        super().open()
        self.found, write = threading.Event(), checkpoint.write

        def held_back(*args: Any) -> Written:
            assert self.found.wait(60)
            return write(*args)

        checkpoint.write = held_back


def train_and_disagree(config: str, overrides: list[str]) -> list[str]:
    """A whole run, up to its end by ``DisagreeingTrainer``: type and message of the error."""
    settings = load_config(config, overrides)
    try:
        DisagreeingTrainer(settings, runtime.initialize(settings)).open_and_run()
    except MapoError as error:
        return [type(error).__name__, str(error)]
    return ["", "nothing was raised"]


def train_frozen(config: str, overrides: list[str], pids: str) -> None:
    """A whole run, or the rest of one. Each rank says first who it is, in ``pids/RANK``."""
    Path(pids, os.environ["RANK"]).write_text(str(os.getpid()))
    preemption.install()
    settings = load_config(config, overrides)
    trainer = FrozenTrainer(settings, runtime.initialize(settings))
    trainer.open_and_run()
