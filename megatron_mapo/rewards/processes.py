"""The processes of one verifier: start them, ask them, replace those that break."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import pickle
import queue
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_mapo.config import RewardComponent, RewardConfig
from megatron_mapo.errors import ConfigError, RewardError
from megatron_mapo.rewards.worker import read_message, write_message

_log = logging.getLogger(__name__)

_STARTUP_SECONDS = 180.0
"""A worker must have imported its verifier by then; imports are slow on busy machines and network disks."""
_LAG_SECONDS = 2.0
"""So much later than its time limit an event loop may say that it was exceeded."""

Reply = dict[str, Any]
"""What a worker answers (see ``worker``), or ``{"error": text, "kind": text}``; with ``broken`` if the worker must be
replaced. Kinds are ``timeout``, ``memory``, ``died`` and names of exceptions."""

Accept = Callable[[Reply, tuple[Any, ...]], None]


class Worker:
    """One verifier process and the socket to it. Several threads may ask at a time.

    Args:
        component: the verifier.
        section: where it stands in the configuration, for messages.
        config: limits.

    Attributes:
        extracts, concurrent: as ``registry.LoadedVerifier``; known after ``wait_ready``.
    """

    def __init__(self, component: RewardComponent, section: str, config: RewardConfig) -> None:
        self.config = config
        self.extracts = self.concurrent = False
        self._key = f"{section}.name={component.name!r}"
        ours, theirs = socket.socketpair()
        self._connection = ours
        with theirs:
            self.process = subprocess.Popen(
                # -P: the working directory is not searched first, where a math.py would hide Python's own.
                [sys.executable, "-P", "-m", "megatron_mapo.rewards.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a verifier prints belongs to the log
                env=os.environ | {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"},
            )
        self._sending, self._numbers = threading.Lock(), itertools.count()
        self._waiting: dict[int, Future[Reply]] = {}
        self._reader = threading.Thread(target=self._read_replies, name="reward-replies", daemon=True)
        ours.settimeout(_STARTUP_SECONDS)
        settings = {"name": component.name, "options": component.options, "section": section}
        write_message(ours, pickle.dumps(settings | {"memory_mb": config.memory_mb, "timeout": config.timeout}))

    def wait_ready(self) -> None:
        """Wait until the verifier is imported.

        Raises:
            ConfigError: it cannot be imported, or its options are wrong.
            RewardError: the process died or took too long.
        """
        try:
            body = read_message(self._connection)
            if body is None:
                raise EOFError
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise RewardError(
                f"{self._key}: the verifier process did not start: {self._fate(error)} "
                f"(its limit is reward.memory_mb={self.config.memory_mb})"
            ) from error
        reply = json.loads(body)
        if reply.get("kind") == "MemoryError":
            raise ConfigError(f"{self._key} does not fit into reward.memory_mb={self.config.memory_mb}")
        if "error" in reply:
            raise ConfigError(reply["error"])
        self.extracts, self.concurrent = reply["extracts"], reply["concurrent"]
        self._connection.settimeout(self.config.timeout)
        self._reader.start()

    def ask(self, what: str, arguments: tuple[Any, ...]) -> Reply:
        """The worker's reply to one request."""
        timeout = self.config.timeout
        # A concurrent one keeps the limit itself, unless its event loop stands still.
        limit = timeout + _LAG_SECONDS if self.concurrent else timeout
        number, answer = next(self._numbers), Future[Reply]()
        self._waiting[number] = answer
        try:
            with self._sending:
                write_message(self._connection, pickle.dumps((number, what, arguments)))
            reply = answer.result(limit)
        except TimeoutError:
            return self._late() | {"broken": True}
        except (EOFError, OSError) as error:
            return {"error": f"ended its process: {self._fate(error)}", "kind": "died", "broken": True}
        finally:
            self._waiting.pop(number, None)
        if reply.get("kind") == "timeout":
            return self._late()
        if reply.get("kind") == "MemoryError":
            # What a failed allocation left behind is anyone's guess.
            text = f"needed more than reward.memory_mb={self.config.memory_mb}"
            return {"error": text, "kind": "memory", "broken": True}
        return reply

    def kill(self) -> None:
        """End the process; whoever waits for a reply sees the connection end."""
        self.process.kill()
        self.process.wait()
        if self._reader.ident is None:
            self._connection.close()
            return
        with contextlib.suppress(OSError):  # the reader has closed it already
            self._connection.shutdown(socket.SHUT_RDWR)  # a child of the process may hold the other end open

    def _late(self) -> Reply:
        return {"error": f"took longer than reward.timeout={self.config.timeout:g} s", "kind": "timeout"}

    def _read_replies(self) -> None:
        """Give replies to those who wait for them, until the connection ends."""
        failure: Exception = EOFError()
        try:
            with self._connection:
                readable = select.poll()
                readable.register(self._connection, select.POLLIN)
                while readable.poll():
                    body = read_message(self._connection)
                    if body is None:
                        break
                    reply = json.loads(body)
                    waiting = self._waiting.pop(reply["number"], None)
                    if waiting is not None:
                        waiting.set_result(reply)
        except (OSError, ValueError, KeyError, TypeError) as error:  # code in a response may write to the socket, too
            failure = error if isinstance(error, OSError) else EOFError(f"not a reply: {error!r:.80}")
        finally:
            for waiting in list(self._waiting.values()):
                if not waiting.done():
                    waiting.set_exception(failure)

    def _fate(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no sign of life within {_STARTUP_SECONDS:g} s"
        try:
            return f"exit code {self.process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            return "connection lost"


class _Seat:
    """A place for one worker: whoever finds it broken puts another one there."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.lock = worker, threading.Lock()


class VerifierProcesses:
    """``reward.workers`` processes of one verifier.

    A process that takes too long or too much memory, or that ends, is replaced; the other requests are answered all
    the same. Requests may overlap and come from several event loops and threads.

    Args:
        component: the verifier.
        section: where it stands in the configuration, for messages.
        config: limits.

    Attributes:
        component: as given.
        extracts: there is an extractor beside the verifier (known after ``wait_ready``).
    """

    def __init__(self, component: RewardComponent, section: str, config: RewardConfig) -> None:
        self.component, self.extracts = component, False
        self._section, self._config = section, config
        self._lock, self._alone = threading.Lock(), threading.Lock()
        self._closed = False
        self._workers: set[Worker] = set()
        self._solo: Worker | None = None
        self._idle: queue.SimpleQueue[_Seat] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._seats: list[_Seat] = []

    def start(self) -> None:
        """Start the processes; ``wait_ready`` waits for them."""
        self._seats += [_Seat(self._start()) for _ in range(self._config.workers)]

    def wait_ready(self) -> None:
        """Wait until all processes can work.

        Raises:
            ConfigError, RewardError: as ``Worker.wait_ready``.
        """
        for seat in self._seats:
            seat.worker.wait_ready()
        self.extracts = self._seats[0].worker.extracts
        each = self._config.concurrency if self._seats[0].worker.concurrent else 1
        # As many threads as there are places in the queue: each finds one.
        self._threads = ThreadPoolExecutor(each * len(self._seats), thread_name_prefix="reward")
        for seat in self._seats * each:
            self._idle.put(seat)

    async def ask(self, what: str, rows: Iterable[tuple[Any, ...]], accept: Accept) -> list[Reply]:
        """``what`` (``judge`` or ``extract``) of every row of arguments, in order.

        Args:
            what: name of the function.
            rows: arguments of each call.
            accept: is shown every reply and its row as it comes; what it raises ends the whole request.

        Raises:
            RewardError: the processes were closed meanwhile.
            Whatever ``accept`` raises.
        """
        assert self._threads is not None, "wait_ready comes first"
        loop = asyncio.get_running_loop()
        pending = [loop.run_in_executor(self._threads, self._accepted, what, row, accept) for row in rows]
        try:
            return await asyncio.gather(*pending)
        finally:
            # After the first error, or when the caller gave up, the rest is not worth starting.
            for task in pending:
                task.cancel()

    def process_ids(self) -> list[int]:
        """Of the processes that run now."""
        with self._lock:
            return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End all processes, at once."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
            self._workers.clear()
        for worker in workers:
            worker.kill()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> Worker:
        with self._lock:
            self._check_open()
            worker = Worker(self.component, self._section, self._config)
            self._workers.add(worker)
            return worker

    def _check_open(self) -> None:
        if self._closed:
            raise RewardError("the reward pool was closed while responses were scored")

    def _end(self, worker: Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.kill()

    def _accepted(self, what: str, arguments: tuple[Any, ...], accept: Accept) -> Reply:
        reply = self._ask(what, arguments)
        accept(reply, arguments)
        return reply

    def _ask(self, what: str, arguments: tuple[Any, ...]) -> Reply:
        seat = self._idle.get()
        try:
            worker = self._worker_of(seat)
            reply = worker.ask(what, arguments)
            if reply.get("broken"):
                self._replace(seat, worker, reply["error"])
        finally:
            self._idle.put(seat)
        # It may have been another response's fault, or have died before it was asked.
        again = reply.get("broken") and (worker.concurrent or reply.get("kind") == "died")
        return self._ask_alone(what, arguments) if again else reply

    def _ask_alone(self, what: str, arguments: tuple[Any, ...]) -> Reply:
        """Ask a process that has nothing else to do, so that one response's fault is not another's."""
        with self._alone:
            if self._solo is None or self._solo.process.poll() is not None:
                self._solo = self._start()
                self._solo.wait_ready()
            reply = self._solo.ask(what, arguments)
            if reply.get("broken"):
                self._end(self._solo)
                self._solo = None
        return reply

    def _worker_of(self, seat: _Seat) -> Worker:
        worker = seat.worker
        if worker.process.poll() is not None:
            self._replace(seat, worker, f"ended while idle (exit code {worker.process.returncode})")
        return seat.worker

    def _replace(self, seat: _Seat, broken: Worker, reason: str) -> None:
        with seat.lock:
            if seat.worker is not broken:
                return  # somebody else has done so
            self._check_open()
            _log.warning("verifier %s %s: its process is replaced", self.component.title, reason)
            self._end(broken)
            fresh = self._start()
            fresh.wait_ready()
            seat.worker = fresh


def _python_path() -> str:
    """This process's search path, so that a worker finds what it would find."""
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)
