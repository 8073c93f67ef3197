"""The least arithmetic that a step needs: FLOPs of generation and training, from the model's ``config.json``.

With L layers, widths h (hidden), q (queries), k (keys), f (MLP), vocabulary V, and two FLOPs a multiply-add:

==================  ==========================================================================================
layers, a token     2 L P with P = 2 h (q + k) + 3 h f the weights of one layer's matrices
output, a token     2 V h, for tokens whose logits are needed
attention           4 L q i for the token at position i = 1, 2, ... (scores and weighted values, causal)
generation          prompt tokens, and all response tokens but the last, through layers and attention; the output
                    matrix once for every response token
training            the same tokens (the last response token predicts nothing), forward and backward; the
                    backward pass of a product costs twice its forward pass, so three times in all
==================  ==========================================================================================

Shared prompts are computed once a group, else once a sequence. Softmax, norms, activations, the optimizer and
all copies count as nothing: the floor is a bound from below, not a prediction.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import matmul_rate

_WIDE_ROWS = 2048


@dataclass(frozen=True)
class Matrices:
    """Sizes of a dense decoder with gated MLP (Llama, Qwen)."""

    layers: int
    hidden: int
    queries: int
    keys: int
    ffn: int
    vocab: int

    @classmethod
    def read(cls, model: Path) -> Matrices:
        """From the ``config.json`` of a Hugging Face folder."""
        config = json.loads((model / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            queries=heads * head_dim,
            keys=(config.get("num_key_value_heads") or heads) * head_dim,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
        )

    @property
    def layer_flops(self) -> float:
        """Of one token through the matrices of all layers."""
        return 2.0 * self.layers * (2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.ffn)

    @property
    def output_flops(self) -> float:
        """Of one token through the output matrix."""
        return 2.0 * self.vocab * self.hidden

    def attention_flops(self, first: float, last: float) -> float:
        """Of the tokens at positions ``first`` to ``last`` (from 1, both included) of a sequence."""
        return 4.0 * self.layers * self.queries * (last * (last + 1) - first * (first - 1)) / 2

    def shapes(self) -> list[tuple[int, int, int]]:
        """``(inputs, outputs, count)`` of every kind of matrix."""
        h, n = self.hidden, self.layers
        return [
            (h, self.queries, n),
            (h, self.keys, 2 * n),
            (self.queries, h, n),
            (h, self.ffn, 2 * n),
            (self.ffn, h, n),
            (h, self.vocab, 1),
        ]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step.

    Attributes:
        prefill: prompt tokens in generation.
        decode: response tokens in generation.
        training: forward and backward.
    """

    prefill: float
    decode: float
    training: float


@dataclass(frozen=True)
class Work:
    """What a step works on; lengths are means over the measured steps.

    Attributes:
        groups: prompts.
        group_size: responses to a prompt.
        prompt_tokens, response_tokens: mean lengths.
    """

    groups: int
    group_size: int
    prompt_tokens: float
    response_tokens: float


def step_flops(model: Matrices, work: Work, copies: int) -> StepFlops:
    """FLOPs of one step by the formulas in the module's docstring.

    Args:
        model: sizes.
        work: what the step works on.
        copies: how often each prompt is computed: 1 if shared, else ``work.group_size``.
    """
    prompt, response = work.prompt_tokens, work.response_tokens
    sequences = work.groups * work.group_size
    prefill = work.groups * copies * (prompt * model.layer_flops + model.attention_flops(1, prompt))
    inner = (response - 1) * model.layer_flops + model.attention_flops(prompt + 1, prompt + response - 1)
    decode = sequences * (inner + response * model.output_flops)
    return StepFlops(prefill, decode, training=3 * (prefill + decode))


def measure_rates(model: Matrices, sequences: int, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of the model's products: ``wide`` with 2,048 tokens at once, ``decode`` with one token a sequence."""
    return {
        "wide": matmul_rate(_WIDE_ROWS, model.shapes(), dtype),
        "decode": matmul_rate(sequences, model.shapes(), dtype),
    }


def faster(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The higher of two measurements of each rate: a floor needs what the machine can do at best."""
    return {name: max(rate, other[name]) for name, rate in one.items()}


def floor_seconds(flops: StepFlops, rates: dict[str, float]) -> dict[str, float]:
    """Seconds that the products alone take: prompts and training at the ``wide`` rate, decoding at ``decode``."""
    generation = flops.prefill / rates["wide"] + flops.decode / rates["decode"]
    training = flops.training / rates["wide"]
    return {"generation": generation, "training": training, "step": generation + training}


def floors(model: Matrices, work: Work, rates: dict[str, float]) -> dict[str, Any]:
    """The floor with prompts computed once a group (``shared``) and once a sequence (``unshared``)."""
    result: dict[str, Any] = {}
    for name, copies in (("shared", 1), ("unshared", work.group_size)):
        flops = step_flops(model, work, copies)
        result[name] = {"flops": asdict(flops), "seconds": floor_seconds(flops, rates)}
    return result
