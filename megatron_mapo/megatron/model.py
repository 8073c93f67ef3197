"""Hugging Face config -> megatron GPTModel that answers with log-probs instead of logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megatron_mapo.config import ActorConfig, Dtype, Fallback
from megatron_mapo.data.packing import PackedBatch
from megatron_mapo.errors import DataError
from megatron_mapo.megatron.attention import PackedParams, layer_spec
from megatron_mapo.megatron.families import FAMILIES, DecoderConfig, family_of
from megatron_mapo.megatron.logprobs import chunked_logprobs
from megatron_mapo.model_shape import ModelShape


def load_hf_config(path: str | Path, fallback: Fallback = Fallback.none) -> PretrainedConfig:
    """Read and check ``config.json`` of a Hugging Face folder.

    Args:
        path: the folder.
        fallback: who translates a family that ``FAMILIES`` lacks.

    Raises:
        ConfigError: the fallback is not installed.
        DataError: the file is missing, or describes a model that this project does not vouch for.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise DataError(f"model.path: {file} does not exist")
    _known(json.loads(file.read_text()).get("model_type"), fallback)
    try:
        hf = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"model.path: transformers cannot read {file}: {' '.join(str(error).split())}") from error
    _known(hf.model_type, fallback)  # transformers reads some configurations as those of another architecture
    family_of(hf).check(hf)
    rotary(hf)
    return hf


def _known(model_type: str | None, fallback: Fallback) -> None:
    if model_type not in FAMILIES and (model_type is None or fallback is Fallback.none):
        raise DataError(
            f"model.path: architecture {model_type!r} is not supported; supported: {', '.join(FAMILIES)} "
            "(docs/models.md says how to add one, and what model.fallback=megatron_bridge does)"
        )


def head_dim(hf: PretrainedConfig) -> int:
    """Size of one attention head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def rotary(hf: PretrainedConfig) -> tuple[Tensor, float]:
    """The rotary embedding of config.json.

    Returns:
        inverse frequencies, float32 ``[kinds, rotated / 2]`` (rotated: head_dim, or the part of it that turns): those
        of all layers, or (two kinds) of global and of windowed ones; and the factor on queries and keys (yarn).

    Raises:
        DataError: a scaling that depends on the length at hand, or a part of the head without rotation where the
            family has none.
    """
    rope = hf.rope_parameters
    if "rope_type" in rope:
        return _rotary(hf, rope, None)
    kinds = [_rotary(hf, rope[kind], kind) for kind in ("full_attention", "sliding_attention")]
    if any(factor != 1.0 for _, factor in kinds):
        raise DataError("model.path: config.json scales queries and keys (yarn) in some layers, which is not supported")
    return torch.cat([frequencies for frequencies, _ in kinds]), 1.0


def _rotary(hf: PretrainedConfig, rope: dict[str, Any], layer_type: str | None) -> tuple[Tensor, float]:
    kind = rope.get("rope_type", "default")
    part = rope.get("partial_rotary_factor", 1.0)
    if part != 1.0 and hf.model_type in FAMILIES:  # in these, transformers does not follow it
        raise DataError("model.path: config.json has a partial_rotary_factor; only 1.0 is supported")
    if kind == "default":
        dim = int(head_dim(hf) * part)
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)[None], 1.0
    if kind in ("linear", "llama3", "yarn"):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"), layer_type=layer_type)
        return frequencies[None], factor
    raise DataError(f"model.path: config.json has rope_type={kind!r}; supported: default, linear, llama3, yarn")


def padded_vocab_size(hf: PretrainedConfig, tensor_parallel: int) -> int:
    """Vocabulary rows, rounded up so that every tensor-parallel rank holds as many."""
    return -(-hf.vocab_size // tensor_parallel) * tensor_parallel


def transformer_config(hf: PretrainedConfig, actor: ActorConfig, dtype: Dtype, on_cpu: bool) -> DecoderConfig:
    """megatron's configuration of this model in this layout.

    Raises:
        ConfigError: the layout does not divide the model.
    """
    parallel = actor.parallel
    ModelShape.of(hf.to_dict()).check_layout(parallel)
    torch_dtype = getattr(torch, dtype.value)
    recompute: dict[str, Any] = {}
    if actor.recompute:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    fields: dict[str, Any] = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "ffn_hidden_size": hf.intermediate_size,
        "kv_channels": head_dim(hf),
        "layernorm_epsilon": getattr(hf, "rms_norm_eps", None),
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        # Two stages exchange activations and gradients in both directions at once, which only the
        # unbatched transfers keep apart.
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "moe_token_dispatcher_type": "alltoall",
        "params_dtype": torch_dtype,
        "pipeline_dtype": torch_dtype,
        "bf16": torch_dtype is torch.bfloat16,
        # The loss is a plain sum whose weights already carry every average (token_weight).
        "calculate_per_token_loss": True,
        "perform_initialization": False,
        "use_cpu_initialization": on_cpu,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "bias_dropout_fusion": False,
        "deallocate_pipeline_outputs": True,
        **recompute,
    }
    fields |= family_of(hf).config_fields(hf)
    # Queries and keys that are each scaled by a factor: their products are, by its square.
    fields["softmax_scale"] = fields.get("softmax_scale", head_dim(hf) ** -0.5) * rotary(hf)[1] ** 2
    return DecoderConfig(**fields)


class LogprobHead(ColumnParallelLinear):
    """The output layer: hidden states in, log-probs and entropies out."""

    def forward(
        self, hidden: Tensor, batch: PackedBatch, weight: Tensor, temperature: float, chunk: int, vocab_size: int
    ) -> Tensor:
        """Score the microbatch.

        Args:
            hidden: ``[T, 1, H]``, or its sequence-parallel part.
            batch: names the scored tokens and their labels.
            weight: ``[V, H]``, this rank's rows of the output matrix.
            temperature: logits are divided by it.
            chunk: tokens whose logits exist at one time.
            vocab_size: real size of the vocabulary.

        Returns:
            float32 ``[2, S]``: log-prob of the label, entropy.
        """
        group = self.tp_group
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        scored = hidden.squeeze(1).index_select(0, batch.scored)
        logprobs, entropy = chunked_logprobs(
            scored,
            weight,
            batch.labels,
            temperature=temperature,
            softcap=self.config.logit_softcap,
            chunk=chunk,
            vocab_size=vocab_size,
            group=group,
        )
        return torch.stack([logprobs, entropy])


class PolicyModel(GPTModel):
    """GPTModel with explicit positions, an attention plan, and log-probs instead of logits.

    Args:
        config: megatron's configuration; the chunks of a rank share one object.
        hf: the model's Hugging Face config.
        temperature: logits are divided by it.
        logprob_chunk: tokens whose logits exist at one time.
        chunk: which of this rank's pieces of the model (virtual pipeline) this is.
    """

    def __init__(
        self, config: DecoderConfig, hf: PretrainedConfig, *, temperature: float, logprob_chunk: int, chunk: int = 0
    ) -> None:
        super().__init__(
            config,
            layer_spec(config, chunk),
            vocab_size=padded_vocab_size(hf, config.tensor_model_parallel_size),
            max_sequence_length=hf.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=chunk if config.virtual_pipeline_model_parallel_size else None,
        )
        if self.post_process:
            # The same module with another forward: megatron builds and marks it (tied embeddings over
            # pipeline stages), and calling it keeps the hooks that overlap parameter gathers.
            self.output_layer.__class__ = LogprobHead
        _mark_tensor_parallel(self)
        self.hf_vocab_size = hf.vocab_size
        self.temperature = temperature
        self.logprob_chunk = logprob_chunk
        frequencies = rotary(hf)[0].repeat(1, 2)
        self.register_buffer("rotary_frequencies", frequencies, persistent=False)

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        padding_mask: Any = None,
    ) -> tuple[Any, ...]:
        """Embed the tokens, and make the rotary angles of their explicit positions."""
        if self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            if self.training and self.config.recompute_granularity and not decoder_input.requires_grad:
                # Under frozen embeddings: a recomputed layer has a gradient only if its input has one.
                decoder_input.requires_grad_()
            if self.config.embedding_scale is not None:
                decoder_input = decoder_input * decoder_input.new_tensor(self.config.embedding_scale)
        angles = position_ids[0].float()[:, None, None] * self.rotary_frequencies
        return decoder_input, angles[:, None], None, None, None, None

    def _postprocess(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Hidden states for the next stage, or ``[2, S]`` log-probs and entropies on the last one."""
        if not self.post_process:
            return hidden_states
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        batch = arguments["packed_seq_params"].batch
        return self.output_layer(hidden_states, batch, weight, self.temperature, self.logprob_chunk, self.hf_vocab_size)


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark what is cut over the tensor group.

    megatron does so while it initialises weights at random, which is skipped here; without the marks
    the gradient norm would count rank 0's part of every matrix only.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            cut = [module.weight] if dim == 1 else [module.weight, getattr(module, "bias", None)]
            for parameter in cut:
                if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def forward_microbatch(model: torch.nn.Module, batch: PackedBatch) -> Tensor:
    """Run one packed microbatch through ``model`` (bare or wrapped for data parallelism)."""
    params = PackedParams(batch=batch)
    return model(batch.tokens[None], batch.positions[None], None, packed_seq_params=params)
