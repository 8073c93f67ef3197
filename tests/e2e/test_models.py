"""Whole runs with what is not a plain dense model: adapters, experts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from runs import API_KEY, command, rows, run
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from megatron_mapo.config import Dtype, ModelConfig, ServerConfig
from megatron_mapo.rollout.server import ServerGroup


def test_a_run_that_trains_adapters(workspace: Path, server_url: str) -> None:
    """Servers get merged weights; what PEFT makes of the adapters is what was exported; a resumed run goes on."""
    options = [f"rollout.urls=[{server_url}]", "run.name=lora", "actor.lora.rank=4", "actor.optim.lr=1e-2"]
    options += ["actor.loss.kl_coef=0.05", "trainer.export=true", "trainer.evaluation.at_start=false"]
    for steps in (2, 3):
        done = run(command(workspace, *options, f"trainer.steps={steps}"))
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout
    folder = workspace / "runs" / "lora"
    table = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in table] == [1, 2, 3]
    assert all(0 < row["mismatch/abs_max"] < 1e-3 for row in table)
    assert table[0]["loss/kl_ref"] == pytest.approx(0.0, abs=1e-6)
    assert table[2]["loss/kl_ref"] > 1e-6
    exported, before = load_file(folder / "export/model.safetensors"), load_file(workspace / "model/model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    for name, value in exported.items():
        assert torch.equal(value, before[name]) == ("_proj" not in name), name
        assert (value - merged[name]).abs().max() <= 1e-6 * value.abs().max(), name
    again = workspace / "again"
    done = run([sys.executable, "-m", "megatron_mapo", "export", str(folder), str(again)])
    assert done.returncode == 0, done.stderr
    found = load_file(again / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in exported.items())
    # Adapters only: the frozen weights stay in the model's folder.
    size = sum(file.stat().st_size for file in (folder / "checkpoints/step_000003").iterdir())
    assert size < (workspace / "model/model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_run_with_experts_on_two_ranks(workspace: Path, tmp_path: Path) -> None:
    """Expert parallelism against a server of the same mixture; its weights arrive and are verified."""
    model = make_tiny_model(tmp_path / "model", "qwen3_moe")
    config = ServerConfig(port=0, threads=1, max_total_tokens=8192, startup_timeout=240.0)
    with ServerGroup(config, ModelConfig(str(model), Dtype.float32), tmp_path / "logs", API_KEY) as group:
        options = [f"rollout.urls=[{group.urls[0]}]", f"model.path={model}", "run.name=experts"]
        options += ["actor.parallel.expert=2", "trainer.evaluation.at_start=false", "trainer.export=true"]
        done = run(command(workspace, *options, processes=2))
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(workspace / "runs/experts/metrics.jsonl")
    assert [row["step"] for row in table] == [1, 2, 3]
    assert all(0 < row["mismatch/abs_max"] < 1e-3 for row in table)
    before, after = (load_file(f / "model.safetensors") for f in (model, workspace / "runs/experts/export"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n], after[n]) for n in before if ".experts." in n)


@pytest.mark.slow
def test_a_run_with_a_family_that_only_megatron_bridge_knows(workspace: Path, tmp_path: Path) -> None:
    """Compared with transformers before the first step, then as any other: servers, weights, export, a resumed run."""
    model = make_tiny_model(tmp_path / "model", "gemma")
    config = ServerConfig(port=0, threads=1, max_total_tokens=8192, startup_timeout=240.0)
    with ServerGroup(config, ModelConfig(str(model), Dtype.float32), tmp_path / "logs", API_KEY) as group:
        options = [f"rollout.urls=[{group.urls[0]}]", f"model.path={model}", "run.name=bridged"]
        options += ["trainer.evaluation.at_start=false", "trainer.export=true"]
        refused = run(command(workspace, *options))
        assert refused.returncode != 0
        assert "architecture 'gemma' is not supported" in refused.stderr
        options.append("model.fallback=megatron_bridge")
        for processes, steps in ((1, 2), (2, 3)):
            parallel = f"actor.parallel.tensor={processes}"
            done = run(command(workspace, *options, parallel, f"trainer.steps={steps}", processes=processes))
            assert done.returncode == 0, done.stdout + done.stderr
            assert "gemma is translated by megatron_bridge" in done.stdout + done.stderr
    folder = workspace / "runs/bridged"
    assert json.loads((folder / "model_check.json").read_text())["largest"] < 1e-5
    table = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in table] == [1, 2, 3]
    assert all(0 < row["mismatch/abs_max"] < 1e-3 for row in table)
    before, after = (load_file(f / "model.safetensors") for f in (model, folder / "export"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    done = run([sys.executable, "-m", "megatron_mapo", "export", str(folder), str(tmp_path / "again")])
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in after.items())
