"""Reading, checking and describing the configuration."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_mapo import config as config_module
from megatron_mapo.config import (
    ADVANTAGE_MODES,
    RIGHT_OR_WRONG_MODES,
    Config,
    Dtype,
    RewardComponent,
    data_parallel_size,
    describe_options,
    load_config,
    options_tables,
    to_yaml,
)
from megatron_mapo.errors import ConfigError

MIXTURE = "reward.mixture=[{name: math},{name: format, weight: 0.2, label: form, options: {opened: true}}]"
TREERPO = "actor.adv_norm.aggregation_mode=treerpo"
NATIVE = "actor.adv_norm.aggregation_mode=native"
THRESHOLD = "actor.adv_norm.success_threshold=0.5"
NEEDED = ["model.path=model", "data.train=openai/gsm8k:main"]
CONFIGS = Path(__file__).parents[2] / "configs"


def load(*overrides: str) -> Config:
    return load_config(None, [*NEEDED, *overrides])


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(*overrides)
    return str(error.value)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


class TestLoading:
    def test_the_result_is_the_dataclass_with_enum_members(self):
        config = load("actor.adv_norm.aggregation_mode=native", "actor.optim.lr=1e-5", "data.options={}")
        assert type(config) is Config
        assert config.actor.adv_norm.aggregation_mode == "native"
        assert config.model.dtype is Dtype.bfloat16
        assert config.actor.optim.lr == 1e-5
        assert type(config.rollout.urls) is list
        assert config.run_dir == Path("runs/run")

    def test_later_layers_win(self, tmp_path):
        path = write(tmp_path, "run: {name: file, seed: 1}\nmodel: {path: m}\ndata: {train: d}\n")
        config = load_config(path, ["run.seed=2", "run.seed=3"])
        assert (config.run.name, config.run.seed) == ("file", 3)

    def test_yaml_round_trip(self, tmp_path):
        config = load(
            MIXTURE, "actor.adv_norm.success_threshold=0.5", "rollout.urls=[http://a:1]", "model.dtype=float32"
        )
        assert load_config(write(tmp_path, to_yaml(config)), []) == config

    def test_a_mixture_is_a_list_of_components_that_a_later_layer_replaces(self):
        config = load(MIXTURE, "reward.success=math")
        assert config.reward.mixture == [
            RewardComponent("math"),
            RewardComponent("format", 0.2, {"opened": True}, "form"),
        ]
        assert [component.title for component in config.reward.components] == ["math", "form"]
        assert load(MIXTURE, "reward.mixture=[]").reward.components == [RewardComponent("math")]

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("model.pth=x", ["model.pth", "did you mean model.path?"]),
            ("actor.lr=1", ["actor.lr", "did you mean actor.optim.lr?"]),
            ("actr.optim.lr=1", ["actr", "did you mean actor?"]),
            ("actor=3", ["actor is a section"]),
            ("actor.optim=fast", ["actor.optim is a section"]),
            ("actor.optim.lr=fast", ["actor.optim.lr", "'fast'", "float"]),
            ("run.seed=1.5", ["run.seed", "1.5", "int"]),
            ("tracking.plots=perhaps", ["tracking.plots", "'perhaps'", "bool"]),
            ("run.name=", ["run.name", "None", "str"]),
            ("actor.adv_norm.aggregation_mode=max", ["actor.adv_norm.aggregation_mode", "'max'", "native | mix"]),
            ("rollout.urls=http://a:1", ["rollout.urls", "list[str]"]),
            ("rollout.urls=[[a]]", ["rollout.urls", "strings"]),
            ("rollout.urls={a: 1}", ["rollout.urls", "list[str]"]),
            ("reward.mixture=math", ["reward.mixture", "list of {name, weight, options, label}"]),
            ("reward.mixture={a: 1}", ["reward.mixture", "list of {name, weight, options, label}"]),
            ("reward.mixture.0.weight=2", ["reward.mixture must be a list"]),
            ("reward.mixture=[math]", ["reward.mixture[0]", "{name, weight, options, label}", "'math'"]),
            ("reward.mixture=[{name: a},{nme: b}]", ["unknown key reward.mixture[1].nme", "its keys: name, weight"]),
            ("reward.mixture=[{name: a, weight: b}]", ["reward.mixture[0].weight", "'b'", "Float"]),
            ("reward.mixture=[{weight: 1}]", ["missing mandatory key reward.mixture[0].name"]),
            ("model.path=${nowhere}", ["model.path", "nowhere"]),
            ("run.name", ["'run.name'", "section.key=value"]),
            ("=3", ["section.key=value"]),
            ("a..b=3", ["section.key=value"]),
            ("rollout.urls=[a", ["rollout.urls", "not valid YAML"]),
        ],
    )
    def test_a_bad_override_is_named(self, override, words):
        text = message(override)
        for word in words:
            assert word in text

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("- a\n", ["must be a mapping", "list"]),
            ("only text", ["unknown key only text"]),
            ("run: [\n", ["cannot be read as YAML"]),
            ("run: {seed: 1, seed: 2}", ["duplicate key seed"]),
            ("run: 3", ["run is a section"]),
            ("actor: {optim: {lrr: 1}}", ["actor.optim.lrr", "did you mean actor.optim.lr?"]),
            ("a: !!python/object/apply:os.getcwd []", ["cannot be read as YAML"]),
            ("base: 3", ["`base` must be"]),
            ("base: missing.yaml", ["`base`", "missing.yaml", "does not exist"]),
            ("base: run.yaml", ["leads back"]),
            ("", ["missing mandatory keys", "model.path", "data.train"]),
            ("model: {path: m}", ["missing mandatory key ", "data.train"]),
        ],
    )
    def test_a_bad_file_is_named(self, text, words, tmp_path):
        with pytest.raises(ConfigError) as error:
            load_config(write(tmp_path, text), [])
        for word in words:
            assert word in str(error.value)

    def test_a_missing_file(self):
        with pytest.raises(ConfigError, match=r"no such file: nowhere\.yaml"):
            load_config("nowhere.yaml", [])


class TestBase:
    def test_a_file_builds_on_another(self, tmp_path):
        write(tmp_path, "run: {name: first, seed: 7}\nmodel: {path: m}\ndata: {train: d}\n", "first.yaml")
        (tmp_path / "sub").mkdir()
        write(tmp_path / "sub", "base: ../first.yaml\nrun: {name: second}\n", "second.yaml")
        third = write(tmp_path / "sub", "base: second.yaml\nactor: {epochs: 2}\n", "third.yaml")
        config = load_config(third, [])
        assert (config.run.name, config.run.seed, config.actor.epochs) == ("second", 7, 2)


class TestDataFiles:
    def test_a_data_file_is_found_beside_the_configuration(self, tmp_path, monkeypatch):
        (tmp_path / "configs").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "configs/rows.jsonl").touch()
        path = write(tmp_path / "configs", "model: {path: m}\ndata: {train: rows.jsonl}\n")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert load_config(path, []).data.train == str(tmp_path / "configs/rows.jsonl")
        assert load_config(path, ["data.eval=rows.jsonl"]).data.eval == str(tmp_path / "configs/rows.jsonl")
        (tmp_path / "elsewhere/rows.jsonl").touch()
        assert load_config(path, []).data.train == str(tmp_path / "elsewhere/rows.jsonl")

    @pytest.mark.parametrize("name", ["openai/gsm8k:main", "reasoning_gym:chain_sum", "missing.jsonl"])
    def test_other_sources_stay_as_they_are(self, name):
        assert load(f"data.train={name}").data.train == name


class TestRanges:
    def test_every_number_has_a_range(self):
        """A new numeric option must say what it may be."""
        covered = {key for _, _, keys in config_module._RANGES for key in keys.split()}
        numeric = {o.key for o in describe_options() if o.type.split(" | ")[0] in ("int", "float")}
        assert numeric - covered == set()
        assert covered - {o.key for o in describe_options()} == set()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("actor.parallel.tensor", "0"),
            ("actor.optim.lr", "0"),
            ("actor.optim.lr", ".nan"),
            ("actor.optim.lr", ".inf"),
            ("actor.optim.beta1", "1"),
            ("actor.loss.kl_coef", "-0.1"),
            ("actor.loss.entropy_coef", "-0.1"),
            ("actor.loss.clip_low", "1.1"),
            ("rollout.temperature", "0"),
            ("rollout.responses_per_prompt", "1"),
            ("rollout.server.port", "70000"),
            ("data.eval_limit", "0"),
            ("data.template", "'{q}'"),
            ("run.seed", "-1"),
            ("run.name", "../other"),
            ("run.name", ".."),
            ("run.name", "a/b"),
            ("run.name", "-rf"),
            ("run.name", "''"),
            ("model.path", "''"),
        ],
    )
    def test_a_value_out_of_range_is_named(self, key, value):
        assert message(f"{key}={value}").startswith(f"{key} must be ")


class TestContradictions:
    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["reward.overlong_penalty=0.5"], ["reward.overlong_penalty", "actor.adv_norm.aggregation_mode"]),
            (["reward.correct=0"], ["reward.correct", "reward.wrong"]),
            (["reward.name=reasoning_gym"], ["reward.name", "actor.adv_norm.success_threshold"]),
            (["actor.adv_norm.success_threshold=2"], ["actor.adv_norm.success_threshold", "reward.correct"]),
            (["actor.adv_norm.success_threshold=0"], ["actor.adv_norm.success_threshold", "reward.wrong"]),
            (["actor.adv_norm.success_threshold=0.5", "reward.wrong=-1"], ["reward.wrong"]),
            (["actor.parallel.sequence=true"], ["actor.parallel.sequence", "actor.parallel.tensor"]),
            (["actor.parallel.virtual_pipeline=2"], ["actor.parallel.virtual_pipeline", "actor.parallel.pipeline"]),
            (["actor.reference=base"], ["actor.reference", "actor.lora.rank"]),
            (["actor.lora.targets=[q_proj,o]"], ["actor.lora.targets", "gate_proj"]),
            (["trainer.hang_timeout=1800"], ["trainer.hang_timeout", "trainer.collective_timeout"]),
            (["rollout.wait_timeout=1500"], ["rollout.wait_timeout", "trainer.hang_timeout"]),
            (["actor.microbatch_tokens=2047"], ["actor.microbatch_tokens", "rollout.max_prompt_tokens", "2048"]),
            (["actor.mini_batches=9"], ["actor.mini_batches", "rollout.prompts_per_step"]),
            (["actor.optim.overlap_param_gather=true"], ["actor.optim.overlap_grad_reduce"]),
            (["rollout.urls=[ftp://a]"], ["rollout.urls", "ftp://a"]),
            (["rollout.urls=['localhost:30000']"], ["rollout.urls"]),
            (["rollout.urls=['http://me:hunter2@a:1']"], ["rollout.urls", "user or password", "rollout.api_key_file"]),
            (["rollout.server.extra_args=[--api-key, hunter2]"], ["extra_args", "--api-key", "rollout.api_key_file"]),
            (["rollout.server.extra_args=['--api-key=hunter2']"], ["extra_args", "--api-key", "MAPO_API_KEY"]),
            (["rollout.server.extra_args=[--admin-api, hunter2]"], ["extra_args", "--admin-api-key"]),
            (["rollout.urls=[http://a:1,http://a:1/]"], ["rollout.urls", "twice"]),
            (["rollout.server.port=65535", "rollout.server.count=2"], ["rollout.server.port", "rollout.server.count"]),
            (["rollout.sync.disk_dir=x"], ["rollout.sync.disk_dir", "rollout.sync.mode"]),
            (["trainer.evaluation.interval=5"], ["trainer.evaluation.interval", "data.eval"]),
            (["trainer.keep_best=true"], ["trainer.keep_best", "data.eval"]),
            ([MIXTURE], ["reward.success", "actor.adv_norm.aggregation_mode=mix", "math, form"]),
            ([MIXTURE, "reward.success=gsm8k"], ["reward.success", "math, form", "'gsm8k'"]),
            ([MIXTURE, "reward.success=math", THRESHOLD], ["reward.success", "actor.adv_norm.success_threshold"]),
            ([MIXTURE, THRESHOLD, "reward.success_score=1"], ["reward.success_score", "reward.success"]),
            ([MIXTURE, "reward.success=math", "reward.wrong=-1"], ["reward.wrong", "reward.mixture"]),
            ([MIXTURE, "reward.success=math", "reward.options.a=1"], ["reward.options", "reward.mixture"]),
            ([MIXTURE.replace("0.2", ".inf"), "reward.success=math"], ["reward.mixture[1].weight", "finite"]),
            (
                [MIXTURE.replace("0.2", "-0.2"), "reward.success=math"],
                ["reward.mixture[1].weight", "actor.adv_norm.aggregation_mode=mix", "-0.2"],
            ),
            (
                [MIXTURE.replace("0.2", "-0.2"), THRESHOLD, "actor.adv_norm.aggregation_mode=mean_only"],
                ["reward.mixture[1].weight", "actor.adv_norm.aggregation_mode=mean_only"],
            ),
            (
                [MIXTURE.replace("0.2", "-0.2"), "reward.success=math", TREERPO],
                ["reward.mixture[1].weight", "actor.adv_norm.aggregation_mode=treerpo"],
            ),
            (
                [MIXTURE, "reward.success=math", TREERPO],
                ["reward.mixture", "reward.correct", "1.2", "actor.adv_norm.aggregation_mode=treerpo"],
            ),
            (["reward.success=math"], ["reward.success", "reward.mixture"]),
            (["reward.mixture=[{name: math},{name: math}]"], ["reward.mixture[0]", "'math'", "label"]),
            (["reward.mixture=[{name: math, label: a/b}]"], ["reward.mixture[0].label", "'a/b'"]),
            (["reward.mixture=[{name: math, weight: 0}]"], ["reward.mixture", "weight must not be 0"]),
            (["reward.mixture=[{name: ''}]"], ["reward.mixture[0].name"]),
            (["run.resume_step=3", "run.resume=never"], ["run.resume_step", "run.resume=never"]),
            (["data.options.size=3"], ["data.options", "reasoning_gym"]),
            (["actor.loss.objective=gspo"], ["actor.loss.objective=gspo", "actor.loss.aggregation=token", "sequence"]),
            (["actor.loss.objective=gmpo"], ["actor.loss.objective=gmpo", "actor.loss.aggregation=token"]),
            (["actor.loss={objective: sapo, clip_high: 0.28}"], ["actor.loss.clip_high", "actor.loss.objective=sapo"]),
            (["actor.loss={objective: sapo, clip_low: 0.1}"], ["actor.loss.clip_low", "actor.loss.objective=sapo"]),
            (["actor.loss.sapo_tau=2"], ["actor.loss.sapo_tau", "actor.loss.objective=ppo"]),
            (["actor.loss.sapo_tau_negative=2"], ["actor.loss.sapo_tau_negative", "actor.loss.objective=ppo"]),
            (["actor.loss.kl_in=reward", NATIVE], ["actor.loss.kl_in=reward", "actor.loss.kl_coef=0"]),
            (["actor.correction.weight_max=5"], ["actor.correction.weight_max", "actor.correction.weight=none"]),
            (
                ["actor.correction={weight_max: null, mask_low: 0.5, mask_high: 2}"],
                ["actor.correction.weight_max", "actor.correction.weight=none"],
            ),
            *(
                (
                    [f"actor.adv_norm.aggregation_mode={mode}", "reward.overlong_penalty=1"],
                    ["reward.overlong_penalty", f"aggregation_mode={mode}"],
                )
                for mode in sorted(RIGHT_OR_WRONG_MODES)
            ),
            (["actor.loss.dual_clip=3", "actor.loss.objective=sapo"], ["actor.loss.dual_clip", "actor.loss.objective"]),
            (
                ["actor.loss.kl_in=reward", "actor.loss.kl_coef=0.1"],
                ["actor.loss.kl_in", "actor.adv_norm.aggregation_mode=mix"],
            ),
            (
                [
                    "actor.loss.kl_in=reward",
                    "actor.loss.kl_coef=0.1",
                    "actor.adv_norm.aggregation_mode=rloo",
                    "actor.loss.kl_estimator=k3_unbiased",
                ],
                ["actor.loss.kl_estimator=k3_unbiased"],
            ),
            (
                ["actor.correction.weight=token", "actor.loss.old_logprobs=rollout"],
                ["actor.correction.weight", "actor.loss.old_logprobs"],
            ),
            (
                ["actor.correction.mask_low=2", "actor.correction.mask_high=2"],
                ["actor.correction.mask_low", "mask_high"],
            ),
            (
                ["actor.adv_norm.aggregation_mode=pass_at_k", "actor.adv_norm.pass_k=9"],
                ["actor.adv_norm.pass_k", "rollout.responses_per_prompt"],
            ),
            (["rollout.filter.min_p=0.5", "rollout.filter.max_p=0.5"], ["rollout.filter.min_p"]),
            (
                ["rollout.filter.varied=true", "actor.adv_norm.aggregation_mode=reinforce++"],
                ["rollout.filter.varied", "reinforce++"],
            ),
            (
                ["rollout.filter.max_p=0.9", "reward.name=reasoning_gym", "actor.adv_norm.aggregation_mode=native"],
                ["rollout.filter.min_p", "actor.adv_norm.success_threshold"],
            ),
            (
                ["data.curriculum.min_p=0.1", "reward.name=reasoning_gym", NATIVE],
                ["data.curriculum.min_p", "reward.name=reasoning_gym", "actor.adv_norm.success_threshold"],
            ),
            (
                [MIXTURE, NATIVE, "rollout.filter.min_p=0.1"],
                ["rollout.filter.min_p", "reward.success", "actor.adv_norm.success_threshold", "math, form"],
            ),
            (
                [MIXTURE, NATIVE, "data.curriculum.max_p=0.9"],
                ["data.curriculum.max_p", "reward.success", "actor.adv_norm.success_threshold", "math, form"],
            ),
            (
                ["actor.adv_norm.aggregation_mode=mean_only", "reward.overlong_penalty=1"],
                ["reward.overlong_penalty", "aggregation_mode=mean_only"],
            ),
            (
                ["actor.adv_norm.aggregation_mode=treerpo", "reward.name=reasoning_gym"],
                ["reward.name", "actor.adv_norm.success_threshold"],
            ),
            (["reward.overlong_buffer=10"], ["reward.overlong_buffer", "reward.overlong_penalty"]),
            (
                [
                    "reward.overlong_buffer=2000",
                    "reward.overlong_penalty=1",
                    "actor.adv_norm.aggregation_mode=native",
                ],
                ["reward.overlong_buffer", "rollout.max_response_tokens"],
            ),
        ],
    )
    def test_both_keys_are_named(self, overrides, words):
        text = message(*overrides)
        for word in words:
            assert word in text

    @pytest.mark.parametrize(
        "overrides",
        [
            ["reward.overlong_penalty=0.5", "actor.adv_norm.aggregation_mode=native"],
            ["reward.name=reasoning_gym", "actor.adv_norm.success_threshold=1"],
            ["reward.name=reasoning_gym", "actor.adv_norm.aggregation_mode=native"],
            ["reward.name=my.module:verifier"],
            ["actor.adv_norm.aggregation_mode=my.module:estimate"],
            ["actor.adv_norm.aggregation_mode=reinforce++_baseline", "actor.loss.kl_in=reward", "actor.loss.kl_coef=1"],
            ["actor.loss={objective: gmpo, clip_low: 1.5, aggregation: sequence}"],
            ["actor.loss={objective: gspo, aggregation: constant}"],
            ["actor.loss={objective: sapo, sapo_tau: 2}"],
            ["actor.correction={weight: token, weight_max: null, mask_low: 0.5, mask_high: 2}"],
            *(
                [f"actor.adv_norm.aggregation_mode={mode}", "reward.overlong_penalty=1"]
                for mode in (*ADVANTAGE_MODES, "my.module:estimate")
                if mode not in RIGHT_OR_WRONG_MODES
            ),
            ["reward.correct=1", "reward.wrong=-1"],
            [MIXTURE, "reward.success=form"],
            [MIXTURE, "reward.success=math", "reward.success_score=0.5"],
            [MIXTURE, THRESHOLD],
            [MIXTURE, "actor.adv_norm.aggregation_mode=native", "reward.wrong=-1"],
            [MIXTURE.replace("0.2", "-0.2"), "actor.adv_norm.aggregation_mode=native"],
            [MIXTURE.replace("0.2", "0"), "reward.success=math"],
            [MIXTURE, "reward.success=math", "reward.correct=0.8", TREERPO],
            [MIXTURE.replace("name: math", "name: math, weight: 0.8"), "reward.success=math", TREERPO],
            ["reward.mixture=[{name: reasoning_gym}]", "reward.success=reasoning_gym"],
            [MIXTURE, NATIVE, "reward.success=math", "rollout.filter.min_p=0.1", "data.curriculum.max_p=0.9"],
            [MIXTURE, NATIVE, THRESHOLD, "rollout.filter.min_p=0.1", "data.curriculum.max_p=0.9"],
            [MIXTURE, NATIVE, "rollout.filter={varied: true, max_truncated: 0.5}"],
            ["reward.name=my.module:verifier", "rollout.filter.min_p=0.1", "data.curriculum.max_p=0.9"],
            ["reward.name=regex", "reward.options={pattern: '(?P<answer>x)'}"],
            ["actor.loss.old_logprobs=rollout"],
            ["actor.parallel.sequence=true", "actor.parallel.tensor=2"],
            ["rollout.sync.mode=disk", "rollout.sync.disk_dir=x"],
            ["rollout.urls=[http://127.0.0.1:30000,https://host/prefix]"],
            ["data.train=reasoning_gym:chain_sum", "data.options.size=3"],
        ],
    )
    def test_what_is_allowed(self, overrides):
        load(*overrides)

    @pytest.mark.parametrize(("world", "size"), [(8, 1), (16, 2), (64, 8)])
    def test_data_parallel_size(self, world, size):
        layout = ["actor.parallel.tensor=2", "actor.parallel.pipeline=2", "actor.parallel.context=2"]
        assert data_parallel_size(load(*layout), world) == size

    @pytest.mark.parametrize(
        ("layout", "key"),
        [(["actor.parallel.tensor=3"], r"actor\.parallel\.tensor"), (["actor.parallel.expert=3"], r"parallel\.expert")],
    )
    def test_a_layout_that_does_not_divide(self, layout, key):
        with pytest.raises(ConfigError, match=key):
            data_parallel_size(load(*layout), 8)


class TestHelp:
    def test_every_option_is_described(self):
        options = {option.key: option for option in describe_options()}
        assert [o.key for o in options.values() if not o.doc] == []
        assert options["model.path"].default == "(required)"
        assert options["actor.adv_norm.std"].type == "population | unbiased"
        assert options["data.eval"][1:3] == ("str | null", "null")
        assert options["tracking.plots"][1:3] == ("bool", "true")
        assert options["actor.optim.clip_grad"].doc == "Largest global gradient norm."

    def test_the_options_are_those_of_the_dataclasses(self):
        def leaves(value, prefix=""):
            for item in dataclasses.fields(value):
                child = getattr(value, item.name)
                if dataclasses.is_dataclass(child):
                    yield from leaves(child, f"{prefix}{item.name}.")
                else:
                    yield f"{prefix}{item.name}"

        assert [o.key for o in describe_options()] == list(leaves(Config()))

    def test_the_tables_show_every_key_of_a_section(self):
        screen = Console(file=io.StringIO(), width=160)
        for table in options_tables("actor"):
            screen.print(table)
        text = screen.file.getvalue()
        for option in describe_options():
            section, _, name = option.key.rpartition(".")
            if section.split(".")[0] == "actor":
                assert section in text
                assert name[:22] in text
        assert "model.path" not in text

    def test_an_unknown_section(self):
        with pytest.raises(ConfigError, match="no section actr"):
            options_tables("actr")


class TestShippedConfigs:
    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
    def test_every_file_loads_from_anywhere(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        load_config(path, [])

    def test_grpo_differs_from_mapo_in_two_keys(self):
        mapo, grpo = (to_yaml(load_config(CONFIGS / f"gsm8k_{name}.yaml", [])) for name in ("mapo", "grpo"))
        differing = [pair for pair in zip(mapo.splitlines(), grpo.splitlines(), strict=True) if pair[0] != pair[1]]
        assert differing == [
            ("  name: gsm8k_mapo", "  name: gsm8k_grpo"),
            ("    aggregation_mode: mix", "    aggregation_mode: native"),
        ]

    def test_the_addition_task_holds_out_questions_whose_mirror_is_trained(self):
        from megatron_mapo.data.prompts import _jsonl_records

        def pairs(name):
            rows = [row for _, row in _jsonl_records(CONFIGS / name)]
            words = [row["question"].split() for row in rows]
            found = [(int(w[2]), int(w[4].rstrip("?"))) for w in words]
            assert [str(a + b) for a, b in found] == [str(row["answer"]) for row in rows]
            assert len(set(found)) == len(found)
            return set(found)

        train, held_out = pairs("addition_train.jsonl"), pairs("addition_heldout.jsonl")
        assert len(held_out) == 20
        assert not train & held_out
        assert train | held_out == {(a, b) for a in range(10) for b in range(10)}
        assert {(b, a) for a, b in held_out} <= train


@pytest.mark.parametrize(
    "override",
    [
        "rollout.urls=['http://me:hunter2@a:1']",
        "rollout.urls=['me:hunter2@a:1']",
        "rollout.server.extra_args=['--api-key=hunter2']",
        "rollout.server.extra_args=[--api-key, hunter2]",
    ],
)
def test_a_secret_that_is_refused_is_not_shown(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, ["model.path=m", "data.train=d", override])
    assert "hunter2" not in str(refused.value)
