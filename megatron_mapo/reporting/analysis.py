"""The numbers of a comparison, from a ``Study``: plain values that go into ``summary.json`` and onto the page."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mapo.algorithms.comparison import (
    Estimate,
    crossed_mean,
    first_reaching,
    holm,
    paired_difference,
    trailing_mean,
)
from megatron_mapo.reporting.arms import Arm, Array, Study, evaluation_curves, metric_curves, pass_tables
from megatron_mapo.reporting.run_data import TRAINING_ACCURACY, RunData, first_of
from megatron_mapo.reporting.run_report import histogram, response_tokens
from megatron_mapo.tracking.rollouts import read_rollouts, step_of

LEVEL = 0.05
MIN_SEEDS = 3
"""Fewer are never called better or worse: two seeds find a difference that is not there too often (docs/compare.md)."""
TARGET_WINDOW = 5
"""Steps over which the training accuracy is averaged before it is compared with the target."""


@dataclass(frozen=True)
class Contrast:
    """One configuration against the baseline.

    Attributes:
        label: of the configuration.
        estimate: its value less the baseline's.
        adjusted: p-value after Holm's correction over all configurations; None with fewer than ``MIN_SEEDS`` seeds.
        verdict: what may be said, in words.
    """

    label: str
    estimate: Estimate
    adjusted: float | None
    verdict: str


@dataclass(frozen=True)
class Outcome:
    """One quantity in all arms.

    Attributes:
        name: the quantity.
        arms: estimate of each arm, the baseline first.
        contrasts: of all arms but the baseline.
    """

    name: str
    arms: list[Estimate]
    contrasts: list[Contrast]


@dataclass(frozen=True)
class Reaching:
    """When a run's accuracy reached the target; None: it never did."""

    steps: float | None
    tokens: float | None


def outcome(name: str, tables: list[Array], study: Study, seed: int = 0) -> Outcome:
    """Estimates of all arms and their differences to the first.

    Args:
        name: the quantity.
        tables: ``[S, Q]`` of each arm, in the order of ``study.arms``.
        study: names the arms.
        seed: of the bootstrap.
    """
    comparisons = len(tables) - 1
    arms = [crossed_mean(table, seed) for table in tables]
    found = [paired_difference(table, tables[0], seed, comparisons) for table in tables[1:]]
    adjusted = holm([estimate.p_value for estimate in found])
    tested = len(study.seeds) >= MIN_SEEDS
    contrasts = [
        Contrast(arm.label, e, p if tested else None, _verdict(arm.label, study.arms[0].label, e, p, comparisons))
        for arm, e, p in zip(study.arms[1:], found, adjusted, strict=True)
    ]
    return Outcome(name, arms, contrasts)


def _verdict(label: str, baseline: str, estimate: Estimate, adjusted: float, comparisons: int) -> str:
    """What the numbers allow to say. A difference needs ``MIN_SEEDS`` seeds, and survives Holm's correction."""
    if estimate.seeds == 1:
        return "one seed each: the interval is of questions only; nothing follows about other seeds"
    if estimate.seeds < MIN_SEEDS:
        return f"no verdict: {estimate.seeds} seeds each are too few for one, it takes at least {MIN_SEEDS}"
    if estimate.standard_error == 0 and estimate.value == 0:
        return "no significant difference: equal for every seed and question"
    if estimate.standard_error == 0:
        return "no scatter between seeds and questions to compare the difference with: not tested"
    if adjusted < LEVEL:
        return f"{label} is {'better' if estimate.value > 0 else 'worse'} than {baseline}"
    corrected = " after Holm's correction" if comparisons > 1 and estimate.p_value < LEVEL else ""
    power = f"a true difference of {estimate.detectable:.3f} would have been found with 80 % probability"
    return f"no significant difference{corrected}; {power}"


def final_pass(study: Study) -> tuple[Outcome | None, str]:
    """pass@1 of each run's last evaluation, and what it was made from."""
    last = [arm.runs[seed].last_evaluation for arm in study.arms for seed in study.seeds]
    if any(row is None or row.get("pass_at_1") is None for row in last):
        return None, "not all runs have an evaluation of trained weights (data.eval, trainer.evaluation)"
    when = ", ".join(str(step) for step in sorted({row["step"] for row in last if row is not None}))
    tables = pass_tables(study)
    if tables is not None:
        return outcome("held-out pass@1", tables, study), f"the responses in evaluation_samples/ after step {when}"

    def score(run: RunData) -> float:
        assert run.last_evaluation is not None
        return run.last_evaluation["pass_at_1"]

    columns = [study.values(arm, score)[:, None] for arm in study.arms]
    source = f"evaluations.jsonl after step {when}, without single questions: paired by seed only"
    return outcome("held-out pass@1", columns, study), source


def training_accuracy(study: Study) -> Outcome | None:
    """Mean over all steps of the accuracy of what was sampled: how much was learned, and how early."""
    columns = [np.nanmean(metric_curves(study, arm, *TRAINING_ACCURACY)[1], axis=1)[:, None] for arm in study.arms]
    if not all(column.size and np.isfinite(column).all() for column in columns):
        return None
    return outcome("training accuracy, mean over all steps", columns, study)


def same_start(study: Study) -> float | None:
    """Largest difference between arms, over seeds and questions, before the first step; None if not evaluated."""
    if not all(arm.runs[seed].evaluation_samples(0) for arm in study.arms for seed in study.seeds):
        return None
    tables = pass_tables(study, at_start=True)
    assert tables is not None
    return max((float(np.abs(table - tables[0]).max()) for table in tables), default=0.0)


@dataclass(frozen=True)
class SamePrompts:
    """In how many steps, of all seeds, an arm was trained on the same prompts in the same order as the baseline."""

    same: int
    steps: int


def same_prompts(study: Study) -> dict[str, SamePrompts] | None:
    """Of all arms but the baseline, by label, from ``rollouts/``; None if a run did not keep them."""
    if any(not arm.runs[seed].rollouts for arm in study.arms for seed in study.seeds):
        return None
    asked = [[_prompt_ids(arm.runs[seed]) for seed in study.seeds] for arm in study.arms]
    found = {}
    for arm, mine in zip(study.arms[1:], asked[1:], strict=True):
        pairs = [
            (ours.get(step), theirs.get(step))
            for ours, theirs in zip(mine, asked[0], strict=True)
            for step in ours.keys() | theirs.keys()
        ]
        found[arm.label] = SamePrompts(sum(ours == theirs for ours, theirs in pairs), len(pairs))
    return found


def _prompt_ids(run: RunData) -> dict[int, list[int]]:
    """Of every step the prompt of each group, in their order."""
    found = {}
    for file in run.rollouts:
        rows = read_rollouts(file, ("group", "prompt_id"))
        prompt_of = dict(zip(rows["group"].to_pylist(), rows["prompt_id"].to_pylist(), strict=True))
        found[step_of(file)] = list(prompt_of.values())
    return found


def reaching(run: RunData, target: float, held_out: bool) -> Reaching:
    """Steps and response tokens until an accuracy was reached.

    Args:
        run: a run.
        target: the accuracy.
        held_out: pass@1 of the evaluations; else the training accuracy, averaged over ``TARGET_WINDOW`` steps.
    """
    rows = run.evaluations if held_out else run.metrics
    names = ["pass_at_1"] if held_out else TRAINING_ACCURACY
    values = np.array([first_of(row, names) for row in rows], dtype=np.float64)  # None becomes NaN
    index = first_reaching(values if held_out else trailing_mean(values, min(TARGET_WINDOW, max(1, len(rows)))), target)
    if index is None:
        return Reaching(None, None)
    step = rows[index]["step"]
    return Reaching(float(step), sum(response_tokens(row) for row in run.metrics if row["step"] <= step))


def evaluations_between(study: Study) -> bool:
    """Whether held-out accuracy was measured often enough to tell when it reached something."""
    return all(len(evaluation_curves(study, arm, "pass_at_1")[0]) > 2 for arm in study.arms)


@dataclass(frozen=True)
class AdvantagesByRate:
    """Groups by their success rate, over all steps and seeds of an arm.

    Attributes:
        rate: the B different success rates p.
        groups: ``[B]``, share of groups.
        positive, negative: ``[B]``, mean advantage of the responses above and below 0; NaN where there are none.
        weight: ``[B]``, share of Σ|A|·length: what stands for the part that these groups have in the gradient with
            loss.aggregation=token, where that was not measured (see ``gradients_by_rate``).
    """

    rate: Array
    groups: Array
    positive: Array
    negative: Array
    weight: Array


def advantages_by_rate(study: Study, arm: Arm) -> AdvantagesByRate | None:
    """From ``rollouts/``; None if a run did not keep them."""
    files = [file for seed in study.seeds for file in arm.runs[seed].rollouts]
    if any(not arm.runs[seed].rollouts for seed in study.seeds):
        return None
    columns = ("p", "advantage", "length", "group")
    parts = [read_rollouts(file, columns).to_pydict() for file in files]
    p, advantage, length = (
        np.concatenate([np.asarray(part[name], dtype=np.float64) for part in parts]) for name in columns[:3]
    )
    # A group counts once, whatever its size.
    sizes = [np.unique(part["group"], return_inverse=True, return_counts=True)[1:] for part in parts]
    one = np.concatenate([1.0 / counts[index] for index, counts in sizes])
    rate, place = np.unique(np.round(p, 3), return_inverse=True)
    weight = np.bincount(place, np.abs(advantage) * length)

    def mean(chosen: Array) -> Array:
        count = np.bincount(place, chosen)
        return np.divide(np.bincount(place, advantage * chosen), count, out=np.full(len(rate), np.nan), where=count > 0)

    return AdvantagesByRate(
        rate,
        np.bincount(place, one) / one.sum(),
        mean((advantage > 0).astype(np.float64)),
        mean((advantage < 0).astype(np.float64)),
        weight / max(weight.sum(), 1e-300),
    )


def mean_histogram(study: Study, arm: Arm, name: str) -> Array | None:
    """A histogram of ``metrics.jsonl``, mean over steps and seeds, ``[bins]``."""
    found = [histogram(arm.runs[seed].metrics, name) for seed in study.seeds]
    shares = [table[1].mean(1) for table in found if table is not None]
    return np.mean(shares, axis=0) if shares else None


def gradients_by_rate(study: Study, arm: Arm) -> Array | None:
    """Norm of the gradient of the groups of each bin of p, mean over the steps that had it measured and seeds.

    Returns:
        ``[bins]``, the bins of ``group/p_hist``; NaN where no such group had a gradient. None if a run did not measure
        it (``tracking.gradients_every``).
    """
    found = [histogram(arm.runs[seed].metrics, "gradient/p") for seed in study.seeds]
    tables = [table[1] for table in found if table is not None]
    if len(tables) < len(found):
        return None
    norms = np.concatenate(tables, axis=1)
    there = norms > 0
    count = there.sum(1)
    return np.divide((norms * there).sum(1), count, out=np.full(len(norms), np.nan), where=count > 0)


def clipped_share(run: RunData) -> float:
    """Share of steps whose largest gradient was clipped (``actor.optim.clip_grad``); NaN where that is not known."""
    norms = [norm for row in run.metrics if (norm := row.get("optim/grad_norm")) is not None]
    limit = float(run.config["actor.optim.clip_grad"])
    return float(np.mean([norm > limit for norm in norms])) if norms else math.nan


def seconds(run: RunData) -> float:
    """Time in training steps."""
    return float(sum(row.get("seconds/step") or 0.0 for row in run.metrics))


def whole_seconds(run: RunData) -> float:
    """Wall time from the first start of the trainers to the last row; NaN for runs of earlier versions."""
    if not run.starts or not run.moments:
        return math.nan
    return max(run.moments) - min(run.moments)


def plain(value: Any) -> Any:
    """Dataclasses and arrays as values that JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
