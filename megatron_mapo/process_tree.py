"""End whole process trees, whatever their members do. Linux; only the standard library, so that keepers stay small."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

GRACE = 3.0
"""Seconds between asking a process to end and killing it."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Descendants whose parent ends become this process's children (a subreaper)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, however it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _descendants(pid: int) -> list[int]:
    """Process ids of all descendants of ``pid``, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        queue.extend(new := children.get(queue.pop(), []))
        found.extend(new)
    return found


def _kill(pids: list[int], sig: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, sig)
        except ProcessLookupError:
            continue


def end(child: subprocess.Popen) -> None:
    """End a child and all descendants of this process: SIGTERM to the child, then SIGKILL to whatever is left.

    Call ``adopt_orphans`` before the child starts, so that none can slip away.
    """
    if child.poll() is None:
        child.terminate()
        deadline = time.monotonic() + GRACE
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    while left := _descendants(os.getpid()):
        _kill(left, signal.SIGKILL)
        _reap()
        time.sleep(0.02)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return
