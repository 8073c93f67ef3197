"""Hugging Face <-> Megatron weights, by a table that covers every parameter or refuses.

``load_weights``: every rank reads only the slices that it holds; no communication.
``named_weights``: full tensors under their Hugging Face names, one at a time, on every rank.
``merged_weights``: those of a folder, with the adapters of a model without weights.
``save_folder`` (``hf_folder.py``): a folder that transformers and SGLang load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import PretrainedConfig

from megatron_mapo.errors import DataError
from megatron_mapo.megatron.families import Table, family_of
from megatron_mapo.megatron.hf_folder import SafetensorsFolder, WeightStream
from megatron_mapo.megatron.lora import Adapted
from megatron_mapo.megatron.model import PolicyModel, head_dim

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Entry:
    """One parameter of this rank: its value, how it is cut, and what it is called elsewhere.

    Attributes:
        parameter: megatron's name for it, in its chunk.
        expert: number of the expert among this rank's, -1 outside experts; its names have a field
            ``{expert}`` for the number among all.
        adapted: the layer with LoRA adapters whose weight this is.
        is_copy: this is the last stage's copy of tied embeddings; the first stage has the other one.
    """

    parameter: str
    kind: str
    names: list[str]
    value: Tensor
    expert: int = -1
    is_copy: bool = False
    adapted: Adapted | None = None

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The value, with the update of the adapters that its layer may have."""
        value = self.value.detach()
        if self.adapted is not None:
            value = (value.float() + self.adapted.weight_update()).to(value.dtype)
        return value.contiguous()


def entries(chunks: list[PolicyModel], hf: PretrainedConfig) -> list[Entry]:
    """The table of this pipeline stage, in the model's order.

    Raises:
        DataError: the model has a parameter that the table does not know.
    """
    family = family_of(hf)
    tables = _Tables(family.layer(hf), family.top)
    return [
        _entry(chunk, tables, name, value)
        for chunk in chunks
        for name, value in chunk.named_parameters()
        if ".adapters." not in name
    ]


class _Tables(NamedTuple):
    """The name tables of one model (see ``families.Table``)."""

    layer: Table
    top: Table


def _entry(chunk: PolicyModel, tables: _Tables, name: str, value: Tensor) -> Entry:
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    expert = re.fullmatch(r"(.+)\.local_experts\.(\d+)\.(.+)", layer[2]) if layer else None
    key = f"{expert[1]}.{expert[3]}" if expert else layer[2] if layer else name
    kind, names = (tables.layer if layer else tables.top).get(key, ("", []))
    if not kind:
        raise DataError(f"no Hugging Face name is known for the parameter {name}")
    if layer:
        number = chunk.decoder.layers[int(layer[1])].layer_number - 1
        names = [f"model.layers.{number}.{n}" for n in names]
    tied_output = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
    if tied_output:
        names = [_EMBEDDINGS]
    owner = chunk.get_submodule(name.rpartition(".")[0])
    adapted = owner if isinstance(owner, Adapted) and name.endswith(".weight") else None
    return Entry(name, kind, names, value, int(expert[2]) if expert else -1, tied_output, adapted)


def _shapes(entry: Entry, hf: PretrainedConfig, parts: int) -> list[list[int]]:
    """Whole shape of each Hugging Face tensor of an entry that is cut into ``parts``."""
    rows, *rest = entry.value.shape
    if entry.kind == "copy":
        return [[rows, *rest]]
    if entry.kind == "rows":
        return [[hf.vocab_size, *rest]]
    if entry.kind == "columns":
        return [[rows, rest[0] * parts]]
    if entry.kind == "slices":
        return [[rows * parts, *rest]]
    if entry.kind == "gate_up":
        return [[rows * parts // 2, *rest]] * 2
    dim = head_dim(hf)
    return [[heads * dim, *rest] for heads in (hf.num_attention_heads, *[hf.num_key_value_heads] * 2)]


@dataclass(frozen=True)
class _Cut:
    """The ranks that hold the parts of one layer's parameters: of its experts, or of all else.

    A part is numbered ``expert rank * parts of one expert + tensor rank``; outside experts the
    expert rank is 0.
    """

    group: dist.ProcessGroup
    expert_ranks: int
    parts: int

    @property
    def part(self) -> int:
        """Which part of a parameter this rank holds."""
        return self.group.rank() % self.parts

    @property
    def expert_rank(self) -> int:
        """Which of the expert ranks this rank is."""
        return self.group.rank() // self.parts


def _cut_of(entry: Entry) -> _Cut:
    if entry.expert < 0:
        group = parallel_state.get_tensor_model_parallel_group()
        return _Cut(group, 1, group.size())
    ranks = parallel_state.get_expert_model_parallel_world_size()
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    return _Cut(group, ranks, group.size() // ranks)


def _names(entry: Entry, cut: _Cut, expert_rank: int, hf: PretrainedConfig) -> list[str]:
    """Hugging Face names of the entry of the same place on ``expert_rank``."""
    if entry.expert < 0:
        return entry.names
    number = expert_rank * (family_of(hf).experts(hf) // cut.expert_ranks) + entry.expert
    return [name.format(expert=number) for name in entry.names]


@torch.no_grad()
def load_weights(chunks: list[PolicyModel], hf: PretrainedConfig, path: str | Path) -> None:
    """Fill a model from a Hugging Face folder.

    Raises:
        DataError: a tensor is missing, unexpected, or has another shape, or a head beside tied embeddings is another
            one; the message names it.
    """
    folder = SafetensorsFolder(path)
    used: set[str] = set()
    for entry in entries(chunks, hf):
        cut = _cut_of(entry)
        used.update(name for rank in range(cut.expert_ranks) for name in _names(entry, cut, rank, hf))
        names = _names(entry, cut, cut.expert_rank, hf)
        dim = {"copy": None, "columns": 1}.get(entry.kind, 0)
        shapes = _shapes(entry, hf, cut.parts)
        parts = [folder.read(n, s, dim, cut.parts, cut.part) for n, s in zip(names, shapes, strict=True)]
        if entry.kind == "qkv":
            groups = hf.num_key_value_heads // cut.parts
            value = torch.cat([p.reshape(groups, -1, *p.shape[1:]) for p in parts], 1).flatten(0, 1)
        else:
            value = torch.cat(parts)
        entry.value.copy_(value)
    _refuse_others(folder, used, hf)


def _refuse_others(folder: SafetensorsFolder, used: set[str], hf: PretrainedConfig) -> None:
    """Tensors of the folder beside the ``used`` ones would be dropped, and those must be there. Collective."""
    if missing := sorted(used - folder.files.keys()):
        raise DataError(f"model.path: tensor {missing[0]} is missing in {folder.path}")
    if hf.tie_word_embeddings and _HEAD in folder.files:
        _refuse_own_head(folder, hf)
        used.add(_HEAD)
    _refuse_unexpected(folder, used)


def _refuse_own_head(folder: SafetensorsFolder, hf: PretrainedConfig) -> None:
    """Tied embeddings beside another head are an error: transformers computes with that head, this model cannot.

    The ranks share the comparison, some rows at a time.
    """
    shape = [hf.vocab_size, hf.hidden_size]
    parts = -(-hf.vocab_size // _COMPARED_ROWS)
    differs = False
    for part in range(dist.get_rank(), parts, dist.get_world_size()):
        head, embeddings = (folder.read(name, shape, 0, parts, part) for name in (_HEAD, _EMBEDDINGS))
        differs = differs or not bool((head == embeddings).all())
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, differs)
    if any(found):
        raise DataError(
            f"model.path: {folder.path}/config.json says tie_word_embeddings=true, and its {_HEAD} is not "
            f"{_EMBEDDINGS}. Set tie_word_embeddings to false to train that head, or save the model without it"
        )


def _refuse_unexpected(folder: SafetensorsFolder, used: set[str]) -> None:
    """Tensors of the folder that no stage takes are an error: a part of the model would be dropped."""
    stages: list[set[str] | None] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, used, group=parallel_state.get_pipeline_model_parallel_group())
    known: set[str] = set().union(*(s or set() for s in stages))
    extra = sorted(n for n in folder.files.keys() - known if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise DataError(f"model.path: unexpected tensors in {folder.path}: {', '.join(extra[:5])}")


def named_weights(
    chunks: list[PolicyModel], hf: PretrainedConfig, read: Callable[[list[str]], Iterator[Tensor]] | None = None
) -> WeightStream:
    """All weights under their Hugging Face names, whole, stage by stage in the model's order. Collective.

    Every rank must exhaust the iterator. A tensor is valid until the next one is asked for.

    Args:
        chunks: the model.
        hf: its Hugging Face config.
        read: brings the values of the parameters of these names, in their order, for a model on the meta device;
            None: they are the model's own.
    """
    mine = _weight_entries(chunks, hf)
    values = (entry.merged() for entry in mine) if read is None else read([entry.parameter for entry in mine])
    return _stream(mine, values, hf)


def _weight_entries(chunks: list[PolicyModel], hf: PretrainedConfig) -> list[Entry]:
    """The entries without a second copy of tied embeddings."""
    return [entry for entry in entries(chunks, hf) if not entry.is_copy]


def merged_weights(
    chunks: list[PolicyModel], hf: PretrainedConfig, path: str | Path, mapped_bytes: int
) -> WeightStream:
    """The weights of a Hugging Face folder with the updates of adapters, as ``named_weights``, on one process alone.

    Args:
        chunks: the model; all of it but the adapters may be on the meta device.
        hf: its Hugging Face config.
        path: the folder.
        mapped_bytes: see ``SafetensorsFolder``.

    Raises:
        DataError: see ``load_weights``; of a tensor that is misshapen, when it is asked for.
    """
    mine = _weight_entries(chunks, hf)
    folder = SafetensorsFolder(path, mapped_bytes)
    _refuse_others(folder, {name for name, _ in _described([mine], hf)}, hf)
    return WeightStream(_described([mine], hf), _merged(mine, hf, folder))


def _merged(mine: list[Entry], hf: PretrainedConfig, folder: SafetensorsFolder) -> Iterator[tuple[str, Tensor]]:
    for entry in mine:
        for name, expected in _described([[entry]], hf):
            yield name, _read_merged(entry, name, expected, folder)


@torch.no_grad()
def _read_merged(entry: Entry, name: str, expected: Tensor, folder: SafetensorsFolder) -> Tensor:
    value = folder.read(name, list(expected.shape), None, 1, 0).to(expected.dtype)
    projection = name.split(".")[-2]
    if entry.adapted is None or projection not in entry.adapted.adapters:
        return value
    return entry.adapted.update(projection).add_(value).to(value.dtype)


def named_adapters(chunks: list[PolicyModel], hf: PretrainedConfig) -> WeightStream:
    """All LoRA matrices under PEFT's names, whole. Collective, as ``named_weights``."""
    mine = []
    for chunk in chunks:
        for name, value in chunk.named_parameters():
            found = re.fullmatch(r"decoder\.layers\.(\d+)\.(\w+)\.\w+\.adapters\.(\w+)\.(lora_[AB])", name)
            if found:
                number = chunk.decoder.layers[int(found[1])].layer_number - 1
                block = {"self_attention": "self_attn"}.get(found[2], found[2])
                cut = "copy"
                if getattr(value, "tensor_model_parallel", False):
                    cut = ("slices", "columns")[value.partition_dim]
                path = f"model.layers.{number}.{block}.{found[3]}.{found[4]}.weight"
                mine.append(Entry(name, cut, [f"base_model.model.{path}"], value))
    return _stream(mine, (entry.merged() for entry in mine), hf)


def _stream(mine: list[Entry], values: Iterator[Tensor], hf: PretrainedConfig) -> WeightStream:
    """The whole Hugging Face tensors of every stage's entries, of which ``mine`` have these values. Collective."""
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    tables: list[list[Entry]] = [[] for _ in range(pipeline_group.size())]
    described = [replace(e, value=e.value.detach().to("meta"), adapted=None) for e in mine]
    dist.all_gather_object(tables, described, group=pipeline_group)
    return WeightStream(_described(tables, hf), _gathered(tables, values, mine[0].value.device, hf))


def _described(tables: list[list[Entry]], hf: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of every stage's entries, on the meta device."""
    for table in tables:
        for entry in table:
            cut, value = _cut_of(entry), entry.value.detach().to("meta")
            yield from _whole(entry, value.expand(cut.expert_ranks, cut.parts, *value.shape), cut, hf)


def _gathered(
    tables: list[list[Entry]], values: Iterator[Tensor], device: torch.device, hf: PretrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that ``_described`` describes; ``values``, without gradients, are those of this stage's table.

    None is held while the next one comes. ``torch.no_grad`` around a generator would hold it.
    """
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    for stage, table in enumerate(tables):
        for entry in table:
            local = next(values) if stage == pipeline_group.rank() else torch.empty_like(entry.value, device=device)
            if pipeline_group.size() > 1:
                dist.broadcast(local, group=pipeline_group, group_src=stage)
            cut = _cut_of(entry)
            parts = _all_parts(entry, local, cut)
            del local
            yield from _whole(entry, parts, cut, hf)
            del parts


def _all_parts(entry: Entry, local: Tensor, cut: _Cut) -> Tensor:
    """What the ranks of a cut hold, ``[expert ranks, parts, *shape]``; of what all hold alike, one is enough."""
    if cut.group.size() == 1 or (entry.expert < 0 and entry.kind == "copy"):
        return local[None, None]
    whole = local.new_empty(cut.group.size() * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(whole, local, group=cut.group)
    return whole.view(cut.expert_ranks, cut.parts, *local.shape)


def _whole(entry: Entry, parts: Tensor, cut: _Cut, hf: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of one entry of every expert rank, from ``_all_parts``."""
    for rank, of_rank in enumerate(parts):
        yield from zip(_names(entry, cut, rank, hf), _join(entry.kind, of_rank, hf), strict=True)


def _join(kind: str, parts: Tensor, hf: PretrainedConfig) -> Iterable[Tensor]:
    """The Hugging Face tensors of one entry, from all tensor-parallel parts ``[tp, *shape]``; views where possible."""
    if kind == "copy":
        return [parts[0]]
    if kind == "rows":
        return [parts.flatten(0, 1)[: hf.vocab_size]]
    if kind == "slices":
        return [parts.flatten(0, 1)]
    if kind == "columns":
        return [_joined(list(parts), 1)]
    if kind == "gate_up":
        halves = [p.chunk(2) for p in parts]
        return (_joined([h[i] for h in halves], 0) for i in (0, 1))
    dim = head_dim(hf)
    heads = hf.num_attention_heads // hf.num_key_value_heads
    by_group = parts.reshape(hf.num_key_value_heads, (heads + 2) * dim, *parts.shape[2:])
    return (x.reshape(-1, *parts.shape[2:]) for x in by_group.split([heads * dim, dim, dim], 1))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
