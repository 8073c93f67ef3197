"""Versions of Python and of packages, against what this project's metadata asks for; patches."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_mapo import __version__, patches
from megatron_mapo.doctor.finding import Finding, failure, ok, warning
from megatron_mapo.errors import MapoError

_SHOWN = ("torch", "megatron-core", "transformers")
_PATCHED = {
    "megatron_bridge": "import megatron_mapo.megatron; from megatron_mapo.patches.megatron_bridge import load; load()",
    "megatron_core": "import megatron_mapo.megatron.policy, megatron_mapo.megatron.checkpoint",
}
_INSTALL = "scripts/setup.sh, or docs/install.md for CUDA"


def check() -> Iterator[Finding]:
    """Python, this project, and every package that it requires."""
    yield ok("megatron-mapo", __version__)
    yield _python()
    others = 0
    for requirement in _requirements():
        finding = _package(requirement)
        if requirement.name in _SHOWN or finding.fix:
            yield finding
        else:
            others += 1
    yield ok("other packages", f"{others} as required")
    yield _sglang()


def check_patches() -> Iterator[Finding]:
    """Every patch fits the package that it changes; those of trainers are applied, in a process of their own."""
    for module in filter(lambda found: found.ispkg, pkgutil.iter_modules(patches.__path__)):
        patch = importlib.import_module(f"{patches.__name__}.{module.name}")
        name = f"patch {module.name}"
        if hasattr(patch, "needed") and not patch.needed():
            yield ok(name, "not needed here")
            continue
        try:
            patch.check_version()
        except (MapoError, metadata.PackageNotFoundError) as error:
            yield failure(name, f"refused: {error}", _INSTALL)
        else:
            yield (
                _applied(name, patch.SUPPORTED)
                if module.name in _PATCHED
                else ok(name, f"fits {patch.SUPPORTED}; each server applies it to itself")
            )


def _applied(name: str, version: str) -> Finding:
    """Import what a trainer does, which installs the patch and runs into what it does not fit."""
    imports = _PATCHED[name.removeprefix("patch ")]
    done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True)
    if done.returncode:
        return failure(name, f"cannot be applied: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", _INSTALL)
    return ok(name, f"applied to {version}")


def _requirements() -> list[Requirement]:
    """What the installed distribution requires, without its extras."""
    texts = [Requirement(text) for text in metadata.requires("megatron-mapo") or []]
    return [r for r in texts if r.marker is None or r.marker.evaluate({"extra": ""})]


def _python() -> Finding:
    wanted = metadata.metadata("megatron-mapo")["Requires-Python"]
    found = platform.python_version()
    if found not in SpecifierSet(wanted):
        return failure("python", f"{found}; {wanted} is required", "PYTHON=/path/to/python3.11 scripts/setup.sh")
    return ok("python", found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(requirement: Requirement) -> Finding:
    name, found = requirement.name, _version(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return ok(name, found)
    what = "is not installed" if found is None else f"is {found}"
    detail, fix = f"{what}; {requirement} is required", f"pip install '{requirement}'"
    if _servers_only():
        return warning(name, f"{detail} for trainers; this environment can only hold servers", fix)
    return failure(name, detail, fix)


def _servers_only() -> bool:
    """On CUDA servers have an environment of their own: sglang, and no megatron-core."""
    return _version("megatron-core") is None and _version("sglang") is not None and _on_cuda()


def _sglang() -> Finding:
    found = _version("sglang")
    if found is not None:
        return ok("sglang", found)
    fix = "pip install --no-deps sglang==0.5.23 after requirements/sglang-cpu.txt (docs/install.md)"
    if _on_cuda():
        return warning("sglang", "is not installed: this environment can only hold trainers", fix)
    return failure("sglang", "is not installed", fix)


def _on_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    from megatron_mapo.hardware import has_accelerator

    return has_accelerator()
