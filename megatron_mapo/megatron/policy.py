"""Actor and reference: log-probs of a batch, and the update of the actor."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from megatron_mapo.algorithms.policy_loss import LossInputs, needs_sequences, policy_loss
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.config import Config, ReferencePlacement
from megatron_mapo.data.packing import PackedBatch, PackingSpec, equal_lengths, pack, plan_microbatches
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.megatron.checkpoint_fit import describe_model
from megatron_mapo.megatron.hf import load_weights, named_adapters, named_weights
from megatron_mapo.megatron.hf_folder import WeightStream
from megatron_mapo.megatron.lora import BaseReference, add_adapters
from megatron_mapo.megatron.model import PolicyModel, forward_microbatch, load_hf_config, transformer_config
from megatron_mapo.megatron.optimizer import NotFinite, build_optimizer, data_parallel
from megatron_mapo.megatron.reference import DeviceReference, HostReference, Reference
from megatron_mapo.megatron.runtime import Runtime


@dataclass(frozen=True)
class TokenScores:
    """What the model says about the response tokens of a batch (R of them), on every rank's CPU.

    Attributes:
        logprobs: float32 ``[R]`` (nat); 0 where not computed.
        entropy: float32 ``[R]`` (nat); 0 where not computed.
        computed: bool ``[R]``; groups left out of an update are False.
    """

    logprobs: Tensor
    entropy: Tensor
    computed: Tensor


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step.

    Attributes:
        scores: log-probs and entropies from just before the step.
        loss: the whole loss (a sum over all ranks and microbatches).
        grad_norm: global gradient norm before clipping; NaN where it, or the loss, is not finite.
        skipped: nothing was changed, because of that.
        learning_rate: of this step.
        packed_tokens: tokens that went through the model, on all data-parallel ranks together.
    """

    scores: TokenScores
    loss: float
    grad_norm: float
    skipped: bool
    learning_rate: float
    packed_tokens: int


def _sum_over_context(totals: Tensor) -> None:
    """Sum in place over the ranks that hold the other tokens of the same sequences."""
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        dist.all_reduce(totals, group=group)


class _ParametersOnMeta(TorchFunctionMode):
    """``torch.empty`` takes no memory. Under ``torch.device("meta")`` rotary frequencies could not be computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def empty_model(config: Config, path: str | Path, device: torch.device) -> tuple[list[PolicyModel], PretrainedConfig]:
    """As ``build_model``, but the weights are still to be read, and there are no adapters.

    On the meta device it takes no memory, whether there is a GPU or not.
    """
    hf = load_hf_config(path, config.model.fallback)
    model_config = transformer_config(hf, config.actor, config.model.dtype, device.type != "cuda")
    with _ParametersOnMeta() if device.type == "meta" else nullcontext():
        chunks = [
            PolicyModel(
                model_config,
                hf,
                temperature=config.rollout.temperature,
                logprob_chunk=config.actor.logprob_chunk,
                chunk=i,
            ).to(device)
            for i in range(config.actor.parallel.virtual_pipeline)
        ]
    return chunks, hf


def build_model(config: Config, path: str | Path, device: torch.device) -> tuple[list[PolicyModel], PretrainedConfig]:
    """The model of a Hugging Face folder in this rank's part of the layout, and its Hugging Face config.

    Returns:
        the pieces of the model that this rank holds, first layers first: one, or
        ``actor.parallel.virtual_pipeline`` of them.

    Raises:
        ConfigError: the layout does not divide the model.
        DataError: the model is not supported, or its files are not as its config says.
    """
    chunks, hf = empty_model(config, path, device)
    load_weights(chunks, hf, path)
    if config.actor.lora.rank:
        add_adapters(chunks, config.actor.lora, config.run.seed)
    return chunks, hf


class Policy:
    """The actor, its optimizer, and (if the loss has a KL term) the frozen reference.

    Attributes:
        chunks: the pieces of the actor that this rank holds.
        ddp: the same pieces, wrapped for data parallelism.
        hf: the model's Hugging Face config.
        identity: what checkpoints say about the model that training began with (see ``describe_model``).
    """

    def __init__(self, config: Config, runtime: Runtime, model_path: str | Path, total_updates: int) -> None:
        self.config, self.runtime, self.model_path = config, runtime, Path(model_path)
        self.chunks, self.hf = build_model(config, model_path, runtime.device)
        self.identity = describe_model(config, self.hf, self.model_path)
        self.ddp = data_parallel(self.chunks, config.actor.optim, self._gradients_are_complete)
        self._update_began = self._own_seconds = 0.0
        self.optimizer, self.scheduler = build_optimizer(self.ddp, config.actor.optim, total_updates)
        self.reference: Reference | None = None
        if config.actor.loss.kl_coef > 0:
            self.reference = self._build_reference()
        parallel = config.actor.parallel
        self.packing = PackingSpec(
            max_tokens=config.actor.microbatch_tokens,
            share_prompts=config.actor.share_prompts,
            data_parallel=parallel_state.get_data_parallel_world_size(),
            context_parallel=parallel.context,
            multiple=parallel.context * (parallel.tensor if parallel.sequence else 1),
            # The interleaved schedule hands microbatches on in rounds of as many as there are stages.
            count_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        )

    def _build_reference(self) -> Reference:
        """The reference is the model that the run started from, which the actor still is at this moment."""
        actor = self.config.actor
        if actor.lora.rank and actor.reference in (ReferencePlacement.auto, ReferencePlacement.base):
            return BaseReference(self.chunks)
        if actor.reference is ReferencePlacement.device:
            return DeviceReference(build_model(self.config, self.model_path, self.runtime.device)[0])
        return HostReference(self.chunks)

    def named_weights(self) -> WeightStream:
        """The actor's weights under their Hugging Face names (see ``hf.named_weights``). Collective."""
        self.gather_parameters()
        return named_weights(self.chunks, self.hf)

    def named_adapters(self) -> WeightStream:
        """The actor's LoRA adapters under PEFT's names (see ``hf.named_adapters``). Collective."""
        self.gather_parameters()
        return named_adapters(self.chunks, self.hf)

    def gather_parameters(self) -> None:
        """Bring all updated weights to this rank before anything but a forward pass reads them. Collective.

        With ``overlap_param_gather`` an update leaves a rank with new values of its own shard only; the
        next forward pass gathers the rest.
        """
        if self.config.actor.optim.overlap_param_gather:
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    def log_probs(self, batch: SequenceBatch) -> TokenScores:
        """Log-probs and entropies of all response tokens under the actor. Collective."""
        return self._score(self.chunks, batch)

    def reference_log_probs(self, batch: SequenceBatch) -> TokenScores:
        """The same under the reference. Collective."""
        assert self.reference is not None
        self.gather_parameters()
        with self.reference.in_place() as chunks:
            return self._score(chunks, batch)

    def _score(self, chunks: list[PolicyModel], batch: SequenceBatch) -> TokenScores:
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            outputs = self._run(chunks, self._microbatches(batch, torch.arange(len(batch)), {}), forward_only=True)
        return self._collect(outputs, len(batch.rollout_logprobs))

    def update(self, batch: SequenceBatch, columns: dict[str, Tensor], rows: Tensor | None = None) -> UpdateResult:
        """One optimizer step on a (mini-)batch. Collective.

        Args:
            batch: N sequences, R response tokens; the same on all ranks.
            columns: per response token ``[R]``: ``advantages``, ``token_weight``; optional
                ``old_logprobs`` (missing: the actor's own, which makes every ratio 1),
                ``ref_logprobs``, and ``rollout_logprobs`` (for ``actor.correction``).
            rows: the sequences that take part (the others must not contribute to the gradient);
                None: all.

        Returns:
            what was found out; an update whose loss or gradient is not finite changes nothing.
        """
        self.scheduler.step(1)
        outputs, microbatches = self._gradient(batch, columns, torch.arange(len(batch)) if rows is None else rows)
        loss, packed_tokens = self._total(outputs, microbatches)
        grad_norm = self._step() if math.isfinite(loss) else math.nan
        return UpdateResult(
            scores=self._collect(outputs, len(batch.rollout_logprobs)),
            loss=loss,
            grad_norm=grad_norm,
            skipped=not math.isfinite(grad_norm),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            packed_tokens=packed_tokens,
        )

    def gradient_norm(self, batch: SequenceBatch, columns: dict[str, Tensor], rows: Tensor) -> float:
        """Norm of the gradient that ``rows`` alone have in the loss of a batch, before clipping. Collective.

        The loss is a sum over tokens, so the gradients of parts add up to that of the whole. Changes no weight.

        Args:
            batch, columns, rows: as for ``update``.

        Returns:
            the global norm; NaN where it is not finite.
        """
        own_seconds = self._own_seconds
        self._gradient(batch, columns, rows)
        self._own_seconds = own_seconds  # those of updates
        self.optimizer.prepare_grads()
        try:
            return float(self.optimizer.get_grad_norm())
        except NotFinite:
            return math.nan

    def _gradient(
        self, batch: SequenceBatch, columns: dict[str, Tensor], rows: Tensor
    ) -> tuple[list[dict[str, Tensor]], list[PackedBatch]]:
        """Leave the loss's gradient in the buffers; what ``_run`` found, and the microbatches."""
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._update_began = time.perf_counter()
        microbatches = self._microbatches(batch, rows, columns)
        return self._run(self.ddp, microbatches, forward_only=False), microbatches

    def _gradients_are_complete(self) -> None:
        self.runtime.wait_for_compute()
        self._own_seconds += time.perf_counter() - self._update_began

    def take_own_seconds(self) -> float:
        """Seconds that forward and backward passes of updates took here, up to the reduction of gradients, since the
        last call. Ranks of other data-parallel replicas are not waited for in them."""
        seconds, self._own_seconds = self._own_seconds, 0.0
        return seconds

    def _step(self) -> float:
        """One optimizer step; returns the gradient norm, or NaN if that is not finite and nothing was changed."""
        try:
            _, grad_norm, _ = self.optimizer.step()
        except NotFinite:
            return math.nan
        return float(grad_norm)

    def _microbatches(self, batch: SequenceBatch, rows: Tensor, columns: dict[str, Tensor]) -> list[PackedBatch]:
        """This rank's microbatches. No rows left still makes one filler, so that a step is a step."""
        part = parallel_state.get_data_parallel_rank()
        if len(rows):
            plan = [rows[local] for local in plan_microbatches(batch.select(rows), self.packing)[part]]
        else:
            plan = [rows] * self.packing.count_multiple
        context_rank = parallel_state.get_context_parallel_rank()
        packed = [pack(batch, r, columns, self.packing, context_rank) for r in plan]
        if self.config.actor.parallel.pipeline > 1:
            packed = equal_lengths(packed)
        return [microbatch.to(self.runtime.device) for microbatch in packed]

    def _run(self, chunks: list[Any], microbatches: list[PackedBatch], forward_only: bool) -> list[dict[str, Tensor]]:
        """All microbatches through megatron's schedule; what the last stage found out about each."""
        actor = self.config.actor

        def forward_step(iterator: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Any]:
            packed = next(iterator)

            def loss_function(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                logprobs, entropy = output
                loss = output.new_zeros(())
                if not forward_only:
                    inputs = self._loss_inputs(packed, logprobs)
                    loss = policy_loss(logprobs, inputs, actor.loss, actor.correction, entropy)
                found = {"index": packed.response_index, "scores": output.detach(), "loss": loss.detach()}
                return loss, torch.ones((), dtype=torch.int, device=loss.device), found

            return forward_microbatch(model, packed), loss_function

        multiple = self.config.actor.parallel.context
        longest = max(len(p.tokens) for p in microbatches) * multiple
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in chunks],
            model=chunks,
            num_microbatches=len(microbatches),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _loss_inputs(self, packed: PackedBatch, logprobs: Tensor) -> LossInputs:
        c, actor = packed.columns, self.config.actor
        sequences = None
        if needs_sequences(actor.loss, actor.correction):
            sequences = TokenSequences(packed.sequence_index, packed.sequence_count, _sum_over_context)
        return LossInputs(
            old_logprobs=c.get("old_logprobs", logprobs.detach()),
            advantages=c["advantages"],
            token_weight=c["token_weight"],
            ref_logprobs=c.get("ref_logprobs"),
            rollout_logprobs=c.get("rollout_logprobs"),
            sequences=sequences,
        )

    def _collect(self, outputs: list[dict[str, Tensor]], responses: int) -> TokenScores:
        """Bring the scores of all data and context ranks from the last stage to every rank's CPU."""
        # One slot more takes what filler microbatches say.
        table = torch.zeros(3, responses + 1, device=self.runtime.device)
        for found in outputs:
            table[:2, found["index"]] = found["scores"].float()
            table[2, found["index"]] = 1.0
        dist.all_reduce(table, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self._from_last_stage(table)
        logprobs, entropy, computed = table[:, :responses].cpu()
        return TokenScores(logprobs, entropy, computed > 0)

    def _total(self, outputs: list[dict[str, Tensor]], microbatches: list[PackedBatch]) -> tuple[float, int]:
        tokens = sum(len(p.tokens) for p in microbatches)
        loss = sum((found["loss"] for found in outputs), torch.zeros((), device=self.runtime.device))
        totals = torch.stack([loss.double(), torch.tensor(float(tokens), device=loss.device, dtype=torch.float64)])
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self._from_last_stage(totals)
        total_loss, total_tokens = totals.tolist()
        return total_loss, int(total_tokens)

    def _from_last_stage(self, tensor: Tensor) -> None:
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(tensor, group=group, group_src=group.size() - 1)
