"""Trainers on two "nodes" by hand: two torchrun agents that meet on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from runs import environment, rows

from megatron_mapo.launch.environment import free_port


def wait_for(holds: Callable[[], object], agents: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        assert all(agent.poll() is None for agent in agents), "an agent ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_two_agents_start_their_ranks_again_after_one_was_killed(
    workspace: Path, server_url: str, tmp_path: Path
) -> None:
    run, port = workspace / "runs/elastic", free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
    overrides = [f"rollout.urls=[{server_url}]", "run.name=elastic", "trainer.steps=12"]
    train = ["-m", "megatron_mapo.train", "--config", str(workspace / "config.yaml"), *overrides]
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    agents: list[subprocess.Popen] = []
    try:
        for log in logs:
            with open(log, "wb") as output:
                command = [*torchrun, *rendezvous, *train]
                agents.append(subprocess.Popen(command, env=environment(), stdout=output, stderr=output))
        wait_for(lambda: (run / "checkpoints/step_000002").is_dir(), agents)
        (victim,) = psutil.Process(agents[1].pid).children()
        os.kill(victim.pid, signal.SIGKILL)
        codes = [agent.wait(timeout=200) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    printed = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], printed[-4000:]
    assert "resuming from" in printed
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))
