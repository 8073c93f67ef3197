"""``curves.png``: a run at a glance."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mapo.errors import DataError
from megatron_mapo.tracking.jsonl import Row, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6fb7", "#e08214", "#2a9d6f", "#c8453b", "#7b5aa6", "#8a8f98"
_PHASE_COLOURS = {
    "rollout": BLUE,
    "old_logprobs": PURPLE,
    "reference": GREY,
    "update": ORANGE,
    "weight_sync": GREEN,
    "other": "#d9dce1",
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b5bac2",
    "axes.labelcolor": "#4a4f57",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_SMOOTH_FROM = 30


def plot_run(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Draw the curves of a run, finished or not.

    Args:
        run_dir: folder with ``metrics.jsonl`` and, perhaps, ``evaluations.jsonl``.
        out: picture to write, its ending says the format; None: ``curves.png`` in the run folder. It is
            replaced in one step, so a viewer never sees half a picture.

    Returns:
        The picture's path.

    Raises:
        DataError: the run has no metrics, or a damaged file.
    """
    # Not pyplot: it keeps global state, and would look for a screen.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    rows = read_rows(run_dir / "metrics.jsonl")
    if not rows:
        raise DataError(f"{run_dir} has no metrics.jsonl with a finished step")
    evaluations = read_rows(run_dir / "evaluations.jsonl")
    target = Path(out) if out is not None else run_dir / "curves.png"
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(15, 6.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 4).flat
        draw: list[Callable[[Axes], None]] = [
            lambda axes: draw_reward(axes, rows),
            lambda axes: draw_evaluations(axes, evaluations),
            lambda axes: draw_lengths(axes, rows),
            lambda axes: draw_shares(axes, rows),
            lambda axes: draw_lines(axes, rows, "Entropy (nat per token)", [("loss/entropy", "", PURPLE)]),
            lambda axes: draw_mismatch(axes, rows),
            lambda axes: draw_lines(axes, rows, "Gradient norm", [("optim/grad_norm", "", RED)]),
            lambda axes: draw_seconds(axes, rows),
        ]
        for axes, paint in zip(panels, draw, strict=True):
            paint(axes)
            finish_panel(axes, rows, evaluations)
        figure.suptitle(f"{run_dir.resolve().name}   step {rows[-1]['step']}", x=0.01, ha="left", fontsize=12)
        temporary = target.with_name(f".{target.stem}.tmp{target.suffix}")
        figure.savefig(temporary)
    os.replace(temporary, target)
    return target


def plot_evaluation(
    metrics: Mapping[str, float], lengths: np.ndarray, truncated: np.ndarray, title: str, out: Path
) -> Path:
    """Draw the result of one evaluation: pass@k over k with its interval, and how long the responses are.

    Args:
        metrics: ``pass_at_K``, ``maj_at_N``, ``greedy_accuracy`` where there are, each with ``_low``, ``_high``.
        lengths: ``[N]``, tokens of every sampled response.
        truncated: bool ``[N]``, it was cut.
        title: of the picture.
        out: picture to write, in one step.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _draw_pass_at_k(left, metrics)
        _draw_length_histogram(right, lengths, truncated)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
        temporary = out.with_name(f".{out.stem}.tmp{out.suffix}")
        figure.savefig(temporary)
    os.replace(temporary, out)
    return out


def _draw_pass_at_k(axes: Axes, metrics: Mapping[str, float]) -> None:
    axes.set_title("pass@k, with 95 % intervals")
    sizes = sorted(int(name.removeprefix("pass_at_")) for name in metrics if re.fullmatch(r"pass_at_\d+", name))
    value, low, high = ([metrics[f"pass_at_{k}{end}"] for k in sizes] for end in ("", "_low", "_high"))
    axes.plot(sizes, value, color=BLUE, marker="o", markersize=4, label="pass@k")
    axes.fill_between(sizes, low, high, color=BLUE, alpha=0.12, linewidth=0)
    points = [(f"maj_at_{sizes[-1]}", sizes[-1], "majority", ORANGE), ("greedy_accuracy", 1, "greedy", GREEN)]
    for name, k, label, colour in points:
        if name in metrics:
            # The ends of a bootstrap interval may lie on one side of the mean, by rounding at least.
            ends = [
                [max(0.0, metrics[name] - metrics[f"{name}_low"])],
                [max(0.0, metrics[f"{name}_high"] - metrics[name])],
            ]
            axes.errorbar([k], [metrics[name]], yerr=ends, color=colour, fmt="D", markersize=4, capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(k) for k in sizes])
    axes.minorticks_off()
    axes.set_xlabel("k")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="best")


def _draw_length_histogram(axes: Axes, lengths: np.ndarray, truncated: np.ndarray) -> None:
    axes.set_title("Response length (tokens)")
    low, high = lengths.min() - 0.5, lengths.max() + 0.5
    edges = np.linspace(low, high, 1 + min(40, int(high - low)))
    parts = [("complete", lengths[~truncated], BLUE), ("cut", lengths[truncated], RED)]
    shown = [part for part in parts if len(part[1])]
    labels, values, colours = ([part[i] for part in shown] for i in range(3))
    axes.hist(values, bins=edges.tolist(), stacked=True, color=colours, label=labels)
    axes.set_ylabel("responses")
    axes.legend(loc="best")


def series(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the metric is there; null becomes NaN, which leaves a gap."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    steps = np.array([step for step, _ in found], dtype=float)
    return steps, np.array([np.nan if value is None else value for _, value in found], dtype=float)


def draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    """A curve; a long one is drawn faint with its running mean on top."""
    if len(steps) == 0:
        return
    if len(steps) < _SMOOTH_FROM:
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    axes.plot(steps, running_mean(values, _window(len(values))), color=colour, label=label)


def _window(length: int) -> int:
    return max(5, length // 25)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window that is cut at both ends and leaves NaN out."""
    present = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    sums = np.convolve(np.where(present, values, 0.0), kernel, mode="same")
    counts = np.convolve(present.astype(float), kernel, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def draw_lines(axes: Axes, rows: Sequence[Row], title: str, lines: Sequence[tuple[str, str, str]]) -> None:
    """Metrics as curves: of each its name, its label and its colour."""
    axes.set_title(title)
    for name, label, colour in lines:
        draw_curve(axes, *series(rows, name), label, colour)


def draw_reward(axes: Axes, rows: Sequence[Row]) -> None:
    """Mean reward, and the accuracy where it is something else."""
    accuracy = series(rows, "reward/accuracy")
    reward = series(rows, "reward/mean")
    axes.set_title("Reward of the rollouts")
    draw_curve(axes, *reward, "mean reward", BLUE)
    # With rewards 0 and 1 the two curves are one.
    if len(accuracy[1]) and not np.array_equal(accuracy[1], reward[1], equal_nan=True):
        draw_curve(axes, *accuracy, "accuracy", GREEN)


def accuracy_names(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are accuracies to look at first: of pass@k only the smallest and the largest k."""
    found = [name for name in names if re.search(r"accuracy|(pass|maj)_at_\d+$", name)]
    found = [name for name in found if not name.endswith(("_low", "_high"))]
    passes = sorted((name for name in found if "pass_at_" in name), key=lambda name: int(name.rpartition("_")[2]))
    return [name for name in found if name not in passes[1:-1]]


def draw_evaluations(axes: Axes, evaluations: Sequence[Row]) -> None:
    """Every accuracy of the evaluations, with its interval where there is one (``NAME_low``, ``NAME_high``)."""
    axes.set_title("Held-out accuracy")
    names = accuracy_names(dict.fromkeys(name for row in evaluations for name in row))
    for name, colour in zip(names, (BLUE, GREEN, ORANGE, PURPLE), strict=False):
        steps, values = series(evaluations, name)
        label = name.removeprefix("eval/").replace("accuracy", "").replace("_at_", "@").strip("_/ ") or "accuracy"
        axes.plot(steps, values, color=colour, label=label.replace("_", " "), marker="o", markersize=4)
        low, high = series(evaluations, f"{name}_low"), series(evaluations, f"{name}_high")
        if len(low[0]) == len(high[0]) == len(steps):
            axes.fill_between(steps, low[1], high[1], color=colour, alpha=0.12, linewidth=0)
    if names:
        axes.set_ylim(0, 1.02)
    else:
        say_in_panel(axes, "no evaluation")


def draw_lengths(axes: Axes, rows: Sequence[Row]) -> None:
    """Response lengths: mean, shortest, longest."""
    axes.set_title("Response length (tokens)")
    low, high = series(rows, "response/length_min"), series(rows, "response/length_max")
    if len(low[0]) and len(low[0]) == len(high[0]):
        axes.fill_between(low[0], low[1], high[1], color=ORANGE, alpha=0.12, linewidth=0, label="shortest to longest")
    draw_curve(axes, *series(rows, "response/length_mean"), "mean", ORANGE)
    _room_for_legend(axes)


def draw_shares(axes: Axes, rows: Sequence[Row]) -> None:
    """Groups without gradient, responses cut, tokens clipped."""
    axes.set_title("Shares")
    draw_curve(axes, *series(rows, "group/zero_advantage"), "groups without gradient", GREY)
    draw_curve(axes, *series(rows, "response/truncated"), "responses cut", RED)
    draw_curve(axes, *series(rows, "loss/clip_fraction"), "tokens clipped", BLUE)
    axes.set_ylim(-0.02, 1.02)


def draw_mismatch(axes: Axes, rows: Sequence[Row]) -> None:
    """Difference of the log-probs of server and trainer, on a logarithmic axis."""
    axes.set_title("|server − trainer| log-prob")
    drawn = False
    for name, label, colour in (("mismatch/abs_p99", "99th percentile", GREY), ("mismatch/abs_mean", "mean", BLUE)):
        steps, values = series(rows, name)
        values = np.where(values > 0, values, np.nan)  # a logarithm has no zero
        drawn |= bool(np.isfinite(values).any())
        draw_curve(axes, steps, values, label, colour)
    if drawn:
        from matplotlib.ticker import LogFormatter

        axes.set_yscale("log")
        # Not the usual formatter, whose labels are formulas and need a parser of formulas.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def draw_seconds(axes: Axes, rows: Sequence[Row]) -> None:
    """Seconds of every phase on top of each other; what the phases leave of the step is `other`."""
    axes.set_title("Seconds per step")
    steps, total = series(rows, "seconds/step")
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("seconds/"))
    phases = [name.removeprefix("seconds/") for name in names if name != "seconds/step"]
    if len(steps) == 0 or not phases:
        say_in_panel(axes, "no timing")
        return
    layers = [np.array([row.get(f"seconds/{p}") or 0.0 for row in rows if "seconds/step" in row]) for p in phases]
    layers.append(np.clip(np.nan_to_num(total) - np.sum(layers, axis=0), 0, None))
    if len(steps) >= _SMOOTH_FROM:
        layers = [running_mean(layer, _window(len(layer))) for layer in layers]
    colours = [_PHASE_COLOURS.get(phase, RED) for phase in phases] + [_PHASE_COLOURS["other"]]
    labels = [phase.replace("_", " ") for phase in phases] + ["other"]
    if len(steps) == 1:
        bottoms = np.cumsum([0.0, *(float(layer[0]) for layer in layers[:-1])])
        for bottom, layer, label, colour in zip(bottoms, layers, labels, colours, strict=True):
            axes.bar(steps, layer, bottom=bottom, width=0.5, color=colour, label=label)
    else:
        axes.stackplot(steps, *layers, labels=labels, colors=colours, linewidth=0)
    _room_for_legend(axes)


def _room_for_legend(axes: Axes) -> None:
    """From 0 on, and free above what is filled."""
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])


def draw_waterfall(axes: Axes, row: Row, title: str) -> None:
    """The phases of one step, one below the other in their order, from their start to their end."""
    starts = {name.removeprefix("seconds_at/"): row[name] for name in row if name.startswith("seconds_at/")}
    phases = sorted((phase for phase in starts if row.get(f"seconds/{phase}") is not None), key=lambda p: starts[p])
    total = row["seconds/step"]
    axes.set_title(title)
    for place, phase in enumerate(phases):
        begin, seconds = starts[phase], row[f"seconds/{phase}"]
        axes.barh(place, seconds, left=begin, height=0.6, color=_PHASE_COLOURS.get(phase, RED))
        axes.text(begin + seconds + 0.015 * total, place, f"{seconds:.3g} s", va="center", fontsize=8)
    axes.axvline(total, color=GREY, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(phases)), [phase.replace("_", " ") for phase in phases])
    axes.set_ylim(len(phases) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * total)
    axes.set_xlabel("seconds since the step began")
    axes.grid(axis="y", visible=False)


def say_in_panel(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def finish_panel(axes: Axes, rows: Sequence[Row], evaluations: Sequence[Row]) -> None:
    """The same steps on every panel, a legend where a curve has a name."""
    from matplotlib.ticker import MaxNLocator

    steps: list[Any] = [row["step"] for row in (*rows, *evaluations)]
    margin = max(0.5, 0.02 * (max(steps) - min(steps)))
    axes.set_xlim(min(steps) - margin, max(steps) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    labels = [label for label in axes.get_legend_handles_labels()[1] if label]
    if len(labels) > 1:
        # "best" would search all points of a stack for a place.
        axes.legend(loc="upper right" if axes.collections else "best", ncols=1 if len(labels) < 4 else 2)
