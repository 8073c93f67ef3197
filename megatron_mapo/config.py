"""All options: one typed dataclass per section, a docstring under every field.

A run is one YAML file plus ``section.key=value`` overrides. The dataclasses are the schema
(OmegaConf structured configs): an unknown key, a wrong type or a value out of range is a
``ConfigError`` that names the key. ``megatron-mapo train --help`` prints this file as a table.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import re
import textwrap
import typing
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape
from rich.table import Table

from megatron_mapo.errors import ConfigError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Fallback(StrEnum):
    none = "none"
    megatron_bridge = "megatron_bridge"


ADVANTAGE_MODES = (
    "native",
    "mix",
    "mean_only",
    "center",
    "rloo",
    "gpg",
    "treerpo",
    "lite_ppo",
    "reinforce++",
    "reinforce++_baseline",
    "pass_at_k",
)


class Std(StrEnum):
    population = "population"
    unbiased = "unbiased"


class LossAggregation(StrEnum):
    token = "token"
    sequence = "sequence"
    constant = "constant"


class Objective(StrEnum):
    ppo = "ppo"
    cispo = "cispo"
    gspo = "gspo"
    gmpo = "gmpo"
    sapo = "sapo"


class KLEstimator(StrEnum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    k3_unbiased = "k3_unbiased"


class KLPlacement(StrEnum):
    loss = "loss"
    reward = "reward"


class CorrectionWeight(StrEnum):
    none = "none"
    token = "token"
    sequence = "sequence"


class OldLogprobs(StrEnum):
    recompute = "recompute"
    rollout = "rollout"


class SyncMode(StrEnum):
    distributed = "distributed"
    disk = "disk"


class ReferencePlacement(StrEnum):
    auto = "auto"
    base = "base"
    host = "host"
    device = "device"


class Resume(StrEnum):
    auto = "auto"
    never = "never"


class LRSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class OnFailure(StrEnum):
    error = "error"
    wrong = "wrong"


@dataclass
class RunConfig:
    """Where a run lives and how it is seeded."""

    name: str = "run"
    """Name of the run; its folder is `output_dir/name`. Letters, digits, `.`, `_`, `-` only."""
    output_dir: str = "runs"
    """Folder that holds the runs."""
    seed: int = 0
    """Seed of data order, sampling and initialisation."""
    resume: Resume = Resume.auto
    """`auto` goes on from the last complete checkpoint of this run; `never` demands an empty folder."""
    resume_step: int | None = None
    """Go on from the checkpoint of this step, not from the last one. Later checkpoints are set aside (`*.aside`)."""


@dataclass
class ModelConfig:
    """The policy's starting point."""

    path: str = "???"
    """Hugging Face model folder (config.json, *.safetensors, tokenizer), or `quickstart:smollm2` (see docs)."""
    dtype: Dtype = Dtype.bfloat16
    """Type of weights and activations (master weights are float32); `auto`: bfloat16 where the hardware has it."""
    fallback: Fallback = Fallback.none
    """Who translates a `model_type` that docs/models.md does not list: nobody (it is refused), or `megatron_bridge`
    (it must be installed; the run starts only if the log-probs equal transformers')."""


@dataclass
class ParallelConfig:
    """How one model replica is cut over ranks. Data parallelism is what remains."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallelism: activations outside the matrix products are cut over the tensor group."""
    pipeline: int = 1
    """Pipeline-parallel size (1F1B schedule)."""
    virtual_pipeline: int = 1
    """Pieces of layers that each pipeline stage holds; above 1 the interleaved schedule makes the bubble smaller."""
    context: int = 1
    """Context-parallel size: the tokens of a microbatch are striped over this many ranks."""
    expert: int = 1
    """Expert-parallel size (mixture-of-experts models only)."""
    expert_tensor: int = 1
    """Tensor-parallel size within one expert (mixture-of-experts models only)."""


@dataclass
class AdvNormConfig:
    """Advantages within a group of responses to one prompt."""

    aggregation_mode: str = "mix"
    """`mix` is MAPO, `native` is GRPO's z-score; `mean_only`, `center` (Dr. GRPO), `rloo`, `gpg`, `treerpo`,
    `lite_ppo`, `reinforce++`, `reinforce++_baseline`, `pass_at_k`; or an import path `package.module:function`."""
    std: Std = Std.population
    """Standard deviation of a group: `population` (the paper) or `unbiased` (verl, TRL, the authors' code)."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    success_threshold: float | None = None
    """Success is `reward >= success_threshold`. Unset: a group's rewards must take at most two values."""
    pass_k: int = 4
    """With `pass_at_k`: the chance that one of this many responses is right is what is trained."""


@dataclass
class LossConfig:
    """Policy-gradient loss, and the KL term to the reference model."""

    objective: Objective = Objective.ppo
    """`ppo` clips each token's ratio; `cispo` clips its weight, not its gradient; `gspo` clips the sequence's ratio;
    `gmpo` takes the geometric mean of clipped ratios; `sapo` has a soft gate. See docs/algorithm.md."""
    clip_low: float = 0.2
    """Lower clip: the ratio's floor is `1 - clip_low`."""
    clip_high: float = 0.2
    """Upper clip: the ratio's ceiling is `1 + clip_high`."""
    dual_clip: float | None = None
    """With a negative advantage the loss of a token is at most this times |advantage| (`ppo` only); unset: no bound."""
    sapo_tau: float = 1.0
    """Sharpness of the gate of `sapo` for positive advantages."""
    sapo_tau_negative: float = 1.05
    """The same for negative ones; sharper, so that they die out sooner."""
    aggregation: LossAggregation = LossAggregation.token
    """Weight of a token: `token` 1/all response tokens, `sequence` 1/(N*len), `constant` 1/(N*max_response_tokens)."""
    kl_coef: float = 0.0
    """Coefficient of the KL term to the reference model. At 0 no reference model is built."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """Per-token KL estimator. `k3_unbiased` weights k3 by the ratio to the old policy, gradient included."""
    kl_in: KLPlacement = KLPlacement.loss
    """The KL is a term of the loss, or is subtracted from the rewards (not with right-or-wrong advantages)."""
    mask_truncated: bool = False
    """Leave truncated responses out of the loss and its averages; they still count in their group's advantages."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus."""
    old_logprobs: OldLogprobs = OldLogprobs.recompute
    """Old log-probs from the trainer before the update (`recompute`), or as the server reported them (`rollout`)."""


@dataclass
class CorrectionConfig:
    """Correction for sampling from other log-probs than the trainer's; ratio = old policy / server's, per token."""

    weight: CorrectionWeight = CorrectionWeight.none
    """Weight the loss by each `token`'s ratio (truncated importance sampling, decoupled PPO), or the `sequence`'s."""
    weight_max: float | None = 2.0
    """Largest weight; unset: no bound."""
    mask_low: float | None = None
    """Tokens whose ratio is below this give no gradient (IcePop); unset: no bound."""
    mask_high: float | None = None
    """The same for ratios above this."""
    reject_low: float | None = None
    """Responses whose geometric mean of ratios is below this give no gradient; unset: no bound."""
    reject_high: float | None = None
    """The same for means above this."""


@dataclass
class OptimConfig:
    """AdamW with float32 master weights."""

    lr: float = 1e-6
    """Peak learning rate."""
    schedule: LRSchedule = LRSchedule.constant
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Largest global gradient norm."""
    distributed: bool = True
    """Shard optimizer states over data-parallel ranks (Megatron's distributed optimizer)."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the parameter all-gather with the next forward pass."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA): the model is frozen, its projections get an update of low rank."""

    rank: int = 0
    """Rank of the update; 0: no adapters, all weights are trained."""
    alpha: float = 32.0
    """The update is scaled by `alpha / rank`."""
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    """Projections that get adapters, of `q_proj k_proj v_proj o_proj gate_proj up_proj down_proj`."""


@dataclass
class ActorConfig:
    """The model in training."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallel layout."""
    adv_norm: AdvNormConfig = field(default_factory=AdvNormConfig)
    """Advantage estimator."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Correction for the difference between server and trainer."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters in place of full fine-tuning."""
    reference: ReferencePlacement = ReferencePlacement.auto
    """Reference weights: in `host` memory and swapped in, a second model on the `device`, or the `base` under LoRA."""
    mini_batches: int = 1
    """Optimizer updates per pass over a rollout batch; the batch is cut by groups."""
    epochs: int = 1
    """Passes over a rollout batch."""
    microbatch_tokens: int = 8192
    """Most tokens that one forward/backward pass packs together."""
    share_prompts: bool = True
    """Compute a prompt once for its whole group. Same loss and gradient; off packs every sequence on its own."""
    skip_zero_advantage: bool = True
    """Leave groups with all-zero advantages out of the update where that is exact (no KL, no entropy bonus)."""
    recompute: bool = False
    """Recompute activations in the backward pass (full, one layer at a time)."""
    logprob_chunk: int = 256
    """Tokens whose logits exist at one time."""


@dataclass
class ServerConfig:
    """SGLang servers that `megatron-mapo serve` and `megatron-mapo launch` start."""

    count: int = 1
    """Number of servers; server i listens on `port + i`."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback exposes the server to the network."""
    port: int = 30000
    """Port of the first server; 0 picks free ports (`launch local` only)."""
    tensor: int = 1
    """Tensor-parallel size of one server (CUDA)."""
    threads: int = 0
    """CPU threads of one server; 0 means all cores."""
    max_total_tokens: int = 32768
    """Size of the KV cache in tokens (CPU); on CUDA `mem_fraction` decides."""
    max_running_requests: int = 64
    """Requests decoded together."""
    mem_fraction: float = 0.8
    """Fraction of GPU memory for weights and KV cache (CUDA)."""
    startup_timeout: float = 300.0
    """Seconds until a server must answer."""
    restarts: int = 3
    """How often one server is started again after it ended or hung; then it is given up. One that has answered for ten
    minutes begins anew."""
    restart_delay: float = 1.0
    """Seconds before a server is started again; doubled each further time."""
    hang_timeout: float = 120.0
    """Seconds without an answer to `/model_info` after which a server counts as hung and is started again."""
    extra_args: list[str] = field(default_factory=list)
    """Further arguments of `sglang.launch_server`, as given."""


@dataclass
class SyncConfig:
    """How new weights reach the servers."""

    mode: SyncMode = SyncMode.distributed
    """`distributed`: broadcast (gloo on CPU, NCCL on CUDA); `disk`: safetensors in a shared folder."""
    verify: bool = True
    """Compare a checksum of the servers' weights with the trainer's after every update."""
    bucket_mb: int = 256
    """Weights are sent in buckets of at most this many MiB."""
    timeout: float = 300.0
    """Seconds for any one request or collective of an update."""
    disk_dir: str | None = None
    """Folder for `disk` mode that trainers and servers both see; unset: inside the run folder."""


@dataclass
class FilterConfig:
    """Groups worth training on; others are sampled again with other prompts (dynamic sampling)."""

    varied: bool = False
    """Drop groups whose rewards are all equal before any overlong penalty: all right or all wrong (DAPO)."""
    min_p: float | None = None
    """Drop groups whose success rate is below this; unset: no bound."""
    max_p: float | None = None
    """Drop groups whose success rate is above this; unset: no bound."""
    max_truncated: float | None = None
    """Drop groups with a larger share of truncated responses; unset: no bound."""
    oversample: int = 3
    """A step samples at most this many times `prompts_per_step` prompts; then it goes on with what passed."""


@dataclass
class RolloutConfig:
    """Generation."""

    urls: list[str] = field(default_factory=list)
    """Servers to use, as `http://host:port`. Empty, without `urls_file`: those of `rollout.server`."""
    urls_file: str | None = None
    """File with further servers, one address a line. Read again before every weight sync: new ones join, those gone
    leave."""
    api_key_file: str | None = None
    """File with the servers' API key; unset: the environment's MAPO_API_KEY, else no key."""
    prompts_per_step: int = 8
    """Prompts (groups) per training step."""
    responses_per_prompt: int = 8
    """Responses per prompt (group size G)."""
    max_prompt_tokens: int = 1024
    """Longer prompts are an error that names the row."""
    max_response_tokens: int = 1024
    """Longest response; longer ones are cut and marked as truncated."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are of the tempered distribution on both sides."""
    concurrency: int = 64
    """Groups in flight at one time."""
    timeout: float = 600.0
    """Seconds for one request, generation included."""
    retries: int = 3
    """Further tries of a failed request, on another server where there is one. Not counted: servers taken out since."""
    max_failures: int = 3
    """Failed requests in a row after which a server is taken out, until it has got the weights anew."""
    probe_timeout: float = 30.0
    """Seconds to answer `/model_info`; a server that takes longer is taken out, and its requests go to others."""
    straggler_ratio: float = 3.0
    """A server that takes this many times the median seconds a token is slow: others get its requests too, and the
    first answer counts. It has one prompt at a time until it is as fast as others."""
    wait_timeout: float = 600.0
    """Seconds to wait for a server when all are gone; then the run saves a checkpoint and ends."""
    max_logprob_diff: float | None = None
    """Stop when the mean |server - trainer| log-prob difference of a step is above this; unset: only report."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """Which groups to train on."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Servers to start."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """Weight sync."""


@dataclass
class RewardComponent:
    """One verifier of a mixture (an element of `reward.mixture`)."""

    name: str = "???"
    """Verifier, as `reward.name`."""
    weight: float = 1.0
    """Its share of the reward is `weight` times what it gives; 0: only reported."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its options, as `reward.options`."""
    label: str = ""
    """What metrics and `reward.success` call it; empty: its name, of an import path the function's."""

    @property
    def title(self) -> str:
        """``label``, or what stands for it."""
        return self.label or self.name.rpartition(":")[2]


@dataclass
class RewardConfig:
    """The verifier, or a mixture of several."""

    name: str = "math"
    """`math`, `gsm8k`, `exact`, `choice`, `regex`, `format`, `math_verify`, `http`, `reasoning_gym`, or an import path
    `package.module:function`, `path/to/file.py:function`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of that verifier: further keyword arguments of its function."""
    mixture: list[RewardComponent] = field(default_factory=list)
    """Several verifiers, whose weighted sum is the reward: a list of `{name, weight, options, label}` that replaces
    `name` and `options`. A later file or override replaces the whole list."""
    success: str | None = None
    """The component of `mixture` (its label) that says which responses are successes."""
    success_score: float | None = None
    """Lowest score of that component that is a success; unset: `correct`."""
    timeout: float = 10.0
    """Seconds for one response; it runs in another process that is ended when it takes longer."""
    workers: int = 1
    """Verifier processes; with a mixture, of each component."""
    concurrency: int = 16
    """Responses that one process of an `async` verifier works on at a time."""
    memory_mb: int = 2048
    """Most MiB of address space one verifier process may take; 0: no limit."""
    on_failure: OnFailure = OnFailure.error
    """A verifier that raises, hangs or returns NaN stops the run (`error`), or counts as a wrong answer (`wrong`); one
    of negative weight then counts as right, so that no response escapes a penalty."""
    correct: float = 1.0
    """Reward of a right answer."""
    wrong: float = 0.0
    """Reward of a wrong answer."""
    overlong_penalty: float = 0.0
    """Subtracted from truncated responses. Must be 0 with modes that need right or wrong: `mix`, `mean_only`,
    `treerpo`, `pass_at_k`."""
    overlong_buffer: int = 0
    """Tokens before `rollout.max_response_tokens` over which the penalty grows from 0 (DAPO's soft punishment)."""

    @property
    def components(self) -> list[RewardComponent]:
        """The verifiers: those of the mixture, else the one of `name`."""
        return self.mixture or [RewardComponent(self.name, 1.0, self.options)]

    @property
    def main(self) -> RewardComponent:
        """The verifier that says what a success is: that of ``success``, else the first."""
        return next((c for c in self.components if c.title == self.success), self.components[0])

    def section_of(self, index: int) -> str:
        """Where name and options of component ``index`` stand, for messages."""
        return f"reward.mixture[{index}]" if self.mixture else "reward"


@dataclass
class CurriculumConfig:
    """Prompts that rest: those whose success rate, when last sampled, was out of bounds."""

    min_p: float | None = None
    """Rest prompts whose success rate was below this (too hard yet); unset: no bound."""
    max_p: float | None = None
    """Rest prompts whose success rate was above this (mastered); unset: no bound."""
    rest_epochs: int = 2
    """Epochs that such a prompt is left out before it is tried again."""


@dataclass
class DataConfig:
    """Prompts."""

    train: str = "???"
    """A .jsonl/.json/.parquet file, a Hugging Face dataset `name[:config]`, or `reasoning_gym:task`."""
    train_split: str = "train"
    """Split of a Hugging Face dataset."""
    eval: str | None = None
    """Held-out prompts, in the same forms; unset: no evaluation."""
    eval_split: str = "test"
    """Split of a Hugging Face dataset."""
    eval_limit: int | None = None
    """Use only the first this many held-out prompts."""
    prompt_key: str = "question"
    """Column with the question."""
    answer_key: str = "answer"
    """Column with the reference answer."""
    template: str = "{question}"
    """User message made of a row's question."""
    system: str | None = None
    """System message; unset: none is sent (a chat template may add its own)."""
    shuffle: bool = True
    """New order every epoch, from `run.seed`."""
    deduplicate: bool = False
    """Drop rows whose question stands in an earlier row already. With another answer there it is an error."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Which prompts rest."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a `reasoning_gym` task; `seed` and `size` are among them. Held-out rows get another seed."""


@dataclass
class EvalConfig:
    """Evaluation on `data.eval`."""

    interval: int = 0
    """Evaluate every this many steps; 0: never during training."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    samples: int = 4
    """Sampled responses per prompt at `rollout.temperature`, beside a greedy one; 0: pass@1 is the greedy one's."""


@dataclass
class TrainerConfig:
    """The loop."""

    steps: int = 100
    """Training steps (rollout batches)."""
    save_interval: int = 20
    """Checkpoint every this many steps; 0: only after the last step."""
    async_save: bool = True
    """Write checkpoints while training goes on. Costs host memory for one more copy of what a rank writes."""
    keep_checkpoints: int = 2
    """Keep this many of the newest checkpoints; older ones are removed when a new one is complete."""
    keep_every: int = 0
    """Keep the checkpoints of every this many steps for good; 0: none."""
    keep_best: bool = False
    """Keep the checkpoint with the highest `best_metric` of the evaluation at its step; the file `best` names it.
    Scores of another metric or of other data are not compared."""
    best_metric: str = "pass_at_1"
    """What `keep_best` compares: a number of `evaluations.jsonl`, higher is better."""
    verify_checkpoints: bool = True
    """Compare checksums of all files before a checkpoint is loaded. Sizes are compared in any case."""
    export: bool = False
    """Write a Hugging Face folder `export/` into the run folder after the last step."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    hang_timeout: float = 1500.0
    """Seconds that one phase of a step may take; then all ranks write their stacks and end. Below the next one."""
    collective_timeout: float = 1800.0
    """Seconds until a collective that not all ranks joined is an error."""
    max_skipped: int = 3
    """Updates whose loss or gradient is not finite are skipped; this many in a row stop the run."""
    straggler_ratio: float = 2.0
    """Name a rank that takes this many times the median, three steps in a row, for the same small piece of work or for
    its forward and backward passes."""
    threads: int = 0
    """CPU threads of one rank; 0: all cores shared evenly by the ranks of this machine. Ignored on CUDA."""


@dataclass
class TrackingConfig:
    """What is written beside `metrics.jsonl`."""

    tensorboard: bool = True
    """TensorBoard event files in the run folder."""
    plots: bool = True
    """`curves.png` in the run folder, renewed while training."""
    samples: int = 8
    """Sequences per step written to `samples.jsonl`, as text to read."""
    rollouts: bool = True
    """All trained sequences of every step in `rollouts/step_NNNNNN.parquet`: text, reward, advantage, p, versions."""
    gradients_every: int = 0
    """Every so many steps: norm of the gradient that the groups of each success rate have alone, before the update.
    Costs one more pass over the batch. 0: never."""
    progress: bool = True
    """Live progress on the terminal."""


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where a run lives."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy's starting point."""
    actor: ActorConfig = field(default_factory=ActorConfig)
    """The model in training."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The verifier."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The loop."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Metrics, plots, samples."""

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.output_dir) / self.run.name

    @property
    def right_from(self) -> float:
        """Smallest reward that counts as right, where ``reward.success`` is not set."""
        threshold = self.actor.adv_norm.success_threshold
        return self.reward.correct if threshold is None else threshold


# --------------------------------------------------------------------------- reading a configuration


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration: a YAML file, then ``section.key=value`` overrides.

    A file may name another one that it builds on: ``base: other.yaml`` (relative to the file). Keys of the
    file win over those of its base. A relative file in ``data.train`` or ``data.eval`` is looked for in the
    current folder first, then beside the file that names it; when found it becomes absolute.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: ``key=value`` strings, the value in YAML syntax. Later ones win.

    Returns:
        A validated ``Config`` with enum members, not an OmegaConf object.

    Raises:
        ConfigError: the file is missing or not a mapping, a key is unknown, a value has the wrong type or
            is out of range, a mandatory key is missing, or two keys contradict each other.
    """
    folder = Path(path).resolve().parent if path is not None else None
    layers = _read_layers(Path(path), ()) if path is not None else []
    layers += [(f"override {text!r}", _parse_override(text, folder)) for text in overrides]
    merged = OmegaConf.structured(Config)
    for origin, layer in layers:
        _check_keys(layer, Config, "", origin)
        merged = _merge(merged, layer, origin)
    try:
        OmegaConf.resolve(merged)
        _check_mandatory(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'configuration'}: {_first_line(error)}") from error
    assert isinstance(config, Config)
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """The configuration as YAML that ``load_config`` reads back to an equal ``Config``."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys. An empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The files of a ``base`` chain as (origin, mapping), the innermost base first."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to a file that builds on it")
    if not path.is_file():
        where = f"`base` of {seen[-1]} names {path}, which does not exist" if seen else f"no such file: {path}"
        raise ConfigError(f"configuration: {where}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections (run, model, ...), got a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must be the path of another configuration file, got {base!r}")
    layer: Any = tree
    _find_data_files(layer, path.resolve().parent)
    below = _read_layers(path.parent / base, (*seen, path.resolve())) if base else []
    return [*below, (str(path), layer)]


def _parse_override(text: str, folder: Path | None) -> dict[str, Any]:
    """``a.b=value`` as ``{"a": {"b": value}}``; the value is YAML."""
    key, equals, _ = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"override {text!r} must have the form section.key=value")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override of {key}: the value is not valid YAML: {_one_line(error)}") from error
    _find_data_files(tree, folder)
    return tree


def _find_data_files(tree: dict[str, Any], folder: Path | None) -> None:
    """Make ``data.train`` and ``data.eval`` absolute where they name an existing file (see ``load_config``)."""
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for key in ("train", "eval"):
        name = data.get(key)
        if not isinstance(name, str) or Path(name).suffix not in DATA_SUFFIXES:
            continue
        found = [c for c in (Path(name), folder / name if folder else Path(name)) if c.is_file()]
        if found:
            data[key] = str(found[0].resolve())


def _check_keys(tree: Mapping[Any, Any], section: type, prefix: str, origin: str) -> None:
    """Refuse keys that the schema does not have, and sections that are not mappings."""
    hints = typing.get_type_hints(section)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            hint = f" (its keys: {', '.join(hints)})" if prefix.endswith("].") else _suggestion(key)
            raise ConfigError(f"{origin}: unknown key {key}{hint}")
        if typing.get_origin(hints[name]) is list:
            _check_list(value, hints[name], key, origin)
        if not dataclasses.is_dataclass(hints[name]):
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{origin}: {key} is a section, its value must be a mapping of keys, got {value!r}")
        _check_keys(value, typing.cast(type, hints[name]), f"{key}.", origin)


def _check_list(value: Any, hint: Any, key: str, origin: str) -> None:
    """Refuse what is no list, and elements of a list of sections that are not such sections."""
    if isinstance(value, Mapping):  # omegaconf's merge fails on it without naming the key
        raise ConfigError(f"{origin}: {key} must be a list (allowed: {_type_text(hint)}), got {value!r}")
    (element,) = typing.get_args(hint)
    if not dataclasses.is_dataclass(element) or not isinstance(value, Sequence) or isinstance(value, str):
        return
    for number, item in enumerate(value):
        where = f"{key}[{number}]"
        if not isinstance(item, Mapping):
            raise ConfigError(f"{origin}: {where} must be a mapping {_keys_text(element)}, got {item!r}")
        _check_keys(item, typing.cast(type, element), f"{where}.", origin)
        try:
            OmegaConf.merge(OmegaConf.structured(element), item)
        except OmegaConfBaseException as error:  # inside a list it would not name the element
            name = str(getattr(error, "full_key", None) or "")
            raise ConfigError(
                f"{origin}: {where}.{name} cannot be {_lookup(item, name)!r}: {_first_line(error)}"
            ) from error


def _keys_text(section: Any) -> str:
    return f"{{{', '.join(item.name for item in dataclasses.fields(section))}}}"


def _suggestion(key: str) -> str:
    """`` (did you mean ...?)`` for an unknown key: the same last part elsewhere, or a similar spelling."""
    known = [option.key for option in describe_options()]
    sections = {known_key.rpartition(".")[0] for known_key in known} - {""}
    names = known + sorted(sections)
    same_leaf = [n for n in names if n.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    best = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0) or close
    return f" (did you mean {best[0]}?)" if best else ""


def _merge(merged: Any, layer: dict[str, Any], origin: str) -> Any:
    """OmegaConf's merge, with errors that name the key, the value and what is allowed."""
    try:
        return OmegaConf.merge(merged, layer)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        if not key:
            raise ConfigError(f"{origin}: {_first_line(error)}") from error
        allowed = {option.key: option.type for option in describe_options()}.get(key)
        value = _lookup(layer, key)
        wanted = f" (allowed: {allowed})" if allowed else ""
        raise ConfigError(f"{origin}: {key} cannot be {value!r}{wanted}: {_first_line(error)}") from error


def _lookup(tree: Any, key: str) -> Any:
    """The value at a dotted key; what stands there if the path ends early."""
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            break
        tree = tree[part]
    return tree


def _check_mandatory(merged: Any) -> None:
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        docs = {option.key: option.doc for option in describe_options()}
        lines = "; ".join(f"{key}: {docs[key]}" if key in docs else key for key in missing)
        raise ConfigError(f"missing mandatory key{'s' if len(missing) > 1 else ''} {lines}")


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------ validation

_Check = tuple[str, Callable[[Any], bool], str]

# (what a value must be, its test, the keys); unset optional values are not tested. The tests are written so
# that NaN fails.
_RANGES: tuple[_Check, ...] = (
    (
        "at least 1",
        lambda v: v >= 1,
        "actor.parallel.tensor actor.parallel.pipeline actor.parallel.context actor.parallel.expert "
        "actor.parallel.virtual_pipeline actor.parallel.expert_tensor "
        "actor.adv_norm.pass_k actor.mini_batches actor.epochs actor.microbatch_tokens actor.logprob_chunk "
        "rollout.prompts_per_step rollout.max_prompt_tokens rollout.max_response_tokens rollout.concurrency "
        "rollout.max_failures "
        "rollout.server.count rollout.server.tensor rollout.server.max_total_tokens "
        "rollout.server.max_running_requests rollout.sync.bucket_mb "
        "rollout.filter.oversample data.curriculum.rest_epochs "
        "reward.workers reward.concurrency data.eval_limit trainer.steps trainer.max_skipped trainer.keep_checkpoints "
        "run.resume_step",
    ),
    (
        "at least 2, because a group of one response has no advantage",
        lambda v: v >= 2,
        "rollout.responses_per_prompt",
    ),
    (
        "0 or more",
        lambda v: v >= 0,
        "actor.optim.warmup_steps actor.lora.rank rollout.retries rollout.server.threads rollout.server.restarts "
        "trainer.save_interval "
        "trainer.evaluation.interval trainer.evaluation.samples trainer.threads tracking.samples "
        "trainer.keep_every tracking.gradients_every reward.memory_mb reward.overlong_buffer",
    ),
    (
        "0 or more and finite",
        lambda v: 0 <= v < math.inf,
        "actor.adv_norm.eps actor.loss.clip_low actor.loss.clip_high actor.loss.kl_coef actor.loss.entropy_coef "
        "actor.correction.mask_low actor.correction.reject_low actor.optim.eps actor.optim.weight_decay "
        "reward.overlong_penalty rollout.max_logprob_diff "
        "rollout.server.restart_delay",
    ),
    (
        "greater than 0 and finite",
        lambda v: 0 < v < math.inf,
        "actor.optim.lr actor.optim.clip_grad actor.lora.alpha rollout.temperature rollout.timeout "
        "rollout.probe_timeout rollout.wait_timeout rollout.server.hang_timeout "
        "actor.loss.sapo_tau actor.loss.sapo_tau_negative actor.correction.weight_max "
        "actor.correction.mask_high actor.correction.reject_high "
        "rollout.server.startup_timeout rollout.sync.timeout reward.timeout trainer.hang_timeout "
        "trainer.collective_timeout",
    ),
    (
        "greater than 1 and finite",
        lambda v: 1 < v < math.inf,
        "trainer.straggler_ratio rollout.straggler_ratio actor.loss.dual_clip",
    ),
    (
        "from 0 to 1",
        lambda v: 0 <= v <= 1,
        "rollout.filter.min_p rollout.filter.max_p rollout.filter.max_truncated data.curriculum.min_p "
        "data.curriculum.max_p",
    ),
    ("finite", math.isfinite, "actor.adv_norm.success_threshold reward.correct reward.wrong reward.success_score"),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, "actor.optim.beta1 actor.optim.beta2"),
    ("greater than 0 and at most 1", lambda v: 0 < v <= 1, "rollout.server.mem_fraction"),
    ("from 0 to 65535", lambda v: 0 <= v <= 65535, "rollout.server.port"),
    ("from 0 to 4294967295", lambda v: 0 <= v < 2**32, "run.seed"),
    (
        "letters, digits, `.`, `_`, `-`, beginning with a letter or a digit",
        lambda v: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", v) is not None,
        "run.name",
    ),
    ("text that contains {question}", lambda v: "{question}" in v, "data.template"),
    (
        "a list of strings",
        lambda v: all(isinstance(item, str) for item in v),
        "rollout.urls rollout.server.extra_args",
    ),
    (
        "not empty",
        lambda v: v.strip() != "",
        "run.output_dir model.path data.train data.eval data.prompt_key data.answer_key reward.name "
        "rollout.server.host rollout.urls_file rollout.api_key_file rollout.sync.disk_dir trainer.best_metric",
    ),
)


def validate(config: Config) -> None:
    """Check ranges, and keys that contradict each other.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    for text, holds, keys in _RANGES:
        for key in keys.split():
            value = get_option(config, key)
            if value is not None and not holds(value):
                raise ConfigError(f"{key} must be {text}, got {value!r}")
    _validate_mixture(config)
    _validate_advantages(config)
    _validate_loss(config)
    _validate_actor(config)
    _validate_trainer(config)
    _validate_rollout(config)
    _validate_data(config)
    _validate_checkpoints(config)


def get_option(config: Config, key: str) -> Any:
    """The value at a dotted key such as ``actor.optim.lr``."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


# Registered verifiers whose score is right or wrong, nothing between. A verifier given by an import path is
# checked at run time, where its rewards are seen.
BINARY_VERIFIERS = frozenset({"math", "gsm8k", "exact", "choice", "regex", "format", "math_verify"})
PARTIAL_VERIFIERS = frozenset({"reasoning_gym"})


def _validate_mixture(config: Config) -> None:
    """Labels and weights; and MAPO must be told what a success is, a sum of components does not."""
    reward, adv = config.reward, config.actor.adv_norm
    if not reward.mixture:
        alone = reward.success is None and reward.success_score is None
        _require(alone, "reward.success and reward.success_score are only for a reward.mixture, and there is none")
        return
    titles = [component.title for component in reward.mixture]
    for number, component in enumerate(reward.mixture):
        where = reward.section_of(number)
        _require(component.name.strip() != "", f"{where}.name must be not empty")
        _require(math.isfinite(component.weight), f"{where}.weight must be finite, got {component.weight}")
        _require(
            re.fullmatch(r"[A-Za-z0-9_.-]+", component.title) is not None,
            f"{where}.label must be letters, digits, `.`, `_`, `-`, got {component.title!r}",
        )
        _require(
            titles.count(component.title) == 1,
            f"{where}: two components are called {component.title!r}: give one of them another `label`",
        )
    _require(any(c.weight != 0 for c in reward.mixture), "reward.mixture: at least one weight must not be 0")
    _require(not reward.options, "reward.options is set beside reward.mixture: options belong to its components")
    _require(
        reward.success is None or reward.success in titles,
        f"reward.success must be a component of reward.mixture ({', '.join(titles)}), got {reward.success!r}",
    )
    _require(
        reward.success is not None or reward.success_score is None, "reward.success_score is set without reward.success"
    )
    _require(
        reward.success is None or adv.success_threshold is None,
        f"reward.success={reward.success} and actor.adv_norm.success_threshold both say what a success is: unset one",
    )
    mode = adv.aggregation_mode
    if mode in RIGHT_OR_WRONG_MODES:
        _require(
            reward.success is not None or adv.success_threshold is not None,
            f"actor.adv_norm.aggregation_mode={mode} needs to know which responses of a reward.mixture are successes: "
            f"set reward.success to one of {', '.join(titles)}, or actor.adv_norm.success_threshold",
        )
        _require(
            reward.wrong >= 0,
            f"reward.wrong must be 0 or more with reward.mixture and actor.adv_norm.aggregation_mode={mode}, which "
            f"divide by a group's mean reward; got {reward.wrong}",
        )
    _validate_mixture_range(reward, mode)


def _validate_mixture_range(reward: RewardConfig, mode: str) -> None:
    """Modes that divide by a group's mean need sums that are never below 0, `treerpo` none above 1 either."""
    if mode in ("mix", "mean_only", "treerpo"):
        for number, component in enumerate(reward.mixture):
            _require(
                component.weight >= 0,
                f"{reward.section_of(number)}.weight must be 0 or more with actor.adv_norm.aggregation_mode={mode}, "
                f"which divides by a group's mean reward: a negative weight could make it 0 or less; got "
                f"{component.weight:g}; choose aggregation_mode=native, or give the verifier's opposite a positive one",
            )
    if mode == "treerpo":
        highest = math.fsum(component.weight for component in reward.mixture) * reward.correct
        _require(
            highest <= 1,
            f"reward.mixture: the weights times reward.correct ({reward.correct:g}) add up to {highest:g}, but "
            "actor.adv_norm.aggregation_mode=treerpo needs rewards from 0 to 1: lower the weights or reward.correct",
        )


def _validate_advantages(config: Config) -> None:
    """MAPO's mixed advantage is defined for right/wrong rewards (arXiv 2509.18849, eq. 6)."""
    reward, adv = config.reward, config.actor.adv_norm
    single = "" if reward.mixture else reward.name
    _require(
        adv.aggregation_mode in ADVANTAGE_MODES or ":" in adv.aggregation_mode,
        f"actor.adv_norm.aggregation_mode cannot be {adv.aggregation_mode!r} (allowed: {' | '.join(ADVANTAGE_MODES)}, "
        "or an import path `package.module:function`)",
    )
    _require(
        adv.aggregation_mode != "pass_at_k" or adv.pass_k <= config.rollout.responses_per_prompt,
        f"actor.adv_norm.pass_k ({adv.pass_k}) must not exceed rollout.responses_per_prompt "
        f"({config.rollout.responses_per_prompt})",
    )
    _require(
        reward.correct > reward.wrong,
        f"reward.correct must be greater than reward.wrong, got {reward.correct} and {reward.wrong}",
    )
    threshold = adv.success_threshold
    if threshold is not None and single in BINARY_VERIFIERS | PARTIAL_VERIFIERS:
        _require(
            reward.wrong < threshold <= reward.correct,
            f"actor.adv_norm.success_threshold must lie above reward.wrong ({reward.wrong}) and not above "
            f"reward.correct ({reward.correct}), got {threshold}",
        )
    mode = adv.aggregation_mode
    if mode not in RIGHT_OR_WRONG_MODES:
        return
    _require(
        reward.overlong_penalty == 0,
        f"reward.overlong_penalty must be 0 with actor.adv_norm.aggregation_mode={mode}, got "
        f"{reward.overlong_penalty}: it needs rewards that are right or wrong; choose aggregation_mode=native, or drop "
        "the penalty",
    )
    _require(
        single not in PARTIAL_VERIFIERS or threshold is not None,
        f"reward.name={single} gives partial scores, and actor.adv_norm.aggregation_mode={mode} needs right or "
        f"wrong: set actor.adv_norm.success_threshold (for example {reward.correct})",
    )
    _require(
        threshold is None or reward.wrong >= 0 or mode == "pass_at_k",
        f"reward.wrong must be 0 or more with actor.adv_norm.success_threshold and aggregation_mode={mode}, "
        f"which divide by a group's mean reward; got {reward.wrong}",
    )


RIGHT_OR_WRONG_MODES = frozenset({"mix", "mean_only", "treerpo", "pass_at_k"})


def _validate_loss(config: Config) -> None:
    loss, correction, mode = config.actor.loss, config.actor.correction, config.actor.adv_norm.aggregation_mode
    _require(
        loss.objective is Objective.gmpo or loss.clip_low <= 1,
        f"actor.loss.clip_low must be from 0 to 1, got {loss.clip_low}",
    )
    _require(
        loss.dual_clip is None or loss.objective is Objective.ppo,
        f"actor.loss.dual_clip is part of actor.loss.objective=ppo; unset it with {loss.objective.value}",
    )
    _validate_unused(loss, correction)
    in_reward = loss.kl_coef > 0 and loss.kl_in is KLPlacement.reward
    _require(
        not in_reward or mode not in RIGHT_OR_WRONG_MODES,
        f"actor.loss.kl_in=reward makes rewards that are not right or wrong, which "
        f"actor.adv_norm.aggregation_mode={mode} needs: set actor.loss.kl_in=loss, or choose aggregation_mode=native",
    )
    _require(
        not in_reward or loss.kl_estimator is not KLEstimator.k3_unbiased,
        "actor.loss.kl_estimator=k3_unbiased is for actor.loss.kl_in=loss; take k1, k2 or k3 in the reward",
    )
    bounds = {name: getattr(correction, name) for name in ("mask_low", "mask_high", "reject_low", "reject_high")}
    used = ["weight"] if correction.weight is not CorrectionWeight.none else []
    used += [name for name, bound in bounds.items() if bound is not None]
    _require(
        not used or loss.old_logprobs is OldLogprobs.recompute,
        f"actor.correction.{(used or [''])[0]} compares the trainer's old log-probs with the server's: it needs "
        "actor.loss.old_logprobs=recompute",
    )
    for kind in ("mask", "reject"):
        low, high = bounds[f"{kind}_low"], bounds[f"{kind}_high"]
        _require(
            low is None or high is None or low < high,
            f"actor.correction.{kind}_low ({low}) must be below actor.correction.{kind}_high ({high})",
        )


def _validate_unused(loss: LossConfig, correction: CorrectionConfig) -> None:
    """Settings that the objective does not use, or uses otherwise than its paper: somebody has forgotten something.

    A bound at its default is not told from one that was not set, so that alone is never an error.
    """
    objective = f"actor.loss.objective={loss.objective.value}"
    # `constant` also counts a response by its length, but it is no default: it was chosen.
    _require(
        loss.objective not in (Objective.gspo, Objective.gmpo) or loss.aggregation is not LossAggregation.token,
        f"{objective} is a mean over responses, and with actor.loss.aggregation=token long ones count more: set "
        "actor.loss.aggregation=sequence (the paper's), or constant",
    )
    default = LossConfig()
    used = {
        "clip_low": loss.objective is not Objective.sapo,
        "clip_high": loss.objective is not Objective.sapo,
        "sapo_tau": loss.objective is Objective.sapo,
        "sapo_tau_negative": loss.objective is Objective.sapo,
    }
    for name, is_used in used.items():
        _require(
            is_used or getattr(loss, name) == getattr(default, name),
            f"actor.loss.{name} is set and {objective} does not use it: unset it, or choose another objective",
        )
    _require(
        loss.kl_coef > 0 or loss.kl_in is KLPlacement.loss,
        "actor.loss.kl_in=reward subtracts nothing with actor.loss.kl_coef=0: set actor.loss.kl_coef, or unset "
        "actor.loss.kl_in",
    )
    _require(
        correction.weight is not CorrectionWeight.none or correction.weight_max == CorrectionConfig().weight_max,
        "actor.correction.weight_max bounds a weight, and actor.correction.weight=none has none: set "
        "actor.correction.weight, or unset actor.correction.weight_max",
    )


def _validate_actor(config: Config) -> None:
    actor, rollout = config.actor, config.rollout
    _require(
        not actor.parallel.sequence or actor.parallel.tensor > 1,
        "actor.parallel.sequence=true needs actor.parallel.tensor greater than 1",
    )
    _require(
        actor.parallel.virtual_pipeline == 1 or actor.parallel.pipeline > 1,
        f"actor.parallel.virtual_pipeline={actor.parallel.virtual_pipeline} needs actor.parallel.pipeline above 1",
    )
    unknown = set(actor.lora.targets) - set(LORA_TARGETS)
    _require(
        not unknown and bool(actor.lora.targets),
        f"actor.lora.targets must name some of {', '.join(LORA_TARGETS)}; got {actor.lora.targets}",
    )
    _require(
        actor.reference is not ReferencePlacement.base or actor.lora.rank > 0,
        "actor.reference=base is the model under LoRA adapters: it needs actor.lora.rank of at least 1",
    )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    _require(
        longest <= actor.microbatch_tokens,
        f"actor.microbatch_tokens ({actor.microbatch_tokens}) cannot hold one sequence of rollout.max_prompt_tokens "
        f"+ rollout.max_response_tokens = {longest} tokens",
    )
    _require(
        actor.mini_batches <= rollout.prompts_per_step,
        f"actor.mini_batches ({actor.mini_batches}) must not exceed rollout.prompts_per_step "
        f"({rollout.prompts_per_step}): a batch is cut by groups",
    )
    optim = actor.optim
    _require(
        not optim.overlap_param_gather or (optim.distributed and optim.overlap_grad_reduce),
        "actor.optim.overlap_param_gather=true needs actor.optim.distributed=true and "
        "actor.optim.overlap_grad_reduce=true",
    )


def _validate_trainer(config: Config) -> None:
    trainer = config.trainer
    _require(
        trainer.hang_timeout < trainer.collective_timeout,
        f"trainer.hang_timeout ({trainer.hang_timeout:g}) must be below trainer.collective_timeout "
        f"({trainer.collective_timeout:g}), or a hang ends as a failed collective without the ranks' stacks",
    )


def server_url_problem(url: str) -> str:
    """Why ``url`` is not the base address of a server; empty if it is one. Shows no password."""
    if "@" in url:
        return "an address with a user or password lands in logs: set rollout.api_key_file or MAPO_API_KEY instead"
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
    except ValueError:
        good = False
    return "" if good else f"{url!r} is no address such as http://host:30000"


_KEY_FLAGS = ("--api-key", "--admin-api-key")


def _validate_server_arguments(server: ServerConfig) -> None:
    for argument in server.extra_args:
        name = argument.partition("=")[0]
        flag = next((flag for flag in _KEY_FLAGS if name.startswith("--a") and flag.startswith(name)), None)
        _require(
            flag is None,
            f"rollout.server.extra_args holds {flag}, and lands in logs and on command lines: "
            "set rollout.api_key_file or MAPO_API_KEY instead",
        )


def _validate_rollout(config: Config) -> None:
    rollout = config.rollout
    for section, bounds in (("rollout.filter", rollout.filter), ("data.curriculum", config.data.curriculum)):
        low, high = bounds.min_p, bounds.max_p
        _require(
            low is None or high is None or low < high, f"{section}.min_p ({low}) must be below {section}.max_p ({high})"
        )
    loss, mode = config.actor.loss, config.actor.adv_norm.aggregation_mode
    shaped = loss.kl_coef > 0 and loss.kl_in is KLPlacement.reward
    _require(
        not rollout.filter.varied or not (shaped or mode == "reinforce++"),
        "rollout.filter.varied drops groups of equal rewards, which have an advantage with "
        f"{'actor.loss.kl_in=reward' if shaped else f'actor.adv_norm.aggregation_mode={mode}'}: unset one of them",
    )
    _validate_success_rates(config)
    _require(
        config.reward.overlong_buffer == 0 or config.reward.overlong_penalty > 0,
        "reward.overlong_buffer is where reward.overlong_penalty grows, and that is 0",
    )
    _require(
        config.reward.overlong_buffer <= rollout.max_response_tokens,
        f"reward.overlong_buffer ({config.reward.overlong_buffer}) must not exceed rollout.max_response_tokens "
        f"({rollout.max_response_tokens})",
    )
    for url in rollout.urls:
        problem = server_url_problem(url)
        _require(not problem, f"rollout.urls: {problem}")
    trimmed = [url.rstrip("/") for url in rollout.urls]
    _require(len(set(trimmed)) == len(trimmed), f"rollout.urls names a server twice: {', '.join(trimmed)}")
    server = rollout.server
    _validate_server_arguments(server)
    _require(
        server.port == 0 or server.port + server.count - 1 <= 65535,
        f"rollout.server.port ({server.port}) + rollout.server.count ({server.count}) goes beyond port 65535",
    )
    _require(
        rollout.sync.disk_dir is None or rollout.sync.mode is SyncMode.disk,
        f"rollout.sync.disk_dir is set but rollout.sync.mode={rollout.sync.mode.value} does not use it",
    )
    _require(
        rollout.wait_timeout < config.trainer.hang_timeout,
        f"rollout.wait_timeout ({rollout.wait_timeout:g}) must be below trainer.hang_timeout "
        f"({config.trainer.hang_timeout:g}): the other ranks wait while rank 0 waits for servers",
    )


def _validate_success_rates(config: Config) -> None:
    """Bounds of success rates need rewards of which it is known what a success is."""
    reward = config.reward
    if reward.success is not None or config.actor.adv_norm.success_threshold is not None:
        return
    if reward.mixture:
        titles = ", ".join(component.title for component in reward.mixture)
        needs = f"a reward.mixture does not say what a success is: set reward.success to one of {titles}, or "
    elif reward.name in PARTIAL_VERIFIERS:
        needs = f"reward.name={reward.name} gives partial scores: set "
    else:
        return
    for section, bounds in (("rollout.filter", config.rollout.filter), ("data.curriculum", config.data.curriculum)):
        _require(
            bounds.min_p is None and bounds.max_p is None,
            f"{section}.min_p and {section}.max_p are about success rates, and {needs}actor.adv_norm.success_threshold",
        )


def _validate_data(config: Config) -> None:
    data = config.data
    _require(
        config.trainer.evaluation.interval == 0 or data.eval is not None,
        "trainer.evaluation.interval is set but there is nothing to evaluate on: set data.eval",
    )
    procedural = [s for s in (data.train, data.eval) if s is not None and s.startswith("reasoning_gym:")]
    _require(
        not data.options or bool(procedural),
        "data.options is only for `reasoning_gym:task` sources, and neither data.train nor data.eval is one",
    )


def _validate_checkpoints(config: Config) -> None:
    _require(
        not config.trainer.keep_best or config.data.eval is not None,
        "trainer.keep_best=true compares evaluations and there is nothing to evaluate on: set data.eval",
    )
    _require(
        config.run.resume_step is None or config.run.resume is Resume.auto,
        "run.resume_step is set but run.resume=never does not resume",
    )


def single_verifier(reward: RewardConfig, name: str, overrides: Sequence[str]) -> RewardConfig:
    """``reward`` with one verifier in place of what it has.

    Args:
        reward: a section.
        name: a verifier, or the label of a component of ``reward.mixture``. One that ``reward`` has keeps its options.
        overrides: of the command line; ``reward.options`` among them are meant for this verifier.
    """
    own = next((c for c in reward.components if name in (c.name, c.title)), None)
    given = reward.options if any(text.startswith("reward.options") for text in overrides) else {}
    component = own or RewardComponent(name, options=given)
    return dataclasses.replace(
        reward, name=component.name, options=component.options, mixture=[], success=None, success_score=None
    )


def data_parallel_size(config: Config, world_size: int) -> int:
    """Data-parallel size that remains of ``world_size`` ranks.

    Raises:
        ConfigError: the layout does not divide the number of ranks.
    """
    parallel = config.actor.parallel
    model = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model != 0:
        raise ConfigError(
            f"actor.parallel.tensor * actor.parallel.pipeline * actor.parallel.context = {parallel.tensor} * "
            f"{parallel.pipeline} * {parallel.context} = {model} does not divide the {world_size} ranks"
        )
    of_a_stage, experts = world_size // parallel.pipeline, parallel.expert * parallel.expert_tensor
    if of_a_stage % experts != 0:
        raise ConfigError(
            f"actor.parallel.expert * actor.parallel.expert_tensor = {parallel.expert} * {parallel.expert_tensor} "
            f"= {experts} does not divide the {of_a_stage} ranks of a pipeline stage"
        )
    return world_size // model


# ------------------------------------------------------------------------------------------------ help


class Option(typing.NamedTuple):
    """One key as ``--help`` shows it."""

    key: str
    type: str
    default: str
    doc: str


def describe_options(section: type = Config, prefix: str = "") -> list[Option]:
    """All keys with type (an enum: its values), default and the docstring under the field, in file order."""
    hints, docs, options = typing.get_type_hints(section), _field_docs(section), []
    for item in dataclasses.fields(section):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        if dataclasses.is_dataclass(hint):
            options += describe_options(typing.cast(type, hint), f"{key}.")
        else:
            options.append(Option(key, _type_text(hint), _default_text(item), docs[item.name]))
    return options


def options_tables(section: str | None = None) -> list[Table]:
    """``describe_options`` as one rich table per section, with the section's docstring as the title.

    Args:
        section: only sections at or below this dotted name, such as ``actor`` or ``actor.optim``.

    Raises:
        ConfigError: there is no such section.
    """
    grouped: dict[str, list[Option]] = {}
    for option in describe_options():
        grouped.setdefault(option.key.rpartition(".")[0], []).append(option)
    names = [n for n in grouped if section is None or n == section or n.startswith(f"{section}.")]
    if not names:
        raise ConfigError(f"there is no section {section}; sections: {', '.join(grouped)}")
    tables = []
    for name in names:
        table = Table(title=f"[bold]{name}[/]  {_section_doc(name)}", title_justify="left", expand=True, box=None)
        table.add_column("key", style="cyan", width=22, overflow="fold")
        table.add_column("type", style="green", width=22, overflow="fold")
        table.add_column("default", width=12, overflow="fold")
        table.add_column("")
        for option in grouped[name]:
            table.add_row(*(escape(text) for text in (option.key.rpartition(".")[2], *option[1:])))
        tables.append(table)
    return tables


def _section_doc(name: str) -> str:
    section: type = Config
    for part in name.split("."):
        section = typing.get_type_hints(section)[part]
    return escape(inspect.cleandoc(section.__doc__ or "").split("\n", 1)[0])


@functools.cache
def _field_docs(section: type) -> dict[str, str]:
    """The string under every field of a dataclass; read from the source, Python does not keep it."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, below in itertools.pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            value = text.value if isinstance(text, ast.Constant) else ""
            docs[statement.target.id] = inspect.cleandoc(value) if isinstance(value, str) else ""
    return docs


def _type_text(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(member.value for member in hint)
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint.__name__
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        return f"list of {_keys_text(typing.get_args(hint)[0])}"
    return str(hint).replace("typing.", "").replace("None", "null")


def _default_text(item: dataclasses.Field[Any]) -> str:
    missing = item.default_factory is dataclasses.MISSING
    value = item.default if missing else typing.cast(Callable[[], Any], item.default_factory)()
    if value == "???":
        return "(required)"
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
