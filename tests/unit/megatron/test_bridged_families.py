"""Families that only megatron-bridge knows: transformers' numbers, the same bits on the way back, or a refusal."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import ragged_batch, transformers_scores
from safetensors.torch import load_file
from tiny_models import BRIDGED, make_tiny_model
from transformers import AutoConfig, Gemma2Config, GPT2Config, MistralConfig, OlmoeConfig, PretrainedConfig

from megatron_mapo.config import Config, Dtype, Fallback
from megatron_mapo.errors import ConfigError, DataError
from megatron_mapo.megatron import bridged_families, model_check
from megatron_mapo.megatron.families import FAMILIES
from megatron_mapo.megatron.imported import import_folder
from megatron_mapo.megatron.model import load_hf_config
from megatron_mapo.megatron.model_check import CheckResult, Difference, require_check
from megatron_mapo.megatron.policy import Policy, build_model
from megatron_mapo.megatron.runtime import Runtime

BRIDGE = Fallback.megatron_bridge


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    command = [sys.executable, "-m", "megatron_mapo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def bridged_config(config: Config) -> Config:
    config.model.fallback = BRIDGE
    return config


@pytest.mark.parametrize("arch", BRIDGED)
def test_scores_equal_those_of_transformers(
    arch: str, bridged_config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    """Nothing of what stood in for kernels stays behind."""
    path, batch = make_tiny_model(tmp_path / arch, arch), ragged_batch()
    scores = Policy(bridged_config, runtime, path, 1).log_probs(batch)
    for mine, theirs in zip((scores.logprobs, scores.entropy), transformers_scores(path, batch), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    stubbed = [name for name, module in sys.modules.items() if type(module).__name__ == "_Placeholder"]
    assert stubbed == []


@pytest.mark.parametrize(("arch", "dtype"), [("gemma", Dtype.bfloat16), ("nemotron", Dtype.float32)])
def test_an_imported_model_is_exported_bit_by_bit(arch: str, dtype: Dtype, tmp_path: Path) -> None:
    """The fallback is written down with the import: an export needs no option."""
    source = make_tiny_model(tmp_path / "source", arch, getattr(torch, dtype.value))
    imported, out = tmp_path / "imported", tmp_path / "out"
    done = run("import", source, imported, "--fallback", "megatron_bridge")
    assert done.returncode == 0, done.stderr
    assert f"{arch} is translated by megatron_bridge" in done.stderr
    done = run("export", imported, out)
    assert done.returncode == 0, done.stderr
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, source))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("arch", ["llama", "llama_untied", "mistral", "qwen2", "qwen3"])
def test_megatron_bridge_and_the_table_say_the_same(arch: str, tmp_path: Path) -> None:
    hf = load_hf_config(make_tiny_model(tmp_path / arch, arch, sliding_window=None))
    bridged, family = bridged_families.bridged_family(hf), FAMILIES[hf.model_type]
    theirs, mine = bridged.layer(hf), family.layer(hf)
    assert {name: theirs.get(name) for name in mine} == mine
    assert bridged.top == family.top
    fields = bridged.config_fields(hf)
    assert fields["num_query_groups"] == hf.num_key_value_heads
    assert fields["layernorm_epsilon"] == hf.rms_norm_eps
    for name in ("add_qkv_bias", "qk_layernorm"):
        assert fields[name] == family.config_fields(hf).get(name, False)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (Gemma2Config(architectures=["Gemma2ForCausalLM"]), r"'gemma2' a model of its own \(Gemma2ModelProvider"),
        (OlmoeConfig(architectures=["OlmoeForCausalLM"]), "num_moe_experts=64, and only None is supported"),
        (MistralConfig(architectures=["MistralForCausalLM"], sliding_window=4096), "windows of attention"),
        (GPT2Config(architectures=["GPT2LMHeadModel"]), "does not translate the architecture 'gpt2'"),
        (GPT2Config(architectures=["GPT2ForCausalLM"]), "does not translate the architecture 'gpt2'"),
    ],
)
def test_what_the_layers_do_not_compute_is_refused(hf: PretrainedConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bridged_families.bridged_family(hf)


def test_without_the_key_the_family_is_refused(config: Config, runtime: Runtime, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "gemma", "gemma")
    with pytest.raises(DataError, match=r"'gemma' is not supported.*model\.fallback=megatron_bridge"):
        build_model(config, path, runtime.device)


@pytest.mark.parametrize("installed", [None, "0.2.0"])
def test_it_must_be_installed_in_the_version_that_fits(
    installed: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != "megatron-bridge":
            return real(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(bridged_families, "_known", {})
    path = make_tiny_model(tmp_path / "gemma", "gemma")
    with pytest.raises(ConfigError, match=r"pip install --no-deps megatron-bridge==0\.3\.1"):
        load_hf_config(path, BRIDGE)


def test_a_comparison_stands_before_the_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is made once for a model; other weights are compared anew."""
    path, record = make_tiny_model(tmp_path / "gemma", "gemma"), tmp_path / "run" / "model_check.json"
    require_check(path, BRIDGE, record)
    assert "gemma is translated by megatron_bridge; its log-probs in float32 differ" in capsys.readouterr().err
    assert 0 < json.loads(record.read_text())["largest"] < 1e-5

    def again(*_: object, **__: object) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr(model_check.subprocess, "run", again)
    require_check(path, BRIDGE, record)
    kept = record.read_text()
    for damaged in ("", '{"identity": "', "[]"):
        record.write_text(damaged)
        with pytest.raises(AssertionError, match="compared again"):
            require_check(path, BRIDGE, record)
    record.write_text(kept)
    make_tiny_model(path, "gemma", seed=1)
    with pytest.raises(AssertionError, match="compared again"):
        require_check(path, BRIDGE, record)


def test_a_comparison_that_fails_is_not_called_a_difference(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "gemma", "gemma")
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"could not be compared with transformers: error: .* not a readable"):
        require_check(path, BRIDGE)


def test_a_difference_that_is_not_a_number_is_a_failure() -> None:
    differences = [Difference(8, 1e-6, 1e-7), Difference(8, float("nan"), 1e-7), Difference(8, 1e-6, 1e-7)]
    assert math.isnan(CheckResult(differences, None).largest)


def test_what_transformers_does_not_know_is_an_error_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "foo_bar"}')
    with pytest.raises(DataError, match="transformers cannot read"):
        load_hf_config(tmp_path, BRIDGE)


def test_a_wrong_translation_is_refused(tmp_path: Path) -> None:
    """megatron-bridge gives every Gemma the same activation, whatever its config.json says."""
    path, record = make_tiny_model(tmp_path / "gemma", "gemma", hidden_act="silu"), tmp_path / "model_check.json"
    assert AutoConfig.from_pretrained(path).hidden_act == "silu"
    with pytest.raises(
        DataError, match=r"does not compute what transformers computes: .* differ by .* more than 0\.001"
    ):
        require_check(path, BRIDGE, record)
    assert not record.exists()
    with pytest.raises(DataError, match="does not compute what transformers computes"):
        import_folder(path, tmp_path / "imported", fallback=BRIDGE)
    assert not (tmp_path / "imported").exists()


def test_the_check_command_prints_json(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "nemotron", "nemotron")
    done = run("check", path, "--fallback", "megatron_bridge", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [d["tokens"] for d in found["differences"]] == [256, 128, 64, 32]
    assert max(d["largest"] for d in found["differences"]) == found["largest"] <= 1e-5 < found["bound"]
