"""How weights travel to the servers: broadcast in buckets, or files in a shared folder."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _abort_process_group,
    _new_process_group_helper,
    _world,
)

from megatron_mapo.errors import RolloutError, WeightSyncError
from megatron_mapo.rollout.client import Refused, RolloutClient
from megatron_mapo.rollout.server import is_loopback

CLEANUP_SECONDS = 10.0
"""Most time that a server gets to answer while a failed update is being cleaned up."""
LEAVE_SECONDS = 1.0
"""How long servers may take to leave a group before this process breaks it from its side."""

Failures = dict[str, RolloutError]
"""What servers failed with, by address."""


class Transport(Protocol):
    """Moves one update to several servers."""

    async def connect(self, workers: Mapping[str, int]) -> None:
        """Get ready to ``send`` to these servers, given with the number of their workers; all or none."""

    async def begin(self) -> Failures:
        """Open the update on every connected server; the failures of those that did not."""

    async def send(self, bucket: Bucket) -> None:
        """Move one bucket to all connected servers, or raise. May be repeated after a failure."""

    async def end(self, urls: Sequence[str]) -> Failures:
        """Finish the update: these servers hold the new weights, but for those that failed."""

    async def leave(self) -> Failures:
        """Take the connection apart after a failed ``connect`` or ``send``; those that do not even answer to that."""

    async def reset(self) -> None:
        """Forget a failed update, so that a next one can begin. Does not raise."""

    async def close(self) -> None:
        """Release what is held between updates."""


class Bucket:
    """Tensors of one dtype, copied one after another into one flat buffer.

    This is sglang's ``flattened_bucket`` format: the bytes of the tensors without gaps, in the order
    of their names. One dtype a bucket keeps every tensor aligned.

    Args:
        limit: bytes; a single larger tensor makes a bucket of its own.
        device: of the buffer, that of the tensors.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.tensors: list[tuple[str, Tensor]] = []
        self.nbytes = 0

    def fits(self, tensor: Tensor) -> bool:
        """Whether ``add`` may take ``tensor`` without exceeding the limit."""
        if not self.tensors:
            return True
        return self.tensors[0][1].dtype == tensor.dtype and self.nbytes + tensor.nbytes <= self.limit

    def add(self, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor in.

        Returns:
            The copy: contiguous, and valid until ``clear``.
        """
        needed = self.nbytes + tensor.nbytes
        if needed > len(self._buffer):
            # only ever for the first tensor of a bucket: the buffer grows to the limit at once
            self._buffer = torch.empty(max(needed, self.limit), dtype=torch.uint8, device=self.device)
        copy = self._buffer[self.nbytes : needed].view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor.detach())
        self.tensors.append((name, copy))
        self.nbytes = needed
        return copy

    @property
    def flat(self) -> Tensor:
        """uint8 ``[nbytes]``, contiguous."""
        return self._buffer[: self.nbytes]

    def clear(self) -> None:
        """Forget the tensors, keep the memory."""
        self.tensors = []
        self.nbytes = 0


def _address_towards(url: str) -> str:
    """This machine's address as the server at ``url`` sees it."""
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    if is_loopback(host):
        return "127.0.0.1"
    family, kind, *_, address = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: a datagram socket only looks up the route
        return probe.getsockname()[0]


def _listener(addresses: Iterable[str]) -> socket.socket:
    """A socket that only those who reach this machine at one of these addresses can connect to.

    torch's own store listens on every interface. Servers of this machine also reach an address that others need, so
    loopback is left out where there is another. Several others, of several networks, take every interface.
    """
    wanted = set(addresses)
    if len(wanted) > 1:
        wanted.discard("127.0.0.1")
    host = wanted.pop() if len(wanted) == 1 else "0.0.0.0"
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


class _Group:
    """A process group of this process (rank 0) and the workers of some servers.

    It has a store of its own and stands apart from the trainer's process groups. The servers join it in
    ``sglang.srt.utils.init_custom_process_group``; both sides build it with the same function of torch, so that they
    agree on the keys in the store.
    """

    def __init__(self, client: RolloutClient, workers: Mapping[str, int], device: torch.device, timeout: float) -> None:
        self.client = client
        self.workers = dict(workers)
        self.device = device
        self.timeout = timeout
        self.name = f"megatron-mapo-{uuid.uuid4().hex[:12]}"
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._group: dist.ProcessGroup | None = None
        self._store: dist.TCPStore | None = None
        self._left = False

    async def join(self) -> None:
        """Form the group."""
        world = 1 + sum(self.workers.values())
        limit = timedelta(seconds=self.timeout)
        towards = {url: _address_towards(url) for url in self.workers}
        listener = _listener(towards.values())
        host, port = listener.getsockname()[:2]
        every = host == "0.0.0.0"
        here = "127.0.0.1" if every else host
        self._store = dist.TCPStore(
            *(here, port, world),
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        # With a connection of its own: dropping `_store` then ends the store, and with it everybody's wait in it.
        own = dist.TCPStore(here, port, world, is_master=False, timeout=limit, wait_for_workers=False)
        prefix = PrefixStore(self.name, own)
        calls, offset = [], 1
        for url, workers in self.workers.items():
            body = {
                "master_address": towards[url] if every else host,
                "master_port": port,
                "rank_offset": offset,
                "world_size": world,
                "group_name": self.name,
                "backend": self._backend,
            }
            calls.append(self.client.request(url, "/init_weights_update_group", body, timeout=self.timeout))
            offset += workers
        await _both(asyncio.gather(*calls), lambda: self._build(world, prefix))

    def _build(self, world: int, store: PrefixStore) -> None:
        group, _ = _new_process_group_helper(
            world,
            0,
            [],
            Backend(self._backend),
            store,
            group_name=self.name,  # type: ignore[arg-type]
            # A collective of NCCL that reaches this limit ends the process. Requests fail before; `leave` aborts it.
            timeout=timedelta(seconds=self.timeout * (2 if self._backend == "nccl" else 1)),
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        if not self._left:
            self._group = group

    async def broadcast(self, body: dict[str, Any], flat: Tensor) -> None:
        """Send ``flat`` to the servers, with the request that tells them what it is."""
        calls = [
            self.client.request(
                url, "/update_weights_from_distributed", {**body, "group_name": self.name}, timeout=self.timeout
            )
            for url in self.workers
        ]
        await _both(asyncio.gather(*calls), lambda: self._broadcast(flat))

    def _broadcast(self, flat: Tensor) -> None:
        group = self._group
        assert group is not None
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            group.broadcast([flat], options).wait()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    async def leave(self) -> Failures:
        """Take the group apart; the failures of servers that do not answer."""
        self._left = True
        group, self._group = self._group, None
        limit = min(self.timeout, CLEANUP_SECONDS)
        asked = asyncio.ensure_future(
            self.client.on_each(self.workers, "/destroy_weights_update_group", {"group_name": self.name}, limit)
        )
        # the servers first: it breaks a collective in which this process still waits
        await asyncio.wait((asked,), timeout=LEAVE_SECONDS)
        # and this breaks one in which they wait
        self._store = None
        # The whole process may have left all of its groups before.
        if group is not None and _world.pg_map.get(group) is not None:
            await _break(group, self._backend)
        del group  # only when the last reference is gone are its connections closed
        return {url: failure for url, failure in (await asked)[1].items() if not isinstance(failure, Refused)}


async def _break(group: dist.ProcessGroup, backend: str) -> None:
    """End a group, and with it a collective in which it stands.

    NCCL waits for its kernels unless it is told to abort, and one whose peer is dead never ends. The abort itself may
    take its time, so nothing here waits for it longer than for a server.
    """
    if backend != "nccl":
        dist.destroy_process_group(group)
        return
    thread = threading.Thread(target=_abort_process_group, args=(group,), daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, CLEANUP_SECONDS)


class BroadcastTransport:
    """Broadcasts of buckets.

    On CUDA there is one group of this process and all workers of all servers (NCCL). With gloo each server has a group
    of its own: gloo hands data on from member to member, and one that hangs would hold up those behind it.

    Args:
        client: talks to the servers.
        device: of the tensors: NCCL on CUDA, gloo on CPU.
        timeout: seconds for one request or collective.
    """

    def __init__(self, client: RolloutClient, device: torch.device, timeout: float) -> None:
        self.client = client
        self.device = device
        self.timeout = timeout
        self._groups: list[_Group] = []
        self._workers: dict[str, int] = {}

    async def connect(self, workers: Mapping[str, int]) -> None:
        """Join groups with these servers, unless they are those of the present groups."""
        if self._groups and dict(workers) == self._workers:
            return
        await self.leave()
        self._workers = dict(workers)
        parts = [workers] if self.device.type == "cuda" else [{url: count} for url, count in workers.items()]
        self._groups = [_Group(self.client, part, self.device, self.timeout) for part in parts]
        await _all(group.join() for group in self._groups)

    async def begin(self) -> Failures:
        """Open the servers' update session, after one that a trainer that died has left open."""
        await self._end_sessions()
        return (await self.client.on_each(self._workers, "/begin_weight_update", {}, self.timeout))[1]

    async def send(self, bucket: Bucket) -> None:
        """Broadcast one bucket."""
        body = {
            "names": [name for name, _ in bucket.tensors],
            "shapes": [list(tensor.shape) for _, tensor in bucket.tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.tensors],
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await _all(group.broadcast(body, bucket.flat) for group in self._groups)

    async def end(self, urls: Sequence[str]) -> Failures:
        """Close the servers' update session."""
        return (await self.client.on_each(urls, "/end_weight_update", {}, self.timeout))[1]

    async def leave(self) -> Failures:
        """Take the groups apart; the failures of servers that do not answer."""
        groups, self._groups = self._groups, []
        failures: Failures = {}
        for found in await asyncio.gather(*(group.leave() for group in groups)):
            failures |= found
        return failures

    async def reset(self) -> None:
        """Leave the groups and close sessions that are still open; servers that do not answer are passed over."""
        await self.leave()
        await self._end_sessions()

    async def close(self) -> None:
        """Leave the groups."""
        await self.leave()

    async def _end_sessions(self) -> None:
        limit = min(self.timeout, CLEANUP_SECONDS)
        await self.client.on_each(self._workers, "/end_weight_update", {}, limit)


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all, to the end; then raise the first failure."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _both(request: Awaitable[object], local: Callable[[], None]) -> None:
    """Run a request and this process's part of the collective side by side.

    If the request fails, the collective has no partner and is not waited for: ``leave`` breaks it.
    """
    task = asyncio.ensure_future(request)
    thread = asyncio.get_running_loop().run_in_executor(None, _failure, local)
    try:
        await asyncio.wait((task, thread), return_when=asyncio.FIRST_COMPLETED)
        if thread.done() and thread.result() and not task.done():
            # the servers may know more than "connection closed by peer"
            await asyncio.wait((task,), timeout=LEAVE_SECONDS)
        if task.done():
            task.result()
        if failure := await thread:
            raise WeightSyncError(failure)
        await task
    finally:
        task.cancel()


def _failure(work: Callable[[], None]) -> str:
    """Do ``work``; what it failed with, as text: an exception's traceback would keep the group and its connections."""
    try:
        work()
    except (RuntimeError, TimeoutError) as error:
        return str(error) or repr(error)
    return ""


class DiskTransport:
    """Safetensors shards in a fresh folder, which the servers load.

    Args:
        client: talks to the servers.
        model_path: folder whose configuration and tokenizer files go beside the weights.
        folder: parent of the fresh folders; the servers must see it under the same path.
        timeout: seconds for the servers to load.
    """

    def __init__(self, client: RolloutClient, model_path: str | Path, folder: str | Path, timeout: float) -> None:
        self.client = client
        self.model_path = Path(model_path)
        self.folder = Path(folder)
        self.timeout = timeout
        self._target: Path | None = None
        self._index: dict[str, str] = {}
        self._bytes = 0
        self._shards = 0

    async def connect(self, workers: Mapping[str, int]) -> None:
        """Nothing to do: all servers read the same folder."""

    async def begin(self) -> Failures:
        """Make the folder and copy the model's small files."""
        self._index, self._bytes, self._shards = {}, 0, 0
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._target = Path(tempfile.mkdtemp(prefix="weights-", dir=self.folder))
            self._target.chmod(0o755)  # the servers may run as another user
            for file in self.model_path.iterdir():
                if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name:
                    shutil.copyfile(file, self._target / file.name)
        return {}

    async def send(self, bucket: Bucket) -> None:
        """Write one bucket as one shard."""
        assert self._target is not None
        name = f"model-{self._shards:05d}.safetensors"
        with self._disk_errors():
            if shutil.disk_usage(self._target).free < bucket.nbytes + 2**20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save_file(
                {key: tensor.cpu() for key, tensor in bucket.tensors}, self._target / name, metadata={"format": "pt"}
            )
            _sync(self._target / name)
        self._index.update(dict.fromkeys((key for key, _ in bucket.tensors), name))
        self._bytes += bucket.nbytes
        self._shards += 1

    async def end(self, urls: Sequence[str]) -> Failures:
        """Write the index, let the servers load, and delete older folders."""
        assert self._target is not None
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._index}
        with self._disk_errors():
            path = self._target / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True))
            _sync(path)
            _sync(self._target)
        body = {"model_path": str(self._target.absolute()), "flush_cache": False}
        _, failures = await self.client.on_each(urls, "/update_weights_from_disk", body, self.timeout)
        if len(failures) < len(urls):
            self._delete_others(self._target)
        return failures

    async def leave(self) -> Failures:
        """Nothing to take apart."""
        return {}

    async def reset(self) -> None:
        """Delete the unfinished folder."""
        if self._target is not None:
            shutil.rmtree(self._target, ignore_errors=True)
        self._target = None

    async def close(self) -> None:
        """Nothing is held: the last folder stays, since servers that restart load it."""

    def _delete_others(self, keep: Path) -> None:
        for folder in self.folder.glob("weights-*"):
            if folder != keep:
                shutil.rmtree(folder)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            what = "the disk is full" if full else str(error)
            raise WeightSyncError(f"{self.folder}: {what} (rollout.sync.disk_dir)") from error


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that another machine does not read it half-written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
