"""SequenceBatch -> balanced microbatches per data-parallel rank -> PackedBatch.

Invariants (``tests/unit/data/test_packing.py`` asserts exactly these):

1. Every sequence with at least one response token is in exactly one microbatch of one rank.
2. All ranks have the same number of microbatches, a multiple of ``count_multiple``; where
   sequences do not suffice, a filler microbatch of weight zero takes the place.
3. No microbatch holds more than ``max_tokens`` tokens.
4. A position is *scored* iff its next token is a response token of the same sequence. The last
   token of a sequence predicts nothing and is left out.
5. A prompt that several sequences of a microbatch share is computed once: its last token stands
   at the head of each response (it predicts that response's first token), the tokens before it
   stand once and are attended to by all of them. Loss and gradient are those of separate rows.
6. With context parallelism rank r holds the tokens ``r, r + cp, r + 2cp, ...`` of the microbatch,
   so that causal work is balanced, whatever the lengths.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mapo.data.sequences import SequenceBatch, offsets_of, ragged_indices
from megatron_mapo.errors import DataError


@dataclass(frozen=True)
class PackingSpec:
    """How a batch is cut.

    Attributes:
        max_tokens: most tokens of one microbatch.
        share_prompts: compute a prompt once for the sequences that share it.
        data_parallel: number of data-parallel ranks.
        context_parallel: number of ranks that one microbatch's tokens are striped over.
        multiple: the microbatch is padded at its tail to a multiple of this (context times
            sequence-parallel size).
        count_multiple: every rank gets a multiple of this many microbatches (the interleaved
            pipeline schedule asks for multiples of its stages).
    """

    max_tokens: int
    share_prompts: bool = True
    data_parallel: int = 1
    context_parallel: int = 1
    multiple: int = 1
    count_multiple: int = 1


@dataclass(frozen=True)
class AttentionBlock:
    """Rows of one attention call, padded to common lengths.

    Attributes:
        query_index: int64 ``[N, Lq]``, local token of each query; padding repeats a row's first.
        key_index: int64 ``[N, Lk]``, token of the whole microbatch of each key; padding likewise. Key j
            of a row is the token at position j of its sequence.
        mask: bool ``[N, Lq, Lk]``, which keys a query sees.
        valid: int64 ``[V]``, flat indices into ``[N * Lq]`` of queries that are not padding.
        target: int64 ``[V]``, local token that each of them belongs to.
    """

    query_index: Tensor
    key_index: Tensor
    mask: Tensor
    valid: Tensor
    target: Tensor

    def to(self, device: torch.device) -> AttentionBlock:
        """The block on ``device``."""
        return AttentionBlock(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class AttentionPlan:
    """Which tokens of a microbatch see which, as a few padded calls.

    Attributes:
        blocks: the padded calls; together they cover every local token that is not tail padding.
        cu_seqlens: int32 ``[rows + 1]`` if the microbatch is plain causal rows one after another
            (nothing shared, nothing striped), else None.
        max_seqlen: longest row where ``cu_seqlens`` is given.
    """

    blocks: list[AttentionBlock]
    cu_seqlens: Tensor | None
    max_seqlen: int

    def to(self, device: torch.device) -> AttentionPlan:
        """The plan on ``device``."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True)
        return AttentionPlan([b.to(device) for b in self.blocks], cu_seqlens, self.max_seqlen)


@dataclass(frozen=True)
class PackedBatch:
    """One microbatch as one rank sees it: ``T`` local tokens, ``S`` of them scored.

    Attributes:
        tokens: int64 ``[T]``.
        positions: int64 ``[T]``, position of each token in its own sequence.
        scored: int64 ``[S]``, the local tokens whose label is a response token.
        labels: int64 ``[S]``, that next token.
        response_index: int64 ``[S]``, the label's place among all response tokens of the
            SequenceBatch; in a filler microbatch it is that batch's number of response tokens.
        sequence_index: int64 ``[S]``, which of the microbatch's sequences the label is of.
        sequence_count: sequences of the microbatch, on all context-parallel ranks the same.
        columns: per-response-token columns of the batch at the scored tokens, each ``[S]``.
        attention: which token sees which.
    """

    tokens: Tensor
    positions: Tensor
    scored: Tensor
    labels: Tensor
    response_index: Tensor
    sequence_index: Tensor
    sequence_count: int
    columns: dict[str, Tensor]
    attention: AttentionPlan

    def to(self, device: torch.device) -> PackedBatch:
        """The microbatch on ``device``."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        return PackedBatch(
            tokens=move(self.tokens),
            positions=move(self.positions),
            scored=move(self.scored),
            labels=move(self.labels),
            response_index=move(self.response_index),
            sequence_index=move(self.sequence_index),
            sequence_count=self.sequence_count,
            columns={k: move(v) for k, v in self.columns.items()},
            attention=self.attention.to(device),
        )


def prompt_owners(batch: SequenceBatch) -> Tensor:
    """For each sequence the first sequence of its group, if their prompts are the same tokens, else itself.

    Returns:
        int64 ``[N]``.
    """
    n = len(batch)
    itself = torch.arange(n)
    _, group = batch.group_ids.unique(return_inverse=True)
    first = torch.full((n,), n, dtype=torch.int64).scatter_reduce(0, group, itself, "amin")[group]
    same = batch.prompt_lens == batch.prompt_lens[first]
    lens = torch.where(same, batch.prompt_lens, 0)
    starts = batch.offsets[:-1]
    equal = batch.tokens[ragged_indices(starts, lens)] == batch.tokens[ragged_indices(starts[first], lens)]
    row = torch.repeat_interleave(itself, lens)
    same &= torch.ones(n, dtype=torch.bool).scatter_reduce(0, row, equal, "amin")
    return torch.where(same, first, itself)


def plan_microbatches(batch: SequenceBatch, spec: PackingSpec) -> list[list[Tensor]]:
    """Cut a batch into microbatches, balanced in tokens over ranks and microbatches.

    Returns:
        for each data-parallel rank the sequence indices (int64) of its microbatches; an empty
        tensor stands for a filler.

    Raises:
        DataError: a sequence is longer than ``spec.max_tokens``, or no sequence has a response.
    """
    if bool((batch.prompt_lens < 1).any()):
        raise DataError("every sequence needs at least one prompt token")
    owner = prompt_owners(batch) if spec.share_prompts else torch.arange(len(batch))
    rows = (batch.response_lens > 0).nonzero().flatten()
    if len(rows) == 0:
        raise DataError("no sequence of the batch has a response token")
    prefix, own = (batch.prompt_lens - 1).tolist(), batch.response_lens.tolist()
    longest = int((batch.lengths - 1)[rows].max())
    if longest + spec.multiple - 1 > spec.max_tokens:
        raise DataError(
            f"a sequence of {longest + 1} tokens does not fit into actor.microbatch_tokens={spec.max_tokens}"
        )
    limit = spec.max_tokens - spec.multiple + 1
    groups: dict[int, list[int]] = {}
    for i, o in zip(rows.tolist(), owner[rows].tolist(), strict=True):
        groups.setdefault(o, []).append(i)
    total = sum(prefix[o] + sum(own[i] for i in g) for o, g in groups.items())
    count = math.ceil(total / (limit * spec.data_parallel))
    count += -count % spec.count_multiple
    while True:
        bins = count * spec.data_parallel
        pieces = _pieces(groups, prefix, own, cap=min(limit, max(1, math.ceil(total / bins))))
        packed = _balance(pieces, bins, limit)
        if packed is not None:
            return [
                [torch.tensor(b, dtype=torch.int64) for b in packed[r :: spec.data_parallel]]
                for r in range(spec.data_parallel)
            ]
        count += spec.count_multiple


def _pieces(groups: dict[int, list[int]], prefix: list[int], own: list[int], cap: int) -> list[tuple[int, list[int]]]:
    """Groups as (tokens, sequences); one above ``cap`` tokens is cut, each part computing the prompt again."""
    pieces = []
    for owner, members in groups.items():
        size = prefix[owner]
        part: list[int] = []
        for i in members:
            if part and size + own[i] > cap:
                pieces.append((size, part))
                size, part = prefix[owner], []
            size += own[i]
            part.append(i)
        pieces.append((size, part))
    return pieces


def _balance(pieces: list[tuple[int, list[int]]], bins: int, limit: int) -> list[list[int]] | None:
    """Longest piece first into the emptiest bin; None if a bin would overflow."""
    heap = [(0, b) for b in range(bins)]
    content: list[list[int]] = [[] for _ in range(bins)]
    for size, members in sorted(pieces, key=lambda piece: (-piece[0], piece[1][0])):
        filled, b = heapq.heappop(heap)
        if filled + size > limit:
            return None
        content[b].extend(members)
        heapq.heappush(heap, (filled + size, b))
    return content


def pack(
    batch: SequenceBatch,
    rows: Tensor,
    columns: dict[str, Tensor],
    spec: PackingSpec,
    context_rank: int = 0,
) -> PackedBatch:
    """Pack the sequences ``rows`` into one microbatch, as context-parallel rank ``context_rank`` sees it.

    Args:
        batch: N sequences with R response tokens.
        rows: int64 ``[M]`` with at least one response token each; empty makes a filler.
        columns: per-response-token columns ``[R]`` to carry along.
        spec: how to pack.
        context_rank: rank in the context-parallel group.
    """
    filler = len(rows) == 0
    if filler:
        rows = torch.where(batch.response_lens > 0, batch.lengths, batch.lengths.max() + 1).argmin()[None]
    part = batch.select(rows)
    pieces = _layout(part, prompt_owners(part) if spec.share_prompts else torch.arange(len(part)))
    source = ragged_indices(pieces.source, pieces.length)
    tokens = part.tokens[source].long()
    positions = ragged_indices(pieces.position, pieces.length)
    pad = -len(tokens) % spec.multiple
    tokens, positions = (torch.cat([t, t.new_zeros(pad)]) for t in (tokens, positions))

    scored = torch.repeat_interleave(pieces.response >= 0, pieces.length).nonzero().flatten()
    cp = spec.context_parallel
    mine = scored[scored % cp == context_rank]
    in_batch = ragged_indices(batch.response_offsets[rows], part.response_lens)
    in_part = ragged_indices(pieces.response, pieces.length)[mine]
    index = in_batch[in_part]
    picked = {name: column[index] for name, column in columns.items()}
    if filler:
        index = torch.full_like(index, len(batch.rollout_logprobs))
        picked = {name: torch.zeros_like(column) for name, column in picked.items()}
    return PackedBatch(
        tokens=tokens[context_rank::cp],
        positions=positions[context_rank::cp],
        scored=mine // cp,
        labels=part.tokens[source[mine] + 1].long(),
        response_index=index,
        sequence_index=part.response_sequence[in_part],
        sequence_count=len(part),
        columns=picked,
        attention=_attention_plan(pieces, cp, context_rank),
    )


def equal_lengths(microbatches: list[PackedBatch]) -> list[PackedBatch]:
    """Pad all at their tails to the longest, so that pipeline stages know the shapes without asking."""
    longest = max(len(m.tokens) for m in microbatches)
    return [
        dataclasses.replace(
            m,
            tokens=F.pad(m.tokens, (0, longest - len(m.tokens))),
            positions=F.pad(m.positions, (0, longest - len(m.positions))),
        )
        for m in microbatches
    ]


@dataclass(frozen=True)
class _Pieces:
    """Contiguous runs of a microbatch, in their order; all int64 ``[P]``.

    source: start in the batch's tokens; position: position of the first token in its sequence;
    length; response: first response token that the piece predicts (-1: a shared prefix, not scored);
    start: start in the microbatch; prefix_start, prefix_length: the piece that it attends to besides
    itself.
    """

    source: Tensor
    position: Tensor
    length: Tensor
    response: Tensor
    start: Tensor
    prefix_start: Tensor
    prefix_length: Tensor


def _layout(batch: SequenceBatch, owner: Tensor) -> _Pieces:
    """Prefix of each owner, then the responses to it; owners in the order of the batch."""
    owners, rank = owner.unique(return_inverse=True)
    prefix_length = batch.prompt_lens[owners] - 1
    source = torch.cat([batch.offsets[owners], batch.offsets[:-1] + batch.prompt_lens - 1])
    position = torch.cat([torch.zeros_like(prefix_length), batch.prompt_lens - 1])
    length = torch.cat([prefix_length, batch.response_lens])
    response = torch.cat([torch.full_like(prefix_length, -1), batch.response_offsets[:-1]])
    belongs = torch.cat([torch.arange(len(owners)), rank])
    order = torch.argsort(belongs * 2 + (response >= 0), stable=True)
    start = offsets_of(length[order])[:-1]
    is_prefix = response[order] < 0
    starts_of_prefix = start[is_prefix]
    belongs = belongs[order]
    return _Pieces(
        source=source[order],
        position=position[order],
        length=length[order],
        response=response[order],
        start=start,
        prefix_start=torch.where(is_prefix, start, starts_of_prefix[belongs]),
        prefix_length=torch.where(is_prefix, 0, prefix_length[belongs]),
    )


def _attention_plan(pieces: _Pieces, cp: int, context_rank: int) -> AttentionPlan:
    start, length = pieces.start, pieces.length
    prefix_start, prefix_length = pieces.prefix_start, pieces.prefix_length
    # A prefix with a single response is one causal row with it.
    is_prefix = pieces.response < 0
    single = is_prefix & torch.cat([is_prefix[2:], is_prefix.new_ones(2)])
    merged = torch.cat([single.new_zeros(1), single[:-1]])
    start = torch.where(merged, prefix_start, start)
    length = torch.where(merged, prefix_length + length, length)
    prefix_length = torch.where(merged, 0, prefix_length)
    keep = ~single & (length > 0)
    start, length, prefix_start, prefix_length = (t[keep] for t in (start, length, prefix_start, prefix_length))
    cu_seqlens, max_seqlen = None, 0
    if cp == 1 and not bool(prefix_length.any()):
        cu_seqlens, max_seqlen = offsets_of(length).int(), int(length.max())
    first = (context_rank - start) % cp
    queries = torch.div(length - first + cp - 1, cp, rounding_mode="floor").clamp(min=0)
    keys = prefix_length + length
    blocks = []
    key = _bucket(queries) * 256 + _bucket(keys)
    key[queries == 0] = -1
    for k in key.unique().tolist():
        if k >= 0:
            row = (key == k).nonzero().flatten()
            of_rows = [t[row] for t in (start, first, queries, prefix_start, prefix_length, keys)]
            blocks.append(_attention_block(cp, *of_rows))
    return AttentionPlan(blocks, cu_seqlens, max_seqlen)


def _bucket(length: Tensor) -> Tensor:
    """Lengths that may be padded to one another: up to 16, then steps of the square root of 2."""
    return (length.clamp(min=16).double().log2() * 2).ceil().long()


def _attention_block(
    cp: int, start: Tensor, first: Tensor, queries: Tensor, prefix_start: Tensor, prefix_length: Tensor, keys: Tensor
) -> AttentionBlock:
    i = torch.arange(int(queries.max()))[None]
    j = torch.arange(int(keys.max()))[None]
    within = first[:, None] + cp * i
    real = i < queries[:, None]
    query_index = torch.div(start[:, None] + torch.where(real, within, first[:, None]), cp, rounding_mode="floor")
    past_prefix = j - prefix_length[:, None]
    key_index = torch.where(past_prefix < 0, prefix_start[:, None] + j, start[:, None] + past_prefix)
    in_row = j < keys[:, None]
    key_index = torch.where(in_row, key_index, start[:, None])
    mask = (past_prefix[:, None] <= within[:, :, None]) & in_row[:, None]
    valid = real.flatten().nonzero().flatten()
    return AttentionBlock(query_index, key_index, mask, valid, query_index.flatten()[valid])
