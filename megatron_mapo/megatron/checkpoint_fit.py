"""What a checkpoint and the run that loads it must have in common, and what else differs between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from megatron_mapo import checkpoint_files
from megatron_mapo.config import Config, LRSchedule, flatten, to_yaml
from megatron_mapo.errors import CheckpointError
from megatron_mapo.megatron.hf_folder import weights_fingerprint

_SECTIONS = ("actor.", "model.", "reward.", "data.", "rollout.")
# Keys of these sections that change where and how fast things are computed, not what is learned, and those that are
# refused where they differ.
_FREE = (
    *("actor.parallel.", "actor.microbatch_tokens", "actor.share_prompts", "actor.recompute"),
    *("actor.skip_zero_advantage", "actor.logprob_chunk", "actor.reference", "actor.lora.", "model.path"),
    *("actor.optim.distributed", "actor.optim.overlap"),
    *("reward.timeout", "reward.workers", "reward.concurrency", "reward.memory_mb", "data.eval"),
    *("rollout.urls", "rollout.api_key_file", "rollout.concurrency", "rollout.timeout", "rollout.retries"),
    *("rollout.max_failures", "rollout.probe_timeout", "rollout.straggler_ratio", "rollout.wait_timeout"),
    *("rollout.max_logprob_diff", "rollout.server.", "rollout.sync."),
)
_IDENTITY = {"type": "the type", "vocab_size": "the vocabulary (vocab_size)", "weights": "weights of the hash"}


def describe_model(config: Config, hf: PretrainedConfig, path: Path) -> dict[str, str | int]:
    """What a manifest says about the model that a run begins with (``Manifest.model``)."""
    return {
        "type": str(getattr(hf, "model_type", "")),
        "dtype": config.model.dtype.value,
        "path": str(path),
        "vocab_size": hf.vocab_size,
        "weights": weights_fingerprint(path),
    }


def misfit(path: Path, config: Config, model: Mapping[str, str | int]) -> str | None:
    """Why the checkpoint at ``path`` must not be loaded into this model; None if it may.

    What an earlier version did not write down is not compared.

    Args:
        path: the checkpoint.
        config: of the run that loads it.
        model: of ``describe_model``.

    Raises:
        CheckpointError: its manifest or its configuration cannot be read.
    """
    manifest = checkpoint_files.read_manifest(path)
    saved = {} if manifest is None else manifest.model
    for key, words in _IDENTITY.items():
        if key in saved and saved[key] != model[key]:
            return (
                f"model.path: the run began with {saved['path']}, which has {words} {saved[key]}; {model['path']} has "
                f"{model[key]}. Go back to that model, or start a new run under another run.name"
            )
    tree = _saved_config(path)
    then = {} if tree is None else tree.get("actor", {}).get("lora", {})
    now = dataclasses.asdict(config.actor.lora)
    if not (then.get("rank") or now["rank"]):
        return None
    for key, value in then.items():
        if _ordered(value) != _ordered(now.get(key)):
            return (
                f"actor.lora.{key} is {now.get(key)}, and the adapters were trained with {value}; set it back, or "
                "start a new run under another run.name"
            )
    return None


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def differences(path: Path, config: Config) -> list[str]:
    """Lines about keys that are not as they were when the checkpoint at ``path`` was written, and matter.

    One line for every key of the optimizer, one for all others of ``actor``, ``model``, ``reward``, ``data`` and
    ``rollout`` that change what is learned.

    Raises:
        CheckpointError: the checkpoint's configuration cannot be read.
    """
    tree = _saved_config(path)
    if tree is None:
        return []
    # A key that the other version did not have counts as its default.
    defaults = flatten(yaml.safe_load(to_yaml(Config())))
    then, now = defaults | flatten(tree), defaults | flatten(yaml.safe_load(to_yaml(config)))
    differ = [key for key in then | now if then.get(key) != now.get(key) and not key.startswith(_FREE)]
    decays = config.actor.optim.schedule is not LRSchedule.constant
    alone = [key for key in differ if key.startswith("actor.optim.") or (key == "trainer.steps" and decays)]
    others = [key for key in differ if key.startswith(_SECTIONS) and key not in alone]
    lines = [f"{key} is {now.get(key)} now; the checkpoint was written with {then.get(key)}" for key in alone]
    if others:
        words = ", ".join(f"{key}={now.get(key)} ({then.get(key)})" for key in others)
        lines.append(f"other keys that are not as they were in the checkpoint: {words}")
    return lines


def _saved_config(path: Path) -> dict[str, Any] | None:
    """The configuration that a checkpoint was written with; None if an earlier version wrote it."""
    file = path / checkpoint_files.CONFIG
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
