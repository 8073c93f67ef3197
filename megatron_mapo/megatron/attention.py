"""Attention over a packed microbatch, and the layer spec that uses it.

The same modules run on CPU and CUDA: gather the rows of an ``AttentionPlan`` into padded blocks,
one scaled-dot-product call a block, and put the results back. Where a microbatch is plain causal
rows (nothing shared, no context parallelism) CUDA takes torch's variable-length kernel instead.
A sliding window narrows the mask by true positions, whatever is shared or striped.
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
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_mapo.data.packing import AttentionBlock, PackedBatch
from megatron_mapo.megatron.families import DecoderConfig
from megatron_mapo.megatron.layers import LayerNorm, LocalRopeLayer, RMSNorm, RowParallelLinearNorm


@dataclass
class PackedParams(PackedSeqParams):
    """Carries the microbatch through megatron's layers: attention reads its plan, the head its labels.

    ``qkv_format`` stays ``sbhd`` (a batch of one): megatron then applies the rotary embedding that
    the model computed from explicit positions, instead of deriving positions from ``cu_seqlens``.
    """

    qkv_format: str | None = "sbhd"
    batch: PackedBatch | None = None


class PackedAttention(MegatronModule):
    """Causal self-attention of the rows that an ``AttentionPlan`` names (``core_attention``).

    A layer with a window of w sees its own token and the w - 1 before it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.softcap = config.attention_softcap
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] + 1
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
        plan, positions = packed_seq_params.batch.attention, packed_seq_params.batch.positions
        query, key, value = (t.squeeze(1) for t in (query, key, value))
        kernel_takes_it = query.is_cuda and query.dtype is not torch.float32 and self.softcap is None
        if plan.cu_seqlens is not None and kernel_takes_it:
            out = _variable_length(query, key, value, plan.cu_seqlens, plan.max_seqlen, self.scale, self.window)
        else:
            key, value = self._whole(key), self._whole(value)
            out = torch.zeros_like(query)
            for block in plan.blocks:
                mask = block.mask if self.window is None else _windowed(block, positions, self.window)
                rows = _attend(query, key, value, block, mask, self.scale, self.softcap)
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
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int | None
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
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    # The kernel leaves what lies behind the last row, tail padding, as it found the memory.
    covered = torch.arange(len(out), device=out.device) < cu_seqlens[-1]
    return out.where(covered[:, None, None], 0.0)


def _windowed(block: AttentionBlock, positions: Tensor, window: int) -> Tensor:
    """The block's mask without the keys that lie ``window`` or more positions back.

    Key j of a row stands at position j of its sequence, shared prompt or not.
    """
    oldest = positions[block.query_index] - window
    return block.mask & (torch.arange(block.mask.shape[-1], device=oldest.device) > oldest[:, :, None])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: AttentionBlock,
    mask: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """One padded call. Query heads that share a key head are folded into the query length."""
    rows, lq = block.query_index.shape
    heads, dim = query.shape[1:]
    kv = key.shape[1]
    fold = heads // kv
    q = query[block.query_index].view(rows, lq, kv, fold, dim).permute(0, 2, 3, 1, 4).reshape(rows, kv, fold * lq, dim)
    k, v = (t[block.key_index].transpose(1, 2) for t in (key, value))
    mask = mask[:, None].repeat(1, 1, fold, 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = _softcapped_attention(q, k, v, mask, scale, softcap)
    out = out.view(rows, kv, fold, lq, dim).permute(0, 3, 1, 2, 4).reshape(rows * lq, heads, dim)
    return out[block.valid]


def _softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention with scores s capped to ``softcap * tanh(s / softcap)``; the whole score matrix exists."""
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


def layer_spec(config: DecoderConfig, chunk: int = 0) -> TransformerBlockSubmodules:
    """megatron's local layer spec with our modules, for the layers of one chunk of this rank."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    norm = LayerNorm if config.normalization == "LayerNorm" else RMSNorm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if config.post_norms:
        attention.linear_proj = layer.submodules.mlp.submodules.linear_fc2 = RowParallelLinearNorm
    if config.local_rope:
        layer.module = LocalRopeLayer
    layers = get_num_layers_to_build(config, vp_stage=chunk if config.virtual_pipeline_model_parallel_size else None)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
