"""Whole runs of the real trainer, without servers: killed, resumed, damaged, and still the same bits in the end."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from harness import Launcher, RankFailed
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from megatron_mapo import checkpoint_files
from megatron_mapo.run_lock import RunLock
from megatron_mapo.tracking.rollouts import read_rollouts, rollout_files

KILLS = 20
STEPS = 120
PATIENCE = 60.0
VARIES = ("time", "seconds", "speed", "memory")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    make_tiny_model(folder / "model", hidden_size=128, intermediate_size=512)
    rows = [{"question": f"What is {a} plus {a * 7 % 5}?", "answer": str(a + a * 7 % 5)} for a in range(23)]
    for name in ("train.jsonl", "heldout.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""
run: {{output_dir: {folder / "runs"}}}
model: {{path: {folder / "model"}, dtype: float32}}
data: {{train: train.jsonl, eval: heldout.jsonl}}
actor: {{optim: {{lr: 1.0e-3, schedule: cosine, warmup_steps: 10}}, microbatch_tokens: 512}}
rollout: {{prompts_per_step: 3, responses_per_prompt: 4, max_prompt_tokens: 64, max_response_tokens: 12}}
trainer:
  steps: {STEPS}
  save_interval: 3
  keep_every: 30
  keep_best: true
  export: true
  threads: 1
  evaluation: {{interval: 6, samples: 0}}
tracking: {{plots: false, tensorboard: false, progress: false}}
"""
    )
    return folder


class Life:
    """One start of the run, in a thread of this process."""

    def __init__(self, launcher: Launcher, workspace: Path, name: str, *options: str, ranks: int = 2) -> None:
        self.pids = workspace / f"pids-{time.monotonic_ns()}"
        self.pids.mkdir()
        arguments = {"config": str(workspace / "config.yaml"), "overrides": [f"run.name={name}", *options]}
        self.error: RankFailed | None = None
        arguments["pids"] = str(self.pids)
        self._thread = threading.Thread(target=self._run, args=(launcher, ranks, arguments))
        self._thread.start()

    def _run(self, launcher: Launcher, ranks: int, arguments: dict[str, Any]) -> None:
        try:
            launcher.run(ranks, "train_frozen", arguments, timeout=200)
        except RankFailed as error:
            self.error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def ranks(self) -> list[int]:
        """Process ids of both ranks."""
        return [int((self.pids / rank).read_text()) for rank in ("0", "1")]

    def send(self, number: signal.Signals) -> None:
        """A signal to both ranks, one right after the other."""
        for pid in self.ranks:
            os.kill(pid, number)

    def end(self) -> None:
        """Wait until it is over."""
        self._thread.join(timeout=240)
        assert self.over


def wait_until(happens: Callable[[], bool], life: Life) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert not life.over, f"the run ended before it could be killed: {life.error}"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def freeze_in_a_save(life: Life, checkpoints: Path, chance: random.Random) -> None:
    """Stop both ranks at some point of a save. One that is over by then is let go, and the next one waited for."""
    while True:
        wait_until(lambda: any(checkpoints.glob("*.partial")), life)
        time.sleep(chance.uniform(0.0, 0.03))
        life.send(signal.SIGSTOP)
        wait_until(lambda: all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in life.ranks), life)
        if any(checkpoints.glob("*.partial")):
            return
        life.send(signal.SIGCONT)


def moment(kind: str, run: Path, chance: random.Random) -> Callable[[Life], None]:
    """Waits for the moment to kill: while starting, while training, or at a certain point of a save."""
    checkpoints = run / "checkpoints"

    def wait(life: Life) -> None:
        wait_until(lambda: (life.pids / "0").exists() and (life.pids / "1").exists(), life)
        if kind == "start":
            time.sleep(chance.uniform(0.0, 1.0))
            return
        before = {p.name for p in checkpoints.glob("*")}
        start = time.time()
        wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_mtime > start, life)
        if kind == "training":
            until = steps_logged(run) + chance.randint(1, 5)
            wait_until(lambda: steps_logged(run) >= until, life)
            time.sleep(chance.uniform(0.0, 0.1))
        elif kind == "partial":
            freeze_in_a_save(life, checkpoints, chance)
        elif kind == "manifest":
            wait_until(lambda: any(checkpoints.glob("*.partial/manifest.json")), life)
        elif kind == "name":
            wait_until(lambda: any(p.suffix == "" and p.name not in before for p in checkpoints.glob("step_*")), life)

    return wait


def table(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VARIES)} for row in rows]


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bits(launcher: Launcher, workspace: Path) -> None:
    straight, killed = workspace / "runs/straight", workspace / "runs/killed"
    life = Life(launcher, workspace, "straight")
    life.end()
    assert life.error is None, life.error

    chance = random.Random(0)
    kinds = ["training"] * 9 + ["start"] * 3 + ["partial"] * 5 + ["manifest"] * 2 + ["name"]
    assert len(kinds) == KILLS
    chance.shuffle(kinds)
    newest = 0
    found: Counter[str] = Counter()
    for kind in kinds:
        life = Life(launcher, workspace, "killed")
        moment(kind, killed, chance)(life)
        life.send(signal.SIGKILL)
        life.end()
        assert life.error is not None
        for partial in (killed / "checkpoints").glob("*.partial"):
            has_manifest = (partial / checkpoint_files.MANIFEST).exists()
            found["complete but for its name" if has_manifest else "half a checkpoint"] += 1
        saved = checkpoint_files.complete_checkpoints(killed / "checkpoints")
        reached = saved[-1][0] if saved else 0
        assert reached >= newest, "a complete checkpoint is gone"
        for _, path in saved:
            assert checkpoint_files.verify(path) is not None, "a folder under its final name is complete"
        latest = checkpoint_files.read_pointer(killed / "checkpoints", "latest")
        assert latest is None or latest in {path.name for _, path in saved}
        newest = reached
    assert 0 < newest < STEPS
    assert found.total() >= kinds.count("partial"), found
    assert found["half a checkpoint"] > 0, found
    life = Life(launcher, workspace, "killed")
    life.end()
    assert life.error is None, life.error
    assert_same(straight, killed)
    assert [row["step"] for row in table(killed / "metrics.jsonl")] == list(range(1, STEPS + 1))


def sequences(run: Path) -> list[list[dict]]:
    """All sequences of every step, file by file."""
    return [read_rollouts(file).to_pylist() for file in rollout_files(run / "rollouts")]


def assert_same(straight: Path, killed: Path) -> None:
    """Weights, optimizer, everything that was logged, and which checkpoints stayed."""
    here, there = load_file(killed / "export/model.safetensors"), load_file(straight / "export/model.safetensors")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        assert table(killed / name) == table(straight / name)
    assert sequences(killed) == sequences(straight)
    ours = checkpoint_files.complete_checkpoints(killed / "checkpoints")
    assert [s for s, _ in ours] == [s for s, _ in checkpoint_files.complete_checkpoints(straight / "checkpoints")]
    for pointer in ("latest", "best"):
        found = checkpoint_files.read_pointer(killed / "checkpoints", pointer)
        assert found is not None
        assert found == checkpoint_files.read_pointer(straight / "checkpoints", pointer)
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == sorted(
        p.name for p in (straight / "checkpoints").iterdir()
    ), "nothing is left behind"
    for _, path in ours:
        mine, undisturbed = (
            checkpoint_files.read_manifest(p / path.name) for p in (killed / "checkpoints", straight / "checkpoints")
        )
        assert mine is not None
        assert undisturbed is not None
        tensors = [name for name in undisturbed.files if name.endswith(".distcp")]
        assert tensors
        assert all(mine.files[name] == undisturbed.files[name] for name in tensors)


def whole(launcher: Launcher, workspace: Path, name: str, *options: str, ranks: int = 1) -> Path:
    """A short run to its end."""
    short = ("trainer.steps=6", "trainer.save_interval=1", "trainer.evaluation.interval=2", "trainer.keep_every=2")
    life = Life(launcher, workspace, name, *short, *options, ranks=ranks)
    life.end()
    if life.error is not None:
        raise life.error
    return workspace / "runs" / name


def test_a_run_resumes_from_the_step_that_was_asked_for(launcher: Launcher, workspace: Path) -> None:
    straight = whole(launcher, workspace, "short")
    again = whole(launcher, workspace, "again", "trainer.async_save=false")
    assert_same(straight, again)
    evaluations = table(straight / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]
    best = max(evaluations[1:], key=lambda row: row["pass_at_1"])
    assert checkpoint_files.read_pointer(straight / "checkpoints", "best") == f"step_{best['step']:06d}"

    newest = again / "checkpoints" / "step_000006"
    weights = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RankFailed, match=r"is damaged: its checksum .* run.resume_step \(there are: 2, 4, 5\)"):
        whole(launcher, workspace, "again")
    with pytest.raises(RankFailed, match="no checkpoint of step 3; there are: 2, 4, 5, 6"):
        whole(launcher, workspace, "again", "run.resume_step=3")
    whole(launcher, workspace, "again", "run.resume_step=2")
    aside = sorted((again / "checkpoints").glob("*.aside"))
    assert [path.name for path in aside] == ["step_000004.aside", "step_000005.aside", "step_000006.aside"]
    for path in aside:
        shutil.rmtree(path)
    assert_same(straight, again)

    # The same command again, as after a crash, with the checkpoint gone; and the servers did not live to see the
    # evaluation of the last step, whose checkpoint was saved without it.
    shutil.rmtree(again / "checkpoints" / "step_000002")
    manifest = checkpoint_files.read_manifest(newest)
    assert manifest is not None
    checkpoint_files.write_manifest(newest, replace(manifest, score=None, measure=None))
    evaluated = (again / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (again / "evaluations.jsonl").write_text("".join(evaluated[:-1]))
    whole(launcher, workspace, "again", "run.resume_step=2")
    assert not list((again / "checkpoints").glob("*.aside"))
    assert table(again / "metrics.jsonl") == table(straight / "metrics.jsonl")
    assert table(again / "evaluations.jsonl") == evaluations
    assert checkpoint_files.read_manifest(newest) == manifest, "with the score"
    assert manifest.measure is not None
    assert (manifest.measure.metric, manifest.measure.samples) == ("pass_at_1", 0)
    rows = [json.loads(line) for line in (workspace / "heldout.jsonl").read_text().splitlines()]
    columns = ([row["question"] for row in rows], [row["answer"] for row in rows], ["{}"] * len(rows))
    digest = hashlib.sha256("".join(json.dumps(column) for column in columns).encode())
    assert manifest.measure.data == digest.hexdigest()


def test_a_run_that_ends_by_an_error_completes_the_checkpoint_that_is_being_written(
    launcher: Launcher, workspace: Path
) -> None:
    options = ["run.name=disagrees", "trainer.save_interval=1"]
    arguments = {"config": str(workspace / "config.yaml"), "overrides": options}
    for kind, text in launcher.run(2, "train_and_disagree", arguments):
        assert kind == "TrainingError"
        assert "server and trainer disagree" in text
    checkpoints = workspace / "runs/disagrees/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000001"]
    assert checkpoint_files.verify(checkpoints / "step_000001") is not None


def test_a_start_that_must_not_be_changes_nothing(launcher: Launcher, workspace: Path) -> None:
    folder = workspace / "runs" / "refused"
    first = RunLock(folder)
    first.acquire()
    with pytest.raises(RankFailed, match=r"run\.name: another start of this run is at work in .*refused"):
        whole(launcher, workspace, "refused")
    first.release()
    wrong = ("trainer.best_metric=pass_at_2", f"model.path={workspace / 'nowhere'}")
    with pytest.raises(RankFailed, match=r"trainer\.best_metric=pass_at_2 is not in an evaluation; there are: "):
        whole(launcher, workspace, "refused", *wrong)
    assert [path.name for path in folder.iterdir()] == [".lock"]


LOGPROBS = ("logprob_diff_mean", "logprob_diff_abs_mean")


def asked(run: Path) -> list[list[dict]]:
    """All that was asked, answered and rewarded, without what the model says about it."""
    return [[{k: v for k, v in row.items() if k not in LOGPROBS} for row in step] for step in sequences(run)]


# A weight whose gradient is rounding noise does not move.
WELL_CONDITIONED = ("actor.optim.eps=0.01", "actor.optim.lr=0.02")


@pytest.fixture(scope="module")
def on_two_ranks(launcher: Launcher, workspace: Path) -> Path:
    """A run on two data-parallel ranks."""
    return whole(launcher, workspace, "data", *WELL_CONDITIONED, ranks=2)


@pytest.mark.parametrize(("name", "ranks", "tensor"), [("tensor", 2, 2), ("alone", 1, 1)])
def test_a_run_goes_on_in_another_layout(
    name: str, ranks: int, tensor: int, launcher: Launcher, workspace: Path, on_two_ranks: Path
) -> None:
    """Two steps on two data-parallel ranks, and four in another layout: the same prompts, seeds and numbers."""
    straight, moved = on_two_ranks, workspace / "runs" / name
    shutil.copytree(straight, moved)
    layout = ("run.resume_step=2", f"actor.parallel.tensor={tensor}")
    whole(launcher, workspace, name, *WELL_CONDITIONED, *layout, ranks=ranks)
    wrote = [checkpoint_files.read_manifest(moved / "checkpoints" / f"step_00000{step}") for step in (2, 6)]
    assert [(m.layout["data"], m.layout["tensor"]) for m in wrote if m is not None] == [(2, 1), (1, tensor)]
    assert asked(moved) == asked(straight)
    here, there = table(moved / "samples.jsonl"), table(straight / "samples.jsonl")
    assert [(row["step"], row["prompt"], row["seed"]) for row in here] == [
        (row["step"], row["prompt"], row["seed"]) for row in there
    ]
    for found, expected in zip(table(moved / "metrics.jsonl"), table(straight / "metrics.jsonl"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    weights, undisturbed = (load_file(run / "export/model.safetensors") for run in (moved, straight))
    before = load_file(workspace / "model/model.safetensors")
    for key, value in undisturbed.items():
        assert (weights[key] - value).abs().max() <= 5e-6 * value.abs().max(), key
        assert (value - before[key]).abs().max() > 1e-3 * value.abs().max(), f"{key} was trained"
