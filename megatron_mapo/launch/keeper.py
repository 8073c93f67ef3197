"""A process that owns a command, so that no descendant of the command outlives the launcher.

``python -m megatron_mapo.launch.keeper COMMAND...`` starts the command and stays until it ends, or until
the keeper's own standard input is closed, which the kernel does when the launcher dies, however it dies.
Then every descendant is ended. If the keeper itself is killed, the kernel kills the command
(``PR_SET_PDEATHSIG``).

SIGUSR1, which asks a trainer to save and end (``preemption``), is passed on. The command starts with it blocked, so
that one which comes before the trainer looks at signals is kept and does not end it.

``python -m megatron_mapo.launch.keeper --die-with-parent COMMAND...``, which the keeper starts, becomes the
command after it has asked the kernel for that.

Servers have a keeper of their own (``rollout.server_main``), which also hands them their key.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

from megatron_mapo import process_tree

DIE_WITH_PARENT = "--die-with-parent"
SAVE = signal.SIGUSR1


def exit_code(status: int) -> int:
    """Shell convention for a process's return code: 128 + signal if a signal ended it."""
    return status if status >= 0 else 128 - status


def keep(command: Sequence[str]) -> int:
    """Start ``command`` and stay with it and all of its descendants.

    Returns:
        The command's exit code; 0 when it was ended because the launcher went away or asked for it.
    """
    process_tree.adopt_orphans()
    stop, wake = os.pipe()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler and not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: os.write(wake, b"x"))
    start = [sys.executable, "-m", "megatron_mapo.launch.keeper", DIE_WITH_PARENT, *command]
    signal.pthread_sigmask(signal.SIG_BLOCK, {SAVE})
    child = subprocess.Popen(start, stdin=subprocess.DEVNULL)
    signal.signal(SAVE, lambda *_: child.send_signal(SAVE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SAVE})
    gone = os.pidfd_open(child.pid)
    ready, _, _ = select.select([sys.stdin.fileno(), stop, gone], [], [])
    process_tree.end(child)
    return exit_code(child.returncode) if gone in ready else 0


def become(command: Sequence[str]) -> None:
    """Replace this process by ``command``, which then dies with its parent."""
    parent = os.getppid()
    process_tree.die_with_parent()
    if os.getppid() != parent:
        raise SystemExit("the parent ended before its command started")
    os.execvp(command[0], list(command))


def main(argv: list[str]) -> int:
    if argv[:1] == [DIE_WITH_PARENT]:
        become(argv[1:])
    return keep(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
