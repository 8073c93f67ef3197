"""The two Ray actors of a run: one starts the trainer ranks of a bundle, the other a server.

Trainers and servers are processes of their own under a keeper, as ``launch local`` starts them, so that nothing of
them is left when the actor's process ends, however it ends. An actor holds no model and imports neither torch nor
Ray. What goes in and out of it is plain data: strings, numbers, lists, dictionaries. ``launch.ray`` makes the actors
and calls them; calls that wait run beside others in threads.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_mapo.launch.environment import network_environment
from megatron_mapo.launch.processes import POLL_SECONDS, Kept, supervise
from megatron_mapo.ports import free_port

_OF_RAY = ("RAY_", "PYTHONBREAKPOINT", "SPT_NOENV")
"""Variables that Ray's workers have and their children must not: a key of the cluster among them."""
_READY = re.compile(r"^rollout\.urls=\[(.*)\]$", re.MULTILINE)


def _end_with(parent: int) -> None:
    """End this process when another has ended, whether or not anybody has waited for that one."""
    select.select([os.pidfd_open(parent)], [], [])
    os._exit(1)


class Host:
    """What both actors share: a folder, variables of the environment, and commands that end with them.

    The actor ends with the node's raylet, its parent. Ray's own watch does not see the death of one that is a zombie.

    Args:
        variables: to add to this node's environment.
    """

    def __init__(self, variables: dict[str, str]) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RAY)}
        self._environment = {**own, "PYTHONUNBUFFERED": "1", **variables}
        self._commands: list[Kept] = []
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def enter(self, folder: str) -> str:
        """Go to the folder that relative paths of the run start from.

        Returns:
            what is wrong; empty if nothing is.
        """
        try:
            os.chdir(folder)
        except OSError as error:
            return f"{folder}: {error.strerror}"
        return ""

    def stop(self) -> None:
        """End all commands, and wait until they and all of their descendants are gone."""
        for command in self._commands:
            command.hang_up()
        for command in self._commands:
            command.stop()


class TrainerHost(Host):
    """Trainer ranks of one bundle."""

    def native_dtype(self) -> str:
        """The ``model.dtype`` that this node computes fast. In a process of its own, because that imports torch."""
        ask = "from megatron_mapo.hardware import native_dtype; print(native_dtype().value)"
        done = subprocess.run(
            [sys.executable, "-c", ask], env=self._environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.split()[-1]

    def free_port(self, address: str) -> int:
        """A port for the ranks to meet at. Rank 0 listens on it as soon as it has started."""
        return free_port(address)

    def start(self, arguments: Sequence[str], address: str, ranks: Sequence[dict[str, str]], logs: str) -> None:
        """Start the ranks of this bundle; each writes ``rank-N.log``.

        Args:
            arguments: configuration and overrides.
            address: of this node; gloo uses its network interface. Empty: gloo finds out.
            ranks: what each one finds in its environment besides this node's.
            logs: folder for the logs.
        """
        command = [sys.executable, "-m", "megatron_mapo.train", *arguments]
        network = network_environment(self._environment, address) if address else {}
        common = self._environment | network
        for own in ranks:
            self._commands.append(Kept(command, common | own, Path(logs) / f"rank-{own['RANK']}.log"))

    def supervise(self) -> int:
        """Wait until all ranks have ended, or one has failed; see ``processes.supervise``."""
        return supervise(self._commands, lambda: None)

    def ask_to_save(self) -> None:
        """Make the ranks finish their step, save, and end."""
        for command in self._commands:
            command.ask_to_save()


class ServerHost(Host):
    """``megatron-mapo serve`` with one server, which it starts again when it ends or hangs."""

    def start(self, arguments: Sequence[str], address: str, log: str) -> None:
        """Start it on ``address``; it writes ``log``."""
        environment = self._environment | network_environment(self._environment, address)
        command = [sys.executable, "-m", "megatron_mapo", "serve", *arguments]
        self._log = Path(log)
        self._commands.append(Kept(command, environment, self._log))

    def wait_ready(self) -> str:
        """Wait until the server answers.

        Returns:
            its address; empty if it ended.
        """
        while self._commands[0].poll() is None:
            if found := _READY.search(self._log.read_text(errors="replace")):
                return found[1]
            time.sleep(POLL_SECONDS)
        return ""

    def wait_end(self) -> int:
        """Wait until the server is given up; the exit code of ``serve``."""
        return supervise(self._commands, lambda: None)
