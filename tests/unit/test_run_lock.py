"""The lock on a run's folder, between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_mapo.errors import ConfigError
from megatron_mapo.run_lock import RunLock

HOLDER = """
import subprocess, sys
from pathlib import Path
from megatron_mapo.run_lock import RunLock

lock = RunLock(Path(sys.argv[1]))
lock.acquire()
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_holder_frees_it_also_while_its_children_live(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = psutil.Process(int(holder.stdout.readline()))
    lock = RunLock(folder)
    try:
        with pytest.raises(ConfigError, match=r"run\.name: another start .*/one"):
            RunLock(folder, patience=0.0).acquire()
        RunLock(tmp_path / "runs" / "two").acquire()
        os.kill(holder.pid, signal.SIGKILL)
        lock.acquire()
        assert child.is_running()
    finally:
        child.kill()
        holder.kill()
        holder.communicate()
    with pytest.raises(ConfigError):
        RunLock(folder, patience=0.0).acquire()
    lock.release()
    RunLock(folder).acquire()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"run\.output_dir: cannot write to .*file/run"):
        RunLock(tmp_path / "file" / "run").acquire()
