"""pass@k, maj@k and their intervals against brute force, closed forms and values worked out by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from megatron_mapo.algorithms import evaluation
from megatron_mapo.algorithms.evaluation import bootstrap_interval, maj_at_n, pass_at_k, pass_at_k_sizes


def rows(*counts: int, n: int) -> torch.Tensor:
    """A prompt with ``c`` right responses of n for each count; where they stand must not matter."""
    right = torch.zeros(len(counts), n, dtype=torch.bool)
    for row, count in enumerate(counts):
        right[row, torch.randperm(n, generator=torch.Generator().manual_seed(row))[:count]] = True
    return right


class TestPassAtK:
    @pytest.mark.parametrize("n", [1, 2, 5, 8])
    def test_is_the_share_of_subsets_with_a_right_response(self, n):
        right = rows(*range(n + 1), n=n)
        sizes = list(range(1, n + 1))
        for row, values in zip(right, pass_at_k(right, sizes), strict=True):
            for k, value in zip(sizes, values, strict=True):
                subsets = list(itertools.combinations(row.tolist(), k))
                assert value.item() == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14)

    def test_many_samples_keep_their_digits(self):
        n, sizes = 4096, [1, 7, 512, 4095, 4096]
        counts = [0, 1, 2, 1000, 4095, 4096]
        exact = [[1 - Fraction(math.comb(n - c, k), math.comb(n, k)) for k in sizes] for c in counts]
        expected = torch.tensor([[float(value) for value in row] for row in exact], dtype=torch.float64)
        torch.testing.assert_close(pass_at_k(rows(*counts, n=n), sizes), expected, rtol=1e-12, atol=0)

    def test_pass_at_1_is_the_mean(self):
        right = rows(0, 3, 7, 10, n=10)
        torch.testing.assert_close(pass_at_k(right, [1])[:, 0], right.double().mean(1))

    def test_is_unbiased(self):
        """Averaged over all outcomes of n = 6 samples it is 1 - (1-p)^k."""
        p, n = 0.3, 6
        outcomes = torch.tensor(list(itertools.product([False, True], repeat=n)))
        chance = (p ** outcomes.sum(1)) * ((1 - p) ** (~outcomes).sum(1))
        sizes = [1, 2, 4, 6]
        expected = torch.tensor([1 - (1 - p) ** k for k in sizes], dtype=torch.float64)
        torch.testing.assert_close(chance.double() @ pass_at_k(outcomes, sizes), expected, rtol=1e-6, atol=0)

    def test_sizes(self):
        assert [pass_at_k_sizes(n) for n in (1, 2, 3, 8, 12)] == [
            [1],
            [1, 2],
            [1, 2, 3],
            [1, 2, 4, 8],
            [1, 2, 4, 8, 12],
        ]

    @pytest.mark.parametrize("k", [0, 5])
    def test_k_must_be_possible(self, k):
        with pytest.raises(ValueError, match="from 1 to 4"):
            pass_at_k(rows(1, n=4), [1, k])


class TestMajority:
    @pytest.mark.parametrize(
        ("answers", "right", "expected"),
        [
            ([7, 7, 7, 9], [1, 1, 1, 0], 1.0),
            ([7, 7, 9, 9, 9], [1, 1, 0, 0, 0], 0.0),
            ([7, 9, 7, 9], [1, 0, 1, 0], 1 / 2),
            ([1, 2, 3], [0, 1, 0], 1 / 3),
            ([1, 1, 2, 2, 3], [0, 0, 1, 1, 1], 1 / 2),
            ([-1, -1, -1, 4], [0, 0, 0, 1], 1.0),  # silence does not outvote an answer
            ([-1, -1], [1, 1], 0.0),  # judged right, but there is nothing to vote for
            ([5, 5, 5, 6], [1, 0, 0, 1], 1 / 3),  # one answer, judged differently
        ],
    )
    def test_by_hand(self, answers, right, expected):
        found = maj_at_n(torch.tensor([answers]), torch.tensor([right], dtype=torch.bool))
        assert found.tolist() == [pytest.approx(expected)]

    def test_equals_counting(self, monkeypatch):
        monkeypatch.setattr(evaluation, "_CHUNK_ELEMENTS", 100)  # several chunks, the last one smaller
        generator = torch.Generator().manual_seed(0)
        answers = torch.randint(-1, 4, (50, 6), generator=generator)
        right = answers == torch.randint(0, 4, (50, 1), generator=generator)
        for row, judged, value in zip(answers, right, maj_at_n(answers, right), strict=True):
            votes = {a: row.tolist().count(a) for a in row.tolist() if a >= 0}
            top = [a for a, count in votes.items() if count == max(votes.values())]
            truth = [float(judged[row.tolist().index(a)]) for a in top]
            assert value.item() == pytest.approx(sum(truth) / len(truth) if truth else 0.0)

    def test_one_sample_is_its_own_majority(self):
        right = torch.tensor([[True], [False]])
        assert maj_at_n(torch.tensor([[3], [3]]), right).tolist() == [1.0, 0.0]


class TestBootstrap:
    def test_of_two_prompts_is_known(self):
        """Means of two draws from {0, 1} are 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4."""
        values = torch.tensor([[0.0], [1.0]])
        assert [end.item() for end in bootstrap_interval(values, 0, confidence=0.4)] == [0.5, 0.5]
        assert [end.item() for end in bootstrap_interval(values, 0, confidence=0.6)] == [0.0, 1.0]

    def test_is_the_normal_interval_for_many_prompts(self):
        values = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        low, high = bootstrap_interval(values, 0)
        half = 1.96 * values.std(0) / math.sqrt(4000)
        torch.testing.assert_close(low, values.mean(0) - half, atol=0.05 * half.max().item(), rtol=0)
        torch.testing.assert_close(high, values.mean(0) + half, atol=0.05 * half.max().item(), rtol=0)

    def test_covers_the_truth_as_often_as_it_says(self):
        """Prompts differ in difficulty, and 8 responses to a prompt share it: the truth is the mean difficulty."""
        generator = torch.Generator().manual_seed(2)
        covered, trials = 0, 300
        for trial in range(trials):
            difficulty = torch.rand(100, 1, generator=generator)
            right = torch.rand(100, 8, generator=generator) < difficulty
            low, high = bootstrap_interval(pass_at_k(right, [1]), trial, confidence=0.9, resamples=400)
            covered += bool(low <= 0.5 <= high)
        # Three standard errors of a share of 0.9 in 300 trials are 0.052.
        assert 0.848 <= covered / trials <= 0.952

    def test_responses_of_a_prompt_are_not_independent_evidence(self):
        """Asking the same prompts for more of the same responses makes nothing surer."""
        right = torch.arange(40)[:, None] % 2 == 0
        once, often = (bootstrap_interval(pass_at_k(right.expand(40, n), [1]), 0) for n in (1, 64))
        torch.testing.assert_close(once, often)

    def test_seed_and_chunks(self, monkeypatch):
        values = torch.rand(7, 3, generator=torch.Generator().manual_seed(3))
        first = bootstrap_interval(values, 5)
        torch.testing.assert_close(bootstrap_interval(values, 5), first, rtol=0, atol=0)
        assert not torch.equal(bootstrap_interval(values, 6)[0], first[0])
        monkeypatch.setattr(evaluation, "_CHUNK_ELEMENTS", 7 * 999)  # draws come from the generator in the same order
        torch.testing.assert_close(bootstrap_interval(values, 5), first, rtol=1e-12, atol=0)

    def test_equal_values_have_no_width(self):
        low, high = bootstrap_interval(torch.full((9, 1), 0.25), 0)
        assert (low.item(), high.item()) == (0.25, 0.25)

    @pytest.mark.parametrize("values", [torch.zeros(0, 1), torch.tensor([[0.5], [math.nan]])])
    def test_values_must_be_there(self, values):
        with pytest.raises(ValueError, match="at least one prompt and finite"):
            bootstrap_interval(values, 0)

    @pytest.mark.parametrize("confidence", [0.0, 1.0])
    def test_confidence_must_be_a_share(self, confidence):
        with pytest.raises(ValueError, match="confidence"):
            bootstrap_interval(torch.zeros(2, 1), 0, confidence=confidence)
