"""Every check of ``megatron-mapo doctor`` on this machine, and every failure brought about for real."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from megatron_mapo import cli
from megatron_mapo.config import Config, ModelConfig, load_config
from megatron_mapo.doctor import all_reduce, network, run_needs, server, storage, versions
from megatron_mapo.doctor.finding import Finding, Status
from megatron_mapo.patches import megatron_bridge

QUICK = ["doctor", "--quick", "--json", "rollout.server.port=0"]


def only(findings, name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def assert_fails(finding: Finding, *parts: str) -> None:
    assert finding.status is Status.fails
    assert finding.fix
    for part in parts:
        assert part in finding.detail


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def overrides(model: Path, tmp_path: Path) -> list[str]:
    """A whole run that this machine can do."""
    data = tmp_path / "train.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n')
    runs = tmp_path / "not" / "yet" / "there"
    return [f"model.path={model}", f"data.train={data}", f"run.output_dir={runs}", "model.dtype=float32"]


def needs(*overrides: str, processes: int | None = None) -> list[Finding]:
    return list(run_needs.check(load_config(None, overrides), processes))


class TestCommand:
    def test_this_machine_can_do_a_run(self, overrides: list[str], tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_mapo", *QUICK, *overrides], capture_output=True, text=True, timeout=280
        )
        report = json.loads(done.stdout)
        assert report["ok"], report
        assert done.returncode == 0
        names = {check["name"] for check in report["checks"]}
        assert names >= {"python", "torch", "megatron-core", "sglang", "transformers", "megatron-mapo"}
        assert names >= {"patch megatron_core", "patch sglang_cpu", "processor", "memory", "disk", "Slurm"}
        patches = {check["name"]: check["detail"] for check in report["checks"] if check["name"].startswith("patch ")}
        assert patches["patch megatron_core"].startswith("applied to")
        assert patches["patch sglang_cpu"].startswith(("fits", "not needed"))
        assert names >= {"layout", "model.path", "data.train", "reward.name", "all-reduce (gloo)"}
        assert "server" not in names
        assert not (tmp_path / "not").exists(), "looking leaves nothing behind"

    def test_a_failure_is_a_line_with_its_mending_and_exit_code_1(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
        assert cli.main(["doctor", "--quick", "rollout.server.port=0", "run.output_dir=/proc"]) == 1
        lines = capsys.readouterr().out.splitlines()
        at = [i for i, line in enumerate(lines) if line.startswith("fails   all-reduce (gloo)")]
        assert len(at) == 1
        assert "no-such-interface" in lines[at[0]]
        assert "-> unset GLOO_SOCKET_IFNAME" in lines[at[0] + 1]
        assert any(line.startswith("fails   run.output_dir") for line in lines)
        assert lines[-1].endswith("2 fails")

    def test_a_mistake_in_the_configuration_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*QUICK, "rollout.server.prot=1"]) == 2
        assert "rollout.server.port" in capsys.readouterr().err


class TestVersions:
    """Versions cannot be produced without installing them, so their lookup is replaced here."""

    @staticmethod
    def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
        real = metadata.version

        def found(asked: str) -> str:
            if asked != name:
                return real(asked)
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", found)

    def test_a_wrong_version_and_its_patch_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, "megatron-core", "0.17.0")
        assert_fails(only(versions.check(), "megatron-core"), "0.17.0", "==0.16.1")
        assert_fails(only(versions.check_patches(), "patch megatron_core"), "refused", "0.17.0")

    def test_a_patch_that_cannot_be_applied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "_PATCHED", {"megatron_core": "raise ImportError('another megatron')"})
        assert_fails(only(versions.check_patches(), "patch megatron_core"), "cannot be applied", "another megatron")

    def test_megatron_bridge_is_optional(self, monkeypatch: pytest.MonkeyPatch) -> None:
        finding = only(versions.check_patches(), "patch megatron_bridge")
        assert (finding.status, finding.detail) == (Status.ok, f"applied to {megatron_bridge.SUPPORTED}")
        monkeypatch.setattr(versions, "_PATCHED", {})  # it is not about those
        for version in ("0.2.0", None):
            self.pretend(monkeypatch, "megatron-bridge", version)
            finding = only(versions.check_patches(), "patch megatron_bridge")
            assert (finding.status, finding.detail) == (Status.ok, "not needed here")

    def test_a_package_that_is_not_shown_appears_when_it_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "xxhash" not in {finding.name for finding in versions.check()}
        self.pretend(monkeypatch, "xxhash", None)
        finding = only(versions.check(), "xxhash")
        assert_fails(finding, "not installed")
        assert finding.fix.startswith("pip install 'xxhash")

    def test_without_sglang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, "sglang", None)
        monkeypatch.setattr(versions, "_PATCHED", {})  # it is not about that one
        assert_fails(only(versions.check(), "sglang"), "not installed")
        assert_fails(only(versions.check_patches(), "patch sglang_cpu"), "refused")

    def test_a_trainer_environment_on_cuda_needs_no_sglang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron_mapo.hardware.has_accelerator", lambda: True)
        self.pretend(monkeypatch, "sglang", None)
        assert only(versions.check(), "sglang").status is Status.warning
        self.pretend(monkeypatch, "sglang", "0.5.23")
        self.pretend(monkeypatch, "megatron-core", None)
        assert only(versions.check(), "megatron-core").status is Status.warning


class TestStorage:
    def test_a_folder_that_cannot_be_written_to(self) -> None:
        (finding,) = storage.check(load_config(None, ["model.path=m", "data.train=d", "run.output_dir=/proc/runs"]))
        assert_fails(finding, "cannot write to /proc")

    def test_a_disk_that_takes_no_more(self, tmp_path: Path) -> None:
        """The limit on the size of a file is the kernel's; the write fails as on a full disk."""
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "from megatron_mapo.config import Config, RunConfig\n"
            "from megatron_mapo.doctor.storage import check\n"
            f"print(*check(Config(run=RunConfig(output_dir={str(tmp_path)!r}))))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert "Status.fails" in done.stdout, done.stderr
        assert "File too large" in done.stdout
        assert list(tmp_path.iterdir()) == []

    def test_several_nodes_and_a_local_disk(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        config = load_config(None, ["model.path=m", "data.train=d", f"run.output_dir={tmp_path}"])
        monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
        alone = only(storage.check(config), "shared filesystem")
        assert alone.status is Status.ok
        assert storage.filesystem(tmp_path) in alone.detail
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
        if storage.filesystem(tmp_path).startswith("nfs"):
            pytest.skip("temporary files are on a shared filesystem here")
        assert only(storage.check(config), "shared filesystem").status is Status.warning


class TestNetwork:
    def test_a_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            config = load_config(None, ["model.path=m", "data.train=d", f"rollout.server.port={port}"])
            assert_fails(only(network.check(config), "rollout.server.port"), f"port {port}", "in use")
        assert only(network.check(config), "rollout.server.port").status is Status.ok

    def test_an_address_of_another_machine(self) -> None:
        config = load_config(None, ["model.path=m", "data.train=d", "rollout.server.host=192.0.2.1"])
        assert_fails(only(network.check(config), "rollout.server.port"))

    def test_the_network_without_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MAPO_API_KEY", raising=False)
        overrides = ["model.path=m", "data.train=d", "rollout.server.host=0.0.0.0", "rollout.server.port=0"]
        assert_fails(only(network.check(load_config(None, overrides)), "API key"), "0.0.0.0")

    def test_a_key_file_that_others_can_read(self, tmp_path: Path) -> None:
        file = tmp_path / "key"
        file.write_text("secret")
        file.chmod(0o644)
        overrides = ["model.path=m", "data.train=d", f"rollout.api_key_file={file}"]
        assert_fails(only(network.check(load_config(None, overrides)), "rollout.api_key_file"), "chmod 600")

    def test_servers_that_are_not_there(self) -> None:
        config = load_config(None, ["model.path=m", "data.train=d", "rollout.urls=[http://127.0.0.1:9]"])
        assert_fails(only(network.check(config), "rollout.urls"), "http://127.0.0.1:9 does not answer")

    def test_servers_of_a_file_are_asked_and_none_is_to_be_started(self, tmp_path: Path) -> None:
        file = tmp_path / "servers"
        file.write_text("http://127.0.0.1:9\n")
        config = load_config(None, ["model.path=m", "data.train=d", f"rollout.urls_file={file}"])
        found = list(network.check(config))
        assert_fails(only(found, "rollout.urls_file"), "http://127.0.0.1:9 does not answer")
        assert "rollout.server.port" not in {finding.name for finding in found}
        file.write_text("here\n")
        assert_fails(only(network.check(config), "rollout.urls_file"), "'here'")

    def test_no_slurm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nonexistent")
        assert only(network.check(Config()), "Slurm") == Finding(
            "Slurm", Status.ok, "not installed; only `sbatch` scripts need it"
        )

    @pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs slurm-client")
    def test_slurm_without_its_controller(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        conf = tmp_path / "slurm.conf"
        conf.write_text("ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nAuthType=auth/none\n")
        monkeypatch.setenv("SLURM_CONF", str(conf))
        assert only(network.check(Config()), "Slurm").status is Status.warning


class TestNeeds:
    def test_a_verifier_that_does_not_exist(self, overrides: list[str]) -> None:
        assert_fails(only(needs(*overrides, "reward.name=nobody"), "reward.name"), "nobody")

    def test_a_layout_that_does_not_fit(self, overrides: list[str]) -> None:
        found = needs(*overrides, "actor.parallel.tensor=2", processes=3)
        assert_fails(only(found, "layout, model, data"), "does not divide the 3 ranks")

    def test_data_that_is_not_there(self, overrides: list[str]) -> None:
        found = needs(*overrides, "data.train=missing.jsonl")
        assert_fails(only(found, "layout, model, data"), "data.train", "missing.jsonl")

    def test_a_row_without_its_column(self, overrides: list[str]) -> None:
        assert_fails(only(needs(*overrides, "data.prompt_key=problem"), "data.train"), "problem")

    def test_weights_that_are_damaged(self, overrides: list[str], model: Path, tmp_path: Path) -> None:
        damaged = shutil.copytree(model, tmp_path / "damaged")
        (damaged / "model.safetensors").write_bytes(b"\xff" * 64)
        assert_fails(only(needs(*overrides, f"model.path={damaged}"), "model.path"))

    def test_a_model_that_is_too_large_for_disk_and_memory(
        self, overrides: list[str], model: Path, tmp_path: Path
    ) -> None:
        large = shutil.copytree(model, tmp_path / "large")
        shape = json.loads((large / "config.json").read_text())
        shape |= {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 1000}
        (large / "config.json").write_text(json.dumps(shape))
        found = needs(*overrides, f"model.path={large}")
        assert_fails(only(found, "disk of the run"), "checkpoints take about")
        assert_fails(only(found, "memory of the run"), "are free")

    def test_memory_is_for_servers_that_are_started_here(self, overrides: list[str], tmp_path: Path) -> None:
        file = tmp_path / "servers"
        file.write_text("http://127.0.0.1:9\n")
        many = [*overrides, "rollout.server.count=1000000", "rollout.server.port=0"]
        assert only(needs(*many), "memory of the run").status is Status.fails
        assert only(needs(*many, f"rollout.urls_file={file}"), "memory of the run").status is Status.ok

    def test_a_family_that_somebody_translates(
        self, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = [*overrides, f"model.path={make_tiny_model(tmp_path / 'gemma', 'gemma')}"]
        assert_fails(only(needs(*settings), "layout, model, data"), "model.fallback=megatron_bridge")
        settings.append("model.fallback=megatron_bridge")
        assert only(needs(*settings), "model.fallback").status is Status.ok
        monkeypatch.setattr(megatron_bridge, "SUPPORTED", "9")
        assert_fails(only(needs(*settings), "model.fallback"), "fits 9 only")

    def test_a_model_that_the_servers_would_compute_otherwise(self, overrides: list[str], tmp_path: Path) -> None:
        windowed = make_tiny_model(tmp_path / "mistral", "mistral")
        assert_fails(only(needs(*overrides, f"model.path={windowed}"), "model.path"), "window")


def test_the_sum_is_checked_over_every_rank() -> None:
    """Three ranks: 1 + 2 + 3."""
    assert all_reduce._reduce(Config(), "gloo", 3).status is Status.ok


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    """Too short a time to start in."""
    config = Config(model=ModelConfig())
    config.rollout.server.startup_timeout = 0.1
    assert_fails(only(server.check(config), "server"), "startup_timeout")


@pytest.mark.slow
def test_a_token_comes_back_from_a_real_server() -> None:
    finding = only(server.check(Config()), "server")
    assert finding.status is Status.ok
    assert "one token" in finding.detail
