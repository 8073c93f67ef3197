"""Decode attention for several requests at once.

Upstream's torch-native backend calls ``scaled_dot_product_attention`` once per request and layer when it
decodes. Here requests of similar length are padded to one another and share a call. The query heads of
one key/value head are the rows of one small matrix, so that keys and values are not repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CHUNK = 16
"""Requests a call: sorted by length, so that little is padded."""


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scale: float | None,
) -> Tensor:
    """Attention of one new token per request over its cached tokens.

    Args:
        query: ``[B, H, D]``.
        keys: the cache, ``[S, H_kv, D]``.
        values: the cache, ``[S, H_kv, D_v]``.
        req_to_token: cache slot of every token of every request, ``[R, L]``.
        rows: the requests' rows in ``req_to_token``, ``[B]``.
        lengths: their cached tokens, the new one included, ``[B]``.
        scale: factor on the scores; none means ``D ** -0.5``.

    Returns:
        ``[B, H, D_v]``.
    """
    batch, heads, _ = query.shape
    kv_heads = keys.shape[1]
    out = query.new_empty(batch, heads, values.shape[-1])
    for chosen in lengths.argsort().split(CHUNK):
        length = lengths[chosen]
        longest = int(length[-1])
        padding = torch.arange(longest) >= length[:, None]
        slots = req_to_token[rows[chosen], :longest]
        # a padded place repeats the request's first token: masked, and finite, so that 0 * value is 0
        slots = torch.where(padding, slots[:, :1], slots).flatten()
        q = query[chosen].view(len(chosen), kv_heads, heads // kv_heads, -1)
        k, v = (
            # on the flattened cache index_select is several times faster than cache[slots]
            cache.flatten(1).index_select(0, slots).view(len(chosen), longest, kv_heads, -1).transpose(1, 2)
            for cache in (keys, values)
        )
        mask = ~padding[:, None, None, :]
        attended = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scale)
        out[chosen] = attended.reshape(len(chosen), heads, -1)
    return out


def apply() -> None:
    """Let this process's torch-native backend decode in batches; other cases stay with upstream."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    upstream = TorchNativeAttnBackend._run_sdpa_forward_decode

    def run(
        self: Any,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        scaling: float | None = None,
        sliding_window_size: int | None = None,
        **options: Any,
    ) -> Tensor:
        arguments = (query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if encoder_lens is not None or sliding_window_size is not None:
            return upstream(
                self, *arguments, encoder_lens, scaling=scaling, sliding_window_size=sliding_window_size, **options
            )
        found = decode_attention(query, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, scaling)
        return output.copy_(found)

    TorchNativeAttnBackend._run_sdpa_forward_decode = run
