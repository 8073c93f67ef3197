"""What the ranks of the distributed tests do. Every function takes and returns plain JSON."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from frozen_trainer import train_and_disagree as train_and_disagree  # cases like those below
from frozen_trainer import train_frozen as train_frozen
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mapo.algorithms.aggregation import token_weights
from megatron_mapo.algorithms.correction import corrects
from megatron_mapo.algorithms.metrics import correction_metrics, mismatch_metrics, update_metrics
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.checkpoint_files import Retention
from megatron_mapo.config import Config, load_config, to_yaml
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import MapoError
from megatron_mapo.export import export_run
from megatron_mapo.megatron import checkpoint, optimizer, runtime
from megatron_mapo.megatron.hf import named_weights
from megatron_mapo.megatron.hf_folder import save_folder
from megatron_mapo.megatron.logprobs import chunked_logprobs
from megatron_mapo.megatron.policy import Policy, TokenScores, build_model
from megatron_mapo.megatron.runtime import Runtime

BASE = [
    "data.train=unused.jsonl",
    "model.dtype=float32",
    "rollout.max_prompt_tokens=48",
    "rollout.max_response_tokens=32",
    "rollout.prompts_per_step=1",
    "actor.microbatch_tokens=512",
    "actor.logprob_chunk=32",
    # A large step, but a well-conditioned one: at Adam's usual eps a weight whose gradient is rounding
    # noise would still move by lr.
    "actor.optim.lr=0.02",
    "actor.optim.eps=0.01",
    "actor.optim.weight_decay=0.1",
    "actor.optim.clip_grad=0.5",
    "trainer.threads=1",
]
ZEROS = [0, 1, 2, 6]
"""Sequences of the frozen batch whose advantages are 0 where a case asks for it: a group, and one of another group."""
BUCKET = 10_000
"""Numbers after which a gradient bucket is full, where reduction overlaps; of adapters a tenth. megatron's own is 40
million: one bucket."""


def read_config(model: str, options: list[str]) -> Config:
    """The tests' base configuration, changed by ``key=value`` options."""
    return load_config(None, [*BASE, f"model.path={model}", *options])


@contextmanager
def layout(config: Config) -> Iterator[Runtime]:
    """Megatron's groups for one case; the process group stays for the next one."""
    found = runtime.initialize(config)
    try:
        yield found
    finally:
        runtime.parallel_state.destroy_model_parallel()


def open_policy(config: Config, ranks: Runtime, total_updates: int) -> Policy:
    """A policy whose reductions, where they overlap, go over several buckets, as those of a large model do."""
    bucket = BUCKET // 10 if config.actor.lora.rank else BUCKET
    small = partial(optimizer.DistributedDataParallelConfig, bucket_size=bucket)
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", small):
        policy = Policy(config, ranks, config.model.path, total_updates)
    # megatron cuts those of the first stage's first chunk alone.
    if config.actor.optim.overlap_grad_reduce and runtime.parallel_state.is_pipeline_first_stage():
        first = policy.ddp[0]
        for buffer in first.buffers + first.expert_parallel_buffers:
            assert len(buffer.buckets) > 2, "one bucket would overlap with nothing"
    return policy


def columns_of(policy: Policy, batch: SequenceBatch, fixed: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``update`` needs; the reference is measured in this layout, then moved by a fixed amount."""
    config = policy.config
    longest = config.rollout.max_response_tokens
    columns = {
        "advantages": fixed["advantages"],
        "token_weight": token_weights(batch.response_lens, config.actor.loss.aggregation, longest).float(),
        "old_logprobs": fixed["old_logprobs"],
        "rollout_logprobs": fixed["old_logprobs"] + 0.5 * fixed["ref_shift"],
    }
    if policy.reference is not None:
        columns["ref_logprobs"] = policy.reference_log_probs(batch).logprobs + fixed["ref_shift"]
    return columns


def reorder(batch: SequenceBatch, columns: dict[str, Tensor], order: Tensor) -> tuple[SequenceBatch, dict, Tensor]:
    """The batch in another order, its columns likewise, and where each of its response tokens was."""
    tagged = SequenceBatch(**vars(batch) | {"weight_versions": torch.arange(len(batch.weight_versions)).int()})
    moved = tagged.select(order)
    place = moved.weight_versions.long()
    return moved, {k: v[place] for k, v in columns.items()}, place


def scores_in_place(name: str, scores: TokenScores, place: Tensor) -> dict[str, Tensor]:
    """Scores in the order of the frozen batch."""
    out = {}
    for field in ("logprobs", "entropy", "computed"):
        value = getattr(scores, field)
        out[f"{name}.{field}"] = torch.empty_like(value).index_copy_(0, place, value)
    return out


def logged_metrics(
    policy: Policy, batch: SequenceBatch, scores: TokenScores, columns: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the loop logs of an update, over the tokens that took part in it."""
    said = {name: column[scores.computed] for name, column in columns.items()}
    logprobs, actor = scores.logprobs[scores.computed], policy.config.actor
    sequences = TokenSequences(batch.response_sequence[scores.computed], len(batch))
    metrics = update_metrics(
        logprobs,
        said["old_logprobs"],
        said["advantages"],
        scores.entropy[scores.computed],
        actor.loss,
        ref_logprobs=said.get("ref_logprobs"),
        sequences=sequences,
    )
    if corrects(actor.correction):
        metrics |= correction_metrics(said["old_logprobs"], said["rollout_logprobs"], actor.correction, sequences)
    metrics |= mismatch_metrics(logprobs, said["rollout_logprobs"])
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}


def only(scores: TokenScores, tokens: Tensor) -> TokenScores:
    """Scores of ``tokens`` alone, as if the others had not been computed."""
    return TokenScores(scores.logprobs * tokens, scores.entropy * tokens, scores.computed & tokens)


def train_case(case: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Two updates on the frozen batch: all that they say and leave behind."""
    config = read_config(str(folder / case["model"]), case["options"])
    batch = SequenceBatch.load(folder / "batch.safetensors")
    fixed = load_file(folder / f"columns_{case['model']}.safetensors")
    if case["zeros"]:
        fixed["advantages"][torch.isin(batch.response_sequence, torch.tensor(ZEROS))] = 0
    if case["rows"] is not None:
        few = torch.tensor(case["rows"])
        batch, fixed, _ = reorder(batch, fixed, few)
    n = len(batch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)) if case["permute"] else torch.arange(n)
    batch, fixed, place = reorder(batch, fixed, order)
    found: dict[str, Tensor] = {}
    with layout(config) as ranks:
        policy = open_policy(config, ranks, total_updates=4)
        before = {name: value.clone() for name, value in policy.named_weights()}
        columns = columns_of(policy, batch, fixed)
        part = (order % 2 == 0).nonzero().flatten()
        found["0.grad_norm.part"] = torch.tensor(policy.gradient_norm(batch, columns, part), dtype=torch.float64)
        active = columns["advantages"] != 0
        rows = batch.response_sequence[active].unique() if case["zeros"] == "left out" else None
        for k in range(2):
            result = policy.update(batch, columns, rows)
            scores = only(result.scores, active) if case["zeros"] == "updated" else result.scores
            found[f"{k}.loss"] = torch.tensor(result.loss, dtype=torch.float64)
            found[f"{k}.grad_norm"] = torch.tensor(result.grad_norm, dtype=torch.float64)
            found |= scores_in_place(f"{k}.scores", scores, place)
            found |= {f"{k}.metric.{name}": v for name, v in logged_metrics(policy, batch, scores, columns).items()}
        # Before a forward pass, which would gather what overlap_param_gather has left for it.
        weights = {name: value.clone() for name, value in policy.named_weights()}
        found |= {f"weight.{name}": value for name, value in weights.items()}
        found["update"] = torch.cat([(weights[n].double() - v.double()).flatten() for n, v in sorted(before.items())])
        found |= scores_in_place("after", policy.log_probs(batch), place)
    return found


def train(cases: dict[str, dict[str, Any]], folder: str, out: str) -> dict[str, list[float]]:
    """Each case in turn; rank 0 writes ``out/NAME.safetensors``. Returns every rank's losses."""
    losses = {}
    for name, case in cases.items():
        found = train_case(case, Path(folder))
        losses[name] = [float(found["0.loss"]), float(found["1.loss"])]
        if dist.get_rank() == 0:
            save_file({k: v.contiguous() for k, v in found.items()}, str(Path(out) / f"{name}.safetensors"))
    return losses


def freeze_columns(models: list[str], folder: str) -> None:
    """Advantages, old log-probs (the actor's own, moved by up to 0.4 nat) and the reference's shift."""
    batch = SequenceBatch.load(Path(folder) / "batch.safetensors")
    generator = torch.Generator().manual_seed(2)
    total = len(batch.rollout_logprobs)
    advantages = torch.randn(len(batch), generator=generator)[batch.response_sequence]
    noise, shift = (torch.rand(total, generator=generator) - 0.5 for _ in range(2))
    for model in models:
        config = read_config(str(Path(folder) / model), [])
        with layout(config) as ranks:
            own = Policy(config, ranks, config.model.path, 1).log_probs(batch).logprobs
        columns = {"advantages": advantages, "old_logprobs": own + 0.8 * noise, "ref_shift": 0.5 * shift}
        save_file(columns, str(Path(folder) / f"columns_{model}.safetensors"))


def score_and_export(layouts: dict[str, tuple[list[str], list[str]]], folder: str) -> None:
    """In each layout: each float32 model's scores of the batch; each float32 and bfloat16 model written again."""
    out = Path(folder) / "out"
    batch = SequenceBatch.load(Path(folder) / "batch.safetensors")
    for name, (options, architectures) in layouts.items():
        with layout(read_config("unused", options)) as ranks:
            for arch in architectures:
                policy = Policy(read_config("unused", options), ranks, Path(folder) / "float32" / arch, 1)
                scores = policy.log_probs(batch)
                if ranks.is_main:
                    found = {"logprobs": scores.logprobs, "entropy": scores.entropy}
                    save_file(found, out / f"{name}-{arch}.safetensors")
                for dtype in ("float32", "bfloat16"):
                    source = Path(folder) / dtype / arch
                    config = read_config("unused", [*options, f"model.dtype={dtype}"])
                    model, hf = build_model(config, source, ranks.device)
                    if ranks.is_main:
                        save_folder(named_weights(model, hf), source, out / f"{name}-{arch}-{dtype}")
                    else:
                        for _ in named_weights(model, hf):
                            pass


def errors(cases: dict[str, dict[str, Any]], folder: str) -> dict[str, list[str]]:
    """Type and message of what each case raises on this rank."""
    out = {}
    for name, case in cases.items():
        config = read_config(str(Path(folder) / case["model"]), case["options"])
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        try:
            with layout(config) as ranks:
                Policy(config, ranks, config.model.path, 1)
            out[name] = ["", "nothing was raised"]
        except MapoError as error:
            out[name] = [type(error).__name__, str(error)]
    return out


def vocab_parallel(file: str, vocab: int, temperature: float, softcap: float | None, chunk: int) -> None:
    """Log-probs over rows cut between the ranks, zero-padded at the end; each rank writes what it got."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    case = load_file(file)
    rows = -(-vocab // size)
    padded = torch.full((rows * size, case["weight"].shape[1]), 3.0, dtype=torch.float64)
    padded[:vocab] = case["weight"]
    hidden = case["hidden"].requires_grad_()
    weight = padded[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    logprobs, entropy = chunked_logprobs(
        hidden,
        weight,
        case["labels"],
        temperature=temperature,
        softcap=softcap,
        chunk=chunk,
        vocab_size=vocab,
        group=dist.group.WORLD,
    )
    ((logprobs * case["factor_logprobs"]).sum() + (entropy * case["factor_entropy"]).sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    out = {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }
    save_file(out, f"{file}.rank{rank}")
    dist.destroy_process_group()


def _continue(policy: Policy, batch: SequenceBatch, columns: dict[str, Tensor], updates: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for k in range(updates):
        result = policy.update(batch, columns)
        found[f"{k}.loss"] = torch.tensor(result.loss, dtype=torch.float64)
        found[f"{k}.grad_norm"] = torch.tensor(result.grad_norm, dtype=torch.float64)
        found[f"{k}.lr"] = torch.tensor(result.learning_rate, dtype=torch.float64)
    return found | {f"weight.{n}": v.clone() for n, v in policy.named_weights()}


def save_and_continue(cases: dict[str, dict[str, Any]], folder: str, out: str) -> None:
    """Each case: two updates, a checkpoint in ``out/NAME``, two more updates."""
    batch = SequenceBatch.load(Path(folder) / "batch.safetensors")
    for name, case in cases.items():
        config = read_config(str(Path(folder) / case["model"]), case["options"])
        with layout(config) as ranks:
            policy = open_policy(config, ranks, total_updates=4)
            columns = columns_of(policy, batch, load_file(Path(folder) / f"columns_{case['model']}.safetensors"))
            _continue(policy, batch, columns, 2)
            checkpoint.save(policy, ranks, Path(out) / name, 2, {"cursor": [1, 2]}, keep=3)
            found = _continue(policy, batch, columns, 2)
            if ranks.is_main:
                save_file({k: v.contiguous() for k, v in found.items()}, str(Path(out) / f"{name}.safetensors"))


def train_runs(cases: dict[str, dict[str, Any]], folder: str, runs: str) -> None:
    """Each case leaves a run's folder with one checkpoint, and the weights as rank 0 streamed them."""
    batch = SequenceBatch.load(Path(folder) / "batch.safetensors")
    for name, case in cases.items():
        run_dir = Path(runs) / name
        model = Path(folder) / case["model"]
        config = read_config(str(model), [*case["options"], f"run.name={name}"])
        with layout(config) as ranks:
            policy = open_policy(config, ranks, total_updates=4)
            columns = columns_of(policy, batch, load_file(Path(folder) / f"columns_{case['model']}.safetensors"))
            policy.update(batch, columns)
            checkpoint.save(policy, ranks, run_dir / "checkpoints", 1, {}, keep=1)
            weights = {n: v.clone() for n, v in policy.named_weights()}
            adapters = {n: v.clone() for n, v in policy.named_adapters()} if config.actor.lora.rank else {}
            if ranks.is_main:
                save_file(weights, run_dir / "weights.safetensors")
                save_file(adapters, run_dir / "adapters.safetensors")
                (run_dir / "config.yaml").write_text(to_yaml(config))


def export_runs(runs: str) -> None:
    """Each run's checkpoint as a Hugging Face folder, on this process alone."""
    for run_dir in Path(runs).iterdir():
        export_run(run_dir, run_dir / "export")


def resume(cases: dict[str, dict[str, Any]], folder: str, out: str) -> dict[str, Any]:
    """Each case: a fresh policy, the checkpoint, maybe the same saved again, two updates. Returns each loop's state."""
    states = {}
    for name, case in cases.items():
        config = read_config(str(Path(folder) / case["model"]), case["options"])
        batch = SequenceBatch.load(Path(folder) / "batch.safetensors")
        with layout(config) as ranks:
            policy = open_policy(config, ranks, total_updates=4)
            columns = columns_of(policy, batch, load_file(Path(folder) / f"columns_{case['model']}.safetensors"))
            states[name] = checkpoint.load(policy, ranks, Path(case["checkpoint"]))
            if case["save_again"]:
                checkpoint.save(policy, ranks, Path(out) / name, 2, {}, keep=1)
            found = _continue(policy, batch, columns, 2)
            if ranks.is_main:
                save_file({k: v.contiguous() for k, v in found.items()}, str(Path(out) / f"{name}.safetensors"))
    return states


def keep_reference(cases: dict[str, list[str]], folder: str, out: str) -> dict[str, list[str]]:
    """Each case: three updates, a checkpoint, a fresh policy that loads it. Returns what is not as it must be."""
    batch = SequenceBatch.load(Path(folder) / "batch.safetensors")
    fixed = load_file(Path(folder) / "columns_llama_untied.safetensors")
    wrong: dict[str, list[str]] = {}
    for name, options in cases.items():
        config = read_config(str(Path(folder) / "llama_untied"), [*options, "actor.loss.kl_coef=0.1"])
        with layout(config) as ranks:
            policies = [Policy(config, ranks, config.model.path, total_updates=4) for _ in range(3)]
            trained, undisturbed, resumed = policies
            columns = columns_of(trained, batch, fixed)
            start = trained.reference_log_probs(batch).logprobs
            for _ in range(3):
                trained.update(batch, columns)
                again = trained.reference_log_probs(batch).logprobs
                undisturbed.update(batch, columns)
            weights = {n: v.clone() for n, v in undisturbed.named_weights()}
            checkpoint.save(trained, ranks, Path(out) / name, 3, {}, keep=1)
            checkpoint.load(resumed, ranks, Path(out) / name / "step_000003")
            after = resumed.reference_log_probs(batch).logprobs
            found = {
                "a fresh reference": torch.equal(start, undisturbed.reference_log_probs(batch).logprobs),
                "reference after updates": torch.equal(again, start),
                "reference after resuming": torch.equal(after, start),
                "the actor has moved": not torch.equal(trained.log_probs(batch).logprobs, start),
            }
            for what, policy in (("trained", trained), ("resumed", resumed)):
                same = [torch.equal(v, weights[n]) for n, v in policy.named_weights()]  # all ranks, to the end
                found[f"weights, {what}"] = all(same)
            wrong[name] = [what for what, holds in found.items() if not holds]
    return wrong


def refused(cases: dict[str, dict[str, Any]], folder: str) -> dict[str, list[str]]:
    """Type and message of what resuming each case raises on this rank."""
    out = {}
    for name, case in cases.items():
        config = read_config(str(Path(folder) / case["model"]), case["options"])
        with layout(config) as ranks:
            try:
                checkpoint.load(open_policy(config, ranks, total_updates=4), ranks, Path(case["checkpoint"]))
                out[name] = ["", "nothing was raised"]
            except MapoError as error:
                out[name] = [type(error).__name__, str(error)]
    return out


def save_where_nothing_can_be_written(model: str, folder: str) -> list[str]:
    """``folder`` is below a file; every rank must hear of it."""
    config = read_config(model, [])
    with layout(config) as ranks:
        policy = Policy(config, ranks, config.model.path, 1)
        try:
            checkpoint.save(policy, ranks, Path(folder), 1, {}, keep=1)
        except MapoError as error:
            return [type(error).__name__, str(error)]
    return ["", "nothing was raised"]


def save_where_one_rank_has_no_room(model: str, folder: str) -> list[str]:
    """Files of rank 1 end at 64 KiB, with an error like that of a full disk; training goes on until it shows."""
    config = read_config(model, [])
    with layout(config) as ranks:
        policy = Policy(config, ranks, config.model.path, 4)
        batch = SequenceBatch.from_responses([[1, 2]] * 2, [[3], [4]], group_ids=[0, 0])
        columns = {"advantages": torch.tensor([1.0, -1.0]), "token_weight": torch.ones(2)}
        if not ranks.is_main:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
        checkpointer = checkpoint.Checkpointer(ranks, Path(folder), Retention(last=1))
        try:
            checkpointer.start(policy, 1, {})
            for _ in range(200):
                policy.update(batch, columns)
                checkpointer.poll()
        except MapoError as error:
            return [type(error).__name__, str(error)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ["", "nothing was raised"]


def verify_checkpoint(model: str, path: str) -> list[str]:
    """Type and message of what this rank says about a checkpoint's files."""
    config = read_config(model, [])
    with layout(config) as ranks:
        try:
            checkpoint.verify(ranks, Path(path), checksums=True)
        except MapoError as error:
            return [type(error).__name__, str(error)]
    return ["", "nothing was raised"]


def fail_on_rank(rank: int) -> int:
    """For the test of the harness: one rank fails, the others wait for it for ever."""
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise RuntimeError(f"rank {rank} stumbled in process {os.getpid()}")
    dist.barrier()
    return rank


def who(greeting: str) -> list[Any]:
    """For the test of the harness."""
    dist.init_process_group("gloo")
    return [greeting, dist.get_rank(), dist.get_world_size()]
