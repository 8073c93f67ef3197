"""Run folders as the real ``Tracker`` writes them, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_models import make_tokenizer

from megatron_mapo.algorithms.advantages import estimate_advantages
from megatron_mapo.algorithms.metrics import mismatch_metrics, rollout_metrics, update_metrics
from megatron_mapo.config import Config, TrackingConfig, load_config, to_yaml
from megatron_mapo.data.prompts import Prompt
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.rollout.evaluation import GREEDY, Tally
from megatron_mapo.rollout.records import rollout_columns
from megatron_mapo.tracking import Tracker
from megatron_mapo.tracking.starts import describe_start

QUIET = TrackingConfig(tensorboard=False, plots=False, progress=False)
PROMPTS, RESPONSES, QUESTIONS, SAMPLES = 3, 4, 6, 2
TOKENIZER = make_tokenizer()


def run_config(folder: Path, *overrides: str) -> Config:
    """The configuration of a run in ``folder``."""
    return load_config(
        None,
        [
            *(
                f"run.output_dir={folder.parent}",
                f"run.name={folder.name}",
                "model.path=tiny",
                "data.train=train.jsonl",
            ),
            *("data.eval=heldout.jsonl", "trainer.steps=6", "trainer.evaluation.samples=2", *overrides),
        ],
    )


def sample(step: int, ability: float, generator: np.random.Generator, texts: tuple[str, str]) -> SequenceBatch:
    """A batch in which about this share of the responses is right."""
    right = generator.uniform(size=PROMPTS * RESPONSES) < ability
    responses = [[*TOKENIZER.encode(texts[0 if good else 1], add_special_tokens=False), 2] for good in right]
    return SequenceBatch.from_responses(
        [[5, 6, 7]] * len(responses),
        responses,
        rollout_logprobs=[list(generator.uniform(-2, 0, size=len(r))) for r in responses],
        weight_versions=[[step - 1] * len(r) for r in responses],
        rewards=[float(good) for good in right],
        group_ids=[i // RESPONSES for i in range(len(responses))],
        truncated=[False] * len(responses),
    )


def log_step(tracker: Tracker, config: Config, step: int, batch: SequenceBatch, question: str) -> None:
    """Everything that the trainer logs of a step."""
    adv_norm = config.actor.adv_norm
    advantages = estimate_advantages(batch.rewards, batch.group_ids, adv_norm)
    trainer = batch.rollout_logprobs + 0.01
    per_token = advantages[batch.response_sequence]
    metrics = rollout_metrics(batch, advantages, adv_norm, step - 1) | mismatch_metrics(trainer, batch.rollout_logprobs)
    metrics |= update_metrics(trainer, trainer, per_token, torch.ones_like(trainer), config.actor.loss)
    metrics |= {"loss/total": 0.1 / step, "optim/grad_norm": 0.5, "optim/skipped": float(step == 2)}
    metrics |= {
        "seconds/rollout": 2.0,
        "seconds/update": 1.0,
        "seconds_at/rollout": 0.25,
        "seconds_at/update": 2.5,
        "seconds/step": 4.0,
        "servers/restarts": float(step == 3),
    }
    metrics |= {"speed/response_tokens_per_second": int(batch.response_lens.sum()) / 4.0}
    if config.tracking.gradients_every and step % config.tracking.gradients_every == 0:
        metrics |= {f"gradient/p_{i:02d}": 0.1 * step * i * (i < 8) for i in range(9)}
    tracker.log(step, metrics)
    prompts = [Prompt(i, [5, 6, 7], f"{question} {i}", "4", {}) for i in range(PROMPTS)]
    tracker.log_rollouts(step, lambda: rollout_columns(batch, advantages, trainer, prompts, TOKENIZER, adv_norm))
    tracker.log_samples(
        step,
        [
            {
                **{"prompt": question, "answer": "4", "response": "as seen", "reward": float(batch.rewards[i])},
                **{"advantage": float(advantages[i]), "group": int(batch.group_ids[i]), "truncated": False},
            }
            for i in range(2)
        ],
    )


def log_evaluation(tracker: Tracker, step: int, ability: float, generator: np.random.Generator) -> None:
    """An evaluation whose questions differ in difficulty."""
    tally, table = Tally(QUESTIONS, SAMPLES, greedy=True, extracts=False), []
    for question in range(QUESTIONS):
        share = np.clip(ability + 0.3 * (question / QUESTIONS - 0.5), 0, 1)
        rows = [
            {
                **{"prompt_id": question, "sample": s, "prompt": f"question {question}", "answer": "4"},
                **{"response": "4", "reward": float(good), "right": bool(good), "extracted": None},
                **{"truncated": False, "length": 3, "finish": "stop"},
            }
            for s, good in zip([*range(SAMPLES), GREEDY], generator.uniform(size=SAMPLES + 1) < share, strict=True)
        ]
        tally.add(rows)
        table += rows
    tracker.log_evaluation(step, tally.metrics(0), table)


def make_run(
    folder: Path,
    *overrides: str,
    steps: int | None = None,
    gain: float = 0.1,
    seed: int = 0,
    luck: int = 0,
    evaluate: bool = True,
    texts: tuple[str, str] = ("4", "5"),
    question: str = "2+2?",
) -> Path:
    """A run of ``steps`` steps (default: all) whose share of right responses grows by ``gain`` a step.

    Runs of equal ``seed`` have the same first evaluation; with another ``luck`` what follows is drawn anew.
    """
    config = run_config(folder, f"run.seed={seed}", *overrides)
    generator = np.random.default_rng((seed, luck))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    tracker = Tracker(folder, QUIET, config.trainer.steps, 0)
    tracker.log_start(describe_start(config, 2, "cpu"))
    if evaluate:
        log_evaluation(tracker, 0, 0.2, np.random.default_rng(seed))
    for step in range(1, 1 + (config.trainer.steps if steps is None else steps)):
        log_step(tracker, config, step, sample(step, 0.2 + gain * step, generator, texts), question)
        if evaluate and step == config.trainer.steps:
            log_evaluation(tracker, step, 0.2 + gain * step, generator)
    tracker.close()
    return folder
