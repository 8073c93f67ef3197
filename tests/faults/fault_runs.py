"""Runs of ``faulty_trainer.py`` under ``torchrun --max-restarts``, and what became of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tiny_models import make_tiny_model

HERE = Path(__file__).parent
STEPS = 6
RESTARTS = 1


@dataclass(frozen=True)
class Case:
    """A fault, and how it has to end.

    Attributes:
        place, action, rank, step: see ``faulty_trainer``.
        exit_code: of the first start; None where it does not end at all (a NaN that is skipped).
        says: what standard error must say.
        same: the run ends with the undisturbed run's bits.
    """

    place: str
    action: str
    rank: int = 0
    step: int = 4
    says: str = ""
    same: bool = True
    ends_well: bool = True

    @property
    def name(self) -> str:
        return f"{self.action} in {self.place}, rank {self.rank}"


KILLS = [
    Case(place, "kill", rank)
    for place in ("forward", "backward", "gradient reduction", "optimizer step", "weight sync")
    for rank in (0, 1)
]
KILLS += [Case(place, "kill") for place in ("rollout", "evaluation")]
KILLS += [Case(place, "kill", rank) for place in ("save, staging", "save, writing") for rank in (0, 1)]
KILLS += [Case(f"save, {place}", "kill") for place in ("manifest", "name", "clean-up")]
KILLS += [Case("anywhere", "kill", 1)]
HANGS = [
    Case("forward", "hang", 1, says=r"rank 1 .*step 4 > update .*in faulty_trainer\.py"),
    Case("gradient reduction", "hang", 0, says=r"rank 1 .*step 4 > update .*in \w+, called from"),
    Case("rollout", "hang", 0, says=r"rank 1 .*step 4 > rollout .*in broadcast_object_list, called from runtime\.py"),
    Case("backward", "stop", 1, says=r"rank 1: no answer; it is stopped"),
]
NUMBERS = [
    Case("loss", "nan", 1, says=r"step 4: loss or gradient is not finite, the update was skipped", same=False),
    Case("loss", "nan for ever", 0, says=r"number 2 in a row \(trainer\.max_skipped\)", same=False, ends_well=False),
]
DISK = [Case("save, manifest", "full disk", says=r"could not write .*No space left on device")]
CASES = [*KILLS, *HANGS, *NUMBERS, *DISK]


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        code: exit code of torchrun.
        log: standard output and error of all ranks.
        struck_at: finished steps when the fault struck.
        resumed_from: step of the checkpoint that the next start went on from; None if there was none.
        recovered: seconds from the fault to the end of the next finished step.
        folder: the run's folder.
    """

    code: int
    log: str
    struck_at: int
    resumed_from: int | None
    recovered: float
    folder: Path

    @property
    def lost(self) -> int:
        """Finished steps that were done again."""
        return 0 if self.resumed_from is None else self.struck_at - self.resumed_from


def make_workspace(folder: Path) -> Path:
    """Model, data and ``config.yaml``."""
    make_tiny_model(folder / "model")
    rows = [{"question": f"What is {a} plus {a * 7 % 5}?", "answer": str(a + a * 7 % 5)} for a in range(23)]
    for name in ("train.jsonl", "heldout.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""
run: {{output_dir: {folder / "runs"}}}
model: {{path: {folder / "model"}, dtype: float32}}
data: {{train: train.jsonl, eval: heldout.jsonl}}
actor: {{optim: {{lr: 1.0e-3}}, microbatch_tokens: 512}}
rollout:
  {{prompts_per_step: 3, responses_per_prompt: 4, max_prompt_tokens: 64, max_response_tokens: 12, wait_timeout: 2}}
trainer:
  steps: {STEPS}
  save_interval: 1
  export: true
  threads: 1
  hang_timeout: 4
  max_skipped: 2
  evaluation: {{interval: 2, samples: 0}}
tracking: {{plots: false, tensorboard: false, progress: false}}
"""
    )
    return folder


def run_case(case: Case, workspace: Path) -> Outcome:
    """The run with its fault, under torchrun with two ranks."""
    name = re.sub(r"\W+", "-", case.name)
    marker = workspace / f"{name}.marker"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, f"--max-restarts={RESTARTS}", str(HERE / "faulty_trainer.py"), str(workspace / "config.yaml")]
    command += [case.place, case.action, str(case.rank), str(case.step), str(marker), f"run.name={name}"]
    log = workspace / f"{name}.log"
    folder = workspace / "runs" / name
    with log.open("w") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        recovered = _wait(process, marker, folder / "metrics.jsonl")
    text = log.read_text()
    resumed = re.findall(r"resuming from \S*step_(\d+)", text)
    struck = json.loads(marker.read_text())["step"] if marker.exists() else 0
    return Outcome(process.returncode, text, struck, int(resumed[-1]) if resumed else None, recovered, folder)


def _wait(process: subprocess.Popen[bytes], marker: Path, metrics: Path, patience: float = 240.0) -> float:
    """Until the run is over; returns the seconds from the fault to the next step (NaN if there was none)."""
    deadline, recovered = time.monotonic() + patience, float("nan")
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError("the run does not end")
        time.sleep(0.05)
        if recovered != recovered and marker.exists() and metrics.exists():
            struck = json.loads(marker.read_text() or '{"time": 1e18}')["time"]
            if metrics.stat().st_mtime > struck + 0.05:
                recovered = metrics.stat().st_mtime - struck
    return recovered
