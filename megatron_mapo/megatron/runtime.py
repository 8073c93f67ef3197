"""Device, process groups, seeds, threads. The only file that asks which device there is."""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_mapo.config import Config, data_parallel_size
from megatron_mapo.ports import free_port
from megatron_mapo.rendezvous import meeting_place

T = TypeVar("T")


@dataclass
class Runtime:
    """This process among the trainers.

    Attributes:
        device: where the model lives.
        rank: global rank.
        world_size: number of trainer processes.
        control_group: gloo group of all ranks, for small CPU data.
    """

    device: torch.device
    rank: int
    world_size: int
    control_group: dist.ProcessGroup
    _probe: torch.Tensor | None = None

    @property
    def is_main(self) -> bool:
        """Rank 0: it talks to the servers, writes logs and prints."""
        return self.rank == 0

    def broadcast(self, value: T | None) -> T:
        """Rank 0's ``value`` (any picklable object of our own making) on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, on every rank, in rank order."""
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, value, group=self.control_group)
        return out

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control_group)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards is right."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wait_for_compute(self) -> None:
        """Wait for this rank's own kernels, not for collectives on other streams."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def peak_memory_gib(self) -> float:
        """Most memory in use so far: of the device on CUDA, of the process on CPU (GiB)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def probe_seconds(self) -> float:
        """Seconds of a fixed piece of work on this rank's device, without communication: the least of three."""
        if self._probe is None:
            self._probe = torch.ones(256, 256, device=self.device)
        found = []
        for _ in range(3):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(8):
                torch.mm(self._probe, self._probe)
            self.synchronize()
            found.append(time.perf_counter() - start)
        return min(found)

    def close(self) -> None:
        """Leave all process groups."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _own_gpu(local_rank: int) -> torch.device:
    """Of this node's; a launcher may bind one to each rank, which then sees no other."""
    return torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)


def initialize(config: Config) -> Runtime:
    """Join the process group of torchrun (or be alone), and build megatron's groups.

    Raises:
        ConfigError: ``actor.parallel`` does not divide the number of processes.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({k: str(v) for k, v in alone.items()})
    world_size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
    parallel = config.actor.parallel
    data_parallel_size(config, world_size)
    if torch.cuda.is_available():
        device = _own_gpu(local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        threads = config.trainer.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
        torch.set_num_threads(threads)
    timeout = datetime.timedelta(seconds=config.trainer.collective_timeout)
    if not dist.is_initialized():
        rank = int(os.environ["RANK"])
        store = meeting_place(rank, world_size, timeout)
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=max(1, int(config.trainer.collective_timeout // 60)),
    )
    torch.manual_seed(config.run.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Runtime(device, dist.get_rank(), world_size, control)
