"""Is one training configuration better than another? Estimates over seeds *and* questions.

The values of one configuration are a table ``[S, Q]``: S runs of different seeds, all asked the same Q questions. Two
things were drawn at random, seeds and questions, so there are two reasons why another experiment would give another
number. Every cell of the table shares its seed with a row and its question with a column: cells are no independent
evidence. A difference between two configurations is taken cell by cell (run k of both has the same seed, hence the same
prompts and the same first evaluation), which removes what both share, and is then one such table.

Plain numpy, float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
POWER = 0.8
"""Chance to find a difference of the size that is called detectable."""
RESAMPLES = 10_000
_CHUNK_ELEMENTS = 1 << 22
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and questions, or a difference of two.

    Attributes:
        value: the mean.
        low, high: ends of its interval (see ``crossed_mean``).
        standard_error: of the mean; 0 where the table shows no scatter, NaN for a single cell.
        freedom: degrees of freedom of the standard error.
        p_value: of "the true mean is 0", two-sided. 1 where there is no scatter to compare with.
        detectable: smallest true difference that would have been found with ``POWER``, given this scatter.
        boot_low, boot_high: the same interval from the two-way bootstrap (see ``crossed_bootstrap``).
        seeds, questions: S and Q.
    """

    value: float
    low: float
    high: float
    standard_error: float
    freedom: float
    p_value: float
    detectable: float
    boot_low: float
    boot_high: float
    seeds: int
    questions: int


def crossed_mean(values: ArrayLike, seed: int, comparisons: int = 1, resamples: int = RESAMPLES) -> Estimate:
    """Mean of a table of seeds x questions, and how sure it is.

    The model is value = mean + seed effect + question effect + rest, all random (a two-way crossed layout without
    replication). With the mean squares of the analysis of variance, the variance of the mean is
    ``(MS_seeds + MS_questions - MS_rest) / (S Q)``, but never below what either factor gives alone. The interval is
    Student's, with Satterthwaite's degrees of freedom. With few seeds it is wide, as it has to be.

    Args:
        values: ``[S, Q]``. With S = 1 the interval is of questions only, with Q = 1 of seeds only.
        seed: of the bootstrap.
        comparisons: tests that share the error probability (Bonferroni); only ``detectable`` depends on it.
        resamples: of the bootstrap.

    Raises:
        ValueError: the table is empty, or a value is not finite.
    """
    table = _table(values)
    seeds, questions = table.shape
    mean = float(table.mean())
    error, freedom = _standard_error(table)
    boot_low, boot_high = crossed_bootstrap(table, seed, resamples=resamples)
    if not error > 0:  # no scatter, or no way to know it
        return Estimate(mean, mean, mean, error, freedom, 1.0, math.nan, boot_low, boot_high, seeds, questions)
    tail = (1 - CONFIDENCE) / 2
    half = student_t_quantile(1 - tail, freedom) * error
    p_value = 2 * (1 - student_t_cdf(abs(mean) / error, freedom))
    strict = student_t_quantile(1 - tail / comparisons, freedom)
    detectable = (strict + student_t_quantile(POWER, freedom)) * error
    return Estimate(
        mean, mean - half, mean + half, error, freedom, p_value, detectable, boot_low, boot_high, seeds, questions
    )


def paired_difference(
    new: ArrayLike, baseline: ArrayLike, seed: int, comparisons: int = 1, resamples: int = RESAMPLES
) -> Estimate:
    """``new - baseline``, paired cell by cell (see ``crossed_mean``).

    Args:
        new, baseline: ``[S, Q]``; row k of both has the same seed, column q the same question.
        seed: of the bootstrap.
        comparisons: tests that share the error probability.
        resamples: of the bootstrap.

    Raises:
        ValueError: the shapes differ, or as ``crossed_mean``.
    """
    mine, theirs = _table(new), _table(baseline)
    if mine.shape != theirs.shape:
        raise ValueError(f"cannot pair tables of shapes {mine.shape} and {theirs.shape}")
    return crossed_mean(mine - theirs, seed, comparisons, resamples)


def crossed_bootstrap(
    values: ArrayLike, seed: int, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of the mean when seeds and questions are both drawn anew, with replacement.

    Owen's pigeonhole bootstrap (arXiv 0712.1111): whole rows and whole columns are drawn, independently. It assumes no
    shape of distribution, but it cannot go beyond the seeds that it has: with S seeds that alone decide, it covers at
    most ``1 - 2^(1-S)`` (75 % with three), whatever the confidence asked for.

    Returns:
        Lower and upper end.
    """
    table = _table(values)
    seeds, questions = table.shape
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // (seeds + questions))
    means = []
    for done in range(0, resamples, rows):
        count = min(rows, resamples - done)
        drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        drawn_questions = generator.multinomial(questions, np.full(questions, 1 / questions), size=count)
        means.append(((drawn_seeds @ table) * drawn_questions).sum(1) / table.size)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that keep the chance of any false discovery (Holm 1979, step-down).

    Returns:
        as many, in the same order; each at least the given one, at most 1.
    """
    count, largest = len(p_values), 0.0
    adjusted = [0.0] * count
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def seed_band(curves: ArrayLike, confidence: float = CONFIDENCE) -> tuple[Array, Array, Array]:
    """Mean over seeds at every step, with a pointwise Student interval over seeds.

    Args:
        curves: ``[S, T]``; NaN where a run has no value.

    Returns:
        mean, lower and upper end, ``[T]`` each. The ends are NaN where fewer than two runs have a value.
    """
    table = np.atleast_2d(np.asarray(curves, dtype=np.float64))
    present = np.isfinite(table)
    count = present.sum(0)
    mean = np.divide(np.where(present, table, 0).sum(0), count, out=np.full(len(count), np.nan), where=count > 0)
    squares = np.where(present, (table - mean) ** 2, 0).sum(0)
    half = np.full(len(count), np.nan)
    for n in np.unique(count[count > 1]):
        quantile = student_t_quantile(1 - (1 - confidence) / 2, float(n - 1))
        half[count == n] = quantile * np.sqrt(squares[count == n] / (n - 1) / n)
    return mean, mean - half, mean + half


def trailing_mean(values: ArrayLike, window: int) -> Array:
    """Mean of the last ``window`` values up to each one, NaN left out; NaN before the first full window."""
    row = np.asarray(values, dtype=np.float64)
    result = np.full(len(row), np.nan)
    if len(row) < window:
        return result
    windows = np.lib.stride_tricks.sliding_window_view(row, window)
    present = np.isfinite(windows)
    count = present.sum(1)
    sums = np.where(present, windows, 0).sum(1)
    result[window - 1 :] = np.divide(sums, count, out=np.full(len(count), np.nan), where=count > 0)
    return result


def first_reaching(values: ArrayLike, target: float) -> int | None:
    """Index of the first value of at least ``target``; None if there is none."""
    reached = np.flatnonzero(np.asarray(values, dtype=np.float64) >= target)
    return int(reached[0]) if len(reached) else None


def student_t_cdf(x: float, freedom: float) -> float:
    """Distribution function of Student's t, for any real degrees of freedom above 0.

    With x = √ν tan θ the density becomes cos^(ν-1) θ, smooth on a bounded range: Gauss-Legendre quadrature.
    """
    if x == 0:
        return 0.5
    # Beyond 60 standard deviations of the angle nothing is left: keep the nodes where the mass is.
    end = min(math.atan(abs(x) / math.sqrt(freedom)), 60 / math.sqrt(freedom))
    angles = end * (_NODES + 1) / 2
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    parts = np.exp((freedom - 1) * np.log(np.cos(angles)) + log_scale)
    half = min(0.5, float(_WEIGHTS @ parts) * end / 2)
    return 0.5 + math.copysign(half, x)


def student_t_quantile(probability: float, freedom: float) -> float:
    """Inverse of ``student_t_cdf``, by Newton's method.

    From 0 on the function is concave: every step ends left of the root, so none goes astray.

    Raises:
        ValueError: ``probability`` is not between 0 and 1, or ``freedom`` is not above 0.
    """
    if not 0 < probability < 1 or not freedom > 0:
        raise ValueError(f"no quantile {probability} of Student's t with {freedom} degrees of freedom")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, freedom)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    x = 0.0
    for _ in range(200):
        density = math.exp(log_scale - (freedom + 1) / 2 * math.log1p(x * x / freedom))
        step = (probability - student_t_cdf(x, freedom)) / density
        x += step
        if abs(step) <= 1e-12 * x:
            break
    return x


def _table(values: ArrayLike) -> Array:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"a table [seeds, questions] of finite values is needed, got shape {table.shape}")
    return table


def _standard_error(table: Array) -> tuple[float, float]:
    """Of the mean, and its degrees of freedom (see ``crossed_mean``)."""
    seeds, questions = table.shape
    of_seeds, of_questions, mean = table.mean(1), table.mean(0), table.mean()
    if table.size == 1:
        return math.nan, math.nan
    if questions == 1 or seeds == 1:
        n = table.size
        return math.sqrt(float(((table - mean) ** 2).sum()) / (n - 1) / n), float(n - 1)
    ms_seeds = questions * float(((of_seeds - mean) ** 2).sum()) / (seeds - 1)
    ms_questions = seeds * float(((of_questions - mean) ** 2).sum()) / (questions - 1)
    rest = table - of_seeds[:, None] - of_questions[None, :] + mean
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (questions - 1))
    total = max(ms_seeds + ms_questions - ms_rest, ms_seeds, ms_questions)
    if total <= 1e-24:  # rounding of equal values
        return 0.0, float(min(seeds, questions) - 1)
    spread = (
        ms_seeds**2 / (seeds - 1) + ms_questions**2 / (questions - 1) + ms_rest**2 / ((seeds - 1) * (questions - 1))
    )
    freedom = max(total**2 / spread, float(min(seeds, questions) - 1))
    return math.sqrt(total / table.size), freedom
