"""Faults of a Slurm cluster: whole jobs on a real one, disturbed while they train."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_runs import HERE, Outcome, outcome_of

sys.path.append(str(HERE.parent / "slurm"))

from cluster import Cluster, missing_programs, slurm_cluster, wait_for
from jobs import end_soon, job_script, output, submit, wait_steps

from megatron_mapo.checkpoint_files import complete_checkpoints

__all__ = ["SLURM_CASES", "SlurmCase", "missing_programs", "run_slurm_case", "slurm_cluster"]

STEPS = 30
OVERRIDES = (
    *(f"trainer.steps={STEPS}", "trainer.hang_timeout=300", "rollout.wait_timeout=60", "rollout.timeout=60"),
    *("rollout.server.threads=1", "rollout.server.max_total_tokens=8192", "rollout.server.startup_timeout=240"),
)


@dataclass(frozen=True)
class SlurmCase:
    """A fault of a cluster.

    Attributes:
        name: what happens.
        act: does it, given the cluster and the number of a job that trains.
        says: what the job must print.
    """

    name: str
    act: Callable[[Cluster, str], None]
    says: str = ""


def _node_dies(cluster: Cluster, number: str) -> None:
    cluster.kill_node("n2")


def _controller_dies(cluster: Cluster, number: str) -> None:
    """And the job is to end; the controller comes back when the job waits for it."""
    printed = Path(cluster.job(number)["StdOut"])
    cluster.stop_controller()
    os.kill(job_script(cluster, "n1"), signal.SIGUSR1)
    wait_for(lambda: "controller does not answer" in printed.read_text(), "the job waits for the controller")
    cluster.start_controller()


def _requeue(cluster: Cluster, number: str) -> None:
    cluster.client("scontrol", "requeue", number)


SLURM_CASES = [
    SlurmCase("the time limit comes", end_soon, "SIGUSR1: asking the trainers to save"),
    SlurmCase("scontrol requeue", _requeue, "start 2: trainers on"),
    SlurmCase("a trainer's node loses power", _node_dies, "start 2: trainers on n1 n3; servers on n4"),
    SlurmCase("the controller is dead when the job has to end", _controller_dies, "controller does not answer"),
]


def run_slurm_case(case: SlurmCase | None, cluster: Cluster, workspace: Path) -> Outcome:
    """A job of two trainer nodes and a server node with a fault (None: without one)."""
    wait_for(lambda: cluster.idle() == len(cluster.nodes), "all nodes idle", 90)
    name = "undisturbed-job" if case is None else re.sub(r"\W+", "-", case.name)
    run, marker = workspace / "runs" / name, workspace / f"{name}.marker"
    # The same rewards, but slowly, so that there is time to disturb the run.
    verifier = f"{workspace / 'verifier.py'}:{'even' if case is None else 'slowly_even'}"
    settings = (f"run.name={name}", f"reward.name={verifier}", *OVERRIDES)
    number = submit(cluster, workspace, "gsm8k_mapo.sh", *settings, "--nodes=3", "--time=20", "--signal=B:USR1@90")
    if case is not None:
        wait_steps(cluster, number, run, 3)
        saved = complete_checkpoints(run / "checkpoints")[-1][0]
        finished = (run / "metrics.jsonl").read_text().count("\n")
        marker.write_text(json.dumps({"step": finished, "saved": saved, "time": time.time()}))
        case.act(cluster, number)
        wait_for(lambda: _restarts(cluster, number) == "1", "requeued")
        cluster.client("scontrol", "update", f"JobId={number}", "TimeLimit=20")
    code = int(cluster.wait_job(number) != "COMPLETED")
    outcome = outcome_of([code], output(cluster, number), marker, run, time.time())
    for node in cluster.nodes:
        cluster.revive(node)
    return outcome


def _restarts(cluster: Cluster, number: str) -> str:
    """How often a job was started again; nothing while the controller does not answer."""
    with contextlib.suppress(AssertionError):
        return cluster.job(number)["Restarts"]
    return ""
