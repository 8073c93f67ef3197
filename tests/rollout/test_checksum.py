"""The trainer's side of the checksums: the hashes, and how tensors are cut over ranks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from megatron_mapo.errors import WeightSyncError
from megatron_mapo.model_shape import ModelShape
from megatron_mapo.rollout.checksum import Expected, Layout, sha256_hash, word_hash

SHAPE = ModelShape(kind="llama", layers=1, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=512, tied=True)


def collect(tensor: int, weights: dict[str, torch.Tensor], shape: ModelShape = SHAPE) -> list[dict[str, str]]:
    expected = Expected(Layout(tensor, False, torch.float32), shape)
    for name, value in weights.items():
        expected.add(name, value)
    expected.compare("here", expected.by_rank)
    return expected.by_rank


def test_query_key_value_are_cut_before_they_are_fused():
    q, k, v = torch.randn(32, 5), torch.randn(16, 5), torch.randn(16, 5)
    weights = {f"model.layers.0.self_attn.{n}_proj.weight": t for n, t in (("q", q), ("k", k), ("v", v))}
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert collect(1, weights) == [{name: sha256_hash(torch.cat([q, k, v]))}]
    halves = [torch.cat([q[16 * r : 16 * r + 16], k[8 * r : 8 * r + 8], v[8 * r : 8 * r + 8]]) for r in range(2)]
    assert collect(2, weights) == [{name: sha256_hash(half)} for half in halves]
    # four ranks share two key/value heads
    quarters = [
        torch.cat([q[8 * r : 8 * r + 8], k[8 * (r // 2) : 8 * (r // 2) + 8], v[8 * (r // 2) : 8 * (r // 2) + 8]])
        for r in range(4)
    ]
    assert collect(4, weights) == [{name: sha256_hash(quarter)} for quarter in quarters]


def test_matrices_are_cut_by_rows_or_columns():
    gate, up, down, norm = torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 8), torch.randn(4)
    ranks = collect(
        2,
        {
            "model.layers.0.mlp.up_proj.weight": up,  # in any order
            "model.layers.0.mlp.gate_proj.weight": gate,
            "model.layers.0.mlp.down_proj.weight": down,
            "model.norm.weight": norm,
        },
    )
    for r, found in enumerate(ranks):
        assert found == {
            "model.layers.0.mlp.gate_up_proj.weight": sha256_hash(
                torch.cat([gate[4 * r : 4 * r + 4], up[4 * r : 4 * r + 4]])
            ),
            "model.layers.0.mlp.down_proj.weight": sha256_hash(down[:, 4 * r : 4 * r + 4]),
            "model.norm.weight": sha256_hash(norm),
        }


@pytest.mark.parametrize(
    "names", [("mlp", "gate_proj", "up_proj", "down_proj"), ("block_sparse_moe", "w1", "w3", "w2")]
)
def test_experts_are_stacked_gate_before_up(names: tuple[str, ...]):
    block, *modules = names
    layer = f"model.layers.0.{block}.experts"
    gate, up, down, router = torch.randn(3, 8, 4), torch.randn(3, 8, 4), torch.randn(3, 4, 8), torch.randn(3, 4)
    weights = {f"model.layers.0.{block}.gate.weight": router}
    for e in (2, 0, 1):  # in any order
        weights |= {f"{layer}.{e}.{m}.weight": t[e] for m, t in zip(modules, (gate, up, down), strict=True)}
    for r, found in enumerate(collect(2, weights, replace(SHAPE, experts=3))):
        half = slice(4 * r, 4 * r + 4)
        assert found == {
            f"model.layers.0.{block}.gate.weight": sha256_hash(router),
            f"{layer}.w13_weight": sha256_hash(torch.cat([gate[:, half], up[:, half]], 1)),
            f"{layer}.w2_weight": sha256_hash(down[:, :, half]),
        }


def test_the_vocabulary_is_padded_with_zeros():
    table = torch.randn(100, 3)
    padded = torch.cat([table, torch.zeros(28, 3)])
    name = "model.embed_tokens.weight"
    assert collect(1, {name: table}) == [{name: sha256_hash(padded)}]
    assert collect(2, {name: table}) == [{name: sha256_hash(padded[:64])}, {name: sha256_hash(padded[64:])}]
    # 128 rows are not a multiple of 3: the unit of padding becomes 192
    three = torch.cat([table, torch.zeros(92, 3)]).chunk(3)
    assert collect(3, {name: table}) == [{name: sha256_hash(part)} for part in three]


def test_a_tied_head_is_no_tensor_of_its_own():
    weights = {"model.embed_tokens.weight": torch.randn(64, 3), "lm_head.weight": torch.randn(64, 3)}
    assert list(collect(1, weights)[0]) == ["model.embed_tokens.weight"]
    untied = replace(SHAPE, tied=False)
    assert list(collect(1, weights, untied)[0]) == list(weights)


def test_tensors_may_be_overwritten_after_they_were_added():
    expected = Expected(Layout(1, False, torch.float32), SHAPE)
    buffer, parts = torch.empty(4, 2), torch.randn(2, 4, 2)
    for module, part in zip(("gate_proj", "up_proj"), parts, strict=True):
        expected.add(f"mlp.{module}.weight", buffer.copy_(part))
    assert expected.by_rank == [{"mlp.gate_up_proj.weight": sha256_hash(parts.flatten(0, 1))}]


def test_every_difference_is_named():
    mine = Expected(Layout(1, False, torch.float32), SHAPE)
    mine.add("model.norm.weight", torch.ones(4))
    good = dict(mine.by_rank[0])
    mine.compare("server", [good])
    with pytest.raises(WeightSyncError, match=r"differ.*model\.norm\.weight"):
        mine.compare("server", [{"model.norm.weight": "0" * 16}])
    with pytest.raises(WeightSyncError, match=r"did not send: extra; .*rollout\.sync\.verify=false"):
        mine.compare("server", [good | {"extra": "0"}])
    with pytest.raises(WeightSyncError, match=r"does not have model\.norm\.weight"):
        mine.compare("server", [{}])
    mine.add("a.q_proj.weight", torch.ones(2))
    with pytest.raises(WeightSyncError, match=r"only parts of a\.qkv_proj\.weight"):
        mine.compare("server", [good])


def test_the_type_is_that_of_the_server():
    expected = Expected(Layout(1, False, torch.bfloat16), SHAPE)
    weight = torch.randn(10)
    expected.add("model.norm.weight", weight)
    assert expected.by_rank[0]["model.norm.weight"] == sha256_hash(weight.bfloat16())


KERNEL = """
    import importlib.util, sys, torch, triton
    spec = importlib.util.find_spec("sglang")
    path = spec.submodule_search_locations[0] + "/kernels/ops/memory/gpu_tensor_hash.py"
    spec = importlib.util.spec_from_file_location("gpu_tensor_hash", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    for line in sys.stdin:
        words = torch.arange(int(line), dtype=torch.int32).mul(40503).view(torch.uint32)
        seed, n = 0x243F6A88, len(words)
        total = torch.empty(triton.cdiv(n, 8192), dtype=torch.uint64)
        kernels.hash_tiles32_kernel_blocked[(len(total),)](
            words, total, n, seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
            FM_C1=kernels.FMIX32_C1, FM_C2=kernels.FMIX32_C2, POS_A=kernels.POS_C1, POS_B=kernels.POS_C2,
            TILE=8192, BLOCK=256, USE_CG=True)
        print(f"{kernels._final_splitmix64(int(total.view(torch.int64).sum())):016x}")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton's interpreter")
def test_the_word_hash_is_that_of_sglangs_kernel():
    sizes = [1, 5, 8192, 8193, 20001]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KERNEL)],
        input="\n".join(map(str, sizes)),
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    assert done.stdout.split() == [word_hash(torch.arange(n, dtype=torch.int32).mul(40503)) for n in sizes]


def test_the_word_hash_pads_and_does_not_depend_on_its_chunks(monkeypatch):
    data = torch.randint(0, 255, (70_003,), dtype=torch.uint8)
    whole = word_hash(data)
    assert whole == word_hash(torch.cat([data, torch.zeros(1, dtype=torch.uint8)]))
    monkeypatch.setattr("megatron_mapo.rollout.checksum._TILES_AT_ONCE", 1)
    assert word_hash(data) == whole
