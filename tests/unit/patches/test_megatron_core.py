"""The changes to megatron-core, each in a process of its own: patches are for a whole process."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mapo.errors import MapoError
from megatron_mapo.patches import megatron_core
from megatron_mapo.patches.megatron_core.adam import FusedAdam

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="these changes are for machines without CUDA")

PATCH = "from megatron_mapo.patches import megatron_core\nmegatron_core.apply()\n"

TRAINING_STEP = """
import os
import torch
import torch.distributed as dist
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(0)
config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, bf16=True, params_dtype=torch.bfloat16)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = config
        self.linear = ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.normal_)
    def forward(self, x):
        return self.linear(x)[0]
ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
model = DistributedDataParallel(config, ddp, Model())
settings = OptimizerConfig(optimizer="adam", lr=0.1, bf16=True, params_dtype=torch.bfloat16,
                           use_distributed_optimizer=True, clip_grad=1.0)
optimizer = get_megatron_optimizer(settings, [model])
before = model.module.linear.weight.detach().clone()
model(torch.ones(4, 8, dtype=torch.bfloat16)).float().sum().backward()
finalize_model_grads([model], None)
optimizer.step()
assert not torch.equal(before, model.module.linear.weight), "the step changed nothing"
print("trained")
"""

STRIDED = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
def rank(rank, path, patched):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch_seen_by_megatron = torch
    if patched:
        from megatron_mapo.patches.megatron_core import cpu_torch
        torch_seen_by_megatron = cpu_torch.build()
    collectives = torch_seen_by_megatron.distributed
    expected = torch.arange(12.0).view(3, 4)[:, :2]
    received = expected.clone() if rank == 0 else torch.zeros(3, 2)
    if rank == 1:  # every other column of a wider tensor
        received = torch.zeros(3, 4)[:, ::2]
    collectives.broadcast(received, 0)
    assert torch.equal(received, expected), "broadcast"
    collectives.all_reduce(received)
    assert torch.equal(received, 2 * expected), "all_reduce"
    parts = [expected, torch.arange(12.0).view(3, 4)[:, 2:]]
    mine = torch.empty(3, 2)
    collectives.scatter(mine, parts if rank == 0 else None, 0)
    assert torch.equal(mine, parts[rank]), "scatter"
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1], sys.argv[2] == "patched"), nprocs=2)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@needs_cpu
def test_a_training_step_on_cpu() -> None:
    result = run(PATCH + TRAINING_STEP)
    assert result.stdout == "trained\n", result.stderr


@needs_cpu
def test_megatron_alone_cannot_train_on_cpu() -> None:
    """When this fails, the patch is no longer needed."""
    assert run(TRAINING_STEP).returncode != 0


def collectives_of_strided_tensors(folder: Path, which: str) -> subprocess.CompletedProcess[str]:
    script = folder / "strided.py"  # a file, because spawned ranks import it
    script.write_text(STRIDED)
    command = [sys.executable, str(script), str(folder / "store"), which]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@needs_cpu
def test_collectives_of_strided_tensors(tmp_path: Path) -> None:
    result = collectives_of_strided_tensors(tmp_path, "patched")
    assert result.returncode == 0, result.stderr


@needs_cpu
def test_gloo_alone_sends_wrong_bytes(tmp_path: Path) -> None:
    """When this fails, the patch is no longer needed."""
    result = collectives_of_strided_tensors(tmp_path, "alone")
    assert result.returncode != 0


@needs_cpu
def test_nothing_is_compiled() -> None:
    code = "from megatron.core.jit import jit_fuser\nimport torch\nassert jit_fuser is not torch.compile"
    assert run(PATCH + code).returncode == 0
    assert run(code).returncode != 0, "megatron no longer compiles: the patch is not needed"


@needs_cpu
def test_the_real_torch_is_left_alone() -> None:
    code = (
        "import torch\nimport megatron.core.optimizer.optimizer as module\n"
        "assert module.torch is not torch\n"
        "assert module.torch.zeros(1, device='cuda').device.type == 'cpu'\n"
        "assert torch.ones(1).type() == 'torch.FloatTensor'\n"
        "try:\n    torch.zeros(1, device='cuda')\nexcept (AssertionError, RuntimeError):\n    print('refused')"
    )
    result = run(PATCH + code)
    assert result.stdout == "refused\n", result.stderr


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_core, "_applied", False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0")
    with pytest.raises(MapoError, match=r"megatron-core 0\.17\.0 is installed.*megatron-core==0\.16\.1"):
        megatron_core.apply()


def test_a_late_patch_is_refused() -> None:
    result = run("import megatron.core\n" + PATCH)
    assert result.returncode != 0
    assert "import megatron_mapo before megatron" in result.stderr


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in ((3, 4), (5,))]


def test_adam_steps_like_adamw() -> None:
    mine, theirs = weights(), weights()
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = FusedAdam(mine, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for parameters, optimizer in zip((mine, theirs), optimizers, strict=True):
            for parameter in parameters:
                parameter.grad = parameter.detach().sin()
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adam_keeps_the_fused_layout() -> None:
    """``step`` is an int of the group; a parameter has its two moments and nothing else."""
    parameters = weights()
    optimizer = FusedAdam(parameters, lr=0.01)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2
    for parameter in parameters:
        assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}
