"""Whole runs whose servers are killed, join, leave, and are all gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import API_KEY, command, environment, rows, run

from megatron_mapo.config import Dtype, ModelConfig, ServerConfig
from megatron_mapo.rollout.server import ServerGroup

STEPS = 40


@pytest.fixture
def pair(workspace: Path, tmp_path: Path) -> Iterator[ServerGroup]:
    """Two servers that nobody starts again."""
    config = ServerConfig(port=0, count=2, threads=1, max_total_tokens=8192, startup_timeout=240.0)
    with ServerGroup(config, ModelConfig(str(workspace / "model"), Dtype.float32), tmp_path / "logs", API_KEY) as group:
        yield group


def wait_for(condition: Callable[[], object], child: subprocess.Popen, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.02)


def steps(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return rows(file) if file.exists() else []


def descendants(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *descendants(child)]
    return found


def kill(pid: int, sig: signal.Signals = signal.SIGKILL) -> None:
    """A signal to a process and all its descendants."""
    for one in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):  # the kernel was faster
            os.kill(one, sig)


def numbers(table: list[dict]) -> list[dict]:
    """Of each step what does not depend on which server did what."""
    return [{k: row[k] for k in ("step", "reward/mean", "response/length_mean", "loss/total")} for row in table]


@pytest.fixture
def calm(workspace: Path) -> Iterator[Path]:
    """A file that lets the verifier `slowly_even` be quick, from when the test makes it."""
    file = workspace / "calm"
    yield file
    file.unlink(missing_ok=True)


@pytest.mark.slow
def test_servers_join_leave_and_are_all_gone(
    workspace: Path, pair: ServerGroup, server_url: str, tmp_path: Path, calm: Path
) -> None:
    straight = run(command(workspace, f"rollout.urls=[{server_url}]", "run.name=calm", f"trainer.steps={STEPS}"))
    assert straight.returncode == 0, straight.stderr
    undisturbed = steps(workspace / "runs/calm")

    first, second = pair.urls
    file, run_dir = tmp_path / "servers", workspace / "runs/stormy"
    file.write_text(f"{first}\n")
    slow = f"{workspace / 'verifiers.py'}:slowly_even"
    settings = ["run.name=stormy", f"trainer.steps={STEPS}", "trainer.save_interval=0", f"reward.name={slow}"]
    arguments = command(workspace, *settings, f"rollout.urls_file={file}", "rollout.wait_timeout=3")
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        child = subprocess.Popen(arguments, env=environment(), stdout=out, stderr=err)
    try:
        wait_for(lambda: len(steps(run_dir)) >= 1, child)
        file.write_text(f"{first}\n{second}\n")
        wait_for(lambda: steps(run_dir)[-1]["servers/serving"] == 2, child)
        file.write_text(f"{second}\n")
        wait_for(lambda: steps(run_dir)[-1]["servers/total"] == 1, child)
        kill(pair.servers[0].pid)  # it left: nobody minds
        done = len(steps(run_dir))
        wait_for(lambda: len(steps(run_dir)) > done, child)
        kill(pair.servers[1].pid)
        assert child.wait(timeout=120) == 5
    finally:
        child.kill()
        child.wait()
    error = (tmp_path / "err").read_text()
    assert "rollout.wait_timeout=3" in error
    assert f"{second} is out" in error
    assert "Traceback" not in error
    assert f"server {first} leaves" in (tmp_path / "out").read_text()
    finished = len(steps(run_dir))
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == [f"step_{finished:06d}"]
    assert finished < STEPS

    file.write_text(f"{server_url}\n")
    calm.touch()
    again = run(arguments)
    assert again.returncode == 0, again.stderr
    assert numbers(steps(run_dir)) == [
        {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in row.items()} for row in numbers(undisturbed)
    ]


@pytest.mark.slow
def test_launched_servers_that_are_killed_or_hang_are_started_again(workspace: Path, calm: Path) -> None:
    arguments = [sys.executable, "-m", "megatron_mapo", "launch", "local", "--config", str(workspace / "config.yaml")]
    faults = ["rollout.server.count=3", "rollout.server.hang_timeout=30", "rollout.probe_timeout=10"]
    slow = f"reward.name={workspace / 'verifiers.py'}:slowly_even"
    run_dir = workspace / "runs/faulty"
    log = workspace / "faulty.log"
    with open(log, "w") as out:
        child = subprocess.Popen(
            [*arguments, "run.name=faulty", f"trainer.steps={STEPS}", "trainer.save_interval=0", slow, *faults],
            env=environment(),
            stdout=out,
            stderr=out,
        )
    try:
        wait_for(lambda: len(steps(run_dir)) >= 1, child)
        servers = [pid for pid in descendants(child.pid) if b"--serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        killed, hung, _ = servers
        kill(killed)
        kill(hung, signal.SIGSTOP)
        # Which is back before the other is out is a matter of the machine: only the end is certain.
        wait_for(lambda: sum(row["servers/restarts"] for row in steps(run_dir)) >= 2, child)
        wait_for(lambda: steps(run_dir)[-1]["servers/serving"] == 3, child)
        calm.touch()
        assert child.wait(timeout=200) == 0, log.read_text()
    finally:
        child.terminate()
        child.wait()
    table = steps(run_dir)
    assert len(table) == STEPS
    assert sum(row["servers/restarts"] for row in table) >= 2  # a healthy one may be silent for long on a busy machine
    assert all(row["group/count"] == 4 and row["staleness/max"] == 0 for row in table)
    assert all(0 < row["mismatch/abs_max"] < 1e-3 for row in table)
    text = log.read_text()
    assert "ended with status 137; start 1 of 3" in text
    assert "(rollout.server.hang_timeout); start 1 of 3" in text
