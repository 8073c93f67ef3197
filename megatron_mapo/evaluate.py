"""``megatron-mapo eval``: a model or a run's checkpoint, through SGLang, on held-out prompts.

In this order, so that mistakes show before anything expensive starts: configuration, model, data, verifier, what
the output folder already holds; then (for a run) the checkpoint as a Hugging Face folder, the server, the samples;
then the numbers. Finished prompts are in ``samples.jsonl`` at once: the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_mapo import __version__
from megatron_mapo.config import DATA_SUFFIXES, Config, RewardComponent, load_config, single_verifier
from megatron_mapo.data.prompts import PromptSet, load_prompts
from megatron_mapo.errors import CheckpointError, ConfigError
from megatron_mapo.hardware import settle_dtype
from megatron_mapo.launch.processes import POLL_SECONDS, Kept
from megatron_mapo.launch.run_folder import config_file, list_checkpoints
from megatron_mapo.quickstart import resolve_model_path
from megatron_mapo.rendezvous import process_alone
from megatron_mapo.rewards.pool import RewardPool
from megatron_mapo.rollout.client import read_api_key
from megatron_mapo.rollout.evaluation import Evaluator, Row, Tally, row_order
from megatron_mapo.rollout.sampler import Sampler
from megatron_mapo.rollout.scoring import Scorer
from megatron_mapo.rollout.server import ServerGroup, log_tail
from megatron_mapo.rollout.session import open_client, stop_token_ids
from megatron_mapo.tracking.jsonl import read_rows, replace_rows, to_line
from megatron_mapo.tracking.plots import plot_evaluation

# The keys of trainers must not stand in the way of an evaluation, which has none.
_NO_TRAINER = ("actor.microbatch_tokens=1000000000000", "actor.adv_norm.aggregation_mode=native")
# A run's servers may still be up, and the network has no business here.
_OWN_SERVER = ("rollout.urls=[]", "rollout.server.host=127.0.0.1", "rollout.server.port=0", "rollout.api_key_file=null")
_PACKAGES = ("torch", "transformers", "sglang", "math-verify", "reasoning-gym")


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None leaves a value to the configuration.

    Attributes:
        model: Hugging Face folder, a run's folder, or anything else that ``model.path`` takes.
        step: checkpoint of a run; None: the last one.
        data, split, limit, temperature, max_tokens, reward, seed: replace their configuration keys.
        samples: sampled responses a prompt.
        greedy: also one greedy response a prompt.
        urls: running servers to use; none: a server is started.
        out: folder to write.
        overwrite: drop samples of other settings in ``out``.
        config: YAML file.
        overrides: ``section.key=value``.
    """

    model: str
    step: int | None = None
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    samples: int = 8
    greedy: bool = False
    temperature: float | None = None
    max_tokens: int | None = None
    reward: str | None = None
    seed: int | None = None
    urls: Sequence[str] = ()
    out: Path | None = None
    overwrite: bool = False
    config: str | None = None
    overrides: Sequence[str] = ()

    @property
    def run_dir(self) -> Path | None:
        """The run's folder, if ``model`` is one."""
        folder = Path(self.model).expanduser()
        return folder if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file() else None


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        label: for people.
        source: Hugging Face folder with the tokenizer; also the weights, unless ``step`` is set.
        run_dir, step: the run and its checkpoint; None if it is a folder or a running server.
        identity: JSON values that differ when the weights do.
        default_out: where results go.
    """

    label: str
    source: Path
    run_dir: Path | None
    step: int | None
    identity: dict[str, Any]
    default_out: Path


def evaluate(request: Request) -> Path:
    """Run an evaluation to its end and print its numbers.

    Returns:
        the folder with ``samples.jsonl``, ``results.json`` and ``results.png``.

    Raises:
        MapoError: anything that the user can mend; nothing is left running.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    config = settle_dtype(evaluation_config(request))
    subject = find_subject(request, config, console)
    prompts, tokenizer = _load_prompts(config, subject.source)
    with ExitStack() as stack:
        rewards = stack.enter_context(RewardPool(config.reward))
        out = request.out or subject.default_out
        settings = _settings(request, config, subject, prompts)
        samples = stack.enter_context(SampleFile(out, settings, request.overwrite))
        tally = Tally(len(prompts), request.samples, request.greedy, rewards.extracts)
        samples.keep(tally.add_complete(samples.rows()))
        started, before = time.monotonic(), int(tally.done.sum())
        if before:
            console.print(f"{before} of {len(prompts)} prompts are in {samples.path} already", soft_wrap=True)
        if not bool(tally.done.all()):
            urls, api_key, check = stack.enter_context(_servers(config, subject, out, console))
            with _progress(console, before, len(prompts)) as show:
                client = open_client(config, subject.source, urls, api_key)
                stop = stop_token_ids(subject.source, tokenizer.eos_token_id)
                scorer = Scorer(tokenizer, rewards)
                sampler = Sampler(client, config.rollout, scorer, stop, watch=check, progress=show)
                stack.callback(sampler.close)
                Evaluator(sampler, scorer, config.right_from).run(prompts, tally, config.run.seed, samples.add)
        samples.keep(sorted(samples.rows(), key=row_order))
        _report(out, subject, settings, tally, config, time.monotonic() - started)
    return out


# ---------------------------------------------------------------------------------- what is evaluated


def evaluation_config(request: Request) -> Config:
    """The configuration of an evaluation: the file (of the run), then the user's overrides, then the options.

    Raises:
        ConfigError: the options contradict each other, or a key is wrong.
    """
    run_dir = request.run_dir
    if run_dir is not None and request.config is not None:
        raise ConfigError(f"--config: {run_dir} is a run and brings its own; use section.key=value for what differs")
    options: dict[str, Any] = {
        "data.eval": request.data,
        "data.eval_split": request.split,
        "data.eval_limit": request.limit,
        "rollout.temperature": request.temperature,
        "rollout.max_response_tokens": request.max_tokens,
        "run.seed": request.seed,
        "rollout.urls": list(request.urls) or None,
        "trainer.evaluation.samples": request.samples,
        "model.path": None if run_dir is not None else request.model,
    }
    file: str | Path | None = request.config
    if run_dir is not None:
        # Running servers have the weights of the last start.
        file = run_dir / "config.yaml" if request.urls else config_file(run_dir, request.step)
    without_file = ["model.dtype=auto", f"data.train={json.dumps(request.data or 'none')}"] if file is None else []
    own_server = () if request.urls else _OWN_SERVER
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    config = load_config(file, [*without_file, *own_server, *request.overrides, *given, *_NO_TRAINER])
    if request.reward is not None:
        config.reward = single_verifier(config.reward, request.reward, request.overrides)
    if request.step is not None and (run_dir is None or config.rollout.urls):
        raise ConfigError("--step chooses a checkpoint of a run: --model must be a run's folder, and no --url be given")
    if config.data.eval is None:
        raise ConfigError("--data: name the prompts to evaluate on; the configuration has no data.eval")
    return config


def find_subject(request: Request, config: Config, console: Console) -> Subject:
    """Find the model, the checkpoint or the running servers that ``--model`` and ``--url`` mean.

    Raises:
        DataError, CheckpointError: there is no such model or checkpoint.
        RolloutError: a server does not answer, or the servers have different weights.
    """
    with console.status("looking for the model"):
        source = resolve_model_path(config.model.path).absolute()
    run_dir, data = request.run_dir, _file_name(_data_name(str(config.data.eval)))
    model = _file_name(Path(request.model).name if Path(request.model).is_dir() else request.model)
    if config.rollout.urls:
        identity = _ask_servers(config, source, console)
        where = Path(f"eval-{model}-servers") if run_dir is None else run_dir / "evaluations" / f"servers-{data}"
        return Subject(f"the weights of {', '.join(config.rollout.urls)}", source, None, None, identity, where)
    if run_dir is None:
        identity = {"path": str(source.resolve()), "files": _stamp(source, "*.safetensors", "config.json")}
        return Subject(request.model, source, None, None, identity, Path(f"eval-{model}"))
    saved = {checkpoint.step: checkpoint.path for checkpoint in list_checkpoints(run_dir)}
    if not saved:
        raise CheckpointError(f"{run_dir}/checkpoints holds no complete checkpoint")
    step = max(saved) if request.step is None else request.step
    if step not in saved:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; there are: {sorted(saved)}")
    identity = {"run": str(run_dir.resolve()), "step": step, "files": _stamp(saved[step], "**/*")}
    where = run_dir / "evaluations" / f"step_{step:06d}-{data}"
    return Subject(f"{run_dir}, step {step}", source, run_dir, step, identity, where)


def _ask_servers(config: Config, source: Path, console: Console) -> dict[str, Any]:
    """Model and version of running servers; says plainly that these weights are what is evaluated."""
    import asyncio

    from megatron_mapo.errors import RolloutError

    async def ask() -> list[dict[str, Any]]:
        client = open_client(config, source, config.rollout.urls, read_api_key(config.rollout.api_key_file))
        try:
            return [await client.model_info(url) for url in client.urls]
        finally:
            await client.close()

    held = [{key: str(info.get(key)) for key in ("model_path", "weight_version")} for info in asyncio.run(ask())]
    if any(one != held[0] for one in held):
        raise RolloutError(f"--url: the servers hold different weights: {held}")
    path, version = held[0]["model_path"], held[0]["weight_version"]
    console.print(
        f"evaluating the weights that the server holds: {path}, version {version}. What --model names gives only "
        "tokenizer and configuration",
        soft_wrap=True,
    )
    if Path(path).resolve() != source.resolve():
        console.print(f"warning: the server was started with {path}, --model means {source}", style="yellow")
    return {"server_" + key: value for key, value in held[0].items()}


def _load_prompts(config: Config, source: Path) -> tuple[PromptSet, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    data, longest = config.data, config.rollout.max_prompt_tokens
    assert data.eval is not None
    prompts = load_prompts(data.eval, data.eval_split, data, tokenizer, longest, key="data.eval", limit=data.eval_limit)
    return prompts, tokenizer


def _settings(request: Request, config: Config, subject: Subject, prompts: PromptSet) -> dict[str, Any]:
    """All that the samples depend on; samples of other settings must not be mixed with them."""
    data, reward = config.data, config.reward
    return {
        "model": subject.identity | {"dtype": config.model.dtype.value},
        "data": {
            "source": data.eval,
            "split": data.eval_split,
            "limit": data.eval_limit,
            "rows": prompts.fingerprint(),
            "template": data.template,
            "system": data.system,
        },
        "samples": request.samples,
        "greedy": request.greedy,
        "temperature": config.rollout.temperature,
        "max_response_tokens": config.rollout.max_response_tokens,
        "seed": config.run.seed,
        "reward": {
            "verifiers": {component.title: _verifier_settings(component) for component in reward.components},
            "success": reward.success,
            "success_score": reward.success_score,
            "correct": reward.correct,
            "wrong": reward.wrong,
            "right_from": config.right_from,
        },
    }


def _verifier_settings(component: RewardComponent) -> dict[str, Any]:
    file = Path(component.name.rpartition(":")[0])
    return {
        "name": component.name,
        "weight": component.weight,
        "options": component.options,
        "file": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
    }


def _data_name(source: str) -> str:
    return Path(source).stem if Path(source).suffix in DATA_SUFFIXES else source


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "model"


def _stamp(folder: Path, *patterns: str) -> str:
    """Changes when a file does: names, sizes and times. Reading gigabytes of weights for it would take minutes."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        stat = file.stat()
        digest.update(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- what was sampled


class SampleFile:
    """``samples.jsonl`` of an output folder, with the settings that its rows belong to; a context manager.

    Args:
        out: the folder; made if need be.
        settings: what the samples depend on; kept in ``settings.json``.
        overwrite: drop what other settings left there.

    Raises:
        ConfigError: the folder cannot be made, another evaluation is at work in it, or it holds other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any], overwrite: bool) -> None:
        self.path = out / "samples.jsonl"
        self._settings_file = out / "settings.json"
        self._settings = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self._stack = ExitStack()

    def __enter__(self) -> SampleFile:
        from filelock import FileLock, Timeout

        out = self.path.parent
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(FileLock(out / ".lock", timeout=0))
        except Timeout:
            raise ConfigError(f"--out: another evaluation is at work in {out}") from None
        except OSError as error:
            raise ConfigError(f"--out: cannot write to {out}: {error.strerror}") from error
        try:
            self._check_settings()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _check_settings(self) -> None:
        there = json.loads(self._settings_file.read_text()) if self._settings_file.exists() else None
        if there is not None and there != self._settings and not self._overwrite:
            mine, theirs = _flat(self._settings), _flat(there)
            differ = [
                f"{key} {theirs.get(key)!r} there, {mine.get(key)!r} now"
                for key in sorted(mine.keys() | theirs.keys())
                if mine.get(key) != theirs.get(key)
            ]
            raise ConfigError(
                f"--out: {self.path.parent} holds an evaluation with other settings ({'; '.join(differ)}): "
                "name another folder, or drop it with --overwrite"
            )
        if there != self._settings:
            self.path.unlink(missing_ok=True)
            for name in ("results.json", "results.png"):
                (self.path.parent / name).unlink(missing_ok=True)
            temporary = self._settings_file.with_name(".settings.tmp")
            temporary.write_text(json.dumps(self._settings, indent=2) + "\n")
            os.replace(temporary, self._settings_file)

    def rows(self) -> list[Row]:
        """All complete rows, of finished and half-finished prompts."""
        return read_rows(self.path)

    def keep(self, rows: Sequence[Row]) -> None:
        """Replace the file by ``rows``."""
        replace_rows(self.path, rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Append the rows of one prompt."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(to_line(row) for row in rows))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


# ----------------------------------------------------------------------------------------- the servers


@contextmanager
def _servers(
    config: Config, subject: Subject, out: Path, console: Console
) -> Iterator[tuple[list[str], str | None, Callable[[], None]]]:
    """Addresses, API key and watch of servers with the subject's weights: own ones, unless ``rollout.urls`` is set."""
    if config.rollout.urls:
        yield config.rollout.urls, read_api_key(config.rollout.api_key_file), lambda: None
        return
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    api_key = secrets.token_urlsafe(32)
    with ExitStack() as stack:
        folder = subject.source
        if subject.run_dir is not None:
            folder = out / "model"
            shutil.rmtree(folder, ignore_errors=True)  # what an evaluation that was killed has left
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            with console.status(f"making a model folder of step {subject.step}"):
                _export(subject, folder, logs / "export.log")
        model = dataclasses.replace(config.model, path=str(folder.absolute()))
        with console.status(f"starting {config.rollout.server.count} server(s)") as status:
            servers = stack.enter_context(ServerGroup(config.rollout.server, model, logs, api_key, status.update))
        for server in servers.servers:
            console.print(f"server {server.url}   log {server.log}", soft_wrap=True)
        yield servers.urls, api_key, servers.check


def _export(subject: Subject, out: Path, log: Path) -> None:
    """Write the checkpoint as a Hugging Face folder, in a process whose memory is free again afterwards."""
    # One process on the CPU, whatever launched this one; the GPUs are the servers'.
    environment = process_alone(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "megatron_mapo", "export", str(subject.run_dir), str(out)]
    with Kept([*command, "--step", str(subject.step)], environment, log) as child:
        while (code := child.poll()) is None:
            time.sleep(POLL_SECONDS)
    if code:
        errors = re.findall(r"^error: (.*)", log.read_text(errors="replace"), re.MULTILINE)
        reason = errors[-1] if errors else f"exit code {code}; the end of {log}:\n{log_tail(log)}"
        raise CheckpointError(f"cannot make a model folder of {subject.label}: {reason}")


@contextmanager
def _progress(console: Console, before: int, total: int) -> Iterator[Callable[[int, int], None]]:
    """``show(done, of)`` for the prompts that are left: a bar on a terminal, else a line for every tenth."""
    if not console.is_terminal:
        tenth = max(1, total // 10)

        def line(done: int, of: int) -> None:
            if (before + done) % tenth == 0 or done == of:
                console.print(f"{before + done} of {total} prompts")

        yield line
        return
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("prompts", total=total, completed=before)
        yield lambda done, of: bar.update(task, completed=before + done)


# ----------------------------------------------------------------------------------------- the numbers


def _report(out: Path, subject: Subject, settings: dict[str, Any], tally: Tally, config: Config, took: float) -> None:
    """Write ``results.json`` and ``results.png``, and print the table."""
    metrics = tally.metrics(config.run.seed)
    majority = f"maj_at_{tally.samples}"
    missing = f"the module of {config.reward.main.name} has no function `extract(response)`"
    results = {
        "model": subject.label,
        "metrics": metrics,
        "unavailable": {} if majority in metrics else {majority: missing},
        "settings": settings,
        "seconds": round(took, 3),
        "versions": {"megatron-mapo": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
    }
    temporary = out / ".results.tmp"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, out / "results.json")
    sampled = slice(0, tally.samples)
    title = f"{subject.label}   {_data_name(str(config.data.eval))}"
    plot_evaluation(
        metrics, tally.lens[:, sampled].flatten().numpy(), tally.truncated[:, sampled].flatten().numpy(), title,
        out / "results.png",
    )  # fmt: skip
    console = Console(highlight=False, markup=False)
    console.print(_table(metrics, title, None if majority in metrics else missing))
    print(f"{out}: samples.jsonl results.json results.png")


def _version(package: str) -> str | None:
    """None where it is not installed: servers may run elsewhere."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(metrics: Mapping[str, float], title: str, missing: str | None) -> Table:
    n = int(metrics["samples_per_prompt"])
    table = Table(title=f"{title}\n{int(metrics['prompts'])} prompts x {n} samples", title_justify="left", box=None)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name in metrics:
        if f"{name}_low" in metrics:
            form = "{:.1f}" if name.endswith("length_mean") else "{:.3f}"
            value, low, high = (form.format(metrics[name + end]) for end in ("", "_low", "_high"))
            table.add_row(name.replace("_at_", "@").replace("_", " "), value, f"{low} - {high}")
    if missing is not None:
        table.add_row(f"maj@{n}", "not available", "")
        table.caption = f"maj@{n}: {missing}"
        table.caption_justify = "left"
    return table
