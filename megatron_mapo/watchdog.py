"""Ends a run in which some rank stands still, and says where every rank stood.

A thread of each rank watches how long it stays in one phase. When that takes longer than ``trainer.hang_timeout`` that
rank writes the stacks of its threads into the run's folder; the others see the file, and write theirs. The
lowest rank that can still answer prints one line a rank: its phase, and the collective or the line it stands in.
Then all exit, so that ``torchrun --max-restarts`` or Slurm starts them again from the last checkpoint. A
rank that does not answer is stopped, or its machine is gone.

Behind that thread stands another, of C code, which needs neither Python nor a disk: it ends a rank in which no Python
code can run any more, or whose watchdog waits for a filesystem that does not answer.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

from megatron_mapo.errors import HangError

_POLL_SECONDS = 5.0
_GRACE_POLLS = 3
"""Polls that the ranks wait for each other's stacks."""
_LAST_POLLS = 4 * _GRACE_POLLS
"""Polls that a report may take in all; then the process ends without one."""
_STDERR = 2


class Watchdog:
    """Watches the phases of this rank.

    Args:
        folder: where stacks are written; all ranks name the same one, which only a hang creates.
        rank: this rank.
        world_size: number of ranks.
        timeout: seconds that a phase may take.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.set_timeout(timeout)
        self._main = threading.get_ident()
        self._phases: list[str] = []
        self._changed = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def set_timeout(self, timeout: float) -> None:
        """Seconds that a phase may take from now on."""
        self.timeout = timeout
        self._poll = min(_POLL_SECONDS, timeout / 4)
        self._last = _LAST_POLLS * self._poll

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What this rank does inside the block, from the main thread; phases may be nested."""
        self._phases.append(name)
        self._begin()
        try:
            yield
        finally:
            self._phases.pop()
            self._begin()

    def _begin(self) -> None:
        """A phase has begun, or time between phases, which is not limited."""
        self._changed = time.monotonic()
        if self._phases and not self._closed.is_set():
            faulthandler.dump_traceback_later(self.timeout + self._last, exit=True, file=_STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(self._last)  # no longer: it may wait for a disk

    def _watch(self) -> None:
        while not self._closed.wait(self._poll):
            late = bool(self._phases) and time.monotonic() - self._changed > self.timeout
            if late or self.folder.exists():
                self._end()

    def _end(self) -> NoReturn:
        """Report and exit, whatever becomes of the report."""
        try:
            faulthandler.dump_traceback_later(self._last, exit=True, file=_STDERR)
            self._dump()
            self._report()
        except Exception:  # such as a full disk
            print(f"rank {self.rank}: no progress, and the report of it failed:", file=sys.stderr)
            traceback.print_exc()
            faulthandler.dump_traceback(_STDERR, all_threads=True)
        finally:
            os._exit(HangError.exit_code)

    def _dump(self) -> None:
        """Write ``rank_N.json`` (a summary) and ``rank_N.txt`` (the stacks)."""
        summary = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": " > ".join(self._phases) or "between phases",
            "seconds": round(time.monotonic() - self._changed, 1),
            "stands_in": standing_in(self._main),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank_{self.rank}.txt").open("w") as file:
            file.write("".join(f"{key}: {value}\n" for key, value in summary.items()) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        partial = self.folder / f".rank_{self.rank}.json"
        partial.write_text(json.dumps(summary))
        partial.rename(self.folder / f"rank_{self.rank}.json")

    def _report(self) -> None:
        """Wait for the others' summaries; the lowest rank that gave one prints them all.

        The others wait for it: when one process ends, a launcher ends the rest.
        """
        self._wait(lambda: len(list(self.folder.glob("rank_*.json"))) == self.world_size)
        found, told = read_summaries(self.folder), self.folder / "told"
        if self.rank == min(found):
            print_summaries(found, self.world_size, self.folder, self.timeout, sys.stderr)
            told.touch()
        self._wait(told.exists)

    def _wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _GRACE_POLLS * self._poll
        while not holds() and time.monotonic() < deadline:
            time.sleep(self._poll / 8)


def standing_in(thread: int) -> str:
    """The innermost line of a thread's stack outside torch and Python, and the collective that it called."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no Python code"
    stack = traceback.extract_stack(frame)
    library = sysconfig.get_paths()["stdlib"]
    index = len(stack) - 1
    while index > 0 and _is_inside(stack[index].filename, library):
        index -= 1
    place = f"{Path(stack[index].filename).name}:{stack[index].lineno} in {stack[index].name}"
    called = (f.name.lstrip("_") for f in stack[index + 1 :] if f.filename.endswith("distributed_c10d.py"))
    collective = next(called, None)
    return f"{collective}, called from {place}" if collective else place


def _is_inside(file: str, library: str) -> bool:
    """A file of torch or of Python itself."""
    return "/torch/" in file or (file.startswith(library) and "site-packages" not in file)


def read_summaries(folder: Path) -> dict[int, dict[str, object]]:
    """What the ranks wrote, by rank."""
    found = (json.loads(file.read_text()) for file in folder.glob("rank_*.json"))
    return {summary["rank"]: summary for summary in found}


def print_summaries(
    found: dict[int, dict[str, object]], world_size: int, folder: Path, timeout: float, out: TextIO
) -> None:
    """One line a rank, and where the stacks are."""
    lines = [f"error: no progress for {timeout:g} s (trainer.hang_timeout): all ranks end. They stand here:"]
    for rank in range(world_size):
        if rank in found:
            said = found[rank]
            lines.append(
                f"  rank {rank} ({said['host']}, pid {said['pid']}): {said['phase']} "
                f"for {said['seconds']} s, in {said['stands_in']}"
            )
        else:
            lines.append(f"  rank {rank}: no answer; it is stopped, or its machine is gone")
    lines.append(f"stacks of all threads: {folder}")
    print("\n".join(lines), file=out, flush=True)
