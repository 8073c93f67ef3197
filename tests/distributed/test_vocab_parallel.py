"""Log-probs over a vocabulary that is cut between two ranks, evenly and padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Launcher
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(
    ("vocab", "temperature", "softcap", "chunk"), [(50, 1.0, None, 7), (51, 0.6, None, 64), (51, 0.6, 3.0, 7)]
)
def test_cut_vocabulary_equals_the_whole_one(
    vocab: int, temperature: float, softcap: float | None, chunk: int, launcher: Launcher, tmp_path: Path
) -> None:
    g = torch.Generator().manual_seed(0)
    case = {
        "hidden": torch.randn(20, 16, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocab, 16, generator=g, dtype=torch.float64),
        "labels": torch.randint(0, vocab, (20,), generator=g),
        "factor_logprobs": torch.randn(20, generator=g, dtype=torch.float64),
        "factor_entropy": torch.randn(20, generator=g, dtype=torch.float64),
    }
    case["labels"][:2] = torch.tensor([0, vocab - 1])
    file = tmp_path / "case"
    save_file(case, str(file))
    arguments = {"file": str(file), "vocab": vocab, "temperature": temperature, "softcap": softcap, "chunk": chunk}
    launcher.run(2, "vocab_parallel", arguments)
    ranks = [load_file(f"{file}.rank{r}") for r in range(2)]

    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    logits = hidden @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    logprobs, entropy = logp.gather(1, case["labels"][:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    ((logprobs * case["factor_logprobs"]).sum() + (entropy * case["factor_entropy"]).sum()).backward()
    for rank in ranks:
        torch.testing.assert_close(rank["logprobs"], logprobs.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(rank["entropy"], entropy.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ranks[0]["hidden"] + ranks[1]["hidden"], hidden.grad, rtol=1e-10, atol=1e-10)
    rows = torch.cat([r["weight"] for r in ranks])
    torch.testing.assert_close(rows[:vocab], weight.grad, rtol=1e-10, atol=1e-10)
    assert not rows[vocab:].any()
