"""What an evaluation reports: pass@k, maj@k, and how sure they are.

Everything is of P prompts with n sampled responses each, in float64. A metric is a mean over prompts of one value
a prompt, so its uncertainty is that of drawing other prompts *and* other responses: intervals come from resampling
prompts, whole (a cluster bootstrap). Responses to one prompt are no independent evidence.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK_ELEMENTS = 1 << 23
"""Most elements of one temporary tensor."""


def is_right(rewards: Tensor | float, right_from: float) -> Tensor:
    """Which rewards reach ``right_from``: the one definition, for training, evaluations and verifiers' scores.

    Compared in float32, as batches hold rewards: 0.9 reaches 0.9, and a sum that misses its threshold by the last bit
    of a double reaches it.

    Args:
        rewards: any shape.
        right_from: smallest reward that is right.

    Returns:
        bool, of the shape of ``rewards``.
    """
    return torch.as_tensor(rewards, dtype=torch.float32) >= torch.tensor(right_from, dtype=torch.float32)


def pass_at_k_sizes(n: int) -> list[int]:
    """The k that are reported for n samples: powers of two below n, and n."""
    return [*(1 << i for i in range(n.bit_length()) if 1 << i < n), n]


def pass_at_k(right: Tensor, sizes: list[int]) -> Tensor:
    """Chance that at least one of k responses is right, unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Of n samples c are right: ``1 - C(n-c, k) / C(n, k)``, the share of k-subsets that hold a right one. It is
    computed as ``1 - prod_{i=n-c+1..n} (1 - k/i)`` in logarithms, without a binomial coefficient.

    Args:
        right: bool ``[P, n]``, the response is right.
        sizes: the K values of k, each from 1 to n.

    Returns:
        float64 ``[P, K]``.

    Raises:
        ValueError: a k is not from 1 to n.
    """
    n = right.shape[1]
    if not all(1 <= k <= n for k in sizes):
        raise ValueError(f"pass@k of {n} samples needs k from 1 to {n}, got {sizes}")
    i = torch.arange(n, 0, -1, dtype=torch.float64)
    share = torch.tensor(sizes, dtype=torch.float64) / i[:, None]  # [n, K]
    # From i <= k on, every subset holds a right one: log 0.
    log_miss = torch.log1p(-share.clamp(max=1.0)).cumsum(0)
    by_count = torch.cat([torch.zeros(1, len(sizes), dtype=torch.float64), -torch.expm1(log_miss)])
    return by_count[right.sum(1)]


def maj_at_n(answers: Tensor, right: Tensor) -> Tensor:
    """Chance that the answer given most often is right (self-consistency, arXiv 2203.11171).

    A response without an answer does not vote; a prompt without any vote is wrong. Between answers that tie for the
    most votes one is drawn at random: the value is the expectation over that draw. The verifier judges responses
    and not answers; should it judge two responses with the same answer differently, the answer counts as the share
    that is right.

    Args:
        answers: int64 ``[P, n]``, the answer's id; equal ids within a prompt are the same answer; -1: no answer.
        right: bool ``[P, n]``, the response is right.

    Returns:
        float64 ``[P]``.
    """
    rows = max(1, _CHUNK_ELEMENTS // max(1, answers.shape[1] ** 2))
    return torch.cat([_majority(a, r) for a, r in zip(answers.split(rows), right.split(rows), strict=True)])


def _majority(answers: Tensor, right: Tensor) -> Tensor:
    votes = (answers[:, :, None] == answers[:, None, :]).sum(2).where(answers >= 0, 0)
    # Tied answers have equally many responses: a mean over these is a mean over the answers.
    winning = (votes == votes.amax(1, keepdim=True)) & (answers >= 0)
    return (right & winning).sum(1).double() / winning.sum(1).clamp(min=1)


def bootstrap_interval(
    values: Tensor, seed: int, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap intervals of means over prompts.

    Prompts are drawn with replacement; all metrics of a prompt stay together. Values that are all equal give an
    interval of no width: the bootstrap cannot see what the sample does not show.

    Args:
        values: float ``[P, M]``, M metrics of each prompt.
        seed: of the draws; the same seed gives the same intervals.
        confidence: share of the resampled means between the two ends.
        resamples: number of draws of P prompts.

    Returns:
        Lower and upper ends, float64 ``[M]`` each.

    Raises:
        ValueError: there is no prompt, a value is not finite, or ``confidence`` is not between 0 and 1.
    """
    prompts = len(values)
    if prompts == 0 or not bool(values.isfinite().all()):
        raise ValueError("intervals need at least one prompt and finite values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK_ELEMENTS // prompts)
    means = torch.cat(
        [
            _resampled_means(values.double(), min(rows, resamples - done), generator)
            for done in range(0, resamples, rows)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


def _resampled_means(values: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Means of ``resamples`` draws, ``[resamples, M]``: how often each prompt is drawn, times its values."""
    prompts = len(values)
    draws = torch.randint(prompts, (resamples, prompts), generator=generator)
    draws += torch.arange(resamples)[:, None] * prompts
    counts = torch.bincount(draws.flatten(), minlength=resamples * prompts).view(resamples, prompts)
    return counts.double() @ values / prompts
