"""Runs a verifier in processes of its own, with limits on time and memory."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from megatron_mapo.config import OnFailure, RewardConfig
from megatron_mapo.errors import ConfigError, RewardError
from megatron_mapo.rewards.registry import EXTRACT
from megatron_mapo.rewards.worker import read_message, write_message

T = TypeVar("T")
_log = logging.getLogger(__name__)

_STARTUP_SECONDS = 180.0
"""A worker must have imported its verifier by then; imports are slow on busy machines and network disks."""
_SHOWN = 200
"""Letters of a response in error messages."""


class _Worker:
    """One verifier process and the socket to it. Used by one thread at a time."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
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
        settings = {"name": config.name, "memory_mb": config.memory_mb, "timeout": config.timeout}
        self._send(settings, _STARTUP_SECONDS)

    def wait_ready(self) -> bool:
        """Wait until the verifier is imported.

        Returns:
            Whether there is an extractor beside it.

        Raises:
            ConfigError: it cannot be imported.
            RewardError: the process died or took too long.
        """
        try:
            reply = self._receive(_STARTUP_SECONDS)
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise RewardError(
                f"reward.name={self.config.name!r}: the verifier process did not start: {self._fate(error)} "
                f"(its limit is reward.memory_mb={self.config.memory_mb})"
            ) from error
        if reply.get("kind") == "MemoryError":
            raise ConfigError(
                f"reward.name={self.config.name!r} does not fit into reward.memory_mb={self.config.memory_mb}"
            )
        if "error" in reply:
            raise ConfigError(reply["error"])
        return reply["extracts"]

    def ask(self, what: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """The worker's reply (see ``worker``); ``{"error": ..., "broken": True}`` if it must be replaced."""
        timeout = self.config.timeout
        try:
            self._send((what, arguments), timeout)
            reply = self._receive(timeout)
        except TimeoutError:
            return {"error": f"took longer than reward.timeout={timeout:g} s", "broken": True}
        except (EOFError, ConnectionError) as error:
            return {"error": f"ended its process: {self._fate(error)}", "broken": True}
        if reply.get("kind") == "MemoryError":
            # What a failed allocation left behind is anyone's guess.
            return {"error": f"needed more than reward.memory_mb={self.config.memory_mb}", "broken": True}
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._connection.close()

    def _send(self, message: Any, timeout: float) -> None:
        self._connection.settimeout(timeout)
        write_message(self._connection, pickle.dumps(message))

    def _receive(self, timeout: float) -> dict[str, Any]:
        self._connection.settimeout(timeout)
        body = read_message(self._connection)
        if body is None:
            raise EOFError
        return json.loads(body)

    def _fate(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no sign of life within {_STARTUP_SECONDS:g} s"
        try:
            return f"exit code {self.process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            return "connection lost"


class RewardPool:
    """``reward.workers`` processes that run the verifier ``reward.name``.

    A verifier that takes longer than ``reward.timeout`` seconds, or more than ``reward.memory_mb`` MiB, or ends its
    process, has its process replaced; the other responses are scored all the same. Calls of ``score`` may overlap,
    and come from different event loops. The processes end with this one, also if it is killed.

    Use it as a context manager, or call ``close``.

    Attributes:
        failures: responses so far whose verification failed and counted as wrong (``reward.on_failure=wrong``).
        extracts: there is an extractor beside the verifier (see ``registry``), so ``extract`` can be called.

    Raises:
        ConfigError: the verifier is unknown or cannot be imported.
        RewardError: a verifier process does not start.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.failures = 0
        self.extracts = False
        self._lock = threading.Lock()
        self._closed = False
        self._workers: set[_Worker] = set()
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward")
        try:
            workers = [self._start() for _ in range(config.workers)]
            for worker in workers:
                self.extracts = worker.wait_ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    async def score(
        self, responses: Sequence[str], answers: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> list[float]:
        """Rewards of N responses: ``reward.correct`` or ``reward.wrong``, or the verifier's score as it is.

        Args:
            responses: N texts.
            answers: N reference answers.
            metadata: N rows' other columns.

        Returns:
            N rewards, in order.

        Raises:
            RewardError: a verifier raised, hung, died or returned something else than a bool or a finite number,
                and ``reward.on_failure`` is ``error``.
        """
        return await self._each(self._score, zip(responses, answers, metadata, strict=True))

    async def extract(self, responses: Sequence[str]) -> list[str | None]:
        """The answers that N responses state, by the extractor beside the verifier.

        An extractor that takes too long or too much memory gives None for that response, and a warning: the
        response's reward is known all the same. One that raises gives an error or, with ``reward.on_failure=wrong``,
        None.

        Returns:
            N texts or None, in order.

        Raises:
            RewardError: the extractor raised or returned something that is neither text nor None.
        """
        return await self._each(self._extract, ((response,) for response in responses))

    async def _each(self, work: Callable[..., T], rows: Iterable[tuple[Any, ...]]) -> list[T]:
        """``work(*row)`` for all rows, on the pool's threads, in order."""
        loop = asyncio.get_running_loop()
        pending = [loop.run_in_executor(self._threads, work, *row) for row in rows]
        try:
            return await asyncio.gather(*pending)
        finally:
            # After the first error, or when the caller gave up, the rest is not worth starting.
            for task in pending:
                task.cancel()

    def close(self) -> None:
        """End all processes, at once."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
            self._workers.clear()
        for worker in workers:
            worker.process.kill()
        # Threads still waiting for a reply see their connection end.
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.kill()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise RewardError("the reward pool was closed while responses were scored")
            worker = _Worker(self.config)
            self._workers.add(worker)
            return worker

    def _replace(self, worker: _Worker) -> _Worker:
        with self._lock:
            self._workers.discard(worker)
        worker.kill()
        fresh = self._start()
        fresh.wait_ready()
        return fresh

    def _ask(self, what: str, *arguments: Any) -> dict[str, Any]:
        """An idle worker's reply; one that broke over it is replaced."""
        worker = self._idle.get()  # as many threads as workers: one is idle
        try:
            if worker.process.poll() is not None:
                _log.warning("a verifier process ended while idle (code %s): replaced", worker.process.returncode)
                worker = self._replace(worker)
            reply = worker.ask(what, arguments)
            if reply.get("broken"):
                _log.warning("a verifier %s: its process is replaced", reply["error"])
                worker = self._replace(worker)
        finally:
            self._idle.put(worker)
        return reply

    def _score(self, response: str, answer: str, metadata: dict[str, Any]) -> float:
        reply = self._ask("judge", response, answer, metadata)
        if "right" in reply:
            return self.config.correct if reply["right"] else self.config.wrong
        if "score" in reply:
            return reply["score"]
        if self.config.on_failure is OnFailure.wrong:
            with self._lock:
                self.failures += 1
            return self.config.wrong
        raise self._failed("verifier", reply, response)

    def _extract(self, response: str) -> str | None:
        reply = self._ask("extract", response)
        if "answer" in reply:
            return reply["answer"]
        if reply.get("broken") or self.config.on_failure is OnFailure.wrong:
            return None
        raise self._failed(f"verifier's `{EXTRACT}`", reply, response)

    def _failed(self, what: str, reply: dict[str, Any], response: str) -> RewardError:
        return RewardError(
            f"reward.name={self.config.name!r}: the {what} {reply['error']} on the response {response[:_SHOWN]!r}"
            f"{'...' if len(response) > _SHOWN else ''}; mend it, raise reward.timeout={self.config.timeout:g} or "
            "reward.memory_mb, or set reward.on_failure=wrong"
        )


def _python_path() -> str:
    """This process's search path, so that a worker finds what it would find."""
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)
