"""Ports that are about to be listened at."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_mapo import ports
from megatron_mapo.ports import free_ports, port_is_free


def test_free_ports_differ_and_no_outgoing_connection_can_take_them() -> None:
    found = free_ports("127.0.0.1", 20)
    assert len(set(found)) == 20
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert first_outgoing < 20_000 or max(found) < first_outgoing
    for port in found:
        with socket.create_server(("127.0.0.1", port)):
            assert not port_is_free("127.0.0.1", port)


def test_too_few_free_ports_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "port_is_free", lambda host, port: False)
    with pytest.raises(OSError, match="found only 0 of 1 free ports"):
        free_ports("127.0.0.1", 1)
