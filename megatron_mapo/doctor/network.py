"""Ports of servers to start, servers that are to be used, and Slurm."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from megatron_mapo.config import Config
from megatron_mapo.doctor.finding import Finding, failure, ok, warning
from megatron_mapo.errors import RolloutError
from megatron_mapo.rollout.client import read_api_key
from megatron_mapo.rollout.pool import read_urls_file
from megatron_mapo.rollout.server import DIRECT, choose_ports, is_loopback

_SECONDS = 10


def check(config: Config) -> Iterator[Finding]:
    """Where servers listen, or whether those of ``rollout.urls`` and its file answer; whether Slurm does."""
    try:
        key = read_api_key(config.rollout.api_key_file)
    except RolloutError as error:
        key = None
        file = config.rollout.api_key_file
        fix = f"chmod 600 {file}" if Path(str(file)).exists() else f"umask 077; openssl rand -hex 32 > {file}"
        yield failure("rollout.api_key_file", str(error), fix)
    if config.rollout.urls or config.rollout.urls_file:
        yield from _servers(config, key)
    else:
        yield _ports(config)
        host = config.rollout.server.host
        if key is None and not is_loopback(host):
            yield failure(
                "API key",
                f"rollout.server.host={host} opens the servers to the network, and no key is set",
                "export MAPO_API_KEY=$(openssl rand -hex 32)",
            )
    yield _slurm()


def _ports(config: Config) -> Finding:
    server = config.rollout.server
    try:
        ports = choose_ports(server)
    except (RolloutError, OSError) as error:  # OSError: the host is no address of this machine
        return failure("rollout.server.port", str(error), "rollout.server.port=0 picks free ports (`launch local`)")
    shown = "free ports are picked" if server.port == 0 else f"{', '.join(map(str, ports))} free"
    return ok("rollout.server.port", f"{shown} on {server.host}")


def _servers(config: Config, key: str | None) -> Iterator[Finding]:
    rollout = config.rollout
    for url in rollout.urls:
        yield _answers("rollout.urls", url.rstrip("/"), key)
    if rollout.urls_file is None:
        return
    try:
        for url in read_urls_file(rollout.urls_file):
            yield _answers("rollout.urls_file", url.rstrip("/"), key)
    except RolloutError as error:
        yield failure("rollout.urls_file", str(error), f"echo http://HOST:30000 > {rollout.urls_file}")


def _answers(name: str, url: str, key: str | None) -> Finding:
    request = urllib.request.Request(f"{url}/model_info")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with DIRECT.open(request, timeout=_SECONDS):
            return ok(name, f"{url} answers")
    except urllib.error.HTTPError as error:
        fix = "export MAPO_API_KEY=KEY, or rollout.api_key_file=FILE: the server's key"
        return failure(name, f"{url}: status {error.code}", fix)
    except (OSError, http.client.HTTPException) as error:
        return failure(name, f"{url} does not answer: {error}", "megatron-mapo serve --config FILE")


def _slurm() -> Finding:
    if shutil.which("scontrol") is None:
        return ok("Slurm", "not installed; only `sbatch` scripts need it")
    fix = "without Slurm: megatron-mapo launch local. Else: systemctl status slurmctld on the controller"
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=3 * _SECONDS)
    except subprocess.TimeoutExpired:
        return warning("Slurm", "scontrol ping does not answer", fix)
    said = (done.stdout + done.stderr).strip().splitlines() or [f"scontrol ping: exit code {done.returncode}"]
    up = done.returncode == 0 and any(" UP" in line for line in said)
    return ok("Slurm", said[0]) if up else warning("Slurm", said[-1], fix)
