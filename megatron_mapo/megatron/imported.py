"""A Hugging Face model -> a Megatron checkpoint of its weights, on one CPU or GPU process."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from megatron.core import dist_checkpointing

from megatron_mapo import checkpoint_files
from megatron_mapo.checkpoint_files import IMPORTED
from megatron_mapo.config import Config, Dtype, Fallback
from megatron_mapo.errors import CheckpointError, DataError
from megatron_mapo.megatron import runtime
from megatron_mapo.megatron.checkpoint import make_manifest, sharded_model
from megatron_mapo.megatron.checkpoint_fit import describe_model
from megatron_mapo.megatron.hf_folder import copy_companions
from megatron_mapo.megatron.model import load_hf_config
from megatron_mapo.megatron.model_check import require_check
from megatron_mapo.megatron.policy import build_model


def import_folder(source: Path, out: Path, dtype: Dtype | None = None, fallback: Fallback = Fallback.none) -> Path:
    """Write the weights of a Hugging Face folder as a Megatron checkpoint (``torch_dist``) that any layout reads.

    Args:
        source: Hugging Face folder.
        out: folder to write; it must not exist. It holds ``megatron/`` with a manifest, and the configuration and
            tokenizer of ``source``, so that an export needs nothing else.
        dtype: type of the weights; None: that of ``source``.
        fallback: who translates a family that ``FAMILIES`` lacks.

    Raises:
        CheckpointError: ``out`` exists.
        DataError: the model is not supported, or its files are not as its config says.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists: name another folder")
    require_check(source, fallback)
    config = Config()
    config.model.dtype, config.model.fallback = dtype or stored_dtype(source, fallback), fallback
    trainers = runtime.initialize(config)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        chunks, hf = build_model(config, source, trainers.device)
        weights = partial / IMPORTED
        weights.mkdir(parents=True)
        copy_companions(source, partial)
        state = {"model": sharded_model(chunks), "dtype": config.model.dtype.value, "fallback": fallback.value}
        dist_checkpointing.save(state, str(weights))
        manifest = make_manifest(
            config,
            trainers,
            step=0,
            model=describe_model(config, hf, source),
            config_hash="",
            score=None,
            parts={"weights": sum(p.nbytes for chunk in chunks for p in chunk.parameters())},
            files={file.name: checkpoint_files.hash_file(file) for file in sorted(weights.iterdir())},
        )
        checkpoint_files.write_manifest(weights, manifest)
    finally:
        trainers.close()
    partial.rename(out)
    return out


def stored_dtype(source: Path, fallback: Fallback = Fallback.none) -> Dtype:
    """The type of a Hugging Face folder's weights, as its config.json says.

    Raises:
        DataError: it says none, or another than float32 and bfloat16.
    """
    name = str(load_hf_config(source, fallback).dtype).removeprefix("torch.")
    if name not in (Dtype.float32, Dtype.bfloat16):
        raise DataError(f"{source}/config.json names the type {name}; choose --dtype float32 or bfloat16")
    return Dtype(name)


def read_imported(folder: Path) -> tuple[Config, Path]:
    """Configuration of one process for an imported model, and where its Megatron checkpoint is.

    Raises:
        CheckpointError: a file of it is damaged.
    """
    weights = folder / IMPORTED
    if checkpoint_files.verify(weights) is None:
        print(f"{weights} has no manifest (of an earlier version): it is not verified", file=sys.stderr, flush=True)
    config = Config()
    common = dist_checkpointing.load_common_state_dict(str(weights))
    config.model.dtype = Dtype(common["dtype"])
    config.model.fallback = Fallback(common.get("fallback", Fallback.none))
    return config, weights
