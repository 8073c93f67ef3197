"""Comparisons of runs that are there: pairing, verdicts, files; and the plan of runs that are to be made."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from fake_runs import make_run

from megatron_mapo import compare as module
from megatron_mapo.algorithms.advantages import estimate_advantages
from megatron_mapo.cli import main
from megatron_mapo.compare import Request
from megatron_mapo.errors import ConfigError, DataError
from megatron_mapo.reporting.analysis import (
    Reaching,
    SamePrompts,
    advantages_by_rate,
    final_pass,
    gradients_by_rate,
    outcome,
    reaching,
    same_prompts,
    training_accuracy,
    whole_seconds,
)
from megatron_mapo.reporting.arms import Study, collect, differences, label_of, pass_tables
from megatron_mapo.reporting.comparison_report import _runs, _setup, _target, analyse
from megatron_mapo.reporting.run_data import load_run
from megatron_mapo.tracking.jsonl import read_rows, replace_rows
from megatron_mapo.tracking.rollouts import read_rollouts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three configurations, three seeds: one learns nothing, one a lot, one as little as the first."""
    folder = tmp_path_factory.mktemp("runs")
    native = "actor.adv_norm.aggregation_mode=native"
    arms = {"grpo": ((native,), 0.0), "mapo": ((), 0.12), "idle": ((native, "actor.optim.lr=1e-5"), 0.0)}
    return {
        label: [make_run(folder / f"{label}-seed{s}", *keys, gain=gain, seed=s, luck=luck) for s in range(3)]
        for luck, (label, (keys, gain)) in enumerate(arms.items())
    }


def study_of(runs: dict[str, list[Path]], *labels: str) -> Study:
    return collect([folder for label in labels for folder in runs[label]], None)


def whole_text(study: Study) -> str:
    """What the report says of the runs, in words and tables."""
    sections = [_setup(analyse(study, 0.5)), _runs(study)]
    return "\n".join([*(text for s in sections for text in s.text), *(str(t.rows) for s in sections for t in s.tables)])


class TestPairing:
    def test_runs_are_grouped_by_name_and_paired_by_seed(self, runs):
        study = collect([*runs["mapo"], *reversed(runs["grpo"])], "grpo")
        assert [arm.label for arm in study.arms] == ["grpo", "mapo"]
        assert study.seeds == [0, 1, 2]
        assert study.arms[1].runs[2].folder == runs["mapo"][2]
        assert differences(study.arms) == [("actor.adv_norm.aggregation_mode", ["native", "mix"])]

    @pytest.mark.parametrize(
        ("name", "label"),
        [("gsm8k_mapo-seed0", "gsm8k_mapo"), ("a_seed12", "a"), ("seed1", "seed1"), ("x.seed-3", "x")],
    )
    def test_a_name_is_the_configurations_without_its_seed(self, name, label):
        assert label_of(name) == label

    def test_tables_hold_the_share_of_right_samples(self, runs):
        study = study_of(runs, "grpo", "mapo")
        table = pass_tables(study)[1]
        assert table.shape == (3, 6)
        rows = read_rows(runs["mapo"][1] / "evaluation_samples/step_000006.jsonl")
        right = [row["right"] for row in rows if row["prompt_id"] == 4 and row["sample"] != "greedy"]
        assert table[1, 4] == np.mean(right)
        assert table[1].mean() == pytest.approx(load_run(runs["mapo"][1]).evaluations[-1]["pass_at_1"])

    def test_unfinished_runs_and_lonely_seeds_are_left_out_and_named(self, runs, tmp_path):
        half = make_run(tmp_path / "mapo-seed1", steps=2, seed=1)
        study = collect([*runs["grpo"], runs["mapo"][0], half], None)
        assert study.seeds == [0]
        assert study.notes[0] == "mapo-seed1 is not finished (step 2 of 6) and is left out"
        assert "grpo: seeds 1, 2" in study.notes[1]

    def test_a_run_without_its_last_evaluation_is_not_finished(self, runs, tmp_path):
        shutil.copytree(runs["mapo"][0], tmp_path / "run")
        file = tmp_path / "run/evaluations.jsonl"
        file.write_text(file.read_text().splitlines(keepends=True)[0])
        assert not load_run(tmp_path / "run").finished
        assert load_run(runs["mapo"][0]).finished

    def test_what_cannot_be_paired_is_an_error(self, runs, tmp_path):
        with pytest.raises(DataError, match=r"no run\.seed is finished in all .*grpo: \[0\]; mapo: \[1\]"):
            collect([runs["grpo"][0], runs["mapo"][1]], None)
        with pytest.raises(DataError, match=r"both grpo with run\.seed=0"):
            collect([runs["grpo"][0], shutil.copytree(runs["grpo"][0], tmp_path / "grpo-seed9")], None)
        other = make_run(tmp_path / "mapo-seed5", "actor.optim.lr=3e-4", seed=5)
        with pytest.raises(DataError, match=r"differ in actor\.optim\.lr"):
            collect([runs["mapo"][0], other], None)
        with pytest.raises(ConfigError, match="--baseline ppo"):
            collect(runs["mapo"], "ppo")

    def test_other_questions_are_an_error(self, runs, tmp_path):
        shutil.copytree(runs["mapo"][0], tmp_path / "new-seed0")
        file = tmp_path / "new-seed0/evaluation_samples/step_000006.jsonl"
        file.write_text(file.read_text().replace("question 3", "another"))
        with pytest.raises(DataError, match=r"different held-out questions"):
            pass_tables(collect([runs["grpo"][0], tmp_path / "new-seed0"], None))


class TestVerdicts:
    def test_a_large_difference_is_found_and_none_is_not_claimed(self, runs):
        found, source = final_pass(study_of(runs, "grpo", "mapo", "idle"))
        mapo, idle = found.contrasts
        assert source == "the responses in evaluation_samples/ after step 6"
        assert mapo.estimate.value > 0.4
        assert mapo.verdict == "mapo is better than grpo"
        assert mapo.adjusted >= mapo.estimate.p_value
        assert idle.verdict.startswith("no significant difference")
        assert idle.estimate.low <= 0 <= idle.estimate.high
        assert f"{idle.estimate.detectable:.3f} would have been found" in idle.verdict

    def test_runs_of_equal_results_show_no_difference(self, runs, tmp_path):
        copies = [shutil.copytree(folder, tmp_path / f"copy-seed{s}") for s, folder in enumerate(runs["mapo"])]
        found, _ = final_pass(collect([*runs["mapo"], *copies], None))
        assert found.contrasts[0].estimate.value == 0
        assert found.contrasts[0].verdict == "no significant difference: equal for every seed and question"

    def test_one_seed_is_no_evidence(self, runs):
        found, _ = final_pass(collect([runs["grpo"][0], runs["mapo"][0]], None))
        assert found.contrasts[0].adjusted is None
        assert "nothing follows about other seeds" in found.contrasts[0].verdict

    def test_two_seeds_are_too_few_for_a_verdict(self, runs, tmp_path):
        """However clear the difference is: seeds 0 and 1 of two configurations that three seeds tell apart."""
        folders = [*runs["grpo"][:2], *runs["mapo"][:2]]
        found, _ = final_pass(collect(folders, None))
        assert found.contrasts[0].estimate.p_value < 0.05
        assert found.contrasts[0].adjusted is None
        assert found.contrasts[0].verdict == "no verdict: 2 seeds each are too few for one, it takes at least 3"
        assert main(["compare", "--output", str(tmp_path / "out"), "--runs", *map(str, folders)]) == 0
        text = (tmp_path / "out/report.md").read_text()
        assert found.contrasts[0].verdict in text
        assert "| not tested | not tested |" in text

    def test_holm_can_take_a_finding_back(self, runs):
        study = study_of(runs, "grpo", "mapo", "idle")
        generator = np.random.default_rng(0)
        for scale in np.linspace(0.5, 3, 60):
            base = np.zeros((3, 1))
            tables = [base, np.array([[1.0], [1.0 + scale], [1.0 - scale / 4]]), generator.normal(size=(3, 1))]
            contrast = outcome("x", tables, study).contrasts[0]
            if contrast.estimate.p_value < 0.05 <= contrast.adjusted:
                assert contrast.verdict.startswith("no significant difference after Holm's correction")
                return
        pytest.fail("no case between the two limits")

    def test_an_evaluation_of_the_untrained_model_is_none(self, runs, tmp_path):
        folders = [shutil.copytree(runs[label][0], tmp_path / f"{label}-seed0") for label in ("grpo", "mapo")]
        for folder in folders:
            config = folder / "config.yaml"
            config.write_text(config.read_text().replace("at_end: true", "at_end: false"))
            file = folder / "evaluations.jsonl"
            file.write_text(file.read_text().splitlines(keepends=True)[0])
        found, reason = final_pass(collect(folders, None))
        assert found is None
        assert "trainer.evaluation" in reason
        assert main(["compare", "--output", str(tmp_path / "out"), "--runs", *map(str, folders)]) == 0
        assert reason in (tmp_path / "out/report.md").read_text()

    def test_without_questions_seeds_are_paired(self, runs, tmp_path):
        folders = [shutil.copytree(f, tmp_path / f.name) for label in ("grpo", "mapo") for f in runs[label]]
        for folder in folders:
            shutil.rmtree(folder / "evaluation_samples")
        found, source = final_pass(collect(folders, None))
        assert "paired by seed only" in source
        assert (found.contrasts[0].estimate.seeds, found.contrasts[0].estimate.questions) == (3, 1)


class TestNumbers:
    def test_reaching_a_target(self, runs):
        run = load_run(runs["mapo"][0])
        accuracies = [row["reward/accuracy"] for row in run.metrics]
        means = [np.mean(accuracies[i - 4 : i + 1]) for i in range(4, 6)]
        assert reaching(run, float(means[0]), held_out=False).steps == 5
        tokens = sum(12 * row["response/length_mean"] for row in run.metrics[:5])
        assert reaching(run, float(means[0]), held_out=False).tokens == pytest.approx(tokens)
        assert reaching(run, 1.1, held_out=False).steps is None
        assert reaching(run, run.evaluations[1]["pass_at_1"], held_out=True).steps == 6

    def test_groups_that_a_filter_dropped_count(self, runs, tmp_path):
        def filtered(row):
            more = {"filter/accuracy": row["reward/accuracy"] / 2, "filter/response_tokens": 1000.0 * row["step"]}
            return json.dumps(row | more) + "\n"

        copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in runs["mapo"]]
        for folder in copies:
            file = folder / "metrics.jsonl"
            file.write_text("".join(map(filtered, read_rows(file))))
        study = collect([*runs["idle"], *copies], None)
        kept, sampled = (training_accuracy(s).arms[1].value for s in (study_of(runs, "idle", "mapo"), study))
        assert sampled == pytest.approx(kept / 2)
        run = load_run(copies[0])
        mean = float(np.mean([row["reward/accuracy"] / 2 for row in run.metrics[:5]]))
        assert reaching(run, mean, held_out=False) == Reaching(5.0, 15_000.0)
        assert main(["compare", "--output", str(tmp_path / "out"), "--runs", *map(str, [*runs["idle"], *copies])]) == 0
        assert "| 21,000 |" in (tmp_path / "out/report.md").read_text()

    def test_the_median_is_that_of_a_run_where_half_of_them_reach_the_target(self, runs):
        results = analyse(study_of(runs, "grpo", "mapo"), 0.5)
        there = [Reaching(30.0, 3000.0), Reaching(10.0, 1000.0)]
        reached = {"a": [*there, *[Reaching(None, None)] * 2], "b": [there[0], *[Reaching(None, None)] * 2]}
        table = _target(dataclasses.replace(results, reached={"training accuracy": reached})).tables[0]
        assert table.rows == [
            ["a, training accuracy", "2 of 4", "30", "3,000"],
            ["b, training accuracy", "1 of 3", "never", "never"],
        ]

    def test_prompts_are_compared_step_by_step(self, runs, tmp_path):
        study = study_of(runs, "grpo", "mapo")
        assert same_prompts(study) == {"mapo": SamePrompts(18, 18)}
        folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in runs["mapo"]]
        for step in (2, 5):  # other prompts in one step, the same in another order in the other
            file = folders[1] / f"rollouts/step_{step:06d}.parquet"
            table = read_rollouts(file)
            ids = [i + 7 if step == 2 else 2 - i for i in table["prompt_id"].to_pylist()]
            place = table.schema.get_field_index("prompt_id")
            pyarrow.parquet.write_table(table.set_column(place, "prompt_id", [ids]), file)
        (folders[2] / "rollouts/step_000006.parquet").unlink()
        study = collect([*runs["grpo"], *folders], None)
        assert same_prompts(study) == {"mapo": SamePrompts(15, 18)}
        assert "mapo was trained on the prompts of grpo, in the same order, in 15 of 18 steps only" in whole_text(study)
        shutil.rmtree(folders[0] / "rollouts")
        study = collect([*runs["grpo"], *folders], None)
        assert same_prompts(study) is None
        assert "Whether the training prompts were the same is not known" in whole_text(study)

    def test_unequal_budgets_are_named(self, runs, tmp_path):
        assert "Budgets are unequal" not in whole_text(study_of(runs, "grpo", "mapo"))
        longer = make_run(tmp_path / "mapo-seed0", "trainer.steps=7", "rollout.responses_per_prompt=4")
        text = whole_text(collect([runs["grpo"][0], longer], None))
        assert "Budgets are unequal: rollout.responses_per_prompt, trainer.steps differ" in text

    def test_the_time_of_a_whole_run_is_from_its_first_start_to_its_last_row(self, runs, tmp_path):
        folder = shutil.copytree(runs["mapo"][0], tmp_path / "mapo-seed0")
        start = read_rows(folder / "starts.jsonl")[0]
        replace_rows(folder / "starts.jsonl", [start | {"time": 1000.0}, start | {"time": 3000.0, "step": 2}])
        for name in ("metrics", "evaluations"):
            file = folder / f"{name}.jsonl"
            replace_rows(file, [row | {"time": 1100.0 + 500 * row["step"]} for row in read_rows(file)])
        assert whole_seconds(load_run(folder)) == 3100.0
        text = whole_text(collect([runs["grpo"][0], folder], None))
        assert "mapo: 51:40" in text
        assert "51:40 (2 starts)" in text
        (folder / "starts.jsonl").unlink()
        assert math.isnan(whole_seconds(load_run(folder)))
        assert "mapo: not recorded" in whole_text(collect([runs["grpo"][0], folder], None))

    def test_advantages_by_success_rate_are_those_of_the_formula(self, runs):
        import torch

        from megatron_mapo.config import AdvNormConfig

        study = study_of(runs, "grpo", "mapo")
        found = advantages_by_rate(study, study.arms[1])
        assert found.groups.sum() == pytest.approx(1)
        assert found.weight.sum() == pytest.approx(1)
        checked = 0
        for i, p in enumerate(found.rate):
            right = round(4 * p)
            rewards = torch.tensor([1.0] * right + [0.0] * (4 - right))
            expected = estimate_advantages(rewards, torch.zeros(4, dtype=torch.int64), AdvNormConfig())
            if 0 < right < 4:
                assert found.positive[i] == pytest.approx(float(expected[0]), rel=1e-5)
                assert found.negative[i] == pytest.approx(float(expected[-1]), rel=1e-5)
                checked += 1
            else:
                assert math.isnan(found.positive[i])
                assert found.weight[i] == 0
        assert checked >= 2

    def test_the_share_of_clipped_steps(self, tmp_path):
        clipped, free = "actor.optim.clip_grad=0.4", "actor.optim.clip_grad=0.6"
        made = [
            make_run(tmp_path / f"{name}-seed{i}", key, seed=i)
            for name, key in (("a", clipped), ("b", free))
            for i in (0, 1)
        ]
        assert main(["compare", "--output", str(tmp_path / "out"), "--runs", *map(str, made)]) == 0
        assert json.loads((tmp_path / "out/summary.json").read_text())["clipped_share"] == {
            "a": [1.0] * 2,
            "b": [0.0] * 2,
        }
        text = (tmp_path / "out/report.md").read_text()
        assert "clipped (actor.optim.clip_grad): a 100%, b 0%. Clipping makes" in text

    def test_measured_gradients_by_success_rate(self, runs, tmp_path):
        key = "tracking.gradients_every=2"
        made = [make_run(tmp_path / f"{name}-seed{seed}", key, seed=seed) for name in "ab" for seed in (0, 1)]
        study = collect(made, None)
        steps = range(2, 1 + study.arms[0].runs[0].steps, 2)
        norms = gradients_by_rate(study, study.arms[0])
        assert norms[1:8] == pytest.approx([0.1 * np.mean(steps) * i for i in range(1, 8)])
        assert np.isnan(norms[[0, 8]]).all()
        out = tmp_path / "out"
        folders = [*made, *runs["idle"][:2]]
        assert main(["compare", "--output", str(out), "--runs", *map(str, folders)]) == 0
        text = (out / "report.md").read_text()
        assert f"| 0.33 to 0.44 | {norms[3]:.4f} | {norms[3]:.4f} |" in text
        assert "Not measured (tracking.gradients_every) by runs of: idle" in text
        assert (out / "gradients_by_rate.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(runs: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    folders = [str(folder) for label in ("mapo", "grpo", "idle") for folder in runs[label]]
    assert main(["compare", "--baseline", "grpo", "--output", str(out), "--target", "0.4", "--runs", *folders]) == 0
    return out


class TestReport:
    def test_all_files_are_there(self, folder):
        names = {path.name for path in folder.iterdir()}
        assert names == {
            *("report.html", "report.md", "summary.json", "curves.png", "gradients.png", "final.png"),
            *("advantages.png", "lambda.png"),
        }
        assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith(".png"))

    def test_the_summary_has_the_numbers_of_the_tables(self, folder):
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["baseline"] == "grpo"
        assert summary["seeds"] == [0, 1, 2]
        labels = [contrast["label"] for contrast in summary["held_out"]["contrasts"]]
        assert labels == ["mapo", "idle"]
        text = (folder / "report.md").read_text()
        for contrast in summary["held_out"]["contrasts"]:
            estimate = contrast["estimate"]
            assert f"| {contrast['label']} − grpo | {estimate['value']:+.4f} |" in text
            assert estimate["low"] < estimate["value"] < estimate["high"]
        assert "no significant difference" in text
        assert summary["seconds"]["mapo"] == [24.0] * 3
        assert summary["largest_difference_before_training"] == 0
        assert summary["same_prompts"]["mapo"] == {"same": 18, "steps": 18}
        assert summary["reached"]["training accuracy"]["mapo"][0]["steps"] is not None

    def test_the_page_needs_nothing_else(self, folder):
        html = (folder / "report.html").read_text()
        assert "Before the first step all configurations answered alike" in html
        assert "idle was trained on the prompts of grpo, in the same order, in all 18 steps." in html
        assert "aggregation_mode" in html
        assert set(re.findall(r'src="([^:]*):', html)) == {"data"}

    def test_values_of_options_stay_text(self, runs, tmp_path):
        hostile = "<img src=x onerror=alert(1)>|{question}"
        make_run(tmp_path / "odd-seed0", f"data.template={hostile}", seed=0)
        folders = [str(runs["mapo"][0]), str(tmp_path / "odd-seed0")]
        assert main(["compare", "--output", str(tmp_path / "out"), "--runs", *folders]) == 0
        assert "<img src=x" not in (tmp_path / "out/report.html").read_text()
        text = (tmp_path / "out/report.md").read_text()
        assert "<img" not in text
        assert "&lt;img src=x onerror=alert(1)>\\|{question}" in text
        assert "this is not a comparison of algorithms alone" in text

    def test_markdown_tables_are_well_formed(self, folder):
        lines = (folder / "report.md").read_text().splitlines()
        for line, rule in itertools.pairwise(lines):
            if rule.startswith("| :--"):
                assert line.count("|") == rule.count("|")


class TestPlan:
    @pytest.fixture
    def configs(self, tmp_path: Path) -> list[str]:
        (tmp_path / "a.yaml").write_text(
            f"run: {{output_dir: {tmp_path}}}\nmodel: {{path: tiny}}\ndata: {{train: t.jsonl}}\ntrainer: {{steps: 4}}\n"
        )
        (tmp_path / "b.yaml").write_text("base: a.yaml\nactor: {adv_norm: {aggregation_mode: native}}\n")
        return [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]

    def request(self, configs: list[str], *overrides: str, **fields: object) -> Request:
        defaults = {"runs": (), "seeds": 2, "name": None, "baseline": None, "target": 0.5}
        return Request(
            **{"configs": configs, "processes": None, "output": None, "overrides": overrides} | defaults | fields
        )

    def test_seeds_go_round_and_are_the_same_for_all(self, configs, tmp_path):
        folder, runs, settings = module.plan(self.request(configs, "trainer.steps=7"), "both")
        assert folder == tmp_path / "both"
        assert [(run.label, run.seed) for run in runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
        assert [run.folder.name for run in runs] == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
        assert settings["a"].trainer.steps == settings["b"].trainer.steps == 7
        assert settings["b"].run_dir == runs[-1].folder

    def test_a_dry_run_lists_what_is_there_and_what_is_not(self, configs, tmp_path, capsys):
        finished = make_run(tmp_path / "study/a-seed0", "trainer.steps=2", "data.eval=null", evaluate=False)
        make_run(tmp_path / "study/b-seed0", "trainer.steps=4", steps=1, evaluate=False)
        before = sorted(tmp_path.rglob("*"))
        arguments = ["compare", "--config", configs[0], "--config", configs[1], "--seeds", "2", "--name", "study"]
        assert main([*arguments, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert re.search(r"a-seed0 +0 +finished", said)
        assert re.search(r"b-seed0 +0 +goes on, step 1 of 4", said)
        assert re.search(r"b-seed1 +1 +to be made", said)
        assert sorted(tmp_path.rglob("*")) == before
        assert finished.exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--runs", "x", "--config", "a.yaml"], "--config FILE"),
            ([], "--config FILE"),
            (["--runs", "x", "--dry-run"], "--dry-run"),
            (["--config", "a.yaml", "run.seed=3"], "run.seed=3: compare sets this key"),
            (["--config", "a.yaml", "--config", "sub/a.yaml"], "different names"),
            (["--config", "a.yaml", "--baseline", "b", "--dry-run"], "--baseline b"),
            (["--config", "a.yaml", "actor.no_such=1"], "actor.no_such"),
        ],
    )
    def test_mistakes_are_found_before_anything_is_started(self, arguments, message, configs, tmp_path, capsys):
        shutil.copytree(tmp_path, tmp_path / "sub", ignore=lambda *_: ["sub"])
        resolved = [str(tmp_path / text) if text.endswith(".yaml") else text for text in arguments]
        assert main(["compare", *resolved]) == 2
        assert message in capsys.readouterr().err

    def test_another_configuration_in_the_same_folder_is_refused(self, configs, tmp_path):
        _, _, settings = module.plan(self.request(configs), "both")
        with module._alone(tmp_path / "both"):
            module._keep_plan(tmp_path / "both", settings)
            _, _, more = module.plan(self.request(configs, "tracking.samples=1", seeds=5), "both")
            module._keep_plan(tmp_path / "both", more)
            _, _, other = module.plan(self.request(configs, "actor.optim.lr=1"), "both")
            with pytest.raises(ConfigError, match=r"another a \(actor\.optim\.lr differ\)"):
                module._keep_plan(tmp_path / "both", other)

    def test_two_comparisons_in_one_folder_are_refused(self, tmp_path):
        with (
            module._alone(tmp_path / "both"),
            pytest.raises(ConfigError, match="another comparison is at work"),
            module._alone(tmp_path / "both"),
        ):
            pass
