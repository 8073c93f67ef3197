"""What a run would do, worked out from the configuration and the model's ``config.json``: ``--dry-run``.

Memory of one rank, in bytes, with P its parameters, b the bytes of ``model.dtype``, and D the ranks that the
optimizer is sharded over (data * context parallel size with ``actor.optim.distributed``, else 1):

=============  ==============================================================================================
weights        b P; as much again for a reference with ``actor.reference=device``
gradients      4 P (float32 buffer)
optimizer      8 P / D for the two moments, and 4 P / D for the master weights if b is not 4; for experts D is the
               number of ranks that hold the same ones
activations    F b T (L (4 h/s + (3 q + 2 k + 4 f)/t)), with ``actor.recompute`` F b T L h/s plus one layer of the
               former; L layers of this stage, T tokens of a microbatch on this rank, F microbatches in flight
               (at most the pipeline size), t tensor parallel size, s = t with sequence parallelism else 1, and
               h, q, k, f the widths of hidden states, queries, keys and the MLP
log-probs      12 C V/t + 4 h V/t for C = ``actor.logprob_chunk`` tokens' logits and the output matrix' gradient
=============  ==============================================================================================

Weights, gradients and optimizer states are exact up to padding. Activations are an estimate: what autograd
keeps of the layers' largest tensors. Python and its libraries come on top.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from megatron_mapo.checkpoint_files import choose_start
from megatron_mapo.config import (
    DATA_SUFFIXES,
    ActorConfig,
    Config,
    Dtype,
    Fallback,
    ReferencePlacement,
    data_parallel_size,
)
from megatron_mapo.errors import DataError
from megatron_mapo.launch.arguments import hidden
from megatron_mapo.model_shape import ModelShape
from megatron_mapo.quickstart import QUICKSTART_SMOLLM2, prepare_smollm2

_BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}


@dataclass(frozen=True)
class Memory:
    """Bytes of one trainer rank (see the module's docstring)."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    logprobs: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.reference + self.gradients + self.optimizer + self.activations + self.logprobs


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        config: the run.
        processes: trainer processes.
        data_parallel: data-parallel size that remains.
        shape: the model's sizes.
        memory: of one trainer rank.
        resumes_from: step of the checkpoint that the run would go on from.
        command: what every rank runs.
    """

    config: Config
    processes: int
    data_parallel: int
    shape: ModelShape
    memory: Memory
    resumes_from: int | None
    command: list[str]

    @property
    def sequences(self) -> int:
        """Responses of one training step."""
        return self.config.rollout.prompts_per_step * self.config.rollout.responses_per_prompt

    @property
    def packed_tokens(self) -> int:
        """Most tokens that one training step packs, on all data-parallel ranks together."""
        return _packed_tokens(self.config)

    @property
    def server_bytes(self) -> int:
        """Weights and KV cache of one server on CPU."""
        size = _BYTES[self.config.model.dtype]
        cache = 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim
        return size * (self.shape.parameters() + cache * self.config.rollout.server.max_total_tokens)


def make_plan(config: Config, processes: int, command: list[str]) -> Plan:
    """Work out what a run would do. Nothing is started; no weights are read.

    Raises:
        ConfigError: the layout does not fit the number of processes or the model.
        DataError: the model or the data file cannot be found or used.
        CheckpointError: there is no checkpoint of ``run.resume_step``.
    """
    data_parallel = data_parallel_size(config, processes)
    shape = ModelShape.read(find_model_config(config.model.path), any_family=config.model.fallback is not Fallback.none)
    shape.check_layout(config.actor.parallel)
    _check_data(config)
    chosen = choose_start(config.run_dir / "checkpoints", config.run.resume_step)
    return Plan(
        config=config,
        processes=processes,
        data_parallel=data_parallel,
        shape=shape,
        memory=estimate_memory(config, shape, data_parallel),
        resumes_from=chosen[0] if chosen else None,
        command=command,
    )


def find_model_config(path: str) -> Path:
    """The model's ``config.json``: in its folder, in the quickstart cache, or on the hub (that one file).

    Raises:
        DataError: there is none.
    """
    if path == QUICKSTART_SMOLLM2:
        return prepare_smollm2() / "config.json"
    folder = Path(path).expanduser()
    if folder.is_dir() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        if not (folder / "config.json").is_file():
            raise DataError(f"model.path: {folder} is not a Hugging Face model folder: it has no config.json")
        return folder / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = path.partition("@")
    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision or None))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"model.path: there is no folder {path}, and the Hugging Face hub does not give its config.json: "
            f"{' '.join(str(error).split())}"
        ) from error


def _check_data(config: Config) -> None:
    for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if source is not None and Path(source).suffix in DATA_SUFFIXES and not Path(source).is_file():
            raise DataError(f"{key}: there is no file {source}")


def _packed_tokens(config: Config) -> int:
    rollout = config.rollout
    sequences = rollout.prompts_per_step * rollout.responses_per_prompt
    prompts = rollout.prompts_per_step if config.actor.share_prompts else sequences
    return prompts * rollout.max_prompt_tokens + sequences * rollout.max_response_tokens


def estimate_memory(config: Config, shape: ModelShape, data_parallel: int) -> Memory:
    """Memory of the fullest trainer rank, by the formulas in the module's docstring."""
    actor, parallel = config.actor, config.actor.parallel
    size = _BYTES[config.model.dtype]
    parameters = shape.rank_parameters(parallel)
    of_experts = shape.rank_expert_parameters(parallel)
    dense_ranks = data_parallel * parallel.context
    expert_ranks = dense_ranks * parallel.tensor // (parallel.expert * parallel.expert_tensor)
    shards, expert_shards = (dense_ranks, expert_ranks) if actor.optim.distributed else (1, 1)
    state = 8 if size == 4 else 12
    vocab = -(-shape.vocab // parallel.tensor)
    tokens = min(actor.microbatch_tokens, _packed_tokens(config))
    chunk = min(actor.logprob_chunk, math.ceil(tokens / parallel.context))
    return Memory(
        weights=size * parameters,
        reference=size * parameters if _reference_on_device(actor) else 0,
        gradients=4 * parameters,
        optimizer=math.ceil(state * ((parameters - of_experts) / shards + of_experts / expert_shards)),
        activations=_activation_bytes(config, shape, math.ceil(tokens / parallel.context), data_parallel),
        logprobs=12 * chunk * vocab + 4 * shape.hidden * vocab,
    )


def _reference_on_device(actor: ActorConfig) -> bool:
    return actor.loss.kl_coef > 0 and actor.reference is ReferencePlacement.device


def _activation_bytes(config: Config, shape: ModelShape, tokens: int, data_parallel: int) -> int:
    actor, parallel = config.actor, config.actor.parallel
    layers = shape.layers // parallel.pipeline
    stripes = parallel.tensor if parallel.sequence else 1
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # A token's rows go through as many experts as are active, wherever those are.
    mlp = 4 * shape.ffn / parallel.tensor
    if shape.experts:
        mlp = shape.active_experts * (4 * shape.ffn / parallel.expert_tensor + 2 * shape.hidden) / stripes
    layer = 4 * shape.hidden / stripes + (3 * queries + 2 * keys) / parallel.tensor + mlp
    kept = layers * shape.hidden / stripes + layer if actor.recompute else layers * layer
    microbatches = math.ceil(_packed_tokens(config) / (actor.microbatch_tokens * data_parallel))
    return math.ceil(min(parallel.pipeline, microbatches) * _BYTES[config.model.dtype] * tokens * kept)


# ---------------------------------------------------------------------------------------------- print


def plan_table(plan: Plan) -> Table:
    """The plan as two columns: what, and how much."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(plan):
        table.add_row(name, text)
    return table


def _rows(plan: Plan) -> list[tuple[str, str]]:
    config, memory, parallel = plan.config, plan.memory, plan.config.actor.parallel
    rollout, actor = config.rollout, config.actor
    shared = " (prompts computed once per group)" if actor.share_prompts else ""
    updates = actor.mini_batches * actor.epochs
    start = "from the beginning" if plan.resumes_from is None else f"resumes after step {plan.resumes_from}"
    return [
        ("run", f"{config.run_dir} ({start})"),
        (
            "model",
            f"{config.model.path}: {plan.shape.kind}, {plan.shape.parameters():,} parameters, "
            f"{config.model.dtype.value}",
        ),
        (
            "layout",
            f"{plan.processes} ranks = tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
            f"context {parallel.context} x data {plan.data_parallel}",
        ),
        ("training", f"{config.trainer.steps} steps, {updates} optimizer update(s) each; {_advantage_text(config)}"),
        (
            "one step",
            f"{rollout.prompts_per_step} prompts x {rollout.responses_per_prompt} responses = "
            f"{plan.sequences} sequences",
        ),
        ("", f"at most {plan.sequences * rollout.max_response_tokens:,} generated tokens"),
        ("", f"at most {plan.packed_tokens:,} packed tokens{shared}, {actor.microbatch_tokens:,} a microbatch"),
        ("memory per rank", f"{_gib(memory.total)} (estimate, without Python and its libraries):"),
        ("", f"weights {_gib(memory.weights)}, gradients {_gib(memory.gradients)}, {_optimizer_text(plan)}"),
        ("", f"reference model {_gib(memory.reference)}, activations up to {_gib(memory.activations)},"),
        ("", f"log-probs {_gib(memory.logprobs)}"),
        *_server_rows(plan),
        ("data", config.data.train + (f"; held out: {config.data.eval}" if config.data.eval else "")),
        ("files", f"{config.run_dir}/: config.yaml, metrics.jsonl, samples.jsonl, logs/, checkpoints/"),
        (
            "",
            f"a checkpoint is about {_gib(checkpoint_bytes(plan))}, {config.trainer.keep_checkpoints} are kept",
        ),
        ("each rank runs", hidden(shlex.join(plan.command))),
    ]


def _advantage_text(config: Config) -> str:
    mode = config.actor.adv_norm.aggregation_mode
    return f"advantages: {mode}, {config.actor.adv_norm.std.value} standard deviation"


def _optimizer_text(plan: Plan) -> str:
    shards = plan.data_parallel * plan.config.actor.parallel.context if plan.config.actor.optim.distributed else 1
    return f"optimizer {_gib(plan.memory.optimizer)} (a share of {shards}),"


def _server_rows(plan: Plan) -> list[tuple[str, str]]:
    rollout = plan.config.rollout
    if rollout.urls or rollout.urls_file:
        used = [*rollout.urls, *([f"those in {rollout.urls_file}"] if rollout.urls_file else [])]
        return [("servers", f"none is started; in use: {', '.join(used)}")]
    server = rollout.server
    ports = "free ports" if server.port == 0 else f"port {server.port} to {server.port + server.count - 1}"
    urls = [f"http://{server.host}:{server.port + i}" for i in range(server.count)] if server.port else [server.host]
    memory = (
        f"on a CPU each takes {_gib(plan.server_bytes)} for weights and a KV cache of {server.max_total_tokens:,} "
        f"tokens, besides its libraries; on CUDA {server.mem_fraction:.0%} of {server.tensor} GPU(s)"
    )
    return [("servers", f"{server.count} ({ports}): {', '.join(urls)}"), ("", memory)]


def checkpoint_bytes(plan: Plan) -> int:
    """Weights, float32 master weights (if they differ) and moments, whole."""
    size = _BYTES[plan.config.model.dtype]
    return plan.shape.parameters() * (size + (8 if size == 4 else 12))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
