"""The supervisor with real processes: exit codes pass through, and nothing outlives the launcher."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mapo.errors import RolloutError
from megatron_mapo.launch.processes import Kept, Stopped, save_request, stop_signals, supervise

WAIT = 60.0

# A command with a child of its own that has left its session, as daemons do. Writes both process ids.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""

LAUNCHER = """
import sys
from megatron_mapo.launch.processes import Kept, Stopped, stop_signals, supervise
try:
    with stop_signals(), Kept([sys.executable, "-c", sys.argv[1], sys.argv[2]]) as child:
        print(child.pid, flush=True)
        supervise([child], lambda: None)
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def family_pids(path: Path) -> list[int]:
    wait_until(path.exists, "the command did not start")
    return [int(pid) for pid in path.read_text().split()]


def no_check() -> None:
    return None


class TestExitCode:
    @pytest.mark.parametrize("code", [0, 7])
    def test_passes_through(self, code: int) -> None:
        with Kept(python(f"raise SystemExit({code})")) as child:
            assert supervise([child], no_check) == code

    def test_of_a_killed_command_is_128_and_the_signal(self) -> None:
        with Kept(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")) as child:
            assert supervise([child], no_check) == 128 + signal.SIGKILL

    def test_of_the_first_failure_among_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron_mapo.launch.processes.FAILURE_SECONDS", WAIT)
        with Kept(python("raise SystemExit(5)")) as bad, Kept(python("import time; time.sleep(2)")) as good:
            assert supervise([good, bad], no_check) == 5
            assert good.poll() == 0, "the others get time to end by themselves"

    def test_a_rank_that_hangs_after_a_failure_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("megatron_mapo.launch.processes.FAILURE_SECONDS", 0.5)
        with Kept(python(FAMILY, str(tmp_path / "pids"))) as hanging, Kept(python("raise SystemExit(5)")) as bad:
            pids = family_pids(tmp_path / "pids")
            assert supervise([hanging, bad], no_check) == 5
        assert not any(map(is_alive, pids))

    def test_environment_reaches_the_command(self) -> None:
        check = "import os; raise SystemExit(int(os.environ['GIVEN']))"
        with Kept(python(check), {**os.environ, "GIVEN": "9"}) as child:
            assert supervise([child], no_check) == 9


class TestTeardown:
    def test_leaving_the_context_ends_all_descendants(self, tmp_path: Path) -> None:
        with Kept(python(FAMILY, str(tmp_path / "pids"))):
            pids = family_pids(tmp_path / "pids")
            assert all(map(is_alive, pids))
        assert not any(map(is_alive, pids))

    def test_a_command_that_ends_leaves_no_descendant(self, tmp_path: Path) -> None:
        ending = FAMILY.replace("time.sleep(600)\n", "raise SystemExit(3)\n", 2)
        with Kept(python(ending, str(tmp_path / "pids"))) as child:
            assert supervise([child], no_check) == 3
            pids = family_pids(tmp_path / "pids")
            assert not any(map(is_alive, pids))

    def test_a_command_that_ignores_sigterm_is_killed(self, tmp_path: Path) -> None:
        stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + FAMILY
        with Kept(python(stubborn, str(tmp_path / "pids"))):
            pids = family_pids(tmp_path / "pids")
        assert not any(map(is_alive, pids))

    def test_a_lost_dependency_ends_the_command_and_is_the_error(self, tmp_path: Path) -> None:
        def server_died() -> None:
            raise RolloutError("the server ended")

        def launch() -> None:
            with Kept(python(FAMILY, str(tmp_path / "pids"))) as child:
                pids.extend(family_pids(tmp_path / "pids"))
                supervise([child], server_died)

        pids: list[int] = []
        with pytest.raises(RolloutError, match="the server ended"):
            launch()
        assert len(pids) == 2
        assert not any(map(is_alive, pids))

    def test_a_lost_dependency_is_the_error_when_the_command_failed_of_it(self) -> None:
        with Kept(python("raise SystemExit(5)")) as child:
            wait_until(lambda: child.poll() is not None, "the command did not end")

            def server_died() -> None:
                raise RolloutError("the server ended")

            with pytest.raises(RolloutError, match="the server ended"):
                supervise([child], server_died)

    def test_killing_the_keeper_ends_the_command(self, tmp_path: Path) -> None:
        with Kept(python(FAMILY, str(tmp_path / "pids"))) as child:
            command, _ = family_pids(tmp_path / "pids")
            os.kill(child.pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(command), "the command outlived its keeper")
            assert supervise([child], no_check) == 128 + signal.SIGKILL
        os.kill(family_pids(tmp_path / "pids")[1], signal.SIGKILL)  # a killed keeper cannot end the daemon


class TestSaveRequest:
    def test_is_kept_until_the_command_looks(self) -> None:
        """It comes before the keeper has even started the command, and neither is ended by it."""
        command = "import signal, sys; sys.exit(40 + signal.sigtimedwait({signal.SIGUSR1}, 60).si_signo)"
        with Kept(python(command)) as child:
            child.ask_to_save()
            assert supervise([child], no_check) == 40 + signal.SIGUSR1

    def test_of_a_command_that_has_ended_does_nothing(self) -> None:
        with Kept(python("raise SystemExit(3)")) as child:
            wait_until(lambda: child.poll() is not None, "the command did not end")
            child.ask_to_save()
            assert child.poll() == 3

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_is_the_first_signal_and_the_second_ends(self, number: signal.Signals) -> None:
        asked: list[int] = []

        class Trainer:
            def ask_to_save(self) -> None:
                asked.append(1)

        def end() -> None:
            with stop_signals(), save_request() as request:
                request.pass_on([Trainer()])
                assert not asked
                signal.raise_signal(number)
                request.pass_on([Trainer(), Trainer()])
                request.pass_on([Trainer()])
                assert len(asked) == 2
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Stopped, match="SIGTERM"):
            end()


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
    def test_to_the_launcher_ends_everything(self, number: signal.Signals, tmp_path: Path) -> None:
        arguments = python(LAUNCHER, FAMILY, str(tmp_path / "pids"))
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as launcher:
            assert launcher.stdout is not None
            keeper = int(launcher.stdout.readline())
            pids = [keeper, *family_pids(tmp_path / "pids")]
            launcher.send_signal(number)
            status = launcher.wait(timeout=WAIT)
        assert status == (-number if number is signal.SIGKILL else 128 + number)
        wait_until(lambda: not any(map(is_alive, pids)), f"{number.name} left processes behind")

    def test_only_the_first_one_raises(self) -> None:
        def impatient() -> None:
            with stop_signals():
                try:
                    signal.raise_signal(signal.SIGTERM)
                finally:
                    signal.raise_signal(signal.SIGINT)  # must not cut the clean-up short

        with pytest.raises(Stopped) as stopped:
            impatient()
        assert stopped.value.exit_code == 128 + signal.SIGTERM

    def test_handlers_come_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stop_signals():
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before

    def test_in_an_event_loop_no_callback_can_take_it_for_its_own_error(self) -> None:
        """As a socket's transport does that is writing when the signal comes."""
        swallowed: list[BaseException] = []
        reported: list[dict[str, object]] = []

        def write() -> None:
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException as error:
                swallowed.append(error)

        async def work() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: reported.append(context))
            loop.call_soon(write)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(asyncio.sleep(WAIT))

        with asyncio.Runner() as runner:
            with stop_signals(), pytest.raises(Stopped, match="SIGTERM"):
                runner.run(work())
            assert runner.run(asyncio.sleep(0, "goes on")) == "goes on"
        gc.collect()
        assert (swallowed, reported) == ([], [])
