"""``megatron-mapo launch local``: servers and trainers on this machine, under one supervisor."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from megatron_mapo.config import Config, data_parallel_size
from megatron_mapo.errors import ConfigError
from megatron_mapo.launch.environment import rank_environments, thread_environment
from megatron_mapo.launch.processes import Kept, save_request, supervise
from megatron_mapo.ports import free_port
from megatron_mapo.quickstart import resolve_model_path
from megatron_mapo.rollout.client import read_api_key
from megatron_mapo.rollout.server import ServerGroup
from megatron_mapo.rollout.supervisor import Supervisor


def default_processes(config: Config) -> int:
    """Trainer processes of this machine: one a GPU; without a GPU as many as one model replica needs."""
    import torch

    parallel = config.actor.parallel
    return torch.cuda.device_count() or parallel.tensor * parallel.pipeline * parallel.context


def trainer_command(config_path: str | None, overrides: Sequence[str]) -> list[str]:
    """The command of every trainer process."""
    config = [] if config_path is None else ["--config", config_path]
    return [sys.executable, "-m", "megatron_mapo.train", *config, *overrides]


def trainer_environments(base: Mapping[str, str], config: Config, processes: int) -> list[dict[str, str]]:
    """Environment of each trainer process: its rank, as torchrun would tell it, and its threads.

    The ranks meet on loopback at a free port. torchrun itself is left out because it replaces their exit
    codes by its own and ends all ranks before the one that knows the reason has printed it.

    Args:
        base: environment to start from.
        config: the run's configuration.
        processes: trainer processes on this machine.
    """
    threads = config.trainer.threads or max(1, len(os.sched_getaffinity(0)) // processes)
    common = thread_environment(threads)
    if not (config.rollout.urls or config.rollout.urls_file):
        # All servers are here too: gloo need not find out an address of this machine.
        common["GLOO_SOCKET_IFNAME"] = base.get("GLOO_SOCKET_IFNAME", "lo")
    ranks = rank_environments("127.0.0.1", free_port(), processes, 0, processes)
    return [{**base, **common, **rank} for rank in ranks]


def make_log_folder(config: Config) -> Path:
    """``logs`` in the run folder.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = config.run_dir / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot make {folder}: {error.strerror}") from error
    return folder


def start_servers(config: Config, api_key: str | None, console: Console, log_dir: Path | None = None) -> ServerGroup:
    """Start the servers of ``rollout.server`` and wait until they answer. ``model.path`` must be a folder.

    Their logs are in ``log_dir``, or in ``logs`` of the run folder.

    Raises:
        ConfigError, RolloutError: the log folder cannot be made, or a server does not come up.
    """
    logs = log_dir or make_log_folder(config)
    with console.status(f"starting {config.rollout.server.count} server(s)") as status:
        servers = ServerGroup(config.rollout.server, config.model, logs, api_key, status.update)
        servers.start()
    for server in servers.servers:
        console.print(f"server {server.url}   log {server.log}", highlight=False, soft_wrap=True)
    return servers


def launch(config_path: str | None, overrides: Sequence[str], config: Config, processes: int) -> int:
    """Run servers and trainers until training ends.

    With ``rollout.urls`` or ``rollout.urls_file`` set no server is started. Servers that end or hang are started
    again; when none is left, the trainers find out, save a checkpoint and end. SIGTERM and SIGUSR1 make the trainers
    save and end.

    Args:
        config_path: YAML file, for the trainers.
        overrides: ``section.key=value``, for the trainers.
        config: what those two say.
        processes: number of trainer processes.

    Returns:
        0, or the exit code of the trainer that failed first.

    Raises:
        ConfigError, DataError: the layout, the model or the run folder is not usable.
        RolloutError: a server did not come up, or all were given up. Nothing is left running.
    """
    data_parallel_size(config, processes)
    console = Console(stderr=True)
    with console.status("looking for the model"):
        model_path = str(resolve_model_path(config.model.path).absolute())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=model_path))
    make_log_folder(config)
    environment = dict(os.environ)
    # What was settled here holds for servers and trainers alike.
    arguments = [*overrides, f"model.path={json.dumps(model_path)}", f"model.dtype={config.model.dtype.value}"]
    with ExitStack() as stack:
        supervisor = None
        if not (config.rollout.urls or config.rollout.urls_file):
            api_key = read_api_key(config.rollout.api_key_file) or secrets.token_urlsafe(32)
            servers = start_servers(config, api_key, console)
            stack.callback(servers.stop)
            supervisor = stack.enter_context(Supervisor(servers, say))
            # Through the environment only: a command line is visible to every user of the machine.
            environment["MAPO_API_KEY"] = api_key
            arguments.append(f"rollout.urls={json.dumps(servers.urls)}")
        command = trainer_command(config_path, arguments)
        ranks = trainer_environments(environment, config, processes)
        request = stack.enter_context(save_request())
        trainers = [stack.enter_context(Kept(command, env)) for env in ranks]
        # Servers that end are started again, and the trainers find out about those that are not.
        code = supervise(trainers, lambda: request.pass_on(trainers))
        if code and supervisor is not None:
            supervisor.check()
    if code - 128 in signal.valid_signals():
        name = signal.Signals(code - 128).name
        console.print(f"a trainer was killed by {name}; for SIGKILL look for a lack of memory", style="red")
    return code


def say(line: str) -> None:
    """One line on standard error."""
    print(line, file=sys.stderr, flush=True)
