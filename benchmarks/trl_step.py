"""TRL's side of rl_step.py: `GRPOTrainer` for a few steps, timed from outside. Runs in TRL's environment.

``python trl_step.py SETTINGS.json RESULT.json``; rl_step.py writes the first and reads the second.

The trainer is not changed. Four of its methods are wrapped by a clock, and callbacks mark the optimizer and the
ends of steps. A step is the time from the end of the step before it to its own end, logging included.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_mapo.rewards.math import verify


class Clock:
    """Seconds of each phase of the step that runs now."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.step_start = time.perf_counter()

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, adding its time to ``name``."""

        @functools.wraps(work)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = work(*args, **kwargs)
            self.add(name, time.perf_counter() - start)
            return result

        return run

    def add(self, name: str, seconds: float) -> None:
        """Add to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class StepTimes(TrainerCallback):
    """Closes the books at the end of every step.

    Attributes:
        rows: one a step: ``seconds``, ``phases`` and what the trainer logged.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rows: list[dict[str, Any]] = []
        self._optimizer_start = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step_start = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_start = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.clock.add("optimizer", time.perf_counter() - self._optimizer_start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """With ``logging_steps=1`` this is the last thing of a step; the summary after training is no step."""
        if "train_runtime" in logs:
            return
        now, spent = time.perf_counter(), self.clock.seconds
        seconds = now - self.clock.step_start
        spent["backward"] = spent.pop("training_step") - spent["rollout"] - spent["forward"]
        update = spent["forward"] + spent["backward"] + spent["optimizer"]
        phases = {"rollout": spent["rollout"], "update": update, "other": seconds - spent["rollout"] - update}
        self.rows.append({"seconds": seconds, "phases": phases, "details": dict(spent), "logs": dict(logs)})
        spent.clear()
        self.clock.step_start = time.perf_counter()


def reward_function(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for a right answer, else 0: the verifier that our side uses."""
    return [float(verify(c[0]["content"], a, {})) for c, a in zip(completions, answer, strict=True)]


def _config(settings: dict[str, Any], out: Path) -> GRPOConfig:
    sequences = settings["prompts"] * settings["responses"]
    return GRPOConfig(
        output_dir=str(out),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["trl_microbatch"],
        gradient_accumulation_steps=sequences // settings["trl_microbatch"],
        num_generations=settings["responses"],
        max_completion_length=settings["max_tokens"],
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        # Recomputing activations saves memory and costs a third more time: off, as on our side.
        gradient_checkpointing=False,
        bf16=settings["dtype"] == "bfloat16",
        model_init_kwargs={"dtype": settings["dtype"]},
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=settings["seed"],
    )


def _row(row: dict[str, Any], tokens_before: float, sequences: int) -> dict[str, Any]:
    """A step in the form that rl_step.py has for both sides."""
    logs = row["logs"]
    response = logs["completions/mean_length"]
    return {
        "seconds": row["seconds"],
        "phases": row["phases"],
        "details": row["details"],
        "response_tokens": response,
        "prompt_tokens": (logs["num_tokens"] - tokens_before) / sequences - response,
        "zero_advantage": logs["frac_reward_zero_std"],
        "reward": logs["reward"],
        "trained_share": 1.0,
    }


def main(settings_file: str, result_file: str) -> None:
    """Train, and write the times of all steps."""
    settings = json.loads(Path(settings_file).read_text())
    torch.set_num_threads(settings["threads"])
    lines = Path(settings["data"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["question"]}], "answer": r["answer"]} for r in rows]
    )
    clock = Clock()
    times = StepTimes(clock)
    trainer = GRPOTrainer(
        model=settings["model"],
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        reward_funcs=clock.timed("reward", reward_function),
        args=_config(settings, Path(result_file).parent / "trl"),
        train_dataset=dataset,
        callbacks=[times],
    )
    trainer.training_step = clock.timed("training_step", trainer.training_step)
    trainer._prepare_inputs = clock.timed("rollout", trainer._prepare_inputs)
    trainer.compute_loss = clock.timed("forward", trainer.compute_loss)
    trainer.train()
    sequences, before, steps = settings["prompts"] * settings["responses"], 0.0, []
    for row in times.rows:
        steps.append(_row(row, before, sequences))
        before = row["logs"]["num_tokens"]
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Path(result_file).write_text(json.dumps({"steps": steps, "peak_gib": peak_gib}))


if __name__ == "__main__":
    main(*sys.argv[1:])
