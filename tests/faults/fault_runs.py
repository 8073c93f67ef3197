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
from typing import Any

from tiny_models import make_tiny_model

HERE = Path(__file__).parent
STEPS = 6
RESTARTS = 1
VERIFIER = """import time


def even(response, answer, metadata):
    return sum(map(ord, response)) % 2 == 0


def slowly_even(response, answer, metadata):
    time.sleep(0.15)
    return even(response, answer, metadata)
"""


@dataclass(frozen=True)
class Case:
    """A fault, and how it has to end.

    Attributes:
        place, action, rank, step: see ``faulty_trainer``.
        says: what the run must print.
        same: the run ends with the undisturbed run's bits.
        ends_well: the run ends with all its steps done.
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
        return "undisturbed" if self.step > STEPS else f"{self.action} in {self.place}, rank {self.rank}"


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
PASSES = r"warning: rank 1 on \S+ takes \d+\.\d times as long as others for the forward and backward passes"
SLOW = [Case("forward", "slow", 1, step=2, says=PASSES)]
CASES = [*KILLS, *HANGS, *NUMBERS, *DISK, *SLOW]
UNDISTURBED = Case("rollout", "kill", step=10_000)
"""Its fault never comes."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        codes: exit codes of its starts.
        log: standard output and error of all ranks and starts.
        struck_at: finished steps when the fault struck.
        saved_at: step of the newest complete checkpoint then.
        resumed_from: step of the checkpoint that the next start went on from; None if there was none.
        seconds: from the fault to the end of the next finished step, or of the run if there was none.
        folder: the run's folder.
    """

    codes: list[int]
    log: str
    struck_at: int
    saved_at: int
    resumed_from: int | None
    seconds: float
    folder: Path

    @property
    def code(self) -> int:
        """Of its last start."""
        return self.codes[-1]

    @property
    def again(self) -> int:
        """Finished steps that were done again."""
        return 0 if self.resumed_from is None else max(0, self.struck_at - self.resumed_from)

    @property
    def lost(self) -> int:
        """Those of them that a complete checkpoint held when the fault struck."""
        return 0 if self.resumed_from is None else max(0, self.saved_at - self.resumed_from)


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def outcome_of(codes: list[int], log: str, marker: Path, folder: Path, ended: float) -> Outcome:
    """Put together what a run left; ``ended`` is the time of its end."""
    struck = json.loads(marker.read_text()) if marker.exists() else {"step": 0, "saved": 0, "time": ended}
    found = re.findall(r"resuming from \S*step_(\d+)", log)
    resumed = int(found[-1]) if found else None
    after = struck["step"] if resumed is None else resumed
    finished = [row["time"] for row in rows(folder) if row["step"] > after and row["time"] > struck["time"]]
    seconds = min(finished, default=ended) - struck["time"]
    return Outcome(codes, log, struck["step"], struck["saved"], resumed, seconds, folder)


def make_workspace(folder: Path) -> Path:
    """Model, data and ``config.yaml``."""
    make_tiny_model(folder / "model")
    rows = [{"question": f"What is {a} plus {a * 7 % 5}?", "answer": str(a + a * 7 % 5)} for a in range(23)]
    for name in ("train.jsonl", "heldout.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "verifier.py").write_text(VERIFIER)
    (folder / "config.yaml").write_text(
        f"""
run: {{output_dir: {folder / "runs"}}}
model: {{path: {folder / "model"}, dtype: float32}}
data: {{train: train.jsonl, eval: heldout.jsonl}}
reward: {{name: "{folder / "verifier.py"}:even"}}
actor: {{optim: {{lr: 1.0e-3}}, microbatch_tokens: 512}}
rollout:
  {{prompts_per_step: 3, responses_per_prompt: 4, max_prompt_tokens: 64, max_response_tokens: 12, wait_timeout: 2}}
trainer:
  steps: {STEPS}
  save_interval: 1
  export: true
  threads: 1
  hang_timeout: 120
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
        try:
            code = process.wait(timeout=420)  # a minute, where nothing else runs
        finally:
            process.kill()
    return outcome_of([code], log.read_text(), marker, folder, time.time())
