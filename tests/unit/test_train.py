"""Pieces of the loop that need no model."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mapo.config import load_config
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import ConfigError
from megatron_mapo.train import Trainer


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
