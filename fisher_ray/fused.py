"""Triton kernels: what otherwise passes over memory many times, or is many launches, in one. Only GPUs with Triton import this.

Sums inside them are taken in a fixed order, so that the same numbers give the same bits. Triton launches on the current device,
whichever the numbers are on; so that is made theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_VOCAB_BLOCK = 4096
_POSITIONS = 16
_NUMBERS = 2048
_QUERIES = 64


def softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fisher_ray.kernels.softmax`; float32."""
    logits = logits.contiguous()
    n, vocab_size = logits.shape
    top = torch.empty(n, dtype=torch.int64, device=logits.device)
    highest, tail, moment = (torch.empty(n, dtype=logits.dtype, device=logits.device) for _ in range(3))
    prob = torch.empty_like(logits)
    with torch.cuda.device_of(logits):
        _softmax[(n,)](logits, prob, top, highest, tail, moment, vocab_size, _VOCAB_BLOCK, num_warps=16)
    return highest, top, tail, moment, prob


@triton.jit
def _softmax(logits, prob, top, highest, tail, moment, vocab_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    prob += row * vocab_size
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        token = start + lanes
        x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf"))
        where = tl.where(x > best, token, where)
        best = tl.maximum(x, best)
    most = tl.max(best, 0)
    likeliest = tl.min(tl.where(best == most, where, vocab_size - 1), 0)
    tails = tl.zeros([BLOCK], tl.float32)
    moments = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token = start + lanes
        x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf"))
        weight = _exp(x - most)
        weight = tl.where(token == likeliest, 0.0, weight)
        tails += weight
        moments += weight * tl.where(x == float("-inf"), 0.0, x - most)
    rest = tl.sum(tails, 0)
    for start in range(0, vocab_size, BLOCK):
        token = start + lanes
        x = tl.load(logits + token, mask=token < vocab_size, other=float("-inf"))
        weight = tl.where(token == likeliest, 1.0, _exp(x - most))
        tl.store(prob + token, weight / (1 + rest), mask=token < vocab_size)
    tl.store(top + row, likeliest)
    tl.store(highest + row, most)
    tl.store(tail + row, rest)
    tl.store(moment + row, tl.sum(moments, 0))


@triton.jit
def _exp(x):
    """To the last digits also far below zero, where ``tl.exp`` loses those of ``x log2(e)``."""
    scaled = x * 1.4426950408889634
    lost = tl.fma(x, 1.4426950408889634, -scaled) + x * 1.925963033500e-08
    return tl.exp2(scaled) * (1 + tl.where(scaled > -200, lost, 0.0) * 0.6931471805599453)


def _dense_rows(*tensors: Tensor) -> list[Tensor]:
    """With numbers of the last dimension next to each other, as the kernels read them."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def diagonal(
    scaled: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, log_total: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`fisher_ray.kernels.diagonal`."""
    batch, kv_heads, seq_len, width = key.shape
    scaled, key, value, grad, out = _dense_rows(scaled, key, value, grad, out)
    dkey, dvalue = (torch.empty_like(x) for x in (key, value))
    strides: list[Any] = [s for x in (scaled, key, value, grad, out, dkey, dvalue) for s in x.stride()[:3]]
    grid = (triton.cdiv(seq_len, _POSITIONS), kv_heads, batch)
    group = scaled.shape[1] // kv_heads
    with torch.cuda.device_of(scaled):
        _diagonal[grid](
            scaled, key, value, grad, out, log_total.contiguous(), dkey, dvalue, *strides, seq_len, width, group,
            _POSITIONS, triton.next_power_of_2(width),
        )  # fmt: skip
    return dkey, dvalue


@triton.jit
def _diagonal(  # type: ignore[no-untyped-def]
    scaled, key, value, grad, out, log_total, dkey, dvalue,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, o0, o1, o2, dk0, dk1, dk2, dv0, dv1, dv2,
    seq_len, width, group, POSITIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    kv_head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, WIDTH)[None]
    there = (at < seq_len) & (column < width)
    k = tl.load(key + row * k0 + kv_head * k1 + at * k2 + column, mask=there, other=0.0).to(tl.float32)
    v = tl.load(value + row * v0 + kv_head * v1 + at * v2 + column, mask=there, other=0.0).to(tl.float32)
    dk = tl.zeros([POSITIONS, WIDTH], tl.float32)
    dv = tl.zeros([POSITIONS, WIDTH], tl.float32)
    for i in range(group):
        head = kv_head * group + i
        q = tl.load(scaled + row * q0 + head * q1 + at * q2 + column, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad + row * g0 + head * g1 + at * g2 + column, mask=there, other=0.0).to(tl.float32)
        o = tl.load(out + row * o0 + head * o1 + at * o2 + column, mask=there, other=0.0).to(tl.float32)
        position = (row * (group * tl.num_programs(1)) + head) * seq_len + at
        total = tl.load(log_total + position, mask=at < seq_len, other=0.0)
        prob = tl.exp(tl.sum(q * k, 1)[:, None] - total)
        dscore = prob * tl.sum(g * (v - o), 1)[:, None]
        dk += dscore * q
        dv += prob * g
    tl.store(dkey + row * dk0 + kv_head * dk1 + at * dk2 + column, dk.to(dkey.dtype.element_ty), mask=there)
    tl.store(dvalue + row * dv0 + kv_head * dv1 + at * dv2 + column, dv.to(dvalue.dtype.element_ty), mask=there)


# An operator of torch, so that its counters see what is multiplied.
@torch.library.custom_op("fisher_ray::query_gradient", mutates_args=())
def query_gradient(
    grad: Tensor, scaled: Tensor, key: Tensor, value: Tensor, out: Tensor, log_total: Tensor, scale: float
) -> Tensor:
    """See :func:`fisher_ray.kernels.flash_query_gradient`."""
    batch, heads, seq_len, width = scaled.shape
    grad, scaled, key, value, out = _dense_rows(grad, scaled, key, value, out)
    dquery = torch.empty_like(scaled)
    strides = [s for x in (grad, scaled, key, value, out, dquery) for s in x.stride()[:3]]
    # Measured on an H200 at widths of 64 and 128: blocks of 128 queries take 1.4 times as long. Of wider heads twice as many
    # keys would not fit into the shared memory of older GPUs.
    keys, num_warps = (64, 4) if width <= 128 else (32, 8)
    grid = (triton.cdiv(seq_len, _QUERIES), heads, batch)
    with torch.cuda.device_of(scaled):
        _query_gradient[grid](
            grad, scaled, key, value, out, log_total.contiguous(), dquery, *strides, seq_len, width,
            heads // key.shape[1], scale, _QUERIES, keys, max(16, triton.next_power_of_2(width)),
            num_warps=num_warps, num_stages=2,
        )  # fmt: skip
    return dquery


@register_flop_formula(torch.ops.fisher_ray.query_gradient)
def _query_gradient_flop(grad: Sequence[int], scaled: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Three products over all keys, as torch counts those of its own kernels."""
    return 6 * math.prod(scaled) * key[2]


@triton.jit
def _query_gradient(  # type: ignore[no-untyped-def]
    grad, scaled, key, value, out, log_total, dquery,
    g0, g1, g2, q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2, d0, d1, d2,
    seq_len, width, group, scale, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv_head = head // group
    at = (block * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    column = tl.arange(0, WIDTH)[None]
    there = (at[:, None] < seq_len) & (column < width)
    g = tl.load(grad + row * g0 + head * g1 + at[:, None] * g2 + column, mask=there, other=0.0)
    q = tl.load(scaled + row * q0 + head * q1 + at[:, None] * q2 + column, mask=there, other=0.0)
    o = tl.load(out + row * o0 + head * o1 + at[:, None] * o2 + column, mask=there, other=0.0)
    mean_rise = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    total = tl.load(log_total + (row * tl.num_programs(1) + head) * seq_len + at, mask=at < seq_len, other=0.0)
    dq = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, tl.minimum((block + 1) * QUERIES, seq_len), KEYS):
        other = (start + tl.arange(0, KEYS)).to(tl.int64)
        here = (other[:, None] < seq_len) & (column < width)
        k = tl.load(key + row * k0 + kv_head * k1 + other[:, None] * k2 + column, mask=here, other=0.0)
        v = tl.load(value + row * v0 + kv_head * v1 + other[:, None] * v2 + column, mask=here, other=0.0)
        prob = tl.exp(tl.dot(q, tl.trans(k)) - total[:, None])
        prob = tl.where(other[None] <= at[:, None], prob, 0.0)
        rise = tl.dot(g, tl.trans(v)) - mean_rise[:, None]
        dq += tl.dot((prob * rise).to(k.dtype), k)
    place = dquery + row * d0 + head * d1 + at[:, None] * d2 + column
    tl.store(place, (dq * scale).to(dquery.dtype.element_ty), mask=there)


def parts(x: Tensor, scale: Tensor | None) -> Tensor:
    """See :func:`fisher_ray.kernels.parts`."""
    x = x.contiguous()
    found = torch.empty(2, *x.shape, dtype=torch.bfloat16, device=x.device)
    grid = (triton.cdiv(x.numel(), _NUMBERS),)
    with torch.cuda.device_of(x):
        _parts[grid](
            x, x if scale is None else scale.contiguous(), found, x.numel(), x.shape[1], scale is not None, _NUMBERS
        )
    return found


@triton.jit
def _parts(x, scale, found, size, width, SCALED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    number = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        number *= tl.load(scale + at // width, mask=there, other=0.0)
    first = number.to(tl.bfloat16)
    tl.store(found + at, first, mask=there)
    tl.store(found + size + at, (number - first.to(tl.float32)).to(tl.bfloat16), mask=there)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """In bfloat16, and whether nothing was lost."""
    x = x.contiguous()
    half = torch.empty_like(x, dtype=torch.bfloat16)
    lost = torch.zeros((), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _rounded[(triton.cdiv(x.numel(), _NUMBERS),)](x, half, lost, x.numel(), _NUMBERS)
    return half, lost == 0


@triton.jit
def _rounded(x, half, lost, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(x + at, mask=at < size, other=0.0)
    found = number.to(tl.bfloat16)
    tl.store(half + at, found, mask=at < size)
    some = tl.max((found.to(tl.float32) != number).to(tl.int32), 0)
    tl.store(lost, 1, mask=some > 0)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    """See :func:`fisher_ray.kernels.philox`; of at most three dimensions."""
    words = torch.broadcast_tensors(*counter, *key)
    shape = words[0].shape
    words = [word[(None,) * (3 - word.ndim)] for word in words]
    found = torch.empty(*shape, 4, dtype=torch.int64, device=words[0].device)
    size = math.prod(shape)
    strides = [s for word in words for s in word.stride()]
    with torch.cuda.device_of(found):
        _philox[(triton.cdiv(size, _NUMBERS),)](*words, found, *strides, size, *words[0].shape[1:], _NUMBERS)
    return found


@triton.jit
def _philox(  # type: ignore[no-untyped-def]
    c0, c1, c2, c3, k0, k1, found,
    s00, s01, s02, s10, s11, s12, s20, s21, s22, s30, s31, s32, s40, s41, s42, s50, s51, s52,
    size, rows, columns, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    x, y, z = at // columns // rows, at // columns % rows, at % columns
    w0 = tl.load(c0 + x * s00 + y * s01 + z * s02, mask=there, other=0).to(tl.uint32)
    w1 = tl.load(c1 + x * s10 + y * s11 + z * s12, mask=there, other=0).to(tl.uint32)
    w2 = tl.load(c2 + x * s20 + y * s21 + z * s22, mask=there, other=0).to(tl.uint32)
    w3 = tl.load(c3 + x * s30 + y * s31 + z * s32, mask=there, other=0).to(tl.uint32)
    a = tl.load(k0 + x * s40 + y * s41 + z * s42, mask=there, other=0).to(tl.uint32)
    b = tl.load(k1 + x * s50 + y * s51 + z * s52, mask=there, other=0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(w0, w1, w2, w3, a, b)
    tl.store(found + at * 4, w0.to(tl.int64), mask=there)
    tl.store(found + at * 4 + 1, w1.to(tl.int64), mask=there)
    tl.store(found + at * 4 + 2, w2.to(tl.int64), mask=there)
    tl.store(found + at * 4 + 3, w3.to(tl.int64), mask=there)
