"""Adapters against PEFT itself: the same scores, the same merged weights, from the folder that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from reference import ragged_batch, scores_of
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mapo.config import LORA_TARGETS, Config, Fallback, LoraConfig
from megatron_mapo.errors import ConfigError
from megatron_mapo.megatron.lora import adapted_layers, save_adapter
from megatron_mapo.megatron.policy import Policy
from megatron_mapo.megatron.runtime import Runtime

CASES = {
    "llama": ("llama", list(LORA_TARGETS)),
    "biases": ("qwen2", list(LORA_TARGETS)),
    "norms after the projections": ("gemma2", list(LORA_TARGETS)),
    "queries and values": ("llama_untied", ["q_proj", "v_proj"]),
    "one half of the gate": ("qwen3", ["up_proj", "down_proj"]),
    "embeddings that are scaled": ("gemma", list(LORA_TARGETS)),
    "an MLP without a gate": ("nemotron", list(LORA_TARGETS)),
    "attention beside experts": ("qwen3_moe", ["q_proj", "k_proj", "v_proj", "o_proj"]),
}


def adapted_policy(config: Config, runtime: Runtime, path: Path, targets: list[str]) -> Policy:
    """A policy whose adapters do something: B is random."""
    config.actor.lora.rank, config.actor.lora.alpha, config.actor.lora.targets = 3, 7.0, targets
    policy = Policy(config, runtime, path, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(policy.chunks):
            for matrices in layer.adapters.values():
                matrices.lora_B.copy_(torch.randn(matrices.lora_B.shape, generator=generator) * 0.2)
    return policy


def closeness(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_scores_and_merged_weights_equal_those_of_peft(
    case: str, config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    arch, targets = CASES[case]
    path, batch = make_tiny_model(tmp_path / "model", arch), ragged_batch()
    config.model.fallback = Fallback.megatron_bridge  # for the families that need it
    policy = adapted_policy(config, runtime, path, targets)
    out = save_adapter(policy.named_adapters(), config.actor.lora, str(path), path, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    plain = scores_of(base, batch)[0]
    model = PeftModel.from_pretrained(base, out).eval()
    expected = scores_of(model, batch)[0]
    assert closeness(plain, expected) > 0.01, "the adapters must matter"
    assert closeness(policy.log_probs(batch).logprobs, expected) <= 1e-5
    before = load_file(path / "model.safetensors")
    merged = model.merge_and_unload().state_dict()
    changed = set()
    for name, value in policy.named_weights():
        if not torch.equal(value, before[name]):
            changed.add(name)
            assert closeness(value, merged[name]) <= 1e-6, name
    assert changed == {n for n in before if n.endswith(".weight") and n.split(".")[-2] in targets}


def test_a_projection_that_the_model_lacks(config: Config, runtime: Runtime, tmp_path: Path) -> None:
    """Beside others it is left out; alone it would leave nothing to train."""
    path = make_tiny_model(tmp_path / "model", "nemotron")
    config.model.fallback = Fallback.megatron_bridge
    policy = adapted_policy(config, runtime, path, ["gate_proj", "up_proj"])
    out = save_adapter(policy.named_adapters(), config.actor.lora, str(path), path, tmp_path / "adapter")
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == ["up_proj"]
    with pytest.raises(ConfigError, match=r"actor\.lora\.targets: the model has no gate_proj"):
        adapted_policy(config, runtime, path, ["gate_proj"])


@pytest.mark.parametrize(
    ("path", "name", "revision"),
    [
        ("owner/model", "owner/model", None),
        ("owner/model@v1.0", "owner/model", "v1.0"),
        ("quickstart:smollm2", "{tmp}/models/m", None),
        ("models/m", "{tmp}/models/m", None),
        ("./models/m", "{tmp}/models/m", None),
        ("~/models/m", "{tmp}/models/m", None),
    ],
)
def test_peft_finds_the_base_of_adapters(
    path: str, name: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("models/m").mkdir(parents=True)
    adapters = iter([("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(1))])
    out = save_adapter(adapters, LoraConfig(rank=4), path, Path("models/m"), Path("adapter"))
    found = PeftConfig.from_pretrained(str(out))
    assert (found.base_model_name_or_path, found.revision) == (name.format(tmp=tmp_path), revision)


def test_the_base_below_the_adapters_is_the_reference(config: Config, runtime: Runtime, tmp_path: Path) -> None:
    path, batch = make_tiny_model(tmp_path / "model", "llama"), ragged_batch()
    before = Policy(config, runtime, path, 1).log_probs(batch).logprobs
    config.actor.loss.kl_coef = 0.1
    policy = adapted_policy(config, runtime, path, ["q_proj", "down_proj"])
    assert torch.equal(policy.reference_log_probs(batch).logprobs, before)
    assert not torch.equal(policy.log_probs(batch).logprobs, before)


def test_experts_cannot_be_adapted(config: Config, runtime: Runtime, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "model", "mixtral")
    with pytest.raises(ConfigError, match=r"actor\.lora\.targets: experts cannot be adapted"):
        adapted_policy(config, runtime, path, ["q_proj", "up_proj"])
