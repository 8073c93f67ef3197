"""The weights of tokens against means over padded, masked [N, L] values."""

import pytest
import torch

from megatron_mapo.algorithms.aggregation import token_weights
from megatron_mapo.config import LossAggregation

LONGEST = 16
LENS = torch.tensor([5, 1, 0, 16, 3, 7])
CASES = {
    "none": None,
    "some": torch.tensor([False, False, False, True, False, True]),
    "the empty one": torch.tensor([False, False, True, False, False, False]),
    "all": torch.ones(6, dtype=torch.bool),
}


def dense_mean(values, mask, left_out, aggregation):
    """Mean of the tokens of the responses that are kept, response by response."""
    rows = [row[on] for row, on, out in zip(values, mask.bool(), left_out, strict=True) if not out]
    if aggregation == "token":
        tokens = torch.cat([torch.zeros(0, dtype=torch.float64), *rows])
        return tokens.mean() if len(tokens) else 0.0
    means = [row.sum() / (len(row) or 1 if aggregation == "sequence" else LONGEST) for row in rows]
    return sum(means) / len(means) if means else 0.0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_weighted_sums_are_the_means_that_the_names_say(aggregation, case):
    values = torch.randn(len(LENS), LONGEST, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(LONGEST) < LENS[:, None]
    left_out = CASES[case]
    weights = token_weights(LENS, LossAggregation(aggregation), LONGEST, left_out)
    assert (weights.dtype, weights.shape) == (torch.float64, (int(LENS.sum()),))
    out = torch.zeros(len(LENS), dtype=torch.bool) if left_out is None else left_out
    expected = float(dense_mean(values, mask, out, aggregation))
    assert float((weights * values[mask]).sum()) == pytest.approx(expected, rel=1e-13)
    assert (weights[out[:, None].expand_as(mask)[mask]] == 0).all()
    assert (weights >= 0).all()


def test_the_weights_by_hand():
    lens, cut = torch.tensor([1, 0, 3]), torch.tensor([True, False, False])
    by_name = {
        name: token_weights(lens, LossAggregation(name), 10).tolist() for name in ("token", "sequence", "constant")
    }
    assert by_name["token"] == [1 / 4] * 4
    assert by_name["sequence"] == pytest.approx([1 / 3, 1 / 9, 1 / 9, 1 / 9])
    assert by_name["constant"] == pytest.approx([1 / 30] * 4)
    assert token_weights(lens, LossAggregation.token, 10, cut).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert token_weights(lens, LossAggregation.sequence, 10, cut).tolist() == pytest.approx([0, 1 / 6, 1 / 6, 1 / 6])
    assert token_weights(lens, LossAggregation.constant, 10, cut).tolist() == pytest.approx([0, 1 / 20, 1 / 20, 1 / 20])
