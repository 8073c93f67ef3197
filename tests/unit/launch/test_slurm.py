"""What a Slurm job's tasks find out about their node, and the script that ``launch slurm`` writes."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from megatron_mapo import cli
from megatron_mapo.config import Config, load_config, to_yaml
from megatron_mapo.errors import ConfigError
from megatron_mapo.hardware import visible_gpus
from megatron_mapo.launch import slurm, slurm_task
from megatron_mapo.launch.environment import interface_of, network_environment
from megatron_mapo.launch.slurm import SlurmJob
from megatron_mapo.preemption import SIGNALS


def test_the_address_is_the_one_towards_another_node() -> None:
    assert slurm_task.node_address("n1", ["n1"]) == "127.0.0.1"
    assert slurm_task.node_address("n1", ["n1", "no.such.host.invalid", "127.0.0.9"]) == "127.0.0.1"
    assert slurm_task.node_address("n1", ["n1", "n2"], interface="lo") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"


def test_no_address_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="MAPO_INTERFACE"):
        slurm_task.node_address("n1", ["n1", "no.such.host.invalid"])
    with pytest.raises(ConfigError, match=r"MAPO_INTERFACE=ib7 has no IPv4 address here; there are: .*lo"):
        slurm_task.node_address("n1", ["n1", "n2"], interface="ib7")


def test_gloo_and_nccl_use_the_interface_of_the_address() -> None:
    assert network_environment({}, "127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    own = network_environment({"NCCL_SOCKET_IFNAME": "ib0"}, "127.0.0.1")
    assert own == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}
    assert network_environment({}, "192.0.2.1") == {}


def test_the_gpus_of_a_node_are_those_that_slurm_names_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is the job's alone shows all of them and names none."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("named", "left"), [(None, "1,2,3,4"), ("7,6,5,4,3", "6,5,4,3")])
def test_servers_beside_trainers_see_the_other_gpus(
    named: str | None, left: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    task = {"MAPO_NODES": "n1", "SLURMD_NODENAME": "n1"}
    monkeypatch.setattr(os, "environ", task if named is None else task | {"CUDA_VISIBLE_DEVICES": named})
    monkeypatch.setattr(slurm_task, "_become", lambda *command: None)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    run = ["--config", str(tmp_path / "run.yaml")]
    arguments = argparse.Namespace(logs=tmp_path, trainers=1)
    slurm_task.serve(arguments, run)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    with pytest.raises(ConfigError, match="4 GPUs do not fit into the 3 of 4"):
        slurm_task.serve(arguments, run)


def test_servers_get_the_gpus_that_trainers_leave() -> None:
    assert slurm_task.gpus_left("0,1,4,5", 3) == "5"
    with pytest.raises(ConfigError, match="MAPO_TRAINERS_PER_NODE is 4"):
        slurm_task.gpus_left("0,1,4,5", 4)


def test_ranks_read_what_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = tmp_path / "rendezvous", []
    waiting = threading.Thread(target=lambda: found.append(slurm_task.join_rendezvous(path, 1, "10.0.0.2")))
    waiting.start()
    host, port = slurm_task.join_rendezvous(path, 0, "127.0.0.1")
    waiting.join(timeout=20)
    assert found == [(host, port)]
    assert host == "127.0.0.1"
    assert port > 0
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(slurm_task, "RENDEZVOUS_SECONDS", 0.1)
    with pytest.raises(ConfigError, match=r"run\.output_dir must be on a file system that all nodes share"):
        slurm_task.join_rendezvous(tmp_path / "elsewhere", 1, "127.0.0.1")


def test_a_rank_is_what_srun_says() -> None:
    task = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "OMP_NUM_THREADS": "3"}
    found = slurm_task.rank_environment(task, 4, "10.0.0.1", 4711)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("5", "1", "8", "4")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["OMP_NUM_THREADS"]) == ("10.0.0.1", "4711", "3")


BLOCKED = """
import os, signal, subprocess, sys
from megatron_mapo import preemption

class Alone:
    def gather(self, value):
        return [value]

signal.pthread_sigmask(signal.SIG_BLOCK, preemption.SIGNALS)
preemption.install()
print(preemption.requested(Alone()))
child = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"]
subprocess.run(child, check=True)
os.kill(os.getpid(), signal.SIGTERM)
print(preemption.requested(Alone()))
"""


def test_a_signal_that_a_launcher_has_blocked_is_seen_and_kills_nobody() -> None:
    command = [sys.executable, "-u", "-c", BLOCKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "alive", "True"], done.stderr


def test_a_task_that_waits_for_rank_0_keeps_its_signals_for_later(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_mapo.launch.slurm_task", "train", "--per-node=1"]
    task = {"MAPO_NODES": "n1", "SLURMD_NODENAME": "n1", "SLURM_PROCID": "1"}
    with subprocess.Popen([*command, "--rendezvous", str(tmp_path / "none"), "--"], env=os.environ | task) as process:
        try:
            wanted, blocked, deadline = sum(1 << number - 1 for number in SIGNALS), 0, time.monotonic() + 120
            while blocked & wanted != wanted and time.monotonic() < deadline:
                status = Path(f"/proc/{process.pid}/status").read_text()
                blocked = int(re.findall(r"SigBlk:\s*(\w+)", status)[0], 16)
                time.sleep(0.1)
            assert process.poll() is None
        finally:
            process.kill()
    assert blocked & wanted == wanted


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = make_tiny_model(tmp_path / "model")
    train = ["data.train=x.jsonl", "rollout.server.count=4", "run.name=mine", f"run.output_dir={tmp_path / 'runs'}"]
    return load_config(None, [f"model.path={model}", *train])


def test_the_script_asks_for_what_was_asked(config: Config, tmp_path: Path) -> None:
    job = SlurmJob(3, 1, 8, 8, time="2:00:00", grace=300, sbatch=("--partition=gpu",))
    job.check(config)
    overrides = ["data.template=it's {question} $HOME `id`", "run.name=mine"]
    script = slurm.render(job, "configs/x.yaml", overrides, config)
    (tmp_path / "script.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "script.sh")], check=True)
    assert shlex.split(script.splitlines()[-1]) == ["mapo_run", *overrides]
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    wanted = {"--nodes=3", "--gpus-per-node=8", "--time=2:00:00", "--signal=B:USR1@300", "--partition=gpu", "--requeue"}
    assert wanted <= set(lines)
    assert f"MAPO_CONFIG={Path('configs/x.yaml').absolute()}" in script
    assert "MAPO_LAYOUT=disaggregated" in script
    assert "MAPO_LAYOUT=colocated" in slurm.render(SlurmJob(1, 0, 8, 4), None, [], config)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (SlurmJob(1, 1, 8, 8), "--server-nodes 0"),
        (SlurmJob(1, 0, 8, 5), "rollout.server.count"),
        (SlurmJob(2, 1, 2, 2), "rollout.server.count"),
    ],
)
def test_a_job_that_cannot_hold_the_run_is_refused(job: SlurmJob, message: str, config: Config) -> None:
    with pytest.raises(ConfigError, match=message):
        job.check(config)


def test_trainers_take_the_gpus_that_servers_leave(config: Config) -> None:
    """Of four servers; as many as are asked for, if they fit."""
    assert slurm_task.fit_node(config, 8, "disaggregated") == 8
    assert slurm_task.fit_node(config, 8, "colocated") == 4
    assert slurm_task.fit_node(config, 8, "colocated", 3) == 3
    assert slurm_task.fit_node(config, 2, "hetjob") == 2
    assert slurm_task.fit_node(config, 0, "colocated") == 1


@pytest.mark.parametrize(
    ("gpus", "layout", "trainers", "tensor", "message"),
    [
        (4, "disaggregated", 8, 1, "MAPO_TRAINERS_PER_NODE=8 .* a node has 4 GPUs"),
        (4, "hetjob", 8, 1, "MAPO_TRAINERS_PER_NODE=8 .* a node has 4 GPUs"),
        (4, "colocated", 0, 1, "4 GPUs do not fit into the 3 of 4 .*MAPO_TRAINERS_PER_NODE"),
        (8, "colocated", 8, 1, "4 GPUs do not fit into the 0 of 8"),
        (8, "disaggregated", 8, 4, "rollout.server.count .* = 16 GPUs do not fit into the 8 of 8"),
        (8, "disaggregated", 8, 16, "rollout.server.tensor=16: a server does not reach beyond its node, which has 8"),
    ],
)
def test_a_node_that_cannot_hold_its_part_is_refused(
    gpus: int, layout: str, trainers: int, tensor: int, message: str, config: Config
) -> None:
    config.rollout.server.tensor = tensor
    with pytest.raises(ConfigError, match=message):
        slurm_task.fit_node(config, gpus, layout, trainers)


def test_what_sbatch_would_take_for_syntax_is_quoted(config: Config, tmp_path: Path) -> None:
    config.run.output_dir, config.run.name = str(tmp_path / '100%j of "it"'), "my run #1"
    lines = slurm.render(SlurmJob(3, 1, 8, 8, sbatch=("--comment=it's mine", "-p gpu")), None, [], config).splitlines()
    folder = f'{tmp_path}/100%%j of \\"it\\"/my run #1'
    assert f'#SBATCH --output="{folder}/logs/slurm-%j.out"' in lines
    assert '#SBATCH --job-name="my run #1"' in lines
    assert {'#SBATCH --comment="it\'s mine"', "#SBATCH -p gpu"} <= set(lines)


STEP_SCRIPT = """
set -u
MAPO_CONTAINER=$1 MAPO_MOUNTS=$2
cd "$3"
source "$4"
mapo_step "n1 n2" 4 --label -- /opt/python -m train "trainer.steps=1" "data.template=it's {question}"
"""
ON_NODES = ["--overlap", "--nodelist=n1,n2", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--label"]
COMMAND = ["/opt/python", "-m", "train", "trainer.steps=1", "data.template=it's {question}"]


def step_arguments(folder: Path, container: str, mounts: str = "") -> list[str]:
    """What ``srun`` is called with: another one is found first, that prints its arguments."""
    (folder / "srun").write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
    (folder / "srun").chmod(0o755)
    command = ["bash", "-c", STEP_SCRIPT, "script", container, mounts, str(folder), str(slurm.FUNCTIONS)]
    done = subprocess.run(command, env={"PATH": f"{folder}:/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_a_step_without_a_container_is_the_command(tmp_path: Path) -> None:
    found = step_arguments(tmp_path, "")
    assert found[-len(COMMAND) :] == COMMAND
    assert set(ON_NODES) <= set(found[: -len(COMMAND)])
    assert not any("container" in word for word in found)


def test_a_step_in_pyxis_names_image_folder_and_mounts(tmp_path: Path) -> None:
    found = step_arguments(tmp_path, "pyxis:nvcr.io#nvidia/pytorch:25.01-py3", "/data:/data,/models:/models:ro")
    assert found[-len(COMMAND) :] == COMMAND
    assert {
        *ON_NODES,
        "--container-image=nvcr.io#nvidia/pytorch:25.01-py3",
        f"--container-workdir={tmp_path}",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/models:/models:ro",
    } <= set(found[: -len(COMMAND)])
    alone = step_arguments(tmp_path, "pyxis:/images/mapo.sqsh")
    assert f"--container-mounts={tmp_path}:{tmp_path}" in alone


def test_a_step_in_apptainer_is_its_exec_with_the_gpus(tmp_path: Path) -> None:
    inside = ["apptainer", "exec", "--nv", "--pwd", str(tmp_path), "--bind", f"{tmp_path},/data:/data"]
    found = step_arguments(tmp_path, "apptainer:/images/mapo.sif", "/data:/data")
    first = found.index("apptainer")
    assert found[first:] == [*inside, "/images/mapo.sif", *COMMAND]
    assert set(ON_NODES) <= set(found[:first])
    assert not any(word.startswith("--container") for word in found)


def test_a_dry_run_prints_the_script_and_submits_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sbatch, submitted = tmp_path / "sbatch", tmp_path / "submitted"
    sbatch.write_text(f"#!/bin/sh\ntouch {submitted}\necho 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [
        "launch",
        "slurm",
        "--config",
        str(tmp_path / "run.yaml"),
        "--nodes=3",
        "--partition=gpu",
        "--account=me",
    ]
    assert cli.main([*command, "--dry-run", "trainer.steps=2"]) == 0
    script = capfd.readouterr().out
    assert script.startswith("#!/usr/bin/env bash\n")
    assert {"#SBATCH --nodes=3", "#SBATCH --partition=gpu", "#SBATCH --account=me"} <= set(script.splitlines())
    assert script.splitlines()[-1] == "mapo_run trainer.steps=2"
    assert not submitted.exists()
    assert not config.run_dir.exists()
    secret = "reward.options={api_key: hunter2}"
    assert cli.main([*command, "--dry-run", secret]) == 0
    assert shlex.split(capfd.readouterr().out.splitlines()[-1])[-1] == "reward.options={api_key: ***}"
    assert cli.main([*command, "trainer.steps=2"]) == 0
    assert submitted.exists()
    assert (config.run_dir / "logs/slurm_job.sh").read_text() == script


def test_no_sbatch_is_an_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no sbatch"):
        slurm.submit("", config)
