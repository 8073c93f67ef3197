"""What a start of the trainers is remembered by."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_mapo import __version__
from megatron_mapo.config import Config

_PACKAGES = ("megatron-core", "torch", "transformers", "sglang")


def describe_start(config: Config, ranks: int, device: str) -> dict[str, Any]:
    """A row of ``starts.jsonl``, less its time and step.

    Args:
        config: of the run.
        ranks: trainer processes.
        device: of rank 0.
    """
    return {
        "ranks": ranks,
        "device": device,
        "host": platform.node(),
        "layout": dataclasses.asdict(config.actor.parallel),
        "versions": {"megatron-mapo": __version__, "python": platform.python_version()}
        | {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    """None where it is not installed: servers may run elsewhere."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
