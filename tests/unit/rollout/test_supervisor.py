"""Which servers are started again, and how often."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mapo.config import ServerConfig
from megatron_mapo.errors import RolloutError
from megatron_mapo.rollout import server as server_module
from megatron_mapo.rollout import supervisor as supervisor_module
from megatron_mapo.rollout.server import Server
from megatron_mapo.rollout.supervisor import Supervisor


class Process:
    """A process instead of an SGLang server; it answers as long as it runs."""

    url = "http://127.0.0.1:1"

    def __init__(self, folder: Path) -> None:
        self.log, self.refuses = folder / "log", 0
        self._process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        if self.refuses:
            self.refuses -= 1
            raise OSError(12, "Cannot allocate memory")
        self._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def status(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def ready(self) -> bool:
        return self.status() is None

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    monkeypatch.setattr(supervisor_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(supervisor_module, "PROBE_SECONDS", 0.01)
    one = Process(tmp_path)
    yield one
    one.stop()


def supervisor(server: Process, lines: list[str]) -> Supervisor:
    config = ServerConfig(restarts=2, restart_delay=0.01)
    return Supervisor(SimpleNamespace(config=config, servers=[server]), lines.append)  # type: ignore[arg-type]


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def come_back(server: Process, lines: list[str]) -> None:
    """Kill it, and wait until it answers again."""
    before = sum("answers again" in line for line in lines)
    server.kill()
    wait_until(lambda: sum("answers again" in line for line in lines) > before)


def test_a_server_that_ends_again_and_again_is_given_up(server: Process) -> None:
    lines: list[str] = []
    with supervisor(server, lines) as watching:
        for _ in range(2):
            come_back(server, lines)
        watching.check()
        server.kill()
        wait_until(lambda: any("it is given up" in line for line in lines))
        with pytest.raises(RolloutError, match=r"rollout\.server\.restarts=2"):
            watching.check()


def test_a_server_that_was_well_for_long_has_all_its_starts_again(
    server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "STEADY_SECONDS", 0.0)
    lines: list[str] = []
    with supervisor(server, lines) as watching:
        for _ in range(5):
            come_back(server, lines)
            wait_until(lambda: watching._watches[0].restarts == 0)
        watching.check()
    assert not any("given up" in line for line in lines)


def test_a_start_that_fails_is_tried_again(server: Process) -> None:
    lines: list[str] = []
    with supervisor(server, lines) as watching:
        server.refuses = 1
        come_back(server, lines)
        assert [line for line in lines if "could not be started" in line and "Cannot allocate memory" in line]
        watching.check()
    server.refuses = 9
    lines.clear()
    with supervisor(server, lines) as watching:
        server.kill()
        wait_until(lambda: any("it is given up" in line for line in lines))
        with pytest.raises(RolloutError, match="could not be started"):
            watching.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_of_the_supervisor_is_told(server: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ready", lambda: 1 / 0)
    with supervisor(server, []) as watching:
        watching._thread.join(60)
        with pytest.raises(RuntimeError, match="supervisor"):
            watching.check()


def test_a_keeper_that_ended_before_it_got_its_order_can_be_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen

    def ended(*args: Any, **options: Any) -> subprocess.Popen:
        process = popen(*args, **options)
        process.wait()
        return process

    monkeypatch.setattr(server_module.sys, "executable", "/bin/true")
    monkeypatch.setattr(server_module.subprocess, "Popen", ended)
    server = Server("http://127.0.0.1:1", tmp_path / "log", [], None, {})
    with pytest.raises(BrokenPipeError):
        server.start()
    server.stop()
    assert server.status() is None
