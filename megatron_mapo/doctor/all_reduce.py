"""An all-reduce over processes of this machine; the module is also the program of each of them."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mapo.config import Config
from megatron_mapo.doctor.finding import Finding, failure, ok
from megatron_mapo.hardware import has_accelerator
from megatron_mapo.launch.local import trainer_environments
from megatron_mapo.launch.processes import Kept, supervise

SECONDS = 120.0


def check(config: Config) -> Iterator[Finding]:
    """gloo over two processes, which every run needs; NCCL over all GPUs."""
    yield _reduce(config, "gloo", 2)
    if has_accelerator():
        yield _reduce(config, "nccl", torch.cuda.device_count())


def _reduce(config: Config, backend: str, processes: int) -> Finding:
    command = [sys.executable, "-m", "megatron_mapo.doctor.all_reduce", backend]
    environments = trainer_environments(os.environ, config, processes)
    deadline = time.monotonic() + SECONDS

    def in_time() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    name = f"all-reduce ({backend})"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = [Path(folder) / f"rank{rank}" for rank in range(processes)]
        ranks = [stack.enter_context(Kept(command, e, log)) for e, log in zip(environments, logs, strict=True)]
        try:
            code = supervise(ranks, in_time)
        except TimeoutError:
            return failure(name, f"{processes} processes did not meet within {SECONDS:g} s", _fix(backend))
        said = [text for log in logs if (text := log.read_text(errors="replace").strip())]
    if code:
        return failure(name, said[0].splitlines()[-1] if said else f"exit code {code}", _fix(backend))
    return ok(name, f"{processes} process{'es' if processes > 1 else ''}")


def _fix(backend: str) -> str:
    if backend == "nccl":
        return "NCCL_DEBUG=INFO megatron-mapo doctor --quick; nvidia-smi topo -m"
    return "unset GLOO_SOCKET_IFNAME, or set it to an interface that `ip addr` lists"


def main(backend: str) -> int:
    """One rank, told by torchrun's variables: 1 + 2 + ... over all ranks."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=SECONDS / 2))
    try:
        value = torch.tensor([dist.get_rank() + 1.0], device=device)
        dist.all_reduce(value)
        count = dist.get_world_size()
        if value.item() != count * (count + 1) / 2:
            raise SystemExit(f"the sum over {count} ranks is {value.item():g}, not {count * (count + 1) / 2:g}")
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
