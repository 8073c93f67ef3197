"""The command line as a user sees it: separate processes, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import xxhash
from tiny_models import make_tiny_model

from megatron_mapo import __version__, checkpoint_files
from megatron_mapo.checkpoint_files import Manifest, Measure
from megatron_mapo.config import describe_options
from megatron_mapo.errors import CheckpointError, ConfigError, DataError
from megatron_mapo.launch.run_folder import Checkpoint, describe_checkpoint, list_checkpoints


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    return subprocess.run(
        [sys.executable, "-m", "megatron_mapo", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
    )


def assert_fails(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """One line ``error: ...`` on standard error, that code, no traceback, nothing on standard output."""
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
    assert result.stdout == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a data file and a configuration."""
    path = tmp_path_factory.mktemp("project")
    make_tiny_model(path / "model", "qwen3")
    (path / "train.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (path / "run.yaml").write_text(
        "run: {name: tiny}\nmodel: {path: model}\ndata: {train: train.jsonl}\n"
        "rollout: {prompts_per_step: 2, responses_per_prompt: 4, max_prompt_tokens: 32, max_response_tokens: 16}\n"
    )
    return path


class TestHelp:
    def test_lists_the_commands(self) -> None:
        result = run("--help")
        assert result.returncode == 0
        commands = (
            "train",
            "serve",
            "launch",
            "export",
            "import",
            "check",
            "eval",
            "inspect",
            "plot",
            "reward-check",
            "report",
            "compare",
            "doctor",
            "options",
        )
        for command in commands:
            assert re.search(rf"\n    {command}\s", result.stdout)

    @pytest.mark.parametrize("command", [["train"], ["launch", "local"], ["launch", "ray"], ["serve"], ["eval"]])
    def test_of_a_run_lists_every_option(self, command: list[str]) -> None:
        result = run(*command, "--help")
        assert result.returncode == 0
        assert "--config FILE" in result.stdout
        for option in describe_options():
            section, _, name = option.key.rpartition(".")
            assert section in result.stdout
            assert name in result.stdout
            assert option.doc.split()[0] in result.stdout

    def test_options_of_one_section(self) -> None:
        result = run("options", "actor.adv_norm")
        assert result.returncode == 0
        assert "aggregation_mode" in result.stdout
        assert "max_response_tokens" not in result.stdout

    def test_a_reader_that_leaves_is_no_error(self) -> None:
        command = f"{sys.executable} -m megatron_mapo options | head -1"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
        assert result.stdout
        assert result.stderr == ""

    def test_version(self) -> None:
        assert run("--version").stdout.strip() == f"megatron-mapo {__version__}"

    def test_does_not_import_torch(self) -> None:
        code = (
            "import sys\nfrom megatron_mapo.cli import main\n"
            "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300).returncode == 0


class TestErrors:
    def test_unknown_key(self, folder: Path) -> None:
        result = run("train", "--config", "run.yaml", "trainer.stps=3", cwd=folder)
        assert_fails(result, ConfigError.exit_code, "trainer.stps", "did you mean trainer.steps?")

    def test_launch_checks_the_configuration_before_anything_else(self, folder: Path) -> None:
        result = run("launch", "local", "--config", "run.yaml", "rollout.responses_per_prompt=1", cwd=folder)
        assert_fails(result, ConfigError.exit_code, "rollout.responses_per_prompt")
        assert not (folder / "runs").exists()

    def test_missing_file(self, folder: Path) -> None:
        assert_fails(run("serve", "--config", "nowhere.yaml", cwd=folder), ConfigError.exit_code, "nowhere.yaml")

    def test_missing_model(self, folder: Path) -> None:
        result = run("launch", "local", "--config", "run.yaml", "model.path=./nowhere", "--dry-run", cwd=folder)
        assert_fails(result, DataError.exit_code, "model.path", "nowhere")

    def test_unknown_section(self) -> None:
        assert_fails(run("options", "actr"), ConfigError.exit_code, "actr", "actor.adv_norm")

    @pytest.mark.parametrize("arguments", [["trian"], ["launch"], ["train", "--bogus"], ["inspect"], []])
    def test_usage(self, arguments: list[str]) -> None:
        result = run(*arguments)
        assert result.returncode == 2
        assert "usage: megatron-mapo" in result.stderr
        assert "Traceback" not in result.stderr

    def test_a_bug_keeps_its_traceback(self) -> None:
        code = (
            "import megatron_mapo.config, megatron_mapo.cli\n"
            "def broken(section=None):\n    raise ZeroDivisionError('a bug')\n"
            "megatron_mapo.config.options_tables = broken\nmegatron_mapo.cli.main(['options'])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert "Traceback" in result.stderr
        assert "ZeroDivisionError: a bug" in result.stderr


class TestDryRun:
    def test_of_launch_prints_the_plan_and_starts_nothing(self, folder: Path) -> None:
        result = run(
            *("launch", "local", "--config", "run.yaml", "trainer.steps=7"),
            *("--nproc", "4", "actor.parallel.tensor=2", "--dry-run", "rollout.server.count=2"),
            cwd=folder,
        )
        assert result.returncode == 0, result.stderr
        for part in (
            "runs/tiny (from the beginning)",
            "4 ranks = tensor 2 x pipeline 1 x context 1 x data 2",
            "7 steps",
            "2 prompts x 4 responses = 8 sequences",
            "at most 128 generated tokens",
            "at most 192 packed tokens",
            "http://127.0.0.1:30000, http://127.0.0.1:30001",
            "memory per rank",
        ):
            assert part in result.stdout
        assert not (folder / "runs").exists()

    def test_with_given_servers_says_that_none_is_started(self, folder: Path) -> None:
        arguments = ("train", "--dry-run", "--config", "run.yaml", "rollout.urls=[http://gpu:30000]")
        result = run(*arguments, cwd=folder)
        assert result.returncode == 0, result.stderr
        assert "none is started; in use: http://gpu:30000" in result.stdout
        assert "1 ranks" in result.stdout

    def test_refuses_a_layout_that_does_not_fit(self, folder: Path) -> None:
        arguments = ("launch", "local", "--config", "run.yaml", "--dry-run", "--nproc", "3", "actor.parallel.tensor=2")
        assert_fails(run(*arguments, cwd=folder), ConfigError.exit_code, "does not divide the 3 ranks")


class TestRunFolder:
    def test_inspect(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("run:\n  name: tiny\n")
        rows = [{"step": 1, "reward/mean": 0.25}, {"step": 2, "reward/mean": 0.5, "loss/total": -0.125}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "re')
        saved = tmp_path / "checkpoints" / "step_000002"
        saved.mkdir(parents=True)
        (saved / "weights").write_bytes(bytes(3 << 20))
        (tmp_path / "checkpoints" / "step_000003.partial").mkdir()
        result = run("inspect", str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert "name: tiny" in result.stdout
        assert "last step: 2" in result.stdout
        assert f"checkpoint: step 2, 3.0 MiB, {saved}" in result.stdout
        assert "step_000003" not in result.stdout
        table = [line.split() for line in result.stdout.splitlines()]
        assert ["reward/mean", "0.5", "2"] in table
        assert ["loss/total", "-0.125", "2"] in table

    @staticmethod
    def save_checkpoint(run_dir: Path, step: int) -> Path:
        """A complete checkpoint with little in it, and the run's ``config.yaml``."""
        text = "run:\n  name: tiny\n"
        run_dir.mkdir(exist_ok=True)
        (run_dir / "config.yaml").write_text(text)
        partial = checkpoint_files.partial_folder(run_dir / "checkpoints", step)
        partial.mkdir(parents=True)
        (partial / "__0_0.distcp").write_bytes(bytes(3 << 20))
        manifest = Manifest(
            step=step,
            created="2025-01-02T03:04:05+00:00",
            layout={"world_size": 4, "tensor": 2, "pipeline": 1, "data": 2},
            model={"type": "qwen3", "dtype": "bfloat16", "path": "models/q"},
            versions={"megatron-mapo": "0.1.0", "torch": "2.13.0"},
            config_hash=xxhash.xxh3_128_hexdigest(text.encode()),
            score=0.625,
            measure=Measure("pass_at_1", 8, "0123456789abcdef"),
            parts={"weights": 1 << 20, "optimizer": 2 << 20, "other": 0},
            files={"__0_0.distcp": checkpoint_files.hash_file(partial / "__0_0.distcp")},
        )
        checkpoint_files.write_manifest(partial, manifest)
        return checkpoint_files.publish(partial)

    @pytest.mark.parametrize("single", [True, False])
    def test_inspect_shows_what_a_checkpoint_holds(self, tmp_path: Path, single: bool) -> None:
        path = self.save_checkpoint(tmp_path / "tiny", 7)
        result = run("inspect", str(path if single else tmp_path / "tiny"), "--verify")
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        for line in (
            f"checkpoint: step 7, 3.0 MiB, {path} (latest)",
            "  layout     4 ranks: tensor 2 x pipeline 1 x data 2",
            "  model      qwen3, bfloat16, models/q",
            "  sizes      weights 1.0 MiB, optimizer 2.0 MiB, other 0.0 MiB",
            "  written    2025-01-02T03:04:05+00:00 by megatron-mapo 0.1.0, torch 2.13.0",
            "  score      0.625 (pass_at_1 of 8 samples on the data 0123456789)",
            "  integrity  sizes and checksums of 1 files as they were written",
        ):
            assert line in lines
        assert any(line.startswith("  config     ") and "(as config.yaml is now)" in line for line in lines)
        assert ("name: tiny" in result.stdout) is not single

    def test_inspect_shows_a_checkpoints_configuration(self, tmp_path: Path) -> None:
        path = self.save_checkpoint(tmp_path, 7)
        (path / "config.yaml").write_text("run:\n  name: as-it-was\n")
        result = run("inspect", str(path))
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("run:\n  name: as-it-was\n")
        assert "as-it-was" not in run("inspect", str(tmp_path)).stdout

    def test_inspect_of_a_run_that_removes_checkpoints_meanwhile(self, tmp_path: Path) -> None:
        kept = self.save_checkpoint(tmp_path, 7)
        gone, stop = [], threading.Event()

        def save_and_remove() -> None:
            while not stop.is_set():
                path = tmp_path / "checkpoints" / f"step_{8 + len(gone):06d}"
                shutil.copytree(kept, path.with_suffix(".partial"))
                checkpoint_files.publish(path.with_suffix(".partial"))
                checkpoint_files.remove(path)
                gone.append(path)

        thread = threading.Thread(target=save_and_remove)
        thread.start()
        try:
            while len(gone) < 100:
                for checkpoint in list_checkpoints(tmp_path):
                    lines, problem = describe_checkpoint(checkpoint, checksums=True)
                    assert problem is None, lines
        finally:
            stop.set()
            thread.join()
        lines, problem = describe_checkpoint(Checkpoint(8, gone[0], 0), checksums=False)
        assert (lines[1:], problem) == (["  integrity  not known: its run has removed it meanwhile"], None)

    def test_inspect_finds_damage(self, tmp_path: Path) -> None:
        self.save_checkpoint(tmp_path, 7)
        path = self.save_checkpoint(tmp_path, 8)
        (path / "__0_0.distcp").write_bytes(b"\1" + bytes((3 << 20) - 1))
        (tmp_path / "config.yaml").write_text("run:\n  name: other\n")
        result = run("inspect", str(tmp_path))
        assert result.returncode == 0, "sizes are right"
        assert "(not as config.yaml is now)" in result.stdout
        result = run("inspect", str(tmp_path), "--verify")
        assert result.returncode == CheckpointError.exit_code
        assert result.stdout.count("as they were written") == 1
        assert "DAMAGED" in result.stdout
        assert f"{path}/__0_0.distcp is damaged" in result.stderr

    def test_inspect_does_not_import_torch(self, tmp_path: Path) -> None:
        path = self.save_checkpoint(tmp_path, 7)
        code = f"import sys; from megatron_mapo.cli import main; main(['inspect', {str(path)!r}, '--verify'])"
        code += "; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert done.stdout.splitlines()[-1] == "False", done.stderr

    def test_inspect_of_a_run_that_has_just_begun(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("run:\n  name: tiny\n")
        result = run("inspect", str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert "last step: none yet" in result.stdout
        assert "checkpoints: none" in result.stdout

    def test_inspect_of_something_else(self, tmp_path: Path) -> None:
        assert_fails(run("inspect", str(tmp_path)), DataError.exit_code, "config.yaml")

    def test_inspect_names_a_damaged_line(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("run:\n  name: tiny\n")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
        assert_fails(run("inspect", str(tmp_path)), DataError.exit_code, "metrics.jsonl, line 2")

    def test_plot(self, tmp_path: Path) -> None:
        rows = [{"step": step, "reward/mean": 0.1 * step} for step in (1, 2, 3)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = run("plot", str(tmp_path))
        assert result.returncode == 0, result.stderr
        picture = Path(result.stdout.strip())
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_export_never_replaces_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").mkdir()
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").write_text("keep me")
        assert_fails(run("export", str(tmp_path), str(precious)), ConfigError.exit_code, "precious exists")
        assert (precious / "file").read_text() == "keep me"

    def test_export_without_checkpoints(self, tmp_path: Path) -> None:
        result = run("export", str(tmp_path), str(tmp_path / "out"))
        assert_fails(result, CheckpointError.exit_code, "no checkpoints")


def test_serve_ends_its_servers_on_sigterm(folder: Path) -> None:
    """A real server process that is still starting when the signal comes."""
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_mapo", "serve", "--config", "run.yaml", "rollout.server.port=0"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as serve:
        deadline = time.monotonic() + 120
        while not (keepers := _children(serve.pid)):
            assert time.monotonic() < deadline, "no server was started"
            assert serve.poll() is None
            time.sleep(0.05)
        serve.send_signal(signal.SIGTERM)
        _, errors = serve.communicate(timeout=120)
    assert serve.returncode == 0, errors
    assert "servers ended" in errors
    # A signal in the middle of a start leaves the server to its keeper, which ends with its parent.
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in keepers):
        assert time.monotonic() < deadline, f"still there: {keepers}"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
