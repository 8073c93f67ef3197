"""One real SGLang server on a tiny model for the whole folder."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_tiny_model

from megatron_mapo.config import Dtype, ModelConfig, ServerConfig, SyncConfig, SyncMode
from megatron_mapo.rollout.client import RolloutClient
from megatron_mapo.rollout.server import ServerGroup
from megatron_mapo.rollout.weight_sync import WeightSync

API_KEY = "a-key-for-tests"
EOS = 2


def server_config(**options: Any) -> ServerConfig:
    """One server on a free loopback port with one thread and a small cache."""
    return ServerConfig(**{"port": 0, "threads": 1, "max_total_tokens": 8192, "startup_timeout": 240.0} | options)


def model_config(path: Path) -> ModelConfig:
    """A model folder served in float32."""
    return ModelConfig(path=str(path), dtype=Dtype.float32)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def servers(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerGroup]:
    logs = tmp_path_factory.mktemp("logs")
    with ServerGroup(server_config(), model_config(model_path), logs, API_KEY) as group:
        yield group


@pytest.fixture(scope="session")
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


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float = 1.0):
    """Log-probs of ``response`` under the tempered distribution of a transformers model, float32 ``[R]``."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def descendants(pid: int) -> list[int]:
    """All descendants of a process."""
    found, queue = [], [pid]
    while queue:
        parent = queue.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            new = [int(child) for child in task.read_text().split()]
            found += new
            queue += new
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is not just a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def child_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
