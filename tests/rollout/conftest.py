"""One real SGLang server on a tiny model for the whole folder."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from server_support import API_KEY, model_config, server_config
from tiny_models import make_tiny_model

from megatron_mapo.config import SyncConfig, SyncMode
from megatron_mapo.rollout.client import RolloutClient
from megatron_mapo.rollout.server import ServerGroup
from megatron_mapo.rollout.weight_sync import WeightSync


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def servers(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerGroup]:
    """One server a file: some change its weights."""
    logs = tmp_path_factory.mktemp("logs")
    with ServerGroup(server_config(), model_config(model_path), logs, API_KEY) as group:
        yield group


@pytest.fixture(scope="module")
def sync(servers: ServerGroup, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeightSync]:
    """Distributed sync with buckets far smaller than the model."""
    config = SyncConfig(mode=SyncMode.distributed, bucket_mb=1, timeout=60.0)
    made = WeightSync(config, servers.urls, API_KEY, model_path, tmp_path_factory.mktemp("run"), torch.device("cpu"))
    yield made
    made.close()


@pytest.fixture
def call(servers: ServerGroup) -> Callable[[Callable[[RolloutClient], Any]], Any]:
    """``call(lambda client: client.generate(...))`` on the server, in an event loop of its own."""

    def run(work: Callable[[RolloutClient], Any], **options: Any) -> Any:
        async def inside() -> Any:
            client = RolloutClient(servers.urls, options.pop("api_key", API_KEY), **options)
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(inside())

    return run
