"""Prompts: read from files, Hugging Face datasets or reasoning-gym, turned into token ids, dealt out endlessly.

Three seams: ``load_prompts`` reads and tokenises a source once, ``PromptSet`` holds the result in a few flat
arrays, ``PromptStream`` deals prompts out in a seeded order and can be saved and resumed exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mapo.config import DATA_SUFFIXES, CurriculumConfig, DataConfig
from megatron_mapo.data.chat import PromptEncoder
from megatron_mapo.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_GYM = "reasoning_gym:"
EVAL_SEED_SHIFT = 1_000_003


@dataclass(frozen=True)
class Prompt:
    """One question, ready to be sent to a server and scored.

    Attributes:
        id: row number in its ``PromptSet``.
        token_ids: the chat prompt, up to where the response begins.
        question: the question as the data has it, before ``data.template``.
        answer: the reference answer as the data has it; the verifier extracts what it needs.
        metadata: the row's other columns (JSON types); for reasoning-gym the entry that its
            scorer asks for.
    """

    id: int
    token_ids: list[int]
    question: str
    answer: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _Row:
    """A checked row before tokenisation; ``where`` says in messages where it stands."""

    where: str
    question: str
    answer: str
    metadata: str


class PromptSet(Sequence[Prompt]):
    """All prompts of a source. Token ids are one flat int32 array, metadata JSON text: cheap to hold and to share."""

    def __init__(self, rows: Sequence[_Row], token_ids: Sequence[Sequence[int]]) -> None:
        self._questions = [row.question for row in rows]
        self._answers = [row.answer for row in rows]
        self._metadata = [row.metadata for row in rows]
        self._offsets = np.cumsum([0, *map(len, token_ids)])
        self._tokens = np.fromiter((t for ids in token_ids for t in ids), dtype=np.int32, count=int(self._offsets[-1]))

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return Prompt(
            id=row,
            token_ids=self._tokens[self._offsets[row] : self._offsets[row + 1]].tolist(),
            question=self._questions[row],
            answer=self._answers[row],
            metadata=json.loads(self._metadata[row]),
        )

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[N]``, tokens of each prompt."""
        return np.diff(self._offsets)

    def fingerprint(self) -> str:
        """SHA-256 over questions, answers and metadata. Not over tokens: some chat templates write today's date."""
        digest = hashlib.sha256()
        for column in (self._questions, self._answers, self._metadata):
            digest.update(json.dumps(column).encode())
        return digest.hexdigest()


def load_prompts(
    source: str,
    split: str,
    data_config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    *,
    key: str = "data.train",
    limit: int | None = None,
) -> PromptSet:
    """Read a source and turn every question into token ids.

    Args:
        source: a ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file, ``name[:config]`` of a Hugging
            Face dataset (or a local dataset folder), or ``reasoning_gym:task``.
        split: split of a Hugging Face dataset. For reasoning-gym: any split but ``data.train_split`` shifts the
            task's seed, so that training and held-out rows are drawn apart. Files have no splits.
        data_config: section ``data``.
        tokenizer: of the model; see ``PromptEncoder`` for how text becomes ids.
        max_prompt_tokens: ``rollout.max_prompt_tokens``.
        key: configuration key that ``source`` came from, for messages.
        limit: only the first this many rows.

    Raises:
        DataError: the source cannot be read, has no rows, lacks a column, has a malformed row, or a prompt is
            too long. The message names the row and the key to change.
    """
    rows = _read(source, split, data_config, key)
    rows = _without_repeats(rows)[:limit] if data_config.deduplicate else rows[:limit]
    if not rows:
        raise DataError(f"{key}: {source} has no rows")
    encoder = PromptEncoder(tokenizer, data_config.system)
    template = data_config.template
    # replace(), not format(): braces are common in mathematical text.
    texts = [template.replace("{question}", row.question) for row in rows]
    token_ids = encoder.encode(texts, [row.where for row in rows])
    for row, ids in zip(rows, token_ids, strict=True):
        if len(ids) > max_prompt_tokens:
            raise DataError(
                f"{row.where}: the prompt has {len(ids)} tokens, more than rollout.max_prompt_tokens "
                f"({max_prompt_tokens}): raise it, or remove the row from {key}"
            )
    return PromptSet(rows, token_ids)


def _without_repeats(rows: list[_Row]) -> list[_Row]:
    """Rows whose question, up to spaces, stands in no earlier row."""
    first: dict[str, _Row] = {}
    for row in rows:
        earlier = first.setdefault(" ".join(row.question.split()), row)
        if earlier.answer != row.answer:
            raise DataError(
                f"{row.where}: the question of {earlier.where} with another answer ({row.answer!r}, there "
                f"{earlier.answer!r}): remove one of them, or set data.deduplicate=false"
            )
    return list(first.values())


def _read(source: str, split: str, data_config: DataConfig, key: str) -> list[_Row]:
    if source.startswith(REASONING_GYM):
        return _read_reasoning_gym(source.removeprefix(REASONING_GYM), split, data_config, key)
    path = Path(source)
    records = read_records(path, key) if path.suffix in DATA_SUFFIXES else _dataset_records(source, split, key)
    return [_checked_row(where, record, data_config) for where, record in records]


def read_records(path: Path, key: str) -> Iterable[tuple[str, Any]]:
    """Records of a ``.jsonl``, ``.json`` or ``.parquet`` file, each with where it stands, for messages.

    Raises:
        DataError: it does not exist, has another ending, or cannot be read. ``key`` is what named it.
    """
    readers: dict[str, Callable[[Path], Iterable[tuple[str, Any]]]] = {
        ".jsonl": _jsonl_records,
        ".json": _json_records,
        ".parquet": _parquet_records,
    }
    if not path.is_file():
        raise DataError(f"{key}: no such file: {path}")
    if path.suffix not in readers:
        raise DataError(f"{key}: {path} needs one of the endings {', '.join(readers)}")
    return readers[path.suffix](path)


def _jsonl_records(path: Path) -> Iterable[tuple[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not a JSON object: {error.msg} at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from error


def _json_records(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must be a list of objects, got a {type(rows).__name__} (one object a line: .jsonl)")
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _parquet_records(path: Path) -> Iterable[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    table = table.select([field.name for field in table.schema if _is_json_type(field.type)])
    return ((f"{path}, row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))


def _dataset_records(source: str, split: str, key: str) -> Iterable[tuple[str, Any]]:
    """Rows of a Hugging Face dataset. Remote code never runs: `datasets` has no support for it any more."""
    import datasets

    name, _, subset = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{key}: the dataset {name!r} (configuration {subset or 'default'!r}, split {split!r}) cannot be loaded: "
            f"{' '.join(str(error).split())}. A file needs one of the endings {', '.join(DATA_SUFFIXES)}; a dataset "
            "of the Hugging Face hub needs a network or a filled cache"
        ) from error
    columns = [c for c in dataset.column_names if _is_json_type(dataset.features.arrow_schema.field(c).type)]
    dataset = dataset.select_columns(columns)
    return ((f"{source}, split {split}, row {number}", row) for number, row in enumerate(dataset, start=1))


def _is_json_type(kind: Any) -> bool:
    """Whether an Arrow type is made of text, numbers and booleans. Others (images, dates) cannot be metadata."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_json_type(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_json_type(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind)
    return bool(text or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _checked_row(where: str, record: Any, data_config: DataConfig) -> _Row:
    """Question, answer and the other columns of a record, or a ``DataError`` that says what is wrong."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: must be an object with columns, got a {type(record).__name__}")
    for key, column in (("data.prompt_key", data_config.prompt_key), ("data.answer_key", data_config.answer_key)):
        if column not in record:
            raise DataError(f"{where}: no column {column!r} ({key}); columns: {', '.join(map(str, record))}")
    question, answer = record[data_config.prompt_key], record[data_config.answer_key]
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: column {data_config.prompt_key!r} (data.prompt_key) must be text, got {question!r}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(
            f"{where}: column {data_config.answer_key!r} (data.answer_key) must be text or a number, got {answer!r}"
        )
    used = (data_config.prompt_key, data_config.answer_key)
    return _Row(where, question, str(answer), json.dumps({k: v for k, v in record.items() if k not in used}))


def _read_reasoning_gym(task: str, split: str, data_config: DataConfig, key: str) -> list[_Row]:
    """Entries of a procedural task. ``data.options`` go to the task; ``seed`` and ``size`` are among them.

    A prompt's metadata is the whole entry; ``entry["metadata"]["source_dataset"]`` names the task, which is what
    ``reasoning_gym.get_score_answer_fn`` asks for. A task without a single reference answer (``None``) gets the
    empty string; its scorer does not need one.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise DataError(f"{key}: reasoning-gym has no task {task!r}; tasks: {', '.join(sorted(DATASETS))}")
    options: dict[str, Any] = {"seed": 0, **data_config.options}
    try:
        if split != data_config.train_split:
            options["seed"] += EVAL_SEED_SHIFT
        dataset = reasoning_gym.create_dataset(task, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(
            f"data.options {data_config.options} do not fit the reasoning-gym task {task}: {error}"
        ) from error
    rows = []
    for number, entry in enumerate(dataset, start=1):
        where = f"{REASONING_GYM}{task}, row {number}"
        metadata = {"source_dataset": task, **entry["metadata"]}
        try:
            text = json.dumps({"question": entry["question"], "answer": entry["answer"], "metadata": metadata})
        except TypeError as error:
            raise DataError(f"{where}: the task's metadata cannot be kept as JSON: {error}") from error
        rows.append(_Row(where, entry["question"], entry["answer"] or "", text))
    return rows


class PromptStream:
    """Endless prompts, epoch after epoch, in an order that depends only on ``seed`` and the epoch's number.

    Args:
        prompts: what to deal out.
        seed: ``run.seed``.
        shuffle: ``data.shuffle``; off gives the order of the data in every epoch.
        curriculum: ``data.curriculum``; which prompts are left out for some epochs (see ``record``).
    """

    def __init__(
        self, prompts: PromptSet, seed: int, shuffle: bool, curriculum: CurriculumConfig | None = None
    ) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._curriculum = curriculum or CurriculumConfig()
        self._fingerprint = prompts.fingerprint()
        self._epoch = 0
        self._position = 0
        self._rest: dict[int, int] = {}  # row: the epoch that it is back in
        self._left_out: list[int] = []  # rows that this epoch began without
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Complete passes over the data so far."""
        return self._epoch

    @property
    def resting(self) -> int:
        """Prompts that the curriculum leaves out of this epoch or the next ones."""
        return len(self._rest)

    def _order_of(self, epoch: int) -> np.ndarray:
        """Rows in the order of an epoch, without those that it leaves out."""
        order = np.arange(len(self._prompts))
        if self._shuffle:
            # RandomState, because numpy promises that its numbers stay the same in later versions.
            order = np.random.RandomState([self._seed, epoch]).permutation(len(self._prompts))
        return order[~np.isin(order, self._left_out)]

    def _next_epoch(self) -> None:
        """Begin the next epoch without the rows that rest; with all, if all rest."""
        self._epoch, self._position = self._epoch + 1, 0
        self._rest = {row: back for row, back in self._rest.items() if back > self._epoch}
        self._left_out = sorted(self._rest) if len(self._rest) < len(self._prompts) else []
        self._order = self._order_of(self._epoch)

    def record(self, rows: Sequence[int], rates: Sequence[float]) -> None:
        """Note the success rates that prompts were measured to have. Those out of bounds rest from the next epoch on.

        Args:
            rows: ids of prompts.
            rates: the share of successes among the responses to each.
        """
        low, high = self._curriculum.min_p, self._curriculum.max_p
        for row, rate in zip(rows, rates, strict=True):
            if (low is not None and rate < low) or (high is not None and rate > high):
                self._rest[row] = self._epoch + 1 + self._curriculum.rest_epochs
            else:
                self._rest.pop(row, None)

    def next(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts. A call that crosses an epoch's end goes on with the next epoch's order."""
        rows: list[int] = []
        while len(rows) < n:
            if self._position == len(self._order):
                self._next_epoch()
            taken = self._order[self._position : self._position + n - len(rows)]
            rows += taken.tolist()
            self._position += len(taken)
        return [self._prompts[row] for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: with the same data, ``load_state_dict`` continues exactly here."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "rest": {str(row): back for row, back in self._rest.items()},
            "left_out": self._left_out,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "size": len(self._prompts),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            CheckpointError: the data, the seed or the shuffling differ from the checkpoint's.
        """
        mine = self.state_dict()
        reasons = {
            "size": "data.train has another number of rows",
            "fingerprint": "the rows of data.train have changed",
            "seed": "run.seed differs",
            "shuffle": "data.shuffle differs",
        }
        for name, reason in reasons.items():
            if state[name] != mine[name]:
                raise CheckpointError(
                    f"cannot resume: {reason} since the checkpoint ({state[name]} then, {mine[name]} now); "
                    "restore it, or start a new run under another run.name"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._rest = {int(row): int(back) for row, back in state.get("rest", {}).items()}
        self._left_out = list(state.get("left_out", []))
        self._order = self._order_of(self._epoch)
