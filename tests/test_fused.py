"""Triton's kernels against the passes whose place they take, where there is a GPU for them.

Without one, Triton's interpreter runs them on a CPU: TRITON_INTERPRET=1, with triton installed and a numpy that it knows. It
cuts bfloat16 numbers off where GPUs round them, so that half precision is float16 there.
"""

from __future__ import annotations

import os

import oracles
import pytest
import torch
from test_draws import PUBLISHED, words
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fisher_ray import kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's kernels need a GPU, or its interpreter"
)


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def test_kernels_are_launched_where_the_numbers_are(monkeypatch: pytest.MonkeyPatch):
    """Triton takes the current device, which is another one where a model is on several."""
    launched: list[torch.device] = []
    entered = torch.cuda.device_of

    def noted(tensor: Tensor) -> object:
        launched.append(tensor.device)
        return entered(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", noted)
    from fisher_ray import fused

    q, kv = normal(1, 2, 20, 16, dtype=HALF), normal(1, 2, 20, 16, dtype=HALF)
    total, word = torch.ones(1, 2, 20, device=DEVICE), torch.arange(4, device=DEVICE)
    for run in (
        lambda: fused.softmax(normal(3, 50)),
        lambda: fused.diagonal(q, kv, kv, q, q, total),
        lambda: fused.query_gradient(q, q, kv, kv, q, total, 1.0),
        lambda: fused.parts(normal(3, 4), None),
        lambda: fused.rounded(normal(3, 4)),
        lambda: fused.philox((word,) * 4, (word,) * 2),
    ):
        launched.clear()
        run()
        assert launched == [word.device]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("seq_len", "width"), [(1, 8), (63, 64), (64, 16), (65, 80), (200, 128), (70, 256)])
def test_the_gradient_of_queries(heads: int, kv_heads: int, seq_len: int, width: int):
    """Against autograd in float64, from numbers laid out as models have them: positions before heads."""

    def laid_out(count: int, seed: int) -> Tensor:
        return normal(2, seq_len, count, width, seed=seed, dtype=HALF).transpose(1, 2)

    query, grad = laid_out(heads, 0) * width**-0.5, laid_out(heads, 1)
    key, value = laid_out(kv_heads, 2), laid_out(kv_heads, 3)
    q = query.double().requires_grad_()
    k, v = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    later = torch.ones(seq_len, seq_len, dtype=torch.bool, device=DEVICE).triu(1)
    scores = (q @ k.mT).masked_fill(later, -torch.inf)
    out = scores.softmax(-1) @ v
    (expected,) = torch.autograd.grad(out, q, grad.double())
    given = grad, query, key, value, out.detach().to(HALF), scores.logsumexp(-1).detach().float()
    found = kernels.flash_query_gradient(*given, 0.25)
    assert found.shape == query.shape and found.dtype == HALF
    if seq_len > 1:  # of one key, the gradient is nothing but rounding
        assert oracles.error(found, 0.25 * expected) < 2 * torch.finfo(HALF).eps
    assert torch.equal(found, kernels.flash_query_gradient(*given, 0.25))


def test_the_products_of_that_gradient_are_counted():
    x = normal(1, 2, 40, 16, dtype=HALF)
    with FlopCounterMode(display=False) as counter:
        kernels.flash_query_gradient(x, x, x, x, x, normal(1, 2, 40), 1.0)
    assert counter.get_total_flops() == 3 * 2 * 2 * 40 * 40 * 16


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (50, 2048), (3, 5000)])
def test_two_parts(size: tuple[int, int]):
    x, scale = normal(*size), normal(size[0], seed=1)
    half = x.to(HALF)
    for found, expected in (
        (kernels._fused().parts(x, None), x.double()),
        (kernels._fused().parts(half, scale), half.double() * scale.double()[:, None]),
        (kernels._fused().parts(x.T.contiguous().T, None), x.double()),
    ):
        assert found.shape == (2, *size) and found.dtype == torch.bfloat16
        left = (found.double().sum(0) - expected).abs()
        assert (left <= (2**-17 if GPU else 2**-15) * expected.abs()).all()
        assert ((found[0].double() - expected).abs() <= (2**-8 if GPU else 2**-7) * expected.abs()).all()


def test_whether_rounding_loses_anything():
    rounded = kernels._fused().rounded
    for size in ((1, 1), (7, 300), (50, 2048)):
        x = normal(*size).bfloat16().float()
        half, exact = rounded(x)
        assert bool(exact) and torch.equal(half.float(), x)
        for place in ((0, 0), (-1, -1)):
            for wrong in (1 + 2**-20, torch.nan):
                off = x.clone()
                off[place] = wrong
                half, exact = rounded(off)
                assert not bool(exact)
                assert half.shape == x.shape and half.dtype == torch.bfloat16


@pytest.mark.parametrize(("counter", "key", "answer"), PUBLISHED)
def test_random_words_as_published(counter: str, key: str, answer: str):
    found = kernels._fused().philox(*(tuple(word.to(DEVICE) for word in words(text)) for text in (counter, key)))
    assert [f"{int(word):08x}" for word in found] == answer.split()


def test_random_words_of_many():
    generator = torch.Generator().manual_seed(0)
    shapes = ((179,), (13, 2, 1), (13, 1, 1), (), (13, 1, 1), (13, 1, 1))
    given = [torch.randint(1 << 32, shape, generator=generator).to(DEVICE) for shape in shapes]
    counter, key = tuple(given[:4]), tuple(given[4:])
    assert torch.equal(kernels._fused().philox(counter, key), kernels._philox(counter, key))


@pytest.mark.parametrize("vocab_size", [1, 50, 4096, 9001])
def test_a_softmax(vocab_size: int):
    logits = 10 * normal(5, vocab_size)
    logits[3, vocab_size // 2 + 1 :] = -torch.inf
    for found, expected in zip(kernels._fused().softmax(logits), kernels._softmax(logits.double()), strict=True):
        assert (found.double() - expected).norm() <= 5e-6 * expected.double().norm()


@pytest.mark.parametrize(("heads", "kv_heads", "seq_len", "width"), [(4, 2, 33, 24), (3, 3, 1, 8), (8, 1, 50, 80)])
def test_the_diagonal(heads: int, kv_heads: int, seq_len: int, width: int):
    scaled, grad, out = (normal(2, heads, seq_len, width, seed=i, dtype=HALF) for i in range(3))
    key, value = (normal(2, kv_heads, seq_len, width, seed=i, dtype=HALF) for i in (3, 4))
    log_total = normal(2, heads, seq_len, seed=5) + 3
    given = scaled * width**-0.5, key, value, grad, out, log_total
    wide = kernels._diagonal(*(x.double() for x in given))
    for found, expected in zip(kernels._fused().diagonal(*given), wide, strict=True):
        assert found.dtype == HALF and oracles.error(found, expected) < 2 * torch.finfo(HALF).eps
