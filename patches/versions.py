"""The versions that patches were made for."""

from __future__ import annotations

import importlib.metadata

from megatron_mapo.errors import MapoError


def require_version(package: str, supported: str, install: str, error: type[MapoError] = MapoError) -> None:
    """Refuse every version of a package but one.

    Args:
        package: its name on the package index.
        supported: the version.
        install: the command that installs it.
        error: what to raise.

    Raises:
        MapoError: of the type ``error``; the package is not installed, or another version is.
    """
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise error(f"{package} is not installed: {install}") from None
    if installed != supported:
        raise error(f"{package} {installed} is installed, but its patch fits {supported} only: {install}")
