"""The training loop. One step, in the order of the code below:

    prompts -> sampler (SGLang) -> SequenceBatch -> advantages -> policy.update -> weight sync

Started by ``torchrun -m megatron_mapo.train --config C [section.key=value ...]``, by
``python -m megatron_mapo.train`` (one process), or by ``megatron-mapo launch``. Every rank runs this
loop. Rank 0 alone talks to the servers, reads the data and writes the logs; what it finds is
broadcast, and so are its errors, so that no rank waits for one that has given up.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_mapo import checkpoint_files, preemption
from megatron_mapo.algorithms.advantages import estimate_advantages, get_estimator, group_statistics
from megatron_mapo.algorithms.aggregation import token_weights
from megatron_mapo.algorithms.correction import corrects
from megatron_mapo.algorithms.kl import rewards_with_kl
from megatron_mapo.algorithms.metrics import (
    HISTOGRAM_BINS,
    correction_metrics,
    mismatch_metrics,
    rollout_metrics,
    success_bins,
    update_metrics,
)
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.checkpoint_files import Measure, Retention
from megatron_mapo.config import Config, KLPlacement, OldLogprobs, Resume, load_config, to_yaml
from megatron_mapo.data.sequences import RIGHT, SUCCESS, SequenceBatch, ragged_indices
from megatron_mapo.errors import (
    CheckpointError,
    ConfigError,
    MainFailed,
    MapoError,
    Preempted,
    RewardError,
    RolloutError,
    ServersLost,
    ServersOut,
    TrainingError,
    WeightSyncError,
)
from megatron_mapo.hardware import settle_dtype
from megatron_mapo.health import Health
from megatron_mapo.megatron import checkpoint, runtime
from megatron_mapo.megatron.checkpoint import Checkpointer
from megatron_mapo.megatron.hf_folder import save_folder
from megatron_mapo.megatron.lora import save_adapter
from megatron_mapo.megatron.model import load_hf_config
from megatron_mapo.megatron.model_check import require_check
from megatron_mapo.megatron.policy import Policy, TokenScores, UpdateResult
from megatron_mapo.megatron.runtime import Runtime
from megatron_mapo.quickstart import resolve_model_path
from megatron_mapo.rollout.evaluation import metric_names, row_order
from megatron_mapo.rollout.session import RolloutSession
from megatron_mapo.run_lock import RunLock
from megatron_mapo.tracking import Tracker
from megatron_mapo.tracking.starts import describe_start
from megatron_mapo.watchdog import Watchdog

T = TypeVar("T")
W = TypeVar("W", bound=Iterator[tuple[str, Tensor]])


class Clock:
    """Seconds of each phase of a step, and seconds from the step's start to the phase's.

    Attributes:
        begin: when the step started.
    """

    def __init__(self, runtime: Runtime, watchdog: Watchdog) -> None:
        self.runtime, self.watchdog = runtime, watchdog
        self.seconds: dict[str, float] = {}
        self.starts: dict[str, float] = {}
        self.begin = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to ``name``; its start is that of the first time."""
        start = time.perf_counter()
        self.starts.setdefault(name, start - self.begin)
        with self.watchdog.phase(name):
            yield
            self.runtime.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Trainer:
    """All that a run holds on this rank.

    Attributes:
        step: finished steps; also the version of the weights that the servers have.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.run_dir = config.run_dir
        self.checkpoints = config.run_dir / "checkpoints"
        keep = config.trainer
        retention = Retention(keep.keep_checkpoints, keep.keep_every, keep.keep_best)
        self.checkpointer = Checkpointer(runtime, self.checkpoints, retention)
        self.step = 0
        self.health = Health(runtime, keep, self.run_dir)
        hangs = self.run_dir / "hangs" / runtime.broadcast(time.strftime("%Y%m%d-%H%M%S"))
        self.watchdog = Watchdog(hangs, runtime.rank, runtime.world_size, keep.hang_timeout)
        self.lock = RunLock(self.run_dir)
        self.rollout: RolloutSession | None = None
        self.tracker: Tracker | None = None

    def open(self) -> None:
        """Find the model, build the policy, connect to the servers, and resume if there is a checkpoint."""
        actor = self.config.actor
        self.on_every_rank(lambda: get_estimator(actor.adv_norm.aggregation_mode))
        with self.watchdog.phase("start"):
            self.model_path = self.on_main(self._prepare)
            self.on_every_rank(lambda: load_hf_config(self.model_path, self.config.model.fallback))
            updates = self.config.trainer.steps * actor.epochs * actor.mini_batches
            self.policy = Policy(self.config, self.runtime, self.model_path, updates)
            self.on_main(self._open_rollout)
            self._resume()
            self.on_main(self._open_tracker)

    def on_every_rank(self, check: Callable[[], object]) -> None:
        """What is missing on one machine alone (a package, a folder) is an error on all ranks before they wait."""
        failure = None
        try:
            check()
        except MapoError as error:
            failure = error
        for rank, found in enumerate(self.runtime.gather(failure)):
            if found is not None:
                raise type(found)(f"rank {rank}: {found}" if rank else str(found))

    def on_main(self, work: Callable[[], T]) -> T:
        """Rank 0's ``work()`` on every rank; if it fails there, the same error on every rank."""
        outcome: tuple[T | None, BaseException | None] | None = None
        if self.runtime.is_main:
            try:
                outcome = (work(), None)
            except MapoError as error:
                outcome = (None, error)
            except Exception as error:
                # A bug: the others end quietly, rank 0 keeps its traceback.
                self.runtime.broadcast((None, MainFailed(f"rank 0 failed: {type(error).__name__}: {error}")))
                raise
        value, failure = self.runtime.broadcast(outcome)
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def on_servers(self, work: Callable[[], T]) -> T:
        """``on_main(work)``; when no server is left, those that come back get the weights and ``work`` goes on."""
        while True:
            try:
                return self.on_main(work)
            except ServersOut as error:
                self._say(f"step {self.step}: {error}")
                self.sync_weights()

    def main_with(self, weights: W, work: Callable[[W], T]) -> T:
        """``work(weights)`` on rank 0 while all ranks bring the weights together; as ``on_main`` for errors.

        The iterator is exhausted whatever happens to ``work``: the other ranks take part in it.
        """

        def on_rank_0() -> T:
            try:
                return work(weights)
            finally:
                for _ in weights:
                    pass

        if not self.runtime.is_main:
            for _ in weights:
                pass
        return self.on_main(on_rank_0)

    def _prepare(self) -> Path:
        """Find the model, mend what a killed run has left, and refuse a run that is not to be resumed."""
        self._check_best_metric(extracts=True)  # whether there is an extractor shows when the verifier is loaded
        self.lock.acquire()
        for line in checkpoint_files.recover(self.checkpoints):
            print(line, flush=True)
        saved = checkpoint_files.complete_checkpoints(self.checkpoints)
        if saved and self.config.run.resume is Resume.never:
            raise CheckpointError(
                f"{self.run_dir} holds a checkpoint of step {saved[-1][0]} and run.resume=never: "
                "choose another run.name, remove the folder, or set run.resume=auto"
            )
        model = resolve_model_path(self.config.model.path)
        require_check(model, self.config.model.fallback, self.run_dir / "model_check.json")
        return model

    def _open_rollout(self) -> None:
        self.rollout = RolloutSession(self.config, self.model_path, self.runtime.device)
        self._check_best_metric(self.rollout.rewards.extracts)

    def _check_best_metric(self, extracts: bool) -> None:
        """Evaluations will report ``trainer.best_metric``; found out during training, steps would be lost."""
        settings = self.config.trainer
        if not settings.keep_best:
            return
        names = metric_names(settings.evaluation.samples, greedy=True, extracts=extracts)
        if settings.best_metric not in names:
            raise ConfigError(
                f"trainer.best_metric={settings.best_metric} is not in an evaluation; there are: {', '.join(names)}"
            )

    def _open_tracker(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "config.yaml").write_text(to_yaml(self.config))
        self.tracker = Tracker(self.run_dir, self.config.tracking, self.config.trainer.steps, self.step)
        self.tracker.log_start(describe_start(self.config, self.runtime.world_size, str(self.runtime.device)))

    def _resume(self) -> None:
        asked = self.config.run.resume_step
        chosen = self.on_main(lambda: self._choose_start(asked))
        if chosen is None:
            return
        step, path = chosen
        checkpoint.verify(self.runtime, path, self.config.trainer.verify_checkpoints)
        state = checkpoint.load(self.policy, self.runtime, path)
        self.step = step
        self.on_main(lambda: self._main_rollout.prompts.load_state_dict(state["prompts"]))
        for aside in self.on_main(lambda: checkpoint_files.set_aside_newer(self.checkpoints, step)):
            self._say(f"set aside {aside}: run.resume_step={step}")
        if asked is not None:
            # After that: a start that is killed before goes back again.
            self.on_main(lambda: checkpoint_files.note_return(self.checkpoints, asked))
        self._say(f"resuming from {path}")

    def _choose_start(self, asked: int | None) -> tuple[int, Path] | None:
        if asked is None:
            checkpoint_files.forget_return(self.checkpoints)
        elif checkpoint_files.went_back(self.checkpoints, asked):
            print(
                f"run.resume_step={asked}: an earlier start went back to it, so this one goes on from the newest "
                "checkpoint; after a start without the key it counts again",
                flush=True,
            )
        return checkpoint_files.choose_start(self.checkpoints, asked)

    def _say(self, text: str) -> None:
        if self.runtime.is_main:
            print(text, flush=True)

    @property
    def _main_rollout(self) -> RolloutSession:
        assert self.rollout is not None, "only rank 0 has a rollout session"
        return self.rollout

    @property
    def _main_tracker(self) -> Tracker:
        assert self.tracker is not None, "only rank 0 has a tracker"
        return self.tracker

    def open_and_run(self) -> None:
        """Open, train to the end and close.

        A run that its servers or its verifier end keeps its finished steps, one that ends by another error the
        checkpoint that is being written.
        """
        try:
            self.open()
            self.run()
        except (RolloutError, RewardError):
            self.save_progress()
            raise
        except MainFailed:
            raise
        except MapoError:
            self._complete_checkpoint()
            raise
        finally:
            self.close()

    def run(self) -> None:
        """Train to the end, from wherever the run stands."""
        settings = self.config.trainer
        with self.watchdog.phase("weight_sync"):
            self.sync_weights()
        due = settings.evaluation.at_start if self.step == 0 else self._evaluation_due()
        if due and not self.on_main(lambda: self._main_tracker.evaluated(self.step)):
            # Also one that the servers did not live to see before the run was started again.
            score = self._score(self.evaluate())
            if score is not None:
                self.checkpointer.add_score(self.step, score, self._measure())
        while self.step < settings.steps:
            with self.watchdog.phase(f"step {self.step + 1}"):
                self.train_step()
                self.checkpointer.poll()
            last = self.step == settings.steps
            # Before the checkpoint: it holds the score. A run that is to end leaves its evaluation to the next start.
            due = self._evaluation_due() and (last or not preemption.requested(self.runtime))
            score = self._score(self.evaluate()) if due else None
            stop = not last and preemption.requested(self.runtime)
            if last or stop or (settings.save_interval and self.step % settings.save_interval == 0):
                self.save(score)
            if stop:
                self.checkpointer.wait()
                raise Preempted(f"ended by a signal, saved after step {self.step}; the same command goes on from there")
        with self.watchdog.phase("end"):
            self.checkpointer.wait()
            if settings.export:
                self.export(self.run_dir / "export")

    def _evaluation_due(self) -> bool:
        settings = self.config.trainer
        if self.step == settings.steps:
            return settings.evaluation.at_end
        return settings.evaluation.interval > 0 and self.step % settings.evaluation.interval == 0

    def train_step(self) -> None:
        """One rollout batch, its update(s), and the new weights on the servers."""
        clock = Clock(self.runtime, self.watchdog)
        with clock.phase("rollout"):
            batch = self.on_servers(lambda: self._main_rollout.sample(self.step))
        columns, before = self.score(batch, clock)
        advantages = self._advantages(batch, columns)
        metrics = rollout_metrics(batch, advantages, self.config.actor.adv_norm, self.step)
        columns["advantages"] = advantages[batch.response_sequence]
        every = self.config.tracking.gradients_every
        if every and (self.step + 1) % every == 0:
            with clock.phase("gradients"):
                metrics |= self.gradient_norms(batch, columns)
        with clock.phase("update"):
            found, logprobs = self.update(batch, columns, before)
        metrics |= found
        self.step += 1
        try:
            with clock.phase("weight_sync"):
                self.sync_weights()
        except (ServersLost, WeightSyncError):
            # The step is done, and its checkpoint is about to be saved: it must not miss in the log.
            self._finish_step(batch, advantages, logprobs, metrics, clock)
            raise
        self._finish_step(batch, advantages, logprobs, metrics, clock)
        self.health.check_finite(self.step, metrics["optim/skipped"] > 0, batch)
        self._check_mismatch(metrics)

    def _finish_step(
        self,
        batch: SequenceBatch,
        advantages: Tensor,
        logprobs: Tensor,
        metrics: dict[str, float],
        clock: Clock,
    ) -> None:
        """Log a step that ends now."""
        seconds = time.perf_counter() - clock.begin
        metrics = metrics | {f"seconds/{name}": value for name, value in clock.seconds.items()}
        metrics |= {f"seconds_at/{name}": round(value, 4) for name, value in clock.starts.items()}
        metrics["seconds/step"] = seconds
        metrics["speed/response_tokens_per_second"] = int(batch.response_lens.sum()) / seconds
        metrics["speed/tokens_per_second"] = len(batch.tokens) / seconds
        metrics |= self.health.compare_ranks(self.policy.take_own_seconds())
        self.on_main(lambda: self._log(batch, advantages, logprobs, metrics))

    def score(self, batch: SequenceBatch, clock: Clock) -> tuple[dict[str, Tensor], TokenScores | None]:
        """Per-response-token columns that the loss needs from a forward pass, and the actor's scores if made."""
        loss = self.config.actor.loss
        columns: dict[str, Tensor] = {}
        before = None
        if loss.old_logprobs is OldLogprobs.rollout:
            columns["old_logprobs"] = batch.rollout_logprobs
        elif self.config.actor.mini_batches * self.config.actor.epochs > 1 or self._kl_in_reward:
            with clock.phase("old_logprobs"):
                before = self.policy.log_probs(batch)
            columns["old_logprobs"] = before.logprobs
        # With one update a rollout the old log-probs are those of the update's own forward pass.
        if loss.kl_coef > 0:
            with clock.phase("reference"):
                columns["ref_logprobs"] = self.policy.reference_log_probs(batch).logprobs
        if corrects(self.config.actor.correction):
            columns["rollout_logprobs"] = batch.rollout_logprobs
        return columns, before

    @property
    def _kl_in_reward(self) -> bool:
        loss = self.config.actor.loss
        return loss.kl_coef > 0 and loss.kl_in is KLPlacement.reward

    def _advantages(self, batch: SequenceBatch, columns: dict[str, Tensor]) -> Tensor:
        """Advantages, float32 ``[N]``. What is right is what the verifier said, whatever was done to its rewards."""
        rewards, right = self._rewards(batch, columns), batch.extra.get(RIGHT)
        return estimate_advantages(
            rewards, batch.group_ids, self.config.actor.adv_norm, right, graded=SUCCESS in batch.extra
        )

    def _rewards(self, batch: SequenceBatch, columns: dict[str, Tensor]) -> Tensor:
        """What the advantages are made of: the verifier's rewards, less the KL where that is in the reward."""
        if not self._kl_in_reward:
            return batch.rewards
        old, ref, loss = columns["old_logprobs"], columns["ref_logprobs"], self.config.actor.loss
        return rewards_with_kl(batch.rewards, old, ref, batch.response_sequence, loss.kl_coef, loss.kl_estimator)

    def update(
        self, batch: SequenceBatch, columns: dict[str, Tensor], before: TokenScores | None
    ) -> tuple[dict[str, float], Tensor]:
        """All optimizer steps on one rollout batch.

        Returns:
            what to log of them, and float32 ``[R]`` the log-probs of all response tokens before them; NaN where
            nobody computed them.
        """
        results: list[tuple[UpdateResult, Tensor]] = []
        for index in self._mini_batches(batch):
            part = batch.select(index)
            in_part = _response_tokens(batch, index)
            part_columns = {name: column[in_part] for name, column in columns.items()}
            part_columns["token_weight"] = self._token_weights(part)
            rows = self._rows_with_gradient(part, part_columns["advantages"])
            results.append((self.policy.update(part, part_columns, rows), in_part))
        metrics = self._update_metrics(batch, columns, before, results)
        if before is not None:
            return metrics, before.logprobs
        logprobs = torch.full_like(batch.rollout_logprobs, torch.nan)
        scores, tokens = results[0][0].scores, results[0][1]
        logprobs[tokens[scores.computed]] = scores.logprobs[scores.computed]
        return metrics, logprobs

    def _token_weights(self, batch: SequenceBatch) -> Tensor:
        loss, longest = self.config.actor.loss, self.config.rollout.max_response_tokens
        left_out = batch.truncated if loss.mask_truncated else None
        return token_weights(batch.response_lens, loss.aggregation, longest, left_out).float()

    def gradient_norms(self, batch: SequenceBatch, columns: dict[str, Tensor]) -> dict[str, float]:
        """``gradient/p_00`` ...: norm of the gradient that the groups of each success rate have in the batch's loss.

        The bins are those of ``group/p_hist_00`` ...; 0 where no sequence has a gradient.
        """
        columns = columns | {"token_weight": self._token_weights(batch)}
        groups = group_statistics(batch.rewards, batch.group_ids, self.config.actor.adv_norm, batch.extra.get(RIGHT))
        bins = success_bins(groups.p)[torch.searchsorted(groups.ids, batch.group_ids)]
        with_gradient = self._rows_with_gradient(batch, columns["advantages"])
        left = torch.arange(len(batch)) if with_gradient is None else with_gradient
        norms = {}
        for number in range(HISTOGRAM_BINS):
            rows = left[bins[left] == number]
            norms[f"gradient/p_{number:02d}"] = self.policy.gradient_norm(batch, columns, rows) if len(rows) else 0.0
        return norms

    def _mini_batches(self, batch: SequenceBatch) -> Iterator[Tensor]:
        """Sequence indices of each optimizer step: whole groups, in a new order every pass."""
        actor = self.config.actor
        if actor.mini_batches * actor.epochs == 1:
            yield torch.arange(len(batch))
            return
        groups = batch.group_ids.unique()
        generator = torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + self.step)
        for _ in range(actor.epochs):
            order = groups[torch.randperm(len(groups), generator=generator)]
            for chosen in order.tensor_split(min(actor.mini_batches, len(order))):
                yield torch.isin(batch.group_ids, chosen).nonzero().flatten()

    def _rows_with_gradient(self, batch: SequenceBatch, advantages: Tensor) -> Tensor | None:
        """Sequences that the update needs; None means all.

        Without KL and entropy terms a sequence of advantage 0 adds exactly nothing to the gradient. At
        least one group stays, so that every step compares the server's log-probs with the trainer's.
        """
        loss = self.config.actor.loss
        kl_in_loss = loss.kl_coef > 0 and not self._kl_in_reward
        if not self.config.actor.skip_zero_advantage or kl_in_loss or loss.entropy_coef > 0:
            return None
        rows = torch.zeros(len(batch), dtype=torch.bool)
        rows[batch.response_sequence[advantages != 0]] = True
        return (rows if rows.any() else batch.group_ids == batch.group_ids[0]).nonzero().flatten()

    def _update_metrics(
        self,
        batch: SequenceBatch,
        columns: dict[str, Tensor],
        before: TokenScores | None,
        results: list[tuple[UpdateResult, Tensor]],
    ) -> dict[str, float]:
        taken = [(r, tokens[r.scores.computed]) for r, tokens in results]
        index = torch.cat([tokens for _, tokens in taken])
        logprobs = torch.cat([r.scores.logprobs[r.scores.computed] for r, _ in results])
        entropy = torch.cat([r.scores.entropy[r.scores.computed] for r, _ in results])
        old = columns["old_logprobs"][index] if "old_logprobs" in columns else logprobs
        ref = columns["ref_logprobs"][index] if "ref_logprobs" in columns else None
        advantages, actor = columns["advantages"][index], self.config.actor
        # A sequence that is trained on twice is two: the policy has moved in between.
        again = torch.repeat_interleave(torch.arange(len(results)), torch.tensor([len(t) for _, t in taken]))
        sequences = TokenSequences(batch.response_sequence[index] + again * len(batch), len(batch) * len(results))
        metrics = update_metrics(logprobs, old, advantages, entropy, actor.loss, ref_logprobs=ref, sequences=sequences)
        if corrects(actor.correction):
            metrics |= correction_metrics(old, batch.rollout_logprobs[index], actor.correction, sequences)
        # Later updates of the same batch score it with weights that the server never had.
        unchanged = len(logprobs) if before is not None else int(results[0][0].scores.computed.sum())
        trainer = before.logprobs[index] if before is not None else logprobs
        metrics |= mismatch_metrics(trainer[:unchanged], batch.rollout_logprobs[index[:unchanged]])
        first, last = results[0][0], results[-1][0]
        return metrics | {
            "loss/total": sum(r.loss for r, _ in results) / len(results),
            "optim/grad_norm": max(r.grad_norm for r, _ in results),
            "optim/learning_rate": last.learning_rate,
            "optim/updates": float(len(results)),
            "optim/skipped": float(sum(r.skipped for r, _ in results)),
            "speed/packed_tokens": float(sum(r.packed_tokens for r, _ in results)),
            "speed/trained_share": float(first.scores.computed.double().mean()),
        }

    def sync_weights(self) -> None:
        """Give the servers the actor's weights, as version ``step``; again if all that were there failed."""
        while True:
            self.on_main(lambda: self._main_rollout.await_servers())
            try:
                weights = self.policy.named_weights()
                self.main_with(weights, lambda weights: self._main_rollout.update_weights(weights, self.step))
                return
            except ServersOut as error:
                self._say(f"weight sync: {error}")

    def evaluate(self) -> dict[str, float]:
        """Evaluate the servers' current weights on held-out prompts; nothing without ``data.eval``.

        Returns:
            what was logged, on every rank: ``pass_at_1``, ... (see ``rollout.evaluation.Tally.metrics``).
        """
        if self.config.data.eval is None:
            return {}
        samples: list[dict[str, Any]] = []
        with self.watchdog.phase("evaluation"):
            return self.on_servers(lambda: self._evaluate(samples))

    def _evaluate(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        found = self._main_rollout.evaluate(self.step, samples.extend)
        self._main_tracker.log_evaluation(self.step, found, sorted(samples, key=row_order))
        return found

    def _score(self, evaluation: dict[str, float]) -> float | None:
        """``trainer.best_metric`` of an evaluation, if it was measured."""
        return evaluation.get(self.config.trainer.best_metric)

    def _measure(self) -> Measure | None:
        """What scores of this run are numbers of; None on other ranks than 0."""
        if not self.runtime.is_main or self._main_rollout.held_out is None:
            return None
        settings, held_out = self.config.trainer, self._main_rollout.held_out
        return Measure(settings.best_metric, settings.evaluation.samples, held_out.fingerprint())

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint of everything; with ``trainer.async_save`` it is complete some steps later.

        Args:
            score: the evaluation at this step, if there was one.
        """
        with self.watchdog.phase("save"):
            self.on_main(lambda: self._main_tracker.flush())
            state = self.on_main(lambda: {"prompts": self._main_rollout.prompts.state_dict()})
            self.checkpointer.start(self.policy, self.step, state, score, None if score is None else self._measure())
            if not self.config.trainer.async_save:
                self.checkpointer.wait()

    def save_progress(self) -> None:
        """Save a checkpoint of the finished steps that no checkpoint has yet."""
        self.checkpointer.wait()
        saved = self.on_main(lambda: checkpoint_files.complete_checkpoints(self.checkpoints))
        if self.step > max((step for step, _ in saved), default=0):
            self.save()
            self.checkpointer.wait()
            self._say(f"saved a checkpoint of step {self.step}")

    def _complete_checkpoint(self) -> None:
        """Wait for a checkpoint that is being written. The run ends by another error, which is the one to be seen."""
        try:
            with self.watchdog.phase("end"):
                self.checkpointer.wait()
        except CheckpointError as error:
            self._say(f"warning: {error}")

    def export(self, out: Path) -> None:
        """Write the actor as a Hugging Face folder and, under LoRA, its adapters as PEFT's ``adapter/`` beside it."""
        self.main_with(self.policy.named_weights(), lambda weights: save_folder(weights, self.model_path, out))
        lora, base, model = self.config.actor.lora, self.config.model.path, self.model_path
        if lora.rank:
            adapters = self.policy.named_adapters()
            self.main_with(adapters, lambda weights: save_adapter(weights, lora, base, model, out.with_name("adapter")))

    def _log(self, batch: SequenceBatch, advantages: Tensor, logprobs: Tensor, metrics: dict[str, float]) -> None:
        self._main_tracker.log(self.step, metrics | self._main_rollout.server_metrics())
        self._main_tracker.log_rollouts(self.step, self._main_rollout.record(batch, advantages, logprobs))
        self._main_tracker.log_samples(
            self.step, self._main_rollout.describe(batch, advantages, self.config.tracking.samples)
        )

    def _check_mismatch(self, metrics: dict[str, float]) -> None:
        bound = self.config.rollout.max_logprob_diff
        if bound is not None and metrics["mismatch/abs_mean"] > bound:
            raise TrainingError(
                f"server and trainer disagree: mean |log-prob difference| {metrics['mismatch/abs_mean']:.3g} is above "
                f"rollout.max_logprob_diff={bound}. They should run the same weights, dtype and temperature"
            )

    def close(self) -> None:
        """Close connections, verifier processes and files, and give up a checkpoint that is still being written."""
        self.watchdog.close()
        self.checkpointer.close()
        if self.rollout is not None:
            self.rollout.close()
        if self.tracker is not None:
            self.tracker.close()
        self.lock.release()


def _response_tokens(batch: SequenceBatch, index: Tensor) -> Tensor:
    """Indices, among all response tokens of ``batch``, of those of the sequences ``index``, in that order."""
    return ragged_indices(batch.response_offsets[:-1][index], batch.response_lens[index])


def train(config: Config) -> None:
    """Run a whole configuration on this rank."""
    preemption.install()
    process = runtime.initialize(config)
    Trainer(config, process).open_and_run()
    process.close()


def main(argv: list[str] | None = None) -> int:
    """Entry point of every trainer process; returns the exit code."""
    from megatron_mapo.launch.arguments import parse_run

    try:
        config = settle_dtype(load_config(*parse_run("python -m megatron_mapo.train", argv)))
        train(config)
    except MapoError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            kind = "" if isinstance(error, Preempted) else "error: "
            print(f"{kind}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
