"""A signal to any rank: the step is finished, everything is saved, and the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from harness import Launcher
from safetensors.torch import load_file
from test_whole_runs import Life, steps_logged, table, wait_until, workspace

from megatron_mapo import checkpoint_files

__all__ = ["workspace"]  # the fixture
SHORT = ("trainer.steps=40", "trainer.save_interval=0")


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGUSR1, "1"), (signal.SIGTERM, "0")])
def test_a_signal_to_any_rank_saves_and_ends_all(
    number: signal.Signals, rank: str, launcher: Launcher, workspace: Path
) -> None:
    straight, stopped = workspace / "runs/undisturbed", workspace / f"runs/stopped-{rank}"
    if not straight.exists():
        life = Life(launcher, workspace, "undisturbed", *SHORT)
        life.end()
        assert life.error is None, life.error
    life = Life(launcher, workspace, stopped.name, *SHORT)
    wait_until(lambda: steps_logged(stopped) >= 3, life)
    os.kill(int((life.pids / rank).read_text()), number)
    life.end()
    assert life.error is not None
    assert str(life.error).count("megatron_mapo.errors.Preempted: ended by a signal, saved after step") >= 1
    ((saved, path),) = checkpoint_files.complete_checkpoints(stopped / "checkpoints")
    assert saved == steps_logged(stopped) < 40
    assert checkpoint_files.verify(path) is not None
    life = Life(launcher, workspace, stopped.name, *SHORT)
    life.end()
    assert life.error is None, life.error
    here, there = load_file(stopped / "export/model.safetensors"), load_file(straight / "export/model.safetensors")
    assert all(torch.equal(here[name], there[name]) for name in there)
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        assert table(stopped / name) == table(straight / name)
