"""Per-request sampling seeds on CPU.

sglang 0.5.23 honours ``sampling_seed`` only with ``--enable-deterministic-inference``, which needs a GPU.
Here every request that brings a seed is sampled by inverse transform: token = the first whose
cumulative probability, in the order of the vocabulary, exceeds ``u(seed, position)``. The tokens of a
request then do not depend on which other requests are decoded beside it, beyond floating-point noise in
the probabilities. (sglang's own filters, which one greedy request in the batch is enough to call, leave
the tokens in the order of their probabilities.)
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One uniform number per row from a counter-based generator (splitmix64's finaliser, twice).

    Args:
        seeds: int64 ``[B]``.
        positions: int64 ``[B]``, position of the token to sample.

    Returns:
        float64 ``[B]`` in [0, 1).
    """

    def shift(x: Tensor, bits: int) -> Tensor:  # logical shift: int64 has only the arithmetic one
        return (x >> bits) & (_MASK >> (bits - 1))

    def mix(x: Tensor) -> Tensor:
        x = (x ^ shift(x, 30)) * -4658895280553007687
        x = (x ^ shift(x, 27)) * -7723592293110705685
        return x ^ shift(x, 31)

    golden = -7046029254386353131
    mixed = mix(mix(seeds.to(torch.int64) + golden) + (positions.to(torch.int64) + 1) * golden)
    return shift(mixed, 11).to(torch.float64) * 2.0**-53


def sample_with_seeds(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Sample one token a row by inverse transform.

    Args:
        probs: ``[B, V]``, rows sum to 1 up to rounding.
        seeds: int64 ``[B]``.
        positions: int64 ``[B]``.

    Returns:
        int64 ``[B, 1]``. Tokens of probability 0 are never chosen.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = uniform(seeds, positions).to(probs.device)[:, None] * cumulative[:, -1:]
    # right=True: the first entry above the target, so a zero-probability token cannot be hit
    index = torch.searchsorted(cumulative, target, right=True)
    return index.clamp_(max=probs.shape[-1] - 1)


def filtered(probs: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """Probabilities ``[B, V]`` with 0 where a row's top-k, top-p (below 1) or min-p leaves a token out.

    A row that leaves none out is returned as it is, to the last bit, and costs no sort.

    Args:
        probs: ``[B, V]``.
        top_ks: integer ``[B]``, tokens that are kept: the most likely, of equal ones the first.
        top_ps: ``[B]``, those are kept before which less than this share of the probability lies.
        min_ps: ``[B]``, least share of the largest probability.
    """
    kept = probs.clone()
    greedy = (top_ks == 1).nonzero().flatten()
    best = probs[greedy].argmax(-1, keepdim=True)
    kept[greedy] = torch.zeros_like(kept[greedy]).scatter_(-1, best, probs[greedy].gather(-1, best))
    rows = ((top_ks > 1) & ((top_ks < probs.shape[-1]) | (top_ps < 1) | (min_ps > 0))).nonzero().flatten()
    if len(rows):
        kept[rows] = _most_likely(probs[rows], *(limit[rows].view(-1, 1) for limit in (top_ks, top_ps, min_ps)))
    return kept


def _most_likely(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(probs.shape[-1], device=probs.device)
    left_out = (rank >= top_k) | ((before > top_p) & (top_p < 1)) | (ordered < min_p * ordered[:, :1])
    return torch.zeros_like(probs).scatter_(-1, tokens, ordered.masked_fill(left_out, 0.0))


def _requested_seeds(reqs: list) -> Tensor:
    """The requests' seeds, int64 ``[B]``; a request without one gets a random one for this batch."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(reqs),), dtype=torch.int64)
    for i, req in enumerate(reqs):
        if req.sampling_params.sampling_seed is not None:
            seeds[i] = req.sampling_params.sampling_seed
    return seeds


def apply() -> None:
    """Make this process's sglang sample with the requests' seeds."""
    from sglang.srt.layers import sampler
    from sglang.srt.sampling import sampling_batch_info

    info = sampling_batch_info.SamplingBatchInfo
    upstream = info.from_schedule_batch.__func__

    def from_schedule_batch(cls, batch, vocab_size):
        made = upstream(cls, batch, vocab_size)
        made.sampling_seed = _requested_seeds(batch.reqs)
        return made

    info.from_schedule_batch = classmethod(from_schedule_batch)
    with_filters = sampler.top_k_top_p_min_p_sampling_from_probs_torch

    def sample_filtered(probs, top_ks, top_ps, min_ps, need_min_p, sampling_seed, positions, **options):
        if options.get("return_filtered_probs"):  # a request for the mask that was sampled from; none of ours
            return with_filters(probs, top_ks, top_ps, min_ps, need_min_p, sampling_seed, positions, **options)
        tokens = sample_with_seeds(filtered(probs, top_ks, top_ps, min_ps), sampling_seed, positions)
        return tokens.view(-1).to(torch.int32)

    sampler.top_k_top_p_min_p_sampling_from_probs_torch = sample_filtered
    sampler.multinomial_with_seed = lambda logprobs, seed, positions: sample_with_seeds(logprobs.exp(), seed, positions)
    sampler.sampling_from_probs_torch = lambda probs, sampling_seed=None, positions=None: (
        sample_with_seeds(probs, sampling_seed, positions).view(-1).to(torch.int32)
    )
