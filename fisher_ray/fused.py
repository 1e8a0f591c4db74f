"""Triton kernels: what otherwise passes over memory many times, in one pass. Only GPUs with Triton import this module.

Sums inside them are taken in a fixed order, so that the same numbers give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_VOCAB_BLOCK = 4096
_POSITIONS = 16


def softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fisher_ray.kernels.softmax`; float32."""
    logits = logits.contiguous()
    n, vocab_size = logits.shape
    top = torch.empty(n, dtype=torch.int64, device=logits.device)
    highest, tail, moment = (torch.empty(n, dtype=logits.dtype, device=logits.device) for _ in range(3))
    prob = torch.empty_like(logits)
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


def diagonal(
    scaled: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, log_total: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`fisher_ray.kernels.diagonal`."""
    batch, kv_heads, seq_len, width = key.shape
    scaled, key, value, grad, out = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (scaled, key, value, grad, out)
    )
    dkey, dvalue = (torch.empty_like(x) for x in (key, value))
    strides: list[Any] = [s for x in (scaled, key, value, grad, out, dkey, dvalue) for s in x.stride()[:3]]
    grid = (triton.cdiv(seq_len, _POSITIONS), kv_heads, batch)
    group = scaled.shape[1] // kv_heads
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
    kv_head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
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
