"""The sampler on a real server: order, seeds, scores, versions, failures."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
import torch
from server_support import API_KEY, EOS, load, reference_logprobs

from megatron_mapo.config import RolloutConfig
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import DataError, RewardError, RolloutError
from megatron_mapo.rollout.client import RolloutClient
from megatron_mapo.rollout.sampler import Sampler, sample_seed
from megatron_mapo.rollout.scoring import Scores


@dataclass(frozen=True)
class Question:
    id: int
    token_ids: list[int]


PROMPTS = [Question(100 + i, [3 + i, 9, 20 + i]) for i in range(5)]


def odd_share(responses: list[list[int]]) -> list[float]:
    return [sum(t % 2 for t in tokens) / len(tokens) for tokens in responses]


async def score(prompt: Question, responses: list[list[int]]) -> Scores:
    await asyncio.sleep(0.02 * (105 - prompt.id))  # later prompts are scored first
    shares = odd_share(responses)
    return Scores(shares, {"success": [share > 0.5 for share in shares], "reward/odd": [2 * share for share in shares]})


@pytest.fixture
def make(servers, call):
    made = []

    def sampler(score=score, **options) -> Sampler:
        settings = {"responses_per_prompt": 3, "max_response_tokens": 12, "max_prompt_tokens": 8, "concurrency": 4}
        config = RolloutConfig(**settings | options)
        client = RolloutClient(servers.urls, API_KEY, retries=0)
        made.append(Sampler(client, config, score, [EOS]))
        return made[-1]

    yield sampler
    for one in made:
        one.close()


@pytest.fixture
def version(call) -> int:
    return call(lambda c: c.weight_versions())[0]


def equal(a: SequenceBatch, b: SequenceBatch) -> bool:
    mine, theirs = a.to_tensors(), b.to_tensors()
    return all(torch.allclose(mine[k].double(), theirs[k].double(), atol=1e-5) for k in mine if len(mine[k]))


def test_a_batch_is_in_order_and_scored(make, version, servers):
    batch = make().sample(PROMPTS, version, seed=7, group_base=40)
    assert len(batch) == 15
    assert batch.group_ids.tolist() == [40 + i for i in range(5) for _ in range(3)]
    assert batch.extra["prompt_id"].tolist() == [100 + i for i in range(5) for _ in range(3)]
    assert batch.weight_versions.unique().tolist() == [version]
    tokens = [batch.tokens[a:b].tolist() for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    responses = [row[3:] for row in tokens]
    assert [row[:3] for row in tokens] == [p.token_ids for p in PROMPTS for _ in range(3)]
    assert batch.rewards.tolist() == pytest.approx(odd_share(responses))
    assert batch.extra["success"].dtype == torch.bool
    assert batch.extra["success"].tolist() == [share > 0.5 for share in odd_share(responses)]
    assert batch.extra["reward/odd"].tolist() == pytest.approx([2 * share for share in odd_share(responses)])
    assert batch.truncated.tolist() == [row[-1] != EOS for row in responses]


def test_the_same_seed_gives_the_same_batch(make, version):
    sampler = make()
    first = sampler.sample(PROMPTS, version, seed=7)
    assert equal(first, sampler.sample(PROMPTS, version, seed=7))
    assert equal(first, make(concurrency=1).sample(PROMPTS, version, seed=7))
    other = sampler.sample(PROMPTS, version, seed=8)
    assert first.tokens.tolist() != other.tokens.tolist()


def test_temperature_is_that_of_the_configuration(make, version, sync, model_path):
    model = load(model_path)
    sync.update(iter(model.named_parameters()), version + 1)
    batch = make(temperature=0.6).sample(PROMPTS[:1], version + 1, seed=1)
    one = batch.select(torch.tensor([1]))
    reference = reference_logprobs(model, one.tokens[:3].tolist(), one.tokens[3:].tolist(), 0.6)
    torch.testing.assert_close(one.rollout_logprobs, reference, atol=1e-3, rtol=0)


def evaluated(sampler: Sampler, prompts: list[Question], samples: int, greedy: bool, seed: int) -> dict:
    """Tokens of the sampled and of the greedy responses to each prompt, by its id."""
    found = {}

    async def arrived(prompt, sampled, single):
        assert prompt.id not in found
        found[prompt.id] = [[r.token_ids for r in responses] for responses in (sampled, single)]

    sampler.evaluate(prompts, samples, greedy, seed, arrived)
    return found


def test_evaluate_gives_sampled_and_greedy_responses(make):
    everything = evaluated(make(), PROMPTS, 4, True, seed=3)
    assert sorted(everything) == [p.id for p in PROMPTS]
    assert all((len(sampled), len(single)) == (4, 1) for sampled, single in everything.values())
    greedy = evaluated(make(), PROMPTS, 0, True, seed=4)
    assert greedy == {i: [[], single] for i, (_, single) in everything.items()}


def test_a_part_of_the_prompts_gets_the_same_responses(make):
    everything = evaluated(make(), PROMPTS, 3, False, seed=3)
    part = evaluated(make(), PROMPTS[3:], 3, False, seed=3)
    assert part == {i: everything[i] for i in (103, 104)}
    assert len({str(sampled) for sampled, _ in everything.values()}) == 5


def test_what_fails_on_arrival_ends_the_evaluation(make):
    async def arrived(prompt, sampled, single):
        raise RewardError(f"no answer in prompt {prompt.id}")

    with pytest.raises(RewardError, match="no answer in prompt 10"):
        make().evaluate(PROMPTS, 2, True, 1, arrived)


def test_a_version_that_is_not_expected_is_refused(make, version):
    with pytest.raises(RolloutError, match=f"weight versions {version} to {version}, but the trainer is at"):
        make().sample(PROMPTS, version + 1, seed=1)


def test_a_failing_verifier_ends_the_batch(make, version):
    async def fails(prompt, responses):
        if prompt.id == 102:
            raise RewardError("no answer in prompt 102")
        await asyncio.sleep(3600)

    with pytest.raises(RewardError, match="no answer in prompt 102"):
        make(fails).sample(PROMPTS, version, seed=1)


@pytest.mark.parametrize("rewards", [[1.0], [1.0, float("nan"), 0.0]])
def test_rewards_must_be_one_finite_number_each(make, version, rewards):
    async def wrong(prompt, responses):
        return Scores(rewards)

    with pytest.raises(RewardError, match=r"reward\.name.*prompt 100"):
        make(wrong).sample(PROMPTS[:1], version, seed=1)


def test_a_prompt_that_is_too_long_is_named(make, version):
    with pytest.raises(DataError, match=r"prompt 7 has 9 tokens.*max_prompt_tokens=8"):
        make().sample([Question(7, [5] * 9)], version, seed=1)


def test_seeds_differ_for_every_sample():
    seeds = {sample_seed(s, p, i) for s in range(4) for p in range(50) for i in range(16)}
    assert len(seeds) == 4 * 50 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)
