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
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, [TP]),
    "pp2": (2, [PP]),
    "cp2": (2, [CP]),
    "tp2xpp2": (4, [TP, PP]),
}
"""Number of ranks, and options."""
ELSEWHERE = [
    *(("one", "tp2"), ("one", "pp2"), ("one", "dp2"), ("one", "cp2"), ("one", "tp2xpp2")),
    *(("tp2", "one"), ("cp2", "one"), ("tp2xpp2", "one")),
    *(("tp2", "pp2"), ("pp2", "tp2"), ("dp2", "tp2"), ("tp2", "dp2"), ("pp2", "dp2"), ("dp2", "pp2"), ("cp2", "tp2")),
    *(("dp2", "tp2xpp2"), ("tp2xpp2", "cp2")),
]
"""From, to."""


def _case(model: str, options: list[str], **more: Any) -> dict[str, Any]:
    return {"model": model, "options": options, **more}


@pytest.fixture(scope="module")
def resumed(launcher: Launcher, frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each layout went on with (``FROM-TO``), and what the undisturbed runs did (``FROM``)."""
    out = tmp_path_factory.mktemp("resumed")
    for name, (ranks, options) in LAYOUTS.items():
        where = {"folder": str(frozen), "checkpoints": str(out / name), "out": str(out / f"{name}.safetensors")}
        launcher.run(ranks, "save_and_continue", {"case": _case("llama", options)} | where)
    for world in (1, 2, 4):
        cases = {
            f"{start}-{end}": _case("llama", LAYOUTS[end][1], checkpoint=str(out / start / "step_000002"))
            for start, end in [*ELSEWHERE, *((name, name) for name in LAYOUTS)]
            if LAYOUTS[end][0] == world
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
