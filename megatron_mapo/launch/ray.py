"""``megatron-mapo launch ray``: servers and trainers in a placement group of a Ray cluster.

One bundle holds the trainer ranks of a node, one bundle each server. All bundles are reserved together or not at all.
An actor in every bundle (``launch.ray_hosts``) starts the same processes as ``launch local``. The actors belong to
this process: Ray ends them when it ends, however it ends, and they take everything that they have started along.

Nothing of ours travels through Ray but plain data, and no secret is in a runtime environment, which Ray shows on
command lines. A cluster that is started here listens on loopback and asks for a key.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mapo.config import Config, Dtype, data_parallel_size
from megatron_mapo.errors import ClusterError, ConfigError, Preempted, RolloutError
from megatron_mapo.launch.environment import rank_environments, thread_environment
from megatron_mapo.launch.local import make_log_folder, say
from megatron_mapo.launch.processes import POLL_SECONDS, SaveRequest, save_request, supervise
from megatron_mapo.launch.ray_cluster import (
    SAY_SECONDS,
    Bundle,
    Cluster,
    Resources,
    connection,
    node_resources,
    reserved,
    resource_text,
)
from megatron_mapo.rollout.client import read_api_key
from megatron_mapo.rollout.server import log_tail


@dataclass(frozen=True)
class RayJob:
    """What a run asks of Ray.

    Attributes:
        processes: trainer ranks.
        trainer_nodes: bundles that they are divided into; the ranks of a bundle are on one node.
        cpus_per_trainer: cores that a rank reserves; also its threads, unless ``trainer.threads`` is set.
        cpus_per_server: cores that a server reserves; also its threads, unless ``rollout.server.threads`` is set.
        placement: Ray's strategy for all bundles.
        address: of a cluster; ``auto``: the one that runs on this machine; None: ``RAY_ADDRESS``, or else a
            cluster of this machine is started for this run.
        wait: seconds until the bundles must be free.
        variables: names of environment variables that trainers and servers get from this process.
    """

    processes: int
    trainer_nodes: int = 1
    cpus_per_trainer: float = 1.0
    cpus_per_server: float = 1.0
    placement: str = "PACK"
    address: str | None = None
    wait: float = 600.0
    variables: tuple[str, ...] = ()

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a bundle."""
        return self.processes // self.trainer_nodes

    def check(self, config: Config) -> None:
        """Refuse a job whose ranks cannot be divided.

        Raises:
            ConfigError: names the option or key to change.
        """
        if self.processes % self.trainer_nodes:
            raise ConfigError(f"--trainer-nodes {self.trainer_nodes} does not divide --nproc {self.processes}")
        if missing := [name for name in self.variables if name not in os.environ]:
            raise ConfigError(f"--env {missing[0]}: there is no such variable in the environment")
        data_parallel_size(config, self.processes)

    def bundles(self, config: Config, gpus: bool) -> tuple[list[Resources], list[Resources]]:
        """What trainers and servers reserve.

        Args:
            config: the run.
            gpus: the cluster has any; then a rank takes one, and a server ``rollout.server.tensor``.
        """
        own = not (config.rollout.urls or config.rollout.urls_file)
        server = config.rollout.server
        of_ranks = {"CPU": self.cpus_per_trainer * self.ranks_per_node, "GPU": float(self.ranks_per_node)}
        of_server = {"CPU": self.cpus_per_server, "GPU": float(server.tensor)}
        trainers, servers = [of_ranks] * self.trainer_nodes, [of_server] * (server.count if own else 0)
        if gpus:
            return trainers, servers
        return [{"CPU": one["CPU"]} for one in trainers], [{"CPU": one["CPU"]} for one in servers]


# ------------------------------------------------------------------------------------------------------ resources


def this_machine() -> list[Resources]:
    """Resources of the cluster that is started when there is none: one node."""
    import torch

    return [{"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}]


def has_gpus(nodes: Sequence[Resources]) -> bool:
    """Whether any node has one."""
    return any(node.get("GPU", 0) > 0 for node in nodes)


def check_room(job: RayJob, config: Config, nodes: Sequence[Resources]) -> None:
    """Refuse a run that the cluster cannot hold even when it is idle.

    Args:
        job: what is asked.
        config: the run.
        nodes: resources of each node, those that are in use included.

    Raises:
        ConfigError: names the options and keys to change.
    """
    trainers, servers = job.bundles(config, has_gpus(nodes))
    bundles = [*trainers, *servers]
    at_once = [_sum(bundles)] if job.placement == "STRICT_PACK" else bundles
    fits = all(any(_covers(node, one) for node in nodes) for one in at_once) and _covers(_sum(nodes), _sum(bundles))
    if fits and not (job.placement == "STRICT_SPREAD" and len(bundles) > len(nodes)):
        return
    there = "; ".join(resource_text(node) for node in nodes)
    asked = [
        f"{len(trainers)} x {resource_text(trainers[0])} for trainers (--nproc, --trainer-nodes, --cpus-per-trainer)"
    ]
    if servers:
        keys = "rollout.server.count, rollout.server.tensor, --cpus-per-server"
        asked.append(f"{len(servers)} x {resource_text(servers[0])} for servers ({keys})")
    raise ConfigError(
        f"the Ray cluster cannot hold this run with --placement {job.placement}: it has {len(nodes)} node(s) with "
        f"{there}; asked are {' and '.join(asked)}"
    )


def _sum(parts: Sequence[Resources]) -> Resources:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in ("CPU", "GPU")}


def _covers(room: Resources, wanted: Resources) -> bool:
    return all(room.get(name, 0.0) >= amount - 1e-6 for name, amount in wanted.items())


def plan_rows(job: RayJob, config: Config) -> list[tuple[str, str]]:
    """What is reserved and where, for ``--dry-run``; a cluster that runs is looked at, none is started.

    Raises:
        ConfigError: the cluster cannot be reached, or cannot hold the run.
    """
    address = job.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        nodes, where = this_machine(), "one that is started on this machine"
    else:
        with connection(address, {}) as ray:
            nodes, where = node_resources(ray), f"at {address}"
    check_room(job, config, nodes)
    trainers, servers = job.bundles(config, has_gpus(nodes))
    there = "; ".join(resource_text(node) for node in nodes)
    rows = [
        ("Ray cluster", f"{where}: {len(nodes)} node(s) with {there}"),
        ("bundles", f"{len(trainers)} x {resource_text(trainers[0])}: {job.ranks_per_node} trainer rank(s) each"),
    ]
    if servers:
        rows.append(("", f"{len(servers)} x {resource_text(servers[0])}: a server each"))
    return [*rows, ("placement", job.placement)]


# ------------------------------------------------------------------------------------------------------------- run


@dataclass
class _Ranks:
    """The ranks of one bundle, as ``supervise`` watches them."""

    cluster: Cluster
    bundle: Bundle
    ended: Any = field(init=False)

    def __post_init__(self) -> None:
        self.ended = self.bundle.host.supervise.remote()

    def poll(self) -> int | None:
        """Exit code; None while they run."""
        return self.cluster.get(self.ended, self.bundle) if self.cluster.done(self.ended) else None

    def ask_to_save(self) -> None:
        """Make them finish their step, save, and end."""
        self.cluster.get(self.bundle.host.ask_to_save.remote(), self.bundle)


@dataclass
class _Server:
    """One server that is running.

    Attributes:
        url: base address.
        log: what ``serve`` printed.
        ended: reference to its exit code.
        missed: it is known to be gone.
    """

    bundle: Bundle
    url: str
    log: Path
    ended: Any
    missed: bool = False


def launch(job: RayJob, config_path: str | None, overrides: Sequence[str], config: Config) -> int:
    """Run servers and trainers in a Ray cluster until training ends.

    With ``rollout.urls`` or ``rollout.urls_file`` set no server is started. SIGTERM and SIGUSR1 make the trainers save
    and end.

    Args:
        job: what to ask of Ray.
        config_path: YAML file of the run, on a file system that all nodes share.
        overrides: ``section.key=value``.
        config: what those two say.

    Returns:
        0, or the exit code of the trainer that failed first.

    Raises:
        ConfigError: the layout, the cluster or the run folder is not usable.
        RolloutError: a server did not come up, or all were given up.
        ClusterError: the cluster is busy, or lost a node. Nothing is left running in any case.
    """
    job.check(config)
    logs = make_log_folder(config).absolute() / time.strftime("ray-%Y%m%dT%H%M%SZ", time.gmtime())
    address = job.address or os.environ.get("RAY_ADDRESS")
    machine = this_machine()
    if address is None:
        check_room(job, config, machine)
    file = [] if config_path is None else ["--config", str(Path(config_path).absolute())]
    variables = {name: os.environ[name] for name in job.variables} | _api_key(config)
    with connection(address, machine[0]) as ray:
        nodes = node_resources(ray)
        check_room(job, config, nodes)
        trainers, servers = job.bundles(config, has_gpus(nodes))
        with (
            reserved(ray, [*trainers, *servers], job.placement, job.wait) as group,
            Cluster(ray, group, len(trainers), variables) as cluster,
        ):
            logs.mkdir(parents=True, exist_ok=True)
            say(f"logs of this start: {logs}")
            _enter(cluster, Path.cwd())
            run = [*file, *overrides, f"model.dtype={_dtype(cluster, config)}"]
            serving = _start_servers(cluster, job, config, run, logs)
            if serving:
                run.append(f"rollout.urls={json.dumps([server.url for server in serving])}")
            code = _train(cluster, job, config, run, logs, serving)
    if code - 128 in signal.valid_signals():
        say(f"a trainer was killed by {signal.Signals(code - 128).name}; for SIGKILL look for a lack of memory")
    return code


def _api_key(config: Config) -> dict[str, str]:
    """The servers' key, as a variable: that of the user, or one for this run if its servers are started here."""
    others = config.rollout.urls or config.rollout.urls_file
    key = read_api_key(config.rollout.api_key_file) or ("" if others else secrets.token_urlsafe(32))
    return {"MAPO_API_KEY": key} if key else {}


def _enter(cluster: Cluster, folder: Path) -> None:
    for bundle in cluster.bundles:
        if wrong := cluster.get(bundle.host.enter.remote(str(folder)), bundle):
            raise ConfigError(
                f"node {bundle.address} does not see the current folder ({wrong}): all nodes must share it"
            )


def _dtype(cluster: Cluster, config: Config) -> str:
    """``model.dtype`` of trainers and servers alike; ``auto`` is what the first trainer node computes fast."""
    if config.model.dtype is not Dtype.auto:
        return config.model.dtype.value
    first = cluster.trainers[0]
    dtype = cluster.get(first.host.native_dtype.remote(), first)
    say(f"model.dtype: auto is {dtype} on node {first.address}")
    return dtype


def _start_servers(cluster: Cluster, job: RayJob, config: Config, run: list[str], logs: Path) -> list[_Server]:
    """Start the servers and wait until all answer."""
    server = config.rollout.server
    threads = server.threads or max(1, int(job.cpus_per_server))
    waiting = []
    for index, bundle in enumerate(cluster.servers):
        address, log = cluster.address(bundle), logs / f"server-{index}.log"
        own = ["rollout.server.count=1", f"rollout.server.host={address}", f"rollout.server.threads={threads}"]
        own.append(f"rollout.server.port={server.port + index if server.port else 0}")
        arguments = ["--log-dir", str(logs / f"server-{index}"), *run, *own]
        cluster.get(bundle.host.start.remote(arguments, address, str(log)), bundle)
        waiting.append((bundle, log, bundle.host.wait_ready.remote()))
    if waiting:
        say(f"starting {len(waiting)} server(s)")
    answers = [cluster.done(ready) for _, _, ready in waiting]
    said = time.monotonic()
    while not all(answers):
        _check_answers(cluster, waiting)
        time.sleep(POLL_SECONDS)
        answers = [cluster.done(ready) for _, _, ready in waiting]
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            say(f"servers ready: {sum(answers)} of {len(answers)}")
    _check_answers(cluster, waiting)
    found = [_Server(b, cluster.get(ready, b), log, b.host.wait_end.remote()) for b, log, ready in waiting]
    for one in found:
        say(f"server {one.url} on node {one.bundle.address}   log {one.log}")
    return found


def _check_answers(cluster: Cluster, waiting: Sequence[tuple[Bundle, Path, Any]]) -> None:
    """Raise the error of a server that ended while it was waited for."""
    for bundle, log, ready in waiting:
        if cluster.done(ready) and not cluster.get(ready, bundle):
            raise RolloutError(
                f"the server on node {bundle.address} did not come up; the end of {log}:\n{log_tail(log)}"
            )


def _train(
    cluster: Cluster, job: RayJob, config: Config, run: list[str], logs: Path, servers: Sequence[_Server]
) -> int:
    """Start the ranks and stay with them; their exit code."""
    first = cluster.trainers[0]
    host = cluster.address(first) if len({b.node for b in cluster.trainers}) > 1 else "127.0.0.1"
    port = cluster.get(first.host.free_port.remote(host), first)
    per_node = job.ranks_per_node
    threads = config.trainer.threads or max(1, int(job.cpus_per_trainer))
    arguments = [*run, f"trainer.threads={threads}"]
    # Servers that others started may be anywhere, and a cluster of one node does not know an address towards them.
    know = bool(servers) or not cluster.on_one_node
    for index, bundle in enumerate(cluster.trainers):
        own = rank_environments(host, port, job.processes, index * per_node, per_node)
        ranks = [thread_environment(threads) | rank for rank in own]
        address = cluster.address(bundle) if know else ""
        cluster.get(bundle.host.start.remote(arguments, address, ranks, str(logs)), bundle)
    follow = _Follow(logs / "rank-0.log")
    with save_request() as request:
        ranks_of = [_Ranks(cluster, bundle) for bundle in cluster.trainers]
        try:
            code = supervise(ranks_of, _checks(cluster, request, ranks_of, servers, follow))
        finally:
            follow()
    if code and servers and all(server.missed for server in servers):
        last = servers[-1]
        raise RolloutError(f"all servers are gone; the end of {last.log}:\n{log_tail(last.log)}")
    if code not in (0, Preempted.exit_code):
        say(f"the trainers failed with code {code}; the logs of all ranks are in {logs}")
    return code


def _checks(
    cluster: Cluster,
    request: SaveRequest,
    ranks: Sequence[_Ranks],
    servers: Sequence[_Server],
    follow: Callable[[], None],
) -> Callable[[], None]:
    """What is looked at while the trainers run. They find out themselves about servers that are gone."""

    def check() -> None:
        follow()
        request.pass_on(ranks)
        for server in servers:
            if not server.missed and cluster.done(server.ended):
                server.missed = True
                reason = "its actor or node ended"
                with contextlib.suppress(ClusterError):
                    reason = f"it is given up (code {cluster.get(server.ended, server.bundle)})"
                say(f"server {server.url}: {reason}, see {server.log}")

    return check


class _Follow:
    """Prints what is added to a log."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def __call__(self) -> None:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._position)
            text = file.read()
        self._position += len(text)
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()
