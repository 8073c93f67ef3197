"""What one configuration needs: model, layout, memory, data, verifier."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_mapo.config import Config, Dtype, Fallback
from megatron_mapo.doctor.finding import Finding, failure, gib, ok, warning
from megatron_mapo.doctor.machine import available_memory
from megatron_mapo.doctor.storage import existing
from megatron_mapo.errors import MapoError
from megatron_mapo.hardware import has_accelerator, native_dtype
from megatron_mapo.launch.local import default_processes
from megatron_mapo.launch.plan import Plan, checkpoint_bytes, find_model_config, make_plan
from megatron_mapo.patches import megatron_bridge
from megatron_mapo.quickstart import resolve_model_path
from megatron_mapo.rollout.served import check_served

_ROWS = 64


def check(config: Config, processes: int | None) -> Iterator[Finding]:
    """Everything that ``launch local`` would stumble over, without starting it."""
    yield from _verifier(config)
    try:
        plan = make_plan(config, processes or default_processes(config), [])
    except MapoError as error:
        yield failure("layout, model, data", str(error), "megatron-mapo options lists every key")
        return
    parallel = config.actor.parallel
    yield ok(
        "layout",
        f"{plan.processes} ranks = tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context} x data {plan.data_parallel}",
    )
    yield _dtype(config)
    yield _memory(plan)
    yield _disk(plan)
    yield from _model_and_data(config)


def _verifier(config: Config) -> Iterator[Finding]:
    from megatron_mapo.rewards.registry import get_verifier

    for index, component in enumerate(config.reward.components):
        section = config.reward.section_of(index)
        try:
            get_verifier(component.name, component.options, section)
        except MapoError as error:
            yield failure(f"{section}.name", str(error), "megatron-mapo options reward")
        else:
            yield ok(f"{section}.name", component.name)


def _dtype(config: Config) -> Finding:
    dtype = config.model.dtype
    if dtype is Dtype.bfloat16 and native_dtype() is not Dtype.bfloat16:
        return warning("model.dtype", "bfloat16 is many times slower than float32 here", "model.dtype=auto")
    return ok("model.dtype", dtype.value)


def _memory(plan: Plan) -> Finding:
    """Trainers and servers of this machine against its memory; on CUDA a rank against its GPU."""
    fix = "a larger actor.parallel, actor.recompute=true, or a smaller actor.microbatch_tokens"
    if has_accelerator():
        needed, there = plan.memory.total, torch.cuda.get_device_properties(0).total_memory
        detail = f"a rank needs about {gib(needed)} of its GPU's {gib(there)}"
    else:
        rollout = plan.config.rollout
        servers = 0 if rollout.urls or rollout.urls_file else rollout.server.count
        needed, there = plan.processes * plan.memory.total + servers * plan.server_bytes, available_memory()
        detail = f"trainers and servers need about {gib(needed)} besides their libraries; {gib(there)} are free"
    return ok("memory of the run", detail) if needed <= there else failure("memory of the run", detail, fix)


def _disk(plan: Plan) -> Finding:
    """Room for the checkpoints that stay, and the one that is being written."""
    count = plan.config.trainer.keep_checkpoints + 1
    needed, free = count * checkpoint_bytes(plan), shutil.disk_usage(existing(plan.config.run_dir)).free
    detail = f"{count} checkpoints take about {gib(needed)}; {gib(free)} are free"
    fix = "run.output_dir=FOLDER on a larger disk, or a smaller trainer.keep_checkpoints"
    return ok("disk of the run", detail) if needed <= free else failure("disk of the run", detail, fix)


def _model_and_data(config: Config) -> Iterator[Finding]:
    """Header of every weight file, tokenizer, and the first rows of the data as prompts."""
    from safetensors import SafetensorError, safe_open

    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    try:
        folder = resolve_model_path(config.model.path)
        hf = json.loads(find_model_config(config.model.path).read_text())
        check_served(hf, longest, on_cpu=not has_accelerator())
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt"):
                pass
    except (MapoError, OSError, SafetensorError) as error:
        fix = "hf download OWNER/NAME --local-dir FOLDER, and model.path=FOLDER"
        yield failure("model.path", str(error), fix)
        return
    yield ok("model.path", f"{folder}: {hf.get('model_type')}")
    if config.model.fallback is Fallback.megatron_bridge:
        yield _bridge()
    yield from _data(config, folder)


def _bridge() -> Finding:
    try:
        megatron_bridge.check_version()
    except MapoError as error:
        fix = f"pip install --no-deps megatron-bridge=={megatron_bridge.SUPPORTED}"
        return failure("model.fallback", str(error), fix)
    return ok("model.fallback", f"megatron-bridge {megatron_bridge.SUPPORTED}")


def _data(config: Config, model: Path) -> Iterator[Finding]:
    from transformers import AutoTokenizer

    from megatron_mapo.data.prompts import load_prompts

    data = config.data
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    sources = (("data.train", data.train, data.train_split), ("data.eval", data.eval, data.eval_split))
    for key, source, split in sources:
        if source is None:
            continue
        try:
            prompts = load_prompts(
                source, split, data, tokenizer, config.rollout.max_prompt_tokens, key=key, limit=_ROWS
            )
        except MapoError as error:
            yield failure(key, str(error), "megatron-mapo options data")
        else:
            yield ok(key, f"{source}: the first {len(prompts)} prompts have at most {prompts.lengths.max()} tokens")
