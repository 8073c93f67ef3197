"""What TRL and verl say about the cases of parity.py; runs in their environment.

    python parity_peers.py INPUTS.pt OUTPUTS.pt

Inputs and outputs are plain tensors, numbers and text. Both peers' own code is called: verl's registered functions,
TRL's ``GRPOTrainer._compute_loss`` with the log-probs given in the place of a model. TRL has no function for
advantages, they are lines of its trainer: these are written out here with its own ``nanstd``.
"""

from __future__ import annotations

import statistics
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights, compute_rollout_rejection_mask
from verl.workers.config import ActorConfig, PolicyLossConfig

TRL_STD_EPS = 1e-4  # fixed in its trainer


def verl_advantages(name: str, rewards: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """``[N]``: the advantage of each response's first token; float64 in, float64 out."""
    config = AlgoConfig(gamma=1.0, norm_adv_by_std_in_grpo=name != "dr_grpo")
    scores = torch.zeros_like(mask, dtype=rewards.dtype)
    scores[torch.arange(len(rewards)), mask.sum(1).long() - 1] = rewards
    estimator = core_algos.get_adv_estimator_fn("grpo" if name == "dr_grpo" else name)
    settings: dict[str, Any] = {"token_level_rewards": scores, "response_mask": mask, "config": config}
    if name != "reinforce_plus_plus":
        settings["index"] = ids.numpy()
    if name in ("grpo", "dr_grpo"):
        settings["norm_adv_by_std_in_grpo"] = name == "grpo"
    return estimator(**settings)[0][:, 0]


def trl_advantages(rewards: Tensor, group: int, scale: str) -> Tensor:
    """The lines of ``GRPOTrainer._generate_and_score_completions``; ``scale`` as ``GRPOConfig.scale_rewards``."""
    grouped = rewards.view(-1, group)
    advantages = rewards - torch.nanmean(grouped, dim=1).repeat_interleave(group, dim=0)
    if scale == "none":
        return advantages
    std = nanstd(grouped, dim=1).repeat_interleave(group, dim=0) if scale == "group" else nanstd(rewards)
    return advantages / (std + TRL_STD_EPS)


def verl_weights(correction: dict[str, Any], x: dict[str, Tensor]) -> Tensor | None:
    """``[N, L]``: its weights for the difference between server and trainer; its rejection as weights 0 and 1."""
    log_ratio, c = x["old"] - x["rollout"], correction
    if c["reject_low"] is not None:
        # Its bounds are of the inverse ratio.
        bounds = f"{1 / c['reject_high']}_{1 / c['reject_low']}"
        return compute_rollout_rejection_mask(log_ratio, x["mask"], "seq_mean_k1", bounds)[0]
    if c["weight"] == "none":
        return None
    bound = c["weight_max"] if c["mask_low"] is None else f"{c['mask_low']}_{c['mask_high']}"
    return compute_rollout_correction_weights(log_ratio, x["mask"], c["weight"], bound)[0]


def trl_weights(correction: dict[str, Any], x: dict[str, Tensor]) -> Tensor | None:
    """``[N, L]`` or ``[N, 1]``: the lines of ``GRPOTrainer._generate_and_score_completions``."""
    if correction["weight"] == "none":
        return None
    difference = (x["old"] - x["rollout"]) * x["mask"]
    if correction["weight"] == "sequence":
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    if correction["mask_low"] is None:
        return torch.clamp(ratio, max=correction["weight_max"])
    return ratio.masked_fill((ratio < correction["mask_low"]) | (ratio > correction["mask_high"]), value=0.0)


def entropy_of(logprobs: Tensor) -> Tensor:
    """The entropy that ``parity.py`` gives its tokens."""
    return -(logprobs * logprobs.exp())


def verl_loss(case: dict[str, Any], x: dict[str, Tensor], logprobs: Tensor) -> Tensor:
    """verl's policy loss on ``[N, L]``."""
    c = case["config"]
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=c["clip_low"],
        clip_ratio_low=c["clip_low"],
        clip_ratio_high=c["clip_high"],
        clip_ratio_c=c["dual_clip"] or 1e9,
        tau_pos=c["sapo_tau"],
        tau_neg=c["sapo_tau_negative"],
        policy_loss=PolicyLossConfig(loss_mode=case["verl"]),
    )
    aggregation = {
        "token": "token-mean",
        "sequence": "seq-mean-token-mean",
        "constant": "seq-mean-token-sum-norm",
    }[c["aggregation"]]
    loss, _ = core_algos.get_policy_loss_fn(case["verl"])(
        old_log_prob=x["old"],
        log_prob=logprobs,
        advantages=x["advantages"][:, None].expand_as(logprobs),
        response_mask=x["mask"],
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=verl_weights(case["correction"], x),
    )
    # The rest as in its workers/utils/losses.py.
    if c["entropy_coef"]:
        loss = loss - c["entropy_coef"] * core_algos.agg_loss(entropy_of(logprobs), x["mask"], aggregation)
    if c["kl_coef"]:
        kl = core_algos.kl_penalty(logprobs, x["ref"], c["kl_estimator"])
        loss = loss + c["kl_coef"] * core_algos.agg_loss(kl, x["mask"], aggregation)
    return loss


def trl_loss(case: dict[str, Any], x: dict[str, Tensor], logprobs: Tensor) -> Tensor:
    """TRL's loss on ``[N, L]``: its method, on a stand-in for the trainer that has what the method reads."""
    c, weights = case["config"], trl_weights(case["correction"], x)
    accelerator = types.SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda t: t,
        reduce=lambda t, reduction: t,
        gather_for_metrics=lambda t: t,
    )
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    args = types.SimpleNamespace(
        use_bias_correction_kl=c["kl_estimator"] == "k3_unbiased",
        delta=c["dual_clip"],
        sapo_temperature_pos=c["sapo_tau"],
        sapo_temperature_neg=c["sapo_tau_negative"],
        steps_per_generation=1,
    )
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy_of(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if c["objective"] == "gspo" else "token",
        beta=c["kl_coef"],
        args=args,
        loss_type=case["trl"],
        epsilon_low=c["clip_low"],
        # For CISPO this is the bound of the weight itself.
        epsilon_high=1 + c["clip_high"] if case["trl"] == "cispo" else c["clip_high"],
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=logprobs.shape[1],
        accelerator=accelerator,
        _entropy_bonus_enabled=c["entropy_coef"] != 0,
        entropy_coef=c["entropy_coef"],
        use_adaptive_entropy=False,
        _metrics=metrics,
    )
    inputs = {
        "prompt_ids": torch.zeros(len(logprobs), 1),
        "prompt_mask": torch.ones(len(logprobs), 1),
        "completion_ids": torch.zeros_like(logprobs),
        "completion_mask": x["mask"],
        "advantages": x["advantages"],
        "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"],
        "num_items_in_batch": x["mask"].sum(),
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def losses(cases: dict[str, dict[str, Any]], x: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Value and gradient of every case from each peer that has it."""
    found: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        found[name] = {}
        for peer, function in (("trl", trl_loss), ("verl", verl_loss)):
            if case[peer] is not None:
                logprobs = x["logprobs"].clone().requires_grad_()
                loss = function(case, x, logprobs)
                loss.backward()
                found[name][peer] = (loss.item(), logprobs.grad)
    return found


def timed(function: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of each run, after one that is not counted."""
    function()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def vectorized_runs(runs: int) -> int:
    """Timed runs of verl's vectorized estimator, which is slow, where the others have ``runs``."""
    return min(runs, 5)


def speed(rewards: Tensor, ids: Tensor, group: int, threads: int, runs: int) -> dict[str, float]:
    """Median seconds for GRPO's advantages; verl's loop over Python dictionaries runs once, without a warm-up."""
    torch.set_num_threads(threads)
    mask, index = torch.ones(len(rewards), 1), ids.numpy()

    def verl(name: str) -> Callable[[], Any]:
        estimator = core_algos.get_adv_estimator_fn(name)
        return lambda: estimator(token_level_rewards=rewards[:, None].clone(), response_mask=mask, index=index)

    start = time.perf_counter()
    verl("grpo")()
    return {
        "TRL, lines of its trainer": statistics.median(timed(lambda: trl_advantages(rewards, group, "group"), runs)),
        "verl grpo_vectorized": statistics.median(timed(verl("grpo_vectorized"), vectorized_runs(runs))),
        "verl grpo": time.perf_counter() - start,
    }


def main() -> None:
    """Answer the cases of ``parity.py``."""
    inputs = torch.load(sys.argv[1], weights_only=True)
    advantages = {}
    for batch, a in inputs["advantages"].items():
        rewards, group = a["rewards"], a["group"]
        found = {name: verl_advantages(name, rewards, a["ids"], a["mask"]) for name in inputs["verl_estimators"]}
        if group is not None:
            found |= {f"trl_{scale}": trl_advantages(rewards, group, scale) for scale in ("group", "batch", "none")}
        advantages[batch] = found
    outputs = {
        "advantages": advantages,
        "losses": losses(inputs["cases"], inputs["tokens"]),
        "speed": speed(**inputs["speed"]),
        "vectorized_runs": vectorized_runs(inputs["speed"]["runs"]),
        "numpy": np.__version__,
    }
    torch.save(outputs, sys.argv[2])


if __name__ == "__main__":
    main()
