"""Whole jobs on a real Slurm: `sbatch`, servers, trainers on two nodes, signals, dead nodes, a dead controller."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from cluster import Cluster, wait_for, words

from megatron_mapo import cli

SCRIPTS = Path(__file__).parents[2] / "scripts/slurm"
VARIES = ("time", "seconds", "speed", "memory", "mismatch")
THREE_NODES = ("--nodes=3", "--time=20", "--signal=B:USR1@60")


def submit(cluster: Cluster, workspace: Path, script: str, *arguments: str, **environment: str) -> str:
    """Submit a script of the repository with the tiny configuration, from a folder that is not the repository.

    Arguments that begin with ``--`` are options of sbatch. Returns the job's number.
    """
    settings = {"MAPO_CONFIG": str(workspace / "config.yaml"), "MAPO_TRAINERS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    options = [text for text in arguments if text.startswith("--")]
    rest = [text for text in arguments if not text.startswith("--")]
    command = ["sbatch", "--parsable", *options, str(SCRIPTS / script), *rest]
    settings["MAPO_TRAIN_PYTHON"] = sys.executable
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


def numbers(run: Path) -> list[dict]:
    """What a run logged, but for clocks and the last bits of the servers' log-probs, which depend on their batches."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(VARIES)} for row in rows]


def leftovers(cluster: Cluster) -> list[list[str]]:
    """Command lines of ours that still run on any node."""
    found = [words(process) for node in cluster.nodes for process in cluster.processes(node)]
    return [line for line in found if any("megatron" in word or "sglang" in word for word in line)]


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


@pytest.fixture(scope="module")
def straight(cluster: Cluster, workspace: Path) -> Path:
    """An undisturbed run: two trainer nodes, one with a server."""
    number = submit(cluster, workspace, "gsm8k_mapo.sh", "run.name=straight", *THREE_NODES)
    (key,) = [w for w in words(rank_of(cluster, "n1"), "environ") if w.startswith("MAPO_API_KEY=")]
    lines = [line for process in Path("/proc").glob("[0-9]*") for line in words(process)]
    completed(cluster, number)
    secret = key.partition("=")[2]
    assert len(secret) == 48
    assert not any(secret in line for line in lines)
    return workspace / "runs/straight"


@pytest.mark.slow
def test_a_job_runs_from_any_folder_and_leaves_nothing(straight: Path, idle: Cluster) -> None:
    assert steps(straight) == 30
    (logs,) = (straight / "logs").iterdir()
    assert {"job.log", "trainers.log", "servers.log", "servers-n3"} <= {entry.name for entry in logs.iterdir()}
    said = (logs / "job.log").read_text()
    assert "trainers on n1 n2; servers on n3" in said
    assert said.rstrip().endswith("done")
    assert leftovers(idle) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three starts of a job
def test_a_warning_without_a_controller_and_then_a_dead_node(straight: Path, idle: Cluster, workspace: Path) -> None:
    """The job script gets the signal of `--signal` and cannot requeue the job; later a trainer's node loses power."""
    run = workspace / "runs/unlucky"
    number = submit(idle, workspace, "gsm8k_mapo.sh", "run.name=unlucky", "trainer.save_interval=4", *THREE_NODES)
    wait_steps(idle, number, run, 3)
    printed = Path(idle.job(number)["StdOut"])
    idle.stop_controller()
    scripts = [int(p.name) for p in idle.processes("n1") if any(w.endswith("/slurm_script") for w in words(p)[:2])]
    os.kill(min(scripts), signal.SIGUSR1)  # the others are subshells
    wait_for(lambda: "controller does not answer" in printed.read_text(), "the job waits for the controller")
    idle.start_controller()
    wait_for(lambda: idle.job(number)["Restarts"] == "1", "requeued")
    first = steps(run)
    assert 3 <= first < 30
    wait_steps(idle, number, run, first + 5)
    idle.kill_node("n2")
    wait_for(lambda: idle.job(number)["Restarts"] == "2", "requeued after the death of a node")
    said = completed(idle, number)
    idle.start_node("n2")
    assert f"resuming from {run}/checkpoints/step_{first:06d}" in said
    assert re.findall(r"trainers on (.*); servers on (.*)", said) == [("n1 n2", "n3")] * 2 + [("n1 n3", "n4")]
    assert numbers(run) == numbers(straight)
    assert leftovers(idle) == []


@pytest.mark.slow
def test_a_heterogeneous_job_starts_a_dead_server_again(idle: Cluster, workspace: Path) -> None:
    run = workspace / "runs/het"
    arguments = ("run.name=het", "trainer.steps=12", "trainer.save_interval=2", "--time=20", "--signal=B:USR1@60")
    number = submit(idle, workspace, "gsm8k_mapo_hetjob.sh", *arguments)
    wait_steps(idle, number, run, 3)
    for process in idle.processes("n2"):
        if words(process)[1:4] == ["-m", "megatron_mapo", "serve"]:
            os.kill(int(process.name), signal.SIGKILL)
    said = completed(idle, number)
    assert "start 1: trainers on n1; servers on n2" in said
    assert "the servers ended; ending the trainers" in said
    assert said.count("servers answer") == 2
    assert [row["step"] for row in numbers(run)] == list(range(1, 13))


@pytest.mark.slow
def test_an_array_of_seeds_and_algorithms(idle: Cluster, workspace: Path) -> None:
    """Task 2 of two configurations and two seeds, on a node that trains and serves."""
    (workspace / "native.yaml").write_text("base: config.yaml\nactor: {adv_norm: {aggregation_mode: native}}\n")
    configs = f"{workspace / 'config.yaml'} {workspace / 'native.yaml'}"
    options = ("--array=2", "--time=20", "--signal=B:USR1@60", "trainer.steps=1")
    number = submit(idle, workspace, "compare_array.sh", *options, MAPO_CONFIGS=configs, MAPO_SEEDS="5 6")
    completed(idle, f"{number}_2")
    settings = (workspace / "runs/native-seed5/config.yaml").read_text()
    assert "seed: 5" in settings
    assert re.findall("aggregation_mode: (.*)", settings) == ["native"]
    report = workspace / "array-report"
    arguments = ["compare", "--runs", str(workspace / "runs/native-seed5"), "--output", str(report)]
    assert cli.main(arguments) == 0
    assert list(json.loads((report / "summary.json").read_text())["runs"]) == ["native"]


@pytest.mark.slow
def test_launch_slurm_trains_and_serves_on_one_node(idle: Cluster, workspace: Path) -> None:
    """Submitted by the command line; then the checkpoint becomes a Hugging Face folder in a job of its own."""
    command = [sys.executable, "-m", "megatron_mapo", "launch", "slurm", "--config", str(workspace / "config.yaml")]
    options = ["--nodes=1", "--server-nodes=0", "--gpus-per-node=4", "--trainers-per-node=2", "--time=20", "--grace=60"]
    overrides = ["run.name=launched", "trainer.steps=1"]
    said = idle.client(*command, *options, *overrides, cwd=workspace, OMP_NUM_THREADS="1")
    completed(idle, said.split()[1].rstrip(";"))
    run = workspace / "runs/launched"
    assert steps(run) == 1
    said = next(run.glob("logs/*/job.log")).read_text()
    assert "servers answer: http://127.0.0.1:" in said
    number = submit(idle, workspace, "convert_hf.sh", str(run), str(workspace / "converted"))
    completed(idle, number)
    assert (workspace / "converted/model.safetensors").is_file()


def test_mistakes_end_the_job_before_servers_start(idle: Cluster, workspace: Path) -> None:
    numbers_and_texts = [
        (submit(idle, workspace, "gsm8k_mapo.sh", *THREE_NODES, "trainer.stps=1"), "did you mean"),
        (submit(idle, workspace, "gsm8k_mapo.sh", "--nodes=1"), "leaves none for trainers"),
        (submit(idle, workspace, "gsm8k_mapo.sh", *THREE_NODES, "actor.parallel.tensor=4"), "does not divide"),
    ]
    for number, text in numbers_and_texts:
        assert idle.wait_job(number) == "FAILED"
        assert idle.job(number)["ExitCode"] == "2:0"
        assert text in output(idle, number)
        assert "starting servers" not in output(idle, number)


def test_a_job_that_is_cancelled_stays_cancelled(idle: Cluster, workspace: Path) -> None:
    number = submit(idle, workspace, "gsm8k_mapo.sh", "run.name=cancelled", *THREE_NODES)
    wait_for(lambda: "starting servers" in output(idle, number), "servers are being started")
    idle.client("scancel", number)
    assert idle.wait_job(number) == "CANCELLED"
    wait_for(lambda: leftovers(idle) == [], "everything has ended", 60)
    assert idle.job(number)["Restarts"] == "0"


def test_a_script_without_a_checkout_says_so(idle: Cluster, workspace: Path) -> None:
    copy = workspace / "copy.sh"
    copy.write_text((SCRIPTS / "gsm8k_mapo.sh").read_text())
    number = idle.client("sbatch", "--parsable", str(copy), cwd=workspace).strip()
    assert idle.wait_job(number) == "FAILED"
    assert "set MAPO_REPO to the checkout" in output(idle, number)
