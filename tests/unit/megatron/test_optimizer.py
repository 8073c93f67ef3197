"""Learning rates of a whole run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_model

from megatron_mapo.config import Config, LRSchedule
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.megatron.policy import Policy
from megatron_mapo.megatron.runtime import Runtime

UPDATES, WARMUP, PEAK = 6, 2, 0.25


def expected(schedule: LRSchedule, update: int) -> float:
    """Update 1, 2, ... of the run: up in a line, then down towards 0, which comes right after the last update."""
    if update <= WARMUP:
        return PEAK * update / WARMUP
    passed = (update - WARMUP) / (UPDATES + 1 - WARMUP)
    if schedule is LRSchedule.constant:
        return PEAK
    return PEAK * (1 - passed if schedule is LRSchedule.linear else 0.5 * (1 + math.cos(math.pi * passed)))


@pytest.mark.parametrize("schedule", LRSchedule)
def test_learning_rates(schedule: LRSchedule, config: Config, runtime: Runtime, tmp_path: Path) -> None:
    config.actor.optim.lr, config.actor.optim.schedule, config.actor.optim.warmup_steps = PEAK, schedule, WARMUP
    policy = Policy(config, runtime, make_tiny_model(tmp_path / "model"), UPDATES)
    batch = SequenceBatch.from_responses([[1]], [[2]])
    columns = {"advantages": torch.zeros(1), "token_weight": torch.ones(1)}
    found = [policy.update(batch, columns).learning_rate for _ in range(UPDATES)]
    assert found == pytest.approx([expected(schedule, k + 1) for k in range(UPDATES)])


def test_the_gradient_of_a_part_is_that_of_an_update_with_it(config: Config, runtime: Runtime, tmp_path: Path) -> None:
    """And measuring it changes neither weights nor the update that follows."""
    model = make_tiny_model(tmp_path / "model")
    batch = SequenceBatch.from_responses([[1, 2]] * 4, [[3, 4], [5], [6, 7, 8], [9]], group_ids=[0, 0, 1, 1])
    columns = {"advantages": torch.linspace(-1, 2, 7), "token_weight": torch.full((7,), 1 / 7)}
    everything, part = torch.arange(4), torch.tensor([2, 3])
    measured, plain, of_part = (Policy(config, runtime, model, UPDATES) for _ in range(3))
    norms = {name: measured.gradient_norm(batch, columns, rows) for name, rows in (("all", everything), ("part", part))}
    assert measured.take_own_seconds() == 0
    result = measured.update(batch, columns)
    assert norms["all"] > 0
    assert norms["all"] == pytest.approx(plain.update(batch, columns).grad_norm, rel=1e-6)
    assert norms["part"] == pytest.approx(of_part.update(batch, columns, rows=part).grad_norm, rel=1e-6)
    assert norms["part"] != pytest.approx(norms["all"], rel=1e-2)
    assert result.grad_norm == pytest.approx(norms["all"], rel=1e-6)
    for (name, found), (_, expected) in zip(measured.named_weights(), plain.named_weights(), strict=True):
        assert torch.equal(found, expected), name
