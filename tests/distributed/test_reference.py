"""The reference stays the model that training began with, wherever its weights wait, and the actor is left alone."""

from __future__ import annotations

from pathlib import Path

from harness import Launcher

PLACES = {
    "host": ["actor.reference=host"],
    "device": ["actor.reference=device"],
    "base": ["actor.reference=base", "actor.lora.rank=4"],
    "host, lora": ["actor.reference=host", "actor.lora.rank=4"],
}
OVERLAP = ["actor.optim.overlap_grad_reduce=true", "actor.optim.overlap_param_gather=true"]


def test_after_updates_and_after_resuming(launcher: Launcher, frozen: Path, tmp_path: Path) -> None:
    cases = PLACES | {f"{name}, overlap": [*options, *OVERLAP] for name, options in PLACES.items()}
    arguments = {"cases": cases, "folder": str(frozen), "out": str(tmp_path)}
    for wrong in launcher.run(2, "keep_reference", arguments):
        assert wrong == {name: [] for name in cases}
