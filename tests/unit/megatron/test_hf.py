"""Hugging Face folders: the same numbers as transformers, the same bits on the way back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from reference import ragged_batch, transformers_scores
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mapo.config import Config, Dtype, to_yaml
from megatron_mapo.errors import CheckpointError, DataError
from megatron_mapo.megatron import checkpoint, hf_folder
from megatron_mapo.megatron.checkpoint import read_weights, sharded_model
from megatron_mapo.megatron.families import FAMILIES
from megatron_mapo.megatron.hf import load_weights, merged_weights, named_weights
from megatron_mapo.megatron.hf_folder import WeightStream, save_folder
from megatron_mapo.megatron.model import PolicyModel, load_hf_config
from megatron_mapo.megatron.policy import Policy, build_model, empty_model
from megatron_mapo.megatron.runtime import Runtime
from megatron_mapo.model_shape import ARCHITECTURES as KNOWN

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {arch: (arch, {}) for arch in ARCHITECTURES} | {
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama3_rope_steep": ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0, "high_freq_factor": 8.0}}),
    "odd_vocabulary": ("llama_untied", {"vocab": 301}),
    "llama2": ("llama_untied", {"num_key_value_heads": 4}),
    "linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn_rope": ("qwen2", {"rope_parameters": YARN}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "mistral_no_window": ("mistral", {"sliding_window": None}),
    "gemma2_no_attention_cap": ("gemma2", {"attn_logit_softcapping": None}),
    "gemma2_no_logit_cap": ("gemma2", {"final_logit_softcapping": None}),
    "gemma2_no_window": ("gemma2", {"layer_types": ["full_attention"] * 2}),
    "gemma3_text_linear_rope": ("gemma3_text", {"rope_parameters": GEMMA3_ROPE}),
    "rope_base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds each tiny model once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def build(variant: str, dtype: torch.dtype = torch.float32) -> Path:
        if (variant, dtype) not in made:
            arch, shape = VARIANTS[variant]
            made[variant, dtype] = make_tiny_model(tmp_path_factory.mktemp(variant), arch, dtype, **shape)
        return made[variant, dtype]

    return build


def test_every_family_has_a_tiny_model(folder: Callable[..., Path]) -> None:
    assert {load_hf_config(folder(arch)).model_type for arch in ARCHITECTURES} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_equal_those_of_transformers(
    variant: str, folder: Callable[..., Path], config: Config, runtime: Runtime
) -> None:
    batch, path = ragged_batch(), folder(variant)
    expected = transformers_scores(path, batch)
    policy = Policy(config, runtime, path, 1)
    for share, limit in ((True, 8192), (False, 300)):
        policy.packing = type(policy.packing)(max_tokens=limit, share_prompts=share)
        scores = policy.log_probs(batch)
        assert scores.computed.all()
        for mine, theirs in zip((scores.logprobs, scores.entropy), expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_every_family_is_known_before_torch_is() -> None:
    assert set(KNOWN) == set(FAMILIES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("llama", "llama3_rope"),
        ("llama", "linear_rope"),
        ("llama3_rope", "llama3_rope_steep"),
        ("qwen2", "yarn_rope"),
        ("qwen2", "qwen2_window"),
        ("mistral", "mistral_no_window"),
        ("gemma2", "gemma2_no_attention_cap"),
        ("gemma2", "gemma2_no_logit_cap"),
        ("gemma2", "gemma2_no_window"),
        ("gemma3_text", "gemma3_text_linear_rope"),
    ],
)
def test_variants_of_the_same_weights_differ(one: str, other: str, folder: Callable[..., Path]) -> None:
    """Otherwise the comparison above could not tell them apart."""
    batch = ragged_batch()
    first, second = (transformers_scores(folder(v), batch)[0] for v in (one, other))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [*ARCHITECTURES, "odd_vocabulary"])
def test_weights_come_back_bit_by_bit(
    variant: str, dtype: torch.dtype, folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    source = folder(variant, dtype)
    config.model.dtype = Dtype.float32 if dtype is torch.float32 else Dtype.bfloat16
    model, hf = build_model(config, source, runtime.device)
    out = save_folder(named_weights(model, hf), source, tmp_path / "out")
    assert_same_tensors(load_file(out / "model.safetensors"), load_file(source / "model.safetensors"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    tokens = torch.arange(20)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(tokens).logits for p in (out, source))
    assert torch.equal(one, two)
    assert AutoTokenizer.from_pretrained(out).encode("the answer") == [
        *AutoTokenizer.from_pretrained(source).encode("the answer")
    ]


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_several_files_and_their_index(
    folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    source = folder("llama_untied")
    model, hf = build_model(config, source, runtime.device)
    out = save_folder(named_weights(model, hf), source, tmp_path / "out", shard_bytes=100_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
        assert {n for n, f in index["weight_map"].items() if f == file.name} == set(tensors)
        found |= tensors
    assert_same_tensors(found, load_file(source / "model.safetensors"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    tokens = torch.arange(20)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(tokens).logits for p in (out, source))
    assert torch.equal(one, two)
    # What was written can be read again, shards and all, and saving over it leaves no old file behind.
    load_weights(model, hf, out)
    save_folder(named_weights(model, hf), out, out)
    assert [f.name for f in out.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_that_is_written_stands_in_the_configuration(
    key: str, folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    """A bfloat16 folder trained in float32, written in both; the way there and back loses nothing."""
    source = tmp_path / "source"
    shutil.copytree(folder("qwen3", torch.bfloat16), source)
    settings = json.loads((source / "config.json").read_text())
    settings[key] = settings.pop("dtype")
    (source / "config.json").write_text(json.dumps(settings))
    model, hf = build_model(config, source, runtime.device)
    wide = save_folder(named_weights(model, hf), source, tmp_path / "wide")
    narrow = save_folder(named_weights(model, hf), source, tmp_path / "narrow", dtype=torch.bfloat16)
    expected = load_file(source / "model.safetensors")
    assert_same_tensors(load_file(narrow / "model.safetensors"), expected)
    assert_same_tensors(load_file(wide / "model.safetensors"), {n: v.float() for n, v in expected.items()})
    assert json.loads((narrow / "config.json").read_text()) == settings
    assert json.loads((wide / "config.json").read_text()) == settings | {key: "float32"}
    assert AutoModelForCausalLM.from_pretrained(wide).dtype is torch.float32


def test_a_card_is_written_where_there_is_none(
    folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder("llama"), source)
    model, hf = build_model(config, source, runtime.device)
    save_folder(named_weights(model, hf), source, tmp_path / "out", card="ours")
    assert (tmp_path / "out" / "README.md").read_text() == "ours"
    (source / "README.md").write_text("theirs")
    save_folder(named_weights(model, hf), source, tmp_path / "out", card="ours")
    assert (tmp_path / "out" / "README.md").read_text() == "theirs"


def test_named_chat_templates_are_exported(
    folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder("llama"), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    named = {"default": tokenizer.chat_template, "tool_use": "tools {{ messages }}"}
    tokenizer.chat_template = dict(named)
    tokenizer.save_pretrained(source)
    assert AutoTokenizer.from_pretrained(source).chat_template == named
    model, hf = build_model(config, source, runtime.device)
    out = save_folder(named_weights(model, hf), source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == named


def save_checkpoint(model: list[PolicyModel], out: Path) -> Path:
    out.mkdir()
    dist_checkpointing.save({"model": sharded_model(model)}, str(out))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [*ARCHITECTURES, "odd_vocabulary", "llama3_rope"])
def test_weights_are_read_from_a_checkpoint_without_a_model(
    variant: str, dtype: torch.dtype, folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    source = folder(variant, dtype)
    config.model.dtype = Dtype.float32 if dtype is torch.float32 else Dtype.bfloat16
    path = save_checkpoint(build_model(config, source, runtime.device)[0], tmp_path / "checkpoint")
    empty, hf = empty_model(config, source, torch.device("meta"))
    assert {value.device.type for value in empty[0].parameters()} == {"meta"}
    for group_bytes in (0, 100_000):
        weights = named_weights(empty, hf, partial(read_weights, empty[0], path, group_bytes=group_bytes))
        described = list(weights.described)
        found = {name: value.clone() for name, value in weights}
        assert_same_tensors(found, load_file(source / "model.safetensors"))
        assert [(n, v.shape, v.dtype) for n, v in described] == [(n, v.shape, v.dtype) for n, v in found.items()]


def test_a_checkpoint_of_another_model_is_not_read(
    folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    """A parameter that is not there, and one of another shape."""
    path = save_checkpoint(build_model(config, folder("llama"), runtime.device)[0], tmp_path / "checkpoint")
    for variant, message in (("qwen2", "linear_qkv.bias from model not in"), ("llama2", "Global shape mismatch")):
        empty, hf = empty_model(config, folder(variant), torch.device("meta"))
        with pytest.raises(CheckpointError, match=rf"cannot read {path}: .*{message}"):
            list(named_weights(empty, hf, partial(read_weights, empty[0], path, group_bytes=0)))


PEAK = """
import ctypes, os, sys
from functools import partial
from pathlib import Path

def mib(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024

def peak(work):
    ctypes.CDLL(None).malloc_trim(0)  # what came before has freed would hide what this takes
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
    before = mib("VmRSS")
    work()
    print(mib("VmHWM") - before)
"""
EXPORT_PEAK = f"""{PEAK}
from megatron_mapo.export import export_run

first, source, out, shard = *map(Path, sys.argv[1:4]), int(sys.argv[4])
export_run(first, first / "export")  # what is loaded once is no part of an export
del os.environ["RANK"]  # the second one meets at a port of its own
peak(lambda: export_run(source, out, shard_bytes=shard))
"""
LOAD_PEAK = f"""{PEAK}
from megatron_mapo.config import Config, Dtype
from megatron_mapo.megatron import hf, runtime
from megatron_mapo.megatron.policy import build_model, empty_model

first, source, shard = *map(Path, sys.argv[1:3]), int(sys.argv[3])
config = Config()
config.model.dtype = Dtype.float32
trainers = runtime.initialize(config)
hf.SafetensorsFolder = partial(hf.SafetensorsFolder, mapped_bytes=shard // 4)
build_model(config, first, trainers.device)  # what is loaded once is no part of it
chunks, model = empty_model(config, source, trainers.device)
for value in chunks[0].parameters():
    value.data.zero_()  # its memory is that of the model
peak(lambda: hf.load_weights(chunks, model, source))
trainers.close()
"""
# Freed tensors go back to the system at once: the mark is of what is in use.
MEASURED = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}


def run_python(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=MEASURED
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_run(out: Path, source: Path, config: Config, runtime: Runtime) -> dict[str, Tensor]:
    """A run's folder with one checkpoint, and the weights in it."""
    config.model.path, config.data.train = str(source), "none"
    policy = Policy(config, runtime, source, 1)
    for chunk in policy.chunks:
        for value in chunk.parameters():
            if value.requires_grad:
                value.data += 0.01 * torch.randn_like(value)
    checkpoint.save(policy, runtime, out / "checkpoints", 1, {}, keep=1)
    (out / "config.yaml").write_text(to_yaml(config))
    return {name: value.clone() for name, value in policy.named_weights()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
@pytest.mark.parametrize("kind", ["imported", "run", "lora"])
def test_an_export_stays_under_one_shard_in_memory(kind: str, config: Config, runtime: Runtime, tmp_path: Path) -> None:
    """Reading included: 70 MiB in files of 18 MiB; the largest parameter, gate and up together, has 6 MiB."""
    shard = 18 << 20
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    config.actor.lora.rank = 4 if kind == "lora" else 0
    for name, sizes in (("first", {}), ("measured", shape)):
        source = make_tiny_model(tmp_path / f"{name}-model", "llama", **sizes)
        if kind == "imported":
            run_python("-m", "megatron_mapo", "import", source, tmp_path / name)
            expected = load_file(source / "model.safetensors")
        else:
            expected = make_run(tmp_path / name, source, config, runtime)
    out = tmp_path / "out"
    grown = float(run_python("-c", EXPORT_PEAK, tmp_path / "first", tmp_path / "measured", out, str(shard)))
    files = list(out.glob("*.safetensors"))
    assert len(files) >= 4
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) or (kind == "lora" and torch.allclose(found[name], value, rtol=1e-6))
    assert grown * 2**20 < shard


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_loading_takes_less_than_one_shard_beside_the_model(tmp_path: Path) -> None:
    """70 MiB in files of 18 MiB."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    first = make_tiny_model(tmp_path / "first", "llama")
    source = make_tiny_model(tmp_path / "source", "llama", **shape)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "sharded", max_shard_size="18MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 4
    assert float(run_python("-c", LOAD_PEAK, first, tmp_path / "sharded", str(18_000_000))) < 17


def test_weights_in_another_layout_beside_the_model_are_not_read(
    folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    """With an index and without one. A file that the index names must be there."""
    source = tmp_path / "source"
    shutil.copytree(folder("mistral"), source)
    save_file({"layers.0.attention.wq.weight": torch.zeros(64, 64)}, source / "consolidated.safetensors")
    model, hf = build_model(config, source, runtime.device)
    out = save_folder(named_weights(model, hf), source, tmp_path / "out", shard_bytes=100_000)
    shutil.copy(source / "consolidated.safetensors", out)
    build_model(config, out, runtime.device)
    second = sorted(out.glob("model-*.safetensors"))[1]
    second.unlink()
    with pytest.raises(DataError, match=f"names {second.name}, which is not there"):
        build_model(config, out, runtime.device)


def test_a_failed_save_leaves_the_old_folder(
    folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder("llama")
    model, hf = build_model(config, source, runtime.device)
    out = save_folder(named_weights(model, hf), source, tmp_path / "out")
    old = load_file(out / "model.safetensors")

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(named_weights(model, hf))
        raise RuntimeError("stop")

    tensors = [(name, value.clone()) for name, value in named_weights(model, hf)]
    (first, value), *rest = tensors
    streams: list[tuple[Iterator[tuple[str, Tensor]], str]] = [
        (broken(), "stop"),
        (iter([(first, value[1:]), *rest]), r"embed_tokens.weight \[512, 64\] was described, and .* \[511, 64\] comes"),
        (iter([("other", value), *rest]), r"embed_tokens.weight .* was described, and other"),
        (iter(tensors[:-1]), r"model.norm.weight \[64\] was described, and the end"),
        (iter([*tensors, ("more", value)]), "more comes after all"),
    ]
    for stream, message in streams:
        with pytest.raises((RuntimeError, ValueError), match=message):
            save_folder(WeightStream(named_weights(model, hf).described, stream), source, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(CheckpointError, match=r"GiB free and the model needs .* choose another folder"):
        save_folder(named_weights(model, hf), source, out)
    assert_same_tensors(load_file(out / "model.safetensors"), old)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(hf_folder, "_write_next", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: .*No space left on device"):
        save_folder(named_weights(model, hf), source, out)
    assert_same_tensors(load_file(out / "model.safetensors"), old)
    assert not list(tmp_path.glob("*.partial"))


def test_a_tensor_that_the_base_of_adapters_lacks_is_missed_before_anything_is_written(
    folder: Callable[..., Path], config: Config, tmp_path: Path, runtime: Runtime
) -> None:
    source = change_tensors(folder("llama"), tmp_path / "less", lambda tensors: tensors.pop("model.norm.weight"))
    empty, hf = empty_model(config, source, torch.device("meta"))
    with pytest.raises(DataError, match=r"tensor model\.norm\.weight is missing"):
        merged_weights(empty, hf, source, 1 << 20)


def change_tensors(source: Path, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(LAYER + "mlp.up_proj.weight"), r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
        (lambda t: t.update(surprise=torch.zeros(1)), "unexpected tensors in .*: surprise"),
        (
            lambda t: t.update({LAYER + "self_attn.q_proj.bias": torch.zeros(64)}),
            r"unexpected tensors in .*q_proj\.bias",
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.zeros(64)}),
            r"unexpected tensors in .*model\.layers\.2",
        ),
    ],
)
def test_missing_and_unexpected_tensors_are_named(
    change: Callable, message: str, folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    path = change_tensors(folder("llama"), tmp_path / "bad", change)
    with pytest.raises(DataError, match=message):
        build_model(config, path, runtime.device)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_head_beside_tied_embeddings_must_be_the_embeddings(
    arch: str,
    folder: Callable[..., Path],
    config: Config,
    runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers computes with a head that the folder has, whatever ``tie_word_embeddings`` says."""

    def head(row: int, factor: float) -> Callable[[dict[str, Tensor]], None]:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][row] *= factor

        return change

    monkeypatch.setattr("megatron_mapo.megatron.hf._COMPARED_ROWS", 100)
    source = folder(arch)
    same = change_tensors(source, tmp_path / "same", head(0, 1.0))
    model, hf = build_model(config, same, runtime.device)
    assert_same_tensors(dict(named_weights(model, hf)), load_file(source / "model.safetensors"))
    for row in (0, -1):
        other = change_tensors(source, tmp_path / f"other{row}", head(row, 3.0))
        with pytest.raises(DataError, match=r"tie_word_embeddings.*lm_head\.weight"):
            build_model(config, other, runtime.device)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (63,)),
        ("model.embed_tokens.weight", (500, 64)),
        ("model.embed_tokens.weight", (600, 64)),
        ("model.embed_tokens.weight", (512, 63)),
        (LAYER + "self_attn.q_proj.weight", (62, 64)),
        (LAYER + "self_attn.k_proj.weight", (33, 64)),
        (LAYER + "self_attn.v_proj.weight", (32, 60)),
        (LAYER + "self_attn.o_proj.weight", (64, 62)),
        (LAYER + "mlp.gate_proj.weight", (100, 64)),
        (LAYER + "mlp.down_proj.weight", (64, 130)),
    ],
)
def test_a_wrong_shape_is_named(
    name: str, shape: tuple[int, ...], folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    path = change_tensors(folder("llama"), tmp_path / "bad", lambda t: t.update({name: torch.zeros(shape)}))
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        build_model(config, path, runtime.device)


def test_shapes_that_are_only_right_together_are_refused(
    folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    """Gate and up stand in one matrix: rows that one lacks and the other has too many must not even out."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[LAYER + "mlp.gate_proj.weight"] = torch.zeros(100, 64)
        tensors[LAYER + "mlp.up_proj.weight"] = torch.zeros(156, 64)

    path = change_tensors(folder("llama"), tmp_path / "bad", change)
    with pytest.raises(DataError, match=r"gate_proj"):
        build_model(config, path, runtime.device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not supported; supported: llama, mistral, qwen2"),
        ({"model_type": None}, "architecture None is not supported"),
        ({"rope_parameters": LLAMA3 | {"rope_type": "dynamic"}}, "rope_type='dynamic'; supported: default, linear"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2, "sliding_window": 8}, "'ministral' is not"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer_types chunked_attention"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}}, "only 1.0"),
    ],
)
def test_models_that_are_not_vouched_for(
    change: dict[str, Any], message: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings = json.loads((folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(DataError, match=message):
        load_hf_config(tmp_path)


def test_folders_without_what_is_needed(
    folder: Callable[..., Path], config: Config, runtime: Runtime, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        build_model(config, tmp_path, runtime.device)
    shutil.copy(folder("llama") / "config.json", tmp_path)
    with pytest.raises(DataError, match=r"no \*\.safetensors file"):
        build_model(config, tmp_path, runtime.device)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(DataError, match=r"model\.safetensors is not a readable safetensors file"):
        build_model(config, tmp_path, runtime.device)
