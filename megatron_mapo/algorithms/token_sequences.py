"""Means over the sequences that flat tokens belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSequences:
    """Which sequence each of T flat tokens is of.

    Attributes:
        index: int64 ``[T]``, in ``range(count)``.
        count: number of sequences.
        reduce: sums a tensor in place over the ranks that hold other tokens of the same sequences (context
            parallelism); None: this rank holds all of them.
    """

    index: Tensor
    count: int
    reduce: Callable[[Tensor], None] | None = None

    def mean(self, values: Tensor, counts: Tensor) -> Tensor:
        """Each token's mean over its sequence; no gradient flows through it.

        Args:
            values: ``[T]``, 0 where ``counts`` is False.
            counts: bool ``[T]``, the tokens that the mean is over.

        Returns:
            ``[T]``, of the type of ``values``; 0 in a sequence without counted tokens.
        """
        sums, lengths = self._sums(values, counts)
        return (sums / lengths.clamp(min=1))[self.index].to(values.dtype)

    def sum(self, values: Tensor, counts: Tensor) -> Tensor:
        """The same, but the sum."""
        return self._sums(values, counts)[0][self.index].to(values.dtype)

    def _sums(self, values: Tensor, counts: Tensor) -> Tensor:
        rows = torch.stack([values.detach().double(), counts.double()])
        totals = rows.new_zeros(2, self.count).index_add_(1, self.index, rows)
        if self.reduce is not None:
            self.reduce(totals)
        return totals
