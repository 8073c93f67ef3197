"""Environments of their own for the peers that we are compared with."""

from __future__ import annotations

import hashlib
import re
import subprocess
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def prepare(name: str, requirements: Path, complete: bool = True) -> Path:
    """Python of the environment ``.venv-NAME`` beside this file; made or mended if its requirements have changed.

    Args:
        name: of the environment.
        requirements: every package, pinned; may include another such file with ``-r``.
        complete: whether the packages are all that they list themselves (``pip check``).
    """
    folder = HERE / f".venv-{name}"
    python, stamp = folder / "bin" / "python", folder / ".stamp"
    text = requirements.read_text()
    included = re.findall(r"^-r (\S+)$", text, re.MULTILINE)
    text += "".join((requirements.parent / file).read_text() for file in included)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if python.exists() and stamp.is_file() and stamp.read_text() == digest:
        return python
    print(f"installing {requirements.name} into {folder} (once)", flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    pin = re.search(r"^torch==\S+$", text, re.MULTILINE)
    assert pin is not None, f"{requirements} must pin torch"
    subprocess.run([*pip, pin.group(), "-c", str(requirements)], check=True)
    subprocess.run([*pip, "--no-deps", "-r", str(requirements)], check=True)
    if complete:
        subprocess.run([str(python), "-m", "pip", "check"], check=True)
    stamp.write_text(digest)
    return python
