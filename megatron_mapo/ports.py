"""TCP ports of this machine that processes are about to listen at."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST, _TRIES = 10_000, 1000
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen at ``port`` of an address of this machine now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(host: str, count: int) -> list[int]:
    """Different ports that are free now, drawn at random.

    They lie below those that the system hands out for outgoing connections: until a server listens there, no
    connection of another process can take one away.

    Raises:
        OSError: there are not as many.
    """
    below = int(_OUTGOING.read_text().split()[0]) if _OUTGOING.exists() else 32768
    draw = random.SystemRandom()
    found: set[int] = set()
    for _ in range(_TRIES):
        if len(found) == count:
            return list(found)
        port = draw.randrange(_LOWEST, below if below > 2 * _LOWEST else 65536)
        if port_is_free(host, port):
            found.add(port)
    raise OSError(f"found only {len(found)} of {count} free ports at {host}")


def free_port(host: str = "127.0.0.1") -> int:
    """One of ``free_ports``."""
    return free_ports(host, 1)[0]
