"""A checkpoint of any layout becomes a Hugging Face folder on one process, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Launcher
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_mapo import checkpoint_files
from megatron_mapo.cli import main

TP, PP, CP = "actor.parallel.tensor=2", "actor.parallel.pipeline=2", "actor.parallel.context=2"
SP, EP, VPP = "actor.parallel.sequence=true", "actor.parallel.expert=2", "actor.parallel.virtual_pipeline=2"
CASES: dict[str, dict[str, Any]] = {
    "tp2": {"ranks": 2, "model": "llama", "options": [TP, SP]},
    "pp2": {"ranks": 2, "model": "llama_untied", "options": [PP]},
    "pp2-tied": {"ranks": 2, "model": "gemma3_text", "options": [PP]},
    "vpp2": {"ranks": 2, "model": "deep", "options": [PP, VPP]},
    "cp2": {"ranks": 2, "model": "qwen2", "options": [CP]},
    "ep2": {"ranks": 2, "model": "qwen3_moe", "options": [EP]},
    "tp2-sp-ep2": {"ranks": 2, "model": "mixtral", "options": [TP, SP, EP]},
    "dp2": {"ranks": 2, "model": "gemma2", "options": []},
    "dp2-bfloat16": {"ranks": 2, "model": "qwen3", "options": ["model.dtype=bfloat16"]},
    "tp2-sp-ep2-pp2": {"ranks": 4, "model": "qwen3_moe", "options": [TP, SP, EP, PP]},
}
SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "data")
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "ep2": {"expert": 2, "data": 2},
    "tp2-sp-ep2": {"tensor": 2, "expert": 2},
    "dp2": {"data": 2},
    "tp2-sp-ep2-pp2": {"tensor": 2, "pipeline": 2, "expert": 2},
}
"""Sizes other than 1."""

LORA = "actor.lora.rank=4"
ADAPTED: dict[str, dict[str, Any]] = {
    "lora-tp2": {"ranks": 2, "model": "llama_untied", "options": [LORA, TP, SP]},
    "lora-pp2": {"ranks": 2, "model": "llama_untied", "options": [LORA, PP]},
}


@pytest.fixture(scope="module")
def runs(launcher: Launcher, frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (2, 4):
        cases = {name: case for name, case in (CASES | ADAPTED).items() if case["ranks"] == ranks}
        launcher.run(ranks, "train_runs", {"cases": cases, "folder": str(frozen), "runs": str(folder)})
    # What a later start has written: the export of an older checkpoint has nothing to do with it.
    later = folder / "lora-tp2" / "config.yaml"
    later.write_text(later.read_text().replace("alpha: 32.0", "alpha: 1.0").replace(str(frozen), "nowhere"))
    launcher.run(1, "export_runs", {"runs": str(folder)})
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_inspect_vouches_for_the_checkpoint_and_names_its_layout(
    name: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(runs / name), "--verify"]) == 0
    said = capsys.readouterr().out.splitlines()
    layout = " x ".join(f"{size} {LAYOUTS[name].get(size, 1)}" for size in SIZES)
    assert f"  layout     {CASES[name]['ranks']} ranks: {layout}" in said
    manifest = checkpoint_files.read_manifest(runs / name / "checkpoints/step_000001")
    assert manifest is not None
    assert f"  integrity  sizes and checksums of {len(manifest.files)} files as they were written" in said


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_what_was_trained(name: str, runs: Path, frozen: Path) -> None:
    found = load_file(runs / name / "export" / "model.safetensors")
    trained = load_file(runs / name / "weights.safetensors")
    source = load_file(frozen / CASES[name]["model"] / "model.safetensors")
    assert found.keys() == trained.keys() == source.keys()
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    for key, value in trained.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], value), key
        assert found[key].shape == source[key].shape
    assert any(not torch.equal(found[key].float(), value) for key, value in source.items()), "something was trained"
    assert AutoModelForCausalLM.from_pretrained(runs / name / "export").dtype == dtype
    card = (runs / name / "export" / "README.md").read_text()
    assert "after 1 step of" in card
    assert "| mix |" in card


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_exported_as_they_were_trained(name: str, runs: Path, frozen: Path) -> None:
    trained = load_file(runs / name / "adapters.safetensors")
    found = load_file(runs / name / "export" / "adapter" / "adapter_model.safetensors")
    assert found.keys() == trained.keys()
    assert len(found) == 2 * 2 * 7, "A and B of every projection of two layers"
    for key, value in trained.items():
        assert torch.equal(found[key], value), key
        assert value.any(), key
    settings = json.loads((runs / name / "export" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 32.0)
    assert settings["base_model_name_or_path"] == str((frozen / "llama_untied").resolve())
    merged, streamed = (load_file(runs / name / path) for path in ("export/model.safetensors", "weights.safetensors"))
    assert merged.keys() == streamed.keys()
    for key, value in streamed.items():
        assert torch.allclose(merged[key], value, rtol=1e-6, atol=1e-7), key
