"""Save and resume everything: model, optimizer, schedule, RNG, and the loop's own state.

A checkpoint is a folder in megatron's ``torch_dist`` format (``fully_reshardable``: it can be read in any layout)
with a manifest. ``checkpoint_files`` says how it appears, stays and is checked; ``checkpoint_writer`` writes it.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mapo import __version__, checkpoint_files
from megatron_mapo.checkpoint_files import FileEntry, Manifest, Measure, Retention
from megatron_mapo.config import Config, to_yaml
from megatron_mapo.errors import CheckpointError
from megatron_mapo.megatron.checkpoint_fit import differences, misfit
from megatron_mapo.megatron.checkpoint_writer import (
    PARTS,
    Abandoned,
    Plan,
    Written,
    gather_to_main,
    make_plan,
    stage,
    write,
    write_common,
)
from megatron_mapo.megatron.lora import adapted_layers
from megatron_mapo.megatron.model import PolicyModel
from megatron_mapo.megatron.policy import Policy
from megatron_mapo.megatron.runtime import Runtime

_ROOM = 64 << 20
"""Bytes of disk for what stands beside the tensors: the index, the loop's own state, headers."""


# ---------------------------------------------------------------------------------------------- state


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def sharded_model(chunks: list[PolicyModel]) -> dict[str, Any]:
    """Cut tensors of every chunk. Their keys name the whole model's layers, whatever the layout.

    Under LoRA only the adapters: the frozen rest is in the model's folder.
    """
    adapted = any(True for _ in adapted_layers(chunks))
    state: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        whole = chunk.sharded_state_dict(metadata=_metadata())
        state[f"chunk{i}"] = {key: value for key, value in whole.items() if not adapted or ".adapters." in key}
    return state


def _load_chunks(chunks: list[PolicyModel], state: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict({**chunk.state_dict(), **state[f"chunk{i}"]}, strict=True)


def _sharded_state(policy: Policy, runtime: Runtime, is_loading: bool) -> dict[str, Any]:
    """What megatron writes: cut tensors of model and optimizer, and one RNG state a rank."""
    metadata = _metadata()
    policy.gather_parameters()
    model = sharded_model(policy.chunks)
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        "rng": ShardedObject("rng", _rng_state(runtime), (runtime.world_size,), (runtime.rank,)),
    }


def _rng_state(runtime: Runtime) -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "tensor_parallel": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(runtime.device)
    return state


def _restore_rng(runtime: Runtime, state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "tensor_parallel" in state:
        tensor_parallel.get_cuda_rng_tracker().set_states(state["tensor_parallel"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], runtime.device)


def _fill_moments(policy: Policy) -> None:
    """Before its first update an optimizer has no moments, and megatron cannot save that. They are zero."""
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        if part.optimizer is not None and not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)


# ----------------------------------------------------------------------------------------------- save


@dataclass
class _InFlight:
    """A checkpoint that is being written.

    Attributes:
        partial: its folder.
        plan: this rank's plan, without the tensors.
        writing: this rank's thread.
        describe: makes the manifest of all parts' bytes and all files. Used on rank 0.
    """

    partial: Path
    plan: Plan
    writing: Future[Written]
    describe: Callable[[dict[str, int], dict[str, FileEntry]], Manifest]


class Checkpointer:
    """Writes a run's checkpoints while training goes on. Every method is collective, but for ``close``.

    The state that is written is that of the moment of ``start``. The checkpoint gets its name, and older ones are
    removed, in the first ``poll`` after all ranks have written their part, or in ``wait``.

    Args:
        runtime: this rank.
        folder: the run's folder of checkpoints; all ranks see it.
        retention: which complete checkpoints stay.
    """

    def __init__(self, runtime: Runtime, folder: Path, retention: Retention) -> None:
        self.runtime, self.folder, self.retention = runtime, folder, retention
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._abandoned = threading.Event()
        self._in_flight: _InFlight | None = None

    def start(
        self,
        policy: Policy,
        step: int,
        state: dict[str, Any],
        score: float | None = None,
        measure: Measure | None = None,
    ) -> None:
        """Begin the checkpoint of ``step``; waits for the one before.

        Args:
            policy: model, optimizer and schedule to save.
            step: number of finished steps.
            state: the loop's own state, of plain Python values, the same on all ranks.
            score: the evaluation at this step, if there was one.
            measure: what that is a number of. Used on rank 0.

        Raises:
            CheckpointError: a rank cannot write, or there is too little space; on all ranks.
        """
        self.wait()
        partial = checkpoint_files.partial_folder(self.folder, step)
        self._prepare(partial)
        _fill_moments(policy)
        contents = _sharded_state(policy, self.runtime, is_loading=False)
        contents["schedule"] = policy.scheduler.state_dict()
        contents["loop"] = state
        contents["world_size"] = self.runtime.world_size
        plan = make_plan(contents, partial)
        del contents
        needed = sum(sum(parts.values()) for parts in self.runtime.gather(plan.parts)) + _ROOM

        def begin() -> None:
            checkpoint_files.require_space(partial, needed)
            write_common(plan, partial)
            (partial / checkpoint_files.CONFIG).write_text(to_yaml(policy.config), encoding="utf-8")

        self._on_main(begin, partial)
        staged = stage(plan, self.runtime.device)
        writing = self._executor.submit(write, staged, plan.writer.transforms, self._abandoned)
        describe = _describer(policy, self.runtime, step, score, measure)
        self._in_flight = _InFlight(partial, plan, writing, describe)

    def poll(self) -> Path | None:
        """Finish the checkpoint in flight if every rank has written its part.

        Returns:
            its folder if this call finished it.

        Raises:
            CheckpointError: a rank could not write; on all ranks. Nothing appears under the final name.
        """
        if self._in_flight is None:
            return None
        writing = self._in_flight.writing
        error = writing.exception() if writing.done() else None
        states = self.runtime.gather((writing.done(), None if error is None else _reason(error)))
        if any(problem for _, problem in states):
            self._abandoned.set()  # the others need not write to the end
            return self._finish(self._in_flight)
        return self._finish(self._in_flight) if all(done for done, _ in states) else None

    def wait(self) -> Path | None:
        """Wait for the checkpoint in flight and finish it; as ``poll``."""
        return None if self._in_flight is None else self._finish(self._in_flight)

    def add_score(self, step: int, score: float, measure: Measure | None = None) -> None:
        """Give the checkpoint of ``step``, if there is one, the score of an evaluation that came after it.

        Raises:
            CheckpointError: its manifest cannot be read or written; on all ranks.
        """
        error = None
        if self.runtime.is_main:
            try:
                checkpoint_files.add_score(self.folder, step, score, measure)
                self._make_room()
            except (OSError, CheckpointError) as problem:
                error = _reason(problem)
        if error := self.runtime.broadcast(error):
            raise CheckpointError(f"cannot write the score of step {step} into {self.folder}: {error}")

    def close(self) -> None:
        """Give up a checkpoint in flight; its partial folder stays until ``checkpoint_files.recover``."""
        self._abandoned.set()
        self._executor.shutdown()

    def _prepare(self, partial: Path) -> None:
        """An empty folder that all ranks see."""
        error = None
        if self.runtime.is_main:
            try:
                checkpoint_files.discard(partial)
                partial.mkdir(parents=True)
            except OSError as e:
                error = _reason(e)
        self._refuse_if_any(error, partial)
        if not partial.is_dir():
            error = "the folder that rank 0 made is not here; run.output_dir must be on a disk that all nodes share"
        self._refuse_if_any(error, partial)

    def _finish(self, flight: _InFlight) -> Path:
        """Wait for this rank's writer; when all are done rank 0 completes the folder and gives it its name."""
        self._in_flight = None
        error = flight.writing.exception()
        # A rank that gave up did so because of another one.
        self._refuse_if_any(None if error is None or isinstance(error, Abandoned) else _reason(error), flight.partial)
        done: list[Written] = gather_to_main(
            flight.writing.result(), self.runtime.is_main, self.runtime.world_size, self.runtime.control_group
        )
        parts = gather_to_main(
            flight.plan.parts, self.runtime.is_main, self.runtime.world_size, self.runtime.control_group
        )
        self._on_main(lambda: self._complete(flight, done, parts), flight.partial)
        return flight.partial.with_suffix("")

    def _complete(self, flight: _InFlight, done: list[Written], parts: list[dict[str, int]]) -> None:
        """Rank 0: the index, the manifest, the name, and what is no longer needed."""
        partial = flight.partial
        flight.plan.writer.finish(flight.plan.index, [written.results for written in done])
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        files = {name: entry for written in done for name, entry in written.files.items()}
        for file in partial.iterdir():
            if file.name not in files:
                checkpoint_files.sync_file(file)
                files[file.name] = checkpoint_files.hash_file(file)
        total = {name: sum(rank[name] for rank in parts) for name in PARTS}
        checkpoint_files.write_manifest(partial, flight.describe(total, files))
        checkpoint_files.publish(partial)
        self._make_room()

    def _make_room(self) -> None:
        """Rank 0: remove what is no longer needed. The new checkpoint is there, whatever comes of it."""
        try:
            problems = checkpoint_files.retain(self.folder, self.retention)
        except OSError as error:
            problems = [f"cannot remove old checkpoints of {self.folder}: {_reason(error)}"]
        for problem in problems:
            print(f"warning: {problem}", flush=True)

    def _on_main(self, work: Callable[[], None], partial: Path) -> None:
        """``work()`` on rank 0; its errors are raised on all ranks."""
        error = None
        if self.runtime.is_main:
            try:
                work()
            except Exception as e:  # whatever it is, the other ranks are waiting for this one
                error = _reason(e)
        self._refuse_if_any(error, partial)

    def _refuse_if_any(self, error: str | None, partial: Path) -> None:
        """Raise on every rank what any of them met, and leave nothing behind."""
        failed = [f"rank {rank}: {e}" for rank, e in enumerate(self.runtime.gather(error)) if e]
        if not failed:
            return
        self.close()
        self.runtime.barrier()  # no rank writes any more
        if self.runtime.is_main:
            checkpoint_files.discard(partial)
        raise CheckpointError(
            f"could not write {partial.with_suffix('')}: {'; '.join(failed)}. Look at run.output_dir and its free space"
        )


def save(policy: Policy, runtime: Runtime, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step`` and wait for it. Collective; the arguments are those of ``Checkpointer``.

    Args:
        keep: older checkpoints beyond this many are removed.
    """
    checkpointer = Checkpointer(runtime, folder, Retention(last=keep))
    try:
        checkpointer.start(policy, step, state)
        path = checkpointer.wait()
    finally:
        checkpointer.close()
    assert path is not None
    return path


def _describer(
    policy: Policy, runtime: Runtime, step: int, score: float | None, measure: Measure | None
) -> Callable[[dict[str, int], dict[str, FileEntry]], Manifest]:
    """What makes the manifest when the files are known."""
    config: Config = policy.config

    def describe(parts: dict[str, int], files: dict[str, FileEntry]) -> Manifest:
        return make_manifest(
            config,
            runtime,
            step=step,
            model=policy.identity,
            config_hash=xxhash.xxh3_128(to_yaml(config).encode()).hexdigest(),
            score=score,
            parts=parts,
            files=dict(sorted(files.items())),
            measure=measure,
        )

    return describe


def make_manifest(config: Config, runtime: Runtime, **known: Any) -> Manifest:
    """A manifest of now and here; ``known`` are the fields that do not follow from that."""
    versions = {
        "megatron-mapo": __version__,
        "megatron-core": version("megatron-core"),
        "torch": torch.__version__,
    }
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Manifest(created=created, layout=_layout(config, runtime), versions=versions, **known)


def _layout(config: Config, runtime: Runtime) -> dict[str, int]:
    parallel = config.actor.parallel
    return {
        "world_size": runtime.world_size,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "expert_tensor": parallel.expert_tensor,
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _reason(error: BaseException) -> str:
    """What went wrong, in one line. torch wraps it, with every rank's traceback, in a ``BaseException``."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ----------------------------------------------------------------------------------------------- load


def verify(runtime: Runtime, path: Path, checksums: bool) -> None:
    """Compare the files of a checkpoint with its manifest. Collective.

    Args:
        runtime: this rank.
        path: the checkpoint.
        checksums: also read all files and compare checksums, each rank its share of them; else only sizes.

    Raises:
        CheckpointError: names the damaged file and what to do; on all ranks.
    """
    problem = None
    try:
        manifest = checkpoint_files.read_manifest(path)
        if manifest is None and runtime.is_main:
            print(f"{path} has no manifest (an earlier version wrote it): its files are not verified", flush=True)
        if manifest is not None:
            checkpoint_files.check_sizes(path, manifest)
        if manifest is not None and checksums:
            share = sorted(manifest.files)[runtime.rank :: runtime.world_size]
            problem = checkpoint_files.damaged(path, manifest, share)
    except CheckpointError as error:
        problem = str(error)
    found = [text for text in runtime.gather(problem) if text]
    if found:
        raise CheckpointError(found[0])


def load_model(chunks: list[PolicyModel], path: Path) -> None:
    """Bring only the weights back, in whatever layout the model has. Collective.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    try:
        model = sharded_model(chunks)
        state = dist_checkpointing.load({"model": model}, str(path))
        _load_chunks(chunks, state["model"])
    except (Exception, CheckpointException) as error:  # megatron raises many types; the file is named in any case
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error


def read_weights(chunk: PolicyModel, path: Path, names: Sequence[str], group_bytes: int) -> Iterator[Tensor]:
    """The values of a model's parameters, on CPU and some at a time, so that nothing need hold all of them.

    Args:
        chunk: the whole model, which may be on the meta device.
        path: the checkpoint.
        names: of parameters; their values come in this order.
        group_bytes: most bytes of the values that are read at one time; a larger one is read alone.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    state = sharded_model([chunk])["chunk0"]
    groups: list[list[str]] = []
    size = 0
    for name in names:
        if not groups or size + state[name].data.nbytes > group_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += state[name].data.nbytes
    for group in groups:
        values = _read_group([state[name] for name in group], path)
        while values:
            yield values.pop(0)


def _read_group(parameters: list[ShardedTensor | ShardedTensorFactory], path: Path) -> list[Tensor]:
    values = [torch.empty(parameter.data.shape, dtype=parameter.data.dtype) for parameter in parameters]
    parts = {
        f"{number}.{i}": part
        for number, (parameter, value) in enumerate(zip(parameters, values, strict=True))
        for i, part in enumerate(_single_parts(replace(parameter, data=value)))
    }
    try:
        # A few parameters do not cover the tensors that megatron stacks over all layers.
        dist_checkpointing.load({"model": parts}, str(path), validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # as in load_model
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
    return values


def _single_parts(parameter: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The tensors that a parameter consists of, in a form in which the part of one layer can be read alone.

    megatron hands a tensor to which it adds axes (of layers, of experts) to torch as one of several, all of which
    torch then asks of the only process. With the axes in its own shape it is read by itself.
    """
    built = parameter.build() if isinstance(parameter, ShardedTensorFactory) else parameter
    parts = []
    for part in nested_values(built) if isinstance(built, dict | list) else [built]:
        shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        parts.append(replace(part, data=part.data.view(shape), local_shape=shape, prepend_axis_num=0))
    return parts


def _pieces(state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """An optimizer's state, and those of the optimizers in it."""
    return [state, *(state[i] for i in sorted(key for key in state if isinstance(key, int)))]


def _torch_state(piece: dict[Any, Any]) -> dict[str, Any]:
    """Groups and step of torch's optimizer; in float32 without the distributed optimizer there is nothing else."""
    return piece.get("optimizer", piece)


def _refuse_other_optimizer(saved: dict[Any, Any], is_distributed: bool) -> None:
    """The distributed optimizer names its tensors and keeps its step otherwise than the plain one."""
    was = any("param_state_sharding_type" in piece for piece in _pieces(saved))
    if was != is_distributed:
        raise CheckpointError(
            f"it was written with actor.optim.distributed={str(was).lower()}, whose state the other optimizer cannot "
            "read; set the key to that again"
        )


def _fit_parts(policy: Policy, state: dict[Any, Any]) -> dict[Any, Any]:
    """Give what was saved by one optimizer to two, or the other way round.

    With expert parallelism megatron has an optimizer for the experts beside that for all else. The tensors are
    found by their names; the rest (the step count, the groups' settings) is the same in both.
    """
    parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    saved = [p for p in _pieces(state) if any("lr_mult" in g for g in _torch_state(p).get("param_groups", []))]
    if len(saved) == len(parts):
        return state
    groups = [group for piece in saved for group in _torch_state(piece)["param_groups"]]
    fitted = {}
    for i, part in enumerate(parts):
        own = state if len(parts) == 1 else state[i]
        inner = _torch_state(saved[0]) | {
            "param_groups": [_settings_of(group, groups) for group in part.optimizer.state_dict()["param_groups"]]
        }
        if "state" in _torch_state(own):
            inner["state"] = _torch_state(own)["state"] | inner.get("state", {})
        tensors = {key: own[key] for key in ("param_state", "fp32_from_fp16_params") if key in own}
        fitted[i] = saved[0] | {"optimizer": inner} | tensors if "optimizer" in saved[0] else inner
    return fitted if len(parts) > 1 else fitted[0]


def _settings_of(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of a saved group with the same factors on rate and decay, for ``group``."""
    factors = ("wd_mult", "lr_mult", "is_decoupled_lr")
    same = next(s for s in saved if all(s.get(key) == group.get(key) for key in factors))
    return {**same, "is_expert_parallel": group["is_expert_parallel"], "params": group["params"]}


def _settings_now(group: dict[str, Any]) -> dict[str, Any]:
    """All of an optimizer's group but its state."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def refuse_misfit(runtime: Runtime, path: Path, config: Config, model: Mapping[str, str | int]) -> None:
    """Refuse a checkpoint of another model, or of other adapters (see ``checkpoint_fit.misfit``). Collective.

    Raises:
        CheckpointError: names the key; on all ranks.
    """
    try:
        problem = misfit(path, config, model)
    except CheckpointError as error:
        problem = str(error)
    found = [text for text in runtime.gather(problem) if text]
    if found:
        raise CheckpointError(found[0])


def load(policy: Policy, runtime: Runtime, path: Path) -> dict[str, Any]:
    """Bring model, optimizer, schedule and RNG back from ``path``. Collective.

    The configuration is that of now: of the optimizer its moments and its step count come back, of the schedule its
    step. Rank 0 prints which keys were others then. The RNG state comes back if the number of processes is the same.

    Returns:
        the loop's own state, as it was given to ``save``.

    Raises:
        CheckpointError: the checkpoint does not fit the model or the adapters, or cannot be read; on all ranks.
    """
    settings = [_settings_now(group) for group in policy.optimizer.param_groups]
    try:
        refuse_misfit(runtime, path, policy.config, policy.identity)
        common = dist_checkpointing.load_common_state_dict(str(path))
        _refuse_other_optimizer(common["optimizer"], policy.config.actor.optim.distributed)
        contents = _sharded_state(policy, runtime, is_loading=True)
        if common["world_size"] != runtime.world_size:
            del contents["rng"]
        # The distributed optimizer copies into leaf tensors that require gradients.
        with torch.no_grad():
            state = dist_checkpointing.load(contents, str(path))
            _load_chunks(policy.chunks, state["model"])
            policy.optimizer.load_state_dict(_fit_parts(policy, state["optimizer"]))
    except (Exception, CheckpointException) as error:  # megatron raises many types; the file is named in any case
        raise CheckpointError(f"cannot resume from {path}: {_reason(error)}") from error
    for group, mine in zip(policy.optimizer.param_groups, settings, strict=True):
        group.update(mine)
    # megatron's load_state_dict would bring back the rates, the length and the shape of the schedule, too.
    policy.scheduler.num_steps = common["schedule"]["num_steps"]
    policy.scheduler.step(0)
    for line in differences(path, policy.config) if runtime.is_main else []:
        print(line, flush=True)
    if "rng" in state:
        _restore_rng(runtime, state["rng"])
    return common["loop"]
