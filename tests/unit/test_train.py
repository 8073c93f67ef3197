"""Pieces of the loop that need no model."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mapo import preemption
from megatron_mapo.algorithms.advantages import estimate_advantages
from megatron_mapo.algorithms.kl import rewards_with_kl
from megatron_mapo.algorithms.metrics import rollout_metrics
from megatron_mapo.config import KLEstimator, load_config
from megatron_mapo.data.sequences import RIGHT, SUCCESS, SequenceBatch
from megatron_mapo.errors import ConfigError, Preempted
from megatron_mapo.train import Clock, Trainer

NEEDED = ["model.path=m", "data.train=d.jsonl"]
RATES = """
def rate(groups, config):
    return groups.per_response(groups.p)
"""


def trainer_of(*overrides: str) -> Trainer:
    """A trainer that has nothing but its configuration."""
    trainer = object.__new__(Trainer)
    trainer.config = load_config(None, [*NEEDED, *overrides])
    return trainer


def scored_batch() -> SequenceBatch:
    """Two groups of four; one truncated response of the first group is right, and was punished for its length."""
    ids, rewards = [0] * 4 + [1] * 4, [0.5, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    batch = SequenceBatch.from_responses([[1]] * 8, [[2] * n for n in range(1, 9)], rewards=rewards, group_ids=ids)
    batch.extra[RIGHT] = batch.rewards >= 0.5
    return batch


@pytest.mark.parametrize(("groups", "updates"), [(1, 1), (2, 2), (3, 3), (7, 3)])
def test_mini_batches_are_whole_groups_and_never_empty(groups: int, updates: int) -> None:
    config = load_config(None, ["model.path=m", "data.train=d.jsonl", "actor.mini_batches=3", "actor.epochs=2"])
    ids = [g for g in range(groups) for _ in range(4)]
    batch = SequenceBatch.from_responses([[1]] * len(ids), [[2]] * len(ids), group_ids=ids)
    parts = list(Trainer._mini_batches(SimpleNamespace(config=config, step=5), batch))  # type: ignore[arg-type]
    assert len(parts) == 2 * updates
    for some in (parts[:updates], parts[updates:]):
        assert sorted(torch.cat(some).tolist()) == list(range(len(ids)))
        assert all(len(part) % 4 == 0 and len(part) for part in some)


@pytest.mark.parametrize("shaping", [["reward.overlong_penalty=0.5"], ["actor.loss={kl_in: reward, kl_coef: 0.5}"]])
def test_an_estimator_of_the_user_sees_the_success_rates_that_are_logged(shaping: list[str], tmp_path: Path) -> None:
    (tmp_path / "rates.py").write_text(RATES)
    trainer = trainer_of(f"actor.adv_norm.aggregation_mode={tmp_path}/rates.py:rate", *shaping)
    batch = scored_batch()
    tokens = len(batch.rollout_logprobs)
    columns = {"old_logprobs": torch.zeros(tokens), "ref_logprobs": torch.linspace(-3, 0, tokens)}
    found = trainer._advantages(batch, columns)
    assert found.tolist() == [0.5] * 4 + [0.75] * 4
    logged = rollout_metrics(batch, found, trainer.config.actor.adv_norm, 0)
    assert logged["reward/accuracy"] == float(found.mean())


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7)])
def test_what_is_right_does_not_change_advantages_of_right_or_wrong_rewards(values: tuple[float, float]) -> None:
    trainer, batch = trainer_of(f"reward.wrong={values[0]}", f"reward.correct={values[1]}"), scored_batch()
    right = batch.extra[RIGHT]
    batch.rewards = torch.where(right, values[1], values[0])
    found = trainer._advantages(batch, {})
    plain = estimate_advantages(right.double(), batch.group_ids, trainer.config.actor.adv_norm)
    assert found.tolist() == plain.tolist()
    # A verifier that says what a success is has rewards of its own, which stay.
    batch.rewards = 1 + right.float()
    batch.extra[SUCCESS] = right
    assert not torch.equal(trainer._advantages(batch, {}), found)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_reward_changes_the_advantages(estimator: str) -> None:
    settings = [f"actor.loss={{kl_in: reward, kl_coef: 0.5, kl_estimator: {estimator}}}"]
    trainer, batch = trainer_of(*settings, "actor.adv_norm.aggregation_mode=rloo"), scored_batch()
    g = torch.Generator().manual_seed(0)
    columns = {name: -torch.rand(len(batch.rollout_logprobs), generator=g) for name in ("old_logprobs", "ref_logprobs")}
    found = trainer._advantages(batch, columns)
    kl = KLEstimator(estimator)
    shaped = rewards_with_kl(batch.rewards, *columns.values(), batch.response_sequence, 0.5, kl).double()
    mean_of_others = torch.stack([(shaped.view(2, 4).sum(1) - r) / 3 for r in shaped.view(2, 4).T], dim=1).flatten()
    torch.testing.assert_close(found.double(), shaped - mean_of_others, rtol=1e-6, atol=1e-6)
    trainer.config.actor.loss.kl_coef = 0.0
    without = trainer._advantages(batch, {})
    assert (found - without).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("metric", "samples", "extracts", "known"),
    [
        ("pass_at_1", 0, False, True),
        ("pass_at_4", 4, False, True),
        ("pass_at_4", 3, True, False),
        ("maj_at_4", 4, True, True),
        ("maj_at_4", 4, False, False),
        ("sampled_length_mean", 0, True, False),
        ("greedy_accuracy_low", 4, False, True),
        ("eval/pass_at_1", 4, True, False),
    ],
)
def test_what_keep_best_compares_is_known_before_training(
    metric: str, samples: int, extracts: bool, known: bool
) -> None:
    given = ["model.path=m", "data.train=d.jsonl", "data.eval=e.jsonl", f"trainer.best_metric={metric}"]
    config = load_config(None, [*given, f"trainer.evaluation.samples={samples}", "trainer.keep_best=true"])
    trainer: Any = SimpleNamespace(config=config)
    refused = pytest.raises(ConfigError, match=rf"trainer\.best_metric={metric} is not in an evaluation; there are")
    with nullcontext() if known else refused:
        Trainer._check_best_metric(trainer, extracts)
    config.trainer.keep_best = False
    Trainer._check_best_metric(trainer, extracts)


def test_a_phase_starts_when_it_begins_first_and_after_those_before_it() -> None:
    runtime, watchdog = SimpleNamespace(synchronize=lambda: None), SimpleNamespace(phase=lambda name: nullcontext())
    clock = Clock(runtime, watchdog)  # type: ignore[arg-type]
    for name in ("rollout", "update", "rollout"):
        with clock.phase(name):
            pass
    assert list(clock.starts) == list(clock.seconds) == ["rollout", "update"]
    assert 0 <= clock.starts["rollout"] < clock.starts["update"]


class Loop(Trainer):
    """``Trainer.run`` around steps that do nothing; ``asked`` is where the run gets a signal."""

    def __init__(self, step: int, asked: str) -> None:
        settings = ["model.path=m", "data.train=d.jsonl", "data.eval=e.jsonl", "trainer.steps=4"]
        self.config = load_config(
            None, [*settings, "trainer.evaluation.interval=2", "trainer.evaluation.at_start=false"]
        )
        self.step, self.asked, self.did = step, asked, []
        self.runtime: Any = SimpleNamespace(gather=lambda value: [value], is_main=True, broadcast=lambda value: value)
        self.watchdog: Any = SimpleNamespace(phase=lambda name: nullcontext())
        self.checkpointer: Any = SimpleNamespace(poll=lambda: None, wait=lambda: None)
        self.tracker: Any = SimpleNamespace(evaluated=lambda step: False)

    def _do(self, what: str) -> None:
        self.did.append(f"{what} {self.step}")
        if self.did[-1] == self.asked:
            signal.raise_signal(signal.SIGUSR1)

    def sync_weights(self) -> None:
        """There are no servers."""

    def train_step(self) -> None:
        self.step += 1
        self._do("step")

    def evaluate(self) -> dict[str, float]:
        self._do("evaluate")
        return {}

    def save(self, score: float | None = None) -> None:
        self._do("save")


@pytest.mark.parametrize(
    ("asked", "did"),
    [
        ("step 1", ["step 1", "save 1"]),
        ("step 2", ["step 1", "step 2", "save 2"]),
        ("evaluate 2", ["step 1", "step 2", "evaluate 2", "save 2"]),
    ],
)
def test_a_signal_goes_before_a_due_evaluation(asked: str, did: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    monkeypatch.setattr(preemption, "_received", set())
    preemption.install()
    try:
        loop = Loop(0, asked)
        with pytest.raises(Preempted, match=f"saved after step {asked[-1]}"):
            loop.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert loop.did == did


def test_checkpoints_are_written_without_being_asked_for() -> None:
    loop = Loop(0, "")
    loop.config.trainer.steps = 41
    loop.run()
    assert [what for what in loop.did if what.startswith("save")] == ["save 20", "save 40", "save 41"]


def test_the_next_start_makes_up_for_an_evaluation() -> None:
    loop = Loop(2, "")
    loop.run()
    assert loop.did == ["evaluate 2", "step 3", "step 4", "evaluate 4", "save 4"]
