"""Checkpoints as files: names, manifest, integrity, pointers, retention. No torch, so that tools answer at once.

========================  ======================================================================
``step_000012/``          complete: its ``manifest.json`` was written last, then it got this name
``step_000014.partial/``  being written, or left behind by a run that was killed
``step_000010.removed/``  being deleted
``step_000016.aside/``    newer than the checkpoint that ``run.resume_step`` chose
``latest``, ``best``      text files that hold a folder's name, replaced atomically
========================  ======================================================================

A run can be killed between any two operations. ``recover`` brings the folder back in order: a partial folder with a
manifest is complete and gets its name, every other one is deleted, and ``latest`` is set anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

from megatron_mapo.errors import CheckpointError

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
IMPORTED = "megatron"
"""Folder of the checkpoint in what ``megatron-mapo import`` writes. It has a manifest, too: of step 0."""
LATEST, BEST = "latest", "best"
RETURNED = "resumed_step"
"""File of a run's folder with the ``run.resume_step`` that the run has gone back to."""
_LESS_SPACE = (
    "free some space, choose another run.output_dir, or keep fewer with trainer.keep_checkpoints, trainer.keep_every"
)
_FORMAT = 1
_NAME = re.compile(r"step_(\d{6,})")
_HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and XXH3 (128 bit, hexadecimal) of one file of a checkpoint."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Measure:
    """What a score is a number of. Scores of different measures say nothing about each other.

    Attributes:
        metric: its name in ``evaluations.jsonl``.
        samples: sampled responses a prompt; 0: the greedy one alone.
        data: fingerprint of the held-out prompts.
    """

    metric: str
    samples: int
    data: str

    def __str__(self) -> str:
        return f"{self.metric} of {self.samples} samples on the data {self.data[:10]}"


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says about its checkpoint.

    Attributes:
        step: finished steps.
        created: when it was finished, ISO 8601, UTC.
        layout: ``world_size`` and the sizes of ``tensor``, ``pipeline``, ``context``, ``expert`` and ``data``
            parallelism of the ranks that wrote it. It can be read in any other.
        model: ``type`` and ``vocab_size`` (of the Hugging Face config), ``dtype``, ``path``, and a hash of the
            ``weights`` that the run began with. Earlier versions wrote neither ``vocab_size`` nor ``weights``.
        versions: of the packages that wrote it.
        config_hash: XXH3 of the configuration as YAML, which stands beside the manifest as ``config.yaml``; empty if
            there is none.
        score: the evaluation at this step, by ``trainer.best_metric``; None if there was none.
        parts: bytes of ``weights``, ``optimizer`` and ``other``.
        files: every file but the manifest, by its name.
        measure: what ``score`` is a number of; None if there is none, or an earlier version wrote it.
    """

    step: int
    created: str
    layout: dict[str, int]
    model: dict[str, str | int]
    versions: dict[str, str]
    config_hash: str
    score: float | None
    parts: dict[str, int]
    files: dict[str, FileEntry]
    measure: Measure | None = None


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay.

    Attributes:
        last: this many of the newest.
        every: those of steps that this divides, for good; 0: none.
        best: the one with the highest score by each measure, too.
    """

    last: int
    every: int = 0
    best: bool = False


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is while it is written."""
    return folder / f"step_{step:06d}.partial"


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run, oldest first, as (step, path)."""
    found = []
    for path in folder.glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def choose(folder: Path, step: int | None) -> tuple[int, Path] | None:
    """The checkpoint of ``step``, by default the newest; None if there is none and none was asked for.

    Raises:
        CheckpointError: there is no checkpoint of ``step``.
    """
    saved = complete_checkpoints(folder)
    if step is None:
        return saved[-1] if saved else None
    for found in saved:
        if found[0] == step:
            return found
    there = ", ".join(str(found) for found, _ in saved) or "none"
    raise CheckpointError(f"{folder} has no checkpoint of step {step}; there are: {there}")


def choose_start(folder: Path, step: int | None) -> tuple[int, Path] | None:
    """As ``choose``, for the start of a run: ``step`` is gone back to once (``note_return``), then the newest counts.

    So a command that is repeated after a crash goes on from where it was.

    Raises:
        CheckpointError: there is no checkpoint of ``step``.
    """
    return choose(folder, None if went_back(folder, step) else step)


def went_back(folder: Path, step: int | None) -> bool:
    """Whether the run has gone back to ``step``, by ``note_return``."""
    return step is not None and read_pointer(folder.parent, RETURNED) == str(step)


def note_return(folder: Path, step: int) -> None:
    """Remember, durably, that the run has gone back to ``step``."""
    if not went_back(folder, step):
        write_durably(folder.parent / RETURNED, f"{step}\n")


def forget_return(folder: Path) -> None:
    """A later ``run.resume_step`` is a new wish: a start has not asked for it."""
    (folder.parent / RETURNED).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- manifest


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if it has none (versions before manifests wrote it).

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    file = path / MANIFEST
    if not file.exists():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree.pop("format") != _FORMAT:
            raise CheckpointError(f"{file} was written by another version of megatron-mapo; use that version")
        files = {name: FileEntry(**entry) for name, entry in tree.pop("files").items()}
        measure = tree.pop("measure", None)
        return Manifest(files=files, measure=None if measure is None else Measure(**measure), **tree)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). {_what_to_do(path)}") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, durably. Whoever sees it sees a complete checkpoint."""
    write_durably(path / MANIFEST, json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1) + "\n")


def hash_file(file: Path) -> FileEntry:
    """Read a file for its size and checksum."""
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Every file is there with the size that the manifest says.

    Raises:
        CheckpointError: names the first file that is not, and what to do.
    """
    for name, entry in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{path / name} is missing. {_what_to_do(path)}") from None
        if size != entry.size:
            raise CheckpointError(
                f"{path / name} is damaged: it has {size} bytes, {entry.size} were written. {_what_to_do(path)}"
            )


def damaged(path: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """Read the files ``names`` and compare checksums: what is wrong with the first bad one, or None."""
    for name in names:
        try:
            found = hash_file(path / name)
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror}). {_what_to_do(path)}"
        if found != manifest.files[name]:
            return f"{path / name} is damaged: its checksum is not the one that was written. {_what_to_do(path)}"
    return None


def verify(path: Path) -> Manifest | None:
    """Compare sizes and checksums of all files; returns the manifest, None if there is none to compare with.

    Raises:
        CheckpointError: names the damaged file, and what to do.
    """
    manifest = read_manifest(path)
    if manifest is not None:
        check_sizes(path, manifest)
        problem = damaged(path, manifest, manifest.files)
        if problem:
            raise CheckpointError(problem)
    return manifest


def _what_to_do(path: Path) -> str:
    if path.name == IMPORTED:
        return "Import the model again"
    others = [str(step) for step, other in complete_checkpoints(path.parent) if other != path]
    older = f"choose another with run.resume_step (there are: {', '.join(others)}), or " if others else ""
    return f"To go on without this checkpoint, {older}remove the folder {path}"


# ------------------------------------------------------------------------------------- disk and names


def require_space(folder: Path, needed: int, what: str = "the checkpoint", remedy: str = _LESS_SPACE) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where the bytes go; exists.
        needed: bytes.
        what: needs them.
        remedy: what the user can do.

    Raises:
        CheckpointError: names the remedy, and the needed and the free space.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{free / 2**30:.2f} GiB free and {what} needs {needed / 2**30:.2f} GiB"
        raise CheckpointError(f"{folder} has {sizes}: {remedy}")


def publish(partial: Path) -> Path:
    """Give a complete folder its name, and point ``latest`` at it."""
    final = partial.with_suffix("")
    remove(final)
    partial.rename(final)
    sync_folder(final.parent)
    _point(final.parent, LATEST, final.name)
    return final


def discard(partial: Path) -> None:
    """Delete what was being written."""
    shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint, if it is there. At no moment is a half-deleted one under the name of a complete one."""
    if path.is_dir():
        doomed = path.with_suffix(".removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def retain(folder: Path, retention: Retention) -> list[str]:
    """Delete the complete checkpoints that need not stay, oldest first, and point ``best`` at the best one.

    It is the best by the measure of the newest score.

    Returns:
        why a checkpoint was left alone, a line each: its score, which ``retention.best`` needs, cannot be read, or
        is not comparable with the newest one.

    Raises:
        OSError: one cannot be deleted.
    """
    saved = complete_checkpoints(folder)
    keep = {step for step, _ in saved[-retention.last :]}
    if retention.every:
        keep |= {step for step, _ in saved if step % retention.every == 0}
    scored, problems = _scored(saved if retention.best else [])
    best = _best_by_measure(scored)
    keep |= {*problems, *best}
    for step in best[1:]:
        here, now = (scored[s].measure or "not known (an earlier version wrote it)" for s in (step, best[0]))
        problems[step] = f"{dict(saved)[step]} stays, and its score is not compared: it is {here}, the newest is {now}"
    if best:
        _point(folder, BEST, dict(saved)[best[0]].name)
    else:
        (folder / BEST).unlink(missing_ok=True)
    for step, path in saved:
        if step not in keep:
            remove(path)
    return list(problems.values())


def _scored(saved: list[tuple[int, Path]]) -> tuple[dict[int, Manifest], dict[int, str]]:
    """The manifests of the checkpoints that have a score, by their step, and what is wrong with unreadable ones."""
    scored, problems = {}, {}
    for step, path in saved:
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            problems[step] = str(error)
            continue
        if manifest is not None and manifest.score is not None and not math.isnan(manifest.score):
            scored[step] = manifest
    return scored, problems


def _best_by_measure(scored: dict[int, Manifest]) -> list[int]:
    """The step with the highest score by each measure, of equal ones the earliest; the newest measure comes first."""
    best: dict[Measure | None, tuple[float, int]] = {}
    for step in sorted(scored, reverse=True):
        measure, score = scored[step].measure, scored[step].score
        assert score is not None
        if measure not in best or score >= best[measure][0]:
            best[measure] = (score, step)
    return [step for _, step in best.values()]


def add_score(folder: Path, step: int, score: float, measure: Measure | None = None) -> None:
    """Write the score of an evaluation that came after its checkpoint into the manifest, if there is one of ``step``.

    Raises:
        CheckpointError: the manifest cannot be read.
        OSError: it cannot be written.
    """
    path = dict(complete_checkpoints(folder)).get(step)
    manifest = None if path is None else read_manifest(path)
    if path is not None and manifest is not None:
        write_manifest(path, replace(manifest, score=score, measure=measure))


def recover(folder: Path) -> list[str]:
    """Bring the folder of a killed run in order. Nobody else may be writing to it.

    Returns:
        what was done, a line each.
    """
    done = []
    for path in sorted(folder.glob("step_*.removed")):
        shutil.rmtree(path)
        done.append(f"finished the removal of {path.with_suffix('')}")
    for path in sorted(folder.glob("step_*.partial")):
        if not _NAME.fullmatch(path.stem):
            continue
        if (path / MANIFEST).exists():
            done.append(f"{publish(path)} was complete but for its name")
        else:
            shutil.rmtree(path)
            done.append(f"removed {path}, which a killed run had not finished")
    saved = complete_checkpoints(folder)
    if saved and read_pointer(folder, LATEST) != saved[-1][1].name:
        _point(folder, LATEST, saved[-1][1].name)
    return done


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Take checkpoints after ``step`` out of the way: the run goes on from ``step`` and will write them anew.

    Returns:
        where they are now.
    """
    moved = []
    for newer, path in complete_checkpoints(folder):
        if newer > step:
            aside = path.with_suffix(".aside")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    if moved:
        _point(folder, LATEST, f"step_{step:06d}")
    return moved


def read_pointer(folder: Path, name: str) -> str | None:
    """What ``latest`` or ``best`` names; None if there is no such file."""
    try:
        return (folder / name).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def sync_file(file: Path) -> None:
    """Wait until a file's contents are on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network filesystems do not know this for folders; their renames are durable by themselves.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(folder: Path, name: str, target: str) -> None:
    write_durably(folder / name, target + "\n")


def write_durably(file: Path, text: str) -> None:
    """Replace a file: a reader, and a machine that loses power, see the old or the new text, nothing between."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    sync_folder(file.parent)
