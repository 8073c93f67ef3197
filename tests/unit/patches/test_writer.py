"""Saving must not leave processes behind, so it starts none."""

from __future__ import annotations

import subprocess
import sys

# Without a ``__main__`` guard: a helper process would run the program again.
SAVER = """
import multiprocessing
from megatron_mapo.patches import megatron_core
megatron_core.apply()
from megatron.core.dist_checkpointing.strategies import filesystem_async
queue = filesystem_async._get_write_results_queue()
queue.put("written")
print(queue.get(), multiprocessing.active_children())
"""


def test_saving_starts_no_process() -> None:
    done = subprocess.run([sys.executable, "-c", SAVER], capture_output=True, text=True, timeout=120)
    assert done.stdout == "written []\n", done.stderr
