"""New weights to the servers: pause, send, verify, set the version, continue.

An update goes on without a server that fails in it. That server is out of the pool, and part of the next update if it
answers again: so no server ever serves with half of an update, or with the weights of another step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron_mapo.config import SyncConfig, SyncMode
from megatron_mapo.errors import MapoError, RolloutError, ServersLost, ServersOut, WeightSyncError
from megatron_mapo.model_shape import ModelShape
from megatron_mapo.rollout.checksum import Expected, Layout
from megatron_mapo.rollout.client import Refused, RolloutClient
from megatron_mapo.rollout.pool import NEVER_UPDATED, ServerPool, State
from megatron_mapo.rollout.weight_transport import BroadcastTransport, Bucket, DiskTransport, Transport

MIB = 2**20
WAIT_SECONDS = 1.0
"""Between two looks for servers when all are gone."""
TELL_SECONDS = 15.0
"""Between two lines that say so."""
WATCH_SECONDS = 2.0
"""Between two looks at the servers that take part in a collective."""


@dataclass(frozen=True)
class SyncReport:
    """One update.

    Attributes:
        version: the servers' version now.
        seconds: from pause to continue.
        nbytes: bytes of weights sent (once, however many servers there are).
        tensors: tensors sent.
        checksum: over all verified parameters; empty without verification.
    """

    version: int
    seconds: float
    nbytes: int
    tensors: int
    checksum: str


@dataclass
class _Sent:
    nbytes: int = 0
    tensors: int = 0


class _Source:
    """The trainer's tensors; remembers whether the iterator itself failed, and can run it to its end.

    Not a generator: one that is dropped half-way would close the iterator behind it.
    """

    def __init__(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self._tensors = iter(tensors)
        self.failed = False

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        try:
            return next(self._tensors)
        except StopIteration:
            raise
        except BaseException:
            self.failed = True
            raise

    def drain(self) -> None:
        """Go to the end: other trainer ranks take part in the collectives behind every tensor."""
        for _ in self._tensors:
            pass


class WeightSync:
    """Updates the servers of a pool. Runs on one trainer rank only; synchronous.

    A failed update leaves the servers paused, so that no response is ever sampled with half of an
    update; the next ``update`` starts from the beginning and may succeed.

    Args:
        config: section ``rollout.sync``.
        servers: the pool that requests go to, or addresses.
        api_key: their key, if they ask for one.
        model_path: model folder: its config says how servers fuse and cut the weights; in ``disk``
            mode its small files go beside the weights.
        run_dir: the folder ``weights`` in it serves ``disk`` mode when ``config.disk_dir`` is not set.
        device: of the buckets; NCCL on CUDA, gloo on CPU.
        probe_timeout: seconds to answer ``/model_info``; a server that takes longer is out.

    Raises:
        RolloutError: there is no server.
    """

    def __init__(
        self,
        config: SyncConfig,
        servers: ServerPool | Sequence[str],
        api_key: str | None,
        model_path: str | Path,
        run_dir: str | Path,
        device: torch.device,
        probe_timeout: float = 30.0,
    ) -> None:
        self.config = config
        self._client = RolloutClient(servers, api_key, config.timeout, probe_timeout=probe_timeout)
        self.pool = self._client.pool
        self._model_path = Path(model_path)
        self._disk_dir = Path(config.disk_dir) if config.disk_dir else Path(run_dir) / "weights"
        self._device = device
        self._runner = asyncio.Runner()
        self._layouts: dict[str, Layout] = {}
        # those that got weights from here
        self._updated: set[str] = set()
        # a server of the transport's connection was restarted
        self._lost_group = False
        # the servers of the update that is going on
        self._members: list[str] = []
        self._transport = self._make_transport()

    def close(self) -> None:
        """Leave the servers' process group and close the connections."""
        self._runner.run(self._transport.close())
        self._runner.run(self._client.close())
        self._runner.close()

    # ---------------------------------------------------------------------------------------- who is there

    def await_servers(self, timeout: float, log: Callable[[str], None] = lambda line: None) -> None:
        """Return when at least one server answers.

        Args:
            timeout: seconds, counted from when no server served any more.
            log: called with a line from time to time.

        Raises:
            ServersLost: none did; says why.
            RolloutError: every server refuses the API key.
        """
        self._runner.run(self._await_servers(timeout, log))

    async def _await_servers(self, timeout: float, log: Callable[[str], None]) -> None:
        told = float("-inf")
        while not await self._roll_call():
            waited = self.pool.stalled()
            if waited >= timeout:
                raise ServersLost(
                    f"no generation server is left after {waited:.0f} s (rollout.wait_timeout={timeout:g}): "
                    f"{self.pool.describe()}. Start servers again, then the same command: the run goes on from its "
                    "last checkpoint"
                )
            if time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                log(f"waiting for a server, {timeout - waited:.0f} s more: {self.pool.describe()}")
            await asyncio.sleep(WAIT_SECONDS)

    async def _roll_call(self, urls: Sequence[str] | None = None) -> list[str]:
        """Those of ``urls`` (default: that are worth an update) that answer; the others are out of the pool."""
        chosen = self.pool.candidates() if urls is None else list(urls)

        async def ask(url: str) -> RolloutError | None:
            began = time.monotonic()
            try:
                await self._introduce(url)
            except RolloutError as error:
                self.pool.take_out(url, str(error), time.monotonic() - began)
                return error
            return None

        found = await asyncio.gather(*map(ask, chosen), return_exceptions=True)
        for failure in found:
            if failure is not None and not isinstance(failure, RolloutError):
                raise failure
        refusals = [failure for failure in found if isinstance(failure, Refused | WeightSyncError)]
        if refusals and len(refusals) == len(self.pool.urls):
            raise refusals[0]
        return [url for url, failure in zip(chosen, found, strict=True) if failure is None]

    async def _introduce(self, url: str) -> None:
        """Ask a server for its version, and for its layout unless it is known."""
        version = await self._client.weight_version(url)
        if url in self._updated and version == NEVER_UPDATED:
            self._updated.discard(url)
            self._layouts.pop(url, None)
            self._lost_group = True
            self.pool.take_out(url, "it was restarted")
            self.pool.restarted(url)
        if url not in self._layouts:
            self._layouts[url] = await self._layout(url)

    async def _layout(self, url: str) -> Layout:
        info = await self._client.request(url, "/server_info", method="GET", timeout=self._client.probe_timeout)
        try:
            tensor, pipeline, data = info["tp_size"], info["pp_size"], info["dp_size"]
            cuda, name = info["device"] == "cuda", info["dtype"]
            if not isinstance(tensor, int) or isinstance(tensor, bool) or tensor < 1:
                raise TypeError(f"tp_size={tensor!r}")
        except (KeyError, TypeError) as error:
            raise RolloutError(f"{url}/server_info is not that of an SGLang server: {error!r}") from error
        if pipeline != 1 or data != 1:
            raise WeightSyncError(f"{url}: only tensor-parallel servers can be updated (pp_size=1, dp_size=1)")
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype):
            raise WeightSyncError(f"{url}: start it with an explicit --dtype, not {name!r}")
        return Layout(tensor=tensor, cuda=cuda, dtype=dtype)

    # -------------------------------------------------------------------------------------------- an update

    def update(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """Send all weights, and let the servers that have them go on.

        Args:
            named_tensors: Hugging Face names and full tensors, one after another; a tensor may be
                overwritten as soon as the next one is asked for. It is run to its end in any case.
            version: what the servers call these weights from now on.

        Raises:
            ServersOut: no server is left of those that answered at the beginning.
            WeightSyncError: names the phase and what the servers said. The servers stay paused.
        """
        source = _Source(named_tensors)
        try:
            return self._runner.run(self._update(source, version))
        except Exception:
            if not source.failed:
                source.drain()
            raise

    async def _update(self, source: _Source, version: int) -> SyncReport:
        begin = time.monotonic()
        async with self._phase("connect"):
            self._members = await self._roll_call()
            if not self._members:
                self.pool.stalled()
                raise ServersOut(f"no server answers: {self.pool.describe()}")
            await self._each("pause", "/pause_generation", {"mode": "retract"}, self._client.probe_timeout)
            if self._lost_group:
                await self._transport.leave()
                self._lost_group = False
            expected = self._expected()
            await self._together("connect", _nothing_more)
            await self._drop("begin", await self._transport.begin())
        sent = await self._send(source, expected)
        digest = ""
        if self.config.verify:
            async with self._phase("verify"):
                digest = await self._verify(expected)
        async with self._phase("continue"):
            await self._continue(version)
        return SyncReport(version, time.monotonic() - begin, sent.nbytes, sent.tensors, digest)

    @contextlib.asynccontextmanager
    async def _phase(self, name: str) -> AsyncIterator[None]:
        """Turn a failure into a ``WeightSyncError`` that names the phase, and clean up behind it."""
        try:
            yield
        except (MapoError, RuntimeError, TimeoutError) as error:
            await self._transport.reset()
            if isinstance(error, ServersOut):
                raise
            raise WeightSyncError(
                f"weight sync ({self.config.mode.value}) failed in phase {name!r}, the servers stay paused: {error}"
            ) from error

    def _workers(self) -> dict[str, int]:
        return {url: self._layouts[url].tensor for url in self._members}

    async def _drop(self, phase: str, failures: Mapping[str, Exception]) -> None:
        """Go on without the servers that failed.

        Raises:
            ServersOut: none is left.
            The failure, if none is left and one of them answered: another try would end in the same way.
        """
        for url, failure in failures.items():
            self.pool.take_out(url, f"weight sync, {phase}: {failure}{_hint(phase)}")
        self._members = [url for url in self._members if url not in failures]
        if self._members:
            return
        for failure in failures.values():
            if isinstance(failure, Refused | WeightSyncError):
                for url in failures:  # all said no: that is not their fault
                    self.pool[url].times_out = 0
                raise failure
        self.pool.stalled()
        raise ServersOut(f"no server is left in the weight sync: {self.pool.describe()}")

    async def _each(
        self, phase: str, path: str, body: dict[str, Any] | None = None, timeout: float = 0.0
    ) -> dict[str, Any]:
        """One request to every server of this update; answers of those that gave one."""
        answers, failures = await self._client.on_each(self._members, path, body, timeout)
        await self._drop(phase, failures)
        return answers

    async def _together(self, phase: str, work: Callable[[], Awaitable[None]]) -> None:
        """``work`` in one connection with all servers of this update. After a failure: again, with the survivors.

        Raises:
            ServersOut: there are none.
            WeightSyncError: it failed twice with the same servers.
        """
        failed_with: list[str] = []

        async def connected() -> None:
            await self._transport.connect(self._workers())
            await work()

        while True:
            try:
                await self._watched(connected())
                return
            except (RolloutError, RuntimeError, TimeoutError) as error:
                silent: dict[str, Exception] = dict(await self._transport.leave())
                answering = await self._roll_call([url for url in self._members if url not in silent])
                silent |= {url: error for url in self._members if url not in answering and url not in silent}
                if not silent and failed_with == self._members:
                    self._hopeless(phase, error)
                failed_with = [url for url in self._members if url not in silent]
                await self._drop(phase, silent)

    def _hopeless(self, phase: str, error: Exception) -> NoReturn:
        hint = ""
        if phase == "connect":
            hint = (
                "; the servers answer, but no process group reaches them: set rollout.sync.mode=disk, or open the way"
            )
        raise WeightSyncError(f"twice with {', '.join(self._members)}: {error}{hint}") from error

    async def _watched(self, work: Awaitable[None]) -> None:
        """Do ``work``, and stop waiting for it when a server of this update does not answer any more."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait((task,), timeout=WATCH_SECONDS))[0]:
                probes = asyncio.gather(*map(self._client.model_info, self._members))
                await asyncio.wait((task, probes), return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    probes.cancel()
                    await asyncio.gather(probes, return_exceptions=True)
                else:
                    probes.result()
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _expected(self) -> list[Expected]:
        """One checksum collector for every layout among the servers; none without verification."""
        if not self.config.verify:
            return []
        shape = ModelShape.read(Path(self._model_path) / "config.json", any_family=True)  # the trainer knows it
        return [Expected(layout, shape) for layout in dict.fromkeys(self._layouts[url] for url in self._members)]

    def _make_transport(self) -> Transport:
        if self.config.mode is SyncMode.disk:
            return DiskTransport(self._client, self._model_path, self._disk_dir, self.config.timeout)
        return BroadcastTransport(self._client, self._device, self.config.timeout)

    async def _send(self, source: _Source, expected: list[Expected]) -> _Sent:
        sent = _Sent()
        bucket = Bucket(self.config.bucket_mb * MIB, self._device)
        for name, tensor in source:
            if not bucket.fits(tensor):
                async with self._phase("send"):
                    await self._together("send", lambda: self._transport.send(bucket))
                bucket.clear()
            copy = bucket.add(name, tensor)
            for one in expected:
                one.add(name, copy)
            sent.nbytes += tensor.nbytes
            sent.tensors += 1
        async with self._phase("send"):
            if not sent.tensors:
                raise WeightSyncError("the trainer gave no tensors")
            await self._together("send", lambda: self._transport.send(bucket))
            await self._drop("load", await self._transport.end(self._members))
        return sent

    async def _verify(self, expected: list[Expected]) -> str:
        answers = await self._each("verify", "/weights_checker", {"action": "checksum"})
        by_layout = {one.layout: one for one in expected}
        failures: dict[str, Exception] = {}
        for url, answer in answers.items():
            try:
                ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
                by_layout[self._layouts[url]].compare(url, [rank["checksums"] for rank in ranks])
            except WeightSyncError as error:
                failures[url] = error
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                failures[url] = RolloutError(f"{url}/weights_checker: not checksums: {error!r}")
        await self._drop("verify", failures)
        total = hashlib.sha256()
        for name, value in sorted(expected[0].by_rank[0].items()):
            total.update(f"{name}={value}\n".encode())
        return total.hexdigest()[:16]

    async def _continue(self, version: int) -> None:
        """Name the version and let the servers go on; only those of which that is certain serve."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._each("continue", "/update_weight_version", body)
        await self._each("continue", "/flush_cache")
        await self._each("continue", "/continue_generation", {"torch_empty_cache": False})
        for url in self._members:
            self._updated.add(url)
            self.pool.admit(url, version)
        for url in self.pool.in_state(State.serving):
            if url not in self._members:
                self.pool.take_out(url, f"it did not get weight version {version}")


def _hint(phase: str) -> str:
    """What to do if servers answer requests but cannot join a process group."""
    return " (if the network does not let them join: rollout.sync.mode=disk)" if phase == "connect" else ""


async def _nothing_more() -> None:
    """``_together`` connects first."""
