"""How the tests of this folder start runs and read what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

API_KEY = "a-key-for-tests"


def environment() -> dict[str, str]:
    """Of child processes: the server's key, and one thread each."""
    return {**os.environ, "MAPO_API_KEY": API_KEY, "OMP_NUM_THREADS": "1"}


def command(workspace: Path, *overrides: str, processes: int = 1) -> list[str]:
    """How a user starts the trainers by hand."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [
        *(sys.executable, *torchrun, "-m", "megatron_mapo.train"),
        *("--config", str(workspace / "config.yaml"), *overrides),
    ]


def run(arguments: Sequence[str], timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=timeout)


def rows(path: Path) -> list[dict]:
    """Rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
