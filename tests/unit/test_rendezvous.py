"""Where ranks meet, and who else could come."""

from __future__ import annotations

import datetime
import socket

import psutil
import pytest

from megatron_mapo import rendezvous
from megatron_mapo.ports import free_ports

LIMIT = datetime.timedelta(seconds=20)


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch):
    """``meet(address)``: rank 0 and rank 1 exchange a word there; gives the addresses that rank 0 listened on."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def run(address: str, resolved: str = "127.0.0.1") -> set[str]:
        (port,) = free_ports(resolved, 1)
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", str(port))
        first = rendezvous.meeting_place(0, 1, LIMIT)
        assert first is not None
        listening = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
        first.set("word", "hello")
        monkeypatch.setenv("MASTER_ADDR", resolved)
        second = rendezvous.meeting_place(1, 1, LIMIT)
        assert second is not None
        assert second.get("word") == b"hello"
        return {where.ip.removeprefix("::ffff:") for where in listening if where.port == port}

    return run


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_the_store_listens_on_the_address_of_rank_0_alone(meet, address: str) -> None:
    resolved = "127.0.0.1" if address == "localhost" else address
    assert meet(address, resolved) == {resolved}


@pytest.mark.parametrize("elsewhere", ["127.0.1.1", "192.0.2.1"])
def test_an_address_that_only_others_know_rank_0_by(meet, monkeypatch: pytest.MonkeyPatch, elsewhere: str) -> None:
    """A host name that means loopback on its own host, or one that routers translate."""
    upstream = socket.getaddrinfo

    def resolve(host, port, *args, **options):
        return upstream(elsewhere if host == "first-node" else host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(rendezvous, "TCPStore", _at_loopback(rendezvous.TCPStore))
    assert meet("first-node") in ({"::"}, {"0.0.0.0"})


def _at_loopback(store):
    """torch resolves the name itself, and knows none of ours."""
    return lambda host, *args, **options: store(host.replace("first-node", "127.0.0.1"), *args, **options)
