"""What devices have in place of the engine's own way, each tried on the device before it is relied on.

*Products of oneDNN.* PyTorch multiplies float32 numbers on a CPU by the library that it was built with, which is MKL where
there is one. Its other one, oneDNN, was measured to take 0.5 to 0.9 of the time on an AMD CPU, the least for few rows; on an
Intel CPU it took 0.9 to 2.2 times as long, and is not used.

*Products on tensor cores.* The product of two bfloat16 numbers is exact in float32, and tensor cores add such products in
float32: where both factors hold bfloat16 numbers nothing is gained by converting them, and an order of magnitude of speed is
lost. A float32 factor is taken for the sum of two bfloat16 numbers, 16 or 17 of its 24 digits, and costs two such products:
what that leaves out is 2^-18, where the other factor was rounded to 2^-9.

*Flash attention.* Own-position attention under the plain causal mask is ordinary attention whose keys and values have no
gradients but on the diagonal, which the log-sum-exp of each query's scores is enough for.

*Fused passes.* The statistics of a softmax over the vocabulary, that diagonal, random words, and what float32 numbers are in
bfloat16, are a dozen passes over memory each, or hundreds of launches, which on a GPU cost more than the products between
them; where Triton is there, one of :mod:`fisher_ray.fused`.

Symmetric products and the softmax, which CPUs too have ways of their own for, are here beside theirs.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Numbers of the blocks of rows in which a CPU takes a softmax, 8 MiB in float32: 0.095 ms a row of GPT-2's vocabulary, twice as
# long in blocks of a fourth, which wait for threads, and of all of 170 rows, which leave the cache.
SOFTMAX_BLOCK = 2**21
# Where kernels other than torch's plain ones are tried. On a CPU none is faster for attention, and torch gives no float32 sums
# of its bfloat16 products.
_DEVICES = ("cuda",)
# Numbers of a weight from which on oneDNN multiplies by it. A call takes 50 us, and 0.5 to 1 ms for a shape that is new.
# Measured on 1 to 1,024 rows: 0.1 to 0.9 of torch.mm's speed at 96 x 384, 0.4 to 1.04 at 512 x 512, 0.5 to 1.05 at 768 x 768,
# 1.2 to 1.35 at 768 x 3,072.
_LARGE = 1 << 19
_WORD = 0xFFFFFFFF


# ---- products on tensor cores --------------------------------------------------------------------------------------------


def on_tensor_cores(a: Tensor, b: Tensor) -> bool:
    """Whether :func:`product` multiplies these: b in bfloat16, a no wider than float32, on a GPU seen to add in float32."""
    return b.dtype == torch.bfloat16 and a.dtype in (b.dtype, torch.float32) and _have_cores(b.device)


def product(a: Float[Tensor, "*n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "*n m"]:
    """``a @ b`` in float32, for ``b`` in bfloat16 and ``a`` in bfloat16 or float32."""
    rows = a.reshape(-1, a.shape[-1])
    if rows.dtype == torch.bfloat16:
        found = _multiplied(rows, b)
    else:
        found = _multiplied(parts(rows).flatten(0, 1), b).unflatten(0, (2, len(rows))).sum(0)
    return found.view(*a.shape[:-1], b.shape[-1])


def parts(x: Float[Tensor, "n k"], scale: Float[Tensor, " n"] | None = None) -> Float[Tensor, "2 n k"]:
    """Two in bfloat16 that add up to rows in float32, each scaled, but for 2^-18 of each number."""
    if x.device.type in _DEVICES and _parts_are_right(x.device):
        return _fused().parts(x, scale)
    return _parts(x, scale)


def _parts(x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        x = x * scale[:, None]
    found = torch.empty(2, *x.shape, dtype=torch.bfloat16, device=x.device)
    found[0] = x
    torch.sub(x, found[0], out=found[1])
    return found


@lru_cache
def _parts_are_right(device: torch.device) -> bool:
    """Whether the fused pass gives two that add up to as much as those of the plain one."""
    generator = torch.Generator().manual_seed(0)
    x, scale = (torch.randn(size, generator=generator).to(device) for size in ((50, 301), (50,)))
    found = _tried(
        "the fused split of float32 numbers", lambda: (_fused().parts(x, None), _fused().parts(x.bfloat16(), scale))
    )
    expected = x.double(), x.bfloat16().double() * scale.double()[:, None]
    return (
        found is not None
        and all(each.dtype == torch.bfloat16 for each in found)
        and _agree([each.double().sum(0) for each in found], expected, 2**-17)
    )


def as_bfloat16(x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """A float32 tensor in bfloat16, where :func:`product` multiplies it and no digit is lost: a bfloat16 model's gradients.

    Anything else as it is.
    """
    if x.dtype != torch.float32 or not _have_cores(x.device):
        return x
    half, exact = (_fused().rounded if _rounded_is_right(x.device) else _rounded)(x)
    return half if bool(exact) else x


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """In bfloat16, and whether nothing was lost."""
    half = x.to(torch.bfloat16)
    return half, (half == x).all()


@lru_cache
def _rounded_is_right(device: torch.device) -> bool:
    """Whether the fused pass gives what the plain one gives."""
    off = torch.randn(50, 301, generator=torch.Generator().manual_seed(0)).to(device)
    whole = off.bfloat16().float()
    nan = whole.masked_fill(whole == whole[-1, -1], torch.nan)
    found = _tried(
        "fused rounding", lambda: (*_fused().rounded(off), *_fused().rounded(whole), _fused().rounded(nan)[1])
    )
    expected = *_rounded(off), *_rounded(whole), _rounded(nan)[1]
    return found is not None and all(map(torch.equal, found, expected))


def add_outer(
    total: Float[Tensor, "d d"], left: Float[Tensor, "n d"], right: Float[Tensor, "n d"], divisor: int = 1
) -> None:
    """Add ``left^T right / divisor``, which is symmetric, to a sum of which the upper triangle is kept up."""
    width = strip_width(len(total), right)
    for start in range(0, len(total), width):
        some, others = left[:, start : start + width].mT, right[:, start:]
        strip = product(some, others) if right.dtype == torch.bfloat16 else some @ others
        total[start : start + width, start:].add_(strip, alpha=1 / divisor)


def strip_width(d: int, rows: Tensor | None = None) -> int:
    """Columns of the strips in which a symmetric product is computed, what is below the diagonal left out.

    Narrow ones leave out nearly half, and too narrow ones lose it again. Measured on a CPU at widths of 768 to 4,096: 0.65 to
    0.52 of the time of the whole product. A GPU is filled by wider ones alone; measured on an H200 at 2,048 and 4,096: 0.75
    and 0.66 of the time in float32, and in bfloat16 1 and 0.8.
    """
    if rows is not None and rows.is_cuda:
        return 2048 if rows.dtype == torch.bfloat16 else 512
    return max(192, -(-d // 8))


def _multiplied(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    return torch.mm(a, b, out_dtype=torch.float32)


def _have_cores(device: torch.device) -> bool:
    return device.type in _DEVICES and _add_in_float32(device)


@lru_cache
def _add_in_float32(device: torch.device) -> bool:
    """Whether this device's products of bfloat16 numbers have float32's digits: tried once, and not assumed."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    found = _tried("products on tensor cores", lambda: (_multiplied(a, b),))
    return found is not None and _agree(found, (a.double() @ b.double(),), 1e-5)


# ---- products on a CPU ---------------------------------------------------------------------------------------------------


def linear(
    x: Float[Tensor, "*n k"], weight: Float[Tensor, "m k"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "*n m"]:
    """``x W^T + b``: by oneDNN for float32 numbers on a CPU, where weights are large, and they and the bias constants."""
    if not _onednn_multiplies(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    found: Tensor = _Linear.apply(x, weight, bias)
    return found


class _Linear(torch.autograd.Function):
    """Of constant weights; linear in x and in the cotangent, and so differentiable as often as asked, in either mode."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(*inputs[:2])
        ctx.set_materialize_grads(False)  # weights that do not move would cost a product with zeros

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return None if grad is None else linear(grad, weight.T), None, None

    @staticmethod
    def jvp(ctx: Any, x_rate: Tensor | None, weight_rate: Tensor | None, bias_rate: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        rates = [] if x_rate is None else [linear(x_rate, weight)]
        rates += [] if weight_rate is None else [torch.nn.functional.linear(x, weight_rate)]
        rates += [] if bias_rate is None else [bias_rate.expand(*x.shape[:-1], -1)]
        return sum(rates[1:], rates[0]) if rates else None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        if in_dims[0] is not None and in_dims[1:] == (None, None):
            return linear(x.movedim(in_dims[0], 0), weight, bias), 0
        return torch.vmap(torch.nn.functional.linear, in_dims)(x, weight, bias), 0


def _onednn_multiplies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= _LARGE
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and uses_onednn()
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = bias.contiguous() if bias is not None else None  # its strides are not read
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _onednn_flop(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        """For torch's counters, which know its own products alone."""
        return 2 * math.prod(x) * weight[0]


def uses_onednn() -> bool:
    """Whether products on this CPU are oneDNN's, where :func:`linear` finds them large enough."""
    return not mkl_is_at_home() and onednn_is_right()


@lru_cache
def mkl_is_at_home() -> bool:
    """Whether PyTorch multiplies by MKL on a CPU of MKL's maker. Read and not timed, so that a machine has the same bits."""
    known = Path("/proc/cpuinfo")
    maker = known.read_text(encoding="utf-8", errors="replace") if known.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in maker


@lru_cache
def onednn_is_right() -> bool:
    """Whether this build has it, and it multiplies float32 numbers as such: tried once, and not assumed."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator, device="cpu") for s in ((64, 96), (80, 96), (80,)))
    found = _tried("oneDNN", lambda: (_onednn(x, weight, bias), _onednn(x, weight.T.contiguous().T)))
    expected = x.double() @ weight.double().T
    return found is not None and _agree(found, (expected + bias, expected), 1e-6)


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
) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq"]]:
    """Causal attention of scaled queries: o, and the log-sum-exp of each query's scores."""
    out, log_total, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, is_causal=True, scale=1.0
    )
    return out, log_total


def flash_query_gradient(
    grad: Float[Tensor, "batch heads seq dim"],
    scaled: Float[Tensor, "batch heads seq dim"],
    key: Float[Tensor, "batch kv_heads seq dim"],
    value: Float[Tensor, "batch kv_heads seq dim"],
    out: Float[Tensor, "batch heads seq dim"],
    log_total: Float[Tensor, "batch heads seq"],
    scale: float,
) -> Float[Tensor, "batch heads seq dim"]:
    """``dq = scale sum_i ds_ti k_i`` for a cotangent at o, by three products; torch's kernel has those of keys and values
    too, by five, and no order of its sums unless told to.
    """
    dquery: Tensor = _fused().query_gradient(grad, scaled, key, value, out, log_total, scale)
    return dquery


def diagonal(
    scaled: Float[Tensor, "batch heads seq dim"],
    key: Float[Tensor, "batch kv_heads seq dim"],
    value: Float[Tensor, "batch kv_heads seq dim"],
    grad: Float[Tensor, "batch heads seq dim"],
    out: Float[Tensor, "batch heads seq dim"],
    log_total: Float[Tensor, "batch heads seq"],
) -> tuple[Float[Tensor, "batch kv_heads seq dim"], Float[Tensor, "batch kv_heads seq dim"]]:
    """``dk_t = sum ds_tt q_t`` and ``dv_t = sum P_tt b_t``, sums over a key head's queries, for a cotangent b at o."""
    if scaled.device.type in _DEVICES and _diagonal_is_right(scaled.device, scaled.dtype, scaled.shape[-1]):
        return _fused().diagonal(scaled, key, value, grad, out, log_total)
    return _diagonal(scaled, key, value, grad, out, log_total)


def _diagonal(
    scaled: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, log_total: Tensor
) -> tuple[Tensor, Tensor]:
    wide = log_total.dtype
    kv_heads = key.shape[1]
    q, b, o = (x.to(wide).unflatten(1, (kv_heads, -1)) for x in (scaled, grad, out))
    k, v = key[:, :, None], value[:, :, None]
    prob = ((q * k).sum(-1, keepdim=True) - log_total.unflatten(1, (kv_heads, -1))[..., None]).exp()
    dscore = prob * (b * (v - o)).sum(-1, keepdim=True)
    return (dscore * q).sum(2).to(key.dtype), (prob * b).sum(2).to(value.dtype)


@lru_cache
def _diagonal_is_right(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the fused pass gives what the plain one gives, to rounding."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 200, width) for heads in (4, 2, 2, 4, 4))
    scaled, key, value, grad, out = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    scaled /= width**0.5
    log_total = torch.rand(2, 4, 200, generator=generator).to(device) + 5
    found = _tried(
        "the fused diagonal of attention", lambda: _fused().diagonal(scaled, key, value, grad, out, log_total)
    )
    expected = _diagonal(scaled, key, value, grad, out, log_total)
    return found is not None and _agree(found, expected, 2 * torch.finfo(dtype).eps)


@lru_cache
def _flash_is_right(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether flash attention gives this device's o, log-sum-exp and dq to rounding: tried once a width, and not assumed."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 200, width) for heads in (4, 2, 2, 4))
    query, key, value, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    query /= width**0.5

    def attend() -> tuple[Tensor, ...]:
        out, log_total = flash_attention(query, key, value)
        return out, log_total, flash_query_gradient(grad, query, key, value, out, log_total, 0.5)

    found = _tried("flash attention", attend)
    if found is None:
        return False
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    query, key, value, grad = (x.double() for x in (query, key, value, grad))
    later = torch.ones(200, 200, dtype=torch.bool, device=device).triu(1)
    scores = (query @ key.mT).masked_fill(later, -torch.inf)
    probs = scores.softmax(-1)
    out = probs @ value
    dquery = 0.5 * (probs * (grad @ value.mT - (grad * out).sum(-1, keepdim=True))) @ key
    expected = out, scores.logsumexp(-1), dquery
    return _agree(found, expected, 2 * torch.finfo(dtype).eps)


# ---- softmax over the vocabulary -----------------------------------------------------------------------------------------


class Softmax(NamedTuple):
    """What :func:`softmax` finds of n rows of logits.

    Attributes:
        highest: logit.
        top: its token.
        tail: ``sum exp(l_y - highest)`` over all tokens but the top one.
        moment: ``sum exp(l_y - highest) (l_y - highest)``.
        prob: [n, vocab_size].
    """

    highest: Float[Tensor, " n"]
    top: Int[Tensor, " n"]
    tail: Float[Tensor, " n"]
    moment: Float[Tensor, " n"]
    prob: Float[Tensor, "n vocab_size"]


def softmax(logits: Float[Tensor, "n vocab_size"]) -> Softmax:
    """Probabilities and what is summed over them; a row that is not finite gives NaN."""
    if logits.device.type in _DEVICES and logits.dtype == torch.float32 and _softmax_is_right(logits.device):
        return Softmax(*_fused().softmax(logits))
    return _softmax(logits)


def _softmax(logits: Tensor) -> Softmax:
    n, vocab_size = logits.shape
    prob = logits.new_empty(n, max(vocab_size, logits.stride(0)))[:, :vocab_size]  # aligned as the logits are
    step = n if logits.is_cuda else max(1, SOFTMAX_BLOCK // vocab_size)
    blocks = [_softmax_of(*block) for block in zip(logits.split(step), prob.split(step), strict=True)]
    highest, top, tail, moment = map(torch.cat, zip(*blocks, strict=True))
    return Softmax(highest, top, tail, moment, prob)


def _softmax_of(logits: Tensor, prob: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes the probabilities, and gives the rest of what :class:`Softmax` has."""
    highest, token = logits.max(-1)
    below = logits - highest[:, None]
    top = token[:, None]
    weights = torch.exp(below, out=prob).scatter_(1, top, 0.0)
    tail = weights.sum(-1)
    # A token of weight zero (logit -inf) contributes nothing, not 0 * -inf.
    below.clamp_(min=-1e30)
    moment = below.mul_(weights).sum(-1)
    total = (1 + tail)[:, None]
    weights.div_(total).scatter_(1, top, 1 / total)
    return highest, token, tail, moment


@lru_cache
def _softmax_is_right(device: torch.device) -> bool:
    """Whether the fused pass gives what the plain one gives in float64, to float32's rounding."""
    logits = 10 * torch.randn(50, 9001, generator=torch.Generator().manual_seed(0))
    logits[3, 40:] = -torch.inf
    logits = logits.to(device)
    found = _tried("the fused softmax", lambda: _fused().softmax(logits))
    return found is not None and _agree(found, _softmax(logits.double()), 5e-6)


# ---- random words --------------------------------------------------------------------------------------------------------


def philox(counter: tuple[Int[Tensor, "*#n"], ...], key: tuple[Int[Tensor, "*#n"], ...]) -> Int[Tensor, "*n 4"]:
    """Philox4x32-10: four 32-bit words of a 128-bit counter under a 64-bit key, each word held in an int64."""
    device = counter[0].device
    if device.type in _DEVICES and _philox_is_right(device):
        found: Tensor = _fused().philox(counter, key)
        return found
    return _philox(counter, key)


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # An int64 product keeps the low 64 bits of the unsigned one, and the mask undoes the arithmetic shift.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((right >> 32) & _WORD) ^ c1 ^ k0, right & _WORD
        c2, c3 = ((left >> 32) & _WORD) ^ c3 ^ k1, left & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack([c0, c1, c2, c3], -1)


@lru_cache
def _philox_is_right(device: torch.device) -> bool:
    """Whether the fused pass gives the same words: which tokens are drawn depends on no device."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5,), (3, 2, 1), (3, 1, 1), (), (3, 1, 1), (3, 1, 1))
    words = [torch.randint(1 << 32, shape, generator=generator).to(device) for shape in shapes]
    counter, key = tuple(words[:4]), tuple(words[4:])
    found = _tried("fused random words", lambda: (_fused().philox(counter, key),))
    return found is not None and torch.equal(found[0], _philox(counter, key))


# ---- trials --------------------------------------------------------------------------------------------------------------


def _fused() -> Any:
    from fisher_ray import fused  # here: Triton is only where GPUs are

    return fused


def _tried(what: str, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...] | None:
    """What a kernel gives; a warning and None where this torch or this device has none, or no compiler to make it."""
    try:
        return run()
    except Exception as error:  # of a compiler as well
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(f"{what} cannot run here, and what takes its place is slower: {reason}", stacklevel=2)
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that main memory or a GPU's has run out: PyTorch's own, or a library's that it passes on."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(each in str(error) for each in words)


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> bool:
    """Whether all have the shapes of the others, and their numbers within a relative error."""
    return all(
        x.shape == y.shape and bool((x.double() - y).norm() <= limit * y.double().norm())
        for x, y in zip(found, expected, strict=True)
    )
