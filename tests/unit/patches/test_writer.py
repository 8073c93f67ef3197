"""Saving must not leave processes behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SAVER = """
import os, time
from megatron_mapo.patches import megatron_core
if __name__ == "__main__":
    megatron_core.apply()
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    queue = filesystem_async._get_write_results_queue()
    queue.put("written")
    assert queue.get() == "written"
    print(queue._manager._process.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_trainer_leaves_no_writer_behind(tmp_path: Path) -> None:
    (tmp_path / "saver.py").write_text(SAVER)
    saver = subprocess.Popen([sys.executable, str(tmp_path / "saver.py")], stdout=subprocess.PIPE, text=True)
    assert saver.stdout is not None
    manager = int(saver.stdout.readline())
    os.kill(manager, 0)
    saver.send_signal(signal.SIGKILL)
    saver.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{manager}").exists():
        assert time.monotonic() < deadline, "the manager of the write queue is still running"
        time.sleep(0.05)
