"""The checksums that SGLang servers give of their weights, computed from the trainer's tensors.

A server fuses ``q_proj, k_proj, v_proj`` to ``qkv_proj`` and ``gate_proj, up_proj`` to
``gate_up_proj``, stacks the experts of a layer, pads the vocabulary, and cuts matrices over its
tensor-parallel ranks. Here each Hugging Face tensor is cut and fused the same way as it comes by,
hashed, and dropped: no more than the parts of unfinished fused tensors is ever held.

The hash is 64 bits of SHA-256 for weights on CPU, and sglang's word-wise mixing hash
(``gpu_tensor_hash``) for weights on CUDA.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mapo.errors import WeightSyncError
from megatron_mapo.model_shape import ModelShape

VOCAB_PADDING = 64
"""SGLang pads the vocabulary to a multiple of this."""
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Of an expert: Hugging Face names -> the server's stacked tensor, and the place in it.
_OF_EXPERT = {
    **dict.fromkeys(("gate_proj", "w1"), ("w13_weight", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("w13_weight", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("w2_weight", 0)),
}
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<module>\w+)\.weight")
_COLUMN_CUT = ("o_proj", "down_proj")
_VOCAB_CUT = ("embed_tokens", "lm_head")
_PART = {part: (fused, i) for fused, parts in FUSED.items() for i, part in enumerate(parts)}
_WORD = 0xFFFFFFFF
_TILE_WORDS = 8192
_TILES_AT_ONCE = 512


@dataclass(frozen=True)
class Layout:
    """How a server lays out its weights.

    Attributes:
        tensor: tensor-parallel size.
        cuda: the weights are on CUDA.
        dtype: type of the weights.
    """

    tensor: int
    cuda: bool
    dtype: torch.dtype


def sha256_hash(tensor: Tensor) -> str:
    """First 64 bits of the SHA-256 of the tensor's bytes, as 16 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()[:16]


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on 32-bit words held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _WORD
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)


def _rotate32(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _WORD


def word_hash(tensor: Tensor, seed: int = 0x243F6A88) -> str:
    """SGLang's ``gpu_tensor_hash``, on any device.

    Every 32-bit word is mixed with its position by two functions; the mixed words are summed per tile of
    8192 words, the tiles' 64-bit values are summed, and the sum is mixed (splitmix64's finaliser).

    Returns:
        16 hexadecimal digits.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % 4))
    words = data.view(torch.int32)
    count = len(words)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    step = _TILE_WORDS * _TILES_AT_ONCE
    for start in range(0, count, step):
        total += _hash_tiles(words[start : start + step], start, count, seed)
    x = int(total) & (2**64 - 1)
    if count == 0:
        return f"{0:016x}"
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return f"{x ^ (x >> 31):016x}"


def _hash_tiles(words: Tensor, start: int, count: int, seed: int) -> Tensor:
    """Sum of the 64-bit values of the tiles in ``words``, which begins at word ``start`` of ``count``."""
    index = torch.arange(start, start + len(words), dtype=torch.int64, device=words.device)
    value = words.to(torch.int64) & _WORD
    second = ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & _WORD
    halves = []
    for factor, offset, bits in ((0x27D4EB2D, seed & _WORD, 15), (0x165667B1, second, 13)):
        position = ((index * factor + offset) & _WORD) ^ _rotate32(index & _WORD, bits)
        mixed = _mix32(value ^ position)
        tiles = torch.nn.functional.pad(mixed, (0, -len(mixed) % _TILE_WORDS)).view(-1, _TILE_WORDS)
        halves.append(_mix32((tiles.sum(1) & _WORD) ^ ((count * 4) & _WORD)))
    return ((halves[0] << 32) | halves[1]).sum()


def _split(name: str) -> tuple[str, str, str]:
    """``model.layers.0.mlp.up_proj.weight`` -> (``model.layers.0.mlp.``, ``up_proj``, ``weight``)."""
    path, _, kind = name.rpartition(".")
    parent, _, module = path.rpartition(".")
    return (f"{parent}." if parent else ""), module, kind


class Expected:
    """Checksums that a server of one layout must give after an update.

    Args:
        layout: the server's.
        shape: the model's.
    """

    def __init__(self, layout: Layout, shape: ModelShape) -> None:
        self.layout = layout
        self.shape = shape
        self.by_rank: list[dict[str, str]] = [{} for _ in range(layout.tensor)]
        self._parts: dict[str, dict[int, Tensor]] = {}
        self._hash: Callable[[Tensor], str] = word_hash if layout.cuda else sha256_hash
        if shape.kind == "gemma2":
            # Its servers also keep the factor on the embeddings, and ``1 + weight`` of every norm.
            scale = torch.tensor(shape.hidden**0.5, dtype=layout.dtype)
            self._finish("model.normalizer", "normalizer", "", [scale])

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one Hugging Face tensor. It may be overwritten afterwards."""
        parent, module, kind = _split(name)
        if module == "lm_head" and self.shape.tied:
            return
        tensor = tensor.detach()
        if self.shape.kind == "gemma" and module.endswith("norm"):
            tensor = tensor + 1.0  # what its servers keep
        tensor = tensor.to(self.layout.dtype)
        if of_expert := _EXPERT.fullmatch(name):
            stacked, place = _OF_EXPERT[of_expert["module"]]
            each = 2 if stacked == "w13_weight" else 1
            part, target = int(of_expert["number"]) * each + place, f"{of_expert['layer']}.{stacked}"
            self._add_part(target, part, tensor, each * self.shape.experts, stacked, kind)
        elif module in _PART:
            fused, part = _PART[module]
            self._add_part(f"{parent}{fused}.{kind}", part, tensor, len(FUSED[fused]), fused, kind)
        else:
            self._finish(name, module, kind, [tensor])
            if self.shape.kind == "gemma2" and module.endswith("norm"):
                self._finish(name.removesuffix(kind) + "gemma_weight", module, kind, [tensor + 1.0])

    def _add_part(self, target: str, part: int, tensor: Tensor, count: int, module: str, kind: str) -> None:
        """Keep a part of a fused tensor until all ``count`` are there."""
        parts = self._parts.setdefault(target, {})
        parts[part] = tensor
        if len(parts) == count:
            del self._parts[target]
            self._finish(target, module, kind, [parts[i] for i in range(count)])
        else:
            parts[part] = tensor.clone()

    def _finish(self, name: str, module: str, kind: str, parts: list[Tensor]) -> None:
        for rank, checksums in enumerate(self.by_rank):
            checksums[name] = self._hash(self._shard(module, kind, parts, rank))

    def _shard(self, module: str, kind: str, parts: list[Tensor], rank: int) -> Tensor:
        """What rank ``rank`` of a server holds of the tensor made of ``parts``."""
        size = self.layout.tensor
        if module in _VOCAB_CUT:
            return self._vocab_shard(parts[0], rank)
        if module in _COLUMN_CUT and kind == "weight":
            return parts[0].chunk(size, dim=1)[rank]
        if module == "qkv_proj":
            query, *key_value = parts
            copies = max(1, size // self.shape.kv_heads)  # ranks that share a key/value head
            shards = [query.chunk(size)[rank], *(x.chunk(size // copies)[rank // copies] for x in key_value)]
            return torch.cat(shards)
        if module == "w13_weight":
            experts = zip(parts[::2], parts[1::2], strict=True)
            return torch.stack([torch.cat([x.chunk(size)[rank] for x in pair]) for pair in experts])
        if module == "w2_weight":
            return torch.stack([x.chunk(size, dim=1)[rank] for x in parts])
        if module == "gate_up_proj":
            return torch.cat([x.chunk(size)[rank] for x in parts])
        return parts[0]

    def _vocab_shard(self, tensor: Tensor, rank: int) -> Tensor:
        """Rows of one rank; rows that only pad the vocabulary are zeros."""
        size = self.layout.tensor
        unit = VOCAB_PADDING
        if math.ceil(len(tensor) / unit) * unit % size:
            unit *= size
        rows = math.ceil(len(tensor) / unit) * unit // size
        held = tensor[rank * rows : (rank + 1) * rows]
        if len(held) == rows:
            return held
        return torch.cat([held, held.new_zeros(rows - len(held), *held.shape[1:])])

    def compare(self, server: str, ranks: list[dict[str, str]]) -> None:
        """Compare with what a server gave.

        Args:
            server: its name in messages.
            ranks: checksum of every parameter, for each tensor-parallel rank.

        Raises:
            WeightSyncError: they differ. The message names the first parameters that do.
        """
        if self._parts:
            missing = [f"{name} (got {len(parts)} parts)" for name, parts in self._parts.items()]
            raise WeightSyncError(f"the trainer sent only parts of {_some(missing)}")
        if len(ranks) != len(self.by_rank):
            raise WeightSyncError(f"{server}: checksums of {len(ranks)} ranks, expected {len(self.by_rank)}")
        for rank, (mine, theirs) in enumerate(zip(self.by_rank, ranks, strict=True)):
            where = f"{server} rank {rank}" if len(ranks) > 1 else server
            hint = "a server that lays out its weights otherwise needs rollout.sync.verify=false"
            if unsent := sorted(theirs.keys() - mine.keys()):
                raise WeightSyncError(f"{where} holds weights that the trainer did not send: {_some(unsent)}; {hint}")
            if unknown := sorted(mine.keys() - theirs.keys()):
                raise WeightSyncError(f"{where} does not have {_some(unknown)}; {hint}")
            if differ := [name for name in mine if mine[name] != theirs[name]]:
                raise WeightSyncError(
                    f"after the update the weights of {where} differ from the trainer's: {_some(differ)} "
                    f"({len(differ)} of {len(mine)} tensors)"
                )


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
