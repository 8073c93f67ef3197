"""megatron-core on CPU with gloo, and a checkpointable AdamW without Transformer Engine. See README.md."""

from __future__ import annotations

import torch

from megatron_mapo.patches.versions import require_version

SUPPORTED = "0.16.1"
_applied = False


def check_version() -> None:
    """Refuse every version of megatron-core but the one that this patch was made for.

    Raises:
        MapoError: another version is installed.
    """
    require_version("megatron-core", SUPPORTED, f"pip install megatron-core=={SUPPORTED}")


def apply() -> None:
    """Install the patches; must run before anything imports ``megatron``. Repeated calls do nothing.

    Raises:
        MapoError: see ``check_version``.
    """
    global _applied
    if _applied:
        return
    check_version()
    from megatron_mapo.patches.megatron_core import fixups, import_hook

    import_hook.install(fixups.for_device(cpu=not torch.cuda.is_available()))
    _applied = True
