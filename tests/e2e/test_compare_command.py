"""``megatron-mapo compare`` with real runs: two configurations, two seeds, stopped once and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import environment, rows, run

from megatron_mapo.tracking.rollouts import read_rollouts, rollout_files


def steps(folder: Path) -> list[int]:
    """Steps that a run has logged."""
    file = folder / "metrics.jsonl"
    return [row["step"] for row in rows(file)] if file.exists() else []


def stop_inside(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Start a command, and end it as Ctrl-C does when the trainers of the run in ``folder`` have started.

    They finish the step that they are in: later, that could be the run's last one.
    """
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 280
        while not (folder / "starts.jsonl").exists():
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=120)
    return subprocess.CompletedProcess(command, child.returncode, "", said)


@pytest.mark.slow
def test_a_comparison_is_stopped_and_goes_on(workspace: Path, server_url: str) -> None:
    (workspace / "native.yaml").write_text("base: config.yaml\nactor: {adv_norm: {aggregation_mode: native}}\n")
    folder = workspace / "runs/both"
    command = [
        *(sys.executable, "-m", "megatron_mapo", "compare", "--name", "both", "--seeds", "2", "--baseline", "native"),
        *("--config", str(workspace / "config.yaml"), "--config", str(workspace / "native.yaml")),
        *(f"rollout.urls=[{server_url}]", "trainer.steps=2", "trainer.evaluation.samples=2"),
    ]
    stopped = stop_inside(command, folder / "native-seed0")
    assert stopped.returncode == 128 + signal.SIGINT
    assert "the same command goes on" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert len(steps(folder / "native-seed0")) < 2
    first = (folder / "config-seed0/metrics.jsonl").read_bytes()
    assert not (folder / "report").exists()

    done = run(command, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{folder / 'report/report.html'}\n"
    assert (folder / "config-seed0/metrics.jsonl").read_bytes() == first, "a finished run was run again"
    for label in ("config", "native"):
        for seed in (0, 1):
            at = folder / f"{label}-seed{seed}"
            assert steps(at) == [1, 2]
            tables = [read_rollouts(file) for file in rollout_files(at / "rollouts")]
            assert [table["step"].to_pylist() for table in tables] == [[1] * 16, [2] * 16]
            assert [set(table["weight_version_max"].to_pylist()) for table in tables] == [{0}, {1}]
            gaps = [gap for table in tables for gap in table["logprob_diff_abs_mean"].to_pylist() if gap is not None]
            assert gaps
            assert max(gaps) < 1e-3

    summary = json.loads((folder / "report/summary.json").read_text())
    assert summary["baseline"] == "native"
    assert summary["seeds"] == [0, 1]
    assert summary["largest_difference_before_training"] == 0, "the same seed must answer alike before training"
    assert summary["differences"] == {"actor.adv_norm.aggregation_mode": ["native", "mix"]}
    (contrast,) = summary["held_out"]["contrasts"]
    assert (contrast["estimate"]["seeds"], contrast["estimate"]["questions"]) == (2, 4)

    again = run(command)
    assert again.returncode == 0, again.stderr
    assert "run 1 of 4" not in again.stderr, "nothing is left to run"

    page = run([sys.executable, "-m", "megatron_mapo", "report", str(folder / "native-seed0")])
    assert page.returncode == 0, page.stderr
    assert "trainers started again after step" in (folder / "native-seed0/report.html").read_text()


@pytest.mark.slow
def test_a_run_that_fails_ends_the_comparison_with_its_exit_code(workspace: Path) -> None:
    command = [
        *(sys.executable, "-m", "megatron_mapo", "compare", "--config", str(workspace / "config.yaml"), "--seeds", "1"),
        *("--name", "broken", "model.path=/no/such/model"),
    ]
    done = run(command)
    assert done.returncode == 3, done.stderr
    assert "config-seed0 ended with exit code 3" in done.stderr
    assert "/no/such/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(workspace / "runs/broken/logs")
