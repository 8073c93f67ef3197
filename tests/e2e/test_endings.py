"""One job with ``launch local`` and ``launch ray``: the same numbers, and nothing is left of it however it ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from process_trees import Tree
from runs import environment, rows

from megatron_mapo import checkpoint_files
from megatron_mapo.errors import Preempted, RewardError

STEPS = 3
SLOW = pytest.mark.slow
BOTH = ["local", "ray"]


@pytest.fixture
def start(workspace: Path, tmp_path: Path) -> Iterator[Callable[..., Tree]]:
    """``start("ray", "run.name=x")`` launches a run; what is left after the test is killed."""
    trees: list[Tree] = []

    def launch(where: str, *arguments: str) -> Tree:
        if where == "ray":
            pytest.importorskip("ray")
            arguments = ("--cpus-per-trainer", "0.5", *arguments)
        command = [sys.executable, "-m", "megatron_mapo", "launch", where]
        command += ["--config", str(workspace / "config.yaml"), "trainer.evaluation.at_start=false", *arguments]
        trees.append(Tree(command, environment(), tmp_path / f"{where}.log"))
        return trees[-1]

    yield launch
    for tree in trees:
        tree.end()


def logged(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return rows(file) if file.exists() else []


def numbers(run: Path) -> list[dict]:
    keys = ("step", "reward/mean", "response/length_mean", "loss/total", "optim/grad_norm")
    return [{key: pytest.approx(row[key], rel=1e-4, abs=1e-6) for key in keys} for row in logged(run)]


@pytest.fixture(scope="module")
def alone(workspace: Path) -> Path:
    """The job with two ranks under ``launch local``."""
    command = [sys.executable, "-m", "megatron_mapo", "launch", "local", "--config", str(workspace / "config.yaml")]
    tree = Tree([*command, "--nproc", "2", "run.name=both-local"], environment(), workspace / "both-local.log")
    try:
        assert tree.wait() == 0, tree.text()
        assert tree.left() == []
    finally:
        tree.end()
    return workspace / "runs/both-local"


def test_ray_does_what_local_does(alone: Path, workspace: Path, start: Callable[..., Tree]) -> None:
    tree = start("ray", "--nproc", "2", "run.name=both-ray", "trainer.evaluation.at_start=true")
    assert tree.wait() == 0, tree.text()
    assert tree.left() == []
    here = logged(workspace / "runs/both-ray")
    assert len(here) == STEPS
    assert [{key: row[key] for key in want} for row, want in zip(here, numbers(alone), strict=True)] == numbers(alone)
    (logs,) = (workspace / "runs/both-ray/logs").iterdir()
    assert {"rank-0.log", "rank-1.log", "server-0.log", "server-0"} == {entry.name for entry in logs.iterdir()}
    assert "step 3/3" in tree.text()


@pytest.mark.parametrize(
    ("where", "number", "code"),
    [
        ("local", signal.SIGTERM, Preempted.exit_code),
        ("local", signal.SIGKILL, -signal.SIGKILL),
        ("ray", signal.SIGKILL, -signal.SIGKILL),
        pytest.param("ray", signal.SIGTERM, Preempted.exit_code, marks=SLOW),
        pytest.param("local", signal.SIGINT, 128 + signal.SIGINT, marks=SLOW),
        pytest.param("ray", signal.SIGINT, 128 + signal.SIGINT, marks=SLOW),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_leaves_nothing(
    where: str, number: signal.Signals, code: int, workspace: Path, start: Callable[..., Tree]
) -> None:
    """SIGTERM saves first."""
    run = workspace / f"runs/{where}-{number.name}"
    tree = start(where, f"run.name={run.name}", "trainer.steps=100000", "trainer.save_interval=0", "--nproc", "2")
    tree.wait_until(lambda: len(logged(run)) >= 2)
    running = tree.titles()
    assert len([title for title in running if "-m megatron_mapo.train" in title]) >= 2, running
    assert any("server_main --serve" in title for title in running), running
    tree.signal(number)
    assert tree.wait() == code, tree.text()
    assert tree.left() == []
    if number is signal.SIGTERM:
        ((saved, path),) = checkpoint_files.complete_checkpoints(run / "checkpoints")
        assert saved == len(logged(run))
        assert checkpoint_files.verify(path) is not None


@pytest.mark.parametrize("where", ["local", pytest.param("ray", marks=SLOW)])
def test_an_error_of_the_trainers_is_the_exit_code(
    where: str, workspace: Path, server_url: str, start: Callable[..., Tree]
) -> None:
    broken = f"reward.name={workspace / 'verifiers.py'}:broken"
    tree = start(where, f"run.name={where}-broken", broken, f"rollout.urls=[{server_url}]", "--nproc", "2")
    assert tree.wait() == RewardError.exit_code, tree.text()
    assert "no such answer" in tree.text()
    assert tree.left() == []
