"""Whole runs of ``launch local`` and ``launch ray``, looked at from outside while they run and afterwards."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

KEY = "key-of-this-job-0c5f1e"
TOKEN = "hf_tokenOfThisUser7Qx"


class Seen:
    """What every process of the run shows to other users of the machine."""

    def __init__(self) -> None:
        self.command_lines: set[str] = set()
        self.names: dict[int, set[str]] = {}  # all of each process: sglang's workers change theirs
        self.listening: set[tuple[str, int]] = set()
        self.niceness: dict[int, int] = {}

    def look(self, process: psutil.Process) -> None:
        for one in [process, *process.children(recursive=True)]:
            try:
                command = " ".join(one.cmdline())
                self.command_lines.add(command)
                self.names.setdefault(one.pid, set()).add(command)
                self.niceness[one.pid] = one.nice()
                for connection in one.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.listening.add((connection.laddr.ip.removeprefix("::ffff:"), one.pid))
            except psutil.NoSuchProcess:  # it ended while we looked
                continue


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def launched(workspace: Path, request: pytest.FixtureRequest) -> tuple[Seen, Path, str]:
    """What was seen during a run of one step, the run's folder, and what the run printed."""
    where, name = request.param, f"secrets-{request.param}"
    if where == "ray":
        pytest.importorskip("ray")
    command = [sys.executable, "-m", "megatron_mapo", "launch", where, "--config", str(workspace / "config.yaml")]
    command += [f"run.name={name}", "trainer.steps=1", "trainer.evaluation.at_start=false", "trainer.export=true"]
    environment = {**os.environ, "MAPO_API_KEY": KEY, "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    seen, printed = Seen(), workspace / f"printed-{where}"
    with printed.open("wb") as output:
        run = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, umask=0o027)
        try:
            deadline = time.monotonic() + 280
            while run.poll() is None:
                assert time.monotonic() < deadline, printed.read_text()
                seen.look(psutil.Process(run.pid))
                time.sleep(0.1)
        finally:
            run.terminate()  # the launcher ends its servers and trainers
            run.wait()
    assert run.returncode == 0, printed.read_text()
    return seen, workspace / "runs" / name, printed.read_text()


def test_no_command_line_shows_a_secret(launched: tuple[Seen, Path, str]) -> None:
    lines = launched[0].command_lines
    for program in ("rollout.server_main --serve", "megatron_mapo.train", "launch.keeper"):
        assert any(program in line for line in lines), lines
    assert not [line for line in lines if KEY in line or TOKEN in line]


def test_nothing_written_or_printed_holds_a_secret(launched: tuple[Seen, Path, str]) -> None:
    _, folder, printed = launched
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert names >= {"config.yaml", "metrics.jsonl", "samples.jsonl"}
    assert any(name.startswith("server-") and name.endswith(".log") for name in names)
    for secret in (KEY.encode(), TOKEN.encode()):
        assert secret not in printed.encode()
        assert not [file for file in files if secret in file.read_bytes()]


def test_files_get_the_permissions_that_the_user_asks_for(launched: tuple[Seen, Path, str]) -> None:
    """The user's umask takes everything from others here. Weights on their way to servers are for other users too."""
    folder = launched[1]
    for path in [folder, *folder.rglob("*")]:
        if (folder / "weights") in path.parents:
            continue
        assert not path.stat().st_mode & stat.S_IRWXO, path


def test_nothing_of_ours_listens_beyond_this_machine(launched: tuple[Seen, Path, str]) -> None:
    """sglang's scheduler opens a store of torch's own for its group of one rank (docs/security.md)."""
    seen = launched[0]
    local = {name for ip, pid in seen.listening if ip in ("127.0.0.1", "::1") for name in seen.names[pid]}
    beyond = [seen.names[pid] for ip, pid in seen.listening if ip not in ("127.0.0.1", "::1")]
    assert any("server_main" in name for name in local)
    assert any("megatron_mapo.train" in name for name in local)
    assert not [names for names in beyond if not any(name.startswith("sglang::scheduler") for name in names)]


def test_trainers_and_servers_have_the_priority_of_the_command(launched: tuple[Seen, Path, str]) -> None:
    """Ray's own workers make way for everything else on the machine."""
    seen = launched[0]
    ours = [pid for pid, names in seen.names.items() if any("server_main" in n or "apo.train" in n for n in names)]
    assert ours
    assert {seen.niceness[pid] for pid in ours} == {os.nice(0)}
