"""What the tests of this folder share beside fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_mapo.config import Dtype, ModelConfig, ServerConfig

API_KEY = "a-key-for-tests"
EOS = 2


def server_config(**options: Any) -> ServerConfig:
    """One server on a free loopback port with one thread and a small cache."""
    return ServerConfig(**{"port": 0, "threads": 1, "max_total_tokens": 8192, "startup_timeout": 240.0} | options)


def model_config(path: Path) -> ModelConfig:
    """A model folder served in float32."""
    return ModelConfig(path=str(path), dtype=Dtype.float32)


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def changed(path: Path, seed: int) -> PreTrainedModel:
    """The model with noise on every weight."""
    model = load(path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """As a trainer streams them: one buffer, overwritten for every tensor."""
    largest = max(p.numel() for p in model.parameters())
    buffer = torch.empty(largest)
    for name, parameter in model.named_parameters():
        view = buffer[: parameter.numel()].view(parameter.shape)
        view.copy_(parameter.detach())
        yield name, view
    buffer.fill_(float("nan"))


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
