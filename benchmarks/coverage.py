"""How often the 95 % intervals of ``megatron-mapo compare`` hold the truth: the table of docs/compare.md.

Simulated experiments without a difference: a table seeds x questions of normal effects of seeds, of questions and of
the rest, whose true mean is 0. ``python benchmarks/coverage.py`` prints the table in Markdown; the same numbers each
time. It needs no quiet machine: nothing in it is a time.
"""

from __future__ import annotations

import numpy as np

from megatron_mapo.algorithms.comparison import crossed_bootstrap, crossed_mean

EXPERIMENTS, BOOTSTRAPPED, DRAWS = 1500, 400, 800
CASES = (
    # seeds, questions, standard deviations of seed effects, question effects, and the rest
    (5, 200, 0.02, 0.1, 0.3),
    (5, 200, 0.1, 0.1, 0.3),
    (5, 200, 0.0, 0.2, 0.1),
    (5, 20, 0.0, 0.0, 0.3),
    (3, 200, 0.1, 0.1, 0.3),
    (2, 200, 0.1, 0.1, 0.3),
)


def coverage(seeds: int, questions: int, of_seed: float, of_question: float, rest: float) -> tuple[float, float]:
    """Share of experiments whose interval, and whose bootstrap interval, holds 0."""
    generator = np.random.default_rng(0)
    held = held_by_bootstrap = 0
    for index in range(EXPERIMENTS):
        table = (
            of_seed * generator.normal(size=(seeds, 1))
            + of_question * generator.normal(size=(1, questions))
            + rest * generator.normal(size=(seeds, questions))
        )
        found = crossed_mean(table, seed=index, resamples=1)
        held += found.low <= 0 <= found.high
        if index < BOOTSTRAPPED:
            low, high = crossed_bootstrap(table, seed=index, resamples=DRAWS)
            held_by_bootstrap += low <= 0 <= high
    return held / EXPERIMENTS, held_by_bootstrap / BOOTSTRAPPED


def main() -> None:
    """Print the table."""
    print("| seeds | questions | seed / question / rest | interval | bootstrap |\n|---|---|---|---|---|")
    for case in CASES:
        interval, bootstrap = coverage(*case)
        effects = " / ".join(f"{deviation:g}" for deviation in case[2:])
        print(
            f"| {case[0]} | {case[1]} | {effects} | {interval:.1%} | {bootstrap:.1%} |".replace("%", " %"), flush=True
        )


if __name__ == "__main__":
    main()
