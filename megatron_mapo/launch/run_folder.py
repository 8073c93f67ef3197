"""Read a run's folder: plain files, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_mapo import checkpoint_files
from megatron_mapo.checkpoint_files import Manifest
from megatron_mapo.errors import CheckpointError, DataError
from megatron_mapo.tracking.jsonl import Row, read_rows


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint of a run, or of an imported model.

    Attributes:
        step: finished steps; 0: an imported model.
        path: its folder.
        size: bytes of its files.
        pointers: which of the files ``latest`` and ``best`` name it.
    """

    step: int
    path: Path
    size: int
    pointers: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder tells.

    Attributes:
        config: text of ``config.yaml``.
        step: last step in ``metrics.jsonl``; None if there is none.
        checkpoints: oldest first.
        metrics: the last value of every metric, and the step that it is of.
        evaluation: the same of ``evaluations.jsonl``.
    """

    config: str
    step: int | None
    checkpoints: list[Checkpoint]
    metrics: dict[str, tuple[Any, int]]
    evaluation: dict[str, tuple[Any, int]]


def read_run(folder: str | Path) -> RunSummary:
    """Read the folder of a run, finished or not.

    Raises:
        DataError: it is not a run's folder, or a line of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} is not the folder of a run: it has no config.yaml")
    steps = read_rows(folder / "metrics.jsonl")
    return RunSummary(
        config=(folder / "config.yaml").read_text(),
        step=steps[-1].get("step") if steps else None,
        checkpoints=list_checkpoints(folder),
        metrics=_last_values(steps),
        evaluation=_last_values(read_rows(folder / "evaluations.jsonl")),
    )


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints of the run in ``folder``, oldest first."""
    saved = checkpoint_files.complete_checkpoints(folder / "checkpoints")
    found = [_checkpoint(step, path) for step, path in saved]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def config_file(folder: Path, step: int | None) -> Path:
    """The configuration that the checkpoint of ``step`` (None: the newest) of the run in ``folder`` was written with.

    That of the run's last start, where there is no such checkpoint or an earlier version wrote it.
    """
    saved = dict(checkpoint_files.complete_checkpoints(folder / "checkpoints"))
    path = saved.get(max(saved, default=0) if step is None else step)
    own = None if path is None else path / checkpoint_files.CONFIG
    return own if own is not None and own.is_file() else folder / "config.yaml"


def find_checkpoint(path: Path) -> Checkpoint | None:
    """``path`` as a complete checkpoint or an imported model; None if it is something else, such as a run's folder."""
    for folder in (path, path / checkpoint_files.IMPORTED):
        if folder.resolve().name == checkpoint_files.IMPORTED and (folder / ".metadata").is_file():
            return _checkpoint(0, folder)
    for step, found in checkpoint_files.complete_checkpoints(path.resolve().parent):
        if found == path.resolve():
            return _checkpoint(step, path)
    return None


def _checkpoint(step: int, path: Path) -> Checkpoint | None:
    """None if its run has just removed it."""
    try:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except FileNotFoundError:
        if path.is_dir():
            raise
        return None
    names = (checkpoint_files.LATEST, checkpoint_files.BEST)
    pointers = tuple(n for n in names if checkpoint_files.read_pointer(path.parent, n) == path.name)
    return Checkpoint(step, path, size, pointers)


def describe_checkpoint(checkpoint: Checkpoint, checksums: bool) -> tuple[list[str], str | None]:
    """What ``inspect`` says about a checkpoint, a line each, and what is wrong with it.

    Args:
        checkpoint: of ``list_checkpoints``.
        checksums: read all files and compare checksums; else only their sizes.
    """
    named = f" ({', '.join(checkpoint.pointers)})" if checkpoint.pointers else ""
    what = f"step {checkpoint.step}" if checkpoint.step else "imported model"
    title = f"checkpoint: {what}, {_mib(checkpoint.size)}, {checkpoint.path}{named}"
    lines, problem = _describe_files(checkpoint, checksums)
    if not checkpoint.path.is_dir():
        lines, problem = ["  integrity  not known: its run has removed it meanwhile"], None
    return [title, *lines], problem


def _describe_files(checkpoint: Checkpoint, checksums: bool) -> tuple[list[str], str | None]:
    lines: list[str] = []
    try:
        manifest = checkpoint_files.read_manifest(checkpoint.path)
        if manifest is None:
            return ["  integrity  not known: no manifest, an earlier version wrote it"], None
        lines += _manifest_lines(manifest, checkpoint.path.resolve().parents[1] / "config.yaml")
        if checksums:
            checkpoint_files.verify(checkpoint.path)
        else:
            checkpoint_files.check_sizes(checkpoint.path, manifest)
    except CheckpointError as error:
        return [*lines, f"  integrity  DAMAGED: {error}"], str(error)
    compared = "sizes and checksums" if checksums else "sizes"
    return [*lines, f"  integrity  {compared} of {len(manifest.files)} files as they were written"], None


def _manifest_lines(manifest: Manifest, config: Path) -> list[str]:
    sizes = dict(manifest.layout)
    ranks = sizes.pop("world_size")
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items())
    same = config.is_file() and xxhash.xxh3_128(config.read_bytes()).hexdigest() == manifest.config_hash
    lines = [
        f"  layout     {ranks} rank{'s' if ranks > 1 else ''}: {layout}",
        f"  model      {manifest.model['type']}, {manifest.model['dtype']}, {manifest.model['path']}",
        f"  sizes      {', '.join(f'{name} {_mib(size)}' for name, size in manifest.parts.items())}",
        f"  written    {manifest.created} by {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}",
    ]
    if manifest.config_hash:
        lines.append(f"  config     {manifest.config_hash} ({'as' if same else 'not as'} {config.name} is now)")
    if manifest.score is not None:
        of = "" if manifest.measure is None else f" ({manifest.measure})"
        lines.append(f"  score      {manifest.score:.6g}{of}")
    return lines


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _last_values(rows: list[Row]) -> dict[str, tuple[Any, int]]:
    """Last value of every key, and the step that it is of."""
    values: dict[str, tuple[Any, int]] = {}
    for row in rows:
        values |= {name: (value, row.get("step", 0)) for name, value in row.items() if name != "step"}
    return values
