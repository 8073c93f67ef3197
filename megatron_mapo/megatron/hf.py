"""Hugging Face <-> Megatron weights, by a table that covers every parameter or refuses.

``load_weights``: every rank reads only the slices that it holds; no communication.
``named_weights``: full tensors under their Hugging Face names, one at a time, on every rank.
``save_folder`` (``hf_folder.py``): a folder that transformers and SGLang load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import PretrainedConfig

from megatron_mapo.errors import DataError
from megatron_mapo.megatron.families import family_of
from megatron_mapo.megatron.hf_folder import SafetensorsFolder
from megatron_mapo.megatron.hf_folder import save_folder as save_folder
from megatron_mapo.megatron.model import PolicyModel, head_dim


@dataclass(frozen=True)
class Entry:
    """One parameter of this rank: its value, how it is cut, and what it is called elsewhere."""

    kind: str
    names: list[str]
    value: Tensor


def entries(model: PolicyModel, hf: PretrainedConfig) -> list[Entry]:
    """The table of this pipeline stage, in the model's order.

    Raises:
        DataError: the model has a parameter that the table does not know.
    """
    family = family_of(hf)
    of_layer = family.layer(hf)
    out = []
    for name, value in model.named_parameters():
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        kind, names = (of_layer if layer else family.top).get(layer[2] if layer else name, ("", []))
        if not kind:
            raise DataError(f"no Hugging Face name is known for the parameter {name}")
        if layer:
            number = model.decoder.layers[int(layer[1])].layer_number - 1
            names = [f"model.layers.{number}.{n}" for n in names]
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            names = ["model.embed_tokens.weight"]
        out.append(Entry(kind, names, value))
    return out


def _shapes(entry: Entry, hf: PretrainedConfig, parts: int) -> list[list[int]]:
    """Whole shape of each Hugging Face tensor of an entry that is cut into ``parts``."""
    rows, *rest = entry.value.shape
    if entry.kind == "copy":
        return [[rows, *rest]]
    if entry.kind == "rows":
        return [[hf.vocab_size, *rest]]
    if entry.kind == "columns":
        return [[rows, rest[0] * parts]]
    if entry.kind == "gate_up":
        return [[rows * parts // 2, *rest]] * 2
    dim = head_dim(hf)
    return [[heads * dim, *rest] for heads in (hf.num_attention_heads, *[hf.num_key_value_heads] * 2)]


@torch.no_grad()
def load_weights(model: PolicyModel, hf: PretrainedConfig, path: str | Path) -> None:
    """Fill ``model`` from a Hugging Face folder.

    Raises:
        DataError: a tensor is missing, unexpected, or has another shape; the message names it.
    """
    folder = SafetensorsFolder(path)
    group = parallel_state.get_tensor_model_parallel_group()
    size, rank = group.size(), group.rank()
    used = set()
    for entry in entries(model, hf):
        used.update(entry.names)
        dim = {"copy": None, "columns": 1}.get(entry.kind, 0)
        shapes = _shapes(entry, hf, size)
        parts = [folder.read(n, s, dim, size, rank) for n, s in zip(entry.names, shapes, strict=True)]
        if entry.kind == "qkv":
            groups = hf.num_key_value_heads // size
            value = torch.cat([p.reshape(groups, -1, *p.shape[1:]) for p in parts], 1).flatten(0, 1)
        else:
            value = torch.cat(parts)
        entry.value.copy_(value)
    _refuse_unexpected(folder, model, used)


def _refuse_unexpected(folder: SafetensorsFolder, model: PolicyModel, used: set[str]) -> None:
    """Tensors of the folder that no stage takes are an error: a part of the model would be dropped."""
    stages: list[set[str] | None] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, used, group=parallel_state.get_pipeline_model_parallel_group())
    known: set[str] = set().union(*(s or set() for s in stages))
    if model.share_embeddings_and_output_weights:
        known.add("lm_head.weight")
    extra = sorted(n for n in set(folder.handles) - known if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise DataError(f"model.path: unexpected tensors in {folder.path}: {', '.join(extra[:5])}")


@torch.no_grad()
def named_weights(model: PolicyModel, hf: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """All weights under their Hugging Face names, whole, in the model's order. Collective.

    Every rank of a model replica must exhaust the iterator. A tensor is valid until the next one
    is asked for.
    """
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    mine = [e for e in entries(model, hf) if not (len(e.names) == 1 and _is_second_copy(e, model))]
    tables: list[list[tuple[str, list[str], torch.Size]]] = [[] for _ in range(pipeline_group.size())]
    dist.all_gather_object(tables, [(e.kind, e.names, e.value.shape) for e in mine], group=pipeline_group)
    for stage, table in enumerate(tables):
        for i, (kind, names, shape) in enumerate(table):
            if stage == pipeline_group.rank():
                local = mine[i].value.detach().contiguous()
            else:
                local = torch.empty(shape, dtype=model.config.params_dtype, device=_device(model))
            if pipeline_group.size() > 1:
                dist.broadcast(local, group=pipeline_group, group_src=stage)
            if tensor_group.size() == 1 or kind == "copy":
                parts = local[None]
            else:
                whole = local.new_empty(tensor_group.size() * shape[0], *shape[1:])
                dist.all_gather_into_tensor(whole, local, group=tensor_group)
                parts = whole.view(tensor_group.size(), *shape)
            yield from zip(names, _join(kind, parts, hf), strict=True)


def _is_second_copy(entry: Entry, model: PolicyModel) -> bool:
    """The last stage's copy of tied embeddings; the first stage has the one that is sent."""
    tied = model.share_embeddings_and_output_weights and not model.pre_process
    return tied and entry.names == ["model.embed_tokens.weight"]


def _device(model: PolicyModel) -> torch.device:
    return next(model.parameters()).device


def _join(kind: str, parts: Tensor, hf: PretrainedConfig) -> list[Tensor]:
    """The Hugging Face tensors of one entry, from all tensor-parallel parts ``[tp, *shape]``."""
    if kind == "copy":
        return [parts[0]]
    if kind == "rows":
        return [parts.flatten(0, 1)[: hf.vocab_size]]
    if kind == "columns":
        return [torch.cat(list(parts), 1)]
    if kind == "gate_up":
        halves = [p.chunk(2) for p in parts]
        return [torch.cat([h[i] for h in halves]) for i in (0, 1)]
    dim = head_dim(hf)
    heads = hf.num_attention_heads // hf.num_key_value_heads
    by_group = parts.reshape(hf.num_key_value_heads, (heads + 2) * dim, *parts.shape[2:])
    return [x.reshape(-1, *parts.shape[2:]) for x in by_group.split([heads * dim, dim, dim], 1)]
