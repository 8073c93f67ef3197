"""Functions of the user, by import path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_mapo.errors import ConfigError


def is_import_path(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:function`` or ``path/to/file.py:function``."""
    module, colon, function = text.rpartition(":")
    return bool(module and colon and function)


def import_function(path: str, setting: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The function at ``package.module:function`` or ``path/to/file.py:function``, and its module.

    Args:
        path: where it is.
        setting: ``key=value`` that asks for it, for messages.

    Raises:
        ConfigError: it cannot be imported, or is not a function.
    """
    module_name, _, function_name = path.rpartition(":")
    module = _import_module(module_name, setting)
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "has no function" if function is None else "is not a function:"
        raise ConfigError(f"{setting}: {module_name} {what} {function_name}")
    return module, function


def _import_module(name: str, setting: str) -> ModuleType:
    try:
        return _load_file(Path(name), setting) if name.endswith(".py") else importlib.import_module(name)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        # A user's module can fail in any way while it is imported; all of them are about this one key.
        raise ConfigError(f"{setting}: cannot import {name}: {type(error).__name__}: {error}") from error


def _load_file(path: Path, setting: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{setting}: there is no file {path}")
    module_name = f"mapo_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
