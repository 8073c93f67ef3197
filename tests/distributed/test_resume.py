"""A checkpoint of one process continues in other layouts, and of several processes in their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_batch import VOCAB
from harness import Launcher
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

TP, PP, CP = "actor.parallel.tensor=2", "actor.parallel.pipeline=2", "actor.parallel.context=2"
SP, EP, VPP = "actor.parallel.sequence=true", "actor.parallel.expert=2", "actor.parallel.virtual_pipeline=2"
ETP, LORA = "actor.parallel.expert_tensor=2", "actor.lora.rank=4"
HALF, PLAIN = "model.dtype=bfloat16", "actor.optim.distributed=false"
OVERLAP, GATHER = "actor.optim.overlap_grad_reduce=true", "actor.optim.overlap_param_gather=true"
LAYOUTS: dict[str, tuple[str, int, list[str]]] = {
    "one": ("llama", 1, []),
    "dp2": ("llama", 2, []),
    "tp2": ("llama", 2, [TP]),
    "pp2": ("llama", 2, [PP]),
    "cp2": ("llama", 2, [CP]),
    "tp2xpp2": ("llama", 4, [TP, PP]),
    "deep": ("deep", 1, []),
    "deep_tp2": ("deep", 2, [TP]),
    "deep_vpp2": ("deep", 2, [PP, VPP]),
    "experts": ("qwen3_moe", 1, []),
    "experts_ep2": ("qwen3_moe", 2, [EP]),
    "experts_tp2xep2": ("qwen3_moe", 2, [TP, SP, EP]),
    "experts_ep2xpp2": ("qwen3_moe", 4, [EP, PP]),
    "experts_tp2xetp2": ("qwen3_moe", 2, [TP, SP, ETP]),
    "experts_overlap": ("qwen3_moe", 4, [EP, OVERLAP]),
    "overlap": ("llama", 2, [OVERLAP]),
    "overlap_gather": ("llama", 2, [OVERLAP, GATHER]),
    "half": ("llama", 1, [HALF]),
    "half_dp2": ("llama", 2, [HALF]),
    "half_tp2": ("llama", 2, [HALF, TP]),
    "half_pp2": ("llama", 2, [HALF, PP]),
    "plain_dp2": ("llama", 2, [PLAIN]),
    "plain_tp2": ("llama", 2, [PLAIN, TP]),
    "plain_pp2": ("llama", 2, [PLAIN, PP]),
    "half_plain_dp2": ("llama", 2, [HALF, PLAIN]),
    "half_plain_tp2": ("llama", 2, [HALF, PLAIN, TP]),
    "plain_experts": ("qwen3_moe", 1, [PLAIN]),
    "plain_experts_ep2": ("qwen3_moe", 2, [PLAIN, EP]),
    "lora": ("llama_untied", 1, [LORA]),
    "lora_tp2": ("llama_untied", 2, [LORA, TP]),
    "lora_pp2": ("llama_untied", 2, [LORA, PP]),
}
"""Model, number of ranks, options."""
ELSEWHERE = [
    *(("one", "tp2"), ("one", "pp2"), ("one", "dp2"), ("one", "cp2"), ("one", "tp2xpp2")),
    *(("tp2", "one"), ("cp2", "one"), ("tp2xpp2", "one")),
    *(("tp2", "pp2"), ("pp2", "tp2"), ("dp2", "tp2"), ("tp2", "dp2"), ("pp2", "dp2"), ("dp2", "pp2"), ("cp2", "tp2")),
    *(("dp2", "tp2xpp2"), ("tp2xpp2", "cp2")),
    *(("deep", "deep_vpp2"), ("deep_vpp2", "deep"), ("deep_vpp2", "deep_tp2"), ("deep_tp2", "deep_vpp2")),
    *(("experts", "experts_ep2"), ("experts_ep2", "experts"), ("experts_ep2", "experts_tp2xep2")),
    *(("experts_tp2xep2", "experts_ep2xpp2"), ("experts_ep2xpp2", "experts_ep2")),
    *(("experts_ep2", "experts_tp2xetp2"), ("experts_tp2xetp2", "experts"), ("experts_overlap", "experts_ep2xpp2")),
    *(("overlap", "one"), ("tp2", "overlap_gather"), ("overlap_gather", "overlap"), ("experts", "experts_overlap")),
    *(("half_dp2", "half_tp2"), ("half_tp2", "half_dp2"), ("half_pp2", "half"), ("half", "half_pp2")),
    *(("plain_dp2", "plain_tp2"), ("plain_tp2", "plain_pp2"), ("plain_pp2", "plain_dp2")),
    *(("half_plain_dp2", "half_plain_tp2"), ("half_plain_tp2", "half_plain_dp2")),
    *(("plain_experts", "plain_experts_ep2"), ("plain_experts_ep2", "plain_experts")),
    *(("lora", "lora_tp2"), ("lora_tp2", "lora_pp2"), ("lora_pp2", "lora")),
]
"""From, to."""


def _case(model: str, options: list[str], **more: Any) -> dict[str, Any]:
    return {"model": model, "options": options, **more}


@pytest.fixture(scope="module")
def folder(launcher: Launcher, frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each layout went on with (``FROM-TO``), and what the undisturbed runs did (``FROM``)."""
    out = tmp_path_factory.mktemp("resumed")
    where = {"folder": str(frozen), "out": str(out)}
    for world in (1, 2, 4):
        cases = {name: _case(model, options) for name, (model, ranks, options) in LAYOUTS.items() if ranks == world}
        launcher.run_cases(world, "save_and_continue", cases, where)
    for world in (1, 2, 4):
        cases = {
            f"{start}-{end}": _case(
                *LAYOUTS[end][::2], checkpoint=str(out / start / "step_000002"), save_again=start != end
            )
            for start, end in [*ELSEWHERE, *((name, name) for name in LAYOUTS)]
            if LAYOUTS[end][1] == world
        }
        states = launcher.run_cases(world, "resume", cases, where)
        assert all(state == {"cursor": [1, 2]} for rank in states for state in rank.values())
    return out


@pytest.fixture(scope="module")
def resumed(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The numbers of ``folder``."""
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, each in one piece, without the rows that pad the vocabulary; torch reads them."""
    found: dict[str, Any] = {}
    _load_state_dict(found, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {
        name: value[:VOCAB] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else value
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_same_layout_goes_on_bit_by_bit(layout: str, resumed: dict[str, dict[str, Tensor]]) -> None:
    found, expected = resumed[f"{layout}-{layout}"], resumed[layout]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("start", "end"), ELSEWHERE)
def test_another_layout_goes_on_with_the_same_numbers(
    start: str, end: str, resumed: dict[str, dict[str, Tensor]]
) -> None:
    found, expected = resumed[f"{start}-{end}"], resumed[start]
    assert found.keys() == expected.keys()
    bound = 0.1 if HALF in LAYOUTS[start][2] else 5e-6
    for name, value in expected.items():
        scale = max(float(value.double().abs().max()), 1e-3)
        assert float((found[name].double() - value.double()).abs().max()) <= bound * scale, name


@pytest.mark.parametrize(("start", "end"), ELSEWHERE)
def test_another_layout_has_the_same_weights_and_moments(start: str, end: str, folder: Path) -> None:
    """Bit by bit: saved again by the other layout before it trains, they are those that the first one saved."""
    found, expected = (tensors_of(folder / name / "step_000002") for name in (f"{start}-{end}", start))
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_state_of_another_optimizer_is_refused(launcher: Launcher, frozen: Path, folder: Path) -> None:
    pairs = [
        *(("plain_dp2", "tp2"), ("dp2", "plain_tp2"), ("half_plain_dp2", "half_dp2"), ("half_dp2", "half_plain_tp2")),
        *(("plain_experts_ep2", "experts_ep2"), ("experts_ep2", "plain_experts_ep2")),
    ]
    cases = {
        f"{start}-{end}": _case(LAYOUTS[end][0], LAYOUTS[end][2], checkpoint=str(folder / start / "step_000002"))
        for start, end in pairs
    }
    for found in launcher.run(2, "refused", {"cases": cases, "folder": str(frozen)}):
        for name, (kind, message) in found.items():
            was = str("plain" not in name.split("-")[0]).lower()
            assert kind == "CheckpointError", name
            assert f"it was written with actor.optim.distributed={was}" in message, name


def test_every_rank_hears_of_a_folder_that_cannot_be_written(launcher: Launcher, frozen: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    arguments = {"model": str(frozen / "llama"), "folder": str(tmp_path / "file" / "checkpoints")}
    for kind, message in launcher.run(2, "save_where_nothing_can_be_written", arguments, timeout=120):
        assert kind == "CheckpointError"
        assert "step_000001" in message


def test_every_rank_hears_of_one_that_has_no_room(launcher: Launcher, frozen: Path, tmp_path: Path) -> None:
    arguments = {"model": str(frozen / "llama"), "folder": str(tmp_path / "checkpoints")}
    for kind, message in launcher.run(2, "save_where_one_rank_has_no_room", arguments, timeout=120):
        assert kind == "CheckpointError"
        assert "could not write" in message
        assert "step_000001: rank 1: OSError: [Errno 27] File too large" in message
    assert list((tmp_path / "checkpoints").iterdir()) == [], "nothing is left behind"


def test_every_rank_hears_of_a_damaged_file(launcher: Launcher, frozen: Path, tmp_path: Path) -> None:
    launcher.run(
        2, "save_and_continue", {"cases": {"run": _case("llama", [])}, "folder": str(frozen), "out": str(tmp_path)}
    )
    path = tmp_path / "run" / "step_000002"
    arguments = {"model": str(frozen / "llama"), "path": str(path)}
    assert launcher.run(2, "verify_checkpoint", arguments) == [["", "nothing was raised"]] * 2
    for file in sorted(path.glob("*.distcp")):
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        for kind, message in launcher.run(2, "verify_checkpoint", arguments):
            assert kind == "CheckpointError"
            assert f"{file} is damaged" in message
        file.write_bytes(good)
