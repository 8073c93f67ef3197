"""Each change to megatron-core on CPU is needed: a process without it fails where one with all of them works."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these changes are for machines without CUDA")

START = """
import sys
import torch
import torch.distributed as dist
from megatron_mapo.patches import megatron_core
from megatron_mapo.patches.megatron_core import fixups
module, name = sys.argv[1].split(":") if len(sys.argv) > 1 else ("", "")
for table in (fixups.CPU_ONLY, fixups.EVERYWHERE):
    for key in table:
        table[key] = [f for f in table[key] if (key, f.__name__) != (module, name)]
if module == "torch":
    fixups.cpu_torch.build = lambda: torch
megatron_core.apply()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
parallel_state.initialize_model_parallel()
config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, bf16=True, params_dtype=torch.bfloat16,
                           perform_initialization=False, use_cpu_initialization=True)

def rng_tracker():
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    draws = []
    for _ in range(2):
        with tensor_parallel.get_cuda_rng_tracker().fork():
            draws.append(torch.rand(1).item())
    assert draws[0] != draws[1], "the tracker does not move on"
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.rand(1).item() == draws[0], "the tracker does not start again"

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = config
        self.linear = ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.normal_)
        torch.nn.init.ones_(self.linear.weight)

def step(distributed):
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, Model())
    settings = OptimizerConfig(optimizer="adam", lr=0.5, bf16=True, params_dtype=torch.bfloat16,
                               use_distributed_optimizer=distributed, clip_grad=1.0, weight_decay=0.0)
    optimizer = get_megatron_optimizer(settings, [model])
    model.module.linear(torch.ones(4, 8, dtype=torch.bfloat16))[0].float().sum().backward()
    finalize_model_grads([model], None)
    assert optimizer.step()[1] > 1, "the gradients are not clipped"
    assert (model.module.linear.weight == 0.5).all(), "Adam's first step is lr, against the gradient"
    return optimizer

def distributed_optimizer():
    optimizer = step(distributed=True)
    with torch.no_grad():
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["step"] == 1, "a checkpoint needs the step in the group"

def plain_optimizer():
    step(distributed=False)
"""
ALL = START + "rng_tracker()\ndistributed_optimizer()\nplain_optimizer()\nprint('works')"

OPTIMIZER = "megatron.core.optimizer"
# What is left out, who needs it, and what then goes wrong.
NEEDED = {
    "the proxy of torch": ("torch:", "distributed_optimizer", "Torch not compiled with CUDA enabled"),
    "the RNG tracker": (
        "megatron.core.tensor_parallel.random:_random",
        "rng_tracker",
        "Torch not compiled with CUDA enabled",
    ),
    "type names, distributed": (
        f"{OPTIMIZER}.distrib_optimizer:_distributed_optimizer_types",
        "distributed_optimizer",
        "must be one of torch.cuda.FloatTensor",
    ),
    "type names, plain": (
        f"{OPTIMIZER}.optimizer:_float16_optimizer_types",
        "plain_optimizer",
        "must be one of torch.cuda.FloatTensor",
    ),
    "Adam of the distributed optimizer": (
        f"{OPTIMIZER}.distrib_optimizer:_distributed_optimizer_adam",
        "distributed_optimizer",
        "Only Adam and HybridDeviceOptimizer currently supported",
    ),
    "Adam": (f"{OPTIMIZER}:_optimizer_adam", "distributed_optimizer", "KeyError: 'step'"),
}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


def test_all_together_work() -> None:
    result = run(ALL)
    assert result.stdout == "works\n", result.stderr


@pytest.mark.parametrize("change", NEEDED)
def test_without_it_megatron_fails(change: str) -> None:
    """When one of these fails, its change is no longer needed."""
    left_out, function, error = NEEDED[change]
    result = run(START + f"{function}()\nprint('works')", left_out)
    assert "works" not in result.stdout
    assert error in result.stderr
