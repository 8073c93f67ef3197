"""Our advantages and losses beside TRL's and verl's: on identical synthetic batches in float64, and in time.

    python benchmarks/parity.py

The peers live in an environment of their own beside this file, made on the first run from requirements-peers.txt.
Where a convention differs, ours is set to theirs and the table says so; docs/algorithm.md lists the conventions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from environment import HERE, prepare
from machine import describe_machine, machine_lines, usable_cores
from report import RESULTS, markdown_table, write_results
from torch import Tensor

from megatron_mapo.algorithms.advantages import estimate_advantages
from megatron_mapo.algorithms.aggregation import token_weights
from megatron_mapo.algorithms.policy_loss import LossInputs, policy_loss
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.config import (
    AdvNormConfig,
    CorrectionConfig,
    CorrectionWeight,
    KLEstimator,
    LossAggregation,
    LossConfig,
    Objective,
    Std,
)

REQUIREMENTS = HERE / "requirements-peers.txt"
GROUPS, GROUP, LONGEST = 64, 8, 24
TOLERANCE = 1e-6
"""Largest difference, relative to the largest value."""

UNBIASED = AdvNormConfig("native", Std.unbiased, 1e-6)
ADVANTAGES = {
    # what the peer calls it: (our settings, a convention that differs from our defaults)
    "grpo": (UNBIASED, "std=unbiased"),
    "grpo_vectorized": (UNBIASED, "std=unbiased"),
    "dr_grpo": (AdvNormConfig("center"), ""),
    "rloo": (AdvNormConfig("rloo"), ""),
    "rloo_vectorized": (AdvNormConfig("rloo"), ""),
    "reinforce_plus_plus": (AdvNormConfig("reinforce++", Std.unbiased, 0.0), "responses of one token (see below)"),
    "reinforce_plus_plus_baseline": (
        AdvNormConfig("reinforce++_baseline", Std.unbiased, 0.0),
        "responses of one token (see below)",
    ),
    "trl_group": (AdvNormConfig("native", Std.unbiased, 1e-4), "std=unbiased, eps=1e-4 (fixed in TRL)"),
    "trl_batch": (AdvNormConfig("lite_ppo", Std.unbiased, 1e-4), "std=unbiased, eps=1e-4"),
    "trl_none": (AdvNormConfig("center"), ""),
}
VERL = [name for name in ADVANTAGES if not name.startswith("trl_")]
EVEN, UNEVEN = "right or wrong, groups of one size", "graded, uneven groups in random order"
"""Batches of rewards. TRL's lines need groups of one size, in order."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, and what the peers call it (None: they have none such)."""

    config: LossConfig
    trl: str | None
    verl: str | None
    correction: CorrectionConfig = dataclasses.field(default_factory=CorrectionConfig)


TOKEN, SEQUENCE, CONSTANT = LossAggregation.token, LossAggregation.sequence, LossAggregation.constant
BY_TOKEN, BY_SEQUENCE = CorrectionWeight.token, CorrectionWeight.sequence
TIS = CorrectionConfig(weight=BY_TOKEN, weight_max=2.0)
ICEPOP = CorrectionConfig(weight=BY_TOKEN, weight_max=None, mask_low=0.5, mask_high=2.0)
CASES = {
    "GRPO": Case(LossConfig(aggregation=SEQUENCE), "grpo", "vanilla"),
    "GRPO with KL (k3)": Case(LossConfig(aggregation=TOKEN, kl_coef=0.1), "dapo", "vanilla"),
    "KL (k1)": Case(LossConfig(aggregation=SEQUENCE, kl_coef=0.1, kl_estimator=KLEstimator.k1), None, "vanilla"),
    "KL (k2)": Case(LossConfig(aggregation=TOKEN, kl_coef=0.1, kl_estimator=KLEstimator.k2), None, "vanilla"),
    "KL weighted by the ratio": Case(
        LossConfig(aggregation=SEQUENCE, kl_coef=0.1, kl_estimator=KLEstimator.k3_unbiased), "grpo", None
    ),
    "DAPO": Case(LossConfig(aggregation=TOKEN, clip_high=0.28), "dapo", "vanilla"),
    "Dr. GRPO": Case(LossConfig(aggregation=CONSTANT), "dr_grpo", "vanilla"),
    "entropy bonus": Case(LossConfig(aggregation=TOKEN, entropy_coef=0.1), "dapo", "vanilla"),
    "entropy bonus, mean over responses": Case(LossConfig(aggregation=SEQUENCE, entropy_coef=0.1), None, "vanilla"),
    "dual clip": Case(LossConfig(aggregation=TOKEN, dual_clip=1.3), "dapo", "vanilla"),
    "truncated importance sampling": Case(LossConfig(aggregation=TOKEN), "dapo", "vanilla", TIS),
    "importance sampling by response": Case(
        LossConfig(aggregation=SEQUENCE), "grpo", "vanilla", CorrectionConfig(weight=BY_SEQUENCE, weight_max=2.0)
    ),
    "IcePop": Case(LossConfig(aggregation=TOKEN), "dapo", "vanilla", ICEPOP),
    "rejection of responses": Case(
        LossConfig(aggregation=TOKEN), None, "vanilla", CorrectionConfig(reject_low=0.8, reject_high=1.25)
    ),
    "CISPO": Case(LossConfig(objective=Objective.cispo, clip_low=1.0, clip_high=0.1), "cispo", "cispo"),
    "GSPO": Case(
        LossConfig(objective=Objective.gspo, aggregation=SEQUENCE, clip_low=0.03, clip_high=0.04), "grpo", "gspo"
    ),
    "GMPO": Case(
        LossConfig(objective=Objective.gmpo, aggregation=SEQUENCE, clip_low=0.2, clip_high=0.3), None, "geo_mean"
    ),
    # 1.0625 is exact in float32, to which TRL rounds it; with 1.05 the gradients are 2e-5 apart.
    "SAPO": Case(LossConfig(objective=Objective.sapo, aggregation=SEQUENCE, sapo_tau_negative=1.0625), "sapo", "sapo"),
}


def make_tokens(seed: int) -> dict[str, Tensor]:
    """Padded ``[N, L]`` batch in float64 as the peers take it; responses of 1 to ``LONGEST`` tokens."""
    g = torch.Generator().manual_seed(seed)
    n = GROUPS * GROUP
    logprobs = -torch.randn(n, LONGEST, dtype=torch.float64, generator=g).abs()

    def near(spread: float) -> Tensor:
        return logprobs + spread * torch.randn(n, LONGEST, dtype=torch.float64, generator=g)

    lengths = torch.randint(1, LONGEST + 1, (n,), generator=g)
    return {
        "logprobs": logprobs,
        "old": near(0.3),
        "ref": near(0.5),
        "rollout": near(0.4),
        "advantages": torch.randn(n, dtype=torch.float64, generator=g),
        "mask": (torch.arange(LONGEST) < lengths[:, None]).double(),
    }


def make_rewards(seed: int) -> dict[str, dict[str, Tensor]]:
    """Rewards, group ids and a mask of one token a response, of each batch of rewards."""
    g = torch.Generator().manual_seed(seed)
    even = (torch.rand(GROUPS, GROUP, generator=g) < torch.rand(GROUPS, 1, generator=g)).double().flatten()
    sizes = torch.randint(2, 2 * GROUP, (GROUPS,), generator=g)
    ids = torch.arange(GROUPS).repeat_interleave(sizes)
    ids = ids[torch.randperm(len(ids), generator=g)]
    graded = torch.rand(len(ids), dtype=torch.float64, generator=g)
    return {
        name: {"rewards": rewards, "ids": group, "mask": torch.ones(len(rewards), 1, dtype=torch.float64)}
        for name, rewards, group in (
            (EVEN, even, torch.arange(GROUPS).repeat_interleave(GROUP)),
            (UNEVEN, graded, ids),
        )
    }


def our_loss(case: Case, x: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Value, and gradient as ``[N, L]``: the flat loss on the tokens that count."""
    keep = x["mask"].bool()
    logprobs = x["logprobs"].clone().requires_grad_()
    sequences = torch.arange(len(keep))[:, None].expand_as(keep)[keep]
    inputs = LossInputs(
        x["old"][keep],
        x["advantages"][:, None].expand_as(keep)[keep],
        token_weights(keep.sum(1), case.config.aggregation, keep.shape[1]),
        x["ref"][keep],
        x["rollout"][keep],
        TokenSequences(sequences, len(keep)),
    )
    # Its gradient is part of what is compared: an entropy that follows from the log-probs.
    entropy = -(logprobs * logprobs.exp())
    loss = policy_loss(logprobs[keep], inputs, case.config, case.correction, entropy[keep])
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad


def portable(case: Case) -> dict[str, Any]:
    """A case as plain values."""
    config, correction = (
        {k: str(v.value) if hasattr(v, "value") else v for k, v in dataclasses.asdict(section).items()}
        for section in (case.config, case.correction)
    )
    return {"config": config, "correction": correction, "trl": case.trl, "verl": case.verl}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def our_speed(rewards: Tensor, ids: Tensor, threads: int, runs: int) -> dict[str, float]:
    """Median seconds of ours, groups together, in a random order, and for MAPO."""
    torch.set_num_threads(threads)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))

    def median(mode: str, r: Tensor, i: Tensor) -> float:
        config, seconds = AdvNormConfig(mode, Std.unbiased), []
        for _ in range(runs + 1):
            start = time.perf_counter()
            estimate_advantages(r, i, config)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    return {
        "megatron-mapo, native": median("native", rewards, ids),
        "megatron-mapo, mix (MAPO)": median("mix", rewards, ids),
        "megatron-mapo, native, responses in a random order": median("native", rewards[order], ids[order]),
    }


def ask_peers(inputs: dict[str, Any]) -> dict[str, Any]:
    """Run parity_peers.py in the peers' environment."""
    python = prepare("peers", REQUIREMENTS, complete=False)
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{name}.pt" for name in ("inputs", "outputs")]
        torch.save(inputs, files[0])
        subprocess.run([str(python), str(HERE / "parity_peers.py"), *files], check=True)
        return torch.load(files[1], weights_only=True)


def compare(size: int, runs: int) -> dict[str, Any]:
    """All numbers: distances of advantages and losses, and seconds."""
    x, g = make_tokens(seed=0), torch.Generator().manual_seed(1)
    rewards = make_rewards(seed=2)
    many = (torch.rand(size, generator=g) < 0.4).float()
    many_ids, threads = torch.arange(size) // GROUP, usable_cores()
    theirs = ask_peers(
        {
            "advantages": {EVEN: rewards[EVEN] | {"group": GROUP}, UNEVEN: rewards[UNEVEN] | {"group": None}},
            "verl_estimators": VERL,
            "cases": {name: portable(case) for name, case in CASES.items()},
            "tokens": x,
            "speed": {"rewards": many, "ids": many_ids, "group": GROUP, "threads": threads, "runs": runs},
        }
    )
    advantages = {
        batch: {
            name: distance(estimate_advantages(x["rewards"], x["ids"], ADVANTAGES[name][0]), found)
            for name, found in theirs["advantages"][batch].items()
        }
        for batch, x in rewards.items()
    }
    losses: dict[str, dict[str, list[float]]] = {}
    for name, case in CASES.items():
        value, gradient = our_loss(case, x)
        losses[name] = {
            peer: [abs(value - found[0]) / abs(found[0]), distance(gradient, found[1])]
            for peer, found in theirs["losses"][name].items()
        }
    speed = our_speed(many, many_ids, threads, runs) | theirs["speed"]
    settings = {"rewards": size, "threads": threads, "runs": runs, "vectorized_runs": theirs["vectorized_runs"]}
    return {"advantages": advantages, "losses": losses, "speed": speed} | settings


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    pins = {
        name: re.search(rf"^{name}==(\S+)$", text, re.MULTILINE).group(1)  # type: ignore[union-attr]
        for name, text in (
            ("trl", (HERE / "requirements-trl.txt").read_text()),
            ("verl", REQUIREMENTS.read_text()),
        )
    }
    advantages = [
        [
            *(f"`{name}`", f"`{config.aggregation_mode}`", convention or "none"),
            *(f"{found[name]:.0e}" if name in found else "–" for found in result["advantages"].values()),
        ]
        for name, (config, convention) in ADVANTAGES.items()
    ]
    losses = [
        [name, *(f"{max(found[peer]):.0e}" if peer in found else "–" for peer in ("trl", "verl"))]
        for name, found in result["losses"].items()
    ]
    base = result["speed"]["megatron-mapo, native"]
    speed = [[name, f"{1000 * s:.1f} ms", f"{s / base:.2g}"] for name, s in result["speed"].items()]
    return "\n".join(
        [
            "# Advantages and losses beside TRL and verl",
            "",
            f"TRL {pins['trl']}, verl {pins['verl']}; made by `python benchmarks/parity.py`. Differences are the",
            "largest one, relative to the largest value, of values and gradients; inputs are float64, our advantages",
            f"come out as float32. Everything must stay below {TOLERANCE:g}.",
            "",
            "## Advantages",
            "",
            f"{GROUPS} groups: of {GROUP} with right-or-wrong rewards, some of them all-equal; and of 2 to",
            f"{2 * GROUP - 1} with graded rewards, in random order, which TRL's lines do not take.",
            "",
            *markdown_table(
                ["theirs", "ours", "set to their convention", *result["advantages"]],
                advantages,
            ),
            "",
            "Not compared, because they differ by definition:",
            "",
            "- verl's `gpg` scales by responses over responses with a reward other than 0; the paper's eq. 7, and",
            "  ours, by groups over groups whose rewards are not all equal.",
            "- verl's `grpo_passk` is another method (arXiv 2503.19595: only the best response counts).",
            "- verl's `reinforce_plus_plus*` whiten over tokens, so that long responses weigh more in the batch's mean",
            "  and deviation; ours do over responses. With responses of one token they are the same.",
            "- verl gives a group of one the advantage of its bare reward (`grpo`, `gpg`); ours is 0.",
            "",
            "## Losses",
            "",
            f"{GROUPS * GROUP} responses of 1 to {LONGEST} tokens, advantages of both signs, old log-probs about 0.3",
            "nat off.",
            "",
            *markdown_table(["loss", f"TRL {pins['trl']}", f"verl {pins['verl']}"], losses),
            "",
            "Settings that differ from a peer's defaults, so that both compute the same:",
            "",
            "- verl always clips twice, by default with `clip_ratio_c=3.0`: here it is out of reach (1e9), but in",
            "  `dual clip`, where TRL's `delta` does the same.",
            "- TRL corrects for the server by default: `sequence_mask` with `clip_max=3.0` weighs a response by its",
            "  ratio, 0 above 3. There is none such here. Compared are `token_truncate`, `sequence_truncate` and",
            "  `token_mask`.",
            "- TRL weights the KL by the ratio by default (`use_bias_correction_kl=True`): that is `KL weighted by the",
            "  ratio`; it is off in `GRPO with KL (k3)`.",
            "- TRL's entropy bonus is a mean over tokens with every loss; verl's and ours follow the loss.",
            "- verl takes rejected responses out of the averages, here they count: its mask enters as a weight.",
            "- verl's k3 is at most 10 a token. verl adds 1e-8 to lengths in means over responses. TRL rounds SAPO's",
            "  temperatures to float32; they are set to values that are exact there.",
            "",
            "## Time",
            "",
            f"GRPO's advantages of {result['rewards']:,} rewards in {result['rewards'] // GROUP:,} groups, "
            f"{result['threads']} threads.",
            f"Times are medians of {result['runs']} runs after one that is not counted; of `verl grpo_vectorized` "
            f"of {result['vectorized_runs']}.",
            "`verl grpo` is a single run without one before it.",
            "",
            *markdown_table(["", "time", "ratio"], speed),
            "",
            "TRL's lines need groups of one size, in order; verl's and ours find groups by id.",
            "",
            *machine_lines(result["machine"]),
            "",
        ]
    )


def main() -> int:
    """Compare, write the results, and fail if anything is apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", type=int, default=1_000_000, help="rewards of the timing, a multiple of 8")
    parser.add_argument("--runs", type=int, default=9, help="timed runs")
    parser.add_argument(
        "--keep-times", action="store_true", help="compare only; times and their machine stay those of the results"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    machine = describe_machine()
    if arguments.keep_times:
        found = compare(GROUP, 1)
        measured = json.loads((RESULTS / "parity.json").read_text())
        result = measured | {name: found[name] for name in ("advantages", "losses")}
    else:
        result = compare(arguments.rewards // GROUP * GROUP, arguments.runs) | {"machine": machine}
    page = to_markdown(result)
    if arguments.no_write:
        print(page)
    else:
        write_results("parity", result, page)
    far = [
        f"{n} ({batch})" for batch, found in result["advantages"].items() for n, d in found.items() if not d < TOLERANCE
    ]
    far += [
        f"{n} ({peer})" for n, found in result["losses"].items() for peer, d in found.items() if not max(d) < TOLERANCE
    ]
    if far:
        print(f"more than {TOLERANCE:g} apart: {', '.join(far)}", file=sys.stderr)
    return bool(far)


if __name__ == "__main__":
    sys.exit(main())
