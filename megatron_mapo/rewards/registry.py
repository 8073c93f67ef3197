"""Verifiers by name or by import path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_mapo.errors import ConfigError

Verifier = Callable[[str, str, dict[str, Any]], "bool | float"]
"""``verify(response, answer, metadata)``: right or wrong, or a score. ``answer`` is the row's reference answer,
``metadata`` the row's other columns. Both are trusted; the response is not."""

Extractor = Callable[[str], "str | None"]
"""``extract(response)``: the answer that a response states, such that equal answers are equal texts; None: none.
It reads a response as the verifier of its module does."""

EXTRACT = "extract"
"""Name of the extractor in a verifier's module. It is optional."""

VERIFIERS = {name: f"megatron_mapo.rewards.{name}:verify" for name in ("math", "gsm8k", "exact", "reasoning_gym")}


def get_verifier(name: str) -> tuple[Verifier, Extractor | None]:
    """The verifier that ``reward.name`` means, and the extractor in the same module, if there is one.

    Args:
        name: a registered name, ``package.module:function`` or ``path/to/file.py:function``.

    Raises:
        ConfigError: there is none of this name, or it cannot be imported, or it (or ``extract``) is not a function.
    """
    path = VERIFIERS.get(name, name)
    module_name, colon, function_name = path.rpartition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(
            f"reward.name={name!r} is unknown: it is one of {', '.join(sorted(VERIFIERS))}, or an import path "
            "`package.module:function` or `path/to/file.py:function`"
        )
    module = _import(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "has no function" if function is None else "is not a function:"
        raise ConfigError(f"reward.name={name!r}: {module_name} {what} {function_name}")
    extractor = getattr(module, EXTRACT, None)
    if extractor is not None and not callable(extractor):
        raise ConfigError(f"reward.name={name!r}: {module_name} has an `{EXTRACT}` that is no function: rename it")
    return function, extractor


def _import(module_name: str, name: str) -> ModuleType:
    try:
        if module_name.endswith(".py"):
            return _load_file(Path(module_name), name)
        return importlib.import_module(module_name)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        # A user's module can fail in any way while it is imported; all of them are about this one key.
        raise ConfigError(
            f"reward.name={name!r}: cannot import {module_name}: {type(error).__name__}: {error}"
        ) from error


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"reward.name={name!r}: there is no file {path}")
    module_name = f"mapo_verifier_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
