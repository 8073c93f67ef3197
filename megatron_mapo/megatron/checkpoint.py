"""Save and resume everything: model, optimizer, schedule, RNG, and the loop's own state.

A checkpoint is a folder ``step_NNNNNN``. It is written as ``step_NNNNNN.partial`` and renamed when
every rank has written its part, so a folder under its final name is always complete.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mapo.errors import CheckpointError
from megatron_mapo.megatron.lora import adapted_layers
from megatron_mapo.megatron.model import PolicyModel
from megatron_mapo.megatron.policy import Policy
from megatron_mapo.megatron.runtime import Runtime

_NAME = re.compile(r"step_(\d{6,})")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run, oldest first, as (step, path)."""
    found = []
    for path in folder.glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_model(chunks: list[PolicyModel], metadata: dict[str, Any]) -> dict[str, Any]:
    """Cut tensors of every chunk. Their keys name the whole model's layers, whatever the layout.

    Under LoRA only the adapters: the frozen rest is in the model's folder.
    """
    adapted = any(True for _ in adapted_layers(chunks))
    state: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        whole = chunk.sharded_state_dict(metadata=metadata)
        state[f"chunk{i}"] = {key: value for key, value in whole.items() if not adapted or ".adapters." in key}
    return state


def _load_chunks(chunks: list[PolicyModel], state: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict({**chunk.state_dict(), **state[f"chunk{i}"]}, strict=True)


def _sharded_state(policy: Policy, runtime: Runtime, is_loading: bool) -> dict[str, Any]:
    """What megatron writes: cut tensors of model and optimizer, and one RNG state a rank."""
    metadata = _metadata()
    model = _sharded_model(policy.chunks, metadata)
    rng = {"torch": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(runtime.device)
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        "rng": ShardedObject("rng", rng, (runtime.world_size,), (runtime.rank,)),
    }


def save(policy: Policy, runtime: Runtime, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step``. Collective.

    Args:
        policy: model, optimizer and schedule to save.
        runtime: this rank.
        folder: the run's folder of checkpoints.
        step: number of finished steps.
        state: the loop's own state, of plain Python values; rank 0's is kept.
        keep: older checkpoints beyond this many are removed.

    Raises:
        CheckpointError: a rank could not write; nothing appears under the final name.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f"step_{step:06d}.partial"
    error = None
    if runtime.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as e:
            error = str(e)
    _refuse_if_any(runtime, final, error)
    contents = _sharded_state(policy, runtime, is_loading=False)
    contents["schedule"] = policy.scheduler.state_dict()
    contents["loop"] = state
    contents["world_size"] = runtime.world_size
    try:
        dist_checkpointing.save(contents, str(partial))
    except (OSError, RuntimeError, CheckpointException) as e:
        error = _reason(e)
    _refuse_if_any(runtime, final, error)
    if runtime.is_main:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for _, old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    runtime.barrier()
    return final


def _refuse_if_any(runtime: Runtime, path: Path, error: str | None) -> None:
    """Raise on every rank what any of them met. Collective."""
    failed = [f"rank {rank}: {e}" for rank, e in enumerate(runtime.gather(error)) if e]
    if failed:
        raise CheckpointError(f"could not write {path}: {'; '.join(failed)}. Look at run.output_dir and its free space")


def _reason(error: BaseException) -> str:
    """What went wrong, in one line. torch wraps it, with every rank's traceback, in a ``BaseException``."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load_model(chunks: list[PolicyModel], path: Path) -> None:
    """Bring only the weights back, in whatever layout the model has. Collective.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    try:
        state = dist_checkpointing.load({"model": _sharded_model(chunks, _metadata())}, str(path))
        _load_chunks(chunks, state["model"])
    except (Exception, CheckpointException) as error:  # megatron raises many types; the file is named in any case
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error


def load(policy: Policy, runtime: Runtime, path: Path) -> dict[str, Any]:
    """Bring model, optimizer, schedule and RNG back from ``path``. Collective.

    The RNG state comes back if the number of processes is the same.

    Returns:
        the loop's own state, as it was given to ``save``.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
        contents = _sharded_state(policy, runtime, is_loading=True)
        if common["world_size"] != runtime.world_size:
            del contents["rng"]
        # The distributed optimizer copies into leaf tensors that require gradients.
        with torch.no_grad():
            state = dist_checkpointing.load(contents, str(path))
            _load_chunks(policy.chunks, state["model"])
            policy.optimizer.load_state_dict(state["optimizer"])
    except (Exception, CheckpointException) as error:  # megatron raises many types; the file is named in any case
        raise CheckpointError(f"cannot resume from {path}: {_reason(error)}") from error
    policy.scheduler.load_state_dict(common["schedule"])
    if "rng" in state:
        torch.set_rng_state(state["rng"]["torch"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], runtime.device)
    return common["loop"]
