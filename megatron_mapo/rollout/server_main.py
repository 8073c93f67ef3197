"""The process that owns one SGLang server: ``python -m megatron_mapo.rollout.server_main``.

Two processes run this module. The *keeper* reads a launch order from its standard input, starts the
*server* in a process group of its own, and stays until the server ends or its own standard input is
closed, which the kernel does when the parent dies, however it dies. Then it kills the server and all
of its descendants, so that no server outlives the run that started it. If the keeper itself is
killed, the kernel kills the server (``PR_SET_PDEATHSIG``), and sglang's workers follow the same way.

The order, API key included, travels through pipes: it is on no command line, in no file and in no
environment. Only the standard library is imported here, so that a keeper stays small.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys

from megatron_mapo import process_tree


class Secret(str):
    """A string that does not show in a ``repr``: sglang logs all of its arguments."""

    def __repr__(self) -> str:
        return "'***'"


def keep(order: dict) -> int:
    """Start the server of ``order`` and stay with it.

    Args:
        order: ``args`` (arguments of sglang), ``api_key`` (string or null), ``log`` (file to write).

    Returns:
        The server's exit status, 128 + signal if one ended it; 0 when it was ended because the parent closed the pipe.
    """
    process_tree.adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes the pipe
    stop, wake = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(wake, b"x"))
    with open(order["log"], "ab", buffering=0) as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "megatron_mapo.rollout.server_main", "--serve"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    assert server.stdin is not None
    server.stdin.write(json.dumps(order).encode())
    server.stdin.close()
    gone = os.pidfd_open(server.pid)
    ready, _, _ = select.select([sys.stdin.fileno(), stop, gone], [], [])
    process_tree.end(server)
    if gone not in ready:
        return 0
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def serve(order: dict) -> None:
    """Run sglang in this process until it ends."""
    parent = os.getppid()
    process_tree.die_with_parent()
    if os.getppid() != parent or parent == 1:
        raise SystemExit("the keeper of this server ended before it started")
    from megatron_mapo.patches import sglang_cpu

    sglang_cpu.apply_in_server()
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(order["args"])
    if order["api_key"] is not None:
        server_args.api_key = Secret(order["api_key"])
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def main(argv: list[str]) -> int:
    if argv == ["--serve"]:
        serve(json.loads(sys.stdin.read()))
        return 0
    # the parent keeps its end open for as long as it lives, so the order is one line
    return keep(json.loads(sys.stdin.readline()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
