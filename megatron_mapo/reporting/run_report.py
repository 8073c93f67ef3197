"""``megatron-mapo report``: one run, finished or not, as one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mapo.reporting.page import Group, Page, Picture, Response, Section, Table, draw, render, write_text
from megatron_mapo.reporting.run_data import RunData, load_run
from megatron_mapo.tracking import plots
from megatron_mapo.tracking.jsonl import Row, read_rows
from megatron_mapo.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from megatron_mapo.tracking.progress import duration
from megatron_mapo.tracking.rollouts import read_rollouts, step_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIGHLIGHTS = (
    ("model", ("model.path", "model.dtype")),
    ("data", ("data.train", "data.eval")),
    ("verifier", ("reward.name",)),
    ("advantages", ("actor.adv_norm.aggregation_mode", "actor.adv_norm.std", "actor.adv_norm.success_threshold")),
    ("batch", ("rollout.prompts_per_step", "rollout.responses_per_prompt", "rollout.max_response_tokens")),
    ("updates", ("actor.mini_batches", "actor.epochs", "actor.optim.lr", "actor.loss.aggregation")),
    ("clip, KL", ("actor.loss.clip_low", "actor.loss.clip_high", "actor.loss.kl_coef")),
    ("sampling", ("rollout.temperature", "run.seed")),
)
_GROUP_STEPS, _GROUPS, _RESPONSES, _LONGEST_TEXT = 10, 3, 4, 4000
_COUNTED_EVENTS = {
    "optim/skipped": "updates skipped, because loss or gradient were not finite",
    "servers/taken_out": "servers taken out",
    "servers/restarts": "servers that came back",
    "rollout/retries": "failed requests",
}
_MOST_EVENTS = 200
_BINS = 25

Lines = Sequence[tuple[str, str, str]]


def report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run_dir: the run's folder.
        output: the file; None: ``report.html`` in the run's folder.

    Returns:
        The file.

    Raises:
        DataError: it is not a run's folder, or a file in it is damaged.
        ConfigError: the file cannot be written.
    """
    run = load_run(run_dir)
    target = Path(output) if output is not None else run.folder / "report.html"
    write_text(target, render(run_page(run)), "--output")
    return target


def run_page(run: RunData) -> Page:
    """The page of a run."""
    sections = [_summary(run)]
    if run.metrics or run.evaluations:
        sections.append(_learning(run))
    if run.metrics:
        sections += [_advantages(run), _groups(run), _timing(run), _mismatch(run)]
    sections += [_events(run), _configuration(run)]
    state = "finished" if run.finished else "not finished"
    return Page(run.name, f"step {run.step} of {run.steps}, {state}", sections)


def _summary(run: RunData) -> Section:
    layout, versions = run.made_with()
    rows = [["folder", str(run.folder.resolve())], ["state", f"step {run.step} of {run.steps}"]]
    for label, keys in _HIGHLIGHTS:
        found = [f"{key.rpartition('.')[2]} {run.config[key]}" for key in keys if run.config.get(key) is not None]
        rows.append([label, ", ".join(found)])
    rows += [["layout", layout], ["versions", versions], *_times(run)]
    section = Section("Summary", tables=[Table((), rows, plain=True)])
    if not run.metrics:
        section.text.append("No step is finished yet.")
    if run.evaluations:
        section.tables.append(_evaluation_table(run.evaluations))
    return section


def _times(run: RunData) -> list[list[str]]:
    """Wall time: of all finished steps, and from the first start to the last row."""
    training = sum(row.get("seconds/step") or 0.0 for row in run.metrics)
    tokens = sum(response_tokens(row) for row in run.metrics)
    found = [["time in steps", duration(training)], ["response tokens", f"{tokens:,.0f}"]]
    moments = run.moments
    if moments:
        begin = datetime.fromtimestamp(min(moments), UTC).isoformat(" ", "seconds")
        found.insert(0, ["from first to last sign", f"{duration(max(moments) - min(moments))}, from {begin}"])
    return found


def response_tokens(row: Row) -> float:
    """Response tokens that a step sampled, those of groups that ``rollout.filter`` dropped among them."""
    sampled = row.get("filter/response_tokens")
    if sampled is not None:
        return float(sampled)
    return (row.get("speed/response_tokens_per_second") or 0.0) * (row.get("seconds/step") or 0.0)


def _evaluation_table(evaluations: Sequence[Row]) -> Table:
    names = plots.accuracy_names(dict.fromkeys(name for row in evaluations for name in row))

    def cell(row: Row, name: str) -> str:
        value, low, high = (row.get(name + end) for end in ("", "_low", "_high"))
        if value is None:
            return ""
        return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} - {high:.3f})"

    head = ["evaluation after step", *(name.replace("_at_", "@").replace("_", " ") for name in names)]
    return Table(head, [[str(row["step"]), *(cell(row, name) for name in names)] for row in evaluations])


def _panel(run: RunData, paint: Callable[[Any], None], alt: str) -> Picture:
    """A picture with one panel over steps."""

    def on(figure: Figure) -> None:
        axes = figure.subplots()
        paint(axes)
        plots.finish_panel(axes, run.metrics, run.evaluations)

    return draw(on, alt)


def _curves(run: RunData, title: str, lines: Lines) -> Picture | None:
    """Curves of metrics; None if the run has none of them."""
    there = [line for line in lines if any(row.get(line[0]) is not None for row in run.metrics)]
    return _panel(run, lambda axes: plots.draw_lines(axes, run.metrics, title, there), title) if there else None


def _present(pictures: Iterable[Picture | None]) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]


def _learning(run: RunData) -> Section:
    section = Section("Learning")
    rows = run.metrics
    if rows:
        section.pictures.append(_panel(run, lambda axes: plots.draw_reward(axes, rows), "Reward of the rollouts"))
    if run.evaluations:
        picture = _panel(run, lambda axes: plots.draw_evaluations(axes, run.evaluations), "Held-out accuracy")
        section.pictures.append(picture)
    else:
        section.text.append("There is no evaluation (data.eval, trainer.evaluation).")
    if rows:
        section.pictures.append(_panel(run, lambda axes: plots.draw_lengths(axes, rows), "Response length"))
        section.pictures.append(_panel(run, lambda axes: plots.draw_shares(axes, rows), "Shares"))
    clips = [("loss/clip_fraction_low", "lower", BLUE), ("loss/clip_fraction_high", "upper", ORANGE)]
    kls = [("loss/kl_old", "to the old policy", BLUE), ("loss/kl_ref", "to the reference", GREEN)]
    section.pictures += _present(
        [
            _curves(run, "Loss", [("loss/total", "", BLUE)]),
            _curves(run, "Gradient norm", [("optim/grad_norm", "", RED)]),
            _curves(run, "Entropy (nat per token)", [("loss/entropy", "", PURPLE)]),
            _curves(run, "KL (nat per token)", kls),
            _curves(run, "Share of tokens clipped", clips),
            _curves(run, "Learning rate", [("optim/learning_rate", "", GREY)]),
        ]
    )
    return section


def _advantages(run: RunData) -> Section:
    section = Section(
        "Groups and advantages",
        ["p is the share of right responses in a group, λ = 1 − 4p(1−p) the weight of MAPO's mean-relative term."],
    )
    for name, title in (("group/p_hist", "Success rate p of the groups"), ("group/lambda_hist", "λ of the groups")):
        table = histogram(run.metrics, name)
        if table is not None:
            section.pictures.append(draw(partial(draw_heatmap, histogram=table, title=title), title))
    lines = [
        ("advantage/abs_mean", "mean of |A|", BLUE),
        ("advantage/max", "largest", GREEN),
        ("advantage/min", "smallest", RED),
    ]
    section.pictures += _present([_curves(run, "Advantage", lines)])
    if run.rollouts:
        section.text.append("Shares of responses are of those that were trained on (rollouts/).")
        section.pictures += _sequence_histograms(run)
    return section


def _sequence_histograms(run: RunData) -> list[Picture]:
    """Rewards, advantages and lengths of the sequences trained on, over time."""
    pictures = []
    for name, title in {"reward": "Rewards", "advantage": "Advantages", "length": "Lengths (tokens)"}.items():
        title += " of the responses"
        steps, shares, edges = sequence_histogram(run, name)
        paint = partial(
            draw_heatmap, histogram=(steps, shares), title=title, span=(edges[0], edges[-1]), of="responses"
        )
        pictures.append(draw(paint, title))
    return pictures


def sequence_histogram(run: RunData, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column of ``rollouts/`` over time.

    Args:
        run: with rollouts.
        column: ``reward``, ``advantage`` or ``length``.

    Returns:
        steps ``[T]``, shares ``[bins, T]``, and ends of the bins ``[bins + 1]``.
    """
    values = [read_rollouts(file, [column])[column].to_numpy() for file in run.rollouts]
    edges = histogram_edges(np.concatenate(values), whole=column == "length")
    shares = np.stack([np.histogram(some, edges)[0] / len(some) for some in values], axis=1)
    return np.array([step_of(file) for file in run.rollouts], dtype=float), shares, edges


def histogram_edges(values: np.ndarray, whole: bool) -> np.ndarray:
    """Ends of at most ``_BINS`` equal bins that hold all values.

    Args:
        values: at least one.
        whole: they are whole numbers: every bin holds equally many of them.
    """
    low, high = float(values.min()), float(values.max())
    if whole:
        width = np.ceil((high - low + 1) / _BINS)
        return low - 0.5 + width * np.arange(np.ceil((high - low + 1) / width) + 1)
    # Bins around the ends, not beside them: they are values that many responses have.
    half = (high - low) / (_BINS - 1) / 2 or 0.5
    return np.linspace(low - half, high + half, _BINS + 1 if high > low else 2)


def histogram(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A histogram over time.

    Args:
        rows: of ``metrics.jsonl``.
        name: without the number of the bin.

    Returns:
        steps ``[T]`` and shares ``[bins, T]``; None if the rows do not have it.
    """
    names = sorted({key for row in rows for key in row if key.startswith(f"{name}_")})
    found = [row for row in rows if names and all(row.get(key) is not None for key in names)]
    if not found:
        return None
    shares = np.array([[row[key] for key in names] for row in found], dtype=float)
    return np.array([row["step"] for row in found], dtype=float), shares.T


def draw_heatmap(
    figure: Figure,
    histogram: tuple[np.ndarray, np.ndarray],
    title: str,
    span: tuple[float, float] = (0.0, 1.0),
    of: str = "groups",
) -> None:
    """Shares of equal bins of ``span`` over steps, as colours; bins that nothing is in stay blank.

    Args:
        figure: to draw on.
        histogram: what ``histogram`` returns; steps may be missing.
        title: of the picture.
        span: from the first bin's lower end to the last one's upper end.
        of: what was counted.
    """
    from matplotlib.ticker import MaxNLocator

    steps, shares = histogram
    place = (steps - steps[0]).astype(int)
    every = np.full((len(shares), place[-1] + 1), np.nan)
    every[:, place] = np.where(shares > 0, shares, np.nan)
    axes = figure.subplots()
    axes.set_title(title)
    edges = (steps[0] - 0.5, steps[-1] + 0.5, *span)
    image = axes.imshow(
        every, origin="lower", aspect="auto", extent=edges, cmap="viridis", vmin=0, interpolation="nearest"
    )
    axes.grid(False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(integer=span[1] - span[0] > 2, nbins=6))
    figure.colorbar(image, ax=axes, label=f"share of {of}")


def _timing(run: RunData) -> Section:
    section = Section("Time")
    section.pictures.append(_panel(run, lambda axes: plots.draw_seconds(axes, run.metrics), "Seconds per step"))
    waterfalls = _waterfalls(run)
    if waterfalls:
        section.text.append(
            "Phases stand at their place in the step; gaps, and the end up to the dotted line, are other."
        )
    section.pictures += waterfalls
    speed = [("speed/tokens_per_second", "all tokens", BLUE), ("speed/response_tokens_per_second", "response", ORANGE)]
    memory = [("memory/peak_gib", "", PURPLE)]
    section.pictures += _present(
        [_curves(run, "Tokens per second", speed), _curves(run, "Memory of the fullest rank (GiB)", memory)]
    )
    total = sum(row.get("seconds/step") or 0.0 for row in run.metrics)
    phases = dict.fromkeys(key for row in run.metrics for key in row if key.startswith("seconds/"))
    sums = {key: sum(row.get(key) or 0.0 for row in run.metrics) for key in phases}
    if total:
        rows = [
            [
                key.removeprefix("seconds/").replace("_", " "),
                f"{s:.1f}",
                f"{s / len(run.metrics):.2f}",
                f"{s / total:.1%}",
            ]
            for key, s in sums.items()
        ]
        section.tables.append(Table(["phase", "seconds", "a step", "share"], rows))
    return section


def _waterfalls(run: RunData) -> list[Picture]:
    """The phases of the median step and of the last one; none for runs that did not note when a phase began."""
    rows = [row for row in run.metrics if row.get("seconds/step") and any(k.startswith("seconds_at/") for k in row)]
    if not rows:
        return []
    median = sorted(rows, key=lambda row: row["seconds/step"])[(len(rows) - 1) // 2]
    pictures = []
    for name, row in (("median", median), ("last", rows[-1])):
        title = f"Step {row['step']}, the {name} one: {row['seconds/step']:.3g} s"
        pictures.append(draw(partial(_draw_waterfall, row=row, title=title), f"Phases of the {name} step"))
    return pictures


def _draw_waterfall(figure: Figure, row: Row, title: str) -> None:
    figure.subplots_adjust(left=0.2)  # the phases' names
    plots.draw_waterfall(figure.subplots(), row, title)


def _mismatch(run: RunData) -> Section:
    section = Section("Server and trainer")
    section.text.append("Log-probs of the same tokens under the same weights, by the server and by the trainer (nat).")
    section.pictures.append(_panel(run, lambda axes: plots.draw_mismatch(axes, run.metrics), "Mismatch"))
    kls = [("mismatch/kl", "k3", BLUE), ("mismatch/kl_k1", "k1", GREY)]
    ages = [("staleness/mean", "mean", BLUE), ("staleness/max", "largest", RED)]
    servers = [("servers/total", "known", GREY), ("servers/serving", "serving", GREEN)]
    section.pictures += _present(
        [
            _curves(run, "KL(server || trainer) (nat per token)", kls),
            _curves(run, "Versions that the weights of a token are behind", ages),
            _curves(run, "Servers", servers),
        ]
    )
    return section


def _events(run: RunData) -> Section:
    events: list[tuple[float, str, str]] = []
    for index, start in enumerate(run.starts):
        text = "trainers started" if index == 0 else f"trainers started again after step {start['step']}"
        events.append((start["time"], str(start["step"]), f"{text} ({start['ranks']} ranks on {start['host']})"))
    for row in run.metrics:
        for name, text in _COUNTED_EVENTS.items():
            if row.get(name):
                events.append((row.get("time", 0.0), str(row["step"]), f"{row[name]:.0f} {text}"))
    hangs = sorted(path for path in (run.folder / "hangs").glob("*") if path.is_dir() and any(path.iterdir()))
    events += [(path.stat().st_mtime, "", f"a hang; the ranks' stacks are in {path}") for path in hangs]
    events.sort(key=lambda event: event[0])
    section = Section("Events")
    if not events:
        section.text.append("None.")
        return section
    if len(events) > _MOST_EVENTS:
        section.text.append(f"The last {_MOST_EVENTS} of {len(events)}.")
    rows = [
        [datetime.fromtimestamp(moment, UTC).isoformat(" ", "seconds") if moment else "", step, text]
        for moment, step, text in events[-_MOST_EVENTS:]
    ]
    section.tables.append(Table(["time (UTC)", "step", "event"], rows, plain=True))
    return section


def _configuration(run: RunData) -> Section:
    rows = [[key, "" if value is None else str(value)] for key, value in run.config.items()]
    return Section("Configuration", tables=[Table(["key", "value"], rows, plain=True)])


# ---------------------------------------------------------------------------------------------- groups


def _groups(run: RunData) -> Section:
    section = Section("Responses")
    rows, source = _last_sequences(run)
    if not rows:
        section.text.append("No sequences were kept (tracking.rollouts, tracking.samples).")
        return section
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["group"]), []).append(row)
    first, last = min(groups)[0], max(groups)[0]
    section.text.append(
        f"Best and worst of the last {_GROUP_STEPS} steps only (here {first} to {last}), not of the whole run; from "
        f"{source}, at most {_RESPONSES} responses of a group."
    )

    def mean(key: tuple[int, int], name: str) -> float:
        return float(np.mean([abs(row[name]) if name == "advantage" else row[name] for row in groups[key]]))

    newest = sorted(groups, reverse=True)
    chosen = {
        "best": sorted(newest, key=lambda key: -mean(key, "reward"))[:_GROUPS],
        "worst": sorted(newest, key=lambda key: mean(key, "reward"))[:_GROUPS],
        "largest advantages": sorted(newest, key=lambda key: -mean(key, "advantage"))[:_GROUPS],
    }
    section.groups = [_group(label, key, groups[key]) for label, keys in chosen.items() for key in keys]
    return section


def _last_sequences(run: RunData) -> tuple[list[Row], str]:
    """Sequences of the last steps, and where they are from."""
    files = run.rollouts[-_GROUP_STEPS:]
    if files:
        wanted = ["step", "group", "prompt", "answer", "response", "reward", "advantage", "p", "truncated", "length"]
        return [row for file in files for row in read_rollouts(file, wanted).to_pylist()], "rollouts/"
    rows = read_rows(run.folder / "samples.jsonl")
    last = rows[-1]["step"] if rows else 0
    return [row for row in rows if row["step"] > last - _GROUP_STEPS], "samples.jsonl (parts of groups)"


def _group(label: str, key: tuple[int, int], rows: Sequence[Row]) -> Group:
    rewards = [row["reward"] for row in rows]
    summary = f"{label}: step {key[0]}, group {key[1]}, mean reward {np.mean(rewards):.3f} of {len(rows)}"
    if rows[0].get("p") is not None:
        summary += f", p {rows[0]['p']:.2f}"
    # Both ends of what the group did, whatever its order.
    ordered = sorted(rows, key=lambda row: -row["reward"])
    half = _RESPONSES // 2
    shown = ordered if len(ordered) <= _RESPONSES else [*ordered[:half], *ordered[-half:]]
    responses = [
        Response(
            f"reward {row['reward']:g}, advantage {row['advantage']:+.3f}"
            + (f", {row['length']} tokens" if row.get("length") is not None else "")
            + (", cut" if row["truncated"] else ""),
            row["reward"] >= max(rewards) and row["reward"] > 0,
            _shortened(row["response"]),
        )
        for row in shown
    ]
    return Group(summary, _shortened(f"{rows[0]['prompt']}\n\n[answer: {rows[0]['answer']}]"), responses)


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}\n[... {len(text) - _LONGEST_TEXT} more characters]"
