"""Runs a fix-up on each ``megatron.core`` module right after it was imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from megatron_mapo.errors import MapoError

Fixup = Callable[[ModuleType], None]
PREFIX = "megatron.core"


class _PatchingFinder(importlib.abc.MetaPathFinder):
    def __init__(self, fixup: Fixup) -> None:
        self.fixup = fixup

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(PREFIX):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_fix(module: ModuleType) -> None:
            execute(module)
            self.fixup(module)

        spec.loader.exec_module = exec_and_fix  # type: ignore[method-assign]
        return spec


def install(fixup: Fixup) -> None:
    """Call ``fixup(module)`` for every ``megatron.core`` module imported from now on.

    Raises:
        MapoError: a ``megatron.core`` module is there already; names that others imported from it
            would keep the unpatched object.
    """
    early = sorted(name for name in sys.modules if name.startswith(PREFIX))
    if early:
        raise MapoError(f"import megatron_mapo before megatron: {early[0]} was imported first")
    sys.meta_path.insert(0, _PatchingFinder(fixup))
