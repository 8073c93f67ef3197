"""Hugging Face folders: read tensors or parts of them, write a complete folder shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mapo.errors import DataError

# Everything beside the weights that a Hugging Face folder carries.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "README*")
_PIECES, _PIECE = 16, 1 << 16


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

    Raises:
        DataError: there is no safetensors file, or a tensor asked for is missing or misshapen.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.handles = {}
        for file in weight_files(self.path):
            try:
                handle = safe_open(str(file), "pt")
            except Exception as error:  # safetensors raises its own, undocumented types
                raise DataError(f"model.path: {file} is not a readable safetensors file: {error}") from error
            self.handles.update(dict.fromkeys(handle.keys(), handle))

    def read(self, name: str, shape: list[int], dim: int | None, parts: int, part: int) -> Tensor:
        """Part ``part`` of ``parts`` along ``dim`` (None: all) of a tensor that must have this whole ``shape``.

        A dimension that the parts do not divide is padded with zeros at its end.
        """
        if name not in self.handles:
            raise DataError(f"model.path: tensor {name} is missing in {self.path}")
        view = self.handles[name].get_slice(name)
        if view.get_shape() != shape:
            raise DataError(f"model.path: {name} has shape {view.get_shape()} in {self.path}, expected {shape}")
        if dim is None:
            return self.handles[name].get_tensor(name)
        width = -(-shape[dim] // parts)
        start, stop = part * width, min((part + 1) * width, shape[dim])
        piece = view[start:stop] if dim == 0 else view[:, start:stop]
        if stop - start < width:
            piece = torch.cat([piece, piece.new_zeros(width - (stop - start), *piece.shape[1:])])
        return piece


class _ShardWriter:
    """Collects tensors up to a size, then writes them as one safetensors file and forgets them."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[list[str]] = []
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0

    def room_for(self, size: int) -> None:
        """Write what is pending if ``size`` bytes more would make the file too large."""
        if self.pending and self.pending_bytes + size > self.shard_bytes:
            self.flush()

    def add(self, name: str, value: Tensor) -> None:
        """Take a tensor over; the caller must not change it."""
        self.pending[name] = value
        self.pending_bytes += value.nbytes
        self.total_bytes += value.nbytes

    def flush(self) -> None:
        """Write what is pending."""
        file = self.folder / f"shard-{len(self.shards)}"
        save_file(self.pending, str(file), metadata={"format": "pt"})
        shutil.copymode(self.folder / "config.json", file)  # safetensors makes files that only their owner reads
        self.shards.append(list(self.pending))
        self.pending.clear()
        self.pending_bytes = 0

    def finish(self) -> None:
        """Give the files transformers' names, and the index that several of them need."""
        self.flush()
        if len(self.shards) == 1:
            (self.folder / "shard-0").rename(self.folder / "model.safetensors")
            return
        where = {}
        for i, names in enumerate(self.shards):
            file = f"model-{i + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / file)
            where.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def save_folder(
    weights: Iterator[tuple[str, Tensor]],
    source: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> Path:
    """Write a Hugging Face folder: ``weights`` as safetensors, every companion file of ``source``.

    The folder appears under its name only when it is complete; one that is there already is replaced. The
    tensors of one file are in host memory at one time, and the one that does not fit into it any more.
    ``config.json`` says what type was written.

    Args:
        weights: names and whole tensors, one at a time.
        source: folder of the original model (config, tokenizer, chat template, ...).
        out: folder to write.
        shard_bytes: most bytes of one safetensors file; a larger tensor has a file of its own.
        dtype: type to convert the tensors to; None: as they are.
        card: text of README.md where ``source`` has none.
    """
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_companions(Path(source), partial)
    if card is not None and not (partial / "README.md").exists():
        (partial / "README.md").write_text(card)
    writer = _ShardWriter(partial, shard_bytes)
    written = dtype
    for name, value in weights:
        written = dtype or value.dtype
        writer.room_for(value.numel() * written.itemsize)
        # A copy: the tensor is only valid until the next one is asked for.
        writer.add(name, torch.empty_like(value, dtype=written, device="cpu", requires_grad=False).copy_(value))
        del value  # nothing but the shard and the next tensor
    writer.finish()
    _say_dtype(partial / "config.json", written)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def copy_companions(source: Path, out: Path) -> None:
    """Configuration, tokenizer, chat templates, generation settings, licence: all but the weights."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                copy = out / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                # Contents alone: permissions are those that the user's umask gives, as for all other files.
                shutil.copyfile(file, copy)


def _say_dtype(file: Path, dtype: torch.dtype | None) -> None:
    """Write the type into config.json unless it stands there; transformers has two names for the key."""
    settings = json.loads(file.read_text())
    key = "torch_dtype" if "torch_dtype" in settings and "dtype" not in settings else "dtype"
    name = str(dtype).removeprefix("torch.")
    if settings.get(key) != name:
        settings.pop("torch_dtype", None)
        file.write_text(json.dumps(settings | {key: name}, indent=2) + "\n")
