"""What trainer ranks and servers find in their environment, whoever starts them. No torch."""

from __future__ import annotations

from collections.abc import Mapping


def interface_of(address: str) -> str | None:
    """Name of the network interface with ``address``."""
    import psutil

    named = psutil.net_if_addrs().items()
    return next((name for name, entries in named if any(entry.address == address for entry in entries)), None)


def network_environment(environment: Mapping[str, str], address: str) -> dict[str, str]:
    """Interfaces of gloo and NCCL, where ``environment`` has none.

    gloo would look up the host's own name, which fails where that is a loopback address; NCCL would choose by name.
    """
    interface = interface_of(address)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: chosen for name in names if (chosen := environment.get(name) or interface)}


def thread_environment(threads: int) -> dict[str, str]:
    """Threads of a rank that shares cores with servers: they take turns, so whoever waits must sleep and not spin."""
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def rank_environments(host: str, port: int, world_size: int, first: int, count: int) -> list[dict[str, str]]:
    """What torch.distributed reads, for the ranks of one node.

    Args:
        host: where rank 0 listens.
        port: at which port.
        world_size: ranks of all nodes.
        first: the node's first rank.
        count: ranks of the node.
    """
    common = {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(count)}
    return [{**common, "RANK": str(first + index), "LOCAL_RANK": str(index)} for index in range(count)]
