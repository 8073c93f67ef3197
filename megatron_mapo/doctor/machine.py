"""Processor, memory, accelerators and their libraries."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from megatron_mapo.config import Dtype
from megatron_mapo.doctor.finding import Finding, failure, gib, ok, warning
from megatron_mapo.hardware import has_accelerator, native_dtype

LITTLE_MEMORY = 4 << 30
_CGROUP = Path("/sys/fs/cgroup")


def check() -> Iterator[Finding]:
    """What computes here."""
    yield _processor()
    yield _memory()
    if has_accelerator():
        yield from _gpus()
    else:
        yield _no_gpu()
    for name, module in (("transformer engine", "transformer_engine"), ("apex", "apex")):
        there = importlib.util.find_spec(module) is not None
        yield ok(name, "installed" if there else "not installed; optional, the project has an Adam of its own")


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of the control group that it is in."""
    available = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except FileNotFoundError:  # no limit, or the first version of control groups
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0))
    if has_accelerator():
        return ok("processor", f"{cores} cores")
    fast = native_dtype() is Dtype.bfloat16
    note = "bfloat16 is native" if fast else "bfloat16 is not native: model.dtype=float32 (or auto) is much faster here"
    return ok("processor", f"{cores} cores; {note}")


def _memory() -> Finding:
    available, total = available_memory(), psutil.virtual_memory().total
    detail = f"{gib(available)} free of {gib(total)}"
    if available < LITTLE_MEMORY:
        return warning(
            "memory",
            f"{detail}; a server alone takes 1 to 3 GiB",
            "ps -eo rss,pid,user,args --sort=-rss | head: end what takes most",
        )
    return ok("memory", detail)


def _gpus() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        name, detail = f"GPU {index}", f"{properties.name}, {gib(free)} free of {gib(total)}"
        if free < total / 2:
            yield warning(
                name,
                f"{detail}: another process uses it",
                "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",
            )
        else:
            yield ok(name, detail)
    if not torch.distributed.is_nccl_available():
        yield failure("NCCL", "this build of torch has none", "install a CUDA build of torch (docs/install.md)")
        return
    versions: tuple[int, ...] = torch.cuda.nccl.version()
    yield ok("NCCL", f"{'.'.join(map(str, versions))}, CUDA {torch.version.cuda}")


def _no_gpu() -> Finding:
    if not Path("/dev/nvidia0").exists():
        return ok("GPU", "none; everything runs on the processor")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return warning("GPU", "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    built = "has no CUDA" if torch.version.cuda is None else f"is for CUDA {torch.version.cuda}"
    return warning(
        "GPU",
        f"there is one, and torch does not see it: torch {torch.__version__} {built}",
        "compare with the driver's version in nvidia-smi, and install that build of torch (docs/install.md)",
    )
