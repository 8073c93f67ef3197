"""How long a checkpoint holds training up, written synchronously and asynchronously; how long loading takes.

A random model of SmolLM2-135M's shape (134.5M parameters) in float32, with the distributed optimizer, one process.
The ways take turns. An update is one optimizer step on a few short sequences.

Linux only: peak memory comes from /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, machine_lines, usable_cores
from report import markdown_table, write_results
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mapo import checkpoint_files
from megatron_mapo.checkpoint_files import Retention
from megatron_mapo.config import Config, Dtype
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.megatron import checkpoint, runtime
from megatron_mapo.megatron.checkpoint import Checkpointer
from megatron_mapo.megatron.policy import Policy

_GIB = 2**30
_SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
}


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


class _Bench:
    """A policy, a batch, and the checkpoints of one run."""

    def __init__(self, folder: Path, tokens: int) -> None:
        config = Config()
        config.model.dtype = Dtype.float32
        self.process = runtime.initialize(config)
        model = folder / "model"
        with torch.random.fork_rng(devices=[]):
            LlamaForCausalLM(LlamaConfig(**_SHAPE, tie_word_embeddings=True)).save_pretrained(model)
        self.policy = Policy(config, self.process, model, total_updates=1000)
        self.batch = SequenceBatch.from_responses([[1] * 8] * 4, [[5] * (tokens // 4 - 8)] * 4, group_ids=[0] * 4)
        responses = len(self.batch.rollout_logprobs)
        self.columns = {"advantages": torch.ones(responses), "token_weight": torch.full((responses,), 1e-6)}
        self.folder = folder / "checkpoints"
        self.checkpointer = Checkpointer(self.process, self.folder, Retention(last=1))
        self.step = 0

    def update(self) -> None:
        """One optimizer step."""
        self.policy.update(self.batch, self.columns)

    def start(self) -> None:
        """What holds training up when a checkpoint is written asynchronously."""
        self.step += 1
        self.checkpointer.start(self.policy, self.step, {})

    def save(self) -> None:
        """A synchronous checkpoint."""
        self.start()
        self.checkpointer.wait()

    def finish(self) -> int:
        """Updates while a checkpoint is being written; at least one."""
        updates = 0
        while True:
            self.update()
            updates += 1
            if self.checkpointer.poll() is not None:
                return updates

    @property
    def path(self) -> Path:
        """The last checkpoint."""
        return checkpoint_files.complete_checkpoints(self.folder)[-1][1]


def _timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, most memory held beyond what there was before (GiB), and what ``work`` gave."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status_bytes("VmRSS"), time.perf_counter()
    value = work()
    return time.perf_counter() - start, (_status_bytes("VmHWM") - before) / _GIB, value


def measure(bench: _Bench, runs: int) -> dict[str, Any]:
    """Medians of all phases."""
    found: dict[str, list[tuple[float, float]]] = {}

    def record(name: str, work: Callable[[], Any]) -> Any:
        seconds, peak, value = _timed(work)
        found.setdefault(name, []).append((seconds, peak))
        return value

    bench.update()
    bench.save()  # the warm-up
    beside: list[float] = []
    for _ in range(runs):
        record("update", bench.update)
        record("save, synchronous", bench.save)
        record("save, asynchronous: held up", bench.start)
        updates = record("save, asynchronous: training until complete", bench.finish)
        beside.append(found["save, asynchronous: training until complete"][-1][0] / updates)
        record("verify checksums", lambda: checkpoint.verify(bench.process, bench.path, checksums=True))
        record("load", lambda: checkpoint.load(bench.policy, bench.process, bench.path))
    rows: dict[str, dict[str, float | None]] = {
        name: {"seconds": statistics.median(s for s, _ in values), "peak_extra_gib": max(p for _, p in values)}
        for name, values in found.items()
    }
    rows["update beside a save"] = {"seconds": statistics.median(beside), "peak_extra_gib": None}
    manifest = checkpoint_files.read_manifest(bench.path)
    assert manifest is not None
    return {"phases": rows, "bytes": sum(entry.size for entry in manifest.files.values())}


def _markdown(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['seconds']:.2f}",
            "" if row["peak_extra_gib"] is None else f"{row['peak_extra_gib']:.2f}",
        ]
        for name, row in result["phases"].items()
    ]
    s = result["settings"]
    return "\n".join(
        [
            "# Checkpoints",
            "",
            f"134.5M parameters (SmolLM2-135M's shape, random), float32, distributed optimizer, one process with "
            f"{s['threads']} threads; {result['bytes'] / _GIB:.2f} GiB a checkpoint, fsynced; updates of {s['tokens']} "
            f"tokens; medians of {s['runs']} runs in which the ways take turns. Peak memory is the most that a phase "
            "held at one time beyond what there was before it. Files that were just written are read from the page "
            "cache.",
            "",
            *markdown_table(["phase", "seconds", "peak extra GiB"], rows),
            "",
            "## Machine",
            "",
            *machine_lines(result["machine"]),
            "",
        ]
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time checkpoints, synchronous and asynchronous, and their loading.")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="of an update (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs of each way (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/ beside this file)")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write JSON and Markdown."""
    arguments = _parse()
    machine = describe_machine()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=arguments.folder))
    try:
        bench = _Bench(folder, arguments.tokens)
        result = {
            "benchmark": "checkpoint",
            "settings": {"tokens": arguments.tokens, "runs": arguments.runs, "threads": usable_cores()},
            "machine": machine,
            **measure(bench, arguments.runs),
        }
        bench.checkpointer.close()
        bench.process.close()
    finally:
        shutil.rmtree(folder)
    write_results("checkpoint", result, _markdown(result), arguments.out)


if __name__ == "__main__":
    main()
