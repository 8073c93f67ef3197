"""Submit whole jobs and look at what they do."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import Cluster, wait_for, words

SCRIPTS = Path(__file__).parents[2] / "scripts/slurm"
VARIES = ("time", "seconds", "speed", "memory", "mismatch")
THREE_NODES = ("--nodes=3", "--time=20", "--signal=B:USR1@60")


def submit(cluster: Cluster, workspace: Path, script: str, *arguments: str, **environment: str) -> str:
    """Submit a script of the repository with the tiny configuration, from a folder that is not the repository.

    Arguments that begin with ``--`` are options of sbatch. Returns the job's number.
    """
    settings = {"MAPO_CONFIG": str(workspace / "config.yaml"), "MAPO_TRAINERS_PER_NODE": "1"}
    options = [text for text in arguments if text.startswith("--")]
    rest = [text for text in arguments if not text.startswith("--")]
    return submit_command(cluster, workspace, script, *rest, sbatch=options, **(settings | environment))


def submit_command(
    cluster: Cluster, workspace: Path, script: str, *arguments: str, sbatch: Sequence[str] = (), **environment: str
) -> str:
    """Submit a script with arguments of its own and options of sbatch. Returns the job's number."""
    settings = {"MAPO_TRAIN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--parsable", *sbatch, str(SCRIPTS / script), *arguments]
    return cluster.client(*command, cwd=workspace, **(settings | environment)).strip()


def output(cluster: Cluster, number: str) -> str:
    """What a job has printed."""
    path = Path(cluster.job(number)["StdOut"])
    return path.read_text() if path.exists() else ""


def steps(run: Path) -> int:
    """Steps that a run has logged."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_steps(cluster: Cluster, number: str, run: Path, count: int) -> None:
    """Wait until a run has logged this many steps."""
    wait_for(lambda: steps(run) >= count or cluster.state(number) == "FAILED", f"step {count}")
    assert cluster.state(number) == "RUNNING", output(cluster, number)


def numbers(run: Path, *without: str) -> list[dict]:
    """What a run logged, but for clocks and the last bits of the servers' log-probs, which depend on their batches.

    Nor what begins with one of ``without``.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith((*VARIES, *without))} for row in rows]


def leftovers(cluster: Cluster) -> list[list[str]]:
    """Command lines of ours that still run on any node."""
    found = [words(process) for node in cluster.nodes for process in cluster.processes(node)]
    return [line for line in found if any("megatron" in word or "sglang" in word for word in line)]


def job_script(cluster: Cluster, node: str) -> int:
    """Process of the job's script on its first node; others of its kind are subshells."""
    scripts = [int(p.name) for p in cluster.processes(node) if any(w.endswith("/slurm_script") for w in words(p)[:2])]
    return min(scripts)


def kill_servers(cluster: Cluster, node: str) -> None:
    """The servers of a node are gone, and so is the one who would start them again."""
    for process in cluster.processes(node):
        if words(process)[1:4] == ["-m", "megatron_mapo", "serve"]:
            os.kill(int(process.name), signal.SIGKILL)


def wait_restarts(cluster: Cluster, number: str, count: int) -> None:
    """Wait until Slurm has started a job again this often."""
    wait_for(lambda: cluster.job(number)["Restarts"] == str(count), f"requeued {count} times")


def end_soon(cluster: Cluster, number: str) -> None:
    """Cut a job's time limit, which is in whole minutes, to one or two minutes from now."""
    hours, minutes, seconds = map(int, cluster.job(number)["RunTime"].split("-")[-1].split(":"))
    limit = hours * 60 + minutes + 1 + (seconds > 0)
    cluster.client("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")


def completed(cluster: Cluster, number: str) -> str:
    """Wait for a job's success; what it printed."""
    assert cluster.wait_job(number) == "COMPLETED", output(cluster, number)
    return output(cluster, number)


def rank_of(cluster: Cluster, node: str) -> Path:
    """The trainer process of a node."""

    def find() -> list[Path]:
        return [p for p in cluster.processes(node) if words(p)[1:3] == ["-m", "megatron_mapo.train"]]

    wait_for(find, f"a trainer on {node}")
    return find()[0]
