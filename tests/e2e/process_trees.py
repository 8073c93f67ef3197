"""All processes that a command starts, so that a test can tell which are left."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

MARK = "MAPO_TEST_TREE"


class Tree:
    """A command in a process group of its own, and every descendant that was ever seen.

    Processes are looked for in two ways, because one that lost its parent is nobody's descendant and one that changed
    its title may have overwritten its environment: by parents, again and again, and by a variable in the environment.

    Args:
        command: program and arguments.
        env: its environment.
        log: file for what it prints.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env={**env, name: value}, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
        self._seen: set[psutil.Process] = set()  # equal by pid and start time
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def _look(self) -> None:
        while self.process.returncode is None:
            try:
                self._seen.update(psutil.Process(self.process.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                return
            time.sleep(0.1)

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def titles(self) -> set[str]:
        """Command lines of the descendants that run."""
        found = set()
        for process in set(self._seen):
            try:
                found.add(" ".join(process.cmdline()))
            except psutil.NoSuchProcess:
                continue
        return found

    def signal(self, number: signal.Signals) -> None:
        """Ctrl-C goes to the process group, as a terminal sends it; other signals to the command alone."""
        if number is signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait(self, timeout: float = 200.0) -> int:
        """The command's exit code."""
        return self.process.wait(timeout)

    def wait_until(self, holds: Callable[[], object], patience: float = 250.0) -> None:
        """Wait for something that the command does while it runs."""
        deadline = time.monotonic() + patience
        while not holds():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def wait_over(self, holds: Callable[[], object], patience: float = 60.0) -> None:
        """Wait for something that happens after its end."""
        deadline = time.monotonic() + patience
        while not holds():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def left(self, patience: float = 60.0) -> list[str]:
        """What still runs after a while; to be called when the command has ended."""
        self._watch.join()
        deadline = time.monotonic() + patience
        while (found := self._running()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _running(self) -> list[str]:
        marked = [process for process in psutil.process_iter() if self._is_marked(process.pid)]
        found = []
        for process in {*self._seen, *marked}:
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid}: {' '.join(process.cmdline())}")
            except psutil.NoSuchProcess:
                continue
        return found

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it ended, or is another user's
            return False

    def end(self) -> None:
        """Kill whatever is left. For a test that failed."""
        self.process.kill()
        self.process.wait()
        self._watch.join()
        for line in self._running():
            try:
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)
            except ProcessLookupError:
                continue
