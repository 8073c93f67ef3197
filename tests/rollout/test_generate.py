"""Sampling from a real server: log-probs, stop tokens, truncation, seeds, checks of the answer."""

from __future__ import annotations

import asyncio

import pytest
import torch
from server_support import EOS, load, reference_logprobs

from megatron_mapo.errors import RolloutError
from megatron_mapo.rollout.client import RolloutClient, Sampling, parse_response

PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_the_tempered_distribution(call, model_path, temperature):
    sampling = Sampling(24, temperature, (EOS,))
    responses = call(lambda c: c.generate(PROMPT, 4, sampling, seeds=[1, 2, 3, 4]))
    model = load(model_path)
    for response in responses:
        reference = reference_logprobs(model, PROMPT, response.token_ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(response.logprobs), reference, atol=1e-3, rtol=0)
        assert response.truncated == (response.token_ids[-1] != EOS)


def test_samples_of_a_group_differ_and_a_seed_repeats_its_tokens(call):
    sampling = Sampling(16, 1.0, (EOS,))
    first = call(lambda c: c.generate(PROMPT, 4, sampling, seeds=[1, 2, 3, 4]))
    again = call(lambda c: c.generate(PROMPT, 4, sampling, seeds=[1, 2, 99, 4]))
    tokens = [tuple(r.token_ids) for r in first]
    assert len(set(tokens)) == 4
    assert [tuple(r.token_ids) == t for r, t in zip(again, tokens, strict=True)] == [True, True, False, True]


def test_tokens_of_a_seed_do_not_depend_on_the_other_requests(call):
    sampling = Sampling(16, 1.0, (EOS,))

    async def together(client: RolloutClient):
        groups = [client.generate([3 + i, 4 + i, 5 + i], 4, sampling, [10 * i + j for j in range(4)]) for i in range(8)]
        greedy = [client.generate([3 + i, 4 + i, 5 + i], 1, Sampling(16, 0.0)) for i in range(8)]
        return await asyncio.gather(*groups, *greedy)

    crowd = call(together)
    alone = call(lambda c: c.generate([3, 4, 5], 4, sampling, [0, 1, 2, 3]))
    assert [r.token_ids for r in crowd[0]] == [r.token_ids for r in alone]


def test_seeded_sampling_follows_the_distribution(call, model_path):
    draws = 2000
    responses = call(lambda c: c.generate(PROMPT, draws, Sampling(1, 1.0), seeds=list(range(draws))))
    with torch.no_grad():
        logprobs = load(model_path)(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    sampled = logprobs[torch.tensor([r.token_ids[0] for r in responses])]
    mean = (logprobs.exp() * logprobs).sum()
    spread = (logprobs.exp() * (logprobs - mean) ** 2).sum().sqrt()
    assert abs(float(sampled.mean() - mean)) < 5 * float(spread) / draws**0.5


def test_a_stop_token_ends_the_response_and_belongs_to_it(call):
    free = call(lambda c: c.generate(PROMPT, 1, Sampling(16, 1.0), seeds=[5]))[0]
    stop = free.token_ids[4]
    stopped = call(lambda c: c.generate(PROMPT, 1, Sampling(16, 1.0, (stop,)), seeds=[5]))[0]
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert (stopped.truncated, stopped.finish_reason) == (False, "stop")
    assert (free.truncated, len(free.token_ids)) == (True, 16)


def test_without_logprobs(call):
    response = call(lambda c: c.generate(PROMPT, 1, Sampling(4, 0.0, logprobs=False)))[0]
    assert (len(response.token_ids), response.logprobs) == (4, [])


def test_a_wrong_key_is_refused(call):
    with pytest.raises(RolloutError, match=r"rollout\.api_key_file"):
        call(lambda c: c.generate(PROMPT, 1, Sampling(4)), api_key="wrong")


def test_a_prompt_longer_than_the_context_is_refused_without_retries(call, servers):
    with pytest.raises(RolloutError, match=f"{servers.urls[0]}/generate: status 400"):
        call(lambda c: c.generate([5] * 5000, 1, Sampling(4)))


def test_no_server_at_an_address_says_so():
    async def work():
        client = RolloutClient(["http://127.0.0.1:9"], retries=1)
        try:
            await client.generate(PROMPT, 1, Sampling(4))
        finally:
            await client.close()

    with pytest.raises(
        RolloutError, match=r"no generation server serves: http://127\.0\.0\.1:9 is out: .*Cannot connect"
    ):
        asyncio.run(work())


def test_another_server_takes_over(servers):
    async def work():
        client = RolloutClient(["http://127.0.0.1:9", *servers.urls], "a-key-for-tests", retries=1)
        try:
            return await client.generate(PROMPT, 2, Sampling(4))
        finally:
            await client.close()

    assert len(asyncio.run(work())) == 2


def good_answer() -> dict:
    return {
        "output_ids": [7, 8],
        "meta_info": {
            "finish_reason": {"type": "length"},
            "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
            "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
        },
    }


def test_an_answer_is_parsed_with_a_version_for_every_token():
    response = parse_response(good_answer(), Sampling(2))
    assert (response.token_ids, response.logprobs, response.weight_versions) == ([7, 8], [-0.5, -1.5], [3, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(output_ids=[7, "8"]), "token ids"),
        (lambda a: a.update(output_ids=[7, 600]), "vocabulary"),
        (lambda a: a.update(output_ids=[7, 9]), "other tokens"),
        (lambda a: a.update(output_ids=[]), "0 tokens"),
        (lambda a: a["meta_info"]["output_token_logprobs"].pop(), "does not fit"),
        (lambda a: a["meta_info"]["output_token_logprobs"][0].__setitem__(0, float("nan")), "finite"),
        (lambda a: a["meta_info"]["output_token_logprobs"][0].__setitem__(0, 0.5), "at most 0"),
        (lambda a: a["meta_info"]["weight_versions"].pop(), "cover"),
        (lambda a: a["meta_info"]["finish_reason"].update(type="strange"), "strange"),
    ],
)
def test_an_answer_that_is_wrong_is_refused(change, message):
    answer = good_answer()
    change(answer)
    with pytest.raises(ValueError, match=message):
        parse_response(answer, Sampling(2), vocab_size=512)
