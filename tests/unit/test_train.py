"""Pieces of the loop that need no model."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from megatron_mapo.config import load_config
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.train import Clock, Trainer


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


def test_a_phase_starts_when_it_begins_first_and_after_those_before_it() -> None:
    runtime, watchdog = SimpleNamespace(synchronize=lambda: None), SimpleNamespace(phase=lambda name: nullcontext())
    clock = Clock(runtime, watchdog)  # type: ignore[arg-type]
    for name in ("rollout", "update", "rollout"):
        with clock.phase(name):
            pass
    assert list(clock.starts) == list(clock.seconds) == ["rollout", "update"]
    assert 0 <= clock.starts["rollout"] < clock.starts["update"]
