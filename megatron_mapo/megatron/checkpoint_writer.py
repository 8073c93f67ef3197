"""Plan with megatron which rank writes what, copy it to host memory, and write it in a thread.

The files are those of megatron's ``torch_dist`` format. They are written by threads and not by megatron's forked
processes: those wait for ever when one of them is killed, and a fork of a process with CUDA, NCCL and open
connections is delicate. Writing, fsync and hashing release the interpreter's lock.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import xxhash
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_mapo.checkpoint_files import FileEntry

PARTS = ("weights", "optimizer", "other")


class Planner(TorchDistSaveShardedStrategy):
    """megatron's plan of which rank writes what into which file; it is kept instead of carried out.

    Attributes:
        writer: this rank's part of the plan.
        index: on rank 0, where every tensor will be.
    """

    writer: FileSystemWriterAsync
    index: Metadata | None

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: Any) -> AsyncRequest:
        self.writer, self.index = writer, planned[1]
        return AsyncRequest(None, (), [])


@dataclass
class Plan:
    """What this rank is to write.

    Attributes:
        writer: megatron's writer; it also writes the index when all is done.
        index: on rank 0, where every tensor will be.
        buckets: this rank's files and what goes into them.
        common: values that are no tensors, the same on all ranks; rank 0 writes them.
        parts: bytes of this rank's tensors and objects, by what they belong to (``PARTS``).
        shared: addresses of the storages of ``contents``. A tensor elsewhere is a copy that planning has made.
    """

    writer: FileSystemWriterAsync
    index: Metadata | None
    buckets: list[WriteBucket]
    common: dict[str, Any]
    parts: dict[str, int]
    shared: set[int]


def make_plan(contents: dict[str, Any], folder: Path) -> Plan:
    """Divide the work evenly over the ranks that hold the same tensors. Collective.

    Args:
        contents: sharded tensors and objects, and plain values that are the same on all ranks.
        folder: exists on all ranks.
    """
    sharded, common = save_preprocess(contents)
    shared = {_storage(value.data) for value in nested_values(sharded) if isinstance(value, ShardedTensor)}
    planner = Planner()
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    FullyParallelSaveStrategyWrapper(planner, copies).async_save(sharded, folder)
    buckets = planner.writer.write_buckets or []
    return Plan(planner.writer, planner.index, buckets, common, _bytes_of_parts(buckets), shared)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of_parts(buckets: list[WriteBucket]) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    for _, _, (objects, tensors) in buckets:
        parts["other"] += sum(data.getbuffer().nbytes for _, data in objects)
        for item, tensor in tensors:
            parts["optimizer" if item.index.fqn.startswith("optimizer.") else "weights"] += tensor.nbytes
    return parts


def write_common(plan: Plan, folder: Path) -> None:
    """Write ``common.pt``. On rank 0.

    Raises:
        OSError: it cannot be written.
    """
    TorchCommonSaveStrategy("torch", 1).save_common(plan.common, folder)


def stage(plan: Plan, device: torch.device) -> list[WriteBucket]:
    """The plan's files, with copies in host memory of all that the next update changes.

    The plan lets its tensors go one by one.
    """
    staged = []
    while plan.buckets:
        path, name, (objects, tensors) = plan.buckets.pop(0)
        copies = []
        while tensors:
            item, tensor = tensors.pop(0)
            if tensor.device.type != "cpu":
                tensor = tensor.to("cpu", non_blocking=True)
            elif _storage(tensor) in plan.shared:
                tensor = tensor.clone()
            copies.append((item, tensor))
        staged.append((path, name, (objects, copies)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return staged


@dataclass
class Written:
    """What one rank wrote: entries of the index, and a checksum a file."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileEntry] = field(default_factory=dict)


class Abandoned(Exception):
    """The checkpoint was given up while it was being written."""


class _HashingFile:
    """A file for writing that knows the checksum of what went through it."""

    def __init__(self, stream: BinaryIO, abandoned: threading.Event) -> None:
        self._stream, self._abandoned = stream, abandoned
        self._digest, self._size = xxhash.xxh3_128(), 0
        self.error: Exception | None = None

    def write(self, data: Any) -> int:
        try:
            if self._abandoned.is_set():
                raise Abandoned
            self._stream.write(data)
        except (OSError, Abandoned) as error:
            self.error = error  # torch raises another one on top of it
            raise
        self._digest.update(data)
        count = memoryview(data).nbytes
        self._size += count
        return count

    def flush(self) -> None:
        self._stream.flush()

    def tell(self) -> int:
        return self._size

    def entry(self) -> FileEntry:
        return FileEntry(self._size, self._digest.hexdigest())


def write(buckets: list[WriteBucket], transforms: Any, abandoned: threading.Event) -> Written:
    """Write this rank's files, durably. For a thread: no collective, no device.

    Raises:
        OSError: a file cannot be written.
        Abandoned: ``abandoned`` was set meanwhile.
    """
    written = Written()
    for path, name, (objects, tensors) in buckets:
        with open(path, "wb") as stream:
            file: Any = _HashingFile(stream, abandoned)
            try:
                for item, data in [*objects, *tensors]:
                    result = _write_item(transforms, file, data, item, name, SerializationFormat.TORCH_SAVE)
                    written.results.append(result)
            except RuntimeError as error:
                raise file.error or error from error
            stream.flush()
            os.fsync(stream.fileno())
        written.files[name] = file.entry()
    return written


def gather_to_main(value: Any, is_main: bool, world_size: int, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's ``value`` on rank 0, in rank order; an empty list elsewhere. Collective."""
    found: list[Any] | None = [None] * world_size if is_main else None
    dist.gather_object(value, found, dst=0, group=group)
    return found or []
