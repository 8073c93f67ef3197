"""A Megatron checkpoint -> a Hugging Face folder, on one CPU or GPU process, whatever layout trained it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_mapo import checkpoint_files
from megatron_mapo.config import Config, Dtype, ParallelConfig, load_config
from megatron_mapo.errors import CheckpointError, DataError
from megatron_mapo.launch.run_folder import config_file
from megatron_mapo.megatron import checkpoint, runtime
from megatron_mapo.megatron.checkpoint_fit import describe_model
from megatron_mapo.megatron.hf import merged_weights, named_adapters, named_weights
from megatron_mapo.megatron.hf_folder import WeightStream, save_folder
from megatron_mapo.megatron.imported import read_imported
from megatron_mapo.megatron.lora import adapted_layers, add_adapters, save_adapter
from megatron_mapo.megatron.model import PolicyModel
from megatron_mapo.megatron.policy import empty_model
from megatron_mapo.quickstart import hub_name, resolve_model_path


@dataclass(frozen=True)
class _Source:
    """What an export reads.

    Attributes:
        checkpoint: folder of the Megatron checkpoint.
        model: Hugging Face folder of the model that it began as.
        config: of the run; its layout is that of one process.
        card: text of README.md, where the model has none.
        is_run: it is a checkpoint of a run, to be verified and compared with the model.
    """

    checkpoint: Path
    model: Path
    config: Config
    card: str | None
    is_run: bool


def export_run(
    folder: Path,
    out: Path,
    step: int | None = None,
    *,
    dtype: Dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write the actor of a checkpoint as a folder that transformers and SGLang load.

    Under LoRA the weights are merged ones, and the folder ``adapter`` in it has the adapters as PEFT loads them.
    The weights pass through host memory in groups of a quarter of ``shard_bytes``, or one parameter that is larger.

    Args:
        folder: a run's folder, or one that ``megatron-mapo import`` wrote.
        out: folder to write; it must not exist, or be empty.
        step: which checkpoint of the run; None: the last complete one.
        dtype: type of the written weights; None: that of the checkpoint.
        shard_bytes: most bytes of one safetensors file.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it does not fit the model.
        DataError: the original model is gone, or not supported.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} exists and is not empty: name another folder")
    source = _imported_source(folder) if (folder / checkpoint_files.IMPORTED).is_dir() else _run_source(folder, step)
    trainers = runtime.initialize(source.config)
    try:
        if source.is_run:
            checkpoint.verify(trainers, source.checkpoint, checksums=source.config.trainer.verify_checkpoints)
        chunks, hf = empty_model(source.config, source.model, torch.device("meta"))
        if source.is_run:
            model = describe_model(source.config, hf, source.model)
            checkpoint.refuse_misfit(trainers, source.checkpoint, source.config, model)
        save_folder(
            _weights(source, chunks, hf, shard_bytes // 4),
            source.model,
            out,
            shard_bytes=shard_bytes,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            card=source.card,
        )
        if source.config.actor.lora.rank:
            actor, base = source.config.actor, source.config.model.path
            save_adapter(named_adapters(chunks, hf), actor.lora, base, source.model, out / "adapter")
        return out
    finally:
        trainers.close()


def _weights(source: _Source, chunks: list[PolicyModel], hf: PretrainedConfig, group_bytes: int) -> WeightStream:
    """Those of the checkpoint, for a model without memory. Under LoRA this gives it the trained adapters."""
    if not source.config.actor.lora.rank:
        read = partial(checkpoint.read_weights, chunks[0], source.checkpoint, group_bytes=group_bytes)
        return named_weights(chunks, hf, read)
    # The checkpoint holds the adapters alone.
    add_adapters(chunks, source.config.actor.lora, source.config.run.seed)
    for layer in adapted_layers(chunks):
        layer.adapters.to_empty(device="cpu")
    checkpoint.load_model(chunks, source.checkpoint)
    return merged_weights(chunks, hf, source.model, group_bytes)


def _run_source(run_dir: Path, step: int | None) -> _Source:
    chosen = checkpoint_files.choose(run_dir / "checkpoints", step)
    if chosen is None:
        raise CheckpointError(f"{run_dir}/checkpoints holds no complete checkpoint")
    step, path = chosen
    config = load_config(config_file(run_dir, step), [])
    config.actor.parallel = ParallelConfig()
    return _Source(path, _find_model(config, run_dir), config, model_card(config, step), is_run=True)


def _find_model(config: Config, run_dir: Path) -> Path:
    """The model that the checkpoint began with; where the run's last start found it, if it has been moved since.

    ``config.model.path`` then names it there.
    """
    try:
        return resolve_model_path(config.model.path)
    except DataError as error:
        moved = load_config(run_dir / "config.yaml", []).model.path
        if moved == config.model.path:
            raise
        print(f"{error}; taking {moved}, as the run's last start did", file=sys.stderr, flush=True)
        config.model.path = moved
        return resolve_model_path(moved)


def model_card(config: Config, step: int) -> str:
    """README.md of a trained model: what it began as, and what was done to it."""
    name, actor = config.model.path, config.actor
    on_hub = hub_name(name)
    shown = Path(name).name if on_hub is None else name
    steps = "step" if step == 1 else "steps"
    base = "" if on_hub is None else f"base_model: {on_hub[0]}\n"
    return (
        f"---\nlibrary_name: transformers\n{base}---\n\n"
        f"# {config.run.name}\n\n"
        f"`{shown}` after {step} {steps} of reinforcement learning from verifiable "
        "rewards with megatron-mapo.\n\n"
        "| | |\n|---|---|\n"
        f"| advantages (`actor.adv_norm.aggregation_mode`) | {actor.adv_norm.aggregation_mode} |\n"
        f"| verifier | {', '.join(component.name for component in config.reward.components)} |\n"
        f"| prompts x responses a step | {config.rollout.prompts_per_step} x {config.rollout.responses_per_prompt} |\n"
        f"| learning rate | {actor.optim.lr:g} |\n"
        f"| KL coefficient | {actor.loss.kl_coef:g} |\n"
    )


def _imported_source(folder: Path) -> _Source:
    config, weights = read_imported(folder)
    return _Source(weights, folder, config, None, is_run=False)
