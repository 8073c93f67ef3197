"""A family that ``families.FAMILIES`` lacks, from what megatron-bridge knows about it.

Only knowledge is taken: which of megatron's fields describe the model, and what its parameters are called. The model
itself, its layouts, and the way of its weights are those of all other families. Whatever this project's layers do not
compute is refused by name, and ``model_check.require_check`` compares the result with transformers before anything uses
it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.core.activations import fast_gelu
from transformers import PretrainedConfig

from megatron_mapo.errors import DataError
from megatron_mapo.megatron.families import Family, Table, gelu_tanh, sliding_windows
from megatron_mapo.patches import megatron_bridge

_DESCRIBE = frozenset(
    [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "normalization",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "qk_layernorm",
        "activation_func",
        "gated_linear_unit",
        "add_bias_linear",
        "add_qkv_bias",
        "softmax_scale",
    ]
)
"""Fields that say what is computed, and that this project's layers follow."""
_MEANS = frozenset(
    [
        "params_dtype",
        "fp16",
        "bf16",
        "autocast_dtype",
        "seq_length",
        "init_method_std",
        "perform_initialization",
        "hf_model_id",
        "attention_backend",
        "offload_modules",
        "gradient_accumulation_fusion",
        "cross_entropy_loss_fusion",
        "masked_softmax_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion",
        "persist_layer_norm",
        "generation_config",
        "make_vocab_size_divisible_by",
        "should_pad_vocab",
        "vocab_size",
        "rotary_base",
        "rotary_percent",
        "rope_scaling",
        "rope_scaling_factor",
    ]
)
"""Fields that say by which means, that a run decides, or that are taken from config.json as for every family."""
_LAYER = {
    "input_layernorm.weight": "copy",
    "input_layernorm.bias": "copy",
    "self_attention.linear_qkv.weight": "qkv",
    "self_attention.linear_qkv.bias": "qkv",
    "self_attention.q_layernorm.weight": "copy",
    "self_attention.k_layernorm.weight": "copy",
    "self_attention.linear_proj.weight": "columns",
    "self_attention.linear_proj.bias": "copy",
    "pre_mlp_layernorm.weight": "copy",
    "pre_mlp_layernorm.bias": "copy",
    "mlp.linear_fc1.weight": "gate_up",
    "mlp.linear_fc1.bias": "gate_up",
    "mlp.linear_fc2.weight": "columns",
    "mlp.linear_fc2.bias": "copy",
}
_TOP = {
    "embedding.word_embeddings.weight": "rows",
    "decoder.final_layernorm.weight": "copy",
    "decoder.final_layernorm.bias": "copy",
    "output_layer.weight": "rows",
}
_JOINED = {"qkv": ("QKVMapping", "qkv"), "gate_up": ("GatedMLPMapping", ("gate", "up"))}
"""Kind -> megatron-bridge's class of mappings, and its names for the parts."""
_FIXED = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}
_known: dict[str, Family] = {}


def bridged_family(hf: PretrainedConfig) -> Family:
    """The entry of a model whose ``model_type`` is not in ``FAMILIES``.

    Raises:
        ConfigError: megatron-bridge is not installed in the supported version.
        DataError: it does not know the model either, or describes one that this project's layers do not compute.
    """
    key = hf.to_json_string(use_diff=False)
    if key not in _known:
        _known[key] = _translate(hf)
    return _known[key]


def _translate(hf: PretrainedConfig) -> Family:
    auto_bridge = megatron_bridge.load()
    described = copy.deepcopy(hf)
    rope = getattr(hf, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        described.rope_theta = rope["rope_theta"]  # where transformers 4 had it, and megatron-bridge looks
    try:
        bridge = auto_bridge.from_hf_config(described)
        provider = bridge.to_megatron_provider(load_weights=False)
        model_bridge = bridge._model_bridge
    except (ValueError, KeyError, AttributeError, NotImplementedError, TypeError) as error:
        raise DataError(
            f"model.path: megatron-bridge {megatron_bridge.SUPPORTED} does not translate the architecture "
            f"{hf.model_type!r}: {' '.join(str(error).split())}"
        ) from error
    fields = _fields(provider, hf)
    registry = _Registry(model_bridge, hf, is_gated=fields["gated_linear_unit"])
    layer, top = registry.table(_LAYER, "decoder.layers.0.", "model.layers.0."), registry.table(_TOP, "", "")
    if hf.tie_word_embeddings:  # the last pipeline stage's copy of the embeddings
        top.setdefault("output_layer.weight", ("rows", ["lm_head.weight"]))
    return Family(only={}, config_fields=lambda _: dict(fields), layer=lambda _: layer, top=top)


def _fields(provider: Any, hf: PretrainedConfig) -> dict[str, Any]:
    """What of megatron-bridge's description becomes ``DecoderConfig``'s; the rest must not matter, or is refused."""
    fields = {name: value for name in _DESCRIBE if (value := getattr(provider, name)) is not None}
    if fields["activation_func"] is fast_gelu:
        fields["activation_func"] = gelu_tanh  # the same function, in one kernel
    if _scales_embeddings(provider, hf):
        fields["embedding_scale"] = hf.hidden_size**0.5
    if sliding_windows(hf):
        _refuse(hf, "windows of attention, which the comparison with transformers is too short to see")
    for name, value in _demanded(hf).items():
        if getattr(provider, name) != value:
            _refuse(hf, f"{name}={getattr(provider, name)!r}, and only {value!r} is supported")
    ordinary = _ordinary(type(provider))
    for field in dataclasses.fields(provider):
        name, value = field.name, getattr(provider, field.name)
        if name.startswith("_") or name in _DESCRIBE | _MEANS | _demanded(hf).keys():
            continue
        if name not in ordinary or value != ordinary[name]:
            _refuse(hf, f"{name}={value!r}, which the layers here do not know")
    return fields


def _demanded(hf: PretrainedConfig) -> Mapping[str, Any]:
    return {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": hf.tie_word_embeddings,
        "num_moe_experts": None,
        "window_size": None,
    }


def _ordinary(provider: type) -> Mapping[str, Any]:
    """Defaults of megatron-bridge's plain GPT, which stand for the ordinary transformer."""
    plain = next(cls for cls in provider.__mro__ if cls.__name__ == "GPTModelProvider")
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(plain)
    }


def _scales_embeddings(provider: Any, hf: PretrainedConfig) -> bool:
    """What a provider does beside its fields, it does in ``provide``: of that, only Gemma's embeddings are known."""
    owner = next(cls for cls in type(provider).__mro__ if "provide" in vars(cls)).__name__
    if owner not in ("GPTModelProvider", "GemmaModelProvider"):
        _refuse(hf, f"a model of its own ({owner}.provide)")
    return owner == "GemmaModelProvider"


class _Registry:
    """megatron-bridge's names of one model's parameters."""

    def __init__(self, model_bridge: Any, hf: PretrainedConfig, *, is_gated: bool) -> None:
        self.hf, self.is_gated = hf, is_gated
        base = next(cls for cls in type(model_bridge).__mro__ if cls.__name__ == "MegatronModelBridge")
        for hook in ("maybe_modify_loaded_hf_weight", "maybe_modify_converted_hf_weight"):
            if getattr(type(model_bridge), hook) is not getattr(base, hook):
                _refuse(hf, f"weights that are changed on the way ({hook})")
        self.mappings = model_bridge.mapping_registry()

    def table(self, kinds: Mapping[str, str], mine: str, theirs: str) -> Table:
        """The table of the parameters that have a name; one without it is refused when the model has it.

        Args:
            kinds: megatron's names and their kinds, as in ``families.Table``.
            mine, theirs: prefixes of megatron's and of Hugging Face's names.
        """
        found: Table = {}
        for name, kind in kinds.items():
            mapping = self.mappings.megatron_to_hf_lookup(mine + name)
            if mapping is not None:
                kind = "slices" if kind == "gate_up" and not self.is_gated else kind
                names = self._names(mapping, kind)
                if not all(n.startswith(theirs) for n in names) or _FIXED.get(name, names[0]) != names[0]:
                    _refuse(
                        self.hf, f"the name {names[0]} for {mine + name}, and names of a Llama's form are supported"
                    )
                found[name] = kind, [n.removeprefix(theirs) for n in names]
        return found

    def _names(self, mapping: Any, kind: str) -> list[str]:
        wanted, parts = _JOINED.get(kind, ("AutoMapping", None))
        if type(mapping).__name__ != wanted or getattr(mapping, "permute_dims", None):
            _refuse(self.hf, f"{type(mapping).__name__} for {mapping.megatron_param}, and only {wanted} is supported")
        return [mapping.hf_param] if parts is None else [mapping.hf_param[part] for part in parts]


def _refuse(hf: PretrainedConfig, what: str) -> None:
    raise DataError(f"model.path: megatron-bridge gives the architecture {hf.model_type!r} {what}")
