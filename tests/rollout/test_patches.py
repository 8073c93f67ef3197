"""What the patches of SGLang on CPU compute: attention in batches, tokens by seed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_mapo.patches.sglang_cpu.attention import decode_attention
from megatron_mapo.patches.sglang_cpu.sampling import filtered, sample_with_seeds


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


def test_filters_keep_the_most_likely_tokens_in_their_places():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).repeat(5, 1)
    top_ks, top_ps = torch.tensor([1, 4, 4, 4, 3]), torch.tensor([1.0, 0.6, 1.0, 1.0, 1.0])
    min_ps = torch.tensor([0.0, 0.0, 0.6, 0.0, 0.0])
    two = [0, 0.4, 0, 0.3]
    expected = torch.tensor([[0, 0.4, 0, 0], two, two, [0.1, 0.4, 0.2, 0.3], [0, 0.4, 0.2, 0.3]])
    assert torch.equal(filtered(probs, top_ks, top_ps, min_ps), expected)


def test_without_a_filter_probabilities_are_unchanged_beside_a_greedy_row():
    probs = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).softmax(-1)
    seeds, positions, none = torch.arange(64), torch.full((64,), 7), torch.ones(64)
    top_ks = torch.full((64,), 1 << 30).index_fill_(0, torch.tensor([0]), 1)
    mixed = filtered(probs, top_ks, none, 0 * none)
    assert torch.equal(mixed[1:], probs[1:])
    beside_a_greedy_one, alone = (sample_with_seeds(p, seeds, positions) for p in (mixed, probs))
    assert torch.equal(beside_a_greedy_one[1:], alone[1:])
    assert beside_a_greedy_one[0] == probs[0].argmax()
