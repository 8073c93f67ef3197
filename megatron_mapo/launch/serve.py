"""``megatron-mapo serve``: the servers of a configuration, in the foreground."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from megatron_mapo.config import Config
from megatron_mapo.launch.local import say, start_servers
from megatron_mapo.launch.processes import POLL_SECONDS
from megatron_mapo.quickstart import resolve_model_path
from megatron_mapo.rollout.client import read_api_key
from megatron_mapo.rollout.supervisor import Supervisor


def serve(config: Config, log_dir: Path | None = None) -> NoReturn:
    """Start ``rollout.server.count`` servers and keep them running, until an exception (a signal, say) ends it.

    Args:
        config: the run.
        log_dir: folder of the servers' logs; None: `logs` in the run folder.

    Raises:
        MapoError: the model or the API key cannot be used, a server did not come up, or all were given up.
    """
    console = Console(stderr=True)
    with console.status("looking for the model"):
        model_path = str(resolve_model_path(config.model.path).absolute())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=model_path))
    servers = start_servers(config, read_api_key(config.rollout.api_key_file), console, log_dir)
    try:
        print(f"rollout.urls=[{','.join(servers.urls)}]", flush=True)
        console.print("serving; Ctrl-C ends it")
        with Supervisor(servers, say) as supervisor:
            while True:
                supervisor.check()
                time.sleep(POLL_SECONDS)
    finally:
        servers.stop()
