"""Every family in every model-parallel layout: transformers' numbers, and the same bits on the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from frozen_batch import frozen_batch
from harness import Launcher
from reference import transformers_scores
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, BRIDGED, make_tiny_model
from torch import Tensor

TP, PP, CP = "actor.parallel.tensor=2", "actor.parallel.pipeline=2", "actor.parallel.context=2"
FALLBACK = "model.fallback=megatron_bridge"
ALL = ARCHITECTURES + BRIDGED
EXPERTS = ("qwen3_moe", "mixtral")
LAYOUTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "tp2": ([FALLBACK, TP, "actor.parallel.sequence=true"], ALL),
    "pp2": ([FALLBACK, PP], ALL),
    "cp2": ([FALLBACK, CP], ALL),
    "ep2": (["actor.parallel.expert=2"], EXPERTS),
}
"""Options, and the architectures that they are tried with."""
CASES = [(layout, arch) for layout, (_, architectures) in LAYOUTS.items() for arch in architectures]
VOCAB = 509
"""A prime: tensor parallelism pads it, an export trims it."""


@pytest.fixture(scope="module")
def folder(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``DTYPE/ARCH``, and from every layout ``out/LAYOUT-ARCH.safetensors`` and ``out/LAYOUT-ARCH-DTYPE/``."""
    path = tmp_path_factory.mktemp("families")
    frozen_batch().save(path / "batch.safetensors")
    (path / "out").mkdir()
    for arch in ALL:
        make_tiny_model(path / "float32" / arch, arch, torch.float32, VOCAB)
        make_tiny_model(path / "bfloat16" / arch, arch, torch.bfloat16, VOCAB)
    launcher.run(2, "score_and_export", {"layouts": LAYOUTS, "folder": str(path)}, timeout=300)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Log-probs and entropies of transformers."""
    return {arch: transformers_scores(folder / "float32" / arch, frozen_batch()) for arch in ALL}


@pytest.mark.parametrize(("layout", "arch"), CASES)
def test_scores_equal_those_of_transformers(
    layout: str, arch: str, folder: Path, expected: dict[str, tuple[Tensor, Tensor]]
) -> None:
    found = load_file(folder / "out" / f"{layout}-{arch}.safetensors")
    for name, theirs in zip(("logprobs", "entropy"), expected[arch], strict=True):
        assert (found[name] - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize(("layout", "arch"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_back_bit_by_bit(dtype: str, layout: str, arch: str, folder: Path) -> None:
    found = load_file(folder / "out" / f"{layout}-{arch}-{dtype}" / "model.safetensors")
    source = load_file(folder / dtype / arch / "model.safetensors")
    assert found.keys() == source.keys()
    for name, value in source.items():
        assert found[name].dtype == value.dtype == getattr(torch, dtype)
        assert torch.equal(found[name], value), name
