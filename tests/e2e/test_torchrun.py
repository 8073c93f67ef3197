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
from runs import command, environment, rows
from runs import run as run_command

from megatron_mapo.checkpoint_files import complete_checkpoints
from megatron_mapo.ports import free_port


def wait_for(holds: Callable[[], object], agents: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert all(agent.poll() is None for agent in agents), "an agent ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def numbers(folder: Path) -> list[dict]:
    """What a run logged, but for clocks and the last bits of the server's log-probs."""
    varies = ("time", "seconds", "speed", "memory", "mismatch", "servers", "rollout")
    return [{k: v for k, v in row.items() if not k.startswith(varies)} for row in rows(folder / "metrics.jsonl")]


def kill(agent: subprocess.Popen, *, whole: bool) -> None:
    """SIGKILL to the rank of an agent, and to the agent itself, as when its machine is gone."""
    (rank,) = psutil.Process(agent.pid).children()
    if whole:
        agent.kill()
        agent.wait()
    os.kill(rank.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_agents_go_on_after_a_rank_and_an_agent_were_killed_and_save_when_they_are_asked_to_end(
    workspace: Path, server_url: str, tmp_path: Path
) -> None:
    run, port = workspace / "runs/elastic", free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=5"]
    torchrun += ["--shutdown-timeout=200", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    overrides = [f"rollout.urls=[{server_url}]", "trainer.steps=24"]
    train = ["-m", "megatron_mapo.train", "--config", str(workspace / "config.yaml"), *overrides, "run.name=elastic"]
    logs: list[Path] = []
    agents: list[subprocess.Popen] = []

    def start(life: str, number: int) -> subprocess.Popen:
        logs.append(tmp_path / f"{len(logs)}.log")
        # A store of its own for each start lets an agent join that was started again (docs/slurm.md).
        own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if life == "second" else {}
        with open(logs[-1], "wb") as output:
            arguments = [*torchrun, f"--rdzv-id={life}", f"--rdzv-conf=is_host={int(number == 0)}", *train]
            return subprocess.Popen(arguments, env=environment() | own, stdout=output, stderr=output)

    def printed() -> str:
        return "".join(log.read_text() for log in logs)

    def saved() -> int:
        return max((step for step, _ in complete_checkpoints(run / "checkpoints")), default=0)

    def go_on() -> None:
        before = saved()
        wait_for(lambda: saved() > before + 1, agents)

    try:
        agents += [start("first", 0), start("first", 1)]
        go_on()
        kill(agents[1], whole=False)
        go_on()
        for agent in agents:
            agent.terminate()
        ended = [agent.wait(timeout=300) for agent in agents]
        assert 0 not in ended, printed()[-4000:]
        assert saved() == len(rows(run / "metrics.jsonl")) < 24, printed()[-4000:]
        assert "ended by a signal, saved after step" in printed()
        agents = [start("second", 0), start("second", 1)]
        go_on()
        kill(agents[1], whole=True)
        agents[1] = start("second", 1)
        codes = [agent.wait(timeout=400) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert codes == [0, 0], printed()[-4000:]
    assert printed().count("resuming from") >= 3
    undisturbed = run_command(command(workspace, *overrides, "run.name=two-ranks", processes=2))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert numbers(run) == numbers(workspace / "runs/two-ranks")
