"""``megatron-mapo eval`` without a server: mistakes found before one starts, the samples' file, the tally."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model

from megatron_mapo.cli import main
from megatron_mapo.errors import ConfigError
from megatron_mapo.evaluate import Request, SampleFile, evaluation_config
from megatron_mapo.rollout.evaluation import GREEDY, Tally
from megatron_mapo.tracking.plots import accuracy_names, plot_evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a data file, and a run without checkpoints and one with an empty one."""
    path = tmp_path_factory.mktemp("project")
    make_tiny_model(path / "model")
    (path / "data.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (path / "empty.jsonl").write_text("")
    for run in ("run", "trained"):
        (path / run).mkdir()
        (path / run / "config.yaml").write_text(
            f"model: {{path: {path}/model, dtype: float32}}\n"
            f"data: {{train: {path}/data.jsonl, template: 'Q: {{question}}'}}\n"
            "rollout: {urls: ['http://far.away:1'], server: {host: 10.0.0.1, port: 30000}, temperature: 0.7}\n"
            "actor: {microbatch_tokens: 2048}\n"
        )
    (path / "trained/checkpoints/step_000004").mkdir(parents=True)
    return path


GOOD = {"--model": "{folder}/model", "--data": "{folder}/data.jsonl", "--reward": "exact", "--out": "{out}"}
CASES = {
    "no such model": ({"--model": "{folder}/nowhere"}, [], 3, "there is no folder"),
    "no such data": ({"--data": "{folder}/nowhere.jsonl"}, [], 3, "no such file"),
    "empty data": ({"--data": "{folder}/empty.jsonl"}, [], 3, "has no rows"),
    "no data": ({"--data": None}, [], 2, "--data"),
    "wrong column": ({}, ["data.prompt_key=problem"], 3, "data.prompt_key"),
    "unknown verifier": ({"--reward": "nothing"}, [], 2, "reward.name='nothing' is unknown"),
    "temperature 0": ({"--temperature": "0"}, [], 2, "rollout.temperature"),
    "unknown key": ({}, ["data.tempalte=x"], 2, "data.template"),
    "a step of a folder": ({"--step": "3"}, [], 2, "--step"),
    "a run without checkpoints": ({"--model": "{folder}/run"}, [], 7, "no complete checkpoint"),
    "a step that is not there": ({"--model": "{folder}/trained", "--step": "3"}, [], 7, r"there are: [4]"),
    "a run and a file": ({"--model": "{folder}/run", "--config": "{folder}/run/config.yaml"}, [], 2, "--config"),
    "a step of a running server": (
        {"--model": "{folder}/trained", "--step": "4", "--url": "http://127.0.0.1:9"}, [], 2, "--step"),
    "a server that is down": ({"--url": "http://127.0.0.1:9"}, [], 5, "127.0.0.1:9"),
    "a server that cannot be": ({"--url": "127.0.0.1:9"}, [], 2, "rollout.urls"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_one_line_and_start_nothing(case: str, folder: Path, tmp_path: Path, capsys) -> None:
    flags, overrides, code, text = CASES[case]
    given = [part for name, value in (GOOD | flags).items() if value is not None for part in (name, value)]
    out = tmp_path / "out"
    argv = [part.replace("{folder}", str(folder)).replace("{out}", str(out)) for part in ["eval", *given, *overrides]]
    assert main(argv) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert text in error
    assert not out.exists()


def test_a_checkpoint_that_cannot_be_read(folder: Path, tmp_path: Path, capsys) -> None:
    good = ["--data", str(folder / "data.jsonl"), "--reward", "exact", "--out", str(tmp_path)]
    assert main(["eval", "--model", str(folder / "trained"), *good]) == 7
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot make a model folder of" in error
    assert "step_000004" in error
    assert not (tmp_path / "model").exists()
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["export.log"], "no server was started"


@pytest.mark.parametrize("flag", [["-k", "0"], ["--limit", "0"], ["--max-tokens", "0"], ["--step", "0"]])
def test_counts_begin_at_one(flag: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "--model", "somewhere", *flag])
    assert exit_.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err


class TestConfiguration:
    def test_of_a_run_is_its_own_but_for_servers(self, folder: Path) -> None:
        data = str(folder / "data.jsonl")
        config = evaluation_config(Request(str(folder / "run"), data=data, max_tokens=4096))
        assert (config.data.template, config.rollout.temperature) == ("Q: {question}", 0.7)
        assert (config.data.eval, config.rollout.max_response_tokens) == (data, 4096)
        assert config.rollout.urls == []
        assert (config.rollout.server.host, config.rollout.server.port) == ("127.0.0.1", 0)

    def test_of_a_checkpoint_is_the_one_that_it_was_written_with(self, folder: Path, tmp_path: Path) -> None:
        run = shutil.copytree(folder / "trained", tmp_path / "trained")
        text = (run / "config.yaml").read_text()
        for step in (4, 6):
            path = run / f"checkpoints/step_{step:06d}"
            path.mkdir(exist_ok=True)
            (path / "config.yaml").write_text(text.replace("Q:", f"Step {step}:"))
        (run / "checkpoints/step_000002").mkdir()

        def template(**request: Any) -> str:
            return evaluation_config(Request(str(run), data="d.jsonl", **request)).data.template

        assert template() == "Step 6: {question}"
        assert template(step=4) == "Step 4: {question}"
        assert template(step=4, overrides=["data.template=A {question}"]) == "A {question}"
        assert template(step=2) == "Q: {question}", "an earlier version wrote it"
        assert template(urls=["http://127.0.0.1:9"]) == "Q: {question}", "the servers have the weights of now"

    def test_options_win_over_overrides_over_the_file(self, folder: Path) -> None:
        request = Request(
            str(folder / "run"),
            data=str(folder / "data.jsonl"),
            temperature=0.3,
            overrides=["rollout.temperature=0.5", "data.template=A {question}"],
        )
        config = evaluation_config(request)
        assert (config.rollout.temperature, config.data.template) == (0.3, "A {question}")

    def test_partial_scores_need_no_threshold_of_the_trainers(self, folder: Path) -> None:
        request = Request(str(folder / "model"), data="reasoning_gym:leg_counting", reward="reasoning_gym")
        assert evaluation_config(request).reward.name == "reasoning_gym"

    def test_another_verifier_replaces_a_mixture(self, folder: Path) -> None:
        mixture = "reward.mixture=[{name: math},{name: regex, label: form, options: {pattern: '(?P<answer>x)'}}]"
        request = Request(
            str(folder / "model"), data="d.jsonl", reward="exact", overrides=[mixture, "reward.success=math"]
        )
        reward = evaluation_config(request).reward
        assert (reward.name, reward.options, reward.mixture, reward.success) == ("exact", {}, [], None)
        assert evaluation_config(replace(request, reward="form")).reward.options == {"pattern": "(?P<answer>x)"}


def sample(prompt: int, index: int | str, right: bool = False, extracted: str | None = None, length: int = 3) -> dict:
    return {"prompt_id": prompt, "sample": index, "reward": float(right), "right": right,
            "extracted": extracted, "truncated": length > 5, "length": length}  # fmt: skip


class TestTally:
    def test_metrics_by_hand(self) -> None:
        tally = Tally(2, 3, greedy=True, extracts=True)
        tally.add(
            [
                sample(1, 0, True, "4", 6),
                sample(1, 1, True, "4"),
                sample(1, 2, False, "5"),
                sample(1, GREEDY, True, "4", 9),
            ]
        )
        tally.add([sample(0, 0), sample(0, 1), sample(0, 2, True, "7"), sample(0, GREEDY)])
        found = tally.metrics(seed=0)
        assert (found["prompts"], found["samples_per_prompt"]) == (2, 3)
        assert found["pass_at_1"] == pytest.approx((1 / 3 + 2 / 3) / 2)
        assert found["pass_at_2"] == pytest.approx((2 / 3 + 1) / 2)
        assert (found["pass_at_3"], found["maj_at_3"], found["greedy_accuracy"]) == (1, 1, 0.5)
        assert (found["pass_at_1_low"], found["pass_at_1_high"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
        assert found["sampled_length_mean"] == pytest.approx((3 + 4) / 2)
        assert (found["greedy_length_mean"], found["greedy_truncated"]) == (6, 0.5)
        assert found["sampled_answered"] == pytest.approx((1 / 3 + 1) / 2)

    def test_greedy_alone(self) -> None:
        tally = Tally(2, 0, greedy=True, extracts=True)
        tally.add([sample(0, GREEDY, True)])
        with pytest.raises(ValueError, match="1 prompts are not evaluated"):
            tally.metrics(seed=0)
        tally.add([sample(1, GREEDY)])
        found = tally.metrics(seed=0)
        assert found["pass_at_1"] == found["greedy_accuracy"] == 0.5
        assert not [name for name in found if name.startswith(("maj", "sampled"))]

    def test_without_an_extractor_there_is_no_majority(self) -> None:
        tally = Tally(1, 2, greedy=False, extracts=False)
        tally.add([sample(0, 0, True), sample(0, 1)])
        assert not [name for name in tally.metrics(seed=0) if name.startswith("maj") or name.endswith("answered")]

    def test_only_whole_prompts_are_taken_up(self) -> None:
        tally = Tally(4, 2, greedy=True, extracts=True)
        whole = [sample(2, GREEDY), sample(2, 1), sample(2, 0)]
        others = [sample(0, 0), sample(0, 1), sample(3, 0), sample(3, 0), sample(3, GREEDY)]
        assert tally.add_complete([*others, *whole]) == [whole[2], whole[1], whole[0]]
        assert tally.done.tolist() == [False, False, True, False]

    def test_nothing_to_sample(self) -> None:
        with pytest.raises(ValueError, match="at least one response"):
            Tally(3, 0, greedy=False, extracts=False)


class TestSampleFile:
    def test_rows_stay_with_their_settings(self, tmp_path: Path) -> None:
        settings = {"samples": 2, "data": {"rows": "a", "limit": None}}
        with SampleFile(tmp_path / "out", settings, overwrite=False) as file:
            file.add([sample(0, 0), sample(0, 1)])
        with SampleFile(tmp_path / "out", settings, overwrite=False) as file:
            assert [row["sample"] for row in file.rows()] == [0, 1]
        other = {"samples": 2, "data": {"rows": "b", "limit": 5}}
        with pytest.raises(ConfigError, match=r"data\.limit None there, 5 now; data\.rows 'a' there, 'b' now"):
            SampleFile(tmp_path / "out", other, overwrite=False).__enter__()
        with SampleFile(tmp_path / "out", settings, overwrite=True) as file:
            assert len(file.rows()) == 2, "nothing differs, so nothing is dropped"
        (tmp_path / "out/results.json").write_text("{}")
        with SampleFile(tmp_path / "out", other, overwrite=True) as file:
            assert file.rows() == []
        assert not (tmp_path / "out/results.json").exists(), "numbers of the old settings"
        assert json.loads((tmp_path / "out/settings.json").read_text()) == other

    def test_only_one_at_a_time(self, tmp_path: Path) -> None:
        with SampleFile(tmp_path, {}, False), pytest.raises(ConfigError, match="another evaluation is at work"):
            SampleFile(tmp_path, {}, False).__enter__()
        with SampleFile(tmp_path, {}, False):
            pass

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="--out: cannot write"):
            SampleFile(tmp_path / "file/out", {}, False).__enter__()


def test_names_to_look_at_first() -> None:
    names = ["prompts", "greedy_accuracy", "greedy_accuracy_low", *(f"pass_at_{k}" for k in (1, 2, 4, 12)), "maj_at_12",
             "pass_at_12_high", "sampled_length_mean"]  # fmt: skip
    assert accuracy_names(names) == ["greedy_accuracy", "pass_at_1", "pass_at_12", "maj_at_12"]


@pytest.mark.parametrize("n", [1, 8])
def test_the_picture(n: int, tmp_path: Path) -> None:
    tally = Tally(6, n, greedy=True, extracts=True)
    for prompt in range(6):
        tally.add([sample(prompt, i, i < prompt, str(i < prompt), i + 1) for i in range(n)] + [sample(prompt, GREEDY)])
    lens, cut = tally.lens[:, :n].flatten().numpy(), tally.truncated[:, :n].flatten().numpy()
    file = plot_evaluation(tally.metrics(0), lens, cut, "a $title_ of {one}", tmp_path / "results.png")
    image = matplotlib.image.imread(file)
    assert image.shape[1] > 800
    assert image[..., :3].std() > 0.02, "an empty picture"
    other = plot_evaluation(tally.metrics(0), lens, np.zeros_like(cut), "a $title_ of {one}", tmp_path / "other.png")
    assert np.array_equal(image, matplotlib.image.imread(other)) is bool(torch.tensor(cut).sum() == 0)
