"""The gradient does not depend on the layout: two updates in every layout against one process.

Loss, gradient norm, every token's log-prob and entropy before each update and after the last, and
all updated weights. The old log-probs lie up to 0.4 nat off, so that clipping bites in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Launcher
from safetensors.torch import load_file
from torch import Tensor

from megatron_mapo.config import OptimConfig

LOSSES = {
    "token": ["actor.loss.aggregation=token"],
    "sequence_kl": [
        "actor.loss.aggregation=sequence",
        "actor.loss.kl_coef=0.1",
        "actor.loss.entropy_coef=0.01",
        "rollout.temperature=0.8",
    ],
    "constant": [
        "actor.loss.aggregation=constant",
        "actor.optim.clip_grad=0.2",
        "actor.loss.clip_high=0.3",
        "actor.loss.kl_coef=0.05",
    ],
    # What looks at whole sequences, whose tokens context parallelism spreads over ranks.
    "gspo": [
        "actor.loss.objective=gspo",
        "actor.loss.aggregation=sequence",
        "actor.loss.clip_low=0.05",
        "actor.loss.clip_high=0.02",
        "actor.correction.weight=sequence",
        "actor.correction.reject_low=0.98",
    ],
    "gmpo": [
        "actor.loss.objective=gmpo",
        "actor.loss.aggregation=sequence",
        "actor.correction.weight=token",
        "actor.correction.mask_high=1.1",
        "actor.loss.kl_coef=0.05",
        "actor.loss.kl_estimator=k3_unbiased",
    ],
}
TP, SP, PP, CP = ([f"actor.parallel.{k}"] for k in ("tensor=2", "sequence=true", "pipeline=2", "context=2"))
SMALL = ["actor.microbatch_tokens=80"]
VPP = [*PP, "actor.parallel.virtual_pipeline=2"]
LORA = ["actor.lora.rank=4", "actor.lora.alpha=16", "actor.optim.lr=0.1"]
EP, ETP = ["actor.parallel.expert=2"], ["actor.parallel.expert_tensor=2"]
OVERLAP = ["actor.optim.overlap_grad_reduce=true"]
GATHER = [*OVERLAP, "actor.optim.overlap_param_gather=true"]
ADAM = ("lr", "eps", "weight_decay", "clip_grad")
DEFAULT_ADAM = [f"actor.optim.{key}={getattr(OptimConfig(), key)}" for key in ADAM]
ATTENTION = ["actor.lora.targets=[q_proj,k_proj,v_proj,o_proj]"]
"""All that LoRA can adapt in a mixture of experts."""


@dataclass(frozen=True)
class Case:
    """One layout, and which single-process run it has to equal."""

    ranks: int
    model: str
    loss: str
    options: list[str]
    rows: list[int] | None = None
    permute: bool = False
    lora: bool = False
    dtype: str = "float32"
    default_adam: bool = False
    """The optimizer's settings are those of a run that sets none, not those of ``distributed_cases.BASE``."""
    zeros: str = ""
    """Some advantages are 0, and these sequences are ``updated`` or ``left out``."""

    @property
    def reference(self) -> str:
        rows = "all" if self.rows is None else f"{len(self.rows)} rows"
        adam = "-default-adam" if self.default_adam else ""
        return f"{self.model}-{self.loss}-{rows}{'-lora' if self.lora else ''}{'-zeros' if self.zeros else ''}{adam}"

    def as_reference(self) -> Case:
        """The same in one process, with every sequence in the update."""
        zeros = "updated" if self.zeros else ""
        same = {"lora": self.lora, "dtype": self.dtype, "default_adam": self.default_adam}
        return Case(1, self.model, self.loss, [], self.rows, zeros=zeros, **same)

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``distributed_cases.train_case`` gets."""
        lora = [*LORA, *(ATTENTION if self.model in ("qwen3_moe", "mixtral") else [])] if self.lora else []
        adam = DEFAULT_ADAM if self.default_adam else []
        options = [*LOSSES[self.loss], f"model.dtype={self.dtype}", *self.options, *lora, *adam]
        return asdict(self) | {"options": options}


FEW = [3, 6]
CASES = {
    "recompute": Case(1, "llama", "token", ["actor.recompute=true"]),
    "small-microbatches": Case(1, "llama_untied", "sequence_kl", SMALL),
    "prompts-not-shared": Case(1, "llama_untied", "sequence_kl", ["actor.share_prompts=false", *SMALL]),
    "permuted": Case(1, "llama_untied", "sequence_kl", SMALL, permute=True),
    "tp2": Case(2, "llama", "token", TP),
    "tp2-sp": Case(2, "llama_untied", "sequence_kl", TP + SP),
    "tp2-qwen2": Case(2, "qwen2", "constant", TP + SMALL),
    "tp2-qwen3": Case(2, "qwen3", "token", TP),
    "tp2-sp-gemma3": Case(2, "gemma3_text", "token", TP + SP + ["actor.recompute=true"]),
    "cp2-gemma2": Case(2, "gemma2", "sequence_kl", CP),
    "pp2-tied": Case(2, "llama", "token", PP + SMALL),
    "pp2-untied": Case(2, "llama_untied", "sequence_kl", PP + SMALL),
    "cp2": Case(2, "llama_untied", "sequence_kl", CP + SMALL),
    "reference-on-device": Case(1, "llama_untied", "sequence_kl", ["actor.reference=device"]),
    "lora-tp2": Case(2, "llama_untied", "sequence_kl", TP, lora=True),
    "lora-tp2-sp": Case(2, "qwen2", "token", TP + SP + SMALL, lora=True),
    "vpp2": Case(2, "deep", "sequence_kl", VPP + SMALL),
    "ep2": Case(2, "qwen3_moe", "sequence_kl", EP + SMALL),
    "tp2-sp-ep2": Case(2, "mixtral", "token", TP + SP + EP),
    "dp2": Case(2, "llama_untied", "sequence_kl", []),
    "dp2-permuted": Case(2, "llama", "token", SMALL, permute=True),
    "dp2-fillers": Case(2, "llama", "token", [], rows=FEW[:1]),
    "dp2-plain-optimizer": Case(2, "llama", "token", ["actor.optim.distributed=false"]),
    "dp2-overlap": Case(2, "llama", "token", OVERLAP + SMALL),
    "cp2-gspo": Case(2, "llama_untied", "gspo", CP + SMALL),
    "dp2-gspo-permuted": Case(2, "llama", "gspo", SMALL, permute=True),
    "cp2-gmpo": Case(2, "llama", "gmpo", CP),
    "pp2-gmpo": Case(2, "llama_untied", "gmpo", PP + SMALL),
    "cp2-permuted": Case(2, "llama_untied", "sequence_kl", CP + SMALL, permute=True),
    "ep2-permuted": Case(2, "qwen3_moe", "sequence_kl", EP + SMALL, permute=True),
    "dp2-zeros-left-out": Case(2, "llama", "token", SMALL, zeros="left out"),
    "tp2-cp2": Case(4, "llama", "token", TP + CP),
    "tp2-pp2": Case(4, "llama", "token", TP + PP + SMALL),
}
SLOW_CASES = {
    "dp2-overlap-gather": Case(2, "llama_untied", "sequence_kl", GATHER),
    "dp2-tp2-sp-pp2-overlap-gather": Case(8, "llama", "token", TP + SP + PP + SMALL + GATHER),
    "dp2-vpp2-overlap-gather": Case(4, "deep", "sequence_kl", VPP + SMALL + GATHER),
    "dp2-tp2-sp-vpp2-overlap-gather": Case(8, "deep_tied", "token", TP + SP + VPP + SMALL + GATHER),
    "ep2-overlap-gather": Case(2, "qwen3_moe", "sequence_kl", EP + SMALL + GATHER),
    "ep2-dp4-overlap-gather": Case(4, "mixtral", "token", EP + SMALL + GATHER),
    "lora-ep2": Case(2, "qwen3_moe", "sequence_kl", EP + SMALL, lora=True),
    "lora-ep2-dp4-overlap-gather": Case(4, "qwen3_moe", "sequence_kl", EP + SMALL + GATHER, lora=True),
    "lora-tp2-sp-ep2": Case(2, "qwen3_moe", "sequence_kl", TP + SP + EP, lora=True),
    "tp2-sp-qwen2": Case(2, "qwen2", "constant", TP + SP),
    "tp2-sp-qwen3": Case(2, "qwen3", "token", TP + SP + ["actor.recompute=true"]),
    "pp2-qwen2": Case(2, "qwen2", "constant", PP),
    "cp2-qwen3": Case(2, "qwen3", "token", CP),
    "dp2-plain-optimizer-untied": Case(2, "llama_untied", "sequence_kl", ["actor.optim.distributed=false", *SMALL]),
    "tp2-sp-cp2": Case(4, "llama_untied", "sequence_kl", TP + SP + CP),
    "tp2-sp-pp2-default-adam": Case(4, "llama", "token", TP + SP + PP + SMALL, default_adam=True),
    "tp2-sp-pp2-untied": Case(4, "llama_untied", "sequence_kl", TP + SP + PP + SMALL),
    "lora-dp2": Case(2, "llama_untied", "sequence_kl", SMALL, lora=True),
    "lora-pp2-tied": Case(2, "llama", "token", PP + SMALL, lora=True),
    "lora-cp2-recompute": Case(2, "llama_untied", "sequence_kl", [*CP, "actor.recompute=true"], lora=True),
    "lora-reference-in-host-memory": Case(1, "llama_untied", "sequence_kl", ["actor.reference=host"], lora=True),
    "lora-tp2-sp-gemma2": Case(2, "gemma2", "token", TP + SP, lora=True),
    "lora-tp2-sp-vpp2": Case(4, "deep", "sequence_kl", TP + SP + VPP + SMALL, lora=True),
    "vpp2-tied": Case(2, "deep_tied", "token", VPP + SMALL),
    "vpp2-one-microbatch": Case(2, "deep", "sequence_kl", VPP, rows=FEW[:1]),
    "tp2-sp-vpp2": Case(4, "deep", "sequence_kl", TP + SP + VPP + SMALL),
    "dp2-vpp2-overlap": Case(4, "deep", "sequence_kl", VPP + SMALL + OVERLAP),
    "cp2-vpp2": Case(4, "deep_tied", "token", CP + VPP + SMALL),
    "ep2-mixtral": Case(2, "mixtral", "token", EP),
    "cp2-gspo-zeros-left-out": Case(2, "llama_untied", "gspo", CP + SMALL, zeros="left out"),
    "ep2-cp2": Case(2, "qwen3_moe", "sequence_kl", EP + CP + SMALL),
    "tp2-sp-etp2": Case(2, "qwen3_moe", "sequence_kl", TP + SP + ETP),
    "ep2-plain-optimizer": Case(2, "qwen3_moe", "sequence_kl", [*EP, "actor.optim.distributed=false"]),
    "ep4": Case(4, "qwen3_moe", "sequence_kl", ["actor.parallel.expert=4", *SMALL]),
    "ep2-pp2": Case(4, "mixtral", "token", EP + PP + SMALL),
    "ep2-dp4-overlap": Case(4, "qwen3_moe", "sequence_kl", EP + SMALL + OVERLAP),
    "tp2-sp-ep2-etp2": Case(4, "qwen3_moe", "sequence_kl", TP + SP + EP + ETP),
    "tp2-sp-ep2-recompute": Case(4, "mixtral", "token", [*TP, *SP, *EP, "actor.recompute=true"]),
    "cp2-pp2": Case(4, "llama", "token", CP + PP + SMALL),
    "dp2-tp2": Case(4, "llama", "token", TP + SMALL),
    "dp2-pp2": Case(4, "llama", "token", PP + SMALL),
    "dp2-cp2": Case(4, "llama_untied", "sequence_kl", CP + SMALL),
    "tp2-sp-cp2-pp2": Case(8, "llama_untied", "sequence_kl", TP + SP + CP + PP + SMALL),
    "dp2-tp2-sp-vpp2": Case(8, "deep", "sequence_kl", TP + SP + VPP + SMALL),
    "dp2-tp2-sp-ep2-pp2": Case(8, "qwen3_moe", "sequence_kl", TP + SP + EP + PP + SMALL),
    "cp4": Case(4, "llama", "token", ["actor.parallel.context=4"]),
    "dp4-fillers": Case(4, "llama", "token", [], rows=FEW),
}

COLUMNS = ("loss", "grad norm", "logged metrics", "log-probs", "updated weights", "update")
"""What is compared. Of the update, which is all that the weights have moved, its norm; else the largest entry."""
BOUNDS = {
    "float32": dict.fromkeys(COLUMNS, 1e-5),
    "bfloat16": dict.fromkeys(COLUMNS, 0.1) | {"loss": 0.05, "grad norm": 0.03},
}
"""Difference from one process, as a share of the value in one process."""
WIDER = {
    ("float32", "tp2-sp-pp2-default-adam"): {"update": 1e-2},
    ("bfloat16", "tp2-sp-gemma3"): {"grad norm": 0.1, "logged metrics": 0.2, "log-probs": 0.2, "update": 0.2},
    ("bfloat16", "lora-tp2"): {"updated weights": 0.2, "update": 0.2},
}
"""Of cases that amplify rounding more: Adam where a gradient is rounding noise (see ``BASE`` in
``distributed_cases``), embeddings that are scaled up, adapters at a large rate."""
HALF_CASES = ("small-microbatches", "tp2-sp", "pp2-tied", "vpp2", "cp2", "ep2", "dp2-permuted")
"""What the tests train in bfloat16 too; ``layout_table.py`` does so with all."""


def bounds_of(name: str, dtype: str) -> dict[str, float]:
    """Of a case, in this type: one for each of ``COLUMNS``."""
    return BOUNDS[dtype] | WIDER.get((dtype, name), {})


def column_of(name: str) -> str:
    """Which of ``COLUMNS`` a tensor of a run belongs to."""
    if name == "update" or name.startswith("weight."):
        return "update" if name == "update" else "updated weights"
    return {"loss": "loss", "grad_norm": "grad norm", "metric": "logged metrics"}.get(name.split(".")[1], "log-probs")


def run_cases(launcher: Launcher, cases: dict[str, Case], frozen: Path, out: Path) -> None:
    """Train every case and its reference; each leaves ``out/NAME.safetensors``."""
    cases = {case.reference: case.as_reference() for case in cases.values()} | cases
    for ranks in sorted({case.ranks for case in cases.values()}):
        chosen = {name: case.arguments for name, case in cases.items() if case.ranks == ranks}
        losses = launcher.run_cases(ranks, "train", chosen, {"folder": str(frozen), "out": str(out)})
        for other in losses[1:]:
            assert other == losses[0], "ranks disagree about the loss"


@pytest.fixture(scope="module")
def trained(
    launcher: Launcher, frozen: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Tensor]]:
    """Runs all quick cases and their references, a few processes for all of them."""
    out = tmp_path_factory.mktemp("trained")
    run_cases(launcher, CASES, frozen, out)
    return lambda name: load_file(out / f"{name}.safetensors")


@pytest.fixture(scope="module")
def trained_slow(
    launcher: Launcher, frozen: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Tensor]]:
    """The same for the rarer layouts."""
    out = tmp_path_factory.mktemp("trained_slow")
    run_cases(launcher, SLOW_CASES, frozen, out)
    return lambda name: load_file(out / f"{name}.safetensors")


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors, as a share of the second one's largest entry."""
    scale = max(float(expected.double().abs().max()), 1e-6)
    return float((found.double() - expected.double()).abs().max()) / scale


def difference_of(name: str, found: Tensor, expected: Tensor) -> float:
    """Of two runs' tensors of this name, as ``COLUMNS`` says."""
    if column_of(name) == "update":
        return float((found - expected).norm() / expected.norm())
    return relative_difference(found, expected)


def assert_equal_runs(found: dict[str, Tensor], expected: dict[str, Tensor], bounds: dict[str, float]) -> None:
    """Every tensor within the bound of its column."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.dtype == torch.bool:
            assert torch.equal(found[name], value), name
        else:
            difference = difference_of(name, found[name], value)
            assert difference <= bounds[column_of(name)], f"{name}: {difference:.2e} of its scale"


@pytest.mark.parametrize("name", CASES)
def test_a_layout_trains_like_one_process(name: str, trained: Callable[[str], dict[str, Tensor]]) -> None:
    assert_equal_runs(trained(name), trained(CASES[name].reference), bounds_of(name, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_a_rarer_layout_trains_like_one_process(name: str, trained_slow: Callable[[str], dict[str, Tensor]]) -> None:
    bounds = bounds_of(name, "float32")
    assert_equal_runs(trained_slow(name), trained_slow(SLOW_CASES[name].reference), bounds)


@pytest.mark.slow
def test_in_bfloat16_layouts_differ_by_rounding(launcher: Launcher, frozen: Path, tmp_path: Path) -> None:
    """Stated bounds, after two updates; what is wrong is off by its own size."""
    cases = {name: replace(CASES[name], dtype="bfloat16") for name in HALF_CASES}
    run_cases(launcher, cases, frozen, tmp_path)
    for name, case in cases.items():
        found, expected = (load_file(tmp_path / f"{run}.safetensors") for run in (name, case.reference))
        assert_equal_runs(found, expected, bounds_of(name, "bfloat16"))


@pytest.mark.parametrize("name", sorted({case.reference for case in CASES.values()}))
def test_the_updates_are_worth_comparing(name: str, frozen: Path, trained: Callable[[str], dict[str, Tensor]]) -> None:
    """Weights move far beyond the bound, gradients are clipped, and ratios lie on both sides of the clip."""
    found = trained(name)
    model = name.split("-")[0]
    before = load_file(frozen / model / "model.safetensors")
    for key, value in before.items():
        if name.endswith("lora") and "_proj.weight" not in key:
            assert torch.equal(found[f"weight.{key}"], value), f"{key} is frozen"
            continue
        moved = (found[f"weight.{key}"] - value).abs().max() / value.abs().max()
        assert moved > 1e-3, key
    assert found["0.grad_norm"] > (0.2 if "constant" in name else 0.5)
    assert found["0.loss"] != found["1.loss"]
    if "all" in name:
        old = load_file(frozen / f"columns_{model}.safetensors")["old_logprobs"]
        ratio = (found["0.scores.logprobs"] - old).exp()[found["0.scores.computed"]]
        assert (ratio > 1.2).any()
        assert (ratio < 0.8).any()
        assert ((ratio > 0.8) & (ratio < 1.2)).any()
