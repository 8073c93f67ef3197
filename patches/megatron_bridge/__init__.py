"""megatron-bridge beside the versions that this project pins, and on machines without CUDA. See README.md."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from megatron_mapo.errors import ConfigError
from megatron_mapo.patches.versions import require_version

SUPPORTED = "0.3.1"
_KERNELS = ("transformer_engine", "transformer_engine_torch", "triton")


def needed() -> bool:
    """Whether this megatron-bridge is installed; it is optional, and another one does no harm until it is asked for."""
    try:
        return importlib.metadata.version("megatron-bridge") == SUPPORTED
    except importlib.metadata.PackageNotFoundError:
        return False


def check_version() -> None:
    """Refuse every version of megatron-bridge but the one that this patch was made for.

    Raises:
        ConfigError: it is not installed, or another version is.
    """
    install = f"pip install --no-deps megatron-bridge=={SUPPORTED} (docs/models.md), or model.fallback=none"
    require_version("megatron-bridge", SUPPORTED, install, ConfigError)


def load() -> Any:
    """Import megatron-bridge.

    Returns:
        its class ``AutoBridge``.

    Raises:
        ConfigError: see ``check_version``.
    """
    check_version()
    # What megatron-core finds out about these packages while it is imported must be the truth.
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_model  # noqa: F401

    # It says of itself which kernels are missing, and that transformers is newer than it.
    logging.getLogger("megatron.bridge").setLevel(logging.ERROR)
    with _placeholders(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.bridge import AutoBridge
    return AutoBridge


class _AnyType(type):
    """A class that can be named, derived from and used as a decorator, which is all that an import does."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyType(name, (), {})

    def __call__(cls, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else lambda decorated: decorated


class _Placeholder(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyType(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, missing: set[str]) -> None:
        self.missing = missing

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.missing:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


@contextmanager
def _placeholders() -> Iterator[None]:
    """Inside, packages of CUDA kernels that are not installed can be imported; afterwards they are gone again."""
    missing = {name for name in _KERNELS if importlib.util.find_spec(name) is None}
    finder = _Finder(missing)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
            del sys.modules[name]
