"""Modules that take the place of megatron's in the layer spec, beside attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that knows sequence parallelism: its gradient is summed over the tensor group.

    megatron-core's own wrapper around torch norms refuses sequence parallelism. With
    ``layernorm_zero_centered_gamma`` the factor is ``1 + weight``, multiplied in float32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm in the same way; its sums are taken in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.offset = float(config.layernorm_zero_centered_gamma)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight, bias = self.offset + self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class RowParallelLinearNorm(RowParallelLinear):
    """A projection back to the hidden size whose output is normalised before it is added to the residual."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__(input_size, output_size, config=config, **arguments)
        self.post_norm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Project and normalise."""
        output, bias = super().forward(input_)
        return self.post_norm(output), bias


class LocalRopeLayer(TransformerLayer):
    """A layer of a model whose windowed layers have a rotary base of their own.

    ``rotary_pos_emb`` is ``[T, 1, 2, dim]``: the angles of global layers, then those of windowed ones.
    """

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        """Run the layer with the angles of its kind."""
        config = self.config
        kind = int(is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number))
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb[:, :, kind : kind + 1], **kwargs)
