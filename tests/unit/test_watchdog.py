"""A hang ends the run also where its report cannot be written, and where no Python code can run any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_mapo.errors import HangError

RANK = """
import ctypes, sys, time
from pathlib import Path
from megatron_mapo.watchdog import Watchdog

dog = Watchdog(Path(sys.argv[1]), rank=0, world_size=1, timeout=1.0)
with dog.phase("done"):
    pass
{between}
with dog.phase("outer"):
    with dog.phase("inner"):
        {work}
    time.sleep(600)
"""
HOLDS = "ctypes.PyDLL(None).pause()"  # a call into C that keeps the interpreter's lock


def stand_still(folder: Path, work: str = "time.sleep(600)", between: str = "") -> tuple[int, str]:
    """Exit code and standard error of a rank that does ``between`` between two phases, and ``work`` in one."""
    command = [sys.executable, "-c", RANK.format(work=work, between=between), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_a_hang_is_reported(tmp_path: Path) -> None:
    code, said = stand_still(tmp_path / "hangs")
    assert code == HangError.exit_code
    assert "rank 0" in said
    assert "outer > inner" in said
    assert "Traceback" not in said
    assert {file.name for file in (tmp_path / "hangs").iterdir()} == {"rank_0.json", "rank_0.txt", "told"}


def test_a_report_that_cannot_be_written_ends_the_run_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said = stand_still(tmp_path / "file" / "hangs")
    assert code == HangError.exit_code
    assert "NotADirectoryError" in said
    assert "most recent call first" in said, "the stacks are nowhere else"


def test_a_rank_in_which_no_python_can_run_ends_by_itself(tmp_path: Path) -> None:
    code, said = stand_still(tmp_path / "hangs", HOLDS)
    assert code == 1
    assert "Timeout" in said
    assert "in <module>" in said


def test_a_filesystem_that_does_not_answer_keeps_no_hang_alive(tmp_path: Path) -> None:
    """A FIFO that nobody writes to stands for it: whoever opens it waits for ever."""
    os.mkfifo(tmp_path / "fifo")
    blocked = "dog.folder = type('Disk', (), {'exists': lambda self: open(sys.argv[1])})(); time.sleep(600)"
    code, said = stand_still(tmp_path / "fifo", blocked)
    assert code == 1
    assert "Timeout" in said


def test_time_between_phases_and_after_the_end_is_not_limited(tmp_path: Path) -> None:
    rest = "time.sleep(6)"  # more than a phase has before it is ended by force
    work = f"dog.close(); {rest}; sys.exit(0)"
    assert stand_still(tmp_path / "hangs", work, between=rest) == (0, "")
