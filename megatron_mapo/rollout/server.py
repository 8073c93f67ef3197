"""Start, watch and stop SGLang servers on this machine."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megatron_mapo.config import ModelConfig, ServerConfig
from megatron_mapo.errors import RolloutError
from megatron_mapo.patches import sglang_cpu
from megatron_mapo.ports import free_ports, port_is_free
from megatron_mapo.process_tree import GRACE

TAIL_LINES = 20
POLL_SECONDS = 0.2

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens addresses as the trainers do: no proxy stands between them and their servers, and none gets the key."""

Progress = Callable[[str], None]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def log_tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a server's log."""
    if not path.exists():
        return "(no log)"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def choose_ports(config: ServerConfig) -> list[int]:
    """One port per server: ``port + i``, or free ones when ``port`` is 0.

    Raises:
        RolloutError: a port is in use.
    """
    if config.port == 0:
        return free_ports(config.host, config.count)
    ports = [config.port + i for i in range(config.count)]
    for port in ports:
        if not port_is_free(config.host, port):
            raise RolloutError(
                f"port {port} on {config.host} is in use; change rollout.server.port (0 picks free ports), "
                "or end the process that listens there"
            )
    return ports


def server_arguments(config: ServerConfig, model: ModelConfig, port: int, index: int = 0) -> list[str]:
    """Arguments of ``sglang.launch_server`` for server ``index`` on this machine; on CUDA each has its own GPUs."""
    args = ["--model-path", model.path, "--dtype", model.dtype.value, "--host", config.host, "--port", str(port)]
    args += ["--max-running-requests", str(config.max_running_requests), "--skip-server-warmup"]
    if sglang_cpu.needed():
        args += ["--device", "cpu", "--attention-backend", "torch_native", "--disable-cuda-graph", "--sleep-on-idle"]
        args += ["--mem-fraction-static", "0.3", "--max-total-tokens", str(config.max_total_tokens)]
    else:
        args += ["--tp-size", str(config.tensor), "--base-gpu-id", str(index * config.tensor)]
        args += ["--mem-fraction-static", str(config.mem_fraction)]
    return [*args, *config.extra_args]


class Server:
    """One SGLang server and its keeper process (see ``server_main``).

    Attributes:
        url: base address.
        log: file with its output.
    """

    def __init__(self, url: str, log: Path, arguments: list[str], api_key: str | None, env: dict[str, str]) -> None:
        self.url = url
        self.log = log
        self._arguments = arguments
        self._api_key = api_key
        self._env = env
        self._keeper: subprocess.Popen | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")

    def start(self) -> None:
        """Start it; again after ``stop``. What it prints is added to the log."""
        assert self._keeper is None
        with open(self.log, "ab") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "megatron_mapo.rollout.server_main"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        order = {"args": self._arguments, "api_key": self._api_key, "log": str(self.log.absolute())}
        self._pipe.write(json.dumps(order).encode() + b"\n")
        self._pipe.flush()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        return self._keeper.stdin

    @property
    def pid(self) -> int:
        """Process id of the keeper."""
        assert self._keeper is not None
        return self._keeper.pid

    def status(self) -> int | None:
        """Exit status; None while it runs, or if it was stopped from here."""
        return None if self._keeper is None else self._keeper.poll()

    def check(self) -> None:
        """Raise if the server ended.

        Raises:
            RolloutError: with the end of its log.
        """
        status = self.status()
        if status is not None:
            raise RolloutError(
                f"the server {self.url} ended with status {status}; the end of {self.log}:\n{log_tail(self.log)}"
            )

    def ready(self) -> bool:
        """Whether it answers ``/model_info``."""
        request = urllib.request.Request(f"{self.url}/model_info")
        if self._api_key is not None:
            request.add_header("Authorization", f"Bearer {self._api_key}")
        try:
            with DIRECT.open(request, timeout=5) as reply:
                return reply.status == 200
        except (OSError, http.client.HTTPException):
            return False

    def hang_up(self) -> None:
        """Tell the keeper to end the server, without waiting."""
        if self._keeper is not None and not self._pipe.closed:
            with contextlib.suppress(BrokenPipeError):  # it ended before it had read its order
                self._pipe.close()

    def stop(self) -> None:
        """End the server and wait until it and its descendants are gone."""
        if self._keeper is None:
            return
        self.hang_up()
        try:
            self._keeper.wait(timeout=2 * GRACE)
        except subprocess.TimeoutExpired:
            self._keeper.kill()  # the kernel then kills the server
            self._keeper.wait()
        self._keeper = None


class ServerGroup:
    """``config.count`` servers with the same model; a context manager.

    ``with ServerGroup(...) as servers:`` starts them, waits until all answer, and ends them on the
    way out. They also end when this process dies in any way, ``kill -9`` included.

    Args:
        config: section ``rollout.server``.
        model: section ``model``; ``path`` must be a folder.
        log_dir: folder of the log files, ``server-PORT.log``.
        api_key: key that every request must bring; none: no key is asked.
        progress: called with one line about what is being waited for.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ModelConfig,
        log_dir: str | Path,
        api_key: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.log_dir = Path(log_dir)
        self.api_key = api_key
        self.servers: list[Server] = []
        self._progress = progress or (lambda line: None)

    @property
    def urls(self) -> list[str]:
        """Base addresses, in order."""
        return [server.url for server in self.servers]

    def _check_config(self) -> None:
        if not (Path(self.model.path) / "config.json").is_file():
            raise RolloutError(f"model.path={self.model.path}: no config.json there; it must be a model folder")
        if self.api_key is None and not is_loopback(self.config.host):
            raise RolloutError(
                f"rollout.server.host={self.config.host} opens the servers to the network and needs an API key: "
                "set rollout.api_key_file or the environment's MAPO_API_KEY, or use 127.0.0.1"
            )
        if sglang_cpu.needed() and self.config.tensor != 1:
            raise RolloutError(
                f"rollout.server.tensor={self.config.tensor}: a machine without a GPU serves with tensor=1"
            )

    def _environment(self) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0))
        threads = self.config.threads or max(1, cores // self.config.count)
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return sglang_cpu.environment({**os.environ, **offline}, threads)

    def start(self) -> ServerGroup:
        """Start the servers and wait until all answer.

        Raises:
            RolloutError: the configuration cannot work, a port is in use, a server ended, or one
                did not answer within ``startup_timeout``. None is left running then.
        """
        self._check_config()
        env = self._environment()
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        try:
            for index, port in enumerate(choose_ports(self.config)):
                log = self.log_dir / f"server-{port}.log"
                args = server_arguments(self.config, self.model, port, index)
                self.servers.append(Server(f"http://{host}:{port}", log, args, self.api_key, env))
                self.servers[-1].start()
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        begin = time.monotonic()
        waiting = list(self.servers)
        while waiting:
            self.check()
            waiting = [server for server in waiting if not server.ready()]
            seconds = time.monotonic() - begin
            up = len(self.servers) - len(waiting)
            self._progress(f"servers ready: {up} of {len(self.servers)} after {seconds:.0f} s")
            if waiting and seconds > self.config.startup_timeout:
                first = waiting[0]
                raise RolloutError(
                    f"the server {first.url} did not answer within rollout.server.startup_timeout="
                    f"{self.config.startup_timeout:g} s; the end of {first.log}:\n{log_tail(first.log)}"
                )
            if waiting:
                time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise ``RolloutError`` with the end of the log if any server ended."""
        for server in self.servers:
            server.check()

    def stop(self) -> None:
        """End all servers. May be called again."""
        for server in self.servers:
            server.hang_up()
        for server in self.servers:
            server.stop()
        self.servers = []

    def __enter__(self) -> ServerGroup:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()
