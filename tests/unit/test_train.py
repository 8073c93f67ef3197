"""Pieces of the loop that need no model."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mapo import preemption
from megatron_mapo.config import load_config
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import Preempted
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


def test_the_next_start_makes_up_for_an_evaluation() -> None:
    loop = Loop(2, "")
    loop.run()
    assert loop.did == ["evaluate 2", "step 3", "step 4", "evaluate 4", "save 4"]
