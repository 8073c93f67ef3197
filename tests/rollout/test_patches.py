"""The batched decode attention equals one attention per request."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_mapo.patches.sglang_cpu.attention import decode_attention


@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("batch", [1, 5, 37])
def test_decode_attention_equals_one_call_per_request(batch, heads):
    query_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(batch)
    slots = 400
    keys, values = torch.randn(2, slots, kv_heads, 16, generator=generator)
    unused = torch.arange(slots) % 5 == 0
    keys[unused] = values[unused] = float("nan")  # places that nobody wrote
    used = (~unused).nonzero().flatten()
    req_to_token = torch.zeros(64, 128, dtype=torch.int32)
    lengths = torch.randint(1, 100, (batch,), generator=generator)
    rows = torch.randperm(64, generator=generator)[:batch]
    query = torch.randn(batch, query_heads, 16, generator=generator)
    expected = []
    for row, length, q in zip(rows.tolist(), lengths.tolist(), query, strict=True):
        places = used[torch.randint(len(used), (length,), generator=generator)]
        req_to_token[row, :length] = places.int()
        k, v = (cache[places].transpose(0, 1).repeat_interleave(query_heads // kv_heads, 0) for cache in (keys, values))
        expected.append(scaled_dot_product_attention(q[:, None], k, v, scale=0.3)[:, 0])
    found = decode_attention(query, keys, values, req_to_token, rows, lengths, 0.3)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
