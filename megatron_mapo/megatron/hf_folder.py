"""Hugging Face folders: read tensors or parts of them, write a complete folder tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from megatron_mapo import checkpoint_files
from megatron_mapo.errors import CheckpointError, DataError

# Everything beside the weights that a Hugging Face folder carries.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "README*")
_PIECES, _PIECE = 16, 1 << 16
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_WRITTEN = 1 << 20
"""Elements that are converted and written at one time."""
_ROOM = 64 << 20
"""Bytes of disk for what stands beside the tensors: headers, the index."""


def weight_files(path: Path) -> list[Path]:
    """The files with a Hugging Face folder's weights.

    Those that the index names, else ``model.safetensors``, else every safetensors file: some folders hold the
    weights a second time, in another layout.

    Raises:
        DataError: there is none, or one is missing.
    """
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in names if not (path / name).is_file())
        if missing:
            raise DataError(f"model.path: {index} names {missing[0]}, which is not there")
        return sorted(path / name for name in names)
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise DataError(f"model.path: no *.safetensors file in {path}")
    return files


def weights_fingerprint(path: str | Path) -> str:
    """Tells models apart without reading all of their weights.

    It is the XXH3 of every file's size and of pieces spread evenly over it, the first one with names and shapes.
    """
    digest = xxhash.xxh3_128()
    for file in weight_files(Path(path)):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as stream:
            for number in range(_PIECES):
                stream.seek(max(0, size - _PIECE) * number // (_PIECES - 1))
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()


class SafetensorsFolder:
    """Read-only view of all tensors of a Hugging Face folder.

    Args:
        path: the folder.
        mapped_bytes: the files are opened anew after this many bytes, since pages that were read count as memory of
            the process as long as their file is mapped.

    Attributes:
        files: where each tensor is.

    Raises:
        DataError: there is no safetensors file, or a tensor asked for is missing or misshapen.
    """

    def __init__(self, path: str | Path, mapped_bytes: int = 1 << 30) -> None:
        self.path, self.mapped_bytes = Path(path), mapped_bytes
        self._handles: dict[Path, Any] = {}
        self._mapped = 0
        self.files = {name: file for file in weight_files(self.path) for name in self._open(file).keys()}  # noqa: SIM118

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(str(file), "pt")
            except Exception as error:  # safetensors raises its own, undocumented types
                raise DataError(f"model.path: {file} is not a readable safetensors file: {error}") from error
        return self._handles[file]

    def _will_map(self, size: int) -> None:
        if self._mapped and self._mapped + size > self.mapped_bytes:
            self._handles.clear()
            self._mapped = 0
        self._mapped += size

    def read(self, name: str, shape: list[int], dim: int | None, parts: int, part: int) -> Tensor:
        """Part ``part`` of ``parts`` along ``dim`` (None: all) of a tensor that must have this whole ``shape``.

        A dimension that the parts do not divide is padded with zeros at its end.
        """
        if name not in self.files:
            raise DataError(f"model.path: tensor {name} is missing in {self.path}")
        self._will_map(4 * math.prod(shape) // parts)  # at most; the type is known when the file is open
        handle = self._open(self.files[name])
        view = handle.get_slice(name)
        if view.get_shape() != shape:
            raise DataError(f"model.path: {name} has shape {view.get_shape()} in {self.path}, expected {shape}")
        if dim is None:
            return handle.get_tensor(name)
        width = -(-shape[dim] // parts)
        start, stop = part * width, min((part + 1) * width, shape[dim])
        piece = view[start:stop] if dim == 0 else view[:, start:stop]
        if stop - start < width:
            piece = torch.cat([piece, piece.new_zeros(width - (stop - start), *piece.shape[1:])])
        return piece


class WeightStream(Iterator[tuple[str, Tensor]]):
    """Names and whole tensors, one at a time. A tensor is valid until the next one is asked for.

    Attributes:
        described: the same names in the same order with tensors on the meta device, to be read once and first.
    """

    def __init__(self, described: Iterator[tuple[str, Tensor]], tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.described, self._tensors = described, tensors

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._tensors)


def save_folder(
    weights: WeightStream,
    source: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> Path:
    """Write a Hugging Face folder: ``weights`` as safetensors, every companion file of ``source``.

    The folder appears under its name only when it is complete; one that is there already is replaced. Every tensor
    is written as it comes, and none is kept. ``config.json`` says what type was written.

    Args:
        weights: names and tensors; the files are planned from their descriptions before the first one comes.
        source: folder of the original model (config, tokenizer, chat template, ...).
        out: folder to write.
        shard_bytes: most bytes of one safetensors file; a larger tensor has a file of its own.
        dtype: type to convert the tensors to; None: as they are.
        card: text of README.md where ``source`` has none.

    Raises:
        CheckpointError: the folder cannot be written; nothing of it stays, and what was there does.
    """
    out = Path(out)
    with _in_place_of(out) as folder:
        copy_companions(Path(source), folder)
        if card is not None and not (folder / "README.md").exists():
            (folder / "README.md").write_text(card)
        shards = _plan(weights.described, shard_bytes, dtype)
        total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
        checkpoint_files.require_space(folder, total + _ROOM, "the model", "free some space, or choose another folder")
        for name, tensors in shards.items():
            with (folder / name).open("wb") as stream:
                header, places = _header(tensors)
                stream.write(header)
                for planned in tensors.items():
                    stream.seek(places[planned[0]])
                    _write_next(weights, planned, stream)
        if (extra := next(weights, None)) is not None:
            raise ValueError(f"{extra[0]} comes after all tensors that were described")
        if len(shards) > 1:
            where = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        _say_dtype(folder / "config.json", [t.dtype for tensors in shards.values() for t in tensors.values()][-1])
    return out


@contextmanager
def _in_place_of(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``out`` when it is complete, and is removed when something fails."""
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plan(
    described: Iterator[tuple[str, Tensor]], shard_bytes: int, dtype: torch.dtype | None
) -> dict[str, dict[str, Tensor]]:
    """The files, by transformers' names, and their tensors: on the meta device, of the type that is written."""
    shards: list[dict[str, Tensor]] = []
    size = 0
    for name, tensor in described:
        tensor = tensor.to(dtype or tensor.dtype)
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": tensors for i, tensors in enumerate(shards, 1)}


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file begins with, and where in the file each tensor begins.

    That is the length of a table in JSON, and the table, padded to 8 bytes. Tensors stand in the order of their names,
    as in the files that safetensors writes of one type.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + tensor.nbytes
        table[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + table[name]["data_offsets"][0] for name in tensors}


def _write_next(weights: Iterator[tuple[str, Tensor]], planned: tuple[str, Tensor], stream: IO[bytes]) -> None:
    """The bytes of the next tensor, which must be the planned one. A function, so that it ends with the tensor."""
    name, tensor = planned
    found, value = next(weights, ("the end", tensor))
    if found != name or value.shape != tensor.shape:
        raise ValueError(f"{name} {list(tensor.shape)} was described, and {found} {list(value.shape)} comes")
    for piece in value.detach().contiguous().view(-1).split(_WRITTEN):
        stream.write(piece.to("cpu", tensor.dtype).view(torch.uint8).numpy())


def copy_companions(source: Path, out: Path) -> None:
    """Configuration, tokenizer, chat templates, generation settings, licence: all but the weights."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                copy = out / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                # Contents alone: permissions are those that the user's umask gives, as for all other files.
                shutil.copyfile(file, copy)


def _say_dtype(file: Path, dtype: torch.dtype) -> None:
    """Write the type into config.json unless it stands there; transformers has two names for the key."""
    settings = json.loads(file.read_text())
    key = "torch_dtype" if "torch_dtype" in settings and "dtype" not in settings else "dtype"
    name = str(dtype).removeprefix("torch.")
    if settings.get(key) != name:
        settings.pop("torch_dtype", None)
        file.write_text(json.dumps(settings | {key: name}, indent=2) + "\n")
