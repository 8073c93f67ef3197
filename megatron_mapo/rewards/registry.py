"""Verifiers by name or by import path, with their options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_mapo.errors import ConfigError
from megatron_mapo.import_path import import_function, is_import_path

Verifier = Callable[..., Any]
"""``verify(response, answer, metadata, **options)``: right or wrong, or a score. ``answer`` is the row's reference
answer, ``metadata`` the row's other columns. Both are trusted; the response is not. It may be ``async def``. One that
has a parameter ``prompt`` is given the row's question by that name."""

Extractor = Callable[..., Any]
"""``extract(response)``: the answer that a response states, such that equal answers are equal texts; None: none.
It reads a response as the verifier of its module does, and gets those of the verifier's options that it has
parameters for."""

EXTRACT = "extract"
"""Name of the extractor in a verifier's module. It is optional."""
CHECK = "check_options"
"""Name of a function in a verifier's module that is called once with the options, before the first response. It
raises ``ValueError`` where they make no sense. It is optional."""

VERIFIERS = {
    name: f"megatron_mapo.rewards.{name}:verify"
    for name in ("math", "gsm8k", "exact", "reasoning_gym", "choice", "regex", "format", "math_verify", "http")
}

_ROW_PARAMETERS = 3
_PROMPT = "prompt"


@dataclass(frozen=True)
class LoadedVerifier:
    """A verifier with its options.

    Attributes:
        concurrent: it is ``async def``: one process works on many responses at a time.
        extracts: there is an extractor beside it.
    """

    concurrent: bool
    extracts: bool
    _verify: Verifier
    _extract: Extractor | None
    _takes_prompt: bool

    def judge(self, response: str, answer: str, metadata: dict[str, Any], prompt: str) -> Any:
        """What the verifier returns; a coroutine of it if ``concurrent``."""
        question = {_PROMPT: prompt} if self._takes_prompt else {}
        return self._verify(response, answer, metadata, **question)

    def extract(self, response: str) -> Any:
        """What the extractor returns, or a coroutine of it. There must be one."""
        assert self._extract is not None
        return self._extract(response)


def get_verifier(name: str, options: Mapping[str, Any] | None = None, section: str = "reward") -> LoadedVerifier:
    """The verifier of a name, with options, and the extractor in the same module, if there is one.

    Args:
        name: a registered name, ``package.module:function`` or ``path/to/file.py:function``.
        options: further keyword arguments of the verifier.
        section: where name and options stand in the configuration, for messages.

    Raises:
        ConfigError: there is none of this name, or it cannot be imported, or it (or ``extract``) is not a function,
            or the options are not those that it takes.
    """
    options = dict(options or {})
    path = VERIFIERS.get(name, name)
    key = f"{section}.name={name!r}"
    if not is_import_path(path):
        raise ConfigError(
            f"{key} is unknown: it is one of {', '.join(sorted(VERIFIERS))}, or an import path "
            "`package.module:function` or `path/to/file.py:function`"
        )
    module, function = import_function(path, key)
    extractor = getattr(module, EXTRACT, None)
    if extractor is not None and not callable(extractor):
        raise ConfigError(f"{key}: {module.__name__} has an `{EXTRACT}` that is no function: rename it")
    _check_options(module, function, options, key, f"{section}.options")
    read = {name: value for name, value in options.items() if name in _parameters(extractor)}
    return LoadedVerifier(
        concurrent=_is_async(function),
        extracts=extractor is not None,
        _verify=functools.partial(function, **options),
        _extract=None if extractor is None else functools.partial(extractor, **read),
        _takes_prompt=_PROMPT in _parameters(function),
    )


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    if function is None:
        return {}
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:  # some builtins do not tell
        return {}


def _is_async(function: Any) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def _check_options(module: ModuleType, function: Verifier, options: dict[str, Any], key: str, where: str) -> None:
    """Unknown and missing options, and those that the module itself refuses."""
    parameters = _parameters(function)
    further = list(parameters.values())[_ROW_PARAMETERS:]
    free = any(p.kind is p.VAR_KEYWORD for p in further)
    taken = {p.name: p for p in further if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != _PROMPT}
    known = set(taken) | (set(options) - set(parameters) if free else set())
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{key} has no option {option!r} ({where}): it takes {', '.join(taken) if taken else 'none'}"
            )
    for name, parameter in taken.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"{key} needs the option {name!r} ({where}.{name})")
    check = getattr(module, CHECK, None)
    if check is None:
        return
    try:
        check(**options)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{key}: {where}: {error}") from error
