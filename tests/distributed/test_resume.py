"""A checkpoint of one process continues in other layouts, and of several processes in their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Launcher
from safetensors.torch import load_file
from torch import Tensor

TP, PP, CP = "actor.parallel.tensor=2", "actor.parallel.pipeline=2", "actor.parallel.context=2"
SP, EP, VPP = "actor.parallel.sequence=true", "actor.parallel.expert=2", "actor.parallel.virtual_pipeline=2"
LORA = "actor.lora.rank=4"
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
    *(("lora", "lora_tp2"), ("lora_tp2", "lora_pp2"), ("lora_pp2", "lora")),
]
"""From, to."""


def _case(model: str, options: list[str], **more: Any) -> dict[str, Any]:
    return {"model": model, "options": options, **more}


@pytest.fixture(scope="module")
def resumed(launcher: Launcher, frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each layout went on with (``FROM-TO``), and what the undisturbed runs did (``FROM``)."""
    out = tmp_path_factory.mktemp("resumed")
    for name, (model, ranks, options) in LAYOUTS.items():
        where = {"folder": str(frozen), "checkpoints": str(out / name), "out": str(out / f"{name}.safetensors")}
        launcher.run(ranks, "save_and_continue", {"case": _case(model, options)} | where)
    for world in (1, 2, 4):
        cases = {
            f"{start}-{end}": _case(LAYOUTS[end][0], LAYOUTS[end][2], checkpoint=str(out / start / "step_000002"))
            for start, end in [*ELSEWHERE, *((name, name) for name in LAYOUTS)]
            if LAYOUTS[end][1] == world
        }
        states = launcher.run(world, "resume", {"cases": cases, "folder": str(frozen), "out": str(out)})
        assert all(state == {"cursor": [1, 2]} for rank in states for state in rank.values())
    return {file.stem: load_file(file) for file in out.glob("*.safetensors")}


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
    for name, value in expected.items():
        scale = max(float(value.double().abs().max()), 1e-3)
        assert float((found[name].double() - value.double()).abs().max()) <= 5e-6 * scale, name


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
    where = {"folder": str(frozen), "checkpoints": str(tmp_path), "out": str(tmp_path / "out.safetensors")}
    launcher.run(2, "save_and_continue", {"case": _case("llama", [])} | where)
    path = tmp_path / "step_000002"
    arguments = {"model": str(frozen / "llama"), "path": str(path)}
    assert launcher.run(2, "verify_checkpoint", arguments) == [["", "nothing was raised"]] * 2
    for file in sorted(path.glob("*.distcp")):
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        for kind, message in launcher.run(2, "verify_checkpoint", arguments):
            assert kind == "CheckpointError"
            assert f"{file} is damaged" in message
        file.write_bytes(good)
