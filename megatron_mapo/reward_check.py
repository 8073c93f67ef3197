"""Run verifiers over responses in a file: how often they are right, where they differ, what fails, how fast they are.

The same processes and limits as in training. A row has a question, a reference answer, a response and perhaps a
label; a run's ``samples.jsonl`` and ``evaluation_samples/*.jsonl`` have what is needed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mapo.algorithms.evaluation import is_right
from megatron_mapo.config import Config, OnFailure, RewardConfig, load_config, single_verifier
from megatron_mapo.data.prompts import read_records
from megatron_mapo.errors import ConfigError, DataError
from megatron_mapo.rewards.pool import RewardPool, Verdict
from megatron_mapo.rollout.scoring import right_verdicts

RESPONSE = "response"
QUESTION_OF_SAMPLES = "prompt"
"""The question's column in files of samples."""
_AT_A_TIME = 1024
_EXCERPT = 60
_LIMITS = ("timeout", "memory", "died")


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        data: file of rows.
        rewards: verifiers, as ``reward.name``; none: the configuration's.
        against: a verifier that the others are compared with.
        label_key: column that says whether a response is right.
        output: file to write, one row a response.
        limit: only the first this many rows.
        show: differing rows to print.
        config: YAML file with sections ``reward`` and ``data``.
        overrides: ``section.key=value``.
    """

    data: Path
    rewards: Sequence[str] = ()
    against: str | None = None
    label_key: str | None = None
    output: Path | None = None
    limit: int | None = None
    show: int = 10
    config: str | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One response; ``where`` it stands; ``label``: it is right, as the file says."""

    where: str
    question: str
    answer: str
    response: str
    label: bool | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What one verifier says of N rows.

    Attributes:
        name: of the verifier.
        verdicts, right, extracted: N; ``extracted`` is None where no answer was found, or nothing looks for one.
        seconds: that the judgements took.
    """

    name: str
    verdicts: list[Verdict]
    right: list[bool]
    extracted: list[str | None]
    seconds: float


def reward_check(request: Request) -> list[Outcome]:
    """Run the verifiers and print what they say.

    Returns:
        an outcome a verifier: those of ``rewards``, then ``against``.

    Raises:
        ConfigError: a verifier or an option is wrong.
        DataError: the file or a row cannot be used.
    """
    config = _config(request)
    verifiers = _verifiers(request, config)
    rows = read_rows(request, config)
    if request.output is not None and not request.output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {request.output.parent}")
    progress = Console(stderr=True, highlight=False, markup=False)
    outcomes = [_judge(name, reward, rows, config.right_from, progress) for name, reward in verifiers.items()]
    if request.output is not None:
        write_rows(request.output, rows, outcomes)
    console = Console(highlight=False, markup=False, width=None if progress.is_terminal else 160)
    _print(console, rows, outcomes, request)
    return outcomes


def read_rows(request: Request, config: Config) -> list[Row]:
    """The rows of ``request.data``.

    Raises:
        DataError: names the row and the column.
    """
    records = read_records(request.data, "--data")
    rows: list[Row] = []
    for where, record in records:
        if len(rows) == request.limit:
            break
        rows.append(_row(where, record, request, config))
    if not rows:
        raise DataError(f"--data: {request.data} has no rows")
    return rows


def write_rows(path: Path, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    """All rows with all verdicts, one JSON object a line, in one step.

    Raises:
        ConfigError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.writelines(json.dumps(_line(i, row, outcomes)) + "\n" for i, row in enumerate(rows))
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror}") from error


# ------------------------------------------------------------------------------------------ what to run


def _config(request: Request) -> Config:
    # Only `reward` and `data` are of interest: mandatory keys of a run may be missing.
    needless = ["model.path=none", "data.train=none"] if request.config is None else []
    native = "actor.adv_norm.aggregation_mode=native"  # nothing is trained, so nothing is needed of the rewards
    return load_config(request.config, [*needless, *request.overrides, native])


def _verifiers(request: Request, config: Config) -> dict[str, RewardConfig]:
    """By the name that reports give them."""
    # A failure is counted here, whatever it does in training.
    reward = dataclasses.replace(config.reward, on_failure=OnFailure.wrong)
    names = [*request.rewards, *([request.against] if request.against is not None else [])]
    if len(set(names)) < len(names):
        raise ConfigError(f"--reward, --against: a verifier is named twice: {', '.join(names)}")
    chosen = {name: single_verifier(reward, name, request.overrides) for name in names}
    if request.rewards:
        return chosen
    own = "mixture" if reward.mixture else reward.name
    if own in chosen:
        raise ConfigError(f"--against: {own} is what the configuration has; name another one, or one with --reward")
    return {own: reward} | chosen


def _row(where: str, record: Any, request: Request, config: Config) -> Row:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: must be an object with columns, got a {type(record).__name__}")
    data = config.data
    samples = data.prompt_key not in record and QUESTION_OF_SAMPLES in record
    question_key = QUESTION_OF_SAMPLES if samples else data.prompt_key
    keys = {"data.prompt_key": question_key, "data.answer_key": data.answer_key, "the response": RESPONSE}
    if request.label_key is not None:
        keys["--label-key"] = request.label_key
    for name, column in keys.items():
        if column not in record:
            raise DataError(f"{where}: no column {column!r} ({name}); columns: {', '.join(map(str, record))}")
    for name, column in (("data.prompt_key", question_key), ("the response", RESPONSE)):
        if not isinstance(record[column], str):
            raise DataError(f"{where}: column {column!r} ({name}) must be text, got {record[column]!r:.80}")
    answer = record[data.answer_key]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(
            f"{where}: column {data.answer_key!r} (data.answer_key) must be text or a number, got {answer!r:.80}"
        )
    label = None if request.label_key is None else _label(where, record[request.label_key], request.label_key, config)
    others = {str(key): value for key, value in record.items() if key not in keys.values()}
    return Row(where, record[question_key], str(answer), record[RESPONSE], label, others)


def _label(where: str, value: Any, column: str, config: Config) -> bool:
    """A bool, or a reward as a run's samples have it."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return bool(is_right(value, config.right_from))
    raise DataError(f"{where}: column {column!r} (--label-key) must be true, false or a reward, got {value!r:.80}")


def _judge(name: str, reward: RewardConfig, rows: Sequence[Row], right_from: float, progress: Console) -> Outcome:
    with RewardPool(reward) as pool, progress.status(name) as status:

        def show(done: int) -> None:
            status.update(f"{name}: {done} of {len(rows)}")

        started = time.monotonic()
        verdicts = asyncio.run(_verdicts(pool, rows, show))
        seconds = time.monotonic() - started
        responses = [row.response for row in rows]
        extracted: list[str | None] = [None] * len(rows)
        if pool.extracts:
            extracted = asyncio.run(pool.extract(responses))
    judged = right_verdicts(verdicts, right_from)
    right = [is_so and verdict.failure is None for is_so, verdict in zip(judged, verdicts, strict=True)]
    return Outcome(name, verdicts, right, extracted, seconds)


async def _verdicts(pool: RewardPool, rows: Sequence[Row], show: Callable[[int], None]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for start in range(0, len(rows), _AT_A_TIME):
        part = rows[start : start + _AT_A_TIME]
        verdicts += await pool.judge(
            [row.response for row in part],
            [row.answer for row in part],
            [row.metadata for row in part],
            [row.question for row in part],
        )
        show(len(verdicts))
    return verdicts


def _line(index: int, row: Row, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    verdicts = {}
    for outcome in outcomes:
        verdict = outcome.verdicts[index]
        verdicts[outcome.name] = {
            "right": outcome.right[index],
            "reward": verdict.reward,
            "rewards": verdict.parts,
            "extracted": outcome.extracted[index],
            "failure": None if verdict.failure is None else dataclasses.asdict(verdict.failure),
        }
    label = {} if row.label is None else {"label": row.label}
    texts = {"where": row.where, "question": row.question, "answer": row.answer, "response": row.response}
    return texts | label | {"verdicts": verdicts}


# ------------------------------------------------------------------------------------------- the report


def _print(console: Console, rows: Sequence[Row], outcomes: Sequence[Outcome], request: Request) -> None:
    console.print(_summary(rows, outcomes, request))
    for outcome in outcomes:
        failures = [(i, v.failure) for i, v in enumerate(outcome.verdicts) if v.failure is not None]
        if failures:
            index, first = failures[0]
            console.print(f"\n{outcome.name}: {len(failures)} failures; the first, {rows[index].where}: {first.text}")
    if request.label_key is not None:
        for outcome in outcomes:
            differ = [i for i, row in enumerate(rows) if row.label != outcome.right[i]]
            _print_differing(console, f"{outcome.name} differs from the label", differ, rows, [outcome], request)
    if request.against is not None:
        reference = outcomes[-1]
        for outcome in outcomes[:-1]:
            differ = [i for i in range(len(rows)) if outcome.right[i] != reference.right[i]]
            title = f"{outcome.name} differs from {reference.name}"
            _print_differing(console, title, differ, rows, [outcome, reference], request)
    if request.output is not None:
        console.print(f"\n{request.output}: all {len(rows)} rows")


def _summary(rows: Sequence[Row], outcomes: Sequence[Outcome], request: Request) -> Table:
    labelled = request.label_key is not None
    table = Table(title=f"{request.data}: {len(rows)} responses", title_justify="left", box=None, pad_edge=False)
    of_labels = ["agrees with label", "right, label wrong", "wrong, label right"] if labelled else []
    table.add_column("verifier")
    for name in (
        "right",
        "share",
        "no answer found",
        *of_labels,
        "timeouts",
        "other limits",
        "exceptions",
        "per second",
    ):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        n, right = len(rows), sum(outcome.right)
        kinds = Counter(v.failure.kind for v in outcome.verdicts if v.failure is not None)
        limits = [kinds.pop(kind, 0) for kind in _LIMITS]
        pairs = Counter((is_right, row.label) for is_right, row in zip(outcome.right, rows, strict=True))
        agrees = (pairs[True, True] + pairs[False, False]) / n
        against = [f"{agrees:.1%}", str(pairs[True, False]), str(pairs[False, True])] if labelled else []
        nothing = str(outcome.extracted.count(None)) if any(e is not None for e in outcome.extracted) else "-"
        failed = [str(limits[0]), str(sum(limits[1:])), str(sum(kinds.values()))]
        speed = f"{n / max(outcome.seconds, 1e-9):.0f}"
        table.add_row(outcome.name, str(right), f"{right / n:.1%}", nothing, *against, *failed, speed)
    return table


def _print_differing(
    console: Console,
    title: str,
    differ: Sequence[int],
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    request: Request,
) -> None:
    console.print(f"\n{title}: {len(differ)} of {len(rows)}")
    if not differ or not request.show:
        return
    table = Table(box=None, pad_edge=False)
    columns = ["row", "question", "answer", "response, its end", *(outcome.name for outcome in outcomes)]
    for name in columns:
        table.add_column(name, overflow="fold")
    for i in differ[: request.show]:
        row = rows[i]
        texts = [row.where.rpartition(", ")[2], _excerpt(row.question), _excerpt(row.answer), _end(row.response)]
        table.add_row(*texts, *(_opinion(outcome, i) for outcome in outcomes))
    console.print(table)
    if len(differ) > request.show:
        console.print(f"({len(differ) - request.show} more: --show N, or --output FILE for all)")


def _opinion(outcome: Outcome, index: int) -> str:
    failure = outcome.verdicts[index].failure
    if failure is not None:
        return f"failed: {failure.kind}"
    extracted = outcome.extracted[index]
    found = "" if extracted is None else f": {_excerpt(extracted)}"
    return ("right" if outcome.right[index] else "wrong") + found


def _excerpt(text: str) -> str:
    return _printable(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...")


def _end(text: str) -> str:
    return _printable(text if len(text) <= _EXCERPT else "..." + text[-_EXCERPT:])


def _printable(text: str) -> str:
    """Control characters as escapes: a response must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
