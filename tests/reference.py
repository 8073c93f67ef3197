"""What transformers says about a batch: the numbers that ours are compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mapo.data.sequences import SequenceBatch


@torch.no_grad()
def transformers_scores(path: Path, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all response tokens, float64 ``[R]``, from a float32 model, sequence by sequence."""
    # The others leave Gemma-2's cap on attention scores out.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    logprobs, entropies = [], []
    for i in range(len(batch)):
        tokens = batch.tokens[batch.offsets[i] : batch.offsets[i + 1]].long()
        logp = model(tokens[None]).logits[0].double().log_softmax(-1)[int(batch.prompt_lens[i]) - 1 : -1]
        logprobs.append(logp.gather(1, tokens[int(batch.prompt_lens[i]) :, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)
