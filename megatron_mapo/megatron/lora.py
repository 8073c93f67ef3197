"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on megatron's fused, tensor-parallel projections.

A projection of a layer answers ``W x + (alpha / r) B A x``; W is frozen. Adapters are kept per Hugging Face
projection (q, k and v apart), so that they are the ones PEFT reads and writes. Where W is cut by rows, B is and
A is whole on every rank; where W is cut by columns, A is and B is whole. Only r numbers a token are sent.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_mapo.config import LORA_TARGETS, LoraConfig
from megatron_mapo.errors import ConfigError
from megatron_mapo.megatron.layers import RowParallelLinearNorm
from megatron_mapo.megatron.model import PolicyModel
from megatron_mapo.quickstart import hub_name

# megatron's linear layers -> the Hugging Face projections that each of them fuses, in the order of its rows.
_FUSED = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}


class LowRank(nn.Module):
    """The matrices of one projection: ``lora_A`` ``[r, in]`` and ``lora_B`` ``[rows, r]``, as this rank holds them."""

    def __init__(self, lora_A: Tensor, rows: int) -> None:  # PEFT's names
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_A.new_zeros(rows, len(lora_A)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B. With ``overlap_param_gather`` megatron brings other ranks' shards when their module is called."""
        return self.lora_A, self.lora_B


class Adapted:
    """What the adapted linear layers have in common. Attributes are set by ``_adapt``.

    Attributes:
        adapters: the matrices of each adapted projection.
        part_rows: rows of every fused projection on this rank, adapted or not, in their order.
        groups: key/value groups whose rows alternate; 1 outside ``linear_qkv``.
        scale: alpha / r.
        enabled: False computes the base model.
    """

    adapters: nn.ModuleDict
    part_rows: dict[str, int]
    groups: int
    scale: float
    enabled: bool

    def arrange(self, parts: dict[str, Tensor]) -> Tensor:
        """``[..., rows of a projection]`` each -> ``[..., rows of the layer]``; zeros where nothing is adapted."""
        shape = next(iter(parts.values())).shape[:-1]
        blocks = []
        for name, rows in self.part_rows.items():
            part = parts[name] if name in parts else next(iter(parts.values())).new_zeros(*shape, rows)
            blocks.append(part.unflatten(-1, (self.groups, -1)))
        return torch.cat(blocks, -1).flatten(-2)

    def weight_update(self) -> Tensor:
        """float32 ``(alpha / r) B A`` in the shape and order of this rank's weight."""
        return self.arrange({name: self.update(name).t() for name in self.adapters}).t()

    def update(self, name: str) -> Tensor:
        """float32 ``(alpha / r) B A`` of one projection, its rows in the order of Hugging Face's weight."""
        matrices = self.adapters[name]
        assert isinstance(matrices, LowRank)
        return (matrices.lora_B.float() @ matrices.lora_A.float()).mul_(self.scale)

    def _matrices(self) -> Iterator[tuple[str, LowRank]]:
        for name, module in self.adapters.items():
            assert isinstance(module, LowRank)
            yield name, module

    def _down(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., projections * r]``."""
        return F.linear(x, torch.cat([m()[0] for _, m in self._matrices()]))

    def _up(self, h: Tensor) -> Tensor:
        """``[..., projections * r]`` -> ``[..., rows of the layer]``."""
        pieces = h.chunk(len(self.adapters), -1)
        return self.scale * self.arrange(
            {name: F.linear(piece, m()[1]) for (name, m), piece in zip(self._matrices(), pieces, strict=True)}
        )

    def _sharded(self, prefix: str, offsets: Any, metadata: Any, axes: dict[str, int]) -> ShardedStateDict:
        state = self.state_dict(prefix="", keep_vars=True)  # type: ignore[attr-defined]
        group = self.tp_group  # type: ignore[attr-defined]
        return make_sharded_tensors_for_checkpoint(
            state, prefix, axes, offsets, tp_group=group, dp_cp_group=metadata["dp_cp_group"]
        )


class LoraColumn(Adapted, ColumnParallelLinear):
    """A projection that is cut by rows: A is whole, B is cut."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Base and update, ``[T, 1, rows]``."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.enabled:
            return output, bias
        h = self._down(input_)
        if self.sequence_parallel:
            h = gather_from_sequence_parallel_region(h, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            h = copy_to_tensor_model_parallel_region(h, group=self.tp_group)
        return output + self._up(h), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> ShardedStateDict:
        """B is cut along dim 0, like the weight."""
        axes = {f"adapters.{name}.lora_B": 0 for name in self.adapters}
        return self._sharded(prefix, sharded_offsets, metadata, {"weight": 0, "bias": 0, **axes})


class LoraRow(Adapted, RowParallelLinear):
    """A projection that is cut by columns: A is cut, B is whole."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Base and update, ``[T, 1, H]`` or this rank's part of the sequence."""
        output, bias = super().forward(input_)
        if not self.enabled:
            return output, bias
        h = self._down(input_)
        if self.sequence_parallel:
            h = reduce_scatter_to_sequence_parallel_region(h, group=self.tp_group)
        else:
            h = reduce_from_tensor_model_parallel_region(h, group=self.tp_group)
        return output + self._up(h), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> ShardedStateDict:
        """A is cut along dim 1, like the weight."""
        axes = {f"adapters.{name}.lora_A": 1 for name in self.adapters}
        return self._sharded(prefix, sharded_offsets, metadata, {"weight": 1, **axes})


class LoraRowNorm(RowParallelLinearNorm, LoraRow):
    """The same where the output is normalised: the update comes first."""


_ADAPTED = {ColumnParallelLinear: LoraColumn, RowParallelLinear: LoraRow, RowParallelLinearNorm: LoraRowNorm}


def add_adapters(chunks: list[PolicyModel], lora: LoraConfig, seed: int) -> None:
    """Freeze the model and give its projections adapters: A random, the same in every layout, and B zero.

    Raises:
        ConfigError: the model's MLP consists of experts, and ``actor.lora.targets`` names its projections; or it has
            none of the projections named.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        if chunk.config.num_moe_experts and not set(lora.targets) <= set(LORA_TARGETS[:4]):
            raise ConfigError(
                f"actor.lora.targets: experts cannot be adapted; with this model choose among {LORA_TARGETS[:4]}"
            )
        for layer in chunk.decoder.layers:
            for path, fused in _FUSED.items():
                if path == "mlp.linear_fc1" and not chunk.config.gated_linear_unit:
                    fused = ("up_proj",)
                if any(name in lora.targets for name in fused):
                    _adapt(layer.get_submodule(path), fused, lora, f"{seed}.{layer.layer_number}")
    if not any(True for _ in adapted_layers(chunks)):
        raise ConfigError(f"actor.lora.targets: the model has no {' or '.join(lora.targets)}")


def _adapt(linear: Any, fused: tuple[str, ...], lora: LoraConfig, seed: str) -> None:
    """Turn one of megatron's linear layers into its adapted class; its weight stays where it is."""
    config, group = linear.config, linear.tp_group
    by_rows = isinstance(linear, ColumnParallelLinear)
    rows, columns = linear.weight.shape
    linear.__class__ = _ADAPTED[type(linear)]
    linear.groups, linear.part_rows = 1, dict.fromkeys(fused, rows // len(fused))
    if len(fused) == 3:
        # The rows of a group: its query heads, its key head, its value head.
        linear.groups = config.num_query_groups // group.size()
        key = linear.groups * config.kv_channels
        linear.part_rows = {"q_proj": rows - 2 * key, "k_proj": key, "v_proj": key}
    linear.scale, linear.enabled = lora.alpha / lora.rank, True
    linear.adapters = nn.ModuleDict()
    parts, part = (1, 0) if by_rows else (group.size(), group.rank())
    for name in fused:
        if name in lora.targets:
            whole = _initial(lora.rank, columns * parts, f"{seed}.{name}")
            local = whole[:, part * columns : (part + 1) * columns].to(linear.weight)
            matrices = LowRank(local.contiguous(), linear.part_rows[name])
            cut, copied = (matrices.lora_B, matrices.lora_A) if by_rows else (matrices.lora_A, matrices.lora_B)
            set_tensor_model_parallel_attributes(cut, True, 0 if by_rows else 1, 1)
            # With sequence parallelism the whole one sees this rank's tokens only; megatron sums its gradient.
            copied.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            linear.adapters[name] = matrices


def _initial(rank: int, columns: int, seed: str) -> Tensor:
    """PEFT's distribution of A: uniform within 1 / sqrt(columns), float32 ``[rank, columns]``."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return (torch.rand(rank, columns, generator=generator) * 2 - 1) / columns**0.5


def adapted_layers(chunks: list[PolicyModel]) -> Iterator[Any]:
    """All adapted linear layers of this rank."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapted))


class BaseReference:
    """The model below the adapters: no second copy of anything."""

    def __init__(self, chunks: list[PolicyModel]) -> None:
        self.chunks = chunks

    @contextmanager
    def in_place(self) -> Iterator[list[PolicyModel]]:
        """The actor's modules without their adapters."""
        for layer in adapted_layers(self.chunks):
            layer.enabled = False
        try:
            yield self.chunks
        finally:
            for layer in adapted_layers(self.chunks):
                layer.enabled = True


def save_adapter(weights: Iterator[tuple[str, Tensor]], lora: LoraConfig, base: str, folder: Path, out: Path) -> Path:
    """Write adapters as a folder that PEFT loads.

    Args:
        weights: names and tensors of ``hf.named_adapters``.
        lora: how they were made.
        base: ``model.path`` of the model that they belong to.
        folder: where that is. PEFT is told so, unless it finds the model on the hub.
        out: folder to write.
    """
    out.mkdir(parents=True, exist_ok=True)
    adapters = {name: value.detach().cpu().contiguous().clone() for name, value in weights}
    save_file(adapters, str(out / "adapter_model.safetensors"))
    name, revision = hub_name(base) or (str(folder.resolve()), None)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({name.split(".")[-3] for name in adapters}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return out
