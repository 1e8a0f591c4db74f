"""Matrix products of bfloat16 numbers on tensor cores, with the digits of float32.

The product of two bfloat16 numbers is exact in float32, and tensor cores add such products in float32: where both factors
hold bfloat16 numbers nothing is gained by converting them, and on a GPU an order of magnitude of speed is lost. A float32
factor is the sum of three bfloat16 numbers (three times 8 digits of its 24), and costs three such products.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

_PARTS = 3
_DEVICES = ("cuda",)


def on_tensor_cores(a: Tensor, b: Tensor) -> bool:
    """Whether :func:`product` multiplies these: b in bfloat16, a no wider than float32, on a GPU seen to add in float32."""
    return b.dtype == torch.bfloat16 and a.dtype in (b.dtype, torch.float32) and _have_cores(b.device)


def product(a: Float[Tensor, "*n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "*n m"]:
    """``a @ b`` in float32, for ``b`` in bfloat16 and ``a`` in bfloat16 or float32."""
    rows = a.reshape(-1, a.shape[-1])
    if rows.dtype == torch.bfloat16:
        found = _multiplied(rows, b)
    else:
        found = _multiplied(torch.cat(parts(rows)), b).unflatten(0, (_PARTS, -1)).sum(0)
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
    except (RuntimeError, TypeError):  # a torch or a device that has no such product
        return False
    exact = a.double() @ b.double()
    return bool((found - exact).norm() < 1e-5 * exact.norm())
