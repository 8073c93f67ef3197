"""``megatron-mapo eval`` with real servers: values known beforehand, interruption, running servers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import environment, rows, run
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mapo.algorithms.evaluation import bootstrap_interval
from megatron_mapo.data.chat import PromptEncoder

MAX_TOKENS = 12
QUESTIONS = [f"What is {i} plus 2?" for i in range(8)]
WRONG = (2, 5)


def greedy_responses(folder: Path) -> list[tuple[str, int]]:
    """Text and tokens of transformers' greedy response to every question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for ids in PromptEncoder(tokenizer, None).encode(QUESTIONS, QUESTIONS):
        tokens = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=MAX_TOKENS)[0, len(ids) :]
        found.append((tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)))
    return found


def evaluation(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_mapo", "eval", *arguments]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and questions whose reference is its greedy response, but for two of them."""
    folder = tmp_path_factory.mktemp("known")
    responses = greedy_responses(make_tiny_model(folder / "model", "llama_untied", seed=2))
    assert all(text.strip() for text, _ in responses)
    data = [
        {"question": question, "answer": "something else" if i in WRONG else responses[i][0]}
        for i, question in enumerate(QUESTIONS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return folder


def arguments_of(known: Path, *more: str) -> list[str]:
    return evaluation(
        *("--model", str(known / "model"), "--data", str(known / "data.jsonl"), "--reward", "exact", "--greedy"),
        *("--temperature", "1e-4", "--max-tokens", str(MAX_TOKENS), "--out", str(known / "out")),
        *("model.dtype=float32", "rollout.server.threads=1", "rollout.server.max_total_tokens=8192", *more),
    )


def test_a_model_folder_whose_answers_are_known(known: Path) -> None:
    done = run(arguments_of(known, "-k", "3"))
    assert done.returncode == 0, done.stderr
    responses = greedy_responses(known / "model")
    result = json.loads((known / "out/results.json").read_text())
    metrics, right = result["metrics"], torch.tensor([float(i not in WRONG) for i in range(8)])
    # So cold that every sample is the greedy response.
    for name in ("greedy_accuracy", "pass_at_1", "pass_at_2", "pass_at_3", "maj_at_3"):
        low, high = bootstrap_interval(right[:, None], seed=0)
        assert metrics[name] == pytest.approx(6 / 8)
        assert (metrics[f"{name}_low"], metrics[f"{name}_high"]) == (low.item(), high.item())
    assert metrics["sampled_length_mean"] == pytest.approx(sum(length for _, length in responses) / 8)
    table = rows(known / "out/samples.jsonl")
    assert [(row["prompt_id"], row["sample"]) for row in table] == [
        (p, s) for p in range(8) for s in (0, 1, 2, "greedy")
    ]
    for row in table:
        text, length = responses[row["prompt_id"]]
        assert (row["response"], row["length"], row["extracted"]) == (text, length, text.strip())
        assert row["truncated"] is (row["finish"] == "length")
        assert row["right"] is (row["prompt_id"] not in WRONG)
    assert "pass@3               0.750" in done.stdout
    assert result["settings"]["samples"] == 3
    assert (known / "out/results.png").stat().st_size > 10_000


def test_the_same_command_again_starts_nothing(known: Path) -> None:
    before = (known / "out/samples.jsonl").read_bytes()
    logs = list((known / "out/logs").iterdir())
    done = run(arguments_of(known, "-k", "3"))
    assert done.returncode == 0, done.stderr
    assert "8 of 8 prompts" in done.stderr
    assert "server http" not in done.stderr
    assert list((known / "out/logs").iterdir()) == logs
    assert (known / "out/samples.jsonl").read_bytes() == before


def test_other_settings_are_not_mixed_in(known: Path) -> None:
    before = (known / "out/samples.jsonl").read_bytes()
    done = run(arguments_of(known, "-k", "2"))
    assert done.returncode == 2
    assert "samples 3 there, 2 now" in done.stderr
    assert "--overwrite" in done.stderr
    assert (known / "out/samples.jsonl").read_bytes() == before


class TestRunningServer:
    @pytest.fixture
    def command(self, workspace: Path, server_url: str, tmp_path: Path):
        def made(out: str) -> list[str]:
            return evaluation(
                *("--config", str(workspace / "config.yaml"), "--model", str(workspace / "model"), "--url", server_url),
                *(
                    "--data",
                    str(workspace / "train.jsonl"),
                    "-k",
                    "6",
                    "--max-tokens",
                    "48",
                    "--out",
                    str(tmp_path / out),
                ),
                "rollout.concurrency=1",
            )

        return made

    def test_goes_on_where_it_was_stopped(self, command, tmp_path: Path) -> None:
        samples = tmp_path / "stopped/samples.jsonl"
        child = subprocess.Popen(command("stopped"), env=environment(), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not (samples.exists() and samples.read_text()):
            assert child.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 128 + signal.SIGTERM, errors
        assert "the same command goes on" in errors
        assert "Traceback" not in errors, errors
        finished = {row["prompt_id"] for row in rows(samples)}
        assert 0 < len(finished) < 16
        # What kill -9 could leave: half a prompt, and half a line.
        half = {**rows(samples)[0], "prompt_id": next(i for i in range(16) if i not in finished)}
        with samples.open("a") as file:
            file.write(json.dumps(half) + '\n{"prompt_id": 15, "samp')
        again, straight = run(command("stopped")), run(command("straight"))
        assert (again.returncode, straight.returncode) == (0, 0), again.stderr + straight.stderr
        assert f"{len(finished)} of 16 prompts are in" in again.stderr
        assert samples.read_text() == (tmp_path / "straight/samples.jsonl").read_text()
        numbers = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("stopped", "straight")]
        assert numbers[0]["metrics"] == numbers[1]["metrics"]
        self.check_what_is_said(straight, numbers[1], rows(samples))

    @staticmethod
    def check_what_is_said(done: subprocess.CompletedProcess[str], result: dict, table: list[dict]) -> None:
        """The weights are the server's, and a verifier without an extractor has no majority."""
        assert "evaluating the weights that the server holds" in done.stderr
        assert "weight_version" in str(result["settings"]["model"])
        assert "maj_at_6" not in result["metrics"]
        assert "extract" in result["unavailable"]["maj_at_6"]
        assert "not available" in done.stdout
        assert result["metrics"]["pass_at_1"] == pytest.approx(sum(row["right"] for row in table) / len(table))
        assert 0 < result["metrics"]["pass_at_1"] < result["metrics"]["pass_at_6"] <= 1

    def test_another_model_than_named_is_said(self, known: Path, server_url: str, tmp_path: Path) -> None:
        done = run(
            evaluation(
                *("--model", str(known / "model"), "--data", str(known / "data.jsonl"), "--url", server_url, "-k", "1"),
                *("--reward", "exact", "--max-tokens", "4", "--out", str(tmp_path / "out")),
            )
        )
        assert done.returncode == 0, done.stderr
        assert "warning: the server was started with" in done.stderr
