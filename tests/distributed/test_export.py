"""Weights come back bit by bit from every layout, and layouts that cannot be are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Launcher
from safetensors.torch import load_file
from tiny_models import make_tiny_model

TP, PP = "actor.parallel.tensor=2", "actor.parallel.pipeline=2"
LAYOUTS = {"tp2": (2, [TP]), "pp2": (2, [PP]), "tp2-pp2": (4, [TP, PP])}
MODELS = {
    "llama": (torch.float32, 301),
    "llama_untied": (torch.bfloat16, 301),
    "qwen2": (torch.bfloat16, 512),
    "qwen3": (torch.float32, 512),
}


@pytest.fixture(scope="module")
def exported(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source/MODEL`` and ``out/LAYOUT-MODEL``."""
    folder = tmp_path_factory.mktemp("export")
    for arch, (dtype, vocab) in MODELS.items():
        make_tiny_model(folder / "source" / arch, arch, dtype, vocab)
    for ranks in (2, 4):
        cases = {}
        for layout, (size, options) in LAYOUTS.items():
            for arch, (dtype, _) in MODELS.items():
                if size == ranks:
                    kind = str(dtype).removeprefix("torch.")
                    cases[f"{layout}-{arch}"] = {"model": arch, "options": [*options, f"model.dtype={kind}"]}
        arguments = {"cases": cases, "folder": str(folder / "source"), "out": str(folder / "out")}
        launcher.run(ranks, "export", arguments)
    return folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bit_by_bit(layout: str, model: str, exported: Path) -> None:
    found = load_file(exported / "out" / f"{layout}-{model}" / "model.safetensors")
    expected = load_file(exported / "source" / model / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == MODELS[model][0]
        assert torch.equal(found[name], value), name


def test_layouts_that_cannot_be_are_refused_on_every_rank(launcher: Launcher, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "three", "llama", num_hidden_layers=3)
    make_tiny_model(tmp_path / "one_head", "llama", num_key_value_heads=1)
    make_tiny_model(tmp_path / "odd_mlp", "llama", intermediate_size=129)
    cases = {
        "three a replica": ("three", ["actor.parallel.tensor=3"], r"= 3 \* 1 \* 1 = 3 does not divide the 2 ranks"),
        "four a replica": ("three", [TP, PP], r"= 2 \* 2 \* 1 = 4 does not divide the 2 ranks"),
        "experts": ("three", ["actor.parallel.expert=3"], r"actor\.parallel\.expert \(3\) does not divide"),
        "layers": ("three", [PP], "actor.parallel.pipeline=2 does not divide the model's 3 layers"),
        "heads": ("one_head", [TP], "actor.parallel.tensor=2 does not divide the model's 1 key/value heads"),
        "mlp": ("odd_mlp", [TP], "actor.parallel.tensor=2 does not divide the model's 129 rows of the MLP"),
    }
    asked = {name: {"model": model, "options": options} for name, (model, options, _) in cases.items()}
    for found in launcher.run(2, "errors", {"cases": asked, "folder": str(tmp_path)}):
        for name, (_, _, message) in cases.items():
            kind, text = found[name]
            with pytest.raises(AssertionError, match=message):
                raise AssertionError(text)
            assert kind == "ConfigError", name
