"""Where the trainers of one start meet: a key-value store that nobody else reads.

It listens on the address by which rank 0 is known alone, on one machine on loopback (torch's own listens on every
interface). torchrun keeps one store for all its restarts, and a process group looks for its peers' addresses there:
after a restart it can find those of processes that are dead (pytorch issues 135712, 167288). The count of restarts in
the environment does not tell the starts apart, because each node has its own. So rank 0 names the start by a random
token, and every other rank makes sure that the rank 0 which wrote it is alive.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import os
import socket
import time
import uuid
from collections.abc import Mapping

from torch.distributed import PrefixStore, Store, TCPStore

_PATIENCE = 2.0
"""Seconds that a rank waits for rank 0's answer before it looks for a newer token."""


_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def process_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that a rank starts and that is no rank itself."""
    return {k: v for k, v in environment.items() if k not in _RANK and not k.startswith("TORCHELASTIC_")}


def meeting_place(rank: int, world_size: int, timeout: datetime.timedelta) -> Store | None:
    """The store of this start; None where torchrun keeps one that only torch can find. Collective.

    Args:
        rank: this process.
        world_size: number of processes.
        timeout: for everything that is asked of the store.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _part_of_agents_store(address, port, rank, world_size, timeout)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    address = "127.0.0.1" if address == "localhost" else address
    listener = _listener(address, port) if rank == 0 else None
    if listener is None:
        return TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    return TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())


def _listener(address: str, port: int) -> socket.socket | None:
    """A socket at this address of rank 0; None where others know it by an address that it does not have itself."""
    family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    name_of_loopback = ipaddress.ip_address(place[0]).is_loopback and place[0] != address
    if name_of_loopback:  # what the own host name is on some machines, and on no other machine
        return None
    try:
        return socket.create_server(place[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # a translated address
            return None
        raise


def _part_of_agents_store(address: str, port: int, rank: int, world_size: int, timeout: datetime.timedelta) -> Store:
    """The part of torchrun's store that belongs to this start."""
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    token = _lead(store, world_size) if rank == 0 else _follow(store, rank, timeout.total_seconds())
    return PrefixStore(f"start/{token}", store)


def _lead(store: Store, world_size: int) -> str:
    """Rank 0: name the start, and answer each rank's question with its own words."""
    token = uuid.uuid4().hex
    store.set("start/token", token)
    for rank in range(1, world_size):
        question = store.get(f"start/{token}/question/{rank}").decode()
        store.set(f"start/{token}/answer/{rank}", question)
    return token


def _follow(store: Store, rank: int, seconds: float) -> str:
    """Another rank: believe a token when its author answers; an old one's author is dead."""
    question = uuid.uuid4().hex
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        token = store.get("start/token").decode()
        store.set(f"start/{token}/question/{rank}", question)
        waited_for = time.monotonic() + _PATIENCE
        while time.monotonic() < waited_for:
            answer = f"start/{token}/answer/{rank}"
            if store.check([answer]) and store.get(answer).decode() == question:
                return token
            time.sleep(0.01)
    raise TimeoutError(f"rank {rank}: rank 0 did not answer within {seconds:g} s (trainer.collective_timeout)")
