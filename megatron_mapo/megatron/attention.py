"""Attention over a packed microbatch, and the layer spec that uses it.

The same modules run on CPU and CUDA: gather the rows of an ``AttentionPlan`` into padded blocks,
one scaled-dot-product call a block, and put the results back. Where a microbatch is plain causal
rows (nothing shared, no context parallelism) CUDA takes torch's variable-length kernel instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mapo.data.packing import AttentionBlock, PackedBatch


@dataclass
class PackedParams(PackedSeqParams):
    """Carries the microbatch through megatron's layers: attention reads its plan, the head its labels.

    ``qkv_format`` stays ``sbhd`` (a batch of one): megatron then applies the rotary embedding that
    the model computed from explicit positions, instead of deriving positions from ``cu_seqlens``.
    """

    qkv_format: str | None = "sbhd"
    batch: PackedBatch | None = None


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that knows sequence parallelism: its gradient is summed over the tensor group.

    megatron-core's own wrapper around torch norms refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):
    """Causal self-attention of the rows that an ``AttentionPlan`` names (``core_attention``)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.context_group = groups.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[T, 1, heads, dim]``, the local tokens.
            key: ``[T, 1, kv_heads, dim]``.
            value: ``[T, 1, kv_heads, dim]``.
            packed_seq_params: holds the microbatch. The other arguments are megatron's and unused.

        Returns:
            ``[T, 1, heads * dim]``; zeros at tail padding.
        """
        assert packed_seq_params is not None
        assert packed_seq_params.batch is not None
        plan = packed_seq_params.batch.attention
        query, key, value = (t.squeeze(1) for t in (query, key, value))
        if plan.cu_seqlens is not None and query.is_cuda and query.dtype is not torch.float32:
            out = _variable_length(query, key, value, plan.cu_seqlens, plan.max_seqlen, self.scale)
        else:
            key, value = self._whole(key), self._whole(value)
            out = torch.zeros_like(query)
            for block in plan.blocks:
                rows = _attend(query, key, value, block, self.scale)
                out = out.index_copy(0, block.target, rows)
        return out.flatten(1).unsqueeze(1)

    def _whole(self, local: Tensor) -> Tensor:
        """Keys or values of the whole microbatch, in its order, from the stripes of all context ranks."""
        size = self.context_group.size()
        if size == 1:
            return local
        stripes = gather_from_sequence_parallel_region(local.contiguous(), group=self.context_group)
        return stripes.view(size, -1, *local.shape[1:]).transpose(0, 1).flatten(0, 1)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> Tensor:
    """torch's kernel for causal rows one after another; it takes bfloat16 and float16."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    # The kernel leaves what lies behind the last row, tail padding, as it found the memory.
    covered = torch.arange(len(out), device=out.device) < cu_seqlens[-1]
    return out.where(covered[:, None, None], 0.0)


def _attend(query: Tensor, key: Tensor, value: Tensor, block: AttentionBlock, scale: float) -> Tensor:
    """One padded call. Query heads that share a key head are folded into the query length."""
    rows, lq = block.query_index.shape
    heads, dim = query.shape[1:]
    kv = key.shape[1]
    fold = heads // kv
    q = query[block.query_index].view(rows, lq, kv, fold, dim).permute(0, 2, 3, 1, 4).reshape(rows, kv, fold * lq, dim)
    k, v = (t[block.key_index].transpose(1, 2) for t in (key, value))
    mask = block.mask[:, None].repeat(1, 1, fold, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = out.view(rows, kv, fold, lq, dim).permute(0, 3, 1, 2, 4).reshape(rows * lq, heads, dim)
    return out[block.valid]


def layer_spec(config: TransformerConfig, chunk: int = 0) -> TransformerBlockSubmodules:
    """megatron's local layer spec with the two modules above, for the layers of one chunk of this rank."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=chunk if config.virtual_pipeline_model_parallel_size else None)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
