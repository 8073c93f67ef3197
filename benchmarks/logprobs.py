"""Log-probs of labels from hidden states: ours, torch's and megatron's, in time and memory, in one run.

Shapes: S tokens, H hidden size, V vocabulary. Every method goes from hidden states ``[S, H]`` and the output
matrix ``[V, H]`` to the log-probs ``[S]`` of the labels, and back to both gradients:

- ``chunked``: ``megatron_mapo.megatron.logprobs.chunked_logprobs``; it gives entropies too.
- ``torch``: logits in float32, ``log_softmax`` and ``gather``.
- ``torch+entropy``: the same, and the entropies.
- ``megatron``: logits in float32, ``vocab_parallel_cross_entropy`` (which overwrites them).

Linux only: peak memory comes from /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, machine_lines, usable_cores
from report import markdown_table, write_results
from torch import Tensor

import megatron_mapo.megatron  # noqa: F401  # prepares megatron-core for this machine
from megatron_mapo.config import Dtype
from megatron_mapo.hardware import native_dtype
from megatron_mapo.megatron.logprobs import chunked_logprobs

Method = Callable[[Tensor, Tensor, Tensor], Tensor]
_MIB = 2**20


def _chunked(chunk: int) -> Method:
    return lambda hidden, weight, labels: chunked_logprobs(hidden, weight, labels, chunk=chunk)[0]


def _torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprobs = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    return logprobs.gather(1, labels[:, None])[:, 0]


def _torch_with_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprobs = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    with torch.no_grad():
        torch.special.entr(logprobs.exp()).sum(-1)
    return logprobs.gather(1, labels[:, None])[:, 0]


def _megatron(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = (hidden @ weight.t()).float()
    return -vocab_parallel_cross_entropy(logits[:, None], labels[:, None])[:, 0]


def _start_megatron() -> None:
    """A tensor-parallel group of one."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def _peak_extra_bytes(work: Callable[[], Any]) -> int:
    """Most memory that ``work`` held at one time beyond what there was before."""
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would not show as new memory
    Path("/proc/self/clear_refs").write_text("5")  # the kernel then counts the peak from here
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


class _Case:
    """Fixed inputs, and one forward or one forward and backward pass of a method on them."""

    def __init__(self, tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.randn(vocab, hidden, generator=generator).mul_(0.05).to(dtype).requires_grad_()
        self.labels = torch.randint(vocab, (tokens,), generator=generator)
        self.slopes = torch.randn(tokens, generator=generator)

    def forward(self, method: Method) -> Tensor:
        return method(self.hidden, self.weight, self.labels).detach()

    def both(self, method: Method) -> tuple[Tensor, ...]:
        logprobs = method(self.hidden, self.weight, self.labels)
        return torch.autograd.grad((logprobs * self.slopes).sum(), [self.hidden, self.weight])


def measure(case: _Case, methods: dict[str, Method], runs: int) -> dict[str, dict[str, float]]:
    """Median seconds and peak extra memory of each method; the methods take turns in every run."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    extra: dict[str, list[int]] = {name: [] for name in methods}
    expected, slope = case.forward(_torch), case.both(_torch)[0]
    found: dict[str, dict[str, float]] = {}
    for name, method in methods.items():  # also the warm-up
        error = (case.forward(method) - expected).abs().max()
        off = (case.both(method)[0] - slope).float().norm() / slope.float().norm()
        found[name] = {"logprob_error_max": float(error), "gradient_error": float(off)}
    for _ in range(runs):
        for name, method in methods.items():
            start = time.perf_counter()
            case.both(method)
            seconds[name].append(time.perf_counter() - start)
            extra[name].append(_peak_extra_bytes(partial(case.both, method)))
    for name in methods:
        found[name] |= {
            "seconds": statistics.median(seconds[name]),
            "peak_extra_mib": statistics.median(extra[name]) / _MIB,
        }
        found[name]["time_ratio"] = found[name]["seconds"] / statistics.median(seconds["torch"])
    return found


def _markdown(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['seconds']:.3f}",
            f"{row['time_ratio']:.2f}",
            f"{row['peak_extra_mib']:.0f}",
            f"{row['logprob_error_max']:.1e}",
            f"{row['gradient_error']:.1e}",
        ]
        for name, row in result["methods"].items()
    ]
    s = result["settings"]
    head = ["method", "seconds", "time / torch", "peak extra MiB", "log-prob error", "gradient error"]
    return "\n".join(
        [
            "# Log-probs from hidden states",
            "",
            f"{s['tokens']} tokens, hidden size {s['hidden']}, vocabulary {s['vocab']}, {s['dtype']}, forward and "
            f"backward; medians of {s['runs']} runs in which the methods take turns. Errors are against `torch`: the "
            "largest of a log-prob, and the relative norm of the hidden states' gradient.",
            "",
            *markdown_table(head, rows),
            "",
            "## Machine",
            "",
            *machine_lines(result["machine"]),
            "",
        ]
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare the time and peak memory of ways to get log-probs (forward and backward) in one run."
    )
    parser.add_argument("--tokens", type=int, default=2048, metavar="S", help="tokens (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=576, metavar="H", help="hidden size (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=49152, metavar="V", help="vocabulary (default: %(default)s)")
    parser.add_argument(
        "--chunk", type=int, default=256, metavar="C", help="actor.logprob_chunk (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs of each method (default: %(default)s)")
    parser.add_argument("--dtype", choices=[d.value for d in Dtype], default="auto", help="auto: what is fast here")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/ beside this file)")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write JSON and Markdown."""
    arguments = _parse()
    dtype = native_dtype() if arguments.dtype == "auto" else Dtype(arguments.dtype)
    machine = describe_machine()
    torch.set_num_threads(usable_cores())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _start_megatron()
    case = _Case(arguments.tokens, arguments.hidden, arguments.vocab, getattr(torch, dtype.value))
    methods = {
        "chunked": _chunked(arguments.chunk),
        "torch": _torch,
        "torch+entropy": _torch_with_entropy,
        "megatron": _megatron,
    }
    settings = {k: getattr(arguments, k) for k in ("tokens", "hidden", "vocab", "chunk", "runs")}
    result = {
        "benchmark": "logprobs",
        "settings": {**settings, "dtype": dtype.value},
        "machine": machine,
        "methods": measure(case, methods, arguments.runs),
    }
    write_results("logprobs", result, _markdown(result), arguments.out)


if __name__ == "__main__":
    main()
