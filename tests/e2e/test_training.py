"""Whole runs: real Megatron-core trainers, a real SGLang server, a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import command, environment, rows, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_mapo.errors import RewardError
from megatron_mapo.tracking.rollouts import read_rollouts, rollout_files

LOGGED = [
    *("reward/mean", "reward/accuracy", "response/length_mean", "response/truncated", "group/zero_advantage"),
    *("group/p_hist_00", "group/lambda_hist_00", "staleness/max", "weights/version", "mismatch/abs_mean"),
    *("mismatch/abs_p99", "mismatch/abs_max", "mismatch/kl", "loss/clip_fraction", "loss/entropy", "optim/grad_norm"),
    *("seconds/rollout", "seconds/update", "seconds/weight_sync", "speed/tokens_per_second"),
]


def numbers(table: list[dict]) -> list[dict]:
    """What a run logged, but for clocks and the server's log-probs.

    A server batches requests as they come, and the last bits of its log-probs depend on the batch.
    """
    varies = ("time", "seconds", "speed", "memory", "mismatch")
    return [{k: v for k, v in row.items() if not k.startswith(varies)} for row in table]


def sequences(run_dir: Path) -> list[dict]:
    """All sequences of a run, but for the last bits of the server's log-probs."""
    tables = [read_rollouts(file) for file in rollout_files(run_dir / "rollouts")]
    return [
        {k: v for k, v in row.items() if not k.startswith("logprob_diff")}
        for table in tables
        for row in table.to_pylist()
    ]


@pytest.fixture(scope="module")
def straight(workspace: Path, server_url: str) -> Path:
    """An undisturbed run of three steps."""
    done = run(command(workspace, f"rollout.urls=[{server_url}]", "run.name=straight", "trainer.export=true"))
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace / "runs" / "straight"


def test_every_step_logs_what_makes_the_numbers_trustworthy(straight: Path) -> None:
    table = rows(straight / "metrics.jsonl")
    assert [row["step"] for row in table] == [1, 2, 3]
    assert [row["weights/version"] for row in table] == [0, 1, 2]
    for row in table:
        assert not [name for name in LOGGED if row.get(name) is None]
        assert 0 < row["mismatch/abs_max"] < 1e-3
        assert row["staleness/max"] == 0
        phases = ("rollout", "update", "weight_sync")
        ends = [row[f"seconds_at/{name}"] + row[f"seconds/{name}"] for name in phases]
        # Rounded to a ten-thousandth.
        assert all(row[f"seconds_at/{name}"] >= end - 2e-4 for name, end in zip(phases, [0, *ends], strict=False))
        assert ends[-1] <= row["seconds/step"] + 2e-4
    assert any(row["optim/grad_norm"] > 0 for row in table)


def test_every_sequence_is_kept_beside_what_was_logged_of_it(straight: Path) -> None:
    table, metrics = sequences(straight), rows(straight / "metrics.jsonl")
    assert [row["step"] for row in table] == [1] * 16 + [2] * 16 + [3] * 16
    for row in metrics:
        mine = [sequence for sequence in table if sequence["step"] == row["step"]]
        assert sum(sequence["reward"] for sequence in mine) / 16 == pytest.approx(row["reward/mean"])
        assert sum(sequence["length"] for sequence in mine) / 16 == pytest.approx(row["response/length_mean"])
        assert {sequence["weight_version_max"] for sequence in mine} == {row["weights/version"]}
    samples = rows(straight / "samples.jsonl")
    assert [sequence["response"] for sequence in table if sequence["step"] == 1][:8] == [
        sample["response"] for sample in samples[:8]
    ]


def test_the_export_is_what_was_trained(straight: Path, workspace: Path) -> None:
    before, after = load_file(workspace / "model/model.safetensors"), load_file(straight / "export/model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    AutoModelForCausalLM.from_pretrained(straight / "export")
    assert (straight / "export/chat_template.jinja").is_file()


def test_the_checkpoint_exports_the_same_weights(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    done = run([sys.executable, "-m", "megatron_mapo", "export", str(straight), str(out)])
    assert done.returncode == 0, done.stderr
    here, there = load_file(straight / "export/model.safetensors"), load_file(out / "model.safetensors")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_evaluations_are_told_with_intervals_and_kept(straight: Path) -> None:
    first, last = rows(straight / "evaluations.jsonl")
    assert (first["step"], last["step"]) == (0, 3)
    for row in (first, last):
        table = rows(straight / f"evaluation_samples/step_{row['step']:06d}.jsonl")
        assert [(r["prompt_id"], r["sample"]) for r in table] == [(p, s) for p in range(4) for s in (0, 1, "greedy")]
        sampled = [r for r in table if r["sample"] != "greedy"]
        assert row["pass_at_1"] == sum(r["right"] for r in sampled) / 8
        assert row["greedy_accuracy"] == sum(r["right"] for r in table if r["sample"] == "greedy") / 4
        assert row["sampled_length_mean"] == sum(r["length"] for r in sampled) / 8
        assert row["pass_at_1_low"] <= row["pass_at_1"] <= row["pass_at_1_high"]
        assert row["pass_at_2"] >= row["pass_at_1"]


def test_the_last_checkpoint_evaluates_as_at_the_end_of_training(straight: Path) -> None:
    command = [sys.executable, "-m", "megatron_mapo", "eval", "--model", str(straight), "-k", "1", "--greedy"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    out = straight / "evaluations/step_000003-heldout"
    mine, theirs = rows(out / "samples.jsonl"), rows(straight / "evaluation_samples/step_000003.jsonl")
    greedy = [[row for row in table if row["sample"] == "greedy"] for table in (mine, theirs)]
    assert greedy[0] == greedy[1]
    assert not (out / "model").exists()


def test_a_killed_run_goes_on_with_the_same_numbers(straight: Path, workspace: Path, server_url: str) -> None:
    arguments = command(workspace, f"rollout.urls=[{server_url}]", "run.name=killed", "trainer.steps=3")
    folder = workspace / "runs" / "killed"
    child = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints/step_000001").is_dir():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout
    assert numbers(rows(folder / "metrics.jsonl")) == numbers(rows(straight / "metrics.jsonl"))
    assert rows(folder / "samples.jsonl") == rows(straight / "samples.jsonl")
    assert sequences(folder) == sequences(straight)


def test_a_run_that_its_verifier_ends_keeps_its_steps_and_goes_on_with_the_same_prompts(
    straight: Path, workspace: Path, server_url: str
) -> None:
    settings = ["run.name=judged", "trainer.save_interval=0", f"rollout.urls=[{server_url}]"]
    settings.append(f"reward.name={workspace / 'verifiers.py'}:fails_in_the_second_step")
    folder = workspace / "runs" / "judged"
    done = run(command(workspace, *settings, "trainer.evaluation.at_start=false"))
    assert done.returncode == RewardError.exit_code, done.stdout + done.stderr
    assert "no judgement in the second step" in done.stderr
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_000001"]
    (workspace / "calm").touch()
    try:
        done = run(command(workspace, *settings))
    finally:
        (workspace / "calm").unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(rows(folder / "metrics.jsonl")) == numbers(rows(straight / "metrics.jsonl"))
    assert sequences(folder) == sequences(straight)


@pytest.mark.parametrize(
    "overrides",
    [
        ["actor.parallel.tensor=2"],
        ["actor.parallel.pipeline=2"],
        ["actor.parallel.context=2"],
        ["actor.parallel.tensor=1"],
    ],
    ids=["tensor", "pipeline", "context", "data"],
)
def test_two_ranks_do_what_one_does(overrides: list[str], straight: Path, workspace: Path, server_url: str) -> None:
    name = overrides[0].replace("=", "-")
    done = run(
        command(
            workspace, f"rollout.urls=[{server_url}]", f"run.name={name}", "trainer.steps=1", *overrides, processes=2
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    here, there = rows(workspace / "runs" / name / "metrics.jsonl")[0], rows(straight / "metrics.jsonl")[0]
    for key in ("reward/mean", "loss/total", "loss/entropy", "optim/grad_norm", "response/length_mean"):
        assert here[key] == pytest.approx(there[key], rel=1e-5, abs=1e-7), key


def test_mini_batches_reference_and_disk_sync(workspace: Path, server_url: str) -> None:
    done = run(
        command(
            workspace,
            f"rollout.urls=[{server_url}]",
            "run.name=several",
            "trainer.steps=2",
            "actor.mini_batches=2",
            "actor.epochs=2",
            "actor.loss.kl_coef=0.1",
            "rollout.sync.mode=disk",
            "rollout.temperature=0.7",
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for row in rows(workspace / "runs/several/metrics.jsonl"):
        assert row["optim/updates"] == 4
        assert row["mismatch/abs_max"] < 1e-3
        assert row["loss/kl_ref"] is not None


@pytest.mark.slow
def test_filters_objectives_and_corrections(workspace: Path, server_url: str) -> None:
    settings = [
        "rollout.filter={varied: true, oversample: 2}",
        "actor.adv_norm.aggregation_mode=rloo",
        "actor.loss={objective: gspo, aggregation: sequence, mask_truncated: true}",
        "actor.correction={weight: sequence, reject_high: 1.5}",
        "actor.mini_batches=2",
    ]
    done = run(command(workspace, f"rollout.urls=[{server_url}]", "run.name=filtered", "trainer.steps=2", *settings))
    assert done.returncode == 0, done.stdout + done.stderr
    for row in rows(workspace / "runs/filtered/metrics.jsonl"):
        assert 1 <= row["filter/kept"] <= 4 <= row["filter/sampled"] <= 8
        assert row["group/count"] == row["filter/kept"]
        assert row["group/zero_advantage"] == 0
        # Server and trainer agree, so that nothing is corrected.
        assert row["correction/weight_mean"] == pytest.approx(1, abs=1e-2)
        assert row["correction/left_out"] == 0


@pytest.mark.slow
def test_kl_in_the_reward_and_a_curriculum(workspace: Path, server_url: str) -> None:
    settings = [
        "actor.loss={kl_in: reward, kl_coef: 0.5, kl_estimator: k1, objective: cispo}",
        "actor.adv_norm.aggregation_mode=reinforce++",
        "data={curriculum: {max_p: 0.1, rest_epochs: 1}}",
        "reward={overlong_penalty: 0.5, overlong_buffer: 4}",
    ]
    name = "shaped"
    done = run(command(workspace, f"rollout.urls=[{server_url}]", f"run.name={name}", "trainer.steps=3", *settings))
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = rows(workspace / "runs" / name / "metrics.jsonl")
    # Before the first update actor and reference are one: the KL takes nothing from the rewards.
    assert first["loss/kl_ref"] == pytest.approx(0, abs=1e-5)
    assert abs(last["loss/kl_ref"]) > 1e-5
    assert first["reward/min"] < 0
    # About half of all responses are right: most prompts are above the curriculum's bound.
    assert 0 < first["curriculum/resting"] <= last["curriculum/resting"] <= 16


def test_the_gsm8k_recipe_runs_on_a_cpu_when_a_few_keys_are_replaced(workspace: Path, server_url: str) -> None:
    questions = [
        {"question": f"Tom has {n} apples and buys {n}. How many now?", "answer": f"{n}+{n} = {2 * n}\n#### {2 * n:,}"}
        for n in (2, 30, 700, 8000)
    ]
    (workspace / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    arguments = command(workspace, f"rollout.urls=[{server_url}]", f"run.output_dir={workspace / 'runs'}")
    arguments[arguments.index("--config") + 1] = str(Path(__file__).parents[2] / "configs/gsm8k_mapo.yaml")
    small = [
        *(f"model.path={workspace / 'model'}", "model.dtype=float32", f"data.train={workspace / 'gsm8k.jsonl'}"),
        *("data.eval=null", "actor.parallel.tensor=1", "actor.parallel.sequence=false", "reward.workers=1"),
        *("rollout.prompts_per_step=4", "rollout.responses_per_prompt=2", "rollout.max_response_tokens=24"),
        *("actor.microbatch_tokens=2048", "trainer.steps=3", "trainer.evaluation.interval=0", "trainer.threads=1"),
    ]
    done = run([*arguments, *small])
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(workspace / "runs/gsm8k_mapo/metrics.jsonl")
    assert [row["optim/updates"] for row in table] == [2, 2, 2]
    assert (workspace / "runs/gsm8k_mapo/export/model.safetensors").is_file()
