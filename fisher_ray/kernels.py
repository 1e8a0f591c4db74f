"""What GPUs have for half precision in place of the engine's own way, each tried on the device before it is relied on.

*Products on tensor cores.* The product of two bfloat16 numbers is exact in float32, and tensor cores add such products in
float32: where both factors hold bfloat16 numbers nothing is gained by converting them, and an order of magnitude of speed is
lost. A float32 factor is the sum of three bfloat16 numbers (three times 8 digits of its 24), and costs three such products.

*Flash attention.* Own-position attention under the plain causal mask is ordinary attention whose keys and values have no
gradients but on the diagonal, which the log-sum-exp of each query's scores is enough for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# On a CPU, neither is faster: measured for attention, and of its bfloat16 products torch gives no float32 sums.
_DEVICES = ("cuda",)


# ---- products on tensor cores --------------------------------------------------------------------------------------------

_PARTS = 3


def on_tensor_cores(a: Tensor, b: Tensor) -> bool:
    """Whether :func:`product` multiplies these: b in bfloat16, a no wider than float32, on a GPU seen to add in float32."""
    return b.dtype == torch.bfloat16 and a.dtype in (b.dtype, torch.float32) and _have_cores(b.device)


def product(a: Float[Tensor, "*n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "*n m"]:
    """``a @ b`` in float32, for ``b`` in bfloat16 and ``a`` in bfloat16 or float32."""
    rows = a.reshape(-1, a.shape[-1])
    if rows.dtype == torch.bfloat16:
        found = _multiplied(rows, b)
    else:
        found = _multiplied(torch.cat(parts(rows)), b).unflatten(0, (_PARTS, len(rows))).sum(0)
    return found.view(*a.shape[:-1], b.shape[-1])


def parts(x: Float[Tensor, "*n"]) -> list[Float[Tensor, "*n"]]:
    """Three bfloat16 tensors that add up to a float32 one, but for what is below 2^-133."""
    found = []
    for _ in range(_PARTS):
        found.append(x.to(torch.bfloat16))
        x = x - found[-1]
    return found


def in_bfloat16(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"] | None:
    """A float32 tensor in bfloat16, where :func:`product` multiplies it and no digit is lost: a bfloat16 model's gradients."""
    if x.dtype != torch.float32 or not _have_cores(x.device):
        return None
    half = x.to(torch.bfloat16)
    return half if torch.equal(half.to(x.dtype), x) else None


def _multiplied(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    return torch.mm(a, b, out_dtype=torch.float32)


def _have_cores(device: torch.device) -> bool:
    return device.type in _DEVICES and _add_in_float32(device)


@lru_cache
def _add_in_float32(device: torch.device) -> bool:
    """Whether this device's products of bfloat16 numbers have float32's digits: tried once, and not assumed."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    try:
        found = _multiplied(a, b).double()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # a torch or a device that has no such product
        return False
    exact = a.double() @ b.double()
    return bool((found - exact).norm() < 1e-5 * exact.norm())


# ---- flash attention -----------------------------------------------------------------------------------------------------


def flash_attends(query: Tensor, value: Tensor) -> bool:
    """Whether :func:`flash_attention` takes these, and was seen to be right on their device."""
    if query.device.type not in _DEVICES or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    width = query.shape[-1]
    return width == value.shape[-1] <= 256 and width % 8 == 0 and _flash_is_right(query.device, query.dtype, width)


def flash_attention(
    query: Float[Tensor, "batch heads seq dim"],
    key: Float[Tensor, "batch kv_heads seq dim"],
    value: Float[Tensor, "batch kv_heads seq dim"],
) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq"], tuple[Any, ...]]:
    """Causal attention of scaled queries: o, the log-sum-exp of each query's scores, and what else its gradient asks for."""
    out, log_total, *rest, _ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, is_causal=True, scale=1.0
    )
    return out, log_total, tuple(rest)


def flash_query_gradient(
    grad: Float[Tensor, "batch heads seq dim"],
    query: Float[Tensor, "batch heads seq dim"],
    key: Float[Tensor, "batch kv_heads seq dim"],
    value: Float[Tensor, "batch kv_heads seq dim"],
    out: Float[Tensor, "batch heads seq dim"],
    log_total: Float[Tensor, "batch heads seq"],
    rest: tuple[Any, ...],
) -> Float[Tensor, "batch heads seq dim"]:
    """``sum_i ds_ti k_i`` for a cotangent at o. The kernel computes keys' and values' gradients too, asked or not."""
    *sizes, seed, offset = rest
    dquery: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, log_total, *sizes, 0.0, True, seed, offset, scale=1.0
    )[0]
    return dquery


@lru_cache
def _flash_is_right(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether flash attention gives this device's o, log-sum-exp and dq to rounding: tried once a width, and not assumed.

    Some GPUs have its forward pass for wide heads and not its backward pass.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 200, width) for heads in (4, 2, 2, 4))
    query, key, value, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    query /= width**0.5
    try:
        out, log_total, rest = flash_attention(query, key, value)
        found = out, log_total, flash_query_gradient(grad, query, key, value, out, log_total, rest)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError):  # a torch or a device that has no such kernel
        return False
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    query, key, value, grad = (x.double() for x in (query, key, value, grad))
    later = torch.ones(200, 200, dtype=torch.bool, device=device).triu(1)
    scores = (query @ key.mT).masked_fill(later, -torch.inf)
    probs = scores.softmax(-1)
    out = probs @ value
    dquery = (probs * (grad @ value.mT - (grad * out).sum(-1, keepdim=True))) @ key
    expected = out, scores.logsumexp(-1), dquery
    limit = 2 * torch.finfo(dtype).eps
    return all(
        x.shape == y.shape and bool((x - y).norm() <= limit * y.norm()) for x, y in zip(found, expected, strict=True)
    )
