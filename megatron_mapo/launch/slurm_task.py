"""What the tasks of a Slurm job step run: ``python -m megatron_mapo.launch.slurm_task check|serve|train``.

``slurm_job.sh`` starts it on every node, with the interpreter of that component. It finds out what only the node
knows (addresses, free ports, which GPUs are left), sets the environment, and becomes ``megatron-mapo serve`` or a
trainer rank. Nothing is derived from ranks: a node's address is the one that it reaches its peers from, a port
is one that was free when it was asked for, and rank 0 tells the others both through a file in the run folder.

It blocks the signals of ``preemption``, which Slurm sends to every process of a step: only the trainers' ranks look
at them, at the end of a step; one that comes earlier stays pending. Servers go on until the job script ends them.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mapo.errors import ConfigError, MapoError
from megatron_mapo.launch.environment import network_environment
from megatron_mapo.ports import free_port
from megatron_mapo.preemption import SIGNALS

if TYPE_CHECKING:  # signals are blocked soon after the start: the import of what only some roles need is theirs
    from megatron_mapo.config import Config

RENDEZVOUS_SECONDS = 300.0
"""How long ranks wait for rank 0's address. Network file systems may show a new file only after a minute."""
POLL_SECONDS = 0.2


def node_address(own: str, nodes: Sequence[str], interface: str | None = None) -> str:
    """The address at which the other nodes of the job reach this one.

    It is where this node's packets to another one come from. A look-up of the own name would give 127.0.1.1 on
    many systems.

    Args:
        own: name of this node.
        nodes: names of all nodes of the job.
        interface: take the IPv4 address of this network interface.

    Returns:
        an address; loopback if the job has no other node.

    Raises:
        ConfigError: no other node's name can be resolved, or there is no such interface.
    """
    if interface:
        return _interface_address(interface)
    others = [node for node in nodes if node != own]
    for node in others:
        try:
            family, kind, *_, address = socket.getaddrinfo(node, 1, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing: a datagram socket only looks up the route
                return probe.getsockname()[0]
        except OSError:
            continue
    if others:
        raise ConfigError(
            f"node {own} cannot resolve or route to any of {', '.join(others)}: set MAPO_INTERFACE to the network "
            "interface that the nodes share"
        )
    return "127.0.0.1"


def _interface_address(interface: str) -> str:
    import psutil

    interfaces = psutil.net_if_addrs()
    for entry in interfaces.get(interface, []):
        if entry.family == socket.AF_INET:
            return entry.address
    raise ConfigError(f"MAPO_INTERFACE={interface} has no IPv4 address here; there are: {', '.join(interfaces)}")


def fit_node(config: Config, gpus: int, layout: str, trainers: int = 0) -> int:
    """Trainer ranks of a node: as many as asked for, or one a GPU that the servers on it leave.

    Args:
        config: the run.
        gpus: of a node; 0: it has none, or they are not known, and everything fits.
        layout: ``disaggregated``, ``colocated``, or ``hetjob``: the servers' nodes are of another kind.
        trainers: how many are asked for; 0: any number.

    Raises:
        ConfigError: trainers and servers do not fit; names the key to change.
    """
    if not gpus:
        return trainers or 1
    if trainers > gpus:
        raise ConfigError(
            f"MAPO_TRAINERS_PER_NODE={trainers} (launch slurm: --trainers-per-node), but a node has {gpus} GPUs: "
            "change it or --gpus-per-node"
        )
    shared = layout == "colocated"
    if layout != "hetjob":
        check_servers(config, gpus - max(trainers, 1) if shared else gpus, gpus)
    server = config.rollout.server
    return trainers or (gpus - server.count * server.tensor if shared else gpus)


def check_servers(config: Config, room: int, gpus: int) -> None:
    """Refuse servers that do not fit into ``room`` of the ``gpus`` of a node.

    Raises:
        ConfigError: names the key to change.
    """
    server = config.rollout.server
    if server.tensor > gpus:
        raise ConfigError(
            f"rollout.server.tensor={server.tensor}: a server does not reach beyond its node, which has {gpus} GPUs"
        )
    taken = server.count * server.tensor
    if taken > room:
        raise ConfigError(
            f"rollout.server.count * rollout.server.tensor = {taken} GPUs do not fit into the {room} of {gpus} that "
            "a node has for servers: change these keys, --gpus-per-node, or MAPO_TRAINERS_PER_NODE (launch slurm: "
            "--trainers-per-node, --server-nodes)"
        )


def gpus_left(visible: str, trainers: int) -> str:
    """GPUs of a node that its trainers do not use, as ``CUDA_VISIBLE_DEVICES``.

    Args:
        visible: the job's GPUs of this node, separated by commas. Rank i of the node takes the i-th.
        trainers: trainer ranks of this node.

    Raises:
        ConfigError: none is left.
    """
    devices = visible.split(",")
    if len(devices) <= trainers:
        raise ConfigError(
            f"no GPU is left for the servers: the job has {len(devices)} on this node and MAPO_TRAINERS_PER_NODE is "
            f"{trainers}. Use fewer trainers, or MAPO_LAYOUT=disaggregated"
        )
    return ",".join(devices[trainers:])


def join_rendezvous(path: Path, rank: int, address: str) -> tuple[str, int]:
    """Where rank 0 listens: it writes its address and a free port to ``path``, the others read them.

    Raises:
        ConfigError: rank 0 did not write within ``RENDEZVOUS_SECONDS``.
    """
    if rank == 0:
        port = free_port(address)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        partial.write_text(f"{address} {port}\n")
        partial.rename(path)
        return address, port
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while time.monotonic() < deadline:
        try:
            host, text = path.read_text().split()
        except FileNotFoundError:
            time.sleep(POLL_SECONDS)
            continue
        return host, int(text)
    raise ConfigError(
        f"rank {rank} on {socket.gethostname()} does not see {path} after {RENDEZVOUS_SECONDS:g} s: run.output_dir "
        "must be on a file system that all nodes share"
    )


def rank_environment(environment: Mapping[str, str], per_node: int, host: str, port: int) -> dict[str, str]:
    """What torch.distributed reads, from the variables that srun sets in a task."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // per_node))
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def check(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Read the configuration before anything is started; print the trainer ranks of a node and the run folder."""
    from megatron_mapo.config import data_parallel_size, load_config
    from megatron_mapo.hardware import visible_gpus
    from megatron_mapo.launch.arguments import parse_run
    from megatron_mapo.launch.local import make_log_folder

    config = load_config(*parse_run("slurm_task check", rest))
    trainers = fit_node(config, len(visible_gpus()), arguments.layout, arguments.trainers)
    data_parallel_size(config, arguments.nodes * trainers)
    startup = config.rollout.server.startup_timeout
    if arguments.start_timeout <= startup:
        raise ConfigError(
            f"MAPO_START_TIMEOUT={arguments.start_timeout:g} must be longer than "
            f"rollout.server.startup_timeout={startup:g}"
        )
    print(trainers, make_log_folder(config).parent.absolute())  # the last line is what slurm_job.sh reads


def serve(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Become ``megatron-mapo serve`` on this node's address, at free ports."""
    from megatron_mapo.config import load_config
    from megatron_mapo.hardware import visible_gpus
    from megatron_mapo.launch.arguments import parse_run

    print(f"servers of {os.environ['SLURMD_NODENAME']}", flush=True)  # which task is which node's: for slurm_job.sh
    address = _this_node()
    os.environ |= network_environment(os.environ, address)
    if gpus := visible_gpus():
        check_servers(load_config(*parse_run("slurm_task serve", rest)), len(gpus) - arguments.trainers, len(gpus))
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus_left(",".join(gpus), arguments.trainers)
    where = [f"rollout.server.host={address}", "rollout.server.port=0"]
    logs = arguments.logs / f"servers-{os.environ['SLURMD_NODENAME']}"
    _become("megatron_mapo", "serve", "--log-dir", str(logs), *rest, *where)


def train(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Become one trainer rank."""
    address = _this_node()
    host, port = join_rendezvous(arguments.rendezvous, int(os.environ["SLURM_PROCID"]), address)
    os.environ |= network_environment(os.environ, address)
    os.environ |= rank_environment(os.environ, arguments.per_node, host, port)
    _become("megatron_mapo.train", *rest)


def _this_node() -> str:
    nodes = os.environ["MAPO_NODES"].split()
    return node_address(os.environ["SLURMD_NODENAME"], nodes, os.environ.get("MAPO_INTERFACE"))


def _become(module: str, *arguments: str) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def main(argv: list[str]) -> int:
    """Run one role: its arguments, ``--``, and those of the run (a configuration and overrides)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    split = argv.index("--")
    rest = argv[split + 1 :]
    parser = argparse.ArgumentParser(prog="slurm_task")
    roles = parser.add_subparsers(required=True)
    role = roles.add_parser("check")
    role.add_argument("--nodes", type=int, required=True, help="with trainers")
    role.add_argument("--trainers", type=int, required=True, help="ranks of a node; 0: one a GPU that servers leave")
    role.add_argument("--layout", choices=["disaggregated", "colocated", "hetjob"], required=True)
    role.add_argument("--start-timeout", type=float, required=True, help="seconds that the job waits for its servers")
    role.set_defaults(run=check)
    role = roles.add_parser("serve")
    role.add_argument("--logs", type=Path, required=True, help="folder of the job's logs")
    role.add_argument("--trainers", type=int, default=0, help="trainer ranks on the same node, with the first GPUs")
    role.set_defaults(run=serve)
    role = roles.add_parser("train")
    role.add_argument("--per-node", type=int, required=True, help="ranks of this node")
    role.add_argument("--rendezvous", type=Path, required=True, help="file that rank 0 writes")
    role.set_defaults(run=train)
    arguments = parser.parse_args(argv[:split])
    try:
        arguments.run(arguments, rest)
    except MapoError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
