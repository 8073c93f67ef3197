"""The report of a comparison: ``report.html``, ``report.md``, pictures and ``summary.json`` in one folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mapo.algorithms.comparison import seed_band, trailing_mean
from megatron_mapo.errors import ConfigError
from megatron_mapo.reporting.analysis import (
    AdvantagesByRate,
    Outcome,
    Reaching,
    SamePrompts,
    advantages_by_rate,
    clipped_share,
    evaluations_between,
    final_pass,
    gradients_by_rate,
    mean_histogram,
    plain,
    reaching,
    same_prompts,
    same_start,
    seconds,
    training_accuracy,
    whole_seconds,
)
from megatron_mapo.reporting.arms import Array, Study, differences, evaluation_curves, metric_curves
from megatron_mapo.reporting.page import (
    Page,
    Picture,
    Section,
    Table,
    draw,
    figure_bytes,
    markdown,
    markdown_text,
    render,
    write_text,
)
from megatron_mapo.reporting.run_data import TRAINING_ACCURACY, RunData
from megatron_mapo.reporting.run_report import response_tokens
from megatron_mapo.tracking.jsonl import to_line
from megatron_mapo.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from megatron_mapo.tracking.progress import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (GREY, BLUE, ORANGE, GREEN, PURPLE, RED)
_BUDGET = ("trainer.steps", "rollout.prompts_per_step", "rollout.responses_per_prompt")
_SMOOTHED = 20
"""Curves of single steps are averaged over this part of the run."""
_UNEQUAL_CLIPPING = 0.1
"""Shares of clipped steps that differ by more are pointed out."""

Paint = Callable[["Figure"], None]


@dataclass(frozen=True)
class Results:
    """Everything that was computed."""

    study: Study
    held_out: Outcome | None
    held_out_source: str
    training: Outcome | None
    start: float | None
    prompts: dict[str, SamePrompts] | None
    target: float
    reached: dict[str, dict[str, list[Reaching]]]
    advantages: dict[str, AdvantagesByRate | None]


def analyse(study: Study, target: float) -> Results:
    """All numbers of a comparison.

    Args:
        study: finished, paired runs.
        target: accuracy whose first reaching is told.
    """
    held_out, source = final_pass(study)
    kinds = {"training accuracy": False} | ({"held-out pass@1": True} if evaluations_between(study) else {})
    reached = {
        kind: {arm.label: [reaching(arm.runs[seed], target, evaluated) for seed in study.seeds] for arm in study.arms}
        for kind, evaluated in kinds.items()
    }
    by_rate = {arm.label: advantages_by_rate(study, arm) for arm in study.arms}
    training, start, prompts = training_accuracy(study), same_start(study), same_prompts(study)
    return Results(study, held_out, source, training, start, prompts, target, reached, by_rate)


def write_report(results: Results, folder: Path, title: str) -> Path:
    """Write the report's files.

    Returns:
        ``report.html``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    pictures = _pictures(results)
    page = _page(results, title, pictures)
    write_text(folder / "report.html", render(page), "--output")
    for name, (paint, _, size) in pictures.items():
        try:
            (folder / f"{name}.png").write_bytes(figure_bytes(paint, size, "png"))
        except OSError as error:
            raise ConfigError(f"--output: cannot write to {folder}: {error.strerror}") from error
    write_text(folder / "report.md", _markdown(page, pictures), "--output")
    # Through the rows' writer: JSON has no NaN.
    summary = json.loads(to_line(_summary(results)))
    write_text(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "--output")
    return folder / "report.html"


def headline(results: Results) -> list[str]:
    """What the comparison found, a line for every configuration but the baseline."""
    if results.held_out is None:
        return [results.held_out_source]
    return [_sentence(results, contrast) for contrast in results.held_out.contrasts]


def _sentence(results: Results, contrast: Any) -> str:
    e = contrast.estimate
    return (
        f"{contrast.label} − {results.study.arms[0].label}: {e.value:+.3f} "
        f"(95 % interval {e.low:+.3f} to {e.high:+.3f}): {contrast.verdict}"
    )


def _summary(results: Results) -> dict[str, Any]:
    study = results.study
    return {
        "baseline": study.arms[0].label,
        "seeds": study.seeds,
        "runs": {arm.label: {str(seed): str(arm.runs[seed].folder) for seed in study.seeds} for arm in study.arms},
        "notes": study.notes,
        "differences": {key: [str(v) for v in values] for key, values in differences(study.arms)},
        "held_out": {"source": results.held_out_source} | (plain(results.held_out) or {}),
        "training": plain(results.training),
        "largest_difference_before_training": results.start,
        "same_prompts": plain(results.prompts),
        "target": results.target,
        "reached": plain(results.reached),
        "advantages_by_rate": plain(results.advantages),
        "clipped_share": {arm.label: plain(study.values(arm, clipped_share)) for arm in study.arms},
        "gradients_by_rate": {arm.label: plain(gradients_by_rate(study, arm)) for arm in study.arms},
        "lambda_histogram": {arm.label: plain(mean_histogram(study, arm, "group/lambda_hist")) for arm in study.arms},
        "seconds": {arm.label: study.values(arm, seconds).tolist() for arm in study.arms},
        "whole_seconds": {arm.label: study.values(arm, whole_seconds).tolist() for arm in study.arms},
    }


# ---------------------------------------------------------------------------------------------- the page


def _page(results: Results, title: str, pictures: dict[str, tuple[Paint, str, tuple[float, float]]]) -> Page:
    study = results.study
    drawn = {name: draw(paint, alt, size) for name, (paint, alt, size) in pictures.items()}
    count = len(study.seeds)
    subtitle = f"{len(study.arms)} configurations x {count} seed{'s' if count > 1 else ''}"
    sections = [
        _result(results, drawn),
        _training(results),
        Section(
            "Learning curves", [_bands_text(count), _clipped_text(study)], pictures=_some(drawn, "curves", "gradients")
        ),
        _target(results),
        _advantages(results, drawn),
        _gradients(results.study, drawn),
        _setup(results),
        _runs(study),
    ]
    return Page(title, subtitle, sections)


def _some(drawn: dict[str, Picture], *names: str) -> list[Picture]:
    return [drawn[name] for name in names if name in drawn]


def _bands_text(seeds: int) -> str:
    if seeds == 1:
        return "One seed: there are no bands."
    return f"Mean of {seeds} seeds; bands are pointwise 95 % intervals over seeds (Student)."


def _clipped_text(study: Study) -> str:
    shares = {arm.label: float(study.values(arm, clipped_share).mean()) for arm in study.arms}
    told = ", ".join(f"{label} {share:.0%}" for label, share in shares.items() if np.isfinite(share))
    text = f"Steps whose gradient was clipped (actor.optim.clip_grad): {told or 'not known'}."
    if np.ptp(list(shares.values())) > _UNEQUAL_CLIPPING:
        text += (
            " Clipping makes all its gradients equally large, and not those of every configuration: to compare how "
            "large an estimator makes them, set it out of reach."
        )
    return text


def _result(results: Results, drawn: dict[str, Picture]) -> Section:
    section = Section("Result", headline(results))
    if results.held_out is not None:
        section.tables += _outcome_tables(results, results.held_out)
        section.text.append(
            f"Held-out pass@1 of the last evaluation, from {results.held_out_source}. Intervals are of seeds and "
            "questions, both drawn at random (crossed random effects, Student's t); the bootstrap interval draws "
            "both anew and is too narrow with few seeds. p-values are two-sided; Holm's correction counts the "
            "configurations that are compared with the baseline."
        )
        section.pictures = _some(drawn, "final")
    return section


def _training(results: Results) -> Section:
    section = Section(
        "Training accuracy", ["The accuracy of all responses sampled in training. It has no part in the verdict."]
    )
    if results.training is not None:
        section.tables = _outcome_tables(results, results.training)
    return section


def _outcome_tables(results: Results, found: Outcome) -> list[Table]:
    labels = [arm.label for arm in results.study.arms]
    each = Table(
        [found.name, "mean", "95 % interval", "standard error"],
        [
            [label, f"{e.value:.4f}", f"{e.low:.4f} to {e.high:.4f}", f"{e.standard_error:.4f}"]
            for label, e in zip(labels, found.arms, strict=True)
        ],
    )
    if not found.contrasts:
        return [each]
    rows = [
        [
            f"{contrast.label} − {labels[0]}",
            f"{e.value:+.4f}",
            f"{e.low:+.4f} to {e.high:+.4f}",
            f"{e.boot_low:+.4f} to {e.boot_high:+.4f}",
            _p(e.p_value if contrast.adjusted is not None else None),
            _p(contrast.adjusted),
            f"{e.detectable:.4f}",
        ]
        for contrast in found.contrasts
        for e in [contrast.estimate]
    ]
    head = ["difference", "mean", "95 % interval", "bootstrap", "p", "p (Holm)", "detectable"]
    return [each, Table(head, rows)]


def _p(value: float | None) -> str:
    if value is None:
        return "not tested"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _target(results: Results) -> Section:
    section = Section(f"Until an accuracy of {results.target:g}")
    section.text.append(
        "Training accuracy is averaged over 5 steps. The median counts runs that never got there as later than all; "
        "of an even number of runs it is the lower of the two in the middle."
    )
    rows = []
    for kind, arms in results.reached.items():
        for label, found in arms.items():
            there = sum(r.steps is not None for r in found)
            rows.append(
                [
                    f"{label}, {kind}",
                    f"{there} of {len(found)}",
                    _median([r.steps for r in found]),
                    _median([r.tokens for r in found]),
                ]
            )
    section.tables.append(Table(["configuration", "runs", "steps (median)", "response tokens (median)"], rows))
    return section


def _median(values: Sequence[float | None]) -> str:
    """The lower median: that of a run, also where half of the runs never got there."""
    middle = sorted(np.inf if value is None else value for value in values)[(len(values) - 1) // 2]
    return f"{middle:,.0f}" if np.isfinite(middle) else "never"


def _advantages(results: Results, drawn: dict[str, Picture]) -> Section:
    section = Section("Advantages by success rate")
    there = {label: found for label, found in results.advantages.items() if found is not None}
    if there:
        section.text.append(
            "From rollouts/, all steps and seeds. Weight is the share of Σ|A|·length, which stands for a group's part "
            "in the gradient with loss.aggregation=token."
        )
    missing = [label for label, found in results.advantages.items() if found is None]
    if missing:
        section.text.append(f"Not kept (tracking.rollouts) by runs of: {', '.join(missing)}.")
    for label, found in there.items():
        cells = zip(found.rate, found.groups, found.positive, found.negative, found.weight, strict=True)
        rows = [
            [f"{p:.3f}", f"{share:.1%}", _number(right), _number(wrong), f"{weight:.1%}"]
            for p, share, right, wrong, weight in cells
        ]
        section.tables.append(Table([f"p, {label}", "groups", "mean A > 0", "mean A < 0", "weight"], rows))
    section.pictures = _some(drawn, "advantages", "lambda")
    return section


def _gradients(study: Study, drawn: dict[str, Picture]) -> Section:
    section = Section("Gradient by success rate")
    norms = {arm.label: gradients_by_rate(study, arm) for arm in study.arms}
    there = {label: values for label, values in norms.items() if values is not None}
    if len(there) < len(norms):
        without = ", ".join(label for label in norms if label not in there)
        section.text.append(f"Not measured (tracking.gradients_every) by runs of: {without}.")
    if there:
        section.text.append(
            "Norm of the gradient that all groups of a success rate have together in a step's loss, before clipping; "
            "mean over the steps that had it measured and such groups, and over seeds."
        )
        edges = np.linspace(0, 1, len(next(iter(there.values()))) + 1)
        rows = [
            [f"{low:.2f} to {high:.2f}", *("" if np.isnan(v[i]) else f"{v[i]:.4f}" for v in there.values())]
            for i, (low, high) in enumerate(itertools.pairwise(edges))
        ]
        section.tables.append(Table(["p", *there], rows))
    section.pictures = _some(drawn, "gradients_by_rate")
    return section


def _number(value: float) -> str:
    return f"{value:+.3f}" if np.isfinite(value) else ""


def _setup(results: Results) -> Section:
    study = results.study
    section = Section("What was compared", list(study.notes))
    differ = differences(study.arms)
    rows = [[key, *(str(value) for value in values)] for key, values in differ]
    section.tables.append(Table(["key", *(arm.label for arm in study.arms)], rows, plain=True))
    if not differ:
        section.text.append("No option differs between the configurations.")
    if any(key.startswith(("data.", "model.", "reward.")) for key, _ in differ):
        section.text.append("Model, data or verifier differ: this is not a comparison of algorithms alone.")
    budget = [key for key, _ in differ if key in _BUDGET]
    if budget:
        section.text.append(f"Budgets are unequal: {', '.join(budget)} differ.")
    section.text += _prompts_text(results)
    if results.start is None:
        section.text.append("There is no evaluation before the first step.")
    elif results.start == 0:
        section.text.append("Before the first step all configurations answered alike, seed by seed, as they should.")
    else:
        section.text.append(
            f"Before the first step configurations differ by up to {results.start:.3f} on a question, with the same "
            "seed: another model, other data, or servers that do not repeat samples (docs/evaluation.md)."
        )
    return section


def _prompts_text(results: Results) -> list[str]:
    """Whether the configurations were trained on the same prompts."""
    if results.prompts is None:
        return ["Whether the training prompts were the same is not known: not all runs kept them (tracking.rollouts)."]
    base = results.study.arms[0].label
    text = []
    for label, found in results.prompts.items():
        if found.same == found.steps:
            text.append(f"{label} was trained on the prompts of {base}, in the same order, in all {found.steps} steps.")
        else:
            text.append(
                f"{label} was trained on the prompts of {base}, in the same order, in {found.same} of {found.steps} "
                "steps only: the pairs share their seed and the held-out questions, not the training prompts."
            )
    return text


def _runs(study: Study) -> Section:
    rows = []
    for arm in study.arms:
        for seed in study.seeds:
            run = arm.runs[seed]
            scores = [row["pass_at_1"] for row in run.evaluations if row.get("pass_at_1") is not None]
            tokens = sum(response_tokens(row) for row in run.metrics)
            rows.append(
                [
                    run.name,
                    str(seed),
                    str(run.step),
                    " -> ".join(f"{score:.3f}" for score in dict.fromkeys((scores[0], scores[-1]))) if scores else "",
                    f"{tokens:,.0f}",
                    duration(seconds(run)),
                    _whole(run),
                ]
            )
    text = [f"Mean time in steps: {_mean_durations(study, seconds)}."]
    if any(run.starts for arm in study.arms for run in arm.runs.values()):
        text.append(
            f"Mean wall time of a whole run: {_mean_durations(study, whole_seconds)}. It is from the first start of "
            "the trainers, when model and servers are ready, to the last row: evaluations, checkpoints between steps "
            "and pauses of a run that was started again are in it."
        )
    head = ["run", "seed", "steps", "pass@1", "response tokens", "time in steps", "whole run"]
    return Section("Runs", text, [Table(head, rows)])


def _mean_durations(study: Study, of_run: Callable[[RunData], float]) -> str:
    means = {arm.label: float(study.values(arm, of_run).mean()) for arm in study.arms}
    return "; ".join(
        f"{label}: {duration(mean) if np.isfinite(mean) else 'not recorded'}" for label, mean in means.items()
    )


def _whole(run: RunData) -> str:
    whole = whole_seconds(run)
    if not np.isfinite(whole):
        return "not recorded"
    return duration(whole) + (f" ({len(run.starts)} starts)" if len(run.starts) > 1 else "")


def _markdown(page: Page, pictures: dict[str, tuple[Paint, str, tuple[float, float]]]) -> str:
    parts = [f"# {markdown_text(page.title)}", page.subtitle]
    for section in page.sections:
        parts += [
            f"## {section.title}",
            *map(markdown_text, section.text),
            *(markdown(table).rstrip() for table in section.tables),
        ]
    parts += ["## Pictures", *(f"![{alt}]({name}.png)" for name, (_, alt, _) in pictures.items())]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------- pictures


def _pictures(results: Results) -> dict[str, tuple[Paint, str, tuple[float, float]]]:
    """What is drawn: by file name, how, what it shows, and its size."""
    study = results.study
    found: dict[str, tuple[Paint, str, tuple[float, float]]] = {
        "curves": (partial(_draw_curves, study), "Training and held-out accuracy", (11.4, 3.6)),
        "gradients": (partial(_draw_gradients, study), "Gradient norm and entropy", (11.4, 3.2)),
    }
    if results.held_out is not None and results.held_out.contrasts:
        alt = "Difference of held-out pass@1 to the baseline, with 95 % intervals"
        found["final"] = (partial(_draw_final, results), alt, (8.0, 1.2 + 0.5 * len(results.held_out.contrasts)))
    if any(results.advantages.values()):
        found["advantages"] = (partial(_draw_advantages, results), "Advantages by success rate", (11.4, 3.4))
    if any(gradients_by_rate(study, arm) is not None for arm in study.arms):
        found["gradients_by_rate"] = (partial(_draw_gradients_by_rate, study), "Gradient by success rate", (5.6, 3.1))
    if any(mean_histogram(study, arm, "group/lambda_hist") is not None for arm in study.arms):
        found["lambda"] = (partial(_draw_lambda, study), "λ of the groups", (5.6, 3.1))
    return found


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _band(axes: Axes, steps: Array, curves: Array, label: str, index: int, marker: str | None = None) -> None:
    mean, low, high = seed_band(curves)
    axes.plot(steps, mean, color=_colour(index), label=label, marker=marker, markersize=4)
    axes.fill_between(steps, low, high, color=_colour(index), alpha=0.15, linewidth=0)


def _smooth(curves: Array) -> Array:
    window = max(1, curves.shape[1] // _SMOOTHED)
    return np.array([trailing_mean(row, window) for row in curves]) if window > 1 else curves


def _metric_panel(axes: Axes, study: Study, title: str, *names: str) -> None:
    axes.set_title(title)
    for index, arm in enumerate(study.arms):
        steps, curves = metric_curves(study, arm, *names)
        if len(steps):
            _band(axes, steps, _smooth(curves), arm.label, index)
    axes.set_xlabel("step")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def _draw_curves(study: Study, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    _metric_panel(left, study, "Training accuracy", *TRAINING_ACCURACY)
    right.set_title("Held-out pass@1")
    for index, arm in enumerate(study.arms):
        steps, curves = evaluation_curves(study, arm, "pass_at_1")
        if len(steps):
            _band(right, steps, curves, arm.label, index, marker="o")
    right.set_xlabel("step")
    for axes in (left, right):
        axes.set_ylim(-0.02, 1.02)


def _draw_gradients(study: Study, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    _metric_panel(left, study, "Gradient norm", "optim/grad_norm")
    _metric_panel(right, study, "Entropy (nat per token)", "loss/entropy")


def _draw_final(results: Results, figure: Figure) -> None:
    assert results.held_out is not None
    axes = figure.subplots()
    axes.set_title(f"pass@1 less that of {results.study.arms[0].label}, with 95 % interval")
    axes.axvline(0, color=GREY, linewidth=1)
    contrasts = results.held_out.contrasts
    for index, contrast in enumerate(contrasts):
        e = contrast.estimate
        axes.plot([e.low, e.high], [index, index], color=_colour(index + 1), linewidth=2)
        axes.plot([e.value], [index], color=_colour(index + 1), marker="o")
        axes.annotate(contrast.label, (e.value, index), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(len(contrasts) - 0.4, -0.7)


def _draw_advantages(results: Results, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    left.set_title("Mean advantage of right and wrong responses")
    right.set_title("Share of Σ|A|·length")
    for index, (label, found) in enumerate(results.advantages.items()):
        if found is None:
            continue
        left.plot(found.rate, found.positive, color=_colour(index), marker="o", markersize=4, label=label)
        left.plot(found.rate, found.negative, color=_colour(index), marker="v", markersize=4, linestyle="--")
        right.plot(found.rate, found.weight, color=_colour(index), marker="o", markersize=4, label=label)
    for axes in (left, right):
        axes.set_xlabel("success rate p of the group")
    left.legend()


def _draw_gradients_by_rate(study: Study, figure: Figure) -> None:
    axes = figure.subplots()
    axes.set_title("Norm of the gradient of groups by success rate")
    for index, arm in enumerate(study.arms):
        norms = gradients_by_rate(study, arm)
        if norms is not None:
            centres = (np.arange(len(norms)) + 0.5) / len(norms)
            axes.plot(centres, norms, color=_colour(index), marker="o", markersize=4, label=arm.label)
    axes.set_xlabel("success rate p of the group")
    axes.legend()


def _draw_lambda(study: Study, figure: Figure) -> None:
    axes = figure.subplots()
    axes.set_title("λ of the groups, mean over steps and seeds")
    for index, arm in enumerate(study.arms):
        shares = mean_histogram(study, arm, "group/lambda_hist")
        if shares is not None:
            width = 0.8 / len(study.arms)
            places = (np.arange(len(shares)) + 0.1 + (index + 0.5) * width) / len(shares)
            axes.bar(places, shares, width=width / len(shares), color=_colour(index), label=arm.label)
    axes.set_xlabel("λ")
    axes.set_ylabel("share of groups")
    axes.legend()
