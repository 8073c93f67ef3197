"""On a GPU: the kernels that only run there, and one update against the same update on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from megatron_mapo.data.packing import PackingSpec, pack
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.megatron.attention import _attend, _variable_length, _windowed
from megatron_mapo.megatron.logprobs import chunked_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_batch() -> SequenceBatch:
    g = torch.Generator().manual_seed(0)
    lens = [(5, 9), (1, 40), (30, 3), (12, 12)]
    prompts, responses = (
        [torch.randint(0, 260, (n,), generator=g).tolist() for n in part] for part in zip(*lens, strict=True)
    )
    return SequenceBatch.from_responses(prompts, responses)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_variable_length_kernel_equals_padded_blocks(dtype: torch.dtype, bound: float, window: int | None) -> None:
    """Also behind the last row, where padding to a multiple of 16 stands and zeros must come out."""
    batch = make_batch()
    packed = pack(batch, torch.arange(4), {}, PackingSpec(256, multiple=16)).to(torch.device("cuda"))
    plan, tokens = packed.attention, len(packed.tokens)
    assert plan.cu_seqlens is not None
    real = int(plan.cu_seqlens[-1])
    assert real < tokens
    g = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(tokens, h, 64, generator=g).to("cuda", dtype) for h in (4, 2, 2))
    found = _variable_length(query, key, value, plan.cu_seqlens, plan.max_seqlen, 0.125, window)
    blocks = torch.zeros(tokens, 4, 64, device="cuda")
    for block in plan.blocks:
        wide = (query.float(), key.float(), value.float())
        mask = block.mask if window is None else _windowed(block, packed.positions, window)
        blocks = blocks.index_copy(0, block.target, _attend(*wide, block, mask, 0.125, None))
    torch.testing.assert_close(found.float(), blocks, rtol=bound, atol=bound)
    assert not found[real:].any()


def test_logprobs_equal_those_of_the_cpu_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=g, dtype=torch.float64) for n in (40, 500))
    labels = torch.randint(0, 490, (40,), generator=g)
    results = []
    for device in ("cpu", "cuda"):
        h, w = (t.to(device).requires_grad_() for t in (hidden, weight))
        logprobs, entropy = chunked_logprobs(h, w, labels.to(device), temperature=0.7, chunk=16, vocab_size=490)
        (logprobs.sum() + entropy.square().sum()).backward()
        results.append([t.detach().cpu() for t in (logprobs, entropy, h.grad, w.grad)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-9, atol=1e-9)


UPDATE = """
import sys
import torch
from safetensors.torch import save_file
from megatron_mapo.algorithms.aggregation import token_weights
from megatron_mapo.config import Config, Dtype, LossAggregation
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.megatron import runtime
from megatron_mapo.megatron.policy import Policy

def main(model, batch, out):
    config = Config()
    config.model.dtype = Dtype.float32
    config.actor.optim.lr, config.actor.optim.eps = 0.02, 0.01
    ranks = runtime.initialize(config)
    batch = SequenceBatch.load(batch)
    policy = Policy(config, ranks, model, 1)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[batch.response_sequence]
    weight = token_weights(batch.response_lens, LossAggregation.token, 40).float()
    result = policy.update(batch, {"advantages": advantages, "token_weight": weight})
    found = {"loss": torch.tensor(result.loss), "grad_norm": torch.tensor(result.grad_norm)}
    found |= {"logprobs": result.scores.logprobs, "entropy": result.scores.entropy}
    found |= {name: value.cpu().clone() for name, value in policy.named_weights()}
    save_file({k: v.contiguous() for k, v in found.items()}, out)
    ranks.close()

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def test_an_update_equals_that_of_the_cpu(tmp_path: Path) -> None:
    """Each in a process of its own: the patches for the CPU hold for a whole process."""
    make_batch().save(tmp_path / "batch")
    model = make_tiny_model(tmp_path / "model", "qwen3")
    script = tmp_path / "update.py"
    script.write_text(UPDATE)
    for device in ("cpu", "cuda"):
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        command = [sys.executable, str(script), str(model), str(tmp_path / "batch"), str(tmp_path / device)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | hidden)
        assert result.returncode == 0, result.stderr
    cpu, cuda = (load_file(tmp_path / device) for device in ("cpu", "cuda"))
    assert cpu.keys() == cuda.keys()
    for name, value in cpu.items():
        assert (cuda[name] - value).abs().max() <= 1e-4 * value.abs().max().clamp(min=1e-3), name
