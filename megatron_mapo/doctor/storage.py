"""The disk under ``run.output_dir``."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_mapo.config import Config
from megatron_mapo.doctor.finding import Finding, failure, gib, ok, warning

LITTLE_DISK = 10 << 30
_PROBE = 1 << 20
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "weka", "cifs", "smb", "panfs", "virtiofs", "9p", "fuse")


def check(config: Config) -> Iterator[Finding]:
    """The folder of runs can be written to and has space; whether several machines can share it."""
    folder = existing(Path(config.run.output_dir))
    problem = _cannot_write(folder)
    if problem:
        yield failure("run.output_dir", f"cannot write to {folder}: {problem}", "run.output_dir=FOLDER, one of yours")
        return
    kind = filesystem(folder)
    yield ok("run.output_dir", f"{folder} can be written to ({kind})")
    free = shutil.disk_usage(folder).free
    fix = "run.output_dir=FOLDER on a larger disk, or a smaller trainer.keep_checkpoints"
    yield ok("disk", f"{gib(free)} free") if free >= LITTLE_DISK else warning("disk", f"{gib(free)} free", fix)
    yield _shared(folder, kind)


def _shared(folder: Path, kind: str) -> Finding:
    """Whether other machines see the folder, as far as the kind of its filesystem tells."""
    if kind.startswith(_SHARED):
        return ok("shared filesystem", f"{folder} is on {kind}, which other machines can share")
    detail = f"{folder} is on {kind}, which other machines do not see as a rule"
    if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        fix = "run.output_dir=FOLDER on a filesystem that all nodes share (`df -T` lists what there is)"
        return warning("shared filesystem", f"{detail}, and this job has several nodes", fix)
    return ok("shared filesystem", f"{detail}; runs on several need run.output_dir on one that they share")


def existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that exists: where a run would make it."""
    folder = folder.expanduser().absolute()
    return folder if folder.exists() else existing(folder.parent)


def filesystem(folder: Path) -> str:
    """Type of the filesystem that a folder is on, such as ``ext4`` or ``nfs4``."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[str(p)] for p in (folder.resolve(), *folder.resolve().parents) if str(p) in mounts), "unknown")


def _cannot_write(folder: Path) -> str | None:
    """Why a file there cannot be written and brought to the disk; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None
