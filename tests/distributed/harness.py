"""Runs a function on several gloo processes of this machine and collects what each returns.

``launcher.run(2, "train", {...})`` calls ``distributed_cases.train(**{...})`` on two ranks. A launcher
process, started once, has imported what the ranks need and forks them, so that importing torch,
transformers and megatron is paid for once and not by every rank of every test. The store lives in
the calling process, so no port is guessed. A rank that fails takes the others with it, and the error
output of all of them is shown.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

HERE = Path(__file__).parent
AT_A_TIME = 12
MODULE = "distributed_cases"


class RankFailed(AssertionError):
    """A rank exited with an error, or not at all."""


class Launcher:
    """The process that forks ranks."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent.parent)]),
        }
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, ranks: int, function: str, arguments: dict[str, Any], timeout: float = 300) -> list[Any]:
        """Call ``function`` (a name in ``distributed_cases``) on every rank.

        Args:
            ranks: number of processes.
            arguments: keyword arguments, plain JSON.
            timeout: seconds for all of it.

        Returns:
            what each rank returned (plain JSON), in rank order.

        Raises:
            RankFailed: a rank failed or ran too long; the message holds the ranks' error output.
        """
        patience = timedelta(seconds=timeout)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            request = [ranks, function, arguments, store.port, name, timeout]
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if answer != "ok\n":
                logs = [f"--- {file.name}\n{file.read_text()[-4000:]}" for file in sorted(folder.glob("*.log"))]
                raise RankFailed("\n".join([answer.strip() or "the launcher is gone", *logs]))
            return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]

    def run_cases(
        self, ranks: int, function: str, cases: dict[str, Any], arguments: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """``run`` for many cases, ``AT_A_TIME`` in the same processes.

        gloo keeps threads for every process group that a process ever had, and more and more of them slow it down.

        Returns:
            what each rank returned for each case, where ``function`` returns a mapping.
        """
        found: list[dict[str, Any]] = [{} for _ in range(ranks)]
        names = list(cases)
        for start in range(0, len(names), AT_A_TIME):
            some = {name: cases[name] for name in names[start : start + AT_A_TIME]}
            for rank, answers in enumerate(self.run(ranks, function, {"cases": some} | arguments)):
                found[rank] |= answers or {}
        return found

    def close(self) -> None:
        """End the launcher, which waits for requests."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)


def _rank(rank: int, ranks: int, function: str, arguments: dict[str, Any], port: int, folder: Path) -> None:
    """The life of one rank; it never returns."""
    # A session of its own, so that the helpers that a checkpoint starts end with it.
    os.setsid()
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store is the caller's: rank 0 connects to it like the others.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    code = 1
    try:
        value = getattr(importlib.import_module(MODULE), function)(**arguments)
        (folder / f"{rank}.json").write_text(json.dumps(value))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: dict[int, int], timeout: float) -> str:
    """Until all ranks are done, one fails or the time is up; ends those that still run."""
    deadline = time.monotonic() + timeout
    running, verdict = dict(children), ""
    while running and not verdict:
        time.sleep(0.02)
        for pid, rank in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                if status and not verdict:
                    verdict = f"rank {rank} failed (status {status})"
        if time.monotonic() > deadline:
            verdict = f"no result within {timeout} s"
    if verdict:
        time.sleep(1.0)  # the first to exit is not always the first to fail: let the others say why
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return verdict or "ok"


def main() -> None:
    """The launcher: one request a line, until the caller is gone."""
    importlib.import_module(MODULE)
    for line in sys.stdin:
        ranks, function, arguments, port, folder, timeout = json.loads(line)
        children = {}
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _rank(rank, ranks, function, arguments, port, Path(folder))
            children[pid] = rank
        print(_wait(children, timeout), flush=True)


if __name__ == "__main__":
    main()
    # What torch and megatron would still tidy up takes long on a busy machine.
    os._exit(0)
