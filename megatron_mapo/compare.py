"""``megatron-mapo compare``: several configurations, several seeds, and what may be said about the difference.

The runs are ordinary runs, started by ``launch local`` one after another; seeds go round, so that a comparison that is
stopped has all configurations at about the same number of seeds. What is finished is found by looking into the run
folders: the same command goes on where it was stopped, also in the middle of a run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megatron_mapo.config import Config, flatten, load_config, to_yaml
from megatron_mapo.errors import ConfigError, TrainingError
from megatron_mapo.launch.processes import POLL_SECONDS, Kept
from megatron_mapo.reporting.arms import collect
from megatron_mapo.reporting.comparison_report import analyse, headline, write_report
from megatron_mapo.reporting.run_data import TRAINING_ACCURACY, RunData, first_of, load_run
from megatron_mapo.rollout.server import log_tail
from megatron_mapo.tracking.jsonl import read_rows
from megatron_mapo.tracking.progress import duration

# What a comparison may be gone on with differently: it does not change what is learned.
_FREE = ("rollout.urls", "rollout.server.", "rollout.api_key_file", "tracking.", "run.")


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        configs: YAML files, one a configuration.
        runs: folders of runs that exist; then nothing is started.
        seeds: runs of each configuration; ``run.seed`` is 0, 1, ...
        name: of the comparison; None: made of the configurations' names.
        baseline: name of the configuration that the others are compared with; None: the first.
        target: accuracy whose first reaching is told.
        processes: trainer processes of a run; None: as ``launch local``.
        output: folder of the report; None: ``report`` beside the runs, or ``./NAME`` with ``runs``.
        overrides: ``section.key=value`` for all configurations.
    """

    configs: Sequence[str]
    runs: Sequence[Path]
    seeds: int
    name: str | None
    baseline: str | None
    target: float
    processes: int | None
    output: Path | None
    overrides: Sequence[str]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        config_path: YAML file.
        label: of the configuration.
        seed: ``run.seed``.
        folder: of the run.
        overrides: everything beside the file.
    """

    config_path: str
    label: str
    seed: int
    folder: Path
    overrides: list[str]

    def state(self) -> RunData | None:
        """What is there of it; None if it was not started."""
        return load_run(self.folder) if (self.folder / "config.yaml").is_file() else None


def compare(request: Request, dry_run: bool) -> Path | None:
    """Make the runs that are missing, then the report.

    Args:
        request: what to compare.
        dry_run: print what would be run, and start nothing.

    Returns:
        ``report.html``; None after a dry run.

    Raises:
        MapoError: a mistake in the request or a configuration, or a run failed. Nothing is left running.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    if bool(request.runs) == bool(request.configs):
        raise ConfigError("compare takes --config FILE (once a configuration), or --runs RUN RUN ...")
    if request.runs:
        if request.overrides:
            raise ConfigError(f"--runs reads what is there; {request.overrides[0]} is for runs that are to be made")
        if dry_run:
            raise ConfigError("--dry-run is for runs that are to be made; --runs starts none")
        return _report(request, request.runs, request.output, console)
    name = request.name or "compare-" + "-".join(_labels(request.configs))
    folder, runs, configs = plan(request, name)
    if request.baseline is not None and request.baseline not in configs:
        raise ConfigError(f"--baseline {request.baseline}: there are only {', '.join(configs)}")
    if dry_run:
        Console(highlight=False, markup=False).print(_plan_table(runs, folder), soft_wrap=True)
        return None
    console.print(_plan_table(runs, folder), soft_wrap=True)
    with _alone(folder):
        _keep_plan(folder, configs)
        for index, run in enumerate(runs, start=1):
            _make(run, f"run {index} of {len(runs)}: {run.folder.name}", folder / "logs", request.processes, console)
    return _report(request, [run.folder for run in runs], request.output or folder / "report", console)


def _report(request: Request, runs: Sequence[Path], output: Path | None, console: Console) -> Path:
    study = collect(runs, request.baseline)
    title = request.name or "compare-" + "-".join(arm.label for arm in study.arms)
    results = analyse(study, request.target)
    page = write_report(results, output or Path(title), title)
    for line in [*study.notes, *headline(results)]:
        console.print(line, soft_wrap=True)
    return page


# ---------------------------------------------------------------------------------------------- the plan


def plan(request: Request, name: str) -> tuple[Path, list[PlannedRun], dict[str, Config]]:
    """Folder of the comparison, its runs in their order, and the configurations by name.

    Raises:
        ConfigError: two configurations have the same name, an override is not for the user to set, or a
            configuration is wrong.
    """
    taken = [text for text in request.overrides if text.partition("=")[0] in ("run.name", "run.seed", "run.resume")]
    if taken:
        raise ConfigError(f"{taken[0]}: compare sets this key itself; --name and --seeds say what it needs to know")
    labels = _labels(request.configs)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--config: the files need different names, got {', '.join(labels)}")
    first = load_config(request.configs[0], [*request.overrides, f"run.name={name}"])
    folder = first.run_dir
    configs, runs = {}, []
    for seed in range(request.seeds):
        for path, label in zip(request.configs, labels, strict=True):
            run_name = f"{label}-seed{seed}"
            mine = [f"run.output_dir={json.dumps(str(folder))}", f"run.name={run_name}", f"run.seed={seed}"]
            overrides = [*request.overrides, *mine]
            configs[label] = load_config(path, overrides)
            runs.append(PlannedRun(path, label, seed, folder / run_name, overrides))
    return folder, runs, configs


def _labels(configs: Sequence[str]) -> list[str]:
    return [Path(path).stem for path in configs]


def _plan_table(runs: Sequence[PlannedRun], folder: Path) -> Table:
    table = Table(title=f"{len(runs)} runs in {folder}", title_justify="left", box=None)
    for name in ("run", "seed", "state"):
        table.add_column(name)
    for run in runs:
        state = run.state()
        if state is None:
            words = "to be made"
        else:
            words = "finished" if state.finished else f"goes on, step {state.step} of {state.steps} was reached"
        table.add_row(run.folder.name, str(run.seed), words)
    return table


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder, and keep a second comparison out of it.

    Raises:
        ConfigError: there is one already, or the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"--name: another comparison is at work in {folder}") from None
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {folder}: {error.strerror}") from error
    with lock:
        yield


def _keep_plan(folder: Path, configs: dict[str, Config]) -> None:
    """Remember the configurations, and refuse others in the same folder.

    Raises:
        ConfigError: the folder holds a comparison of other configurations, or cannot be written.
    """
    try:
        for label, config in configs.items():
            file, text = folder / f"{label}.yaml", to_yaml(config)
            if file.is_file():
                mine, theirs = (flatten(_read_yaml(content)) for content in (text, file.read_text(encoding="utf-8")))
                differ = [k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)]
                differ = sorted(key for key in differ if not key.startswith(_FREE))
                if differ:
                    raise ConfigError(
                        f"--name: {folder} holds runs of another {label} ({', '.join(differ)} differ); "
                        "choose another --name, or remove the folder"
                    )
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {folder}: {error.strerror}") from error


def _read_yaml(text: str) -> dict[str, Any]:
    tree = yaml.safe_load(text)
    return tree if isinstance(tree, dict) else {}


# --------------------------------------------------------------------------------------------- the runs


def _make(run: PlannedRun, title: str, logs: Path, processes: int | None, console: Console) -> None:
    """Make or finish one run.

    Raises:
        TrainingError: it failed; with the exit code of the run.
    """
    state = run.state()
    if state is not None and state.finished:
        return
    logs.mkdir(exist_ok=True)
    log = logs / f"{run.folder.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    command = [sys.executable, "-m", "megatron_mapo", "launch", "local", "--config", run.config_path, *run.overrides]
    if processes is not None:
        command += ["--nproc", str(processes)]
    console.print(f"{title}   log {log}", soft_wrap=True)
    started = time.monotonic()
    with Kept(command, log=log) as child:
        watch = _Watch(run, console.print)
        while (code := child.poll()) is None:
            watch.look()
            time.sleep(POLL_SECONDS)
    watch.look()
    if code:
        failure = TrainingError(
            f"{run.folder.name} ended with exit code {code}; the same command goes on from its last checkpoint. "
            f"The end of {log}:\n{log_tail(log)}"
        )
        failure.exit_code = code
        raise failure
    state = run.state()
    if state is None or not state.finished:
        raise TrainingError(f"{run.folder.name} ended before its last step or evaluation; see {log}")
    console.print(f"{title}: done in {duration(time.monotonic() - started)}")


class _Watch:
    """Tells about every tenth of a run's steps."""

    def __init__(self, run: PlannedRun, say: Callable[[str], None]) -> None:
        self._metrics, self._say = run.folder / "metrics.jsonl", say
        self._steps = load_config(run.config_path, run.overrides).trainer.steps
        self._size, self._told = -1, 0

    def look(self) -> None:
        """Print a line if there is something new."""
        size = self._metrics.stat().st_size if self._metrics.exists() else -1
        if size == self._size:
            return
        self._size = size
        rows = read_rows(self._metrics)
        if not rows or rows[-1]["step"] < self._told + max(1, self._steps // 10):
            return
        last = rows[-1]
        self._told = last["step"]
        accuracy = first_of(last, TRAINING_ACCURACY)
        self._say(
            f"  step {self._told} of {self._steps}" + (f", accuracy {accuracy:.3f}" if accuracy is not None else "")
        )
