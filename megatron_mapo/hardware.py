"""What this machine computes fast. No megatron, no servers: the launcher asks before it starts either."""

from __future__ import annotations

import os

from megatron_mapo.config import Config, Dtype


def has_accelerator() -> bool:
    """Whether models run on CUDA here."""
    import torch

    return torch.cuda.is_available()


def visible_gpus() -> list[str]:
    """This process's GPUs, as ``CUDA_VISIBLE_DEVICES`` takes them; CUDA is not initialised."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def native_dtype() -> Dtype:
    """bfloat16 where the hardware multiplies it natively, else float32.

    CUDA devices do. Processors need AVX-512: without it torch's bfloat16 matrix products are many
    times slower than float32's.
    """
    import torch

    fast = has_accelerator() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Dtype.bfloat16 if fast else Dtype.float32


def settle_dtype(config: Config) -> Config:
    """Replace ``model.dtype: auto`` in ``config`` by what this machine computes fast, and say so."""
    if config.model.dtype is Dtype.auto:
        config.model.dtype = native_dtype()
        print(f"model.dtype: auto is {config.model.dtype.value} on this machine", flush=True)
    return config
