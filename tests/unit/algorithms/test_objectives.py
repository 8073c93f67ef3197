"""Objectives and corrections against dense float64 references, written sequence by sequence as in the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mapo.algorithms.correction import correction_weights, corrects
from megatron_mapo.algorithms.metrics import correction_metrics, update_metrics
from megatron_mapo.algorithms.objectives import TokenTerms, policy_gain
from megatron_mapo.algorithms.policy_loss import LossInputs, needs_sequences, policy_loss
from megatron_mapo.algorithms.token_sequences import TokenSequences
from megatron_mapo.config import CorrectionConfig, CorrectionWeight, KLEstimator, LossConfig, Objective

LENGTHS = [5, 1, 9, 3, 7, 2]
N = len(LENGTHS)
INDEX = torch.repeat_interleave(torch.arange(N), torch.tensor(LENGTHS))
OFF = CorrectionConfig()


def tokens(seed: int, spread: float = 0.3) -> dict[str, torch.Tensor]:
    """Flat tokens of ``N`` responses, of which one has advantage 0."""
    g = torch.Generator().manual_seed(seed)
    total = len(INDEX)
    logprobs = -torch.randn(total, dtype=torch.float64, generator=g).abs()
    old = logprobs + spread * torch.randn(total, dtype=torch.float64, generator=g)
    advantages = torch.randn(N, dtype=torch.float64, generator=g)
    advantages[1] = 0
    return {
        "logprobs": logprobs,
        "old": old,
        "rollout": old + 0.2 * torch.randn(total, dtype=torch.float64, generator=g),
        "advantages": advantages[INDEX],
        "weight": 1 / (N * torch.tensor(LENGTHS, dtype=torch.float64)[INDEX]),
    }


def ppo(lr, a, c):
    terms = []
    for x in lr.exp():
        gain = min(x * a, x.clamp(1 - c.clip_low, 1 + c.clip_high) * a)
        terms.append(max(gain, c.dual_clip * a) if c.dual_clip is not None and a < 0 else gain)
    return sum(terms) / len(terms)


def cispo(lr, a, c, logprobs):
    weight = lr.detach().exp().clamp(1 - c.clip_low, 1 + c.clip_high)
    return (weight * a * logprobs).mean()


def gspo(lr, a, c):
    ratio = lr.mean().exp()
    return min(ratio * a, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * a)


def gmpo(lr, a, c):
    """The paper's product of min/max terms, to the power of 1/length."""
    sign = 1 if a >= 0 else -1
    clipped = [sign * min(sign * x, sign * x.clamp(-c.clip_low, c.clip_high)) for x in lr]
    return a * torch.stack([x.exp() for x in clipped]).prod() ** (1 / len(clipped))


def sapo(lr, a, c):
    tau = c.sapo_tau if a > 0 else c.sapo_tau_negative
    return (4 / (tau * (1 + (-tau * (lr.exp() - 1)).exp())) * a).mean()


def dense(x, config, logprobs):
    """Mean over sequences, one after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        of = i == INDEX
        lr, a = logprobs[of] - x["old"][of], x["advantages"][of][0]
        objective = {"ppo": ppo, "gspo": gspo, "gmpo": gmpo, "sapo": sapo}.get(config.objective.value)
        total = total - (cispo(lr, a, config, logprobs[of]) if objective is None else objective(lr, a, config))
    return total / N


def flat(x, config, correction=OFF, order=None, parts=1):
    """Loss and gradient of our function, over tokens in any order, sequences never cut."""
    order = torch.arange(len(INDEX)) if order is None else order
    logprobs = x["logprobs"].clone().requires_grad_()
    total = 0.0
    for group in torch.arange(N).tensor_split(parts):
        cut = order[torch.isin(INDEX[order], group)]
        sequences = TokenSequences(INDEX[cut] - group[0], len(group))
        inputs = LossInputs(
            x["old"][cut],
            x["advantages"][cut],
            x["weight"][cut],
            rollout_logprobs=x["rollout"][cut],
            sequences=sequences,
        )
        loss = policy_loss(logprobs[cut], inputs, config, correction)
        loss.backward()
        total += loss.item()
    return total, logprobs.grad


CONFIGS = {
    "ppo": LossConfig(),
    "clip-higher": LossConfig(clip_high=0.28),
    "dual-clip": LossConfig(dual_clip=1.2),
    "cispo": LossConfig(objective=Objective.cispo, clip_low=1.0, clip_high=0.1),
    "gspo": LossConfig(objective=Objective.gspo, clip_low=0.05, clip_high=0.1),
    "gmpo": LossConfig(objective=Objective.gmpo, clip_low=0.1, clip_high=0.2),
    "sapo": LossConfig(objective=Objective.sapo),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts", [1, 3])
def test_value_and_gradient_equal_the_dense_reference(name, parts):
    x, config = tokens(seed=4), CONFIGS[name]
    free = x["logprobs"].clone().requires_grad_()
    expected = dense(x, config, free)
    expected.backward()
    order = torch.randperm(len(INDEX), generator=torch.Generator().manual_seed(1))
    loss, grad = flat(x, config, order=order, parts=parts)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, free.grad, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", CONFIGS)
def test_on_policy_all_have_the_policy_gradient(name):
    x = tokens(seed=5)
    x["old"] = x["logprobs"].clone()
    _, grad = flat(x, CONFIGS[name])
    torch.testing.assert_close(grad, -x["weight"] * x["advantages"])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), spread=st.floats(0, 4), name=st.sampled_from([n for n in CONFIGS if n != "cispo"]))
def test_the_gain_of_a_response_is_bounded(seed, spread, name):
    """No objective rewards going further than its bound: the gain of a positive advantage has a ceiling."""
    x, config = tokens(seed, spread), CONFIGS[name]
    x["advantages"] = x["advantages"].abs() + 0.1
    loss, grad = flat(x, config)
    ceiling = {"sapo": 4 / config.sapo_tau, "gmpo": math.exp(config.clip_high)}.get(name, 1 + config.clip_high)
    mean = float((x["weight"] * x["advantages"]).sum())
    assert -loss <= ceiling * mean * (1 + 1e-9)
    assert torch.isfinite(grad).all()
    assert (grad <= 0).all()


def gains(x, config):
    """Gain of each token and its gradient, without weights."""
    logprobs = x["logprobs"].clone().requires_grad_()
    counts, sequences = torch.ones(len(INDEX), dtype=torch.bool), TokenSequences(INDEX, N)
    gain = policy_gain(TokenTerms(logprobs, logprobs - x["old"], x["advantages"], counts, sequences), config)
    gain.sum().backward()
    return gain.detach(), logprobs.grad


far_apart = {"seed": st.integers(0, 10**6), "spread": st.floats(0, 4)}


@settings(deadline=None, max_examples=30)
@given(**far_apart, name=st.sampled_from([n for n in CONFIGS if n != "cispo"]))
def test_the_gain_of_a_bad_response_is_bounded(seed, spread, name):
    """Going away from a bad response pays up to a bound; dual clip and SAPO's gate also bound what it can cost."""
    x, config = tokens(seed, spread), CONFIGS[name]
    x["advantages"] = -x["advantages"].abs() - 0.1
    gain, grad = gains(x, config)
    a, log_ratio = x["advantages"], x["logprobs"] - x["old"]
    if name == "gspo":
        log_ratio = torch.stack([log_ratio[i == INDEX].mean() for i in range(N)])[INDEX]
    ratio = log_ratio.exp()
    ceiling = {"sapo": 0.0, "gmpo": math.exp(-config.clip_low)}.get(name, 1 - config.clip_low)
    assert (gain <= ceiling * a * (1 - 1e-12)).all()
    assert (grad <= 0).all()
    if name == "gmpo":
        assert (grad[log_ratio < -config.clip_low] == 0).all()
    elif name != "sapo":
        assert (grad[ratio < 1 - config.clip_low] == 0).all()
    if name == "dual-clip":
        assert (gain >= config.dual_clip * a).all()
        assert (grad[ratio > config.dual_clip] == 0).all()
    if name == "sapo":
        assert (gain >= 4 / config.sapo_tau_negative * a).all()


@settings(deadline=None, max_examples=30)
@given(**far_apart, low=st.floats(0, 1), high=st.floats(0, 2))
def test_the_weight_of_cispo_stays_in_its_bounds(seed, spread, low, high):
    x = tokens(seed, spread)
    _, grad = gains(x, LossConfig(objective=Objective.cispo, clip_low=low, clip_high=high))
    expected = (x["logprobs"] - x["old"]).exp().clamp(1 - low, 1 + high)
    torch.testing.assert_close(grad, expected * x["advantages"], rtol=1e-12, atol=1e-15)


@settings(deadline=None, max_examples=30)
@given(**far_apart)
def test_a_dual_clip_out_of_reach_is_none(seed, spread):
    x = tokens(seed, spread)
    for found, expected in zip(gains(x, LossConfig(dual_clip=1e9)), gains(x, LossConfig()), strict=True):
        assert torch.equal(found, expected)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(["cispo", "gspo", "gmpo", "sapo"]))
def test_limits_where_they_are_the_plain_surrogate(seed, name):
    """Without bounds (or with responses of one token) each is importance-weighted policy gradient."""
    x = tokens(seed)
    plain = LossConfig(clip_low=1.0, clip_high=1e9)
    if name in ("gspo", "gmpo"):  # one token a response: the sequence's ratio is the token's
        first = torch.tensor([int((i == INDEX).nonzero()[0]) for i in range(N)])
        x["weight"] = torch.zeros_like(x["weight"]).index_fill_(0, first, 1 / N)
    if name == "sapo":  # near ρ = 1 the gate has slope 1
        x["old"] = x["logprobs"] + 1e-5 * (x["old"] - x["logprobs"])
    bounds = {"clip_low": 1e9 if name == "gmpo" else 1.0, "clip_high": 1e9}
    _, grad = flat(x, LossConfig(objective=Objective(name), **bounds))
    _, expected = flat(x, plain)
    torch.testing.assert_close(grad, expected, rtol=1e-4 if name == "sapo" else 1e-9, atol=1e-12)


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    far = torch.tensor([3.0], dtype=torch.float64)
    inputs = LossInputs(-far, torch.tensor([-1.0]), torch.ones(1))
    assert policy_loss(torch.zeros(1), inputs, LossConfig(), OFF).item() == pytest.approx(math.exp(3))
    assert policy_loss(torch.zeros(1), inputs, LossConfig(dual_clip=3.0), OFF).item() == pytest.approx(3.0)


# ------------------------------------------------------------------------------------------- correction

CORRECTIONS = {
    "truncated": CorrectionConfig(weight=CorrectionWeight.token, weight_max=1.1),
    "decoupled": CorrectionConfig(weight=CorrectionWeight.token, weight_max=None),
    "sequence": CorrectionConfig(weight=CorrectionWeight.sequence, weight_max=1.5),
    "icepop": CorrectionConfig(weight=CorrectionWeight.token, weight_max=None, mask_low=0.85, mask_high=1.2),
    "mask": CorrectionConfig(mask_low=0.9),
    "reject": CorrectionConfig(reject_low=0.95, reject_high=1.05),
}


def dense_weights(x, c):
    out = []
    for i in range(N):
        ratio = (x["old"] - x["rollout"])[i == INDEX].exp()
        geometric = ratio.prod() ** (1 / len(ratio))
        for r in ratio:
            w = {"none": 1.0, "token": float(r), "sequence": float(ratio.prod())}[c.weight.value]
            w = w if c.weight.value == "none" or c.weight_max is None else min(w, c.weight_max)
            inside = (c.mask_low is None or r >= c.mask_low) and (c.mask_high is None or r <= c.mask_high)
            kept = (c.reject_low is None or geometric >= c.reject_low) and (
                c.reject_high is None or geometric <= c.reject_high
            )
            out.append(w if inside and kept else 0.0)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_correction_weights(name):
    x, config = tokens(seed=6), CORRECTIONS[name]
    expected = dense_weights(x, config)
    assert expected.unique().numel() > 1  # the case shows something
    counts, sequences = torch.ones(len(INDEX), dtype=torch.bool), TokenSequences(INDEX, N)
    found = correction_weights(x["old"], x["rollout"], counts, config, sequences)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    # They multiply the policy term: the loss is linear in them.
    weighted = x | {"weight": x["weight"] * expected}
    loss, grad = flat(x, LossConfig(), config)
    plain_loss, plain_grad = flat(weighted, LossConfig())
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-12, atol=1e-15)
    logged = correction_metrics(x["old"], x["rollout"], config, sequences)
    assert logged["correction/left_out"] == pytest.approx(float((expected == 0).double().mean()))
    assert logged["correction/weight_mean"] == pytest.approx(float(expected.mean()))
    assert corrects(config)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), shift=st.floats(-5, 5), name=st.sampled_from(list(CORRECTIONS)))
def test_weights_are_bounded_and_of_differences_alone(seed, shift, name):
    x, config = tokens(seed), CORRECTIONS[name]
    counts, sequences = torch.ones(len(INDEX), dtype=torch.bool), TokenSequences(INDEX, N)
    found = correction_weights(x["old"], x["rollout"], counts, config, sequences)
    highest = math.inf if config.weight_max is None else config.weight_max
    assert ((found >= 0) & (found <= highest)).all()
    shifted = correction_weights(x["old"] + shift, x["rollout"] + shift, counts, config, sequences)
    torch.testing.assert_close(shifted, found, rtol=1e-12, atol=0.0)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6), name=st.sampled_from(list(CORRECTIONS)), estimator=st.sampled_from(list(KLEstimator))
)
def test_only_the_policy_term_is_weighted(seed, name, estimator):
    x, correction = tokens(seed), CORRECTIONS[name]
    extra = {"ref": x["logprobs"] - 0.3 * x["rollout"].sin(), "entropy": x["rollout"].cos().abs()}
    config = LossConfig(kl_coef=0.7, kl_estimator=estimator, entropy_coef=0.2)

    def loss_and_gradient(config, correction):
        logprobs, entropy = x["logprobs"].clone().requires_grad_(), extra["entropy"].clone().requires_grad_()
        columns = (x["advantages"], x["weight"], extra["ref"], x["rollout"], TokenSequences(INDEX, N))
        loss = policy_loss(logprobs, LossInputs(x["old"], *columns), config, correction, entropy)
        loss.backward()
        return torch.cat(
            [loss.detach()[None], logprobs.grad, torch.zeros_like(entropy) if entropy.grad is None else entropy.grad]
        )

    with_terms = loss_and_gradient(config, correction) - loss_and_gradient(LossConfig(), correction)
    terms = loss_and_gradient(config, OFF) - loss_and_gradient(LossConfig(), OFF)
    torch.testing.assert_close(with_terms, terms, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_where_server_and_trainer_agree_nothing_is_corrected(name):
    x = tokens(seed=7)
    x["rollout"] = x["old"].clone()
    loss, grad = flat(x, LossConfig(), CORRECTIONS[name])
    plain, plain_grad = flat(x, LossConfig())
    assert loss == plain
    assert torch.equal(grad, plain_grad)


def test_padding_may_hold_anything_in_sequences_too():
    config = LossConfig(objective=Objective.gspo)
    correction = CorrectionConfig(weight=CorrectionWeight.sequence, reject_low=0.1)

    def run(junk):
        def padded(*values):
            return torch.tensor([*values, *([junk] if junk is not None else [])], dtype=torch.float64)

        n = 2 + (junk is not None)
        logprobs = padded(-0.5, -0.2).requires_grad_()
        weight = torch.tensor([0.5, 0.5, 0.0][:n], dtype=torch.float64)
        sequences = TokenSequences(torch.zeros(n, dtype=torch.int64), 1)
        inputs = LossInputs(padded(-0.4, -0.3), padded(1.0, 1.0), weight, None, padded(-0.45, -0.3), sequences)
        loss = policy_loss(logprobs, inputs, config, correction)
        loss.backward()
        return loss.item(), logprobs.grad.tolist()[:2]

    assert run(math.nan) == run(None)
    assert run(-math.inf) == run(None)


def test_missing_inputs_are_errors():
    x = torch.zeros(2)
    for config, correction in [
        (LossConfig(objective=Objective.gspo), OFF),
        (LossConfig(objective=Objective.gmpo), OFF),
        (LossConfig(), CorrectionConfig(weight=CorrectionWeight.sequence)),
        (LossConfig(), CorrectionConfig(reject_high=2.0)),
    ]:
        assert needs_sequences(config, correction)
        with pytest.raises(ValueError, match="sequence"):
            policy_loss(x, LossInputs(x, x, x + 1, rollout_logprobs=x), config, correction)
    with pytest.raises(ValueError, match="rollout_logprobs"):
        policy_loss(x, LossInputs(x, x, x + 1), LossConfig(), CorrectionConfig(mask_low=0.5))
    assert not needs_sequences(LossConfig(), CorrectionConfig(weight=CorrectionWeight.token, mask_high=2.0))


def test_clip_fractions_follow_the_objective():
    x = tokens(seed=8)
    sequences, zeros = TokenSequences(INDEX, N), torch.zeros(len(INDEX), dtype=torch.float64)

    def fraction(config):
        found = update_metrics(x["logprobs"], x["old"], x["advantages"], zeros, config, sequences=sequences)
        return found["loss/clip_fraction"]

    lr = x["logprobs"] - x["old"]
    mean = torch.stack([lr[i == INDEX].mean() for i in range(N)])[INDEX]
    a = x["advantages"]

    def cut(low, high):
        return float(((low & (a < 0)) | (high & (a > 0))).double().mean())

    assert fraction(LossConfig()) == pytest.approx(cut(lr.exp() < 0.8, lr.exp() > 1.2))
    assert fraction(CONFIGS["gspo"]) == pytest.approx(cut(mean.exp() < 0.95, mean.exp() > 1.1))
    assert fraction(CONFIGS["gmpo"]) == pytest.approx(cut(lr < -0.1, lr > 0.2))
    assert fraction(CONFIGS["cispo"]) == pytest.approx(float((lr.exp() > 1.1).double().mean()))
    assert fraction(CONFIGS["sapo"]) == 0.0
