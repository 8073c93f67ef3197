"""What transformers says about a batch: the numbers that ours are compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mapo.data.sequences import SequenceBatch


def ragged_batch() -> SequenceBatch:
    """Six groups; prompts and responses from 1 to 200 tokens, one response empty."""
    g = torch.Generator().manual_seed(3)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, 260, (n,), generator=g).tolist()

    prompts, responses, ids = [], [], []
    groups = [(1, [1, 5]), (40, [3, 17, 2]), (7, [200]), (150, [9, 0, 30]), (2, [1])]
    for group, (prompt_len, lens) in enumerate(groups):
        prompt = tokens(prompt_len)
        for n in lens:
            prompts.append(prompt)
            responses.append(tokens(n))
            ids.append(group)
    return SequenceBatch.from_responses(prompts, responses, group_ids=ids)


def transformers_scores(path: Path, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all response tokens, float64 ``[R]``, from a float32 model, sequence by sequence."""
    # The others leave Gemma-2's cap on attention scores out.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return scores_of(model.eval(), batch)


@torch.no_grad()
def scores_of(model: torch.nn.Module, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """The same from a model that answers like transformers' causal language models."""
    logprobs, entropies = [], []
    for i in range(len(batch)):
        tokens = batch.tokens[batch.offsets[i] : batch.offsets[i + 1]].long()
        logp = model(tokens[None]).logits[0].double().log_softmax(-1)[int(batch.prompt_lens[i]) - 1 : -1]
        logprobs.append(logp.gather(1, tokens[int(batch.prompt_lens[i]) :, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)
