"""Data-parallel wrapper, optimizer and learning-rate schedule of the actor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mapo.config import OptimConfig
from megatron_mapo.megatron.model import PolicyModel


def data_parallel(
    chunks: list[PolicyModel], optim: OptimConfig, before_reduction: Callable[[], None]
) -> list[DistributedDataParallel]:
    """Wrap the model: gradients are summed (never averaged) over data and context ranks in float32.

    ``before_reduction`` is called when this rank's gradients are complete and others' are waited for.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optim.distributed,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
    )
    config = chunks[0].config  # one object, which all chunks share
    wrapped = [
        # Reducing the later chunks' gradients overlaps with the earlier chunks' backward pass: one bucket will do.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]

    def finalize(model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
        """megatron's reductions, without its division by a token count: ``token_weight`` did that."""
        before_reduction()
        finalize_model_grads(model, None, **kwargs)

    config.finalize_model_grads_func = finalize
    if optim.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], optim: OptimConfig, total_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW on float32 master weights, and its schedule over ``total_updates`` optimizer steps."""
    dtype = chunks[0].config.params_dtype
    last_lr = optim.lr if optim.schedule.value == "constant" else 0.0
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=last_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            use_distributed_optimizer=optim.distributed,
            overlap_param_gather=optim.overlap_param_gather,
        ),
        chunks,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=last_lr,
        lr_warmup_steps=optim.warmup_steps,
        # Update k of n runs at the schedule's step k, so that neither the first nor the last one runs at 0.
        lr_decay_steps=max(total_updates, optim.warmup_steps) + 1,
        lr_decay_style=optim.schedule.value,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    _refuse_not_finite(optimizer)
    return optimizer, scheduler


class NotFinite(ArithmeticError):
    """The global gradient norm is infinite or no number."""


def _refuse_not_finite(optimizer: MegatronOptimizer) -> None:
    """``step`` raises ``NotFinite`` on all ranks before it changes anything.

    megatron looks for infinities only under a loss scale, which bfloat16 and float32 have none of.
    """
    measure = optimizer.get_grad_norm

    def get_grad_norm() -> float:
        norm = measure()
        if not math.isfinite(norm):
            raise NotFinite(f"gradient norm {norm}")
        return norm

    optimizer.get_grad_norm = get_grad_norm
