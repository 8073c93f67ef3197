"""Statistics of comparisons, against enumeration, against tables in textbooks, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_mapo.algorithms.comparison import (
    crossed_bootstrap,
    crossed_mean,
    first_reaching,
    holm,
    paired_difference,
    seed_band,
    student_t_cdf,
    student_t_quantile,
    trailing_mean,
)


class TestStudent:
    @pytest.mark.parametrize(
        ("probability", "freedom", "value"),
        [
            (0.975, 1, 12.7062047),
            (0.975, 2, 4.3026527),
            (0.975, 4, 2.7764451),
            (0.95, 7, 1.8945786),
            (0.8, 4, 0.9409646),
            (0.995, 30, 2.7499957),
            (0.975, 1e7, 1.9599642),
            (0.9999, 3, 22.2037),
        ],
    )
    def test_quantiles_are_those_of_printed_tables(self, probability, freedom, value):
        assert student_t_quantile(probability, freedom) == pytest.approx(value, rel=2e-6)
        assert student_t_quantile(1 - probability, freedom) == pytest.approx(-value, rel=2e-6)

    @pytest.mark.parametrize("x", [-30.0, -1.3, 0.0, 0.4, 2.0, 100.0])
    def test_closed_forms_for_one_and_two_degrees_of_freedom(self, x):
        assert student_t_cdf(x, 1) == pytest.approx(0.5 + math.atan(x) / math.pi, abs=1e-12)
        assert student_t_cdf(x, 2) == pytest.approx(0.5 + x / (2 * math.sqrt(2 + x * x)), abs=1e-12)

    @pytest.mark.parametrize("x", [-12.5, -0.7, 0.1, 1.0, 3.182446, 40.0])
    def test_closed_forms_for_three_to_five_degrees_of_freedom(self, x):
        """Abramowitz and Stegun, 26.7.3 and 26.7.4."""
        three, four, five = 1 + x * x / 3, 1 + x * x / 4, 1 + x * x / 5
        root3, root5 = math.sqrt(3), math.sqrt(5)
        expected = {
            3: 0.5 + (x / (root3 * three) + math.atan(x / root3)) / math.pi,
            4: 0.5 + 3 / 8 * x / math.sqrt(four) * (1 - x * x / (12 * four)),
            5: 0.5 + (x / (root5 * five) * (1 + 2 / (3 * five)) + math.atan(x / root5)) / math.pi,
        }
        for freedom, value in expected.items():
            assert student_t_cdf(x, freedom) == pytest.approx(value, abs=1e-13)

    @pytest.mark.parametrize(
        ("probability", "values"),
        [
            (0.95, (2.919985580, 2.353363435, 2.131846786, 2.015048373)),
            (0.975, (4.302652730, 3.182446305, 2.776445105, 2.570581836)),
            (0.995, (9.924843201, 5.840909310, 4.604094871, 4.032142984)),
        ],
    )
    def test_quantiles_of_a_few_seeds_have_ten_digits(self, probability, values):
        for freedom, value in zip((2, 3, 4, 5), values, strict=True):
            assert student_t_quantile(probability, freedom) == pytest.approx(value, abs=1e-9)

    def test_fractional_degrees_of_freedom_agree_with_samples(self):
        torch.manual_seed(0)
        draws = torch.distributions.StudentT(2.7).sample((400_000,))
        for x in (0.5, 1.5, 4.0):
            assert student_t_cdf(x, 2.7) == pytest.approx(float((draws <= x).double().mean()), abs=3e-3)

    @pytest.mark.parametrize(("probability", "freedom"), [(0, 3), (1, 3), (0.5, 0), (0.5, math.nan)])
    def test_nonsense_is_refused(self, probability, freedom):
        with pytest.raises(ValueError, match="no quantile"):
            student_t_quantile(probability, freedom)


class TestCrossedMean:
    def test_one_question_is_the_paired_t_test(self):
        """Sleep data of Student 1908 (extra hours of sleep of ten patients, two drugs): t = 4.0621, p = 0.002833."""
        first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
        second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
        found = paired_difference(np.array(second)[:, None], np.array(first)[:, None], seed=0)
        assert found.value == pytest.approx(1.58)
        assert found.value / found.standard_error == pytest.approx(4.0621, abs=1e-4)
        assert found.p_value == pytest.approx(0.002833, abs=1e-6)
        assert (found.low, found.high) == (pytest.approx(0.7001142, abs=1e-6), pytest.approx(2.4598858, abs=1e-6))
        assert found.freedom == 9

    def test_variance_is_that_of_the_components(self):
        """The estimate of the mean's variance is unbiased where both effects are there."""
        generator = np.random.default_rng(1)
        seeds, questions, of_seed, of_question, rest = 6, 30, 0.2, 0.4, 0.3
        found = [
            crossed_mean(
                of_seed * generator.normal(size=(seeds, 1))
                + of_question * generator.normal(size=(1, questions))
                + rest * generator.normal(size=(seeds, questions)),
                seed=0,
                resamples=1,
            ).standard_error
            ** 2
            for _ in range(60)
        ]
        exact = of_seed**2 / seeds + of_question**2 / questions + rest**2 / (seeds * questions)
        assert np.mean(found) == pytest.approx(exact, rel=0.15)

    @pytest.mark.parametrize("of_seed", [0.0, 0.05, 0.2])
    @pytest.mark.parametrize("seeds", [3, 5])
    def test_a_95_percent_interval_covers_about_95_percent(self, seeds, of_seed):
        """Right or wrong answers of two algorithms that are equally good; seeds make some runs better than others."""
        generator = np.random.default_rng(7)
        questions, samples, trials = 60, 4, 500
        covered = 0
        for _ in range(trials):
            difficulty = generator.uniform(0.2, 0.8, size=(1, questions))
            shares = np.clip(difficulty + of_seed * generator.normal(size=(2, seeds, 1)), 0.02, 0.98)
            tables = generator.binomial(samples, shares, (2, seeds, questions)) / samples
            found = paired_difference(*tables, seed=0, resamples=1)
            covered += found.low <= 0 <= found.high
        # A binomial share of 500 trials lies within 0.03 of its mean; without seed effects the method is conservative.
        assert 0.92 <= covered / trials <= 0.995

    def test_the_p_value_is_below_5_percent_exactly_when_the_interval_excludes_0(self):
        generator = np.random.default_rng(3)
        for shift in np.linspace(-0.3, 0.3, 25):
            found = crossed_mean(shift + 0.2 * generator.normal(size=(4, 12)), seed=0, resamples=1)
            assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)

    def test_the_detectable_difference_is_found_with_the_power_that_it_promises(self):
        generator = np.random.default_rng(5)
        of_seed, seeds = 0.1, 5
        hits = 0
        # The true detectable difference: simulated here with the true standard error, of_seed / sqrt(seeds).
        true = (student_t_quantile(0.975, seeds - 1) + student_t_quantile(0.8, seeds - 1)) * of_seed / math.sqrt(seeds)
        trials = 1500
        for _ in range(trials):
            table = true + of_seed * generator.normal(size=(seeds, 1))
            t = table.mean() / (table.std(ddof=1) / math.sqrt(seeds))
            hits += abs(t) > student_t_quantile(0.975, seeds - 1)
        assert hits / trials == pytest.approx(0.8, abs=0.05)
        assert crossed_mean(table, seed=0).detectable == pytest.approx(true * table.std(ddof=1) / of_seed, rel=1e-9)

    def test_more_comparisons_need_a_larger_difference(self):
        table = np.random.default_rng(0).normal(size=(4, 9))
        one, three = crossed_mean(table, 0), crossed_mean(table, 0, comparisons=3)
        assert three.detectable > one.detectable
        assert (one.low, one.p_value) == (three.low, three.p_value)

    def test_without_scatter_nothing_is_claimed(self):
        same = crossed_mean(np.full((3, 4), 0.25), seed=0)
        assert (same.low, same.high, same.p_value) == (0.25, 0.25, 1.0)
        single = crossed_mean([[0.5]], seed=0)
        assert math.isnan(single.standard_error)
        assert single.p_value == 1.0

    @pytest.mark.parametrize("values", [[], [[]], [[math.nan]], [1.0, 2.0]])
    def test_a_table_that_is_none_is_refused(self, values):
        with pytest.raises(ValueError, match="table"):
            crossed_mean(values, seed=0)

    def test_unequal_tables_cannot_be_paired(self):
        with pytest.raises(ValueError, match="pair"):
            paired_difference(np.zeros((2, 3)), np.zeros((3, 3)), seed=0)


class TestBootstrap:
    def test_agrees_with_the_enumeration_of_all_draws(self):
        """Three seeds and two questions: 27 x 4 equally likely draws."""
        table = np.array([[0.0, 0.3], [0.5, 1.0], [0.2, 0.9]])
        means = [
            table[np.ix_(s, q)].mean()
            for s in itertools.product(range(3), repeat=3)
            for q in itertools.product(range(2), repeat=2)
        ]
        for confidence in (0.5, 0.8, 0.9):
            low, high = crossed_bootstrap(table, seed=0, confidence=confidence, resamples=60_000)
            ends = np.quantile(means, [(1 - confidence) / 2, 1 - (1 - confidence) / 2])
            assert (low, high) == (pytest.approx(ends[0], abs=0.02), pytest.approx(ends[1], abs=0.02))

    def test_a_seed_gives_the_same_interval_again(self):
        table = np.random.default_rng(0).normal(size=(3, 50))
        assert crossed_bootstrap(table, 1) == crossed_bootstrap(table, 1) != crossed_bootstrap(table, 2)

    def test_it_never_leaves_the_range_of_the_seeds(self):
        low, high = crossed_bootstrap([[0.1], [0.2], [0.4]], 0, confidence=0.9999)
        assert (low, high) == (pytest.approx(0.1), pytest.approx(0.4))


def test_holm_adjusts_as_the_paper_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_keeps_the_family_wise_error():
    generator = np.random.default_rng(0)
    wrong = [min(holm(list(generator.uniform(size=4)))) < 0.05 for _ in range(4000)]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.012)


def test_a_band_over_seeds_is_students_interval_where_two_runs_are():
    mean, low, high = seed_band([[1.0, 2.0, 5.0], [3.0, 2.0, math.nan]])
    assert mean.tolist() == [2.0, 2.0, 5.0]
    # Two values 1 and 3: standard error 1, one degree of freedom.
    assert (high - mean)[0] == pytest.approx(12.7062047)
    assert (low[1], high[1]) == (2.0, 2.0)
    assert np.isnan(low[2])


def test_trailing_mean_and_first_reaching():
    values = trailing_mean([0.0, 1.0, math.nan, 1.0, 1.0], 2)
    assert np.isnan(values[0])
    assert values[1:].tolist() == [0.5, 1.0, 1.0, 1.0]
    assert np.isnan(trailing_mean([1.0], 2)).all()
    assert first_reaching(values, 0.9) == 2
    assert first_reaching(values, 1.1) is None
