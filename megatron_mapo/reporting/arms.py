"""Runs of several configurations and seeds, paired for a comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mapo.errors import ConfigError, DataError
from megatron_mapo.reporting.run_data import RunData, first_of, load_run
from megatron_mapo.rollout.evaluation import GREEDY
from megatron_mapo.tracking.jsonl import Row

# Keys that may differ between the seeds of one configuration: where and when it runs, and what it writes beside.
_INCIDENTAL = re.compile(
    r"run\..*|rollout\.(urls|urls_file|api_key_file|server\..*|sync\..*|timeout|retries|max_failures|.*_timeout)"
    r"|tracking\..*|reward\.(workers|timeout|memory_mb)"
    r"|trainer\.(save_interval|async_save|keep_.*|best_metric|verify_checkpoints|export|.*_timeout|threads"
    r"|straggler_ratio|max_skipped)"
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One configuration and its runs.

    Attributes:
        label: its name.
        runs: by seed.
        settings: the options that make the configuration, without those that say where and when it runs.
    """

    label: str
    runs: dict[int, RunData]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Arms with the same seeds; the first is the baseline.

    Attributes:
        arms: each has all of ``seeds``.
        seeds: S seeds.
        notes: what was left out, and why.
    """

    arms: list[Arm]
    seeds: list[int]
    notes: list[str]

    def values(self, arm: Arm, of_run: Any) -> Array:
        """``of_run(run)`` of every seed, ``[S]``."""
        return np.array([of_run(arm.runs[seed]) for seed in self.seeds], dtype=np.float64)


def label_of(name: str) -> str:
    """The configuration in a run's name: ``NAME-seed3`` is a run of ``NAME``."""
    return re.sub(r"[-_.]?seed[-_]?\d+$", "", name) or name


def collect(folders: Sequence[str | Path], baseline: str | None) -> Study:
    """Read finished runs and pair them by seed.

    Args:
        folders: of the runs. Those whose names differ only in the seed at their end are one configuration.
        baseline: label of the configuration that the others are compared with; None: the first.

    Raises:
        DataError: a folder is no run; runs of one name have different configurations; no seed is finished in all.
        ConfigError: there is no such baseline.
    """
    groups: dict[str, list[RunData]] = {}
    for folder in folders:
        run = load_run(folder)
        groups.setdefault(label_of(run.name), []).append(run)
    notes = [
        f"{run.name} is not finished (step {run.step} of {run.steps}) and is left out"
        for runs in groups.values()
        for run in runs
        if not run.finished
    ]
    arms = [_arm(label, [run for run in runs if run.finished]) for label, runs in groups.items()]
    if baseline is not None:
        if baseline not in groups:
            raise ConfigError(f"--baseline {baseline}: there are only {', '.join(groups)}")
        arms.sort(key=lambda arm: arm.label != baseline)
    seeds = sorted(set.intersection(*(set(arm.runs) for arm in arms)))
    if not seeds:
        found = "; ".join(f"{arm.label}: {sorted(arm.runs) or 'none'}" for arm in arms)
        raise DataError(f"no run.seed is finished in all configurations ({found}); runs are paired by their seed")
    for arm in arms:
        alone = sorted(set(arm.runs) - set(seeds))
        if alone:
            notes.append(f"{arm.label}: seeds {', '.join(map(str, alone))} are not in all configurations; left out")
    return Study(arms, seeds, notes)


def _arm(label: str, runs: Sequence[RunData]) -> Arm:
    settings = [{k: v for k, v in run.config.items() if not _INCIDENTAL.fullmatch(k)} for run in runs]
    by_seed: dict[int, RunData] = {}
    for run, mine in zip(runs, settings, strict=True):
        differ = sorted(k for k in mine.keys() | settings[0].keys() if mine.get(k) != settings[0].get(k))
        if differ:
            raise DataError(
                f"{runs[0].folder} and {run.folder} are named as seeds of one configuration ({label}) but differ in "
                f"{', '.join(differ)}: rename one (run.name)"
            )
        seed = int(run.config["run.seed"])
        if seed in by_seed:
            raise DataError(f"{by_seed[seed].folder} and {run.folder} are both {label} with run.seed={seed}")
        by_seed[seed] = run
    return Arm(label, by_seed, settings[0] if settings else {})


def differences(arms: Sequence[Arm]) -> list[tuple[str, list[Any]]]:
    """Options that are not the same in all arms: the key, and its value in each."""
    keys = dict.fromkeys(key for arm in arms for key in arm.settings)
    found = [(key, [arm.settings.get(key) for arm in arms]) for key in keys]
    return [(key, values) for key, values in found if any(value != values[0] for value in values)]


def pass_tables(study: Study, at_start: bool = False) -> list[Array] | None:
    """Share of right responses to every held-out question.

    Sampled responses count; without any, the greedy one.

    Args:
        study: the runs.
        at_start: of the evaluation before the first step, not of the last one.

    Returns:
        ``[S, Q]`` of each arm; None if a run did not keep the responses of this evaluation.

    Raises:
        DataError: the runs were asked different questions, or an evaluation is incomplete.
    """
    tables, asked, first = [], None, None
    for arm in study.arms:
        rows = []
        for seed in study.seeds:
            run = arm.runs[seed]
            last = run.last_evaluation
            samples = run.evaluation_samples(0) if at_start else run.evaluation_samples(last["step"]) if last else []
            if not samples:
                return None
            questions, shares = _shares(samples, run.folder)
            if asked is None:
                asked, first = questions, run.folder
            if questions != asked:
                raise DataError(f"{first} and {run.folder} were asked different held-out questions (data.eval)")
            rows.append(shares)
        tables.append(np.array(rows, dtype=np.float64))
    return tables


def _shares(samples: Sequence[Row], folder: Path) -> tuple[list[tuple[int, str, str]], list[float]]:
    """Questions of an evaluation, by their ids, and the share of right responses to each."""
    right: dict[tuple[int, str, str], list[bool]] = {}
    greedy_only = all(row["sample"] == GREEDY for row in samples)
    for row in samples:
        if greedy_only or row["sample"] != GREEDY:
            right.setdefault((row["prompt_id"], row["prompt"], row["answer"]), []).append(bool(row["right"]))
    questions = sorted(right)
    if len({len(right[question]) for question in questions}) != 1:
        raise DataError(f"{folder}/evaluation_samples: questions have different numbers of responses")
    return questions, [float(np.mean(right[question])) for question in questions]


def metric_curves(study: Study, arm: Arm, *names: str) -> tuple[Array, Array]:
    """A metric over steps: at each the first of ``names`` that the run has.

    Returns:
        steps ``[T]``, that any run has, and values ``[S, T]``, NaN where a run has none.
    """
    return _curves([arm.runs[seed].metrics for seed in study.seeds], names)


def evaluation_curves(study: Study, arm: Arm, name: str) -> tuple[Array, Array]:
    """The same of a number of ``evaluations.jsonl``."""
    return _curves([arm.runs[seed].evaluations for seed in study.seeds], [name])


def _curves(tables: Sequence[Sequence[Row]], names: Sequence[str]) -> tuple[Array, Array]:
    found = [{row["step"]: value for row in rows if (value := first_of(row, names)) is not None} for rows in tables]
    steps = sorted(set().union(*found))
    values = [[run.get(step, np.nan) for step in steps] for run in found]
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64).reshape(len(tables), len(steps))
