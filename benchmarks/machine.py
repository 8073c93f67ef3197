"""What a measurement ran on, how fast that multiplies matrices, and how much memory processes take."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
_RATE_SECONDS = 0.5
GIB = 2**30


def describe_machine() -> dict[str, Any]:
    """Processor, its vector units, cores, memory, load and versions, as JSON types.

    ``load_average`` is that of the last 1, 5 and 15 minutes: above about 0.2 before a measurement starts,
    something else uses the machine and the numbers are worth little.
    """
    cpu = _lscpu()
    flags = set(cpu.get("Flags", "").split())
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu.get("Model name", platform.processor() or "unknown"),
        "architecture": platform.machine(),
        "cpu_flags": {flag: flag in flags for flag in _CPU_FLAGS},
        "l3_cache": cpu.get("L3 cache", "unknown"),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _lscpu() -> dict[str, str]:
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    pairs = (line.partition(":") for line in lines.stdout.splitlines())
    return {key.strip(): re.sub(r"\s+", " ", value.strip()) for key, _, value in pairs}


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """``describe_machine`` as lines of a Markdown list."""
    flags = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in machine["cpu_flags"].items())
    loads = " / ".join(f"{load:.2f}" for load in machine["load_average"])
    return [
        f"- processor: {machine['cpu']} ({machine['architecture']}), {machine['cores']} cores",
        f"- L3 cache: {machine['l3_cache']}",
        f"- vector units: {flags}",
        f"- memory: {machine['memory_gib']} GiB",
        f"- GPUs: {', '.join(machine['gpus']) or 'none'}",
        f"- load average before the measurement (1 / 5 / 15 min): {loads}",
        f"- {machine['system']}, Python {machine['python']}, torch {machine['torch']}",
        f"- time: {machine['time']}",
    ]


def fastest_seconds(work: Callable[[], Any], least_seconds: float = _RATE_SECONDS, least_runs: int = 5) -> float:
    """Shortest time of ``work``, after one run that does not count: what disturbs a run can only make it longer."""
    work()
    times: list[float] = []
    while len(times) < least_runs or sum(times) < least_seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(rows: int, matrices: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> float:
    """FLOP/s of ``torch.mm`` over one pass through a model's matrices, with all usable cores.

    Args:
        rows: rows of the left operand (tokens).
        matrices: ``(inputs, outputs, count)`` of each kind of weight matrix.
        dtype: of both operands.

    Returns:
        All products' FLOPs (two a multiply-add) over all products' time, so that a kind of matrix counts as
        much as the model uses it.
    """
    torch.set_num_threads(usable_cores())
    flops = seconds = 0.0
    for inputs, outputs, count in matrices:
        left, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        out = torch.empty(rows, outputs, dtype=dtype)

        def product(left: torch.Tensor = left, weight: torch.Tensor = weight, out: torch.Tensor = out) -> None:
            torch.mm(left, weight.t(), out=out)

        flops += 2.0 * rows * inputs * outputs * count
        seconds += fastest_seconds(product) * count
    return flops / seconds


class MemoryWatch:
    """Peak memory of a process and its descendants while inside a ``with`` block, by kind of process.

    Memory is the proportional set size (a page shared by n processes counts 1/n to each), summed over the
    processes of a kind and sampled every ``interval`` seconds: a peak shorter than that can be missed.

    Args:
        pid: root of the process tree.
        kind: names the kind of a subtree by the command line of its first process, or None to look deeper.
            Processes in no named subtree are of kind ``other``.
        interval: seconds between two samples.

    Attributes:
        peak_gib: most memory of each kind so far.
    """

    def __init__(self, pid: int, kind: Callable[[list[str]], str | None], interval: float = 1.0) -> None:
        self.peak_gib: dict[str, float] = {}
        self._root, self._kind, self._interval = psutil.Process(pid), kind, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            used: dict[str, float] = {}
            self._add(self._root, "other", used)
            for name, size in used.items():
                self.peak_gib[name] = max(self.peak_gib.get(name, 0.0), size / GIB)

    def _add(self, process: psutil.Process, inherited: str, used: dict[str, float]) -> None:
        try:
            name = self._kind(process.cmdline()) if inherited == "other" else inherited
            size, children = process.memory_full_info().pss, process.children()
        except psutil.NoSuchProcess:  # it ended while we looked
            return
        used[name or "other"] = used.get(name or "other", 0.0) + size
        for child in children:
            self._add(child, name or "other", used)
