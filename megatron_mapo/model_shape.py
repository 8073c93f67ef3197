"""Sizes of a model, from its Hugging Face ``config.json`` alone: what fits where, before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mapo.config import ParallelConfig
from megatron_mapo.errors import ConfigError, DataError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text")
"""``model_type`` of the families that ``megatron/families.py`` has an entry for."""
_QK_NORMS = ("qwen3", "qwen3_moe", "gemma3_text")
_POST_NORMS = ("gemma2", "gemma3_text")
_TIED_UNLESS_SAID = ("gemma2", "gemma3_text")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        kind: architecture.
        hidden, ffn: width of hidden states, and of the MLP (of one expert, where there are experts).
        heads, kv_heads, head_dim: attention.
        tied: input and output embeddings are one tensor.
        experts: experts of a layer; 0 in a dense model.
        active_experts: experts that a token goes through.
    """

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0
    active_experts: int = 0

    @classmethod
    def read(cls, file: Path, *, any_family: bool = False) -> ModelShape:
        """Read ``config.json``.

        Args:
            file: where it is.
            any_family: another architecture is taken as one of a Llama's parts, and not refused.

        Raises:
            DataError: it is missing, damaged, or of an architecture that is not supported.
        """
        try:
            hf = json.loads(file.read_text())
            if hf["model_type"] not in ARCHITECTURES:
                hf = _with_defaults(file, hf["model_type"], any_family)
            return cls.of(hf)
        except OSError as error:
            raise DataError(f"model.path: cannot read {file}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"model.path: {file} is not a model's configuration: {error!r}") from error

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> ModelShape:
        """The sizes that the content of a ``config.json`` describes."""
        kind = hf["model_type"]
        heads = hf["num_attention_heads"]
        return cls(
            kind=kind,
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            ffn=hf.get("moe_intermediate_size") or hf["intermediate_size"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            vocab=hf["vocab_size"],
            tied=hf.get("tie_word_embeddings", kind in _TIED_UNLESS_SAID),
            experts=hf.get("num_experts") or hf.get("num_local_experts") or 0,
            active_experts=hf.get("num_experts_per_tok") or 0,
        )

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Refuse a layout that cuts through a head, a layer or an expert.

        Raises:
            ConfigError: names the key and the number that it does not divide.
        """
        stage = self.layers // parallel.pipeline
        dense_rows, expert_rows = (1, self.ffn) if self.experts else (self.ffn, 1)
        for key, size, whole, what in (
            ("tensor", parallel.tensor, self.kv_heads, "key/value heads"),
            ("tensor", 1 if self.experts else parallel.tensor, dense_rows, "rows of the MLP"),
            ("pipeline", parallel.pipeline, self.layers, "layers"),
            ("virtual_pipeline", parallel.virtual_pipeline, stage, "layers of a pipeline stage"),
        ):
            if whole % size:
                raise ConfigError(f"actor.parallel.{key}={size} does not divide the model's {whole} {what}")
        for key, size, whole, what in (
            ("expert", parallel.expert, self.experts, "experts"),
            ("expert_tensor", parallel.expert_tensor, expert_rows, "rows of an expert"),
        ):
            if size > 1 and not self.experts:
                raise ConfigError(f"actor.parallel.{key}={size}, but the model has no experts")
            if whole % size:
                raise ConfigError(f"actor.parallel.{key}={size} does not divide the model's {whole} {what}")
        if self.experts and parallel.tensor > 1 and not parallel.sequence:
            raise ConfigError(
                f"actor.parallel.tensor={parallel.tensor} with a mixture of experts needs actor.parallel.sequence=true"
            )

    def attention_parameters(self, tensor: int = 1) -> int:
        """Parameters of one layer outside the MLP, on one tensor-parallel rank."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = 2 * self.hidden * (queries + keys)
        biases = queries + 2 * keys if self.kind == "qwen2" else 0
        norms = (4 if self.kind in _POST_NORMS else 2) * self.hidden
        norms += 2 * self.head_dim if self.kind in _QK_NORMS else 0
        return (matrices + biases) // tensor + norms

    def mlp_parameters(self, parallel: ParallelConfig) -> int:
        """Parameters of one layer's MLP, or of its router and experts, on one rank."""
        mlp = 3 * self.hidden * self.ffn
        if not self.experts:
            return mlp // parallel.tensor
        return self.hidden * self.experts + self.experts // parallel.expert * (mlp // parallel.expert_tensor)

    def embedding_parameters(self, tensor: int = 1) -> int:
        """Parameters of one embedding matrix on one tensor-parallel rank (its rows are padded)."""
        return -(-self.vocab // tensor) * self.hidden

    def parameters(self) -> int:
        """Parameters of the whole model."""
        layer = self.attention_parameters() + self.mlp_parameters(ParallelConfig())
        return self.layers * layer + self.embedding_parameters() * (1 if self.tied else 2) + self.hidden

    def rank_parameters(self, parallel: ParallelConfig) -> int:
        """Parameters of the fullest rank: of the last stage, or of the only one."""
        layer = self.attention_parameters(parallel.tensor) + self.mlp_parameters(parallel)
        matrices = 1 if self.tied or parallel.pipeline > 1 else 2
        stage = self.layers // parallel.pipeline * layer + self.hidden
        return stage + matrices * self.embedding_parameters(parallel.tensor)

    def rank_expert_parameters(self, parallel: ParallelConfig) -> int:
        """Those of them that belong to experts, whose optimizer states are sharded over other ranks."""
        of_experts = self.mlp_parameters(parallel) - self.hidden * self.experts if self.experts else 0
        return self.layers // parallel.pipeline * of_experts


def _with_defaults(file: Path, kind: str, any_family: bool) -> Mapping[str, Any]:
    """The ``config.json`` of a family that is not known here, with what it leaves out."""
    if not any_family:
        raise DataError(
            f"model.path: architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)} "
            "(docs/models.md says what model.fallback=megatron_bridge does)"
        )
    from transformers import AutoConfig  # seconds, which other models need not wait for

    return AutoConfig.from_pretrained(file.parent, trust_remote_code=False).to_dict()
