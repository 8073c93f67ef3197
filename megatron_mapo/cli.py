"""The command line: ``megatron-mapo COMMAND``.

torch and megatron are imported by the commands that need them, so that ``--help`` and mistakes in a
configuration answer at once. A ``MapoError`` is one line on standard error and the exit code of its class;
anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mapo import __version__
from megatron_mapo.errors import CheckpointError, ConfigError, DataError, MapoError

if TYPE_CHECKING:
    from megatron_mapo.megatron.model_check import CheckResult


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        return arguments.run(arguments)
    except MapoError as error:
        _print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)


# ---------------------------------------------------------------------------------------------- parse


class _HelpWithOptions(argparse.Action):
    """``--help`` that goes on with the table of all options."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help="show this text and all options")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        print("\noptions (section.key=value):\n")
        _print_options(None)
        parser.exit()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    # Overrides and flags may come in any order, which argparse does not take in subcommands.
    arguments, rest = parser.parse_known_args(argv)
    unknown = [text for text in rest if text.startswith("-") or "overrides" not in arguments]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-mapo",
        description="Reinforcement learning from verifiable rewards with Megatron-core and SGLang.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-mapo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    launch = commands.add_parser("launch", help="start servers and trainers together")
    where = launch.add_subparsers(metavar="WHERE", required=True)
    local = _run_parser(where, "local", "servers and trainers on this machine", _launch_local)
    local.add_argument("--nproc", type=_positive, metavar="N", help="trainer processes (default: one a GPU)")
    _dry_run(local)
    _slurm_parser(where)
    _ray_parser(where)

    train = _run_parser(commands, "train", "train in this process (or: torchrun -m megatron_mapo.train)", _train)
    _dry_run(train)

    serve = _run_parser(commands, "serve", "start the generation servers and stay with them", _serve)
    serve.add_argument("--log-dir", type=Path, metavar="DIR", help="folder of their logs (default: RUN/logs)")

    _eval_parser(commands)

    _checkpoint_parsers(commands)

    plot = _command(commands, "plot", "draw a run's curves", _plot)
    plot.add_argument("run_dir", type=Path, metavar="RUN", help="folder of the run")

    _report_parsers(commands)

    doctor = _run_parser(commands, "doctor", "check this machine, and what a configuration needs of it", _doctor)
    doctor.add_argument("--quick", action="store_true", help="start no server")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--nproc", type=_positive, metavar="N", help="trainer processes (default: one a GPU)")

    _reward_check_parser(commands)

    options = _command(commands, "options", "list all options of a configuration", _options)
    options.add_argument("section", nargs="?", help="only this section, such as actor or actor.optim")
    return parser


def _checkpoint_parsers(commands: Any) -> None:
    export = _command(commands, "export", "write a Hugging Face folder from a checkpoint", _export)
    export.add_argument("run_dir", type=Path, metavar="RUN", help="folder of the run, or of an imported model")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    export.add_argument("--step", type=_positive, metavar="N", help="checkpoint to take (default: the last)")
    _dtype(export, "type of the written weights (default: that of the checkpoint)")
    export.add_argument("--shard-gb", type=_size, default=5.0, metavar="X", help="size of a file, 10^9 bytes (5)")
    export.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to this model repository")
    export.add_argument("--private", action="store_true", help="make a repository that does not exist yet private")

    load = _command(commands, "import", "write a Megatron checkpoint from a Hugging Face model", _import)
    load.add_argument("model", metavar="MODEL", help="Hugging Face folder, or a name on the hub")
    load.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    _dtype(load, "type of the weights (default: that of the model)")
    _fallback(load)

    check = _command(commands, "check", "compare a Hugging Face model's log-probs with transformers", _check)
    check.add_argument("model", metavar="MODEL", help="Hugging Face folder, or a name on the hub")
    check.add_argument("--length", type=_length, default=256, metavar="N", help="tokens of the longest sequence (256)")
    check.add_argument("--bound", type=_size, default=1e-3, metavar="X", help="largest difference, in nat (0.001)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    _fallback(check)

    inspect = _command(commands, "inspect", "show a run or one checkpoint, and check its files", _inspect)
    inspect.add_argument("path", type=Path, metavar="RUN", help="folder of a run, a checkpoint or an imported model")
    inspect.add_argument("--verify", action="store_true", help="read all files and compare their checksums")


def _command(commands: Any, name: str, text: str, run: Any, **settings: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **settings)
    parser.set_defaults(run=run)
    return parser


def _run_parser(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """A command that takes a configuration."""
    parser = _command(commands, name, text, run, add_help=False)
    parser.add_argument("-h", "--help", action=_HelpWithOptions)
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that replace the file's")
    return parser


def _slurm_parser(where: Any) -> None:
    parser = _run_parser(where, "slurm", "servers and trainers in a Slurm job", _launch_slurm)
    add = parser.add_argument
    add("--nodes", type=_positive, default=2, metavar="N", help="nodes of the job (default: 2)")
    add("--server-nodes", type=int, default=1, metavar="N", help="those that only serve; 0: all do both (default: 1)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="0 asks for none (default: 8)")
    add("--trainers-per-node", type=_positive, metavar="N", help="default: a node's GPUs, less the servers' on it")
    add("--partition", metavar="NAME", help="as sbatch takes it")
    add("--account", metavar="NAME", help="as sbatch takes it")
    add("--time", default="24:00:00", metavar="LIMIT", help="time limit, as sbatch takes it (default: 24:00:00)")
    add(
        "--grace", type=_positive, default=900, metavar="SECONDS", help="save this long before the limit (default: 900)"
    )
    add("--restarts", type=int, default=2, metavar="N", help="of crashed trainers within the job (default: 2)")
    add("--container", default="", metavar="KIND:IMAGE", help="pyxis:IMAGE or apptainer:IMAGE")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="further option of sbatch; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the script; submit nothing")


def _ray_parser(where: Any) -> None:
    parser = _run_parser(where, "ray", "servers and trainers in a Ray cluster", _launch_ray)
    add = parser.add_argument
    add("--address", metavar="HOST:PORT", help="cluster; auto: this machine's (default: RAY_ADDRESS, or a new one)")
    add("--nproc", type=_positive, metavar="N", help="trainer ranks (default: those of one model replica)")
    add("--trainer-nodes", type=_positive, default=1, metavar="N", help="bundles that the ranks fill (default: 1)")
    add("--cpus-per-trainer", type=_size, default=1.0, metavar="X", help="cores that a rank reserves (default: 1)")
    add("--cpus-per-server", type=_size, default=1.0, metavar="X", help="cores that a server reserves (default: 1)")
    add(
        "--placement", default="PACK", choices=["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"], help="of the bundles"
    )
    add("--wait", type=_size, default=600.0, metavar="SECONDS", help="until they are free (default: 600)")
    add("--env", action="append", default=[], metavar="NAME", help="variable for the processes; may be repeated")
    _dry_run(parser)


def _eval_parser(commands: Any) -> None:
    """Options that are left out keep the configuration's values, so none but ``-k`` has a default here."""
    parser = _run_parser(commands, "eval", "evaluate a model folder or a run: pass@1, pass@k, maj@k", _eval)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="Hugging Face folder, RUN folder, or quickstart:smollm2")
    add("--step", type=_positive, metavar="N", help="checkpoint of a RUN (default: the last)")
    add("--data", metavar="DATA", help="prompts, in the forms of data.train (default: data.eval)")
    add("--split", help="split of a Hugging Face dataset")
    add("--limit", type=_positive, metavar="N", help="only the first N prompts")
    add("-k", type=_positive, default=8, metavar="N", dest="samples", help="samples a prompt (default: 8)")
    add("--greedy", action="store_true", help="one greedy response a prompt beside the samples")
    add("--temperature", type=float, metavar="T", help="sampling temperature")
    add("--max-tokens", type=_positive, metavar="N", help="longest response")
    add("--reward", metavar="NAME", help="verifier, as reward.name")
    add("--seed", type=int, metavar="N", help="of sampling and intervals")
    add("--url", action="append", default=[], dest="urls", metavar="URL", help="running server; may be repeated")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: in RUN/evaluations, or ./eval-MODEL)")
    add("--overwrite", action="store_true", help="drop samples of other settings in that folder")


def _reward_check_parser(commands: Any) -> None:
    parser = _run_parser(
        commands, "reward-check", "run verifiers over a file of responses and compare them", _reward_check
    )
    add = parser.add_argument
    add(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="rows with question, answer, response; or samples.jsonl",
    )
    add("--reward", action="append", default=[], dest="rewards", metavar="NAME", help="verifier; may be repeated")
    add("--against", metavar="NAME", help="verifier that the others are compared with")
    add("--label-key", metavar="COLUMN", help="column that says what is right: true, false, or a reward")
    add("--output", type=Path, metavar="FILE.jsonl", help="write all rows with all verdicts")
    add("--limit", type=_positive, metavar="N", help="only the first N rows")
    add("--show", type=_count, default=10, metavar="N", help="print at most N differing rows (default: 10)")


def _report_parsers(commands: Any) -> None:
    page = _command(commands, "report", "write one HTML page about a run: curves, groups, timing, events", _report)
    page.add_argument("run_dir", type=Path, metavar="RUN", help="folder of the run")
    page.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: RUN/report.html)")

    parser = _command(commands, "compare", "run configurations with several seeds each, and compare them", _compare)
    add = parser.add_argument
    add("--config", action="append", default=[], dest="configs", metavar="FILE", help="YAML file; once a configuration")
    add("--runs", type=Path, nargs="+", default=[], metavar="RUN", help="compare runs that are there (NAME-seedN)")
    add("--seeds", type=_positive, default=5, metavar="N", help="runs of each configuration (default: 5)")
    add("--name", help="name of the comparison (default: compare-CONFIG-CONFIG)")
    add("--baseline", metavar="CONFIG", help="what the others are compared with (default: the first)")
    add("--target", type=float, default=0.5, metavar="X", help="accuracy to be reached (default: 0.5)")
    add("--nproc", type=_positive, dest="processes", metavar="N", help="trainer processes (default: one a GPU)")
    add("--output", type=Path, metavar="DIR", help="folder of the report")
    add("overrides", nargs="*", metavar="section.key=value", help="options for all configurations")
    _dry_run(parser)


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan; start nothing")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def _size(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _length(text: str) -> int:
    value = int(text)
    if value < 16:
        raise argparse.ArgumentTypeError(f"must be at least 16, got {text}")
    return value


def _fallback(parser: argparse.ArgumentParser) -> None:
    text = "who translates a family that docs/models.md does not list (default: none, it is refused)"
    parser.add_argument("--fallback", choices=["none", "megatron_bridge"], default="none", help=text)


def _dtype(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=text)


# ------------------------------------------------------------------------------------------- commands


def _train(arguments: argparse.Namespace) -> int:
    from megatron_mapo.config import load_config
    from megatron_mapo.hardware import settle_dtype

    config = settle_dtype(load_config(arguments.config, arguments.overrides))
    file = [] if arguments.config is None else ["--config", arguments.config]
    argv = [*file, *arguments.overrides]
    if arguments.dry_run:
        parallel = config.actor.parallel
        ranks = int(os.environ.get("WORLD_SIZE", parallel.tensor * parallel.pipeline * parallel.context))
        return _print_plan(config, ranks, ["python", "-m", "megatron_mapo.train", *argv])
    from megatron_mapo import train

    return train.main(argv)


def _launch_local(arguments: argparse.Namespace) -> int:
    from megatron_mapo.config import load_config
    from megatron_mapo.hardware import settle_dtype

    config = settle_dtype(load_config(arguments.config, arguments.overrides))
    from megatron_mapo.launch import local
    from megatron_mapo.launch.processes import Stopped, stop_signals

    processes = arguments.nproc or local.default_processes(config)
    if arguments.dry_run:
        command = local.trainer_command(arguments.config, arguments.overrides)
        return _print_plan(config, processes, command)
    try:
        with stop_signals():
            return local.launch(arguments.config, arguments.overrides, config, processes)
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from the last checkpoint", file=sys.stderr)
        return stopped.exit_code


def _launch_slurm(arguments: argparse.Namespace) -> int:
    from megatron_mapo.config import load_config
    from megatron_mapo.launch import slurm
    from megatron_mapo.launch.arguments import hidden

    config = load_config(arguments.config, arguments.overrides)
    named = [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(arguments, name))]
    job = slurm.SlurmJob(
        nodes=arguments.nodes,
        server_nodes=arguments.server_nodes,
        gpus_per_node=arguments.gpus_per_node,
        trainers_per_node=arguments.trainers_per_node or 0,
        time=arguments.time,
        grace=arguments.grace,
        restarts=arguments.restarts,
        container=arguments.container,
        sbatch=(*named, *arguments.sbatch),
    )
    job.check(config)
    if arguments.dry_run:
        shown = [hidden(override) for override in arguments.overrides]
        print(slurm.render(job, arguments.config, shown, config), end="")
        return 0
    number = slurm.submit(slurm.render(job, arguments.config, arguments.overrides, config), config)
    print(f"job {number}; it writes to {config.run_dir.absolute()}/logs/slurm-{number}.out")
    return 0


def _launch_ray(arguments: argparse.Namespace) -> int:
    from megatron_mapo.config import load_config
    from megatron_mapo.hardware import settle_dtype

    config = load_config(arguments.config, arguments.overrides)
    from megatron_mapo.launch import local, ray
    from megatron_mapo.launch.processes import Stopped, stop_signals

    parallel = config.actor.parallel
    job = ray.RayJob(
        processes=arguments.nproc or parallel.tensor * parallel.pipeline * parallel.context,
        trainer_nodes=arguments.trainer_nodes,
        cpus_per_trainer=arguments.cpus_per_trainer,
        cpus_per_server=arguments.cpus_per_server,
        placement=arguments.placement,
        address=arguments.address,
        wait=arguments.wait,
        variables=tuple(arguments.env),
    )
    job.check(config)
    try:
        with stop_signals():
            if arguments.dry_run:
                rows = ray.plan_rows(job, config)
                command = local.trainer_command(arguments.config, arguments.overrides)
                return _print_plan(settle_dtype(config), job.processes, command, rows)
            return ray.launch(job, arguments.config, arguments.overrides, config)
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from the last checkpoint", file=sys.stderr)
        return stopped.exit_code


def _serve(arguments: argparse.Namespace) -> int:
    from megatron_mapo.config import load_config
    from megatron_mapo.hardware import settle_dtype

    config = settle_dtype(load_config(arguments.config, arguments.overrides))
    from megatron_mapo.launch.processes import Stopped, stop_signals
    from megatron_mapo.launch.serve import serve

    try:
        with stop_signals():
            serve(config, arguments.log_dir)
    except Stopped:
        print("servers ended", file=sys.stderr)
        return 0  # a signal is the way to end this command


def _eval(arguments: argparse.Namespace) -> int:
    from megatron_mapo.evaluate import Request, evaluate
    from megatron_mapo.launch.processes import Stopped, stop_signals

    given = {key: value for key, value in vars(arguments).items() if key != "run"}
    try:
        with stop_signals():
            evaluate(Request(**given))
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on with the prompts that are left", file=sys.stderr)
        return stopped.exit_code
    return 0


def _export(arguments: argparse.Namespace) -> int:
    folder, repository = arguments.run_dir, arguments.push_to_hub
    if arguments.private and repository is None:
        raise ConfigError("--private belongs to --push-to-hub OWNER/NAME")
    from megatron_mapo.checkpoint_files import IMPORTED

    if not any((folder / name).is_dir() for name in ("checkpoints", IMPORTED)):
        raise CheckpointError(f"{folder} has no checkpoints; it must be the folder of a run or of an imported model")
    if arguments.out.exists():
        raise ConfigError(f"{arguments.out} exists; name a folder that does not")
    from megatron_mapo import hub

    if repository is not None:  # first, so that a wrong token or name costs nothing
        hub.create_repository(repository, arguments.private)
    from megatron_mapo.config import Dtype
    from megatron_mapo.export import export_run

    dtype = None if arguments.dtype is None else Dtype(arguments.dtype)
    size = int(arguments.shard_gb * 1e9)
    print(export_run(folder, arguments.out, arguments.step, dtype=dtype, shard_bytes=size))
    if repository is not None:
        print(hub.push_folder(arguments.out, repository, f"Upload {folder.resolve().name}"))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    if arguments.out.exists():
        raise ConfigError(f"{arguments.out} exists; name a folder that does not")
    from megatron_mapo.quickstart import resolve_model_path

    model = resolve_model_path(arguments.model)
    from megatron_mapo.config import Dtype, Fallback
    from megatron_mapo.megatron.imported import import_folder

    dtype = None if arguments.dtype is None else Dtype(arguments.dtype)
    print(import_folder(model, arguments.out, dtype, Fallback(arguments.fallback)))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from megatron_mapo.quickstart import resolve_model_path

    model = resolve_model_path(arguments.model)
    from megatron_mapo.config import Fallback
    from megatron_mapo.megatron.model_check import check_model

    result = check_model(model, arguments.length, Fallback(arguments.fallback))
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result) | {"largest": result.largest, "bound": arguments.bound}))
    else:
        _print_check(result)
    if not result.largest <= arguments.bound:  # NaN is a failure too
        raise DataError(
            f"{arguments.model}: differs by {result.largest:.2e} nat, more than --bound {arguments.bound:g}"
        )
    return 0


def _print_check(result: CheckResult) -> None:
    for difference in result.differences:
        print(
            f"{difference.tokens} tokens: |difference| to transformers at most {difference.largest:.2e}, "
            f"on average {difference.mean:.2e} nat"
        )
    if result.window is not None:
        print(f"the sliding window of {result.window} tokens is not exercised; --length {2 * result.window} does so")


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_mapo.checkpoint_files import CONFIG
    from megatron_mapo.launch.run_folder import find_checkpoint, read_run

    single = find_checkpoint(arguments.path)
    if single is not None:
        own = single.path / CONFIG
        if own.is_file():
            print(own.read_text(encoding="utf-8"))
        problem = _print_checkpoint(single, arguments.verify)
        problems = [problem] if problem else []
    else:
        summary = read_run(arguments.path)
        print(summary.config)
        print(f"last step: {'none yet' if summary.step is None else summary.step}")
        problems = [p for p in (_print_checkpoint(c, arguments.verify) for c in summary.checkpoints) if p]
        if not summary.checkpoints:
            print("checkpoints: none")
        _print_metrics([*sorted(summary.metrics.items()), *sorted(summary.evaluation.items())])
    if problems:
        raise CheckpointError(problems[0])
    return 0


def _print_checkpoint(checkpoint: Any, checksums: bool) -> str | None:
    from megatron_mapo.launch.run_folder import describe_checkpoint

    lines, problem = describe_checkpoint(checkpoint, checksums)
    print("\n".join(lines))
    return problem


def _print_metrics(values: list[tuple[str, tuple[Any, int]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "last value", "step", box=None, pad_edge=False)
    for name, (value, step) in values:
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value), str(step))
    Console(highlight=False).print(table)


def _plot(arguments: argparse.Namespace) -> int:
    from megatron_mapo.tracking.plots import plot_run

    print(plot_run(arguments.run_dir))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megatron_mapo.reporting.run_report import report

    print(report(arguments.run_dir, arguments.output))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from megatron_mapo.compare import Request, compare
    from megatron_mapo.launch.processes import Stopped, stop_signals

    given = {key: value for key, value in vars(arguments).items() if key not in ("run", "dry_run")}
    try:
        with stop_signals():
            page = compare(Request(**given), arguments.dry_run)
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return stopped.exit_code
    if page is not None:
        print(page)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_mapo.config import load_config
    from megatron_mapo.doctor import examine, report
    from megatron_mapo.launch.processes import Stopped, stop_signals

    # Ports and folders can be looked at without a run, so its mandatory keys may be left out.
    open_keys = {"model.path": "none", "data.train": "none"} if arguments.config is None else {}
    for text in arguments.overrides:
        open_keys.pop(text.partition("=")[0], None)
    config = load_config(arguments.config, [*(f"{k}={v}" for k, v in open_keys.items()), *arguments.overrides])
    show = report.print_json if arguments.json else report.print_report
    try:
        with stop_signals():
            return int(not show(examine(config, arguments.nproc, needs=not open_keys, quick=arguments.quick)))
    except Stopped as stopped:
        return stopped.exit_code


def _reward_check(arguments: argparse.Namespace) -> int:
    from megatron_mapo.reward_check import Request, reward_check

    reward_check(Request(**{key: value for key, value in vars(arguments).items() if key != "run"}))
    return 0


def _options(arguments: argparse.Namespace) -> int:
    _print_options(arguments.section)
    return 0


def _print_options(section: str | None) -> None:
    from rich.console import Console

    from megatron_mapo.config import options_tables

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for table in options_tables(section):
        console.print(table)
        console.print()


def _print_plan(config: Any, processes: int, command: list[str], rows: Sequence[tuple[str, str]] = ()) -> int:
    from rich.console import Console

    from megatron_mapo.launch.plan import make_plan, plan_table

    table = plan_table(make_plan(config, processes, command))
    for name, text in rows:
        table.add_row(name, text)
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(table)
    return 0
