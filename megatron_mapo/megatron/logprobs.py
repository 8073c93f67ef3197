"""Log-probabilities and entropy straight from hidden states: the logits of one chunk at a time.

Shapes: S scored tokens, H hidden size, V vocabulary rows of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _logits(hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Capped, then tempered logits ``[chunk, V]``, in float32 or wider."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits if temperature == 1.0 else logits.div_(temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    """Vocab-parallel log-prob and entropy; the backward pass makes each chunk's logits again.

    With z the tempered logits, p = softmax(z), y the label and H the entropy::

        d log p_y / d z_j = [j = y] - p_j          d H / d z_j = -p_j (log p_j + H)

    A cap c on the logits x, z = c tanh(x / c) / temperature, adds the factor 1 - tanh^2(x / c).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        first: int,
        temperature: float,
        softcap: float | None,
        chunk: int,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, normalizer = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            z = _logits(hidden[part], weight, temperature, softcap)
            top = z.amax(-1)
            if group is not None:
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            local = labels[part] - first
            here = (local >= 0) & (local < len(weight))
            z_label = z.gather(1, local.clamp(0, len(weight) - 1)[:, None])[:, 0].where(here, 0.0)
            z.sub_(top[:, None])
            e = z.exp()
            # In place, not a third [chunk, V] buffer; and a sum, which is exact to more digits than a dot product.
            sums = torch.stack([e.sum(-1), z.mul_(e).sum(-1), z_label])
            if group is not None:
                dist.all_reduce(sums, group=group)
            log_sum = sums[0].log()
            normalizer[part] = top + log_sum
            logprobs[part] = sums[2] - normalizer[part]
            entropy[part] = log_sum - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, labels, normalizer, entropy)
        ctx.temperature, ctx.softcap, ctx.chunk, ctx.first = temperature, softcap, chunk, first
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, normalizer, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        grad_hidden = torch.zeros_like(hidden)
        # Summed over chunks in float32: bfloat16 would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=normalizer.dtype) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            logp = _logits(hidden[part], weight, ctx.temperature, ctx.softcap)
            cap_slope = None
            if ctx.softcap is not None:
                cap_slope = (logp * (ctx.temperature / ctx.softcap)).square_().neg_().add_(1.0)
            logp.sub_(normalizer[part, None])
            p = logp.exp()
            if grad_entropy is None:
                del logp
                dz = p.mul_(grad_logprobs[part, None].neg())  # type: ignore[index]
            else:
                slope = logp.add_(entropy[part, None]).mul_(-grad_entropy[part, None])
                if grad_logprobs is not None:
                    slope.sub_(grad_logprobs[part, None])
                dz = p.mul_(slope)
            if grad_logprobs is not None:
                local = labels[part] - ctx.first
                here = (local >= 0) & (local < len(weight))
                index = local.clamp(0, len(weight) - 1)[:, None]
                dz.scatter_add_(1, index, grad_logprobs[part].where(here, 0.0)[:, None])
            if cap_slope is not None:
                dz.mul_(cap_slope)
            if ctx.temperature != 1.0:
                dz.div_(ctx.temperature)
            dz = dz.to(hidden.dtype)
            grad_hidden[part] = dz @ weight
            if grad_weight is None:
                continue
            if dz.dtype == grad_weight.dtype:
                grad_weight.addmm_(dz.t(), hidden[part])
            else:
                grad_weight += dz.t() @ hidden[part]
        weight_grad = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, weight_grad, *(None,) * 6


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = 256,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy of each distribution, never holding more than one chunk's logits.

    The gradient of ``hidden`` is this rank's share; the caller sums it over ``group``.

    Args:
        hidden: ``[S, H]``, after the final norm, the same on all ranks of ``group``.
        weight: ``[V, H]``, this rank's rows of the output matrix, in rank order.
        labels: int64 ``[S]``, global token ids.
        temperature: logits are divided by it.
        softcap: before that, logits x become ``softcap * tanh(x / softcap)``; None: as they are.
        chunk: tokens whose logits exist at one time.
        vocab_size: real size of the whole vocabulary; rows beyond it are padding. None: no padding.
        group: tensor-parallel group; None or of size 1: ``weight`` is the whole matrix.

    Returns:
        log-probs and entropies, each ``[S]``, in float32 or wider (nat).
    """
    if group is not None and group.size() == 1:
        group = None
    first = group.rank() * len(weight) if group is not None else 0
    if vocab_size is not None:
        weight = weight[: vocab_size - first]
    return _ChunkedLogprobs.apply(hidden, weight, labels, first, temperature, softcap, chunk, group)
