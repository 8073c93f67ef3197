"""How the loss averages over tokens and responses."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mapo.config import LossAggregation


def token_weights(
    response_lens: Tensor, aggregation: LossAggregation, max_response_tokens: int, left_out: Tensor | None = None
) -> Tensor:
    """Weight of each response token in the loss, from counts of the whole batch.

    ``token``: 1/R over all R response tokens (DAPO, arXiv 2503.14476, eq. 8). ``sequence``: 1/(N len_i) (GRPO,
    arXiv 2402.03300, eq. 3). ``constant``: 1/(N max_response_tokens) (Dr. GRPO, arXiv 2503.20783).

    Args:
        response_lens: int64 ``[N]``; an empty response counts in N.
        aggregation: which.
        max_response_tokens: ``rollout.max_response_tokens``.
        left_out: bool ``[N]``, responses that weigh 0 and are not counted, for ``actor.loss.mask_truncated`` the
            truncated ones (DAPO, section 3.4).

    Returns:
        float64 ``[R]``. With it the loss is a plain sum, however the batch is cut.
    """
    kept = torch.ones_like(response_lens, dtype=torch.bool) if left_out is None else ~left_out
    count = max(int(kept.sum()), 1)
    if aggregation is LossAggregation.token:
        per_sequence = kept.double() / max(int(response_lens[kept].sum()), 1)
    elif aggregation is LossAggregation.sequence:
        per_sequence = kept / (count * response_lens.clamp(min=1).double())
    else:
        per_sequence = kept.double() / (count * max_response_tokens)
    return torch.repeat_interleave(per_sequence, response_lens)
