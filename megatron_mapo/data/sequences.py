"""SequenceBatch: the ragged, columnar batch that flows through everything after the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mapo.errors import DataError

SUCCESS = "success"
"""Extra column, bool ``[N]``: which responses are successes, where the verifier says so."""
RIGHT = "right"
"""Extra column, bool ``[N]``: which responses are right before any penalty, for what is reported and filtered."""
REWARD_PART = "reward/"
"""Begins the names of extra columns, float ``[N]``, of what each verifier of a mixture gave."""


def offsets_of(lengths: Tensor) -> Tensor:
    """Start of every row of a ragged tensor, and its total length at the end.

    Args:
        lengths: int64 ``[N]``.

    Returns:
        int64 ``[N + 1]``.
    """
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def ragged_indices(starts: Tensor, lengths: Tensor) -> Tensor:
    """Flat indices ``starts[i], starts[i]+1, ..., starts[i]+lengths[i]-1`` of all rows, one after another.

    Args:
        starts: int64 ``[N]``.
        lengths: int64 ``[N]``.

    Returns:
        int64 ``[sum(lengths)]``.
    """
    begin = offsets_of(lengths)
    shift = torch.repeat_interleave(starts - begin[:-1], lengths)
    return torch.arange(int(begin[-1]), dtype=torch.int64) + shift


@dataclass
class SequenceBatch:
    """N sequences, each a prompt and one response, as a struct of CPU arrays.

    Attributes:
        tokens: int32 ``[sum(lengths)]``, prompt and response of every sequence, one after another.
        offsets: int64 ``[N + 1]``, where each sequence starts in ``tokens``.
        prompt_lens: int64 ``[N]``, prompt tokens of each sequence.
        rollout_logprobs: float32 ``[R]``, log-prob of each response token as the server sampled it
            (nat); R is the number of response tokens in the batch.
        weight_versions: int32 ``[R]``, version of the weights that sampled each response token.
        rewards: float32 ``[N]``.
        group_ids: int64 ``[N]``, equal for the responses to one prompt.
        truncated: bool ``[N]``, the response hit the length limit.
        extra: further per-sequence columns, each ``[N, ...]``.
    """

    tokens: Tensor
    offsets: Tensor
    prompt_lens: Tensor
    rollout_logprobs: Tensor
    weight_versions: Tensor
    rewards: Tensor
    group_ids: Tensor
    truncated: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    _ROWS: ClassVar = ("prompt_lens", "rewards", "group_ids", "truncated")
    _DTYPES: ClassVar = {
        "tokens": torch.int32,
        "offsets": torch.int64,
        "prompt_lens": torch.int64,
        "rollout_logprobs": torch.float32,
        "weight_versions": torch.int32,
        "rewards": torch.float32,
        "group_ids": torch.int64,
        "truncated": torch.bool,
    }

    def __post_init__(self) -> None:
        for name, dtype in self._DTYPES.items():
            column = getattr(self, name)
            if column.dim() != 1 or column.dtype != dtype:
                raise DataError(
                    f"SequenceBatch.{name} must be a flat {dtype} tensor, got {column.dtype} {tuple(column.shape)}"
                )
        n = len(self)
        for name in self._ROWS:
            if len(getattr(self, name)) != n:
                raise DataError(f"SequenceBatch.{name} has {len(getattr(self, name))} rows, expected {n}")
        for name, column in self.extra.items():
            if len(column) != n:
                raise DataError(f"SequenceBatch.extra[{name!r}] has {len(column)} rows, expected {n}")
        if len(self.tokens) != int(self.offsets[-1]) or (n and bool((self.response_lens < 0).any())):
            raise DataError("SequenceBatch.offsets and prompt_lens do not fit its tokens")
        responses = int(self.response_lens.sum())
        for name in ("rollout_logprobs", "weight_versions"):
            if len(getattr(self, name)) != responses:
                raise DataError(
                    f"SequenceBatch.{name} has {len(getattr(self, name))} values for {responses} response tokens"
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 ``[N]``, prompt and response tokens of each sequence."""
        return self.offsets.diff()

    @property
    def response_lens(self) -> Tensor:
        """int64 ``[N]``, response tokens of each sequence."""
        return self.lengths - self.prompt_lens

    @property
    def response_offsets(self) -> Tensor:
        """int64 ``[N + 1]``, where each sequence starts in the per-response-token columns."""
        return offsets_of(self.response_lens)

    @property
    def response_sequence(self) -> Tensor:
        """int64 ``[R]``, the sequence that each response token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.response_lens)

    @classmethod
    def from_responses(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        rollout_logprobs: Sequence[Sequence[float]] | None = None,
        weight_versions: Sequence[Sequence[int]] | None = None,
        rewards: Sequence[float] | None = None,
        group_ids: Sequence[int] | None = None,
        truncated: Sequence[bool] | None = None,
        extra: dict[str, Tensor] | None = None,
    ) -> SequenceBatch:
        """Build a batch from token lists, one prompt and one response a sequence.

        Columns that are not given are zeros (``group_ids``: every sequence its own group).
        """
        n = len(prompts)
        if len(responses) != n:
            raise DataError(f"{n} prompts but {len(responses)} responses")
        flat = [t for p, r in zip(prompts, responses, strict=True) for t in (*p, *r)]
        total = sum(map(len, responses))
        lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], dtype=torch.int64)

        def per_token(values: Sequence[Sequence[float]] | None, dtype: torch.dtype) -> Tensor:
            if values is None:
                return torch.zeros(total, dtype=dtype)
            return torch.tensor([v for row in values for v in row], dtype=dtype)

        return cls(
            tokens=torch.tensor(flat, dtype=torch.int32),
            offsets=offsets_of(lengths),
            prompt_lens=torch.tensor([len(p) for p in prompts], dtype=torch.int64),
            rollout_logprobs=per_token(rollout_logprobs, torch.float32),
            weight_versions=per_token(weight_versions, torch.int32),
            rewards=torch.tensor([0.0] * n if rewards is None else list(rewards), dtype=torch.float32),
            group_ids=torch.tensor(list(range(n)) if group_ids is None else list(group_ids), dtype=torch.int64),
            truncated=torch.tensor([False] * n if truncated is None else list(truncated), dtype=torch.bool),
            extra=extra or {},
        )

    def select(self, index: Tensor) -> SequenceBatch:
        """The sequences ``index`` (int64 ``[M]``, or bool ``[N]``), in that order."""
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        token_index = ragged_indices(self.offsets[:-1][index], self.lengths[index])
        response_index = ragged_indices(self.response_offsets[:-1][index], self.response_lens[index])
        return SequenceBatch(
            tokens=self.tokens[token_index],
            offsets=offsets_of(self.lengths[index]),
            prompt_lens=self.prompt_lens[index],
            rollout_logprobs=self.rollout_logprobs[response_index],
            weight_versions=self.weight_versions[response_index],
            rewards=self.rewards[index],
            group_ids=self.group_ids[index],
            truncated=self.truncated[index],
            extra={k: v[index] for k, v in self.extra.items()},
        )

    @staticmethod
    def concat(batches: Sequence[SequenceBatch]) -> SequenceBatch:
        """All sequences of ``batches``, in order. Group ids are taken as they are.

        Raises:
            DataError: the batches do not have the same extra columns, or there is none.
        """
        if not batches:
            raise DataError("SequenceBatch.concat needs at least one batch")
        names = set(batches[0].extra)
        if any(set(b.extra) != names for b in batches):
            raise DataError("SequenceBatch.concat: the batches have different extra columns")

        def cat(name: str) -> Tensor:
            return torch.cat([getattr(b, name) for b in batches])

        return SequenceBatch(
            offsets=offsets_of(torch.cat([b.lengths for b in batches])),
            extra={k: torch.cat([b.extra[k] for b in batches]) for k in batches[0].extra},
            **{name: cat(name) for name in SequenceBatch._DTYPES if name != "offsets"},
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The columns by name; extra columns as ``extra.NAME``."""
        columns = {name: getattr(self, name).contiguous() for name in self._DTYPES}
        return columns | {f"extra.{k}": v.contiguous() for k, v in self.extra.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> SequenceBatch:
        """Inverse of ``to_tensors``."""
        extra = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
        missing = set(cls._DTYPES) - set(tensors)
        if missing:
            raise DataError(f"SequenceBatch: missing columns {sorted(missing)}")
        return cls(**{name: tensors[name] for name in cls._DTYPES}, extra=extra)

    def save(self, path: str | Path) -> None:
        """Write the batch as one safetensors file."""
        save_file(self.to_tensors(), str(path))

    @classmethod
    def load(cls, path: str | Path) -> SequenceBatch:
        """Read what ``save`` wrote."""
        return cls.from_tensors(load_file(str(path)))
