"""New weights to all servers: pause, send, verify, set the version, continue."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mapo.config import SyncConfig, SyncMode
from megatron_mapo.errors import MapoError, WeightSyncError
from megatron_mapo.rollout.checksum import Expected, Layout, ModelShape
from megatron_mapo.rollout.client import RolloutClient
from megatron_mapo.rollout.weight_transport import BroadcastTransport, Bucket, DiskTransport, Transport

MIB = 2**20


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
    """Updates all servers. Runs on one trainer rank only; synchronous.

    A failed update leaves the servers paused, so that no response is ever sampled with half of an
    update; the next ``update`` starts from the beginning and may succeed.

    Args:
        config: section ``rollout.sync``.
        urls: the servers.
        api_key: their key, if they ask for one.
        model_path: model folder: its config says how servers fuse and cut the weights; in ``disk``
            mode its small files go beside the weights.
        run_dir: the folder ``weights`` in it serves ``disk`` mode when ``config.disk_dir`` is not set.
        device: of the buckets; NCCL on CUDA, gloo on CPU.

    Raises:
        RolloutError: ``urls`` is empty.
    """

    def __init__(
        self,
        config: SyncConfig,
        urls: Sequence[str],
        api_key: str | None,
        model_path: str | Path,
        run_dir: str | Path,
        device: torch.device,
    ) -> None:
        self.config = config
        self._client = RolloutClient(urls, api_key, config.timeout)
        self._model_path = Path(model_path)
        self._disk_dir = Path(config.disk_dir) if config.disk_dir else Path(run_dir) / "weights"
        self._device = device
        self._runner = asyncio.Runner()
        self._layouts: list[Layout] = []
        self._transport: Transport | None = None
        # a trainer that died may have left an update open on the servers
        self._unfinished = True

    def close(self) -> None:
        """Leave the servers' process group and close the connections."""
        if self._transport is not None:
            self._runner.run(self._transport.close())
        self._runner.run(self._client.close())
        self._runner.close()

    def update(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """Send all weights, and let the servers go on with them.

        Args:
            named_tensors: Hugging Face names and full tensors, one after another; a tensor may be
                overwritten as soon as the next one is asked for. It is run to its end in any case.
            version: what the servers call these weights from now on.

        Raises:
            WeightSyncError: names the server and the phase. The servers stay paused.
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
        limit = self.config.timeout
        async with self._phase("pause"):
            await self._client.pause(limit)
        async with self._phase("connect"):
            expected = await self._expected()
        sent = await self._send(source, expected)
        digest = ""
        if self.config.verify:
            async with self._phase("verify"):
                digest = await self._verify(expected)
        async with self._phase("continue"):
            body = {"new_version": str(version), "abort_all_requests": False}
            await self._client.on_all("/update_weight_version", body, limit)
            await self._client.flush_cache(limit)
            await self._client.resume(limit)
        return SyncReport(version, time.monotonic() - begin, sent.nbytes, sent.tensors, digest)

    @contextlib.asynccontextmanager
    async def _phase(self, name: str) -> AsyncIterator[None]:
        """Turn a failure into a ``WeightSyncError`` that names the phase, and clean up behind it."""
        try:
            yield
        except (MapoError, RuntimeError, TimeoutError) as error:
            if self._transport is not None:
                await self._transport.reset()
            raise WeightSyncError(
                f"weight sync ({self.config.mode.value}) failed in phase {name!r}, the servers stay paused: {error}"
            ) from error

    async def _expected(self) -> list[Expected]:
        """One checksum collector for every layout among the servers; none without verification."""
        if not self._layouts:
            self._layouts = [await self._layout(url) for url in self._client.urls]
        if not self.config.verify:
            return []
        shape = ModelShape.of(self._model_path)
        return [Expected(layout, shape) for layout in dict.fromkeys(self._layouts)]

    async def _layout(self, url: str) -> Layout:
        info = await self._client.request(url, "/server_info", method="GET", timeout=self.config.timeout)
        if info["pp_size"] != 1 or info["dp_size"] != 1:
            raise WeightSyncError(f"{url}: only tensor-parallel servers can be updated (pp_size=1, dp_size=1)")
        dtype = getattr(torch, info["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise WeightSyncError(f"{url}: start it with an explicit --dtype, not {info['dtype']!r}")
        return Layout(tensor=info["tp_size"], cuda=info["device"] == "cuda", dtype=dtype)

    def _make_transport(self) -> Transport:
        if self.config.mode is SyncMode.disk:
            return DiskTransport(self._client, self._model_path, self._disk_dir, self.config.timeout)
        workers = [layout.tensor for layout in self._layouts]
        return BroadcastTransport(self._client, workers, self._device, self.config.timeout)

    async def _send(self, source: _Source, expected: list[Expected]) -> _Sent:
        sent = _Sent()
        bucket = Bucket(self.config.bucket_mb * MIB, self._device)
        async with self._phase("begin"):
            self._transport = transport = self._transport or self._make_transport()
            if self._unfinished:
                await transport.reset()
            self._unfinished = True
            await transport.begin()
        for name, tensor in source:
            if not bucket.fits(tensor):
                async with self._phase("send"):
                    await transport.send(bucket)
                bucket.clear()
            copy = bucket.add(name, tensor)
            for one in expected:
                one.add(name, copy)
            sent.nbytes += tensor.nbytes
            sent.tensors += 1
        async with self._phase("send"):
            if not sent.tensors:
                raise WeightSyncError("the trainer gave no tensors")
            await transport.send(bucket)
            await transport.end()
        self._unfinished = False
        return sent

    async def _verify(self, expected: list[Expected]) -> str:
        answers = await self._client.on_all("/weights_checker", {"action": "checksum"}, self.config.timeout)
        by_layout = {one.layout: one for one in expected}
        for url, layout, answer in zip(self._client.urls, self._layouts, answers, strict=True):
            ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
            by_layout[layout].compare(url, [rank["checksums"] for rank in ranks])
        total = hashlib.sha256()
        for name, value in sorted(expected[0].by_rank[0].items()):
            total.update(f"{name}={value}\n".encode())
        return total.hexdigest()[:16]
