"""One RL step, side by side: `megatron-mapo launch local` and TRL's `GRPOTrainer`, in turn on this machine.

Both take the same prompts in the same order, the same model, the same numbers of responses and tokens, the same
reward and learning rate, and make one optimizer update a rollout. TRL lives in an environment of its own beside
this file, made on the first run from requirements-trl.txt. README.md says what is equal and what is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from environment import prepare
from floor import Matrices, Work, faster, floors, measure_rates
from machine import MemoryWatch, describe_machine, machine_lines, usable_cores
from report import markdown_table, write_results

from megatron_mapo.config import Dtype
from megatron_mapo.hardware import native_dtype
from megatron_mapo.quickstart import resolve_model_path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
TRL_REQUIREMENTS = HERE / "requirements-trl.txt"
PROMPTS = REPOSITORY / "configs" / "addition_train.jsonl"
CONFIG = HERE / "rl_step.yaml"
# A token that a model does not sample: with it as the end of sequence every response has the full length.
UNUSED_TOKEN = "<empty_output>"
STOP_SECONDS = 60.0
QUIET_LOAD = 0.5
NAMES = {"ours": "megatron-mapo", "ours-skip": "megatron-mapo, skipping", "trl": "TRL"}


@dataclass(frozen=True)
class Settings:
    """What both sides do; the JSON form goes to trl_step.py."""

    model: str
    data: str
    dtype: str
    prompts: int
    responses: int
    max_tokens: int
    lr: float
    steps: int
    warmup: int
    seed: int
    threads: int
    trl_microbatch: int
    fixed_length: bool


# ---------------------------------------------------------------------------------------------- prepare


def write_prompts(folder: Path, count: int, seed: int) -> Path:
    """``count`` rows of the training prompts in a seeded order, again from the start where they run out."""
    rows = PROMPTS.read_text().splitlines()
    random.Random(seed).shuffle(rows)
    file = folder / "prompts.jsonl"
    file.write_text("".join(rows[i % len(rows)] + "\n" for i in range(count)))
    return file


def unending_model(model: Path, folder: Path) -> Path:
    """A folder with the same weights whose end of sequence is ``UNUSED_TOKEN``: responses end at the length limit."""
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(str(model)).convert_tokens_to_ids(UNUSED_TOKEN)
    out = folder / f"{model.name}-unending"
    out.mkdir()
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"eos_token_id": token},
        "generation_config.json": {"eos_token_id": token},
        "tokenizer_config.json": {"eos_token": UNUSED_TOKEN},
    }
    for file in model.iterdir():
        if file.name in changes:
            (out / file.name).write_text(json.dumps(json.loads(file.read_text()) | changes[file.name], indent=2))
        else:
            (out / file.name).symlink_to(file.resolve())
    return out


# ------------------------------------------------------------------------------------------------- sides


def run_watched(command: list[str], log: Path, environment: dict[str, str], timeout: float) -> dict[str, float]:
    """Run a command to its end and return the peak memory of its processes, by kind (GiB).

    Raises:
        SystemExit: it failed, or took longer than ``timeout`` seconds; with the end of its log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        with MemoryWatch(process.pid, _kind) as watch:
            try:
                code = process.wait(timeout)
                problem = f"ended with status {code}" if code else None
            except subprocess.TimeoutExpired:
                problem = f"did not end within --timeout {timeout:g} seconds"
            finally:
                _stop(process)
    if problem:
        raise SystemExit(f"{' '.join(command[:5])} ... {problem}; the end of its output:\n{log.read_text()[-4000:]}")
    return watch.peak_gib


def _kind(command: list[str]) -> str | None:
    """What a process is, by its command line."""
    line = " ".join(command)
    if "megatron_mapo.rollout.server_main" in line:
        return "server"
    return "trainer" if "megatron_mapo.launch.keeper" in line or "trl_step.py" in line else None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a command that still runs; our launcher then ends its servers and trainers."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_ours(settings: Settings, folder: Path, name: str, timeout: float) -> dict[str, Any]:
    """Our side, through the launcher, with a server and a trainer as users have them."""
    overrides = {
        "run.name": name,
        "run.output_dir": folder,
        "run.seed": settings.seed,
        "model.path": settings.model,
        "model.dtype": settings.dtype,
        "data.train": settings.data,
        "rollout.prompts_per_step": settings.prompts,
        "rollout.responses_per_prompt": settings.responses,
        "rollout.max_response_tokens": settings.max_tokens,
        "actor.optim.lr": settings.lr,
        "actor.skip_zero_advantage": str(name == "ours-skip").lower(),
        "trainer.steps": settings.warmup + settings.steps,
    }
    launch = [sys.executable, "-m", "megatron_mapo", "launch", "local", "--config", str(CONFIG)]
    command = [*launch, *(f"{key}={value}" for key, value in overrides.items())]
    sampled = run_watched(command, folder / f"{name}.log", {**os.environ, "HF_HUB_OFFLINE": "1"}, timeout)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    # From the end of the step before it, as on the other side; the first has only its own clock.
    seconds = [rows[0]["seconds/step"], *(after["time"] - before["time"] for before, after in pairwise(rows))]
    steps = [_our_step(row, spent) for row, spent in zip(rows, seconds, strict=True)]
    memory = {"trainer": rows[-1]["memory/peak_gib"], "server": sampled["server"]}
    return _side(steps, settings, memory, sampled)


def _side(
    steps: list[dict[str, Any]], settings: Settings, memory: dict[str, float], sampled: dict[str, float]
) -> dict[str, Any]:
    """What is kept of a side; ``sampled`` are the peaks of ``MemoryWatch``, checkpoints included."""
    return {
        "steps": steps[settings.warmup :],
        "warmup_steps": steps[: settings.warmup],
        "peak_gib": memory,
        "sampled_peak_gib": sampled,
    }


def _our_step(row: dict[str, float], seconds: float) -> dict[str, Any]:
    """A row of metrics.jsonl in the form that both sides share; ``seconds``: its time, logging included."""
    details = {key.removeprefix("seconds/"): value for key, value in row.items() if key.startswith("seconds/")}
    phases = {name: details[name] for name in ("rollout", "update", "weight_sync")}
    return {
        "seconds": seconds,
        "phases": {**phases, "other": seconds - sum(phases.values())},
        "details": details,
        "response_tokens": row["response/length_mean"],
        "prompt_tokens": row["prompt/length_mean"],
        "zero_advantage": row["group/zero_advantage"],
        "reward": row["reward/mean"],
        "trained_share": row["speed/trained_share"],
        "packed_tokens": row["speed/packed_tokens"],
    }


def run_trl(settings: Settings, folder: Path, python: Path, timeout: float) -> dict[str, Any]:
    """TRL's side: trl_step.py in its own environment, with all cores."""
    given, found = folder / "trl_settings.json", folder / "trl_result.json"
    given.write_text(json.dumps({**settings.__dict__, "steps": settings.warmup + settings.steps}))
    threads = str(settings.threads)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [str(python), str(HERE / "trl_step.py"), str(given), str(found)]
    sampled = run_watched(command, folder / "trl.log", environment, timeout)
    result = json.loads(found.read_text())
    return _side(result["steps"], settings, {"trainer": result["peak_gib"]}, sampled)


# ----------------------------------------------------------------------------------------------- summary


def summarize(side: dict[str, Any], settings: Settings, model: Matrices, rates: dict[str, float]) -> dict[str, Any]:
    """Medians and means over the measured steps of a side, and the floor for what it worked on."""
    steps = side["steps"]
    seconds = [step["seconds"] for step in steps]

    def mean(name: str) -> float:
        return statistics.fmean(step[name] for step in steps)

    sequences = settings.prompts * settings.responses
    work = Work(settings.prompts, settings.responses, mean("prompt_tokens"), mean("response_tokens"))
    speeds = [sequences * step["response_tokens"] / step["seconds"] for step in steps]
    floor = floors(model, work, rates)
    for bound in floor.values():
        # Groups that were left out of the update need no arithmetic there.
        bound["seconds"]["training"] *= mean("trained_share")
        bound["seconds"]["step"] = bound["seconds"]["generation"] + bound["seconds"]["training"]
    return {
        "step_seconds": statistics.median(seconds),
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "phases": {p: statistics.median(s["phases"][p] for s in steps) for p in steps[0]["phases"]},
        "details": {d: statistics.median(s["details"].get(d, 0.0) for s in steps) for d in steps[0]["details"]},
        "response_tokens_per_second": statistics.median(speeds),
        "prompt_tokens": work.prompt_tokens,
        "response_tokens": work.response_tokens,
        "zero_advantage": mean("zero_advantage"),
        "trained_share": mean("trained_share"),
        "reward": mean("reward"),
        "peak_gib": {**side["peak_gib"], "total": sum(side["peak_gib"].values())},
        "floor": floor,
    }


def _row(name: str, sides: dict[str, Any], cell: Any, form: str) -> list[str]:
    return [name, *(format(cell(side), form) for side in sides.values())]


def _main_table(sides: dict[str, Any]) -> list[str]:
    def least(bound: str) -> Any:
        return lambda side: side["floor"][bound]["seconds"]["step"]

    rows = [
        _row("step, median (s)", sides, lambda s: s["step_seconds"], ".2f"),
        _row("step, fastest (s)", sides, lambda s: s["step_seconds_min"], ".2f"),
        _row("step, slowest (s)", sides, lambda s: s["step_seconds_max"], ".2f"),
        _row("response tokens a second", sides, lambda s: s["response_tokens_per_second"], ".1f"),
        _row("response tokens, mean", sides, lambda s: s["response_tokens"], ".2f"),
        _row("prompt tokens, mean", sides, lambda s: s["prompt_tokens"], ".2f"),
        _row("groups without a gradient", sides, lambda s: s["zero_advantage"], ".0%"),
        _row("response tokens in the update", sides, lambda s: s["trained_share"], ".0%"),
        _row("reward, mean", sides, lambda s: s["reward"], ".3f"),
        _row("peak memory, trainer (GiB)", sides, lambda s: s["peak_gib"]["trainer"], ".2f"),
        _row("peak memory, server (GiB)", sides, lambda s: s["peak_gib"].get("server", 0.0), ".2f"),
        _row("peak memory, both (GiB)", sides, lambda s: s["peak_gib"]["total"], ".2f"),
        _row("floor, a prompt once a group (s)", sides, least("shared"), ".2f"),
        _row("floor, a prompt once a sequence (s)", sides, least("unshared"), ".2f"),
        _row("step / floor once a group", sides, lambda s: s["step_seconds"] / least("shared")(s), ".1f"),
    ]
    return markdown_table(["", *(NAMES[name] for name in sides)], rows)


def _phase_table(sides: dict[str, Any]) -> list[str]:
    head = ["phase", *(text for name in sides for text in (f"{NAMES[name]} (s)", "share", "floor (s)"))]
    floor_of = {"rollout": "generation", "update": "training"}
    rows = []
    for phase in ("rollout", "update", "weight_sync", "other"):
        row = [phase]
        for side in sides.values():
            value = side["phases"].get(phase, 0.0)
            bound = side["floor"]["shared"]["seconds"][floor_of[phase]] if phase in floor_of else None
            share = f"{value / side['step_seconds']:.0%}"
            row += [f"{value:.2f}", share, "" if bound is None else f"{bound:.2f}"]
        rows.append(row)
    return markdown_table(head, rows)


def _detail_lines(sides: dict[str, Any]) -> list[str]:
    return [
        f"- {NAMES[name]}: " + ", ".join(f"{part} {value:.2f}" for part, value in side["details"].items())
        for name, side in sides.items()
    ]


def _ratio_line(sides: dict[str, Any]) -> list[str]:
    if "trl" not in sides or "ours" not in sides:
        return []
    trl = sides["trl"]["step_seconds"]
    said = [f"{trl / side['step_seconds']:.2f} times {NAMES[name]}'s" for name, side in sides.items() if name != "trl"]
    return [f"**TRL's median step is {' and '.join(said)}.**", ""]


def to_markdown(result: dict[str, Any]) -> str:
    """The report."""
    s, sides, rates = result["settings"], result["sides"], result["matmul_flops_per_second"]
    ending = "every response has the full length" if s["fixed_length"] else "a response may end earlier"
    return "\n".join(
        [
            "# One RL step: megatron-mapo and TRL",
            "",
            *_ratio_line(sides),
            f"{s['model_name']} in {s['dtype']}; {s['prompts']} prompts x {s['responses']} responses of at most "
            f"{s['max_tokens']} tokens ({ending}), temperature 1, no KL term, one update a rollout, learning rate "
            f"{s['lr']:g}. {s['steps']} measured steps after {s['warmup']} for warm-up, the sides in turn, "
            f"{s['threads']} threads. TRL's microbatch is {s['trl_microbatch']} sequences.",
            "",
            *_main_table(sides),
            "",
            "## Phases (medians)",
            "",
            *_phase_table(sides),
            "",
            "The floor is that of prompts computed once a group. In detail (seconds):",
            "",
            *_detail_lines(sides),
            "",
            "## Floor",
            "",
            f"FLOPs of the step (formulas: floor.py) over this machine's `torch.mm` in {s['dtype']} on the model's "
            f"matrices: {rates['wide'] / 1e9:.1f} GFLOP/s with 2,048 rows (training, prompts), "
            f"{rates['decode'] / 1e9:.1f} GFLOP/s with {s['prompts'] * s['responses']} rows (decoding); the faster of "
            "two measurements, before and after the sides.",
            "",
            "## Machine",
            "",
            *machine_lines(result["machine"]),
            "",
        ]
    )


# -------------------------------------------------------------------------------------------------- main


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time one RL step of megatron-mapo and of TRL's GRPOTrainer, in turn, on this machine.",
        epilog="Run it on a machine that does nothing else. See benchmarks/README.md.",
    )
    add = parser.add_argument
    add("--steps", type=_positive, default=5, metavar="N", help="measured steps (default: %(default)s)")
    add("--warmup", type=_not_negative, default=1, metavar="N", help="steps before them (default: %(default)s)")
    add("--only", choices=["ours", "trl"], help="run one side only")
    add("--dtype", choices=[d.value for d in Dtype], default="auto", help="auto: what this machine multiplies fast")
    add("--fixed-length", action="store_true", help="every response has the full length, on both sides")
    add(
        "--with-skip",
        action="store_true",
        help="run our side a second time as users have it: groups without a gradient are left out of the update",
    )
    add("--prompts", type=_positive, default=8, metavar="N", help="prompts a step (default: %(default)s)")
    add("--responses", type=_positive, default=8, metavar="N", help="responses a prompt (default: %(default)s)")
    add("--max-tokens", type=_positive, default=32, metavar="N", help="longest response (default: %(default)s)")
    add("--lr", type=float, default=1e-6, help="learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="order of prompts, and sampling (default: %(default)s)")
    add(
        "--trl-microbatch",
        type=_positive,
        default=16,
        metavar="N",
        help="sequences of one forward and backward pass of TRL; must divide a step's sequences (default: %(default)s)",
    )
    add("--timeout", type=float, default=7200.0, metavar="S", help="seconds for one side (default: %(default)s)")
    add("--name", help="name of the result files (default: rl_step, with what was asked for)")
    add("--out", type=Path, help="folder of the results (default: results/ beside this file)")
    add("--keep", action="store_true", help="keep the temporary folder with logs and runs, and say where it is")
    arguments = parser.parse_args()
    if arguments.prompts * arguments.responses % arguments.trl_microbatch:
        parser.error("--trl-microbatch must divide --prompts times --responses")
    if arguments.only == "trl" and arguments.with_skip:
        parser.error("--with-skip is about our side, which --only trl leaves out")
    return arguments


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _result_name(arguments: argparse.Namespace, dtype: str) -> str:
    parts = ["rl_step", dtype]
    parts += ["fixed-length"] if arguments.fixed_length else []
    parts += [arguments.only] if arguments.only else []
    return arguments.name or "-".join(parts)


def _settings(arguments: argparse.Namespace, model: Path, folder: Path) -> Settings:
    dtype = native_dtype() if arguments.dtype == "auto" else Dtype(arguments.dtype)
    total = (arguments.warmup + arguments.steps) * arguments.prompts
    return Settings(
        model=str(unending_model(model, folder) if arguments.fixed_length else model),
        data=str(write_prompts(folder, total, arguments.seed)),
        dtype=dtype.value,
        threads=usable_cores(),
        prompts=arguments.prompts,
        responses=arguments.responses,
        max_tokens=arguments.max_tokens,
        lr=arguments.lr,
        steps=arguments.steps,
        warmup=arguments.warmup,
        seed=arguments.seed,
        trl_microbatch=arguments.trl_microbatch,
        fixed_length=arguments.fixed_length,
    )


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the sides that were asked for, one after the other, and put the result together."""
    trl = prepare("trl", TRL_REQUIREMENTS) if arguments.only != "ours" else None
    model = resolve_model_path("quickstart:smollm2")
    machine = describe_machine()
    if machine["load_average"][0] > QUIET_LOAD:
        print(
            f"warning: the load average is {machine['load_average'][0]}: something else uses this machine", flush=True
        )
    settings = _settings(arguments, model, folder)
    sizes = Matrices.read(model)
    rows, dtype = settings.prompts * settings.responses, getattr(torch, settings.dtype)
    rates = measure_rates(sizes, rows, dtype)
    ours = [] if arguments.only == "trl" else ["ours", "ours-skip"] if arguments.with_skip else ["ours"]
    raw: dict[str, Any] = {}
    for name in ours:
        print(f"running {NAMES[name]}", flush=True)
        raw[name] = run_ours(settings, folder, name, arguments.timeout)
    if trl is not None:
        print("running TRL", flush=True)
        raw["trl"] = run_trl(settings, folder, trl, arguments.timeout)
    rates = faster(rates, measure_rates(sizes, rows, dtype))
    shown = {k: v for k, v in settings.__dict__.items() if k not in ("model", "data")}
    return {
        "benchmark": "rl_step",
        "settings": {**shown, "model_name": model.name},
        "machine": machine,
        "matmul_flops_per_second": rates,
        "sides": {name: summarize(side, settings, sizes, rates) for name, side in raw.items()},
        "raw": raw,
    }


def main() -> None:
    """Measure, print and write JSON and Markdown."""
    arguments = _parse()
    folder = Path(tempfile.mkdtemp(prefix="rl_step-"))
    try:
        result = measure(arguments, folder)
    finally:
        if arguments.keep:
            print(f"runs and logs are in {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    write_results(_result_name(arguments, result["settings"]["dtype"]), result, to_markdown(result), arguments.out)


if __name__ == "__main__":
    main()
