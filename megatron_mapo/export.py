"""A run's checkpoint -> a Hugging Face folder, on one CPU or GPU process, whatever layout trained it."""

from __future__ import annotations

from pathlib import Path

from megatron_mapo import checkpoint_files
from megatron_mapo.config import ParallelConfig, load_config
from megatron_mapo.errors import CheckpointError
from megatron_mapo.megatron import checkpoint, runtime
from megatron_mapo.megatron.hf import named_weights, save_folder
from megatron_mapo.megatron.policy import build_model
from megatron_mapo.quickstart import resolve_model_path


def export_run(run_dir: Path, out: Path, step: int | None = None) -> Path:
    """Write the actor of a checkpoint as a folder that transformers and SGLang load.

    Args:
        run_dir: the run's folder.
        out: folder to write; it must not exist, or be empty.
        step: which checkpoint; None: the last complete one.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit the model.
        DataError: the original model is gone, or not supported.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} exists and is not empty: name another folder")
    chosen = checkpoint_files.choose(run_dir / "checkpoints", step)
    if chosen is None:
        raise CheckpointError(f"{run_dir}/checkpoints holds no complete checkpoint")
    path = chosen[1]
    config = load_config(run_dir / "config.yaml", [])
    config.actor.parallel = ParallelConfig()
    trainers = runtime.initialize(config)
    try:
        source = resolve_model_path(config.model.path)
        chunks, hf = build_model(config, source, trainers.device)
        checkpoint.verify(trainers, path, checksums=config.trainer.verify_checkpoints)
        checkpoint.load_model(chunks, path)
        return save_folder(named_weights(chunks, hf), source, out)
    finally:
        trainers.close()
