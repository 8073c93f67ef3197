"""``megatron-mapo doctor``: look at a machine, and at what one configuration needs of it, before a run does.

Every check does the real thing in small: it binds the port, writes to the disk, reduces over processes, starts a
server. A check is a function that yields findings; it raises only where it has a bug.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from megatron_mapo.config import Config, Dtype
from megatron_mapo.doctor.finding import Finding, failure


def examine(config: Config, processes: int | None, *, needs: bool, quick: bool) -> Iterator[Finding]:
    """All checks, one finding after the other; slow ones come last.

    Args:
        config: the run. Without one the default ports and folders are looked at.
        processes: trainer processes of this machine; None: as many as ``launch local`` would start.
        needs: ``config`` is a whole run, so look at its model, data, layout and verifier too.
        quick: leave the server out.
    """
    from megatron_mapo.doctor import versions

    yield from versions.check()
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # what the loader says about its libraries is an OSError
        yield failure("torch", f"cannot be imported: {error}", "scripts/setup.sh, or docs/install.md for CUDA")
        return
    # These import torch.
    from megatron_mapo.doctor import all_reduce, machine, network, run_needs, server, storage
    from megatron_mapo.hardware import native_dtype

    if config.model.dtype is Dtype.auto:
        config.model.dtype = native_dtype()
    yield from versions.check_patches()
    yield from machine.check()
    yield from storage.check(config)
    yield from network.check(config)
    if needs:
        yield from run_needs.check(config, processes)
    yield from all_reduce.check(config)
    if not quick:
        yield from server.check(config)
