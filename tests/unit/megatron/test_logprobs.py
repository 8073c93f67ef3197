"""Chunked log-probs and entropies: values, gradients, and what never exists in memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mapo.megatron.logprobs import chunked_logprobs


def make_case(s: int, h: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(s, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (s,), generator=g)


def dense(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, vocab: int | None
) -> tuple[Tensor, Tensor]:
    logits = hidden.double() @ weight.double()[:vocab].t() / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def value_and_gradients(
    outputs: tuple[Tensor, Tensor], leaves: tuple[Tensor, Tensor], through: tuple[bool, bool]
) -> list[Tensor]:
    """Both outputs, and the gradient of a random combination of those of them that count."""
    g = torch.Generator().manual_seed(5)
    factors = [torch.randn(len(o), generator=g, dtype=torch.float64) for o in outputs]
    loss = sum((o.double() * f).sum() for o, f, counts in zip(outputs, factors, through, strict=True) if counts)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("through", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_dense_logits(
    through: tuple[bool, bool], temperature: float, chunk: int, dtype: torch.dtype, bound: float
) -> None:
    """Chunk 7 does not divide the 20 tokens; 64 exceeds them."""
    hidden, weight, labels = make_case(20, 16, 50, dtype)
    mine = chunked_logprobs(hidden, weight, labels, temperature=temperature, chunk=chunk)
    assert all(o.dtype == dtype for o in mine)
    found = value_and_gradients(mine, (hidden, weight), through)
    expected = value_and_gradients(dense(hidden, weight, labels, temperature, None), (hidden, weight), through)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= bound * b.abs().max()


@pytest.mark.parametrize("through", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_capped_logits_are_those_of_autograd(through: tuple[bool, bool], temperature: float) -> None:
    """The cap of 3 bites: logits have a standard deviation of 4. Two padding rows beside it."""
    hidden, weight, labels = make_case(20, 16, 52, torch.float64)
    labels = labels.clamp(max=49)
    mine = chunked_logprobs(hidden, weight, labels, temperature=temperature, softcap=3.0, chunk=7, vocab_size=50)
    logp = (3.0 * torch.tanh(hidden @ weight[:50].t() / 3.0) / temperature).log_softmax(-1)
    dense = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    found = value_and_gradients(mine, (hidden, weight), through)
    expected = value_and_gradients(dense, (hidden, weight), through)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_float32_is_accurate_at_a_real_vocabulary() -> None:
    """A dot product over so many terms would be off by 1e-3."""
    hidden, weight, labels = make_case(8, 576, 49152, torch.float32)
    with torch.no_grad():
        weight *= 0.15
        found = chunked_logprobs(hidden, weight, labels)
        expected = dense(hidden, weight, labels, 1.0, None)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 3e-5


def test_bfloat16_hidden_states_are_scored_in_float32() -> None:
    """Logits come out of the product in bfloat16; everything behind it is float32."""
    hidden, weight, labels = make_case(20, 16, 50, torch.bfloat16)
    logprobs, entropy = chunked_logprobs(hidden, weight, labels, chunk=8)
    logits = (hidden @ weight.t()).float().double()
    logp = logits.log_softmax(-1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), logp.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-6, atol=1e-5)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_padding_rows_of_the_vocabulary_count_for_nothing() -> None:
    hidden, weight, _ = make_case(12, 8, 40, torch.float64)
    labels = torch.arange(12) % 33
    mine = chunked_logprobs(hidden, weight, labels, chunk=5, vocab_size=33)
    found = value_and_gradients(mine, (hidden, weight), (True, True))
    expected = value_and_gradients(dense(hidden, weight, labels, 1.0, 33), (hidden, weight), (True, True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not found[3][33:].any()


def test_nothing_to_score() -> None:
    hidden, weight, labels = make_case(0, 8, 40, torch.float64)
    logprobs, entropy = chunked_logprobs(hidden, weight, labels)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_gradcheck() -> None:
    hidden, weight, labels = make_case(5, 4, 7, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_logprobs(h, w, labels, temperature=1.3, chunk=2, vocab_size=7), (hidden, weight)
    )


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels = make_case(6, 8, 30, torch.float32)
    with torch.no_grad():
        hidden *= 1e4
    outputs = chunked_logprobs(hidden, weight, labels, chunk=4)
    found = value_and_gradients(outputs, (hidden, weight), (True, True))
    assert all(bool(t.isfinite().all()) for t in found)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_the_logits_of_all_tokens_never_exist() -> None:
    s, h, v, chunk = 256, 8, 1000, 16
    hidden, weight, labels = make_case(s, h, v, torch.float32)
    with LargestTensor() as mine:
        logprobs, entropy = chunked_logprobs(hidden, weight, labels, chunk=chunk)
        (logprobs.sum() + entropy.sum()).backward()
    assert mine.numel == chunk * v
    with LargestTensor() as of_dense:
        dense(hidden, weight, labels, 1.0, None)
    assert of_dense.numel == s * v, "the recorder sees what it should see"


PEAK = """
import sys, torch
from megatron_mapo.megatron.logprobs import chunked_logprobs

def mib(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024

torch.set_num_threads(1)
s, v, h = 2048, 49152, 576
hidden, weight, labels = torch.randn(s, h), torch.randn(v, h), torch.randint(0, v, (s,))
chunked_logprobs(hidden[:8], weight, labels[:8])  # lets the matrix library take its buffers
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = mib("VmRSS")
with torch.no_grad():
    chunked_logprobs(hidden, weight, labels, chunk=int(sys.argv[1]))
print(mib("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_forward_memory_at_a_real_vocabulary() -> None:
    """2048 tokens x 49152: dense float32 logits alone are 384 MiB."""
    command = [sys.executable, "-c", PEAK, "256"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 200
