"""A verifier process: reads responses from a socket, answers with scores.

The pool starts it as ``python -P -m megatron_mapo.rewards.worker FD PARENT_PID`` with one end of a socket pair as
descriptor FD. Both ways a message is a 4-byte length and a body. Requests are pickles (the parent is trusted, and
metadata may hold dates), replies are JSON (this process has run code on untrusted text). A reply has the number of
its request.

An ordinary verifier runs in the main thread, one request after another. An ``async`` one runs in an event loop, all
requests that have come at the same time, each under its own time limit; the pool bounds how many it sends.

The process ends when the socket closes or its parent is another process, also in the middle of a verification, so
nothing outlives a parent that was killed. It imports neither torch nor the rest of the package.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import pickle
import queue
import resource
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from typing import Any

from megatron_mapo.errors import ConfigError
from megatron_mapo.rewards.registry import LoadedVerifier, get_verifier

LENGTH = struct.Struct("!I")
_PARENT_CHECK_SECONDS = 2.0
GRACE_SECONDS = 5.0


def read_message(connection: socket.socket) -> bytes | None:
    """One message, or None at the end of the stream. Keeps to the socket's timeout between two pieces."""
    head = _read_exactly(connection, LENGTH.size)
    return None if head is None else _read_exactly(connection, LENGTH.unpack(head)[0])


def write_message(connection: socket.socket, body: bytes) -> None:
    """Send one message."""
    connection.sendall(LENGTH.pack(len(body)) + body)


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    connection = socket.socket(fileno=descriptor)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, parent, requests), daemon=True).start()
    settings = pickle.loads(requests.get())
    _limit_memory(settings["memory_mb"])
    try:
        verifier = get_verifier(settings["name"], settings["options"], settings["section"])
    except (ConfigError, MemoryError) as error:
        _reply(connection, {"error": str(error), "kind": type(error).__name__})
        return
    _reply(connection, {"ready": True, "extracts": verifier.extracts, "concurrent": verifier.concurrent})
    if verifier.concurrent:
        asyncio.run(_serve_many(connection, requests, verifier, settings["timeout"]))
    else:
        _serve_one_by_one(connection, requests, verifier, settings["timeout"])


def _serve_one_by_one(
    connection: socket.socket, requests: queue.SimpleQueue[bytes], verifier: LoadedVerifier, timeout: float
) -> None:
    while True:
        number, what, arguments = pickle.loads(requests.get())
        # Should the parent be gone, the kernel ends even a verifier that never lets the other thread run.
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE_SECONDS)
        try:
            reply = _CHECKED[what](getattr(verifier, what)(*arguments))
        except Exception as error:
            reply = _raised(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(connection, reply | {"number": number})


async def _serve_many(
    connection: socket.socket, requests: queue.SimpleQueue[bytes], verifier: LoadedVerifier, timeout: float
) -> None:
    async def serve(number: int, what: str, arguments: tuple[Any, ...]) -> None:
        try:
            async with asyncio.timeout(timeout) as limit:
                value = getattr(verifier, what)(*arguments)
                reply = _CHECKED[what](await value if inspect.isawaitable(value) else value)
        except (Exception, asyncio.CancelledError) as error:
            # A timeout of its own making is the verifier's error, not its limit.
            reply = {"kind": "timeout"} if limit.expired() else _raised(error)
        _reply(connection, reply | {"number": number})

    async def keep_alarm_off() -> None:
        """Should the loop stand still and the parent be gone, the kernel ends the process."""
        while True:
            signal.setitimer(signal.ITIMER_REAL, timeout + 2 * GRACE_SECONDS)
            await asyncio.sleep(GRACE_SECONDS)

    loop = asyncio.get_running_loop()
    running = {loop.create_task(keep_alarm_off())}  # the loop itself holds tasks only weakly
    while True:
        request = pickle.loads(await loop.run_in_executor(None, requests.get))
        task = loop.create_task(serve(*request))
        running.add(task)
        task.add_done_callback(running.discard)


def _receive(connection: socket.socket, parent: int, requests: queue.SimpleQueue[bytes]) -> None:
    """Pass requests on; end the process when there is nobody left to send them, or the connection fails.

    The parent's id is looked at too: a process it forked may hold the other end of the socket open.
    """
    try:
        while os.getppid() == parent:
            ready, _, _ = select.select([connection], [], [], _PARENT_CHECK_SECONDS)
            message = read_message(connection) if ready else b""
            if message is None:
                return
            if message:
                requests.put(message)
    finally:
        os._exit(0)


def _reply(connection: socket.socket, reply: dict[str, Any]) -> None:
    write_message(connection, json.dumps(reply).encode())


def _limit_memory(megabytes: int) -> None:
    if megabytes:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def _raised(error: BaseException) -> dict[str, Any]:
    """``{"error": text, "kind": exception}``."""
    if isinstance(error, MemoryError):
        return {"error": "ran out of memory", "kind": "MemoryError"}
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"raised {type(error).__name__}: {error!s:.500} ({os.path.basename(where.filename)}:{where.lineno})"
    return {"error": text, "kind": type(error).__name__}


def _judged(value: Any) -> dict[str, Any]:
    """``{"right": bool}`` or ``{"score": float}``."""
    value = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
    if isinstance(value, bool):
        return {"right": value}
    if isinstance(value, int | float) and math.isfinite(value):
        return {"score": float(value)}
    return {"error": f"returned {value!r:.80}, which is no bool and no finite number,", "kind": "ValueError"}


def _extracted(value: Any) -> dict[str, Any]:
    """``{"answer": str | None}``."""
    if value is None or isinstance(value, str):
        return {"answer": value}
    return {"error": f"returned {value!r:.80}, which is neither text nor None,", "kind": "ValueError"}


_CHECKED = {"judge": _judged, "extract": _extracted}


if __name__ == "__main__":
    main()
