"""SGLang on a machine without a GPU. See README.md."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_mapo.errors import RolloutError
from megatron_mapo.patches.versions import require_version

SUPPORTED = "0.5.23"
ACTIVE = "MEGATRON_MAPO_SGLANG_CPU"
"""Environment variable by which a server process knows that it must patch itself."""
STUBS = Path(__file__).parent / "stubs"


def needed() -> bool:
    """Whether this machine has no GPU, so that a server here needs the patch."""
    return not torch.cuda.is_available()


def check_version() -> None:
    """Refuse every version of sglang but the one that this patch was made for.

    Raises:
        RolloutError: sglang is not installed, or another version is.
    """
    install = f"pip install --no-deps sglang=={SUPPORTED} (requirements/sglang-cpu.txt lists what it needs)"
    require_version("sglang", SUPPORTED, f"on a machine without a GPU, {install}", RolloutError)


def environment(base: dict[str, str], threads: int) -> dict[str, str]:
    """Environment of a server process on this machine.

    Args:
        base: environment to start from; it is not changed.
        threads: CPU threads of the server.

    Returns:
        ``base`` on a CUDA machine; else ``base`` with the import stubs first in ``PYTHONPATH`` and
        threads that sleep when they have no work, so that an idle server leaves the cores to others.

    Raises:
        RolloutError: see ``check_version`` (on machines without a GPU).
    """
    if not needed():
        return dict(base)
    check_version()
    paths = [str(STUBS), *filter(None, [base.get("PYTHONPATH")])]
    return {
        **base,
        ACTIVE: "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
    }


def apply_in_server() -> None:
    """Patch sglang in this server process and its workers. Does nothing unless ``environment`` asked for it.

    Raises:
        RolloutError: see ``check_version``.
    """
    if os.environ.get(ACTIVE) != "1":
        return
    check_version()
    from megatron_mapo.patches.sglang_cpu import attention, requests, sampling, workers

    attention.apply()
    requests.apply()
    sampling.apply()
    workers.apply()
