"""What is printed of a command line holds no secret."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from megatron_mapo.config import load_config
from megatron_mapo.launch import slurm
from megatron_mapo.launch.arguments import hidden

CASES = {
    "reward.options.api_key=hunter2": "reward.options.api_key=***",
    "reward.options={api_key: hunter2, url: http://a:1}": "reward.options={api_key: ***, url: http://a:1}",
    'reward.options={"token": "hunter2 3"}': 'reward.options={"token": ***}',
    "reward.options.PASSWORD='hunter2 3'": "reward.options.PASSWORD=***",
    "reward.options.client_secret=hunter2": "reward.options.client_secret=***",
    "reward.options.url=https://me:hunter2@a:1/b": "reward.options.url=https://***@a:1/b",
    "rollout.max_response_tokens=12": "rollout.max_response_tokens=12",
    "rollout.api_key_file=/home/me/key": "rollout.api_key_file=/home/me/key",
    "reward.options.api_key_env=JUDGE_KEY": "reward.options.api_key_env=JUDGE_KEY",
}


@pytest.mark.parametrize("text", CASES)
def test_values_of_secrets_are_hidden(text: str) -> None:
    assert hidden(text) == CASES[text]


def test_a_slurm_job_hides_the_same() -> None:
    script = 'source "$1"; shift; mapo_hidden "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(slurm.FUNCTIONS), *CASES], capture_output=True, text=True, check=True
    )
    assert done.stdout == " ".join(CASES.values()) + "\n"


def test_a_kept_script_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what Slurm runs, with all overrides."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = load_config(None, ["model.path=m", "data.train=d", f"run.output_dir={tmp_path}", "run.name=kept"])
    for _ in range(2):
        assert slurm.submit("#!/bin/sh\n", config) == "7"
        assert stat.S_IMODE((tmp_path / "kept/logs/slurm_job.sh").stat().st_mode) == 0o600
