"""A model's log-probs here against those of transformers: the check behind every conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mapo import __version__
from megatron_mapo.checkpoint_files import write_durably
from megatron_mapo.config import Config, Dtype, Fallback
from megatron_mapo.data.packing import PackingSpec, pack
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import DataError
from megatron_mapo.megatron import runtime
from megatron_mapo.megatron.families import FAMILIES
from megatron_mapo.megatron.hf_folder import weights_fingerprint
from megatron_mapo.megatron.model import forward_microbatch, load_hf_config
from megatron_mapo.megatron.policy import build_model
from megatron_mapo.rendezvous import process_alone

BOUND = 1e-3
"""Largest difference, in nat, of a model that may be used."""


@dataclass(frozen=True)
class Difference:
    """How far the two lie apart on one sequence.

    Attributes:
        tokens: length of the sequence.
        largest: largest difference of a token's log-prob or of an entropy (nat).
        mean: mean difference of a token's log-prob (nat).
    """

    tokens: int
    largest: float
    mean: float


@dataclass(frozen=True)
class CheckResult:
    """What ``check_model`` found.

    Attributes:
        differences: one per sequence.
        window: the model's sliding window where no sequence is longer, so that it is not exercised; else None.
    """

    differences: list[Difference]
    window: int | None

    @property
    def largest(self) -> float:
        """Over all sequences (nat)."""
        return float(torch.tensor([difference.largest for difference in self.differences]).max())  # NaN stays NaN


def require_check(path: Path, fallback: Fallback, record: Path | None = None) -> None:
    """Let a model pass that is in ``FAMILIES``, or whose log-probs here have been compared with transformers'.

    The comparison runs in a process of its own, which leaves nothing behind in memory and stands outside the
    process groups of a run.

    Args:
        path: Hugging Face folder.
        fallback: who translates a family that ``FAMILIES`` lacks.
        record: file that keeps the result, so that it is not computed again for the same model and version.

    Raises:
        DataError: the two differ by more than ``BOUND``, or the comparison failed.
    """
    hf = load_hf_config(path, fallback)
    if hf.model_type in FAMILIES:
        return
    versions = [__version__, *(version(package) for package in ("megatron-core", "torch", "transformers"))]
    described = " ".join([hf.to_json_string(use_diff=False), weights_fingerprint(path), *versions])
    identity = xxhash.xxh3_128(described.encode()).hexdigest()
    largest = None if record is None else _recorded(record, identity)
    if largest is None:
        largest = _check_apart(path, hf.model_type, fallback)
        if record is not None:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_durably(record, json.dumps({"identity": identity, "largest": largest}, indent=2) + "\n")
    print(
        f"{path}: {hf.model_type} is translated by {fallback.value}; its log-probs in float32 differ from "
        f"transformers' by at most {largest:.1e} nat",
        file=sys.stderr,
        flush=True,
    )


def _recorded(record: Path, identity: str) -> float | None:
    """The largest difference that was found before; None where it is not known."""
    try:
        known = json.loads(record.read_text())
        return float(known["largest"]) if known["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_apart(path: Path, model_type: str, fallback: Fallback) -> float:
    """The largest difference, from a process of its own that ends with this one."""
    check = ["check", str(path), "--fallback", fallback.value]
    keeper = [sys.executable, "-m", "megatron_mapo.launch.keeper", "--die-with-parent"]
    command = [*keeper, sys.executable, "-m", "megatron_mapo", *check, "--bound", str(BOUND), "--json"]
    done = subprocess.run(command, env=process_alone(os.environ), capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    model = f"model.path: {path} ({model_type}, translated by {fallback.value})"
    more = f"`megatron-mapo {' '.join(check)}` shows more"
    if not answers:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise DataError(f"{model} could not be compared with transformers: {said[-1]}. {more}")
    largest = float(json.loads(answers[-1])["largest"])
    if done.returncode:
        raise DataError(
            f"{model} does not compute what transformers computes: the log-probs differ by {largest:.2e} nat, more "
            f"than {BOUND:g}. {more}"
        )
    return largest


@torch.no_grad()
def check_model(path: Path, length: int, fallback: Fallback = Fallback.none) -> CheckResult:
    """Score random token sequences in float32, on one process: here, packed, and with transformers, one by one.

    Args:
        path: Hugging Face folder.
        length: tokens of the longest sequence, at least 16; others have 1/2, 1/4 and 1/8 of it.
        fallback: who translates a family that ``FAMILIES`` lacks.

    Raises:
        DataError: the model is not supported, or its files are not as its config says.
    """
    config = Config()
    config.model.dtype, config.model.fallback = Dtype.float32, fallback
    config.rollout.temperature = 1.0
    trainers = runtime.initialize(config)
    try:
        (model,), hf = build_model(config, path, trainers.device)
        lengths = [length // part for part in (1, 2, 4, 8)]
        batch = _random_sequences(lengths, hf.vocab_size)
        packed = pack(batch, torch.arange(len(batch)), {}, PackingSpec(max_tokens=sum(lengths)))
        found = torch.empty(2, len(batch.rollout_logprobs))
        found[:, packed.response_index] = forward_microbatch(model.eval(), packed.to(trainers.device)).cpu()
        del model  # the two models are not in memory together
        windows = getattr(hf, "sliding_window", None)
        expected = _transformers_scores(path, batch, trainers.device)
        return CheckResult(_differences(found, expected, batch), windows if windows and windows >= length else None)
    finally:
        trainers.close()


def _random_sequences(lengths: list[int], vocab_size: int) -> SequenceBatch:
    """Each of a prompt of one token and a response, in a group of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return SequenceBatch.from_responses([r[:1] for r in rows], [r[1:] for r in rows], group_ids=range(len(rows)))


def _transformers_scores(path: Path, batch: SequenceBatch, device: torch.device) -> Tensor:
    """Log-probs and entropies of all response tokens, ``[2, R]``."""
    # The eager attention is the one that knows every option; some kernels leave a cap on scores out.
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    model = model.to(device).eval()
    out = []
    for i in range(len(batch)):
        tokens = batch.tokens[batch.offsets[i] : batch.offsets[i + 1]].long().to(device)
        logp = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        out.append(torch.stack([logp.gather(1, tokens[1:, None])[:, 0], -(logp.exp() * logp).sum(-1)]))
    return torch.cat(out, 1).cpu()


def _differences(found: Tensor, expected: Tensor, batch: SequenceBatch) -> list[Difference]:
    apart = (found - expected).abs()
    out = []
    for i, length in enumerate(batch.lengths.tolist()):
        own = apart[:, batch.response_offsets[i] : batch.response_offsets[i + 1]]
        out.append(Difference(length, float(own.max()), float(own[0].mean())))
    return out
