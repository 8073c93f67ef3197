"""What the local launcher hands to its trainers, and that their exit code comes back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from megatron_mapo.config import load_config
from megatron_mapo.errors import ConfigError, DataError, RolloutError
from megatron_mapo.launch import local

CORES = len(os.sched_getaffinity(0))

# Stands in for the trainer: writes what it was given, waits for the other ranks, ends with a code of its own.
TRAINER = """
import json, os, sys, time
path = os.path.join(sys.argv[1], "rank")
with open(path + os.environ["RANK"] + ".part", "w") as file:
    json.dump({"argv": sys.argv[2:], "env": dict(os.environ)}, file)
os.rename(file.name, path + os.environ["RANK"])
while not all(os.path.exists(path + str(rank)) for rank in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.05)
sys.exit(int(os.environ.get("TRAINER_EXIT", "0")))
"""


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    model = make_tiny_model(tmp_path / "model")
    return [
        f"model.path={model}",
        "data.train=reasoning_gym:leg_counting",
        "actor.adv_norm.aggregation_mode=native",
        f"run.output_dir={tmp_path / 'runs'}",
    ]


def test_environment_of_the_ranks(overrides: list[str]) -> None:
    first, second = local.trainer_environments({"RANK": "7", "KEPT": "yes"}, load_config(None, overrides), 2)
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["LOCAL_RANK"] == "0"
    assert first["WORLD_SIZE"] == second["LOCAL_WORLD_SIZE"] == "2"
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["OMP_NUM_THREADS"] == str(max(1, CORES // 2))
    assert first["OMP_WAIT_POLICY"] == "PASSIVE"
    assert first["KEPT"] == "yes"


def test_threads_are_those_of_the_configuration(overrides: list[str]) -> None:
    (only,) = local.trainer_environments({}, load_config(None, [*overrides, "trainer.threads=3"]), 1)
    assert only["OMP_NUM_THREADS"] == only["MKL_NUM_THREADS"] == "3"


def test_gloo_stays_on_loopback_only_with_servers_of_this_machine(overrides: list[str]) -> None:
    (own,) = local.trainer_environments({}, load_config(None, overrides), 1)
    (other,) = local.trainer_environments({}, load_config(None, [*overrides, "rollout.urls=[http://gpu:30000]"]), 1)
    assert own["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in other


def test_processes_of_one_replica_without_a_gpu(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    sizes = ["actor.parallel.tensor=2", "actor.parallel.pipeline=2", "actor.parallel.context=3"]
    assert local.default_processes(load_config(None, overrides)) == 1
    assert local.default_processes(load_config(None, [*overrides, *sizes])) == 12


def test_given_servers_are_used_and_none_is_started(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole launch with a program in the trainer's place and an address where nobody listens."""

    def command(config_path: str | None, arguments: list[str]) -> list[str]:
        return [sys.executable, "-c", TRAINER, str(tmp_path), *arguments]

    monkeypatch.setattr(local, "trainer_command", command)
    monkeypatch.setenv("TRAINER_EXIT", "6")
    arguments = [*overrides, "rollout.urls=[http://127.0.0.1:9]"]
    assert local.launch(None, arguments, load_config(None, arguments), 2) == 6
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"rank{rank}").read_text())
        assert seen["argv"][: len(arguments)] == arguments
        assert f'model.path="{tmp_path / "model"}"' in seen["argv"]
        assert seen["env"]["RANK"] == str(rank)
        assert "MAPO_API_KEY" not in seen["env"]
    assert not list((tmp_path / "runs" / "run" / "logs").iterdir())


def test_a_server_that_cannot_start_is_the_error(overrides: list[str], tmp_path: Path) -> None:
    """A real server process, which sglang ends because of its arguments; no trainer is started."""
    arguments = [*overrides, "rollout.server.port=0", "rollout.server.extra_args=[--no-such-option]"]
    with pytest.raises(RolloutError, match="no-such-option"):
        local.launch(None, arguments, load_config(None, arguments), 1)
    assert not (tmp_path / "runs" / "run" / "config.yaml").exists()


def test_mistakes_are_found_before_anything_starts(overrides: list[str], tmp_path: Path) -> None:
    wrong_layout = [*overrides, "actor.parallel.tensor=2"]
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        local.launch(None, wrong_layout, load_config(None, wrong_layout), 3)
    wrong_model = [*overrides, f"model.path={tmp_path}"]
    with pytest.raises(DataError, match=r"model\.path"):
        local.launch(None, wrong_model, load_config(None, wrong_model), 1)
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_made_names_the_key(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = [*overrides, f"run.output_dir={tmp_path / 'file'}"]
    with pytest.raises(ConfigError, match=r"run\.output_dir"):
        local.launch(None, arguments, load_config(None, arguments), 1)
