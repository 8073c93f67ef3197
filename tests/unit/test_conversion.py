"""``import``, ``export`` and ``check`` as a user calls them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from megatron_mapo.config import load_config, to_yaml
from megatron_mapo.errors import CheckpointError, ConfigError, DataError
from megatron_mapo.export import _find_model


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    command = [sys.executable, "-m", "megatron_mapo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "source", "gemma2", torch.bfloat16, vocab=509)


def test_an_imported_model_is_exported_in_another_type_and_several_files(model: Path, tmp_path: Path) -> None:
    imported = run("import", model, tmp_path / "imported")
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout == f"{tmp_path / 'imported'}\n"
    assert not list((tmp_path / "imported").glob("*.safetensors")), "the Megatron checkpoint holds the weights"
    out = tmp_path / "out"
    done = run("export", tmp_path / "imported", out, "--dtype", "float32", "--shard-gb", "0.0002")
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors.index.json").is_file()
    found = {n: v for file in out.glob("*.safetensors") for n, v in load_file(file).items()}
    source = load_file(model / "model.safetensors")
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in source.items())


def test_check_measures_the_difference(model: Path) -> None:
    done = run("check", model, "--length", "64")
    assert done.returncode == 0, done.stderr
    lines = [
        re.match(r"(\d+) tokens: .* at most (\S+), on average (\S+) nat", text) for text in done.stdout.splitlines()
    ]
    assert [int(line[1]) for line in lines if line] == [64, 32, 16, 8]
    assert all(0 < float(line[3]) < float(line[2]) < 1e-4 for line in lines if line)


def test_check_fails_above_the_bound_and_names_a_window_that_it_cannot_see(model: Path) -> None:
    done = run("check", model, "--length", "16", "--bound", "1e-9")
    assert done.returncode == DataError.exit_code
    assert "more than --bound 1e-09" in done.stderr
    assert "the sliding window of 24 tokens is not exercised; --length 48" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["check", "{tmp}/nowhere"], DataError, "there is no folder"),
        (["import", "{tmp}/nowhere", "{tmp}/out"], DataError, "there is no folder"),
        (["import", "{model}", "{tmp}"], ConfigError, "exists; name a folder that does not"),
        (["export", "{tmp}", "{tmp}/out", "--private"], ConfigError, "--private belongs to --push-to-hub"),
        (["export", "{model}", "{tmp}/out"], CheckpointError, "the folder of a run or of an imported model"),
    ],
)
def test_mistakes(arguments: list[str], error: type, message: str, model: Path, tmp_path: Path) -> None:
    done = run(*(text.format(tmp=tmp_path, model=model) for text in arguments))
    assert done.returncode == error.exit_code
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_has_been_moved_is_found_where_the_last_start_found_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [f"model.path={tmp_path}/gone", "data.train=d"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(DataError, match=r"there is no folder .*/gone"):
        _find_model(config, tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(None, [f"model.path={model}", "data.train=d"])))
    assert _find_model(config, tmp_path) == model
    assert f"taking {model}" in capsys.readouterr().err
