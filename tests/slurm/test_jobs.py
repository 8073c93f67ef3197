"""Whole jobs on a real Slurm: `sbatch`, servers, trainers on two nodes, signals, dead nodes, a dead controller."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from cluster import SYSTEM_PATH, Cluster, wait_for, words
from jobs import (
    SCRIPTS,
    THREE_NODES,
    completed,
    end_soon,
    job_script,
    kill_servers,
    leftovers,
    numbers,
    output,
    rank_of,
    steps,
    submit,
    submit_command,
    wait_restarts,
    wait_steps,
)

from megatron_mapo import cli
from megatron_mapo.errors import HangError, Preempted


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
    run = workspace / "runs/straight"
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    return run


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
    os.kill(job_script(idle, "n1"), signal.SIGUSR1)
    wait_for(lambda: "controller does not answer" in printed.read_text(), "the job waits for the controller")
    idle.start_controller()
    wait_restarts(idle, number, 1)
    first = steps(run)
    assert 3 <= first < 30
    wait_steps(idle, number, run, first + 5)
    idle.kill_node("n2")
    wait_restarts(idle, number, 2)
    said = completed(idle, number)
    idle.start_node("n2")
    assert f"resuming from {run}/checkpoints/step_{first:06d}" in said
    assert re.findall(r"trainers on (.*); servers on (.*)", said) == [("n1 n2", "n3")] * 2 + [("n1 n3", "n4")]
    assert numbers(run) == numbers(straight)
    assert leftovers(idle) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three starts of a job
def test_a_requeue_by_hand_and_then_the_death_of_the_first_node(straight: Path, idle: Cluster, workspace: Path) -> None:
    """Neither asks the job: what runs is ended with the script, and the next start has the last checkpoint."""
    run, slow = workspace / "runs/moved", f"reward.name={workspace / 'verifier.py'}:slowly_even"
    number = submit(idle, workspace, "gsm8k_mapo.sh", "run.name=moved", "trainer.save_interval=1", slow, *THREE_NODES)
    wait_steps(idle, number, run, 4)
    idle.client("scontrol", "requeue", number)
    wait_restarts(idle, number, 1)
    wait_for(lambda: "resuming from" in output(idle, number), "the second start has a checkpoint")
    wait_steps(idle, number, run, steps(run) + 3)
    idle.kill_node("n1")
    wait_restarts(idle, number, 2)
    said = completed(idle, number)
    idle.start_node("n1")
    resumed = [int(step) for step in re.findall(r"resuming from \S*step_(\d+)", said)]
    assert len(resumed) == 2
    assert 2 <= resumed[0] < resumed[1] < 30
    assert re.findall(r"trainers on (.*); servers on (.*)", said) == [("n1 n2", "n3")] * 2 + [("n2 n3", "n4")]
    assert numbers(run) == numbers(straight)
    assert leftovers(idle) == []


def without_servers(rows: list[dict]) -> list[dict]:
    """Rows without what they say about the servers."""
    return [{key: value for key, value in row.items() if not key.startswith("servers/")} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(900)  # two starts of a job
def test_a_colocated_job_makes_way_for_an_urgent_one(straight: Path, idle: Cluster, workspace: Path) -> None:
    """Two nodes train and serve. Slurm preempts the job: it saves within the partition's GraceTime, and comes back."""
    run, slow = workspace / "runs/preempted", f"reward.name={workspace / 'verifier.py'}:slowly_even"
    options = ("--nodes=2", "--time=20")
    number = submit(idle, workspace, "gsm8k_mapo.sh", "run.name=preempted", slow, *options, MAPO_LAYOUT="colocated")
    wait_steps(idle, number, run, 3)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    other = idle.client(*urgent, "--wrap=true", cwd=workspace).strip()
    wait_restarts(idle, number, 1)
    first = steps(run)
    assert 3 <= first < 30
    said = completed(idle, number)
    assert idle.state(other) == "COMPLETED"
    assert f"trainers ended with code {Preempted.exit_code}" in said
    assert f"resuming from {run}/checkpoints/step_{first:06d}" in said
    assert re.findall(r"trainers on (.*); servers on (.*)", said) == [("n1 n2", "n1 n2")] * 2
    assert without_servers(numbers(run)) == without_servers(numbers(straight)), "two nodes have two servers"
    assert leftovers(idle) == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # two starts of a job, and Slurm looks for due signals every 30 s
def test_the_time_limit_is_a_pause(straight: Path, idle: Cluster, workspace: Path) -> None:
    """Slurm itself signals before the limit; the run saves within the lead, is requeued and ends as if undisturbed."""
    run, slow = workspace / "runs/limited", f"reward.name={workspace / 'verifier.py'}:slowly_even"
    options = ("--nodes=3", "--time=20", "--signal=B:USR1@90")
    number = submit(idle, workspace, "gsm8k_mapo.sh", "run.name=limited", slow, *options)
    wait_steps(idle, number, run, 3)
    end_soon(idle, number)
    wait_restarts(idle, number, 1)
    first = steps(run)
    assert 3 <= first < 30
    idle.client("scontrol", "update", f"JobId={number}", "TimeLimit=20")
    said = completed(idle, number)
    assert "SIGUSR1: asking the trainers to save and end after this step" in said
    assert f"trainers ended with code {Preempted.exit_code}" in said
    assert f"resuming from {run}/checkpoints/step_{first:06d}" in said
    assert numbers(run) == numbers(straight)
    assert leftovers(idle) == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts of the trainers, one after a hang
def test_trainers_that_hang_or_crash_are_started_again_within_the_job(idle: Cluster, workspace: Path) -> None:
    """As often as MAPO_RESTARTS says; the last crash ends the job with the trainers' code. One of two servers stays."""
    run, slow = workspace / "runs/crashed", f"reward.name={workspace / 'verifier.py'}:slowly_even"
    hangs = f"actor.adv_norm.aggregation_mode={workspace / 'estimator.py'}:hangs_once"
    settings = ("run.name=crashed", "trainer.save_interval=1", "trainer.steps=60", slow, hangs)
    limits = ("trainer.hang_timeout=60", "rollout.wait_timeout=50", "--nodes=4", "--time=20", "--signal=B:USR1@60")
    environment = {"MAPO_RESTARTS": "2", "MAPO_SERVER_NODES": "2", "HANG_FILE": str(workspace / "hang")}
    number = submit(idle, workspace, "gsm8k_mapo.sh", *settings, *limits, **environment)
    wait_for(lambda: output(idle, number).count("resuming from") == 1, "the trainers are started again")
    assert f"trainers ended with code {HangError.exit_code}" in output(idle, number)
    first = int(re.findall(r"resuming from \S*step_(\d+)", output(idle, number))[0])
    assert first >= 1
    kill_servers(idle, "n4")
    wait_steps(idle, number, run, first + 3)
    os.kill(int(rank_of(idle, "n2").name), signal.SIGKILL)
    wait_for(lambda: output(idle, number).count("resuming from") == 2, "the trainers are started again")
    second = int(re.findall(r"resuming from \S*step_(\d+)", output(idle, number))[1])
    assert second > first
    wait_steps(idle, number, run, second + 2)
    os.kill(int(rank_of(idle, "n1").name), signal.SIGKILL)
    assert idle.wait_job(number) == "FAILED"
    said = output(idle, number)
    assert said.count("starting servers on") == 1, "the servers stay"
    assert re.findall(r"starting the trainers again from the last checkpoint \((\d) of 2\)", said) == ["1", "2"]
    assert re.search(r"failed with code \d+; see", said)
    # What a start looks for among the words of srun: here the task ended when all servers had come up.
    servers = (run / f"logs/slurm-{number}.0/servers.log").read_text()
    assert re.search(r"^srun: error: n4: tasks? 1: ", servers, re.MULTILINE)
    assert idle.job(number)["Restarts"] == "0"
    assert leftovers(idle) == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # two starts of a job, one of them with two of the servers
def test_a_heterogeneous_job_starts_a_dead_server_again(idle: Cluster, workspace: Path) -> None:
    """Without servers the trainers save first; then the job is asked to end, and comes back."""
    run, slow = workspace / "runs/het", f"reward.name={workspace / 'verifier.py'}:slowly_even"
    settings = ("run.name=het", "trainer.steps=20", "trainer.save_interval=0", "rollout.wait_timeout=5", slow)
    partitions = ["--partition=main", "--time=20", "--signal=B:USR1@60", ":", "--partition=serve"]
    own = {"MAPO_CONFIG": str(workspace / "config.yaml"), "MAPO_TRAINERS_PER_NODE": "1"}
    number = submit_command(idle, workspace, "gsm8k_mapo_hetjob.sh", *settings, sbatch=partitions, **own)
    wait_steps(idle, number, run, 3)
    assert re.findall(r"Partition=(\w+)", idle.client("scontrol", "show", "job", number)) == ["main", "serve"]
    kill_servers(idle, "n3")
    wait_for(lambda: "resuming from" in output(idle, number), "the trainers are started again")
    said = output(idle, number)
    assert "start 1: trainers on n1; servers on n3" in said
    assert "the servers ended; waiting for the trainers to save and end" in said
    assert said.count("servers answer") == 2
    (saved,) = re.findall(r"saved a checkpoint of step (\d+)", said)
    assert int(saved) >= 3
    wait_steps(idle, number, run, int(saved) + 2)
    os.kill(job_script(idle, "n1"), signal.SIGUSR1)
    wait_restarts(idle, number, 1)
    first = steps(run)
    said = completed(idle, number)
    assert re.findall(r"resuming from \S*step_(\d+)", said) == [f"{int(saved):06d}", f"{first:06d}"]
    assert [row["step"] for row in numbers(run)] == list(range(1, 21))
    assert leftovers(idle) == []


@pytest.mark.slow
def test_an_array_of_seeds_and_algorithms(idle: Cluster, workspace: Path) -> None:
    """Task 2 of two configurations and two seeds, on a node that trains and serves, in a container.

    A stand-in for apptainer: what follows the image is run with another PATH.
    """
    (workspace / "host").mkdir()
    (workspace / "image").mkdir()
    calls = workspace / "calls"
    inside = f'until [ "$1" = mapo.sif ]; do shift; done; shift; PATH={workspace}/image:$PATH exec "$@"'
    for name, text in (
        ("host/apptainer", f'echo "$*" >>{calls}; {inside}'),
        ("image/python3", f'exec {sys.executable} "$@"'),
    ):
        (workspace / name).write_text(f"#!/bin/bash\n{text}\n")
        (workspace / name).chmod(0o755)
    container = {"MAPO_CONTAINER": "apptainer:mapo.sif", "MAPO_TRAIN_PYTHON": ""}
    container["PATH"] = f"{workspace / 'host'}:{os.environ['PATH']}:{SYSTEM_PATH}"
    (workspace / "native.yaml").write_text("base: config.yaml\nactor: {adv_norm: {aggregation_mode: native}}\n")
    configs = f"{workspace / 'config.yaml'} {workspace / 'native.yaml'}"
    options = ("--array=2", "--time=20", "--signal=B:USR1@60", "trainer.steps=1")
    number = submit(idle, workspace, "compare_array.sh", *options, MAPO_CONFIGS=configs, MAPO_SEEDS="5 6", **container)
    completed(idle, f"{number}_2")
    started = re.findall(r"mapo.sif python3 -m megatron_mapo.launch.slurm_task (\w+)", calls.read_text())
    assert started == ["check", "serve", "train"]
    settings = (workspace / "runs/native-seed5/config.yaml").read_text()
    assert "seed: 5" in settings
    assert re.findall("aggregation_mode: (.*)", settings) == ["native"]
    report = workspace / "array-report"
    arguments = ["compare", "--runs", str(workspace / "runs/native-seed5"), "--output", str(report)]
    assert cli.main(arguments) == 0
    assert list(json.loads((report / "summary.json").read_text())["runs"]) == ["native"]


def test_of_an_array_only_the_task_that_is_signalled_comes_back(idle: Cluster, workspace: Path, stand_in: str) -> None:
    """The last task has the number of the whole array. None trains here."""
    config, waits = str(workspace / "config.yaml"), workspace / "array"
    settings = {"MAPO_CONFIGS": config, "MAPO_SEEDS": "0 1", "MAPO_TRAIN_PYTHON": stand_in, "WAITS": str(waits)}
    number = submit(idle, workspace, "compare_array.sh", "--array=0-1", "--time=20", **settings)
    wait_for(lambda: all(Path(f"{waits}-{task}").exists() for task in "01"), "both tasks train")
    assert idle.job(f"{number}_1")["JobId"] == number
    os.kill(job_script(idle, idle.job(f"{number}_1")["NodeList"]), signal.SIGUSR1)
    wait_restarts(idle, f"{number}_1", 1)
    completed(idle, f"{number}_1")
    assert idle.state(f"{number}_0") == "RUNNING"
    Path(f"{waits}-end").touch()
    completed(idle, f"{number}_0")
    assert [idle.job(f"{number}_{task}")["Restarts"] for task in "01"] == ["0", "1"]


def test_ranks_see_all_gpus_of_their_node(idle: Cluster, workspace: Path, stand_in: str) -> None:
    """Also where Slurm is asked to give each task one of its own. One server takes one; none trains here.

    A job with `--exclusive` and `--gpus-per-task` has all of a node's.
    """
    copy = workspace / "gpus_per_task.sh"
    lines = (SCRIPTS / "gsm8k_mapo.sh").read_text().replace("--gpus-per-node=8", "--gpus-per-task=1")
    copy.write_text(lines.replace("--ntasks-per-node=1", "--ntasks-per-node=2"))
    one, settings = "--nodes=1", {"MAPO_TRAINERS_PER_NODE": "", "MAPO_TRAIN_PYTHON": stand_in}
    together = {**settings, "MAPO_LAYOUT": "colocated", "MAPO_REPO": str(SCRIPTS.parents[1])}
    bound = ("--nodes=2", "--gpus-per-node=2", "--gpu-bind=single:1")
    jobs = [
        (submit(idle, workspace, "gsm8k_mapo.sh", "run.name=colocated", one, **together), 7, "0,1,2,3,4,5,6,7"),
        (submit(idle, workspace, "gsm8k_mapo.sh", "run.name=bound", *bound, **settings), 2, "0,1"),
        (submit(idle, workspace, str(copy), "run.name=per-task", one, **together), 7, "0,1,2,3,4,5,6,7"),
    ]
    for number, ranks, gpus in jobs:
        found = re.findall(r"rank \d of \d sees .*", completed(idle, number))
        assert sorted(found) == [f"rank {rank} of {ranks} sees {gpus}" for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # the run twice, and a job that converts
def test_launch_slurm_trains_and_serves_on_one_node(idle: Cluster, workspace: Path) -> None:
    """Submitted by the command line: the numbers of `launch local`. The checkpoint becomes a Hugging Face folder.

    sbatch would take a part of the run folder's name for a pattern, and another for an option.
    """
    launch, config = [sys.executable, "-m", "megatron_mapo", "launch"], ["--config", str(workspace / "config.yaml")]
    options = ["--nodes=1", "--server-nodes=0", "--gpus-per-node=4", "--trainers-per-node=2", "--time=20", "--grace=60"]
    folder, overrides = workspace / "my runs 100%j", ["run.name=launched", "trainer.steps=2"]
    own = [*overrides, f"run.output_dir={folder}"]
    said = idle.client(*launch, "slurm", *config, *options, *own, cwd=workspace, OMP_NUM_THREADS="1")
    number, run = said.split()[1].rstrip(";"), folder / "launched"
    assert idle.wait_job(number) == "COMPLETED", [path.read_text() for path in run.glob("logs/*.out")]
    assert steps(run) == 2
    assert (run / f"logs/slurm-{number}.out").read_text().rstrip().endswith("done")
    said = next(run.glob("logs/*/job.log")).read_text()
    assert "servers answer: http://127.0.0.1:" in said
    local = [*launch, "local", *config, "--nproc=2", *overrides, "rollout.server.port=0"]
    idle.client(*local, cwd=workspace, OMP_NUM_THREADS="1")
    assert numbers(run) == numbers(workspace / "runs/launched")
    number = submit(idle, workspace, "convert_hf.sh", str(run), str(workspace / "converted"))
    completed(idle, number)
    assert (workspace / "converted/model.safetensors").is_file()


@pytest.mark.slow
def test_an_evaluation_is_a_job(idle: Cluster, workspace: Path) -> None:
    """Its servers are its own; all samples are kept, and the numbers are theirs."""
    out, options = workspace / "evaluated", ("--limit", "4", "-k", "2", "--greedy")
    files = ("--config", str(workspace / "config.yaml"), "--data", str(workspace / "train.jsonl"), "--out", str(out))
    model = ("--model", str(workspace / "model"))
    number = submit_command(idle, workspace, "eval.sh", *model, *files, *options, sbatch=["--time=20"])
    said = completed(idle, number)
    table = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(row["prompt_id"], row["sample"]) for row in table] == [(p, s) for p in range(4) for s in (0, 1, "greedy")]
    assert all(row["right"] is (sum(map(ord, row["response"])) % 2 == 0) for row in table)
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    sampled = [row["right"] for row in table if row["sample"] != "greedy"]
    assert metrics["pass_at_1"] == pytest.approx(sum(sampled) / 8)
    assert re.search(rf"pass@1 +{metrics['pass_at_1']:.3f} ", said)
    assert leftovers(idle) == []


def test_mistakes_end_the_job_before_servers_start(idle: Cluster, workspace: Path) -> None:
    four_gpus = ("--nodes=2", "--gpus-per-node=4", "--time=20")
    numbers_and_texts = [
        (submit(idle, workspace, "gsm8k_mapo.sh", *THREE_NODES, "trainer.stps=1"), "did you mean"),
        (submit(idle, workspace, "gsm8k_mapo.sh", "--nodes=1"), "leaves none for trainers"),
        (submit(idle, workspace, "gsm8k_mapo.sh", *THREE_NODES, "actor.parallel.tensor=4"), "does not divide"),
        (submit(idle, workspace, "gsm8k_mapo.sh", *four_gpus, MAPO_TRAINERS_PER_NODE="8"), "MAPO_TRAINERS_PER_NODE=8"),
        (submit(idle, workspace, "gsm8k_mapo.sh", *four_gpus, "rollout.server.tensor=8"), "not reach beyond its node"),
        (
            submit(idle, workspace, "gsm8k_mapo.sh", *four_gpus, MAPO_START_TIMEOUT="60"),
            "MAPO_START_TIMEOUT=60 must be",
        ),
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
