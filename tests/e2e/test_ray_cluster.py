"""A Ray cluster that others started: servers and trainers on nodes of their own, and nodes that die."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from process_trees import Tree
from runs import environment, rows

from megatron_mapo.errors import ClusterError, RolloutError

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nodes are at 127.0.0.1
    "RAY_memory_monitor_refresh_ms": "0",
}


class Nodes:
    """A head without cores, and three nodes that say they have two cores and two GPUs each.

    Attributes:
        settings: environment with the address and the key.
    """

    def __init__(self, folder: str) -> None:
        self.settings = SETTINGS | {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": folder}
        command = [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), "0:0", "2:2", "2:2", "2:2"]
        self._process = subprocess.Popen(
            command, env=os.environ | self.settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        told = json.loads(self._process.stdout.readline())
        self.settings["RAY_ADDRESS"] = told["address"]
        self._raylets = [psutil.Process(pid) for pid in told["raylets"]]

    def _commands(self) -> list[tuple[psutil.Process, psutil.Process, str]]:
        """Every process of the cluster: its raylet, itself, its command line."""
        found = []
        for raylet in [raylet for raylet in self._raylets if raylet.is_running()]:
            for process in raylet.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
                    found.append((raylet, process, " ".join(process.cmdline())))
        return found

    def with_command(self, text: str) -> psutil.Process:
        """The raylet of the node that runs a command of ours."""
        (found,) = {raylet for raylet, _, line in self._commands() if text in line}
        return found

    def ours(self) -> list[psutil.Process]:
        """Actors, trainers, servers, and all that they started."""
        actors = [process for _, process, line in self._commands() if line.startswith("ray::") and "Host" in line]
        return [*actors, *(process for actor in actors for process in actor.children(recursive=True))]

    def gpus(self, text: str) -> set[str]:
        """GPUs that the processes with this text in their command line may use."""
        return {process.environ()["CUDA_VISIBLE_DEVICES"] for _, process, line in self._commands() if text in line}

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # short: paths of sockets
        cluster = Nodes(folder)
        yield cluster
        cluster.end()


@pytest.fixture
def start(workspace: Path, tmp_path: Path, nodes: Nodes) -> Iterator:
    trees: list[Tree] = []

    def launch(*arguments: str) -> Tree:
        command = [sys.executable, "-m", "megatron_mapo", "launch", "ray", "--config", str(workspace / "config.yaml")]
        command += ["trainer.evaluation.at_start=false", "trainer.save_interval=0", *arguments]
        trees.append(Tree(command, environment() | nodes.settings, tmp_path / "log"))
        return trees[-1]

    yield launch
    for tree in trees:
        tree.end()


def wait_until_gone(processes: list[psutil.Process], tree: Tree) -> None:
    assert len(processes) >= 8, processes  # two actors, their keepers, a trainer, three of a server
    tree.wait_over(lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes))


def wait_for_a_step(tree: Tree, run: Path) -> None:
    tree.wait_until(lambda: (run / "metrics.jsonl").exists() and rows(run / "metrics.jsonl"))


def test_a_dead_driver_takes_everything_along(nodes: Nodes, workspace: Path, start) -> None:
    tree = start("run.name=driverless", "trainer.steps=100000", "--nproc", "2", "--placement", "STRICT_SPREAD")
    wait_for_a_step(tree, workspace / "runs/driverless")
    assert nodes.gpus("-m megatron_mapo.train") == {"0,1"}  # rank i takes the i-th
    assert nodes.gpus("-m megatron_mapo serve") in ({"0"}, {"1"})
    assert nodes.with_command("megatron_mapo.train") != nodes.with_command("server_main --serve")
    running = nodes.ours()
    tree.signal(signal.SIGKILL)
    tree.wait()
    wait_until_gone(running, tree)


def test_bundles_that_others_hold_are_waited_for(nodes: Nodes, workspace: Path, start) -> None:
    first = start("run.name=first", "trainer.steps=100000", "--nproc", "2", "--placement", "STRICT_SPREAD")
    wait_for_a_step(first, workspace / "runs/first")
    second = start("run.name=second", "--nproc", "2", "rollout.server.count=2", "--wait", "2")
    assert second.wait() == ClusterError.exit_code
    assert "--wait 2 s; free are CPU 3, GPU 3." in second.text()
    running = nodes.ours()
    first.signal(signal.SIGINT)
    assert first.wait() == 128 + signal.SIGINT
    wait_until_gone(running, first)


def test_a_dead_trainer_node_ends_the_run(nodes: Nodes, workspace: Path, start) -> None:
    tree = start("run.name=nodeless", "trainer.steps=100000", "--placement", "STRICT_SPREAD")
    wait_for_a_step(tree, workspace / "runs/nodeless")
    running = nodes.ours()
    nodes.with_command("megatron_mapo.train").kill()
    assert tree.wait() == ClusterError.exit_code, tree.text()
    assert "the Ray actor on node 127.0.0.1 ended" in tree.text()
    assert tree.left() == []
    wait_until_gone(running, tree)


def test_a_dead_server_node_ends_the_run_with_a_checkpoint(nodes: Nodes, workspace: Path, start) -> None:
    run = workspace / "runs/serverless"
    tree = start(
        f"run.name={run.name}", "trainer.steps=100000", "rollout.wait_timeout=2", "--placement", "STRICT_SPREAD"
    )
    wait_for_a_step(tree, run)
    running = nodes.ours()
    nodes.with_command("server_main --serve").kill()
    assert tree.wait() == RolloutError.exit_code, tree.text()
    assert "its actor or node ended" in tree.text()
    assert len(list((run / "checkpoints").glob("step_*"))) == 1
    wait_until_gone(running, tree)
