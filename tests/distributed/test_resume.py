"""A checkpoint of one process continues in other layouts, and of several processes in their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Launcher
from safetensors.torch import load_file
from torch import Tensor

TP, PP = "actor.parallel.tensor=2", "actor.parallel.pipeline=2"
LAYOUTS: dict[str, list[str]] = {
    "tp2": [TP],
    "pp2": [PP],
    "dp2": [],
}


def _case(model: str, options: list[str], **more: Any) -> dict[str, Any]:
    return {"model": model, "options": options, **more}


@pytest.fixture(scope="module")
def resumed(launcher: Launcher, frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each layout went on with, and what the undisturbed runs did."""
    out = tmp_path_factory.mktemp("resumed")
    for name, ranks, options in (("one", 1, []), ("own-dp2", 2, []), ("own-tp2", 2, [TP])):
        where = {"folder": str(frozen), "checkpoints": str(out / name), "out": str(out / f"{name}.safetensors")}
        launcher.run(ranks, "save_and_continue", {"case": _case("llama", options)} | where)
    start = {name: str(out / name / "step_000002") for name in ("one", "own-dp2", "own-tp2")}
    cases = {layout: _case("llama", options, checkpoint=start["one"]) for layout, options in LAYOUTS.items()}
    cases["again-dp2"] = _case("llama", [], checkpoint=start["own-dp2"])
    cases["again-tp2"] = _case("llama", [TP], checkpoint=start["own-tp2"])
    states = launcher.run(2, "resume", {"cases": cases, "folder": str(frozen), "out": str(out)})
    alone = {"back": _case("llama", [], checkpoint=start["own-tp2"])}
    states += launcher.run(1, "resume", {"cases": alone, "folder": str(frozen), "out": str(out)})
    assert all(state == {"cursor": [1, 2]} for rank in states for state in rank.values())
    return {file.stem: load_file(file) for file in out.glob("*.safetensors")}


@pytest.mark.parametrize(("again", "own"), [("again-dp2", "own-dp2"), ("again-tp2", "own-tp2")])
def test_the_same_layout_goes_on_bit_by_bit(again: str, own: str, resumed: dict[str, dict[str, Tensor]]) -> None:
    assert resumed[again].keys() == resumed[own].keys()
    for name, value in resumed[own].items():
        assert torch.equal(resumed[again][name], value), name


@pytest.mark.parametrize(
    ("layout", "undisturbed"), [("tp2", "one"), ("pp2", "one"), ("dp2", "one"), ("back", "own-tp2")]
)
def test_another_layout_goes_on_with_the_same_numbers(
    layout: str, undisturbed: str, resumed: dict[str, dict[str, Tensor]]
) -> None:
    found, expected = resumed[layout], resumed[undisturbed]
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
