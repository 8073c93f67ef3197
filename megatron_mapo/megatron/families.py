"""What differs between the model families that this project vouches for: one entry of ``FAMILIES`` each.

To add a family: an entry here, a tiny model in ``tests/tiny_models.py``, its name in the tests' lists.
Everything else asks the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from megatron_mapo.errors import DataError

Table = Mapping[str, tuple[str, list[str]]]
"""megatron name -> (how the parameter is cut over the tensor group, Hugging Face names).

copy: whole on every rank; rows, columns: cut along dim 0, 1; gate_up: gate and up, each cut by rows, one
after the other on a rank; qkv: per query group its query heads, its key head, its value head, cut by groups.
Names of a layer lack their prefix (``decoder.layers.N.``, ``model.layers.N.``).
"""

_LAYER: Table = {
    "input_layernorm.weight": ("copy", ["input_layernorm.weight"]),
    "self_attention.linear_qkv.weight": ("qkv", [f"self_attn.{x}_proj.weight" for x in "qkv"]),
    "self_attention.linear_proj.weight": ("columns", ["self_attn.o_proj.weight"]),
    "pre_mlp_layernorm.weight": ("copy", ["post_attention_layernorm.weight"]),
    "mlp.linear_fc1.weight": ("gate_up", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
    "mlp.linear_fc2.weight": ("columns", ["mlp.down_proj.weight"]),
}
_QKV_BIAS: Table = {"self_attention.linear_qkv.bias": ("qkv", [f"self_attn.{x}_proj.bias" for x in "qkv"])}
_QK_NORM: Table = {
    "self_attention.q_layernorm.weight": ("copy", ["self_attn.q_norm.weight"]),
    "self_attention.k_layernorm.weight": ("copy", ["self_attn.k_norm.weight"]),
}
_TOP: Table = {
    "embedding.word_embeddings.weight": ("rows", ["model.embed_tokens.weight"]),
    "decoder.final_layernorm.weight": ("copy", ["model.norm.weight"]),
    "output_layer.weight": ("rows", ["lm_head.weight"]),
}
_ONLY = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "attention_dropout": 0.0}


def _nothing(hf: PretrainedConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face.

    Attributes:
        only: keys of config.json and the one value of each that is supported; a missing key, or null, is fine.
        config_fields: the fields of megatron's TransformerConfig that differ from a Llama's.
        layer: the name table of one layer; it may depend on config.json (experts, biases).
        top: the name table of what is outside the layers.
    """

    only: Mapping[str, Any] = field(default_factory=lambda: _ONLY)
    config_fields: Callable[[PretrainedConfig], dict[str, Any]] = _nothing
    layer: Callable[[PretrainedConfig], Table] = lambda hf: _LAYER
    top: Table = field(default_factory=lambda: _TOP)

    def check(self, hf: PretrainedConfig) -> None:
        """Refuse a config.json that describes a model which this family's entry does not cover.

        Raises:
            DataError: names the key and the supported value.
        """
        for key, value in self.only.items():
            if getattr(hf, key, value) not in (value, None):
                raise DataError(f"model.path: config.json has {key}={getattr(hf, key)!r}; only {value!r} is supported")


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(
        only=_ONLY | {"use_sliding_window": False},
        config_fields=lambda hf: {"add_qkv_bias": True},
        layer=lambda hf: {**_LAYER, **_QKV_BIAS},
    ),
    "qwen3": Family(
        only=_ONLY | {"use_sliding_window": False},
        config_fields=lambda hf: {"qk_layernorm": True},
        layer=lambda hf: {**_LAYER, **_QK_NORM},
    ),
}


def family_of(hf: PretrainedConfig) -> Family:
    """The entry of a model that ``load_hf_config`` has let through."""
    return FAMILIES[hf.model_type]
