"""The six invariants of ``data/packing.py``, against loops over plain lists.

The reference says for each place of a microbatch which token of which sequences stands there; what
the attention plan lets each query see is then compared with "the tokens before me in my sequence".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mapo.data.packing import (
    AttentionPlan,
    PackedBatch,
    PackingSpec,
    equal_lengths,
    pack,
    plan_microbatches,
    prompt_owners,
)
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import DataError


@dataclass(frozen=True)
class Place:
    """What stands at one place of a microbatch: token ``index`` of each of ``sequences``."""

    sequences: frozenset[int]
    index: int
    scored: bool


def tokens_of(batch: SequenceBatch, i: int) -> list[int]:
    return batch.tokens[int(batch.offsets[i]) : int(batch.offsets[i + 1])].tolist()


def prompt_of(batch: SequenceBatch, i: int) -> tuple[int, ...]:
    return tuple(tokens_of(batch, i)[: int(batch.prompt_lens[i])])


def reference_layout(batch: SequenceBatch, rows: list[int], share: bool) -> list[Place]:
    """Each shared prompt without its last token, then the responses to it, each behind that last token."""
    first_of_group: dict[int, int] = {}
    families: dict[int, list[int]] = {}
    for i in rows:
        first = first_of_group.setdefault(int(batch.group_ids[i]), i)
        owner = first if share and prompt_of(batch, i) == prompt_of(batch, first) else i
        families.setdefault(owner, []).append(i)
    places = []
    for owner in sorted(families, key=rows.index):
        members, prompt = families[owner], len(prompt_of(batch, owner))
        places += [Place(frozenset(members), t, False) for t in range(prompt - 1)]
        for i in members:
            places += [Place(frozenset({i}), t, True) for t in range(prompt - 1, int(batch.lengths[i]) - 1)]
    return places


def visible(plan: AttentionPlan, real: int) -> dict[int, list[int]]:
    """For each local query the places it sees. Padding queries see something too: softmax needs it."""
    seen: dict[int, list[int]] = {}
    for block in plan.blocks:
        assert bool(block.mask.any(-1).all()), "a padded query that sees nothing makes NaN"
        flat = block.mask.flatten(0, 1)
        keys = block.key_index[:, None].expand(block.mask.shape).flatten(0, 1)
        assert block.query_index.flatten()[block.valid].tolist() == block.target.tolist()
        for row, target in zip(block.valid.tolist(), block.target.tolist(), strict=True):
            assert target not in seen, "a query stands in two blocks"
            seen[target] = keys[row][flat[row]].tolist()
    assert sorted(seen) == list(range(real)), "every token that is not tail padding is a query once"
    return seen


def check_microbatch(batch: SequenceBatch, rows: list[int], spec: PackingSpec) -> list[int]:
    """Everything about one microbatch on all its context ranks; returns the response tokens that it scores."""
    cp = spec.context_parallel
    total = len(batch.rollout_logprobs)
    columns = {"value": torch.arange(total).double() + 0.5, "count": torch.arange(total)}
    parts = [pack(batch, torch.tensor(rows, dtype=torch.int64), columns, spec, r) for r in range(cp)]
    if rows:
        places = reference_layout(batch, rows, spec.share_prompts)
    else:
        filler = min((int(n), i) for i, n in enumerate(batch.lengths) if batch.response_lens[i] > 0)[1]
        places = reference_layout(batch, [filler], spec.share_prompts)
    padded = math.ceil(len(places) / spec.multiple) * spec.multiple
    assert padded <= spec.max_tokens  # invariant 3
    found = []
    for rank, part in enumerate(parts):
        assert len(part.tokens) == len(part.positions) == padded // cp
        mine = places[rank::cp]  # invariant 6
        check_tokens(batch, mine, part)
        seen = visible(part.attention, len(mine))
        for local, place in enumerate(mine):
            check_visible(places, place, seen[local])
        found += check_scores(batch, mine, part, columns, filler=not rows)
        if cp == 1:
            check_plain_rows(places, part.attention, spec.share_prompts)
        else:
            assert part.attention.cu_seqlens is None
    return found


def check_tokens(batch: SequenceBatch, mine: list[Place], part: PackedBatch) -> None:
    expected = [tokens_of(batch, min(p.sequences))[p.index] for p in mine]
    pad = [0] * (len(part.tokens) - len(mine))
    assert part.tokens.tolist() == expected + pad
    assert part.positions.tolist() == [p.index for p in mine] + pad
    assert part.tokens.dtype == part.positions.dtype == part.labels.dtype == torch.int64


def check_visible(places: list[Place], query: Place, keys: list[int]) -> None:
    """Exactly the tokens 0..index of the query's own sequence, each once, in their order (invariant 5)."""
    for sequence in query.sequences:
        assert all(sequence in places[k].sequences for k in keys)
        assert [places[k].index for k in keys] == list(range(query.index + 1))


def check_scores(
    batch: SequenceBatch, mine: list[Place], part: PackedBatch, columns: dict[str, torch.Tensor], filler: bool
) -> list[int]:
    """Invariant 4: scored iff the next token is a response token of the same sequence."""
    expected = [local for local, p in enumerate(mine) if p.scored]
    assert part.scored.tolist() == expected
    labels, index = [], []
    for local in expected:
        (sequence,) = mine[local].sequences
        after = mine[local].index + 1
        assert int(batch.prompt_lens[sequence]) <= after < int(batch.lengths[sequence])
        labels.append(tokens_of(batch, sequence)[after])
        index.append(int(batch.response_lens[:sequence].sum()) + after - int(batch.prompt_lens[sequence]))
    assert part.labels.tolist() == labels
    for name, column in columns.items():
        value = torch.zeros(len(index), dtype=column.dtype) if filler else column[index]
        assert part.columns[name].dtype == column.dtype
        assert torch.equal(part.columns[name], value)
    if filler:
        assert part.response_index.tolist() == [len(batch.rollout_logprobs)] * len(index)
        return []
    assert part.response_index.tolist() == index
    return index


def check_plain_rows(places: list[Place], plan: AttentionPlan, share: bool) -> None:
    """``cu_seqlens`` is there iff nothing is shared, and cuts the microbatch into whole causal rows."""
    shared = any(len(p.sequences) > 1 for p in places)
    assert (plan.cu_seqlens is None) == shared
    if plan.cu_seqlens is None:
        assert share
        return
    bounds = plan.cu_seqlens.tolist()
    assert plan.cu_seqlens.dtype == torch.int32
    starts = [i for i, p in enumerate(places) if p.index == 0]
    assert bounds[: len(starts)] == starts
    assert len(places) in bounds
    assert plan.max_seqlen == max(b - a for a, b in pairwise(bounds))


def check(batch: SequenceBatch, spec: PackingSpec) -> list[list[list[int]]]:
    """All six invariants for a whole batch; returns the plan."""
    plan = [[rows.tolist() for rows in rank] for rank in plan_microbatches(batch, spec)]
    assert len(plan) == spec.data_parallel
    assert len({len(rank) for rank in plan}) == 1  # invariant 2
    assert len(plan[0]) % spec.count_multiple == 0
    rows = [i for rank in plan for microbatch in rank for i in microbatch]
    with_response = [i for i in range(len(batch)) if batch.response_lens[i] > 0]
    assert sorted(rows) == with_response  # invariant 1
    scored = [t for rank in plan for microbatch in rank for t in check_microbatch(batch, microbatch, spec)]
    assert sorted(scored) == list(range(len(batch.rollout_logprobs)))
    return plan


def make_batch(groups: list[tuple[int, list[int], bool]], order_seed: int = 0) -> SequenceBatch:
    """Groups of (prompt length, response lengths, whether the prompts differ), in a shuffled order."""
    generator = torch.Generator().manual_seed(order_seed)
    prompts, responses, ids = [], [], []
    for group, (prompt_len, response_lens, differ) in enumerate(groups):
        prompt = torch.randint(0, 50, (prompt_len,), generator=generator).tolist()
        for j, length in enumerate(response_lens):
            prompts.append([*prompt[:-1], prompt[-1] + 50 * j] if differ else prompt)
            responses.append(torch.randint(0, 50, (length,), generator=generator).tolist())
            ids.append(100 - 7 * group)
    batch = SequenceBatch.from_responses(prompts, responses, group_ids=ids)
    return batch.select(torch.randperm(len(batch), generator=generator))


GROUPS = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(0, 24), min_size=1, max_size=5), st.booleans()),
    min_size=1,
    max_size=5,
).filter(lambda groups: any(n for _, lens, _ in groups for n in lens))


@given(
    groups=GROUPS,
    seed=st.integers(0, 9),
    share=st.booleans(),
    data=st.integers(1, 3),
    context=st.integers(1, 3),
    sequence=st.integers(1, 2),
    slack=st.integers(0, 120),
    count=st.integers(1, 3),
)
@settings(deadline=None, max_examples=120)
def test_invariants(
    groups: list[tuple[int, list[int], bool]],
    seed: int,
    share: bool,
    data: int,
    context: int,
    sequence: int,
    slack: int,
    count: int,
) -> None:
    batch = make_batch(groups, seed)
    multiple = context * sequence
    longest = int((batch.lengths - 1)[batch.response_lens > 0].max())
    check(batch, PackingSpec(longest + multiple - 1 + slack, share, data, context, multiple, count))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("context", [1, 2])
def test_long_rows_of_many_lengths(share: bool, context: int) -> None:
    """Lengths over several padding buckets at once."""
    batch = make_batch([(40, [1, 17, 90, 200], False), (1, [3, 150], False), (120, [64], False)])
    check(batch, PackingSpec(2000, share, 1, context, context))


def test_a_shared_prompt_is_computed_once() -> None:
    batch = make_batch([(30, [5, 6, 7, 8], False)])
    shared, single = (
        pack(batch, torch.arange(4), {}, PackingSpec(1000, share)).tokens.numel() for share in (True, False)
    )
    assert shared == 29 + 5 + 6 + 7 + 8
    assert single == 4 * 29 + 5 + 6 + 7 + 8


def test_different_prompts_under_one_group_id_are_not_shared() -> None:
    batch = SequenceBatch.from_responses(
        [[1, 2, 3], [1, 9, 3], [1, 2], [1, 2, 3]], [[4, 4]] * 4, group_ids=[7, 7, 7, 7]
    )
    assert prompt_owners(batch).tolist() == [0, 1, 2, 0]
    check(batch, PackingSpec(100))


def test_equal_prompts_of_different_groups_are_not_shared() -> None:
    batch = SequenceBatch.from_responses([[1, 2, 3]] * 2, [[4], [5]], group_ids=[0, 1])
    assert prompt_owners(batch).tolist() == [0, 1]
    check(batch, PackingSpec(100))


@pytest.mark.parametrize("context", [1, 2, 4])
def test_smallest_sequences(context: int) -> None:
    """Prompts and responses of one token: a row is one place, and most stripes are empty of it."""
    batch = make_batch([(1, [1], False), (1, [1, 1, 1], False), (1, [2, 1], True)])
    check(batch, PackingSpec(64, True, 1, context, context))


def test_fewer_sequences_than_ranks_makes_fillers() -> None:
    plan = check(make_batch([(4, [3, 5], True)]), PackingSpec(100, data_parallel=4))
    assert sum(not microbatch for rank in plan for microbatch in rank) == 2


def test_a_big_group_is_spread_over_ranks() -> None:
    plan = check(make_batch([(4, [20] * 8, False)]), PackingSpec(1000, data_parallel=2))
    assert all(rank[0] for rank in plan)


def test_empty_responses_are_left_out() -> None:
    batch = make_batch([(4, [0, 3, 0], False), (2, [0], False)])
    plan = check(batch, PackingSpec(100))
    assert [len(m) for rank in plan for m in rank] == [1]


def test_a_sequence_that_just_fits() -> None:
    """A sequence of n tokens takes n − 1 places: its last token predicts nothing."""
    batch = make_batch([(10, [11], False)])
    check(batch, PackingSpec(20))
    with pytest.raises(DataError, match=r"a sequence of 21 tokens does not fit into actor.microbatch_tokens=19"):
        plan_microbatches(batch, PackingSpec(19))
    with pytest.raises(DataError, match=r"does not fit into actor.microbatch_tokens=22"):
        plan_microbatches(batch, PackingSpec(22, context_parallel=4, multiple=4))


def test_batches_that_cannot_be_trained_on() -> None:
    with pytest.raises(DataError, match="no sequence of the batch has a response token"):
        plan_microbatches(SequenceBatch.from_responses([[1]], [[]]), PackingSpec(100))
    with pytest.raises(DataError, match="at least one prompt token"):
        plan_microbatches(SequenceBatch.from_responses([[1], []], [[2], [2]]), PackingSpec(100))


def test_order_of_the_batch_does_not_change_the_token_count() -> None:
    batch = make_batch([(9, [4, 5, 6], False), (5, [7, 3], False)])
    spec = PackingSpec(25, data_parallel=2)
    shuffled = batch.select(torch.tensor([4, 1, 3, 0, 2]))
    for one in (batch, shuffled):
        check(one, spec)


def test_microbatches_of_equal_lengths_differ_in_tail_padding_only() -> None:
    batch = make_batch([(3, [4, 6], False), (5, [9], False)])
    before = [pack(batch, torch.tensor(rows), {}, PackingSpec(64)) for rows in ([0], [1, 2])]
    after = equal_lengths(before)
    assert len({len(m.tokens) for m in after}) == 1
    for short, padded in zip(before, after, strict=True):
        n = len(short.tokens)
        assert torch.equal(padded.tokens[:n], short.tokens)
        assert torch.equal(padded.positions[:n], short.positions)
        assert not padded.tokens[n:].any()
        assert padded.scored is short.scored
        assert padded.attention is short.attention
