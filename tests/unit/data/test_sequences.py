"""SequenceBatch and the ragged helpers, against plain Python lists."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mapo.data.sequences import SequenceBatch, offsets_of, ragged_indices
from megatron_mapo.errors import DataError


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Sequences as plain Python rows; every third response is empty."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        length = 0 if i % 3 == 2 else rng.randint(1, 6)
        rows.append(
            {
                "prompt": [rng.randint(0, 99) for _ in range(rng.randint(1, 5))],
                "response": [rng.randint(0, 99) for _ in range(length)],
                "logprobs": [-rng.random() for _ in range(length)],
                "versions": [rng.randint(0, 3) for _ in range(length)],
                "reward": rng.random(),
                "group": rng.randint(0, 3),
                "truncated": rng.random() < 0.5,
                "extra": [rng.randint(0, 9), rng.randint(0, 9)],
            }
        )
    return rows


def make_batch(rows: list[dict]) -> SequenceBatch:
    return SequenceBatch.from_responses(
        [r["prompt"] for r in rows],
        [r["response"] for r in rows],
        rollout_logprobs=[r["logprobs"] for r in rows],
        weight_versions=[r["versions"] for r in rows],
        rewards=[r["reward"] for r in rows],
        group_ids=[r["group"] for r in rows],
        truncated=[r["truncated"] for r in rows],
        extra={"note": torch.tensor([r["extra"] for r in rows]).view(len(rows), 2)},
    )


def assert_rows(batch: SequenceBatch, rows: list[dict]) -> None:
    """The batch holds exactly these rows, in this order."""
    assert len(batch) == len(rows)
    at = response_at = 0
    for i, row in enumerate(rows):
        tokens = row["prompt"] + row["response"]
        assert int(batch.offsets[i]) == at
        assert batch.tokens[at : at + len(tokens)].tolist() == tokens
        assert int(batch.prompt_lens[i]) == len(row["prompt"])
        assert int(batch.lengths[i]) == len(tokens)
        here = slice(response_at, response_at + len(row["response"]))
        assert int(batch.response_offsets[i]) == response_at
        torch.testing.assert_close(batch.rollout_logprobs[here], torch.tensor(row["logprobs"], dtype=torch.float32))
        assert batch.weight_versions[here].tolist() == row["versions"]
        assert batch.response_sequence[here].tolist() == [i] * len(row["response"])
        assert float(batch.rewards[i]) == pytest.approx(row["reward"])
        assert int(batch.group_ids[i]) == row["group"]
        assert bool(batch.truncated[i]) is row["truncated"]
        assert batch.extra["note"][i].tolist() == row["extra"]
        at, response_at = at + len(tokens), response_at + len(row["response"])
    assert len(batch.tokens) == int(batch.offsets[-1]) == at
    assert len(batch.rollout_logprobs) == int(batch.response_offsets[-1]) == response_at


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=12))
@settings(deadline=None, max_examples=50)
def test_ragged_indices_is_a_loop_over_rows(rows: list[tuple[int, int]]) -> None:
    starts = torch.tensor([s for s, _ in rows], dtype=torch.int64)
    lengths = torch.tensor([n for _, n in rows], dtype=torch.int64)
    expected = [s + i for s, n in rows for i in range(n)]
    found = ragged_indices(starts, lengths)
    assert found.tolist() == expected
    assert found.dtype == torch.int64
    assert offsets_of(lengths).tolist() == [sum(n for _, n in rows[:i]) for i in range(len(rows) + 1)]


def test_from_responses_holds_every_row() -> None:
    rows = make_rows(8)
    assert_rows(make_batch(rows), rows)


def test_columns_that_are_not_given_are_zeros_and_groups_are_own() -> None:
    batch = SequenceBatch.from_responses([[1], [2, 3]], [[4, 5], []])
    assert batch.rollout_logprobs.tolist() == [0, 0]
    assert batch.weight_versions.tolist() == [0, 0]
    assert batch.rewards.tolist() == [0, 0]
    assert batch.group_ids.tolist() == [0, 1]
    assert batch.truncated.tolist() == [False, False]


@pytest.mark.parametrize("index", [[3, 0, 0, 7], [], [2], [5, 4, 3, 2, 1]])
def test_select_takes_rows_in_the_order_asked_for(index: list[int]) -> None:
    rows = make_rows(8)
    found = make_batch(rows).select(torch.tensor(index, dtype=torch.int64))
    assert_rows(found, [rows[i] for i in index])


def test_select_by_mask() -> None:
    rows = make_rows(8)
    mask = torch.tensor([i % 2 == 0 for i in range(8)])
    assert_rows(make_batch(rows).select(mask), rows[::2])


def test_concat_is_all_rows_in_order() -> None:
    rows = make_rows(9)
    parts = [make_batch(rows[a:b]) for a, b in ((0, 4), (4, 4), (4, 9))]
    assert_rows(SequenceBatch.concat(parts), rows)


def test_only_empty_responses() -> None:
    batch = SequenceBatch.from_responses([[1, 2], [3]], [[], []])
    assert batch.response_lens.tolist() == [0, 0]
    assert batch.response_sequence.tolist() == []
    assert SequenceBatch.concat([batch, batch]).select(torch.tensor([3])).tokens.tolist() == [3]


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    batch = make_batch(make_rows(8)).select(torch.tensor([6, 1, 2]))
    batch.save(tmp_path / "batch.safetensors")
    loaded = SequenceBatch.load(tmp_path / "batch.safetensors")
    before, after = batch.to_tensors(), loaded.to_tensors()
    assert before.keys() == after.keys()
    for name, column in before.items():
        assert column.dtype == after[name].dtype, name
        assert torch.equal(column, after[name]), name


def test_concat_refuses_nothing_and_unlike_columns() -> None:
    with pytest.raises(DataError, match="at least one batch"):
        SequenceBatch.concat([])
    plain = SequenceBatch.from_responses([[1]], [[2]])
    with pytest.raises(DataError, match="different extra columns"):
        SequenceBatch.concat([plain, make_batch(make_rows(1))])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", torch.zeros(12, dtype=torch.int64), "tokens must be a flat torch.int32"),
        ("tokens", torch.zeros(3, 4, dtype=torch.int32), "tokens must be a flat torch.int32"),
        ("tokens", torch.zeros(11, dtype=torch.int32), "offsets and prompt_lens do not fit"),
        ("prompt_lens", torch.tensor([4, 100]), "offsets and prompt_lens do not fit"),
        ("rewards", torch.zeros(3), "rewards has 3 rows, expected 2"),
        ("group_ids", torch.zeros(1, dtype=torch.int64), "group_ids has 1 rows, expected 2"),
        ("rollout_logprobs", torch.zeros(3), "rollout_logprobs has 3 values for 4 response tokens"),
        ("weight_versions", torch.zeros(9, dtype=torch.int32), "weight_versions has 9 values for 4"),
        ("extra", {"note": torch.zeros(5)}, r"extra\['note'\] has 5 rows, expected 2"),
    ],
)
def test_columns_that_do_not_fit_are_named(name: str, value: object, message: str) -> None:
    columns = vars(SequenceBatch.from_responses([[1] * 4, [2] * 4], [[3] * 3, [4]])).copy()
    with pytest.raises(DataError, match=message):
        SequenceBatch(**columns | {name: value})


def test_missing_columns_and_responses_are_named() -> None:
    tensors = SequenceBatch.from_responses([[1]], [[2]]).to_tensors()
    del tensors["rewards"], tensors["truncated"]
    with pytest.raises(DataError, match=r"missing columns \['rewards', 'truncated'\]"):
        SequenceBatch.from_tensors(tensors)
    with pytest.raises(DataError, match="2 prompts but 1 responses"):
        SequenceBatch.from_responses([[1], [2]], [[3]])
