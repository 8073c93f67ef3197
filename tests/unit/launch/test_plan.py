"""The plan's numbers against real models, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_models import ARCHITECTURES, make_tiny_model

from megatron_mapo.config import Config, ParallelConfig, load_config
from megatron_mapo.errors import ConfigError, DataError, MapoError
from megatron_mapo.launch.plan import make_plan
from megatron_mapo.model_shape import ModelShape


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {arch: make_tiny_model(tmp_path_factory.mktemp(arch), arch) for arch in ARCHITECTURES}


def config(tmp_path: Path, model: Path | str, *overrides: str) -> Config:
    data = tmp_path / "train.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n')
    base = [f"model.path={model}", "model.dtype=bfloat16", f"data.train={data}", f"run.output_dir={tmp_path}/runs"]
    return load_config(None, [*base, *overrides])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parameters_are_counted_without_reading_weights(arch: str, models: dict[str, Path]) -> None:
    with safe_open(models[arch] / "model.safetensors", "pt") as weights:
        counted = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    shape = ModelShape.read(models[arch] / "config.json")
    assert shape.parameters() == counted
    assert shape.rank_parameters(ParallelConfig()) == counted


def test_experts_are_spread_over_their_own_ranks(tmp_path: Path, models: dict[str, Path]) -> None:
    """Four ranks, expert 2: half of the 4 experts (64 rows of 64) each, every expert on 2 ranks, all else on 4."""
    plan = make_plan(config(tmp_path, models["qwen3_moe"], "actor.parallel.expert=2"), 4, [])
    of_experts = 2 * (2 * 3 * 64 * 64)
    whole = plan.shape.parameters()
    assert plan.memory.weights == 2 * (whole - of_experts)
    assert plan.memory.optimizer == 12 * ((whole - 2 * of_experts) / 4 + of_experts / 2)


def test_memory_by_hand(tmp_path: Path, models: dict[str, Path]) -> None:
    """bf16, tensor 2, data 2, a reference model: every exact part of the estimate."""
    settings = ("actor.parallel.tensor=2", "actor.loss.kl_coef=0.1", "actor.reference=device", "model.dtype=bfloat16")
    plan = make_plan(config(tmp_path, models["llama"], *settings), 4, [])
    # hidden 64, ffn 128, 4 heads and 2 key/value heads of 16, 2 layers, 512 tokens: halves, and whole norms
    layer = (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) // 2 + 2 * 64
    parameters = 2 * layer + 256 * 64 + 64
    assert plan.data_parallel == 2
    assert plan.memory.weights == plan.memory.reference == 2 * parameters
    assert plan.memory.gradients == 4 * parameters
    assert plan.memory.optimizer == 12 * parameters // 2


def test_float32_needs_no_master_weights_and_one_rank_shares_nothing(tmp_path: Path, models: dict[str, Path]) -> None:
    plan = make_plan(config(tmp_path, models["llama"], "model.dtype=float32"), 1, [])
    assert plan.memory.optimizer == 8 * plan.shape.parameters()
    assert plan.memory.reference == 0


def test_context_parallel_ranks_share_the_optimizer_and_split_tokens(tmp_path: Path, models: dict[str, Path]) -> None:
    whole = make_plan(config(tmp_path, models["qwen3"]), 1, []).memory
    striped = make_plan(config(tmp_path, models["qwen3"], "actor.parallel.context=2"), 2, []).memory
    assert striped.optimizer * 2 == whole.optimizer
    assert striped.activations * 2 == whole.activations
    assert striped.weights == whole.weights


def test_recompute_saves_activations(tmp_path: Path, models: dict[str, Path]) -> None:
    kept = make_plan(config(tmp_path, models["llama"]), 1, []).memory
    again = make_plan(config(tmp_path, models["llama"], "actor.recompute=true"), 1, []).memory
    assert again.activations < kept.activations
    assert again.weights == kept.weights


def test_tokens_of_a_step_count_a_shared_prompt_once(tmp_path: Path, models: dict[str, Path]) -> None:
    sizes = (
        "rollout.prompts_per_step=3",
        "rollout.responses_per_prompt=4",
        "rollout.max_prompt_tokens=100",
        "rollout.max_response_tokens=50",
    )
    shared = make_plan(config(tmp_path, models["llama"], *sizes), 1, [])
    apart = make_plan(config(tmp_path, models["llama"], *sizes, "actor.share_prompts=false"), 1, [])
    assert shared.sequences == apart.sequences == 12
    assert shared.packed_tokens == 3 * 100 + 12 * 50
    assert apart.packed_tokens == 12 * 150


def test_a_checkpoint_is_found(tmp_path: Path, models: dict[str, Path]) -> None:
    settings = config(tmp_path, models["llama"])
    assert make_plan(settings, 1, []).resumes_from is None
    (settings.run_dir / "checkpoints" / "step_000004").mkdir(parents=True)
    (settings.run_dir / "checkpoints" / "step_000005.partial").mkdir()
    assert make_plan(settings, 1, []).resumes_from == 4


@pytest.mark.parametrize(
    ("overrides", "processes", "kind", "message"),
    [
        (["actor.parallel.tensor=4"], 4, ConfigError, r"actor\.parallel\.tensor=4 .* 2 key/value heads"),
        (["actor.parallel.pipeline=3"], 3, ConfigError, r"actor\.parallel\.pipeline=3 .* 2 layers"),
        (["actor.parallel.tensor=2"], 3, ConfigError, r"does not divide the 3 ranks"),
        (["actor.parallel.expert=2"], 2, ConfigError, r"actor\.parallel\.expert=2.*no experts"),
        (
            ["actor.parallel.pipeline=2", "actor.parallel.virtual_pipeline=2"],
            2,
            ConfigError,
            r"actor\.parallel\.virtual_pipeline=2 does not divide the model's 1 layers of a pipeline stage",
        ),
        (["data.eval=nowhere.jsonl"], 1, DataError, r"data\.eval: there is no file nowhere\.jsonl"),
        (["model.path=./nowhere"], 1, DataError, r"model\.path: nowhere .*no config\.json"),
    ],
)
def test_what_cannot_work_is_refused(
    overrides: list[str], processes: int, kind: type[MapoError], message: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    with pytest.raises(kind, match=message):
        make_plan(config(tmp_path, models["llama"], *overrides), processes, [])


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(DataError, match=r"model\.path: architecture 'mamba'"):
        ModelShape.read(tmp_path / "config.json")


def test_another_family_has_a_plan_if_somebody_translates_it(tmp_path: Path) -> None:
    """What its configuration leaves out is what transformers says: tied embeddings."""
    model = make_tiny_model(tmp_path / "gemma", "gemma")
    written = json.loads((model / "config.json").read_text())
    del written["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps(written))
    with safe_open(model / "model.safetensors", "pt") as weights:
        counted = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    with pytest.raises(DataError, match=r"'gemma' is not supported.*model\.fallback"):
        make_plan(config(tmp_path, model), 1, [])
    plan = make_plan(config(tmp_path, model, "model.fallback=megatron_bridge"), 1, [])
    assert plan.shape.parameters() == counted


def test_a_damaged_model_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="num_attention_heads"):
        ModelShape.read(tmp_path / "config.json")
