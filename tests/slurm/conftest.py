"""A Slurm cluster of four nodes, and a tiny task."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs, slurm_cluster, wait_for
from tiny_models import make_tiny_model

VERIFIER = '''import time


def even(response, answer, metadata):
    """About half of all responses are right, whatever the model says."""
    return sum(map(ord, response)) % 2 == 0


def slowly_even(response, answer, metadata):
    time.sleep(0.1)
    return even(response, answer, metadata)
'''

ESTIMATOR = '''import os
import time
from pathlib import Path

from megatron_mapo.algorithms.advantages import ESTIMATORS


def hangs_once(groups, config):
    """The default, but the third step of a run's first start hangs on every rank."""
    step = Path(f"{os.environ['HANG_FILE']}-{os.environ['RANK']}")
    done = int(step.read_text()) if step.exists() else 0
    step.write_text(str(done + 1))
    while done == 2:
        time.sleep(1)
    return ESTIMATORS["mix"](groups, config)
'''


STAND_IN = """#!/bin/bash
case "$*" in
  *" check "*) exec {python} "$@" ;;
  *" serve "*)
    echo "servers of $SLURMD_NODENAME"
    echo "rollout.urls=[http://$SLURMD_NODENAME:1]"
    exec sleep 600 ;;
esac
echo "rank $SLURM_PROCID of $SLURM_NTASKS sees ${{CUDA_VISIBLE_DEVICES-all}}"
[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && [ -n "$WAITS" ] || exit 0
trap 'exit 75' USR1
touch "$WAITS-${{SLURM_ARRAY_TASK_ID:-}}"
until [ -e "$WAITS-end" ]; do sleep 0.1; done
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes."""
    if missing := missing_programs():
        pytest.skip(f"no Slurm on this machine: {', '.join(missing)} missing (see docs/slurm.md, Tests)")
    probe = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"this machine allows no namespaces: {probe.stderr.strip()}")
    with slurm_cluster() as running:
        yield running


@pytest.fixture
def idle(cluster: Cluster) -> Cluster:
    """The cluster with no job on it."""
    wait_for(lambda: cluster.idle() == 4, "all nodes idle", 180)
    return cluster


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the model, the data, the verifier, an estimator and ``config.yaml``."""
    folder = tmp_path_factory.mktemp("slurm")
    make_tiny_model(folder / "model")
    (folder / "verifier.py").write_text(VERIFIER)
    (folder / "estimator.py").write_text(ESTIMATOR)
    rows = [{"question": f"What is {a} plus {a * 7 % 5}?", "answer": str(a + a * 7 % 5)} for a in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""
run: {{output_dir: {folder / "runs"}}}
model: {{path: {folder / "model"}, dtype: float32}}
data: {{train: train.jsonl}}
reward: {{name: "{folder / "verifier.py"}:even", timeout: 20}}
actor: {{optim: {{lr: 1.0e-3}}, microbatch_tokens: 512}}
rollout:
  prompts_per_step: 4
  responses_per_prompt: 4
  max_prompt_tokens: 128
  max_response_tokens: 12
  timeout: 60
  retries: 1
  server: {{threads: 1, max_total_tokens: 8192, startup_timeout: 240}}
  sync: {{timeout: 60}}
trainer: {{steps: 30, threads: 1}}
tracking: {{plots: false, tensorboard: false}}
"""
    )
    return folder


@pytest.fixture(scope="session")
def stand_in(workspace: Path) -> str:
    """An interpreter that reads configurations, and has no trainers and no servers.

    The ranks of a job's first start wait for a signal, or for the file WAITS-end, if there is a variable WAITS.
    """
    path = workspace / "stand-in"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)
