"""A run whose reward is a mixture, and the check of its samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from runs import command, rows, run

SHORT = """

async def short(response, answer, metadata, prompt, *, letters):
    assert prompt.startswith("What is")
    return 1.0 if len(response) <= letters else 0.25
"""


def test_a_mixture_trains_and_its_samples_can_be_checked(workspace: Path, server_url: str, tmp_path: Path) -> None:
    verifiers = tmp_path / "mixed.py"
    verifiers.write_text((workspace / "verifiers.py").read_text() + SHORT)
    mixture = [
        {"name": f"{verifiers}:even"},
        {"name": f"{verifiers}:short", "weight": 0.5, "options": {"letters": 12}, "label": "length"},
    ]
    folder, last = workspace / "runs/mixed", 16 * 2
    reward = [f"reward.mixture={json.dumps(mixture)}", "reward.success=even", "reward.workers=1"]
    done = run(
        command(
            workspace,
            *(f"rollout.urls=[{server_url}]", "run.name=mixed", "trainer.steps=2", f"tracking.samples={last}"),
            *("actor.adv_norm.aggregation_mode=native", *reward),
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    samples = rows(folder / "samples.jsonl")
    assert len(samples) == last
    for row in samples:
        assert row["success"] is (sum(map(ord, row["response"])) % 2 == 0)
        assert row["reward/even"] == float(row["success"])
        assert row["reward/length"] == (1.0 if len(row["response"]) <= 12 else 0.25)
        assert row["reward"] == pytest.approx(row["reward/even"] + 0.5 * row["reward/length"])
    assert {row["success"] for row in samples} == {True, False}
    for file in (folder / "evaluation_samples").iterdir():
        for row in rows(file):
            assert row["right"] is (row["rewards"]["even"] == 1.0)
    out = tmp_path / "checked.jsonl"
    checked = run(
        [
            *(sys.executable, "-m", "megatron_mapo", "reward-check", "--config", str(folder / "config.yaml")),
            *("--data", str(folder / "samples.jsonl"), "--label-key", "success", "--output", str(out)),
        ]
    )
    assert checked.returncode == 0, checked.stderr
    assert "mixture differs from the label: 0 of 32" in checked.stdout
    assert [row["verdicts"]["mixture"]["reward"] for row in rows(out)] == [row["reward"] for row in samples]
