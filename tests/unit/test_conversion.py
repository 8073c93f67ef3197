"""``import``, ``export`` and ``check`` as a user calls them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from megatron_mapo.cli import main
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


@pytest.fixture(scope="module")
def imported(model: Path) -> Path:
    out = model.parent / "imported"
    done = run("import", model, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    return out


def test_an_imported_model_is_exported_in_another_type_and_several_files(
    model: Path, imported: Path, tmp_path: Path
) -> None:
    assert not list(imported.glob("*.safetensors")), "the Megatron checkpoint holds the weights"
    out = tmp_path / "out"
    done = run("export", imported, out, "--dtype", "float32", "--shard-gb", "0.0002")
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors.index.json").is_file()
    found = {n: v for file in out.glob("*.safetensors") for n, v in load_file(file).items()}
    source = load_file(model / "model.safetensors")
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in source.items())


@pytest.mark.parametrize("part", [".", "megatron"])
def test_inspect_of_an_imported_model(
    part: str, model: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(imported / part), "--verify"]) == 0
    said = capsys.readouterr().out.splitlines()
    count = len(list((imported / "megatron").iterdir())) - 1
    size = sum(value.nbytes for value in load_file(model / "model.safetensors").values()) / 2**20
    assert said[0].startswith("checkpoint: imported model, ")
    assert said[0].endswith(f"{imported}/megatron")
    assert f"  model      gemma2, bfloat16, {model}" in said
    assert any(line.startswith("  layout     1 rank: tensor 1 x pipeline 1") for line in said)
    assert f"  integrity  sizes and checksums of {count} files as they were written" in said
    assert f"  sizes      weights {size:.1f} MiB" in said
    assert not any(line.startswith("  config") for line in said)

    # One that an earlier version wrote.
    shutil.copytree(imported, tmp_path / "imported")
    (tmp_path / "imported/megatron/manifest.json").unlink()
    assert main(["inspect", str(tmp_path / "imported" / part), "--verify"]) == 0
    assert "integrity  not known: no manifest" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["common.pt", "__0_0.distcp"])
def test_a_damaged_imported_model_is_not_exported(
    name: str, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(imported, tmp_path / "imported")
    file = tmp_path / "imported/megatron" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for arguments in (["inspect", "--verify"], ["export", str(tmp_path / "out")]):
        assert main([arguments[0], str(tmp_path / "imported"), *arguments[1:]]) == CheckpointError.exit_code
        assert f"{file} is damaged: its checksum is not the one that was written. Import the model again" in " ".join(
            capsys.readouterr().err.split()
        )
    assert not (tmp_path / "out").exists()


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
    assert config.model.path == str(model)
    assert f"taking {model}" in capsys.readouterr().err
