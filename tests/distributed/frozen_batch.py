"""The frozen batch and the tiny models that all layouts train on."""

from __future__ import annotations

from pathlib import Path

import torch
from harness import Launcher
from tiny_models import ARCHITECTURES, make_tiny_model

from megatron_mapo.data.sequences import SequenceBatch

VOCAB = 301
"""Odd, so that tensor parallelism has to pad it."""
MODELS = {name: (name, {}) for name in ARCHITECTURES} | {
    "deep": ("llama_untied", {"num_hidden_layers": 4}),
    "deep_tied": ("llama", {"num_hidden_layers": 4}),
}
"""Name -> architecture and shape."""


def frozen_batch() -> SequenceBatch:
    """Four groups, shared and differing prompts, one empty response, responses from 1 to 31 tokens."""
    g = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=g).tolist()

    prompts, responses, ids = [], [], []
    for group, (prompt_len, lens) in enumerate([(12, [5, 9, 20]), (1, [3, 1]), (33, [31, 2, 0]), (7, [14])]):
        prompt = tokens(prompt_len)
        for n in lens:
            prompts.append(prompt)
            responses.append(tokens(n))
            ids.append(group)
    prompts[1] = [*prompts[1][:-1], (prompts[1][-1] + 1) % VOCAB]
    return SequenceBatch.from_responses(prompts, responses, group_ids=ids)


def build_frozen(launcher: Launcher, folder: Path) -> Path:
    """Fill ``folder`` with ``batch.safetensors``, one model folder and one file of columns per model."""
    for name, (arch, shape) in MODELS.items():
        make_tiny_model(folder / name, arch, vocab=VOCAB, **shape)
    frozen_batch().save(folder / "batch.safetensors")
    launcher.run(1, "freeze_columns", {"models": list(MODELS), "folder": str(folder)})
    return folder
