"""Faults of generation servers: real SGLang servers under a real run, disturbed in the middle of a step."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fault_runs import HERE, Outcome, outcome_of

sys.path.append(str(HERE.parent / "rollout"))

from fleet import Proxy, kill, served, wait_until
from server_support import API_KEY, model_config, server_config

from megatron_mapo.rollout.client import RolloutClient
from megatron_mapo.rollout.server import ServerGroup
from megatron_mapo.rollout.supervisor import Supervisor

STEP = 3
OVERRIDES = (
    *("trainer.hang_timeout=300", "rollout.probe_timeout=4", "rollout.timeout=60", "rollout.max_failures=2"),
    *("rollout.sync.timeout=30", "rollout.wait_timeout=200", "trainer.evaluation.interval=0"),
)


class Servers:
    """Two servers that are started again, each behind a proxy."""

    def __init__(self, group: ServerGroup, proxies: list[Proxy], urls: list[str]) -> None:
        self.group, self.proxies, self.urls = group, proxies, urls

    def kill(self, sig: signal.Signals = signal.SIGKILL, count: int = 1) -> None:
        """A signal to the first ``count``."""
        for server in self.group.servers[:count]:
            kill(server, sig)

    def rename(self) -> None:
        """The first reports weights of another version."""

        async def inside() -> None:
            client = RolloutClient([self.group.urls[0]], API_KEY)
            await client.on_all("/update_weight_version", {"new_version": "999999", "abort_all_requests": False})
            await client.close()

        asyncio.run(inside())

    def calm(self) -> None:
        """All is well again; wait until it is."""
        for proxy in self.proxies:
            proxy.garbage, proxy.delay = False, 0.0
        for server in self.group.servers:
            with contextlib.suppress(AssertionError):  # it has ended and is about to be started again
                kill(server, signal.SIGCONT)
        wait_until(lambda: all(server.ready() for server in self.group.servers))


@dataclass(frozen=True)
class ServerCase:
    """A fault of servers.

    Attributes:
        name: what happens.
        place: of the run when it happens, see ``served_trainer``.
        act: does it.
        says: what the run must print.
        overrides: further settings of the run.
    """

    name: str
    place: str
    act: Callable[[Servers], None]
    says: str = ""
    overrides: tuple[str, ...] = ()


def _garbage(servers: Servers) -> None:
    servers.proxies[0].garbage = True


def _nonsense(servers: Servers) -> None:
    for proxy in servers.proxies:
        proxy.garbage = True


def _slow(servers: Servers) -> None:
    servers.proxies[0].delay = 100.0


SERVER_CASES = [
    ServerCase("one is killed", "rollout", Servers.kill, r"is out: .*Cannot connect|is out: .*Disconnected|status 502"),
    ServerCase("one hangs", "rollout", lambda servers: servers.kill(signal.SIGSTOP), "is out: .*no answer within 4 s"),
    ServerCase("one answers garbage", "rollout", _garbage, "is out: 2 failures in a row"),
    ServerCase("one is slow: 100 s an answer", "rollout", _slow, "is slow: .* times the median"),
    ServerCase("one has another weight version", "rollout", Servers.rename, "weight version 999999"),
    ServerCase("all are killed", "rollout", lambda servers: servers.kill(count=2), "no generation server serves"),
    ServerCase(
        "all are gone for longer than the run waits",
        "rollout",
        lambda servers: servers.kill(count=2),
        r"rollout\.wait_timeout=1\)",
        ("rollout.wait_timeout=1",),
    ),
    ServerCase(
        "all answer garbage, more often than a request is sent again",
        "rollout",
        _nonsense,
        r"generation failed 2 times \(rollout\.retries=1\)",
        ("rollout.retries=1", "rollout.max_failures=1000"),
    ),
    ServerCase("one is killed", "weight update", Servers.kill, "is out: .*weight sync"),
    ServerCase("one hangs", "weight update", lambda servers: servers.kill(signal.SIGSTOP), "is out: .*weight sync"),
    ServerCase("the process group cannot form", "group", lambda servers: None, r"rollout\.sync\.mode=disk"),
]


@contextlib.contextmanager
def two_servers(workspace: Path) -> Iterator[Servers]:
    """Started, watched and started again."""
    config = server_config(count=2, restarts=20, restart_delay=0.1, hang_timeout=12.0)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(ServerGroup(config, model_config(workspace / "model"), workspace / "logs", API_KEY))
        proxies = [Proxy(url) for url in group.urls]
        urls = [stack.enter_context(served(proxy.app)) for proxy in proxies]
        stack.enter_context(Supervisor(group, lambda line: None))
        yield Servers(group, proxies, urls)


def run_server_case(case: ServerCase | None, servers: Servers, workspace: Path) -> Outcome:
    """The run with its fault (None: without one). One that ends with an error is started once more."""
    name = "undisturbed-servers" if case is None else re.sub(r"\W+", "-", f"{case.name} {case.place}")
    marker = workspace / f"{name}.marker"
    place, step = (case.place, STEP) if case else ("rollout", 10_000)
    command = [sys.executable, str(HERE / "served_trainer.py"), str(workspace / "config.yaml"), place, str(step)]
    command += [str(marker), f"run.name={name}", f"rollout.urls=[{','.join(servers.urls)}]", *OVERRIDES]
    log = workspace / f"{name}.log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MAPO_API_KEY": API_KEY, "PYTHONWARNINGS": "ignore"}
    servers.calm()
    codes: list[int] = []
    for attempt in range(2):
        overrides = case.overrides if case is not None and attempt == 0 else ()
        with log.open("a") as out:
            process = subprocess.Popen([*command, *overrides], stdout=out, stderr=out, env=environment)
            try:
                if case is not None and attempt == 0:
                    wait_until(lambda process=process: marker.exists() or process.poll() is not None)
                    case.act(servers)
                    Path(f"{marker}.done").touch()
                codes.append(process.wait(timeout=240))
            finally:
                process.kill()
        if codes[-1] == 0:
            break
        servers.calm()
    return outcome_of(codes, log.read_text(), marker, workspace / "runs" / name, time.time())
