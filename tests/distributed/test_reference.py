"""The reference stays the model that training began with, wherever its weights wait, and the actor is left alone."""

from __future__ import annotations

from pathlib import Path

from harness import Launcher

OVERLAP = ["actor.optim.overlap_grad_reduce=true", "actor.optim.overlap_param_gather=true"]
CASES = {
    "host": ["actor.reference=host"],
    "host, overlap": ["actor.reference=host", *OVERLAP],
    "device, overlap": ["actor.reference=device", *OVERLAP],
    "base, overlap": ["actor.reference=base", "actor.lora.rank=4", *OVERLAP],
}


def test_after_updates_and_after_resuming(launcher: Launcher, frozen: Path, tmp_path: Path) -> None:
    arguments = {"cases": CASES, "folder": str(frozen), "out": str(tmp_path)}
    for wrong in launcher.run(2, "keep_reference", arguments):
        assert wrong == {name: [] for name in CASES}
