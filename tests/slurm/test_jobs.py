"""Whole jobs on a real Slurm: `sbatch`, servers, trainers on two nodes, signals, dead nodes, a dead controller."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster import Cluster, wait_for
from conftest import REPOSITORY

GSM8K = REPOSITORY / "scripts/slurm/gsm8k_mapo.sh"
VARIES = ("time", "seconds", "speed", "memory", "mismatch")


def submit(cluster: Cluster, workspace: Path, script: Path, *arguments: str, options: tuple[str, ...] = (), **env: str) -> str:
    """Submit a script of the repository with the tiny configuration, from a folder that is not the repository."""
    settings = {"MAPO_CONFIG": str(workspace / "config.yaml"), "MAPO_TRAINERS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    settings["MAPO_TRAIN_PYTHON"] = sys.executable
    return cluster.client(
        *("sbatch", "--parsable", "--export=ALL", "--output=%x-%j.out", *options, str(script), *arguments),
        cwd=workspace,
        **(settings | env),
    ).strip()


def output(cluster: Cluster, number: str) -> str:
    """What a job has printed."""
    return Path(cluster.job(number)["StdOut"]).read_text()


def steps(run: Path) -> int:
    """Steps that a run has logged."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def numbers(run: Path) -> list[dict]:
    """What a run logged, but for clocks and the last bits of the servers' log-probs, which depend on their batches."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(VARIES)} for row in rows]


@pytest.fixture(scope="module")
def straight(cluster: Cluster, workspace: Path) -> Path:
    """An undisturbed run: two trainer nodes, one with a server."""
    options = ("--nodes=3", "--time=20", "--signal=B:USR1@60")
    number = submit(cluster, workspace, GSM8K, "run.name=straight", "trainer.steps=30", options=options)
    run = workspace / "runs/straight"
    wait_for(lambda: steps(run) >= 1 or cluster.state(number) == "FAILED", "the first step")
    key_is_nowhere = [line for node in cluster.nodes for line in cluster.commands(node) if "api" in line and "key" in line]
    assert cluster.wait_job(number) == "COMPLETED", output(cluster, number)
    assert key_is_nowhere == []
    return run


def test_a_job_runs_from_any_folder_and_leaves_nothing(straight: Path, idle: Cluster) -> None:
    assert steps(straight) == 30
    (logs,) = (straight / "logs").iterdir()
    assert {"job.log", "trainers.log", "servers.log", "servers-n3"} <= {entry.name for entry in logs.iterdir()}
    said = (logs / "job.log").read_text()
    assert "trainers on n1 n2; servers on n3" in said
    assert said.rstrip().endswith("done")
    for node in idle.nodes:
        left = [line for line in idle.commands(node) if "megatron" in line or "sglang" in line]
        assert left == []
