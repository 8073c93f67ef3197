"""What differs between the model families that this project vouches for: one entry of ``FAMILIES`` each.

To add a family: an entry here, a tiny model in ``tests/tiny_models.py``, its name in the tests' lists.
Everything else asks the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from megatron_mapo.errors import DataError

Table = dict[str, tuple[str, list[str]]]
"""megatron name -> (how the parameter is cut over the tensor group, Hugging Face names).

copy: whole on every rank; slices, columns: cut along dim 0, 1; rows: those of the vocabulary, padded and cut; gate_up:
gate and up, each cut by rows, one after the other on a rank; qkv: per query group its query heads, its key head, its
value head, cut by groups.
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
_GEMMA_LAYER: Table = _LAYER | {
    "self_attention.linear_proj.post_norm.weight": ("copy", ["post_attention_layernorm.weight"]),
    "pre_mlp_layernorm.weight": ("copy", ["pre_feedforward_layernorm.weight"]),
    "mlp.linear_fc2.post_norm.weight": ("copy", ["post_feedforward_layernorm.weight"]),
}
_ONLY = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "attention_dropout": 0.0}
_GEMMA_ONLY = {
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",  # the same for servers, which read this name
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_bidirectional_attention": False,
}


def _moe_layer(block: str, gate: str, up: str, down: str) -> Table:
    """A layer whose MLP is a router and experts; the arguments are Hugging Face's names for them."""
    expert = f"{block}.experts.{{expert}}"
    return {
        **{name: entry for name, entry in _LAYER.items() if not name.startswith("mlp.")},
        "mlp.router.weight": ("copy", [f"{block}.gate.weight"]),
        "mlp.experts.linear_fc1.weight": ("gate_up", [f"{expert}.{gate}.weight", f"{expert}.{up}.weight"]),
        "mlp.experts.linear_fc2.weight": ("columns", [f"{expert}.{down}.weight"]),
    }


def _moe_fields(hf: PretrainedConfig, rows: int) -> dict[str, Any]:
    """Experts of ``rows`` rows; the chosen ones' weights are a softmax over them, without a balancing loss."""
    return {
        "num_moe_experts": hf.num_local_experts,
        "moe_ffn_hidden_size": rows,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


@dataclass
class DecoderConfig(TransformerConfig):
    """megatron's configuration, and what some families need beside it.

    Attributes:
        embedding_scale: factor on the embeddings, rounded to their type.
        attention_softcap: attention scores s become ``cap * tanh(s / cap)``.
        logit_softcap: the same of logits, before the temperature.
        post_norms: the output of attention and of the MLP is normalised before it is added to the residual.
        local_rope: layers with a window have a rotary base of their own.
    """

    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    post_norms: bool = False
    local_rope: bool = False


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def sliding_windows(hf: PretrainedConfig) -> dict[str, Any]:
    """megatron's fields for the layers that see only the last ``sliding_window`` tokens.

    Raises:
        DataError: ``layer_types`` names another kind of attention.
    """
    layer_types = getattr(hf, "layer_types", None) or []
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise DataError(f"model.path: config.json has the layer_types {', '.join(sorted(unknown))}; not supported")
    if getattr(hf, "sliding_window", None) is None or (layer_types and "sliding_attention" not in layer_types):
        return {}
    windowed = [int(kind == "sliding_attention") for kind in layer_types]
    return {"window_size": (hf.sliding_window - 1, 0), "window_attn_skip_freq": windowed or None}


def _gemma_fields(hf: PretrainedConfig) -> dict[str, Any]:
    return sliding_windows(hf) | {
        "activation_func": gelu_tanh,
        "layernorm_zero_centered_gamma": True,
        "softmax_scale": hf.query_pre_attn_scalar**-0.5,
        "embedding_scale": hf.hidden_size**0.5,
        "logit_softcap": hf.final_logit_softcapping,
        "post_norms": True,
    }


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face.

    Attributes:
        only: keys of config.json and the one value of each that is supported; a missing key, or null, is fine.
        config_fields: the fields of ``DecoderConfig`` that differ from a Llama's.
        layer: the name table of one layer; it may depend on config.json (experts, biases).
        top: the name table of what is outside the layers.
        experts: number of experts of a layer; 0 in a dense model.
    """

    only: Mapping[str, Any] = field(default_factory=lambda: _ONLY)
    config_fields: Callable[[PretrainedConfig], dict[str, Any]] = lambda hf: {}
    layer: Callable[[PretrainedConfig], Table] = lambda hf: _LAYER
    top: Table = field(default_factory=lambda: _TOP)
    experts: Callable[[PretrainedConfig], int] = lambda hf: 0

    def check(self, hf: PretrainedConfig) -> None:
        """Refuse a config.json that describes a model which this family's entry does not cover.

        Raises:
            DataError: names the key and the supported value.
        """
        for key, value in self.only.items():
            if getattr(hf, key, value) not in (value, None):
                raise DataError(f"model.path: config.json has {key}={getattr(hf, key)!r}; only {value!r} is supported")
        self.config_fields(hf)


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(config_fields=sliding_windows),
    "qwen2": Family(
        config_fields=lambda hf: sliding_windows(hf) | {"add_qkv_bias": True},
        layer=lambda hf: _LAYER | _QKV_BIAS,
    ),
    "qwen3": Family(
        config_fields=lambda hf: sliding_windows(hf) | {"qk_layernorm": True},
        layer=lambda hf: _LAYER | _QK_NORM,
    ),
    "gemma2": Family(
        only=_GEMMA_ONLY,
        config_fields=lambda hf: _gemma_fields(hf) | {"attention_softcap": hf.attn_logit_softcapping},
        layer=lambda hf: _GEMMA_LAYER,
    ),
    "gemma3_text": Family(
        only=_GEMMA_ONLY | {"attn_logit_softcapping": None},
        config_fields=lambda hf: _gemma_fields(hf) | {"qk_layernorm": True, "local_rope": True},
        layer=lambda hf: _GEMMA_LAYER | _QK_NORM,
    ),
    "qwen3_moe": Family(
        # Weights of the chosen experts that do not sum to 1, and dense layers in between, are not covered.
        only=_ONLY | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        config_fields=lambda hf: (
            sliding_windows(hf) | _moe_fields(hf, hf.moe_intermediate_size) | {"qk_layernorm": True}
        ),
        layer=lambda hf: _moe_layer("mlp", "gate_proj", "up_proj", "down_proj") | _QK_NORM,
        experts=lambda hf: hf.num_local_experts,
    ),
    "mixtral": Family(
        only=_ONLY | {"router_jitter_noise": 0.0},
        config_fields=lambda hf: sliding_windows(hf) | _moe_fields(hf, hf.intermediate_size),
        layer=lambda hf: _moe_layer("block_sparse_moe", "w1", "w3", "w2"),
        experts=lambda hf: hf.num_local_experts,
    ),
}


def family_of(hf: PretrainedConfig) -> Family:
    """The entry of a model that ``load_hf_config`` has let through."""
    if hf.model_type in FAMILIES:
        return FAMILIES[hf.model_type]
    from megatron_mapo.megatron.bridged_families import bridged_family  # needs a package that others do without

    return bridged_family(hf)
