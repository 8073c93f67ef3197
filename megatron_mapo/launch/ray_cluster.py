"""Ray itself, for ``launch.ray``: a connection, a reservation, and the actors in it. The only file that imports Ray.

A cluster that is started here listens on loopback and asks for a key.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_mapo.errors import ClusterError, ConfigError
from megatron_mapo.launch.local import say
from megatron_mapo.launch.processes import POLL_SECONDS, STOP_SECONDS, Kept, Stopped
from megatron_mapo.launch.ray_hosts import Host, ServerHost, TrainerHost
from megatron_mapo.rollout.server import log_tail

SAY_SECONDS = 15.0
"""Between two lines about what is being waited for."""
_CONNECT_SECONDS = 20.0
_START_SECONDS = 180.0
_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's least: nothing large goes through it."""
_THREADS = 4
"""Calls of one actor at a time: one that waits, one that asks to save, one that stops."""

_PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # Despite its name: without "cluster" nodes are at 127.0.0.1, else Ray takes the network's address instead.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would kill an actor, with all that it started, when the machine's memory runs low.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray's workers make way for all else (15), and trainers and servers inherit it.
    "RAY_worker_niceness": "0",
}
"""Environment of a cluster that only this process may use; with a key beside it."""

Resources = dict[str, float]


def resource_text(resources: Resources) -> str:
    """Cores and GPUs, for people."""
    return ", ".join(f"{name} {resources.get(name, 0):g}" for name in ("CPU", "GPU") if resources.get(name, 0))


@contextmanager
def connection(address: str | None, machine: Resources) -> Iterator[Any]:
    """The module ``ray``, connected to a cluster: that of ``address``, or one that is started and ends with this.

    Args:
        address: of the cluster; ``auto``: this machine's; None: one is started.
        machine: resources of the cluster that is started.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
        ClusterError: the cluster that is started does not come up.
    """
    with ExitStack() as stack:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("launch ray needs Ray: pip install 'megatron-mapo[ray]'")
        if address is None:
            address = stack.enter_context(_private_cluster(machine))
        _check_address(address)
        import ray

        stack.callback(ray.shutdown)
        try:
            with _signal_handlers_stay():
                ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
        except SystemExit as end:  # what Ray's own handler of SIGTERM raises
            raise Stopped(signal.SIGTERM) from end
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--address {address}: {' '.join(str(error).split())}") from error
        yield ray


@contextmanager
def _private_cluster(machine: Resources) -> Iterator[str]:
    """The address of a cluster of one node that only this process may use.

    It is under a keeper: Ray's agents outlive the head for minutes when it is killed.
    """
    os.environ |= _PRIVATE | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}  # before Ray is imported
    folder = Path(tempfile.mkdtemp(prefix="mapo-ray-"))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
    command += [f"--num-cpus={machine['CPU']:g}", f"--num-gpus={machine['GPU']:g}", f"--temp-dir={folder}"]
    command += [f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    try:
        with Kept(command, log=folder / "start.log") as head:
            yield _wait_for_head(head, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_head(head: Kept, folder: Path) -> str:
    """The address that the head writes when it is up."""
    told, deadline = folder / "ray_current_cluster", time.monotonic() + _START_SECONDS
    while head.poll() is None and time.monotonic() < deadline:
        if told.exists() and (address := told.read_text().strip()):
            return address
        time.sleep(POLL_SECONDS)
    raise ClusterError(f"Ray does not start on this machine:\n{log_tail(folder / 'start.log')}")


def _check_address(address: str) -> None:
    """Ray itself would try for a quarter of an hour."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise ConfigError(f"--address {address}: must be HOST:PORT of the cluster's head, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there: {error}") from error


@contextmanager
def _signal_handlers_stay() -> Iterator[None]:
    """Ray puts a handler of its own in place of SIGTERM's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def node_resources(ray: Any) -> list[Resources]:
    """What each node that is alive has, free or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def reserved(ray: Any, bundles: list[Resources], strategy: str, patience: float) -> Iterator[Any]:
    """A placement group of these bundles, once all of them are free.

    Args:
        ray: of ``connection``.
        bundles: what to reserve.
        strategy: Ray's, of placing them.
        patience: seconds to wait.

    Raises:
        ClusterError: they were not free in time.
    """
    from ray.util import placement_group, remove_placement_group

    group = placement_group(bundles, strategy=strategy)
    try:
        begin = said = time.monotonic()
        while not group.wait(timeout_seconds=1):
            now = time.monotonic()
            if now - begin > patience:
                raise ClusterError(
                    f"the bundles of this run were not free within --wait {patience:g} s; free are "
                    f"{resource_text(ray.available_resources()) or 'none'}. Others use the cluster, or --placement "
                    f"{strategy} cannot be met"
                )
            if now - said > SAY_SECONDS:
                said = now
                say(f"waiting for the bundles; free are {resource_text(ray.available_resources()) or 'none'}")
        yield group
    finally:
        remove_placement_group(group)


# ---------------------------------------------------------------------------------------------------------- actors


@dataclass
class Bundle:
    """One bundle with its actor.

    Attributes:
        host: handle of the actor.
        node: Ray's id of the node.
        address: at which other nodes reach it.
    """

    host: Any
    node: str
    address: str


class Cluster:
    """The actors of a run; a context manager that ends them and all that they started.

    Attributes:
        trainers: bundles with ranks; those on one node are neighbours.
        servers: bundles with a server each.
    """

    def __init__(self, ray: Any, group: Any, trainers: int, variables: Mapping[str, str]) -> None:
        from ray.util import placement_group_table

        self._ray = ray
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        places: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
        kinds: list[type[Host]] = [TrainerHost if index < trainers else ServerHost for index in sorted(places)]
        bundles = [
            Bundle(self._actor(kind, group, index, variables), places[index], nodes[places[index]])
            for index, kind in enumerate(kinds)
        ]
        self.trainers = sorted(bundles[:trainers], key=lambda bundle: bundle.node)
        self.servers = bundles[trainers:]

    def _actor(self, kind: type[Host], group: Any, index: int, variables: Mapping[str, str]) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        reserved = group.bundle_specs[index]
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        actor = self._ray.remote(kind).options(
            num_cpus=reserved.get("CPU", 0),
            num_gpus=reserved.get("GPU", 0),
            max_concurrency=_THREADS,
            scheduling_strategy=place,
        )
        return actor.remote(dict(variables))

    @property
    def on_one_node(self) -> bool:
        """Whether loopback will do."""
        return len({bundle.node for bundle in self.bundles}) == 1

    @property
    def bundles(self) -> list[Bundle]:
        """All of them."""
        return [*self.trainers, *self.servers]

    def address(self, bundle: Bundle) -> str:
        """Where processes of this bundle listen."""
        return "127.0.0.1" if self.on_one_node else bundle.address

    def get(self, reference: Any, bundle: Bundle) -> Any:
        """The answer of a bundle's actor.

        Raises:
            ClusterError: its process or its node has ended.
        """
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            raise ClusterError(f"the Ray actor on node {bundle.address} ended: {_first_line(error)}") from error

    def done(self, reference: Any) -> bool:
        """Whether the answer is there."""
        return bool(self._ray.wait([reference], timeout=0)[0])

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End trainers, then servers, then the actors. One that is gone already has taken its processes along."""
        for bundles in (self.trainers, self.servers):
            if stopping := [bundle.host.stop.remote() for bundle in bundles]:
                self._ray.wait(stopping, num_returns=len(stopping), timeout=2 * STOP_SECONDS)
        for bundle in self.bundles:
            self._ray.kill(bundle.host)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
