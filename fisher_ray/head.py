"""The output head and its pull-back: from the final hidden state z to log p, and from log p back to z.

Logits are ``l = f(a)`` with ``a = scale (W z + b)`` and, with soft-capping at ``c``, ``f(a) = c tanh(a / c)`` (else
``f(a) = a``). With effective rows ``u_y = scale f'(a_y) w_y`` and their mean ``m = sum_y p(y) u_y``,

    grad_z log p(y) = c_y = u_y - m,        M = sum_y p(y) c_y c_y^T.

Everything is centred on the likeliest token ``*``: ``m - u_* = sum_{y != *} p(y) (u_y - u_*)`` has no cancellation, so
scores stay accurate in float32 when p is peaked, where ``M = U^T diag(p) U - m m^T`` would lose its digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisher_ray.kernels import add_outer, linear, on_tensor_cores, product, softmax
from fisher_ray.spectrum import symmetric_eigh

# Rows of W in one product of the exact second moment: large enough for the product to run at its peak, small enough
# for the centred copy of the rows to stay in cache.
VOCAB_CHUNK = 2048
# Rows of logits start at multiples of so many numbers, which MKL's products need: one of 166 rows by GPT-2's vocabulary ran at
# 0.9 of the peak in chunks and so aligned, at 0.7 in chunks alone, and at 0.55 as a whole.
_ALIGNED = 16
# Probabilities of one prediction.
_NUMBERS, _GPU_NUMBERS = 2**24, 2**27
_EVERY = slice(None)


@dataclass(frozen=True)
class Head:
    """An unembedding ``W [vocab_size, d_z]`` with optional bias, logit scale and soft-capping, after the final norm."""

    weight: Float[Tensor, "vocab_size d_z"]
    bias: Float[Tensor, " vocab_size"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def d_z(self) -> int:
        return self.weight.shape[1]

    def positions_at_once(self) -> int:
        """Positions predicted at once: bounds the working memory to a few tensors of 64 MiB (float32), on a GPU of 512.

        Measured on a CPU with GPT-2's vocabulary, 512 tokens: 4 times 128 or 3 times 171 cost a thirtieth more than twice 256,
        and all together no less. On an H200 with Llama 3's: scores of all layers took 1.1 times as long with half as many, and
        0.95 times with twice as many.
        """
        return min(4096, max(16, (_GPU_NUMBERS if self.weight.is_cuda else _NUMBERS) // self.vocab_size))

    def predict(self, z: Float[Tensor, "n d_z"]) -> Prediction:
        """The next-token distribution at ``z``, at least in float32."""
        logits = self.products(z)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return Prediction(self, logits)

    def products(self, z: Float[Tensor, "*n d_z"]) -> Float[Tensor, "*n vocab_size"]:
        """``W z``, at least in float32."""
        if on_tensor_cores(z, self.weight):
            return product(z, self.weight.T)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.weight.is_cuda and self.weight.dtype == z.dtype:
            return z @ self.weight.T  # chunks are for a CPU's caches
        flat = z.reshape(-1, self.d_z)
        found = flat.new_empty(len(flat), -(-self.vocab_size // _ALIGNED) * _ALIGNED)[:, : self.vocab_size]
        for chunk, rows in self.row_chunks(z.dtype):
            found[:, chunk] = linear(flat, rows)
        return found.view(*z.shape[:-1], self.vocab_size)

    def weighted_rows(self, weights: Float[Tensor, "n vocab_size"]) -> Float[Tensor, "n d_z"]:
        """``sum_y weights_y w_y`` in the dtype of the weights."""
        if on_tensor_cores(weights, self.weight):
            return product(weights, self.weight)
        if self.weight.is_cuda and self.weight.dtype == weights.dtype:
            return weights @ self.weight
        total = weights.new_zeros(len(weights), self.d_z)
        for chunk, rows in self.row_chunks(weights.dtype):
            total += linear(weights[:, chunk], rows.T)
        return total

    def squared_rows(self) -> Float[Tensor, " vocab_size"]:
        """``|w_y|^2``, at least in float32. Not kept: what changes weights need not say so."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.cat([rows.square().sum(-1) for _, rows in self.row_chunks(dtype)])

    def row_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "chunk d_z"]]]:
        """Slices of the vocabulary with their rows of W in ``dtype``."""
        for start in range(0, self.vocab_size, VOCAB_CHUNK):
            chunk = slice(start, min(start + VOCAB_CHUNK, self.vocab_size))
            yield chunk, self.weight[chunk].to(dtype)


class Prediction:
    """Next-token distributions at ``n`` positions, and the pull-back of their log-probabilities to z.

    Attributes:
        logits: [n, vocab_size], as the model gives them.
        top: [n], the likeliest token.
        prob: [n, vocab_size].
        tail: [n], ``1 - p(top)``, summed and not subtracted.
        entropy: [n], nats.
    """

    def __init__(self, head: Head, logits: Float[Tensor, "n vocab_size"]):
        self.head = head
        self.logits = logits
        highest, self.top, tail, moment, self.prob = softmax(logits)
        self.log_total = highest + tail.log1p()
        self.entropy = tail.log1p() - moment / (1 + tail)
        self.tail = tail / (1 + tail)

    @property
    def n(self) -> int:
        return self.logits.shape[0]

    def log_prob(self, token: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """log p of one token a position, nats."""
        return self.logits.gather(1, token[:, None]).squeeze(1) - self.log_total

    def _slope(self, logits: Tensor) -> Tensor | float:
        """scale f'(a) at the given logits."""
        if self.head.softcap is None:
            return self.head.scale
        return (logits / self.head.softcap).square_().neg_().add_(1).mul_(self.head.scale)

    def _row(self, token: Int[Tensor, "some k"], rows: slice = _EVERY) -> Float[Tensor, "some k d_z"]:
        """Effective rows u_y."""
        slope = self._slope(self.logits[rows].gather(1, token))
        return self.head.weight[token].to(self.logits.dtype) * (
            slope[..., None] if isinstance(slope, Tensor) else slope
        )

    @cached_property
    def _top_row(self) -> Float[Tensor, "n 1 d_z"]:
        return self._row(self.top[:, None])

    @cached_property
    def _offset(self) -> Float[Tensor, "n d_z"]:
        """m - u_*: one product of p, its top entry replaced by -tail, with W."""
        top = self.top[:, None]
        likeliest = self.prob.gather(1, top)
        weights = self.prob.scatter_(1, top, -self.tail[:, None])
        try:
            slope = self._slope(self.logits)
            if isinstance(slope, Tensor):
                return self.head.weighted_rows(slope.mul_(weights))
            return self.head.weighted_rows(weights) * slope
        finally:
            self.prob.scatter_(1, top, likeliest)  # back: a copy of p would cost more than the entry

    def scores(self, token: Int[Tensor, "some k"], rows: slice = _EVERY) -> Float[Tensor, "some k d_z"]:
        """``c_y = grad_z log p(y)`` for the given tokens, at some of the positions."""
        return (self._row(token, rows) - self._top_row[rows]).sub_(self._offset[rows, None])

    def weighted_scores(self, token: Int[Tensor, "some k"], rows: slice = _EVERY) -> Float[Tensor, "some k d_z"]:
        """``sqrt(p(y)) c_y``, whose outer products over all tokens add up to M."""
        return self.scores(token, rows).mul_(self.prob[rows].gather(1, token).sqrt()[..., None])

    def energies(self) -> Float[Tensor, "n vocab_size"]:
        """``p(y) |c_y|^2``, what each token gives to ``tr M``; one product of 2 vocab_size d_z flop a position.

        ``|c_y|^2 = |u_y|^2 - 2 u_y . m + |m|^2`` cancels where ``u_y`` is near m, as the likeliest token's is where p is
        peaked; that one is ``|m - u_*|^2``. Of the others rounding leaves an error of 1e-7 ``|u_y|^2`` in float32,
        and of 4e-6 where tensor cores multiply parts.
        """
        head, dtype = self.head, self.logits.dtype
        slope = self._slope(self.logits)
        mean = self._top_row[:, 0] + self._offset
        size = mean.square().sum(-1, keepdim=True)
        squared, lengths = head.products(mean).mul_(-2).mul_(slope), head.squared_rows().to(dtype)
        squared += slope.square_().mul_(lengths) if isinstance(slope, Tensor) else lengths * slope**2
        squared += size
        # What is p times more than nothing can be drawn: rounding must not make it nothing.
        squared.clamp_(min=size * torch.finfo(dtype).eps)
        squared.scatter_(1, self.top[:, None], self._offset.square().sum(-1, keepdim=True))
        return squared.mul_(self.prob)

    def variance(self, tangents: Float[Tensor, "n k d_z"]) -> Float[Tensor, "n k"]:
        """``u^T M u``, the variance under p of ``du_y = u . c_y`` over tokens y, for k directions u a position; nats^2.

        Costs 2 vocab_size d_z flop a direction.
        """
        return (self.prob[:, None] * self.rates(tangents).square()).sum(-1)

    def rates(self, tangents: Float[Tensor, "n k d_z"]) -> Float[Tensor, "n k vocab_size"]:
        """``u . c_y``, how fast log p(y) changes as z moves along each of k directions u a position; nats.

        Costs 2 vocab_size d_z flop a direction.
        """
        rates = self.head.products(tangents.to(self.logits.dtype))
        slope = self._slope(self.logits)
        rates = rates * (slope[:, None] if isinstance(slope, Tensor) else slope)
        # Relative to the likeliest token's: where p is peaked, the mean is small and nothing cancels.
        rates = rates - rates.gather(2, self.top[:, None, None].expand(-1, rates.shape[1], 1))
        return rates - (self.prob[:, None] * rates).sum(-1, keepdim=True)

    def second_moment_factor(self) -> Float[Tensor, "n rank d_z"]:
        """``A`` with ``A^T A = M``: the vocabulary's weighted scores, or the Cholesky factor of M, whichever is smaller.

        Costs vocab_size d_z^2 flop a position and up to as many more, as most of the lower triangle is left out; memory beyond
        the result is one [d_z, d_z] matrix in float64.
        """
        head, dtype = self.head, self.logits.dtype
        if head.vocab_size <= head.d_z:
            return self.weighted_scores(torch.arange(head.vocab_size, device=self.prob.device).expand(self.n, -1))
        # Where one token has nearly all of p, what the others give is too small for a square in float32.
        exponent = torch.frexp(self.tail).exponent.clamp(-200, 0) // 2
        root = self.prob.sqrt().ldexp_(-exponent[:, None])
        mean = self._top_row[:, 0] + self._offset
        slope = self._slope(self.logits)
        factors = torch.empty(self.n, head.d_z, head.d_z, dtype=dtype, device=root.device)
        moment = torch.empty(head.d_z, head.d_z, dtype=torch.float64, device=root.device)
        for i in range(self.n):
            moment.zero_()
            for chunk, rows in head.row_chunks(dtype):
                if isinstance(slope, Tensor) or slope != 1:
                    rows = rows * (slope[i, chunk, None] if isinstance(slope, Tensor) else slope)
                centred = (rows - mean[i]).mul_(root[i, chunk, None])
                add_outer(moment, centred, centred)
            factors[i] = psd_factor(moment.mT)
        return factors.ldexp_(exponent[:, None, None])

    def leading_factor(self, tolerance: float) -> tuple[Float[Tensor, "n rank d_z"], Float[Tensor, " n"]]:
        """``B`` with ``B^T B <= M`` and ``tr(M - B^T B) <= tolerance tr M``, then zero rows; and the share of tr M in it.

        Of the tokens those that give most to ``tr M`` are taken, until at most a quarter of what may be left out is left;
        of their part of M, the leading eigenvectors. The eigenproblem is of as many tokens, or of d_z where they are more.

        Costs at most 2 vocab_size d_z^2 flop a position, ``4 k^2 d_z`` where k tokens are enough.
        """
        head, dtype = self.head, self.logits.dtype
        ranked, order = self.energies().sort(dim=-1, descending=True, stable=True)
        rest = _suffix_sums(ranked)
        trace = rest[:, 0]
        counts = (rest > tolerance / 4 * trace[:, None]).sum(-1).tolist()
        factors = torch.zeros(self.n, min(head.vocab_size, head.d_z), head.d_z, dtype=dtype, device=ranked.device)
        captured = torch.ones_like(trace)
        for i, count in enumerate(counts):
            if count == 0:  # no trace, or none that is finite
                continue
            here, tokens = slice(i, i + 1), order[i : i + 1, :count]
            if count <= head.d_z:
                rows = self.weighted_scores(tokens, here)[0]
                values, vectors = symmetric_eigh(rows @ rows.mT)
                rows = vectors.mT @ rows
            else:
                moment = torch.zeros(head.d_z, head.d_z, dtype=torch.float64, device=ranked.device)
                for some in tokens.split(VOCAB_CHUNK, 1):
                    part = self.weighted_scores(some, here)[0]
                    add_outer(moment, part, part)
                values, vectors = symmetric_eigh(moment.mT)
                rows = (vectors * values.clamp_min(0).sqrt()).mT
            tail = rest[i, count] if count < head.vocab_size else rest.new_zeros(())
            left = _suffix_sums(values.clamp_min(0)) + tail
            rank = int((left > tolerance * trace[i]).sum())
            factors[i, :rank] = rows[:rank].to(dtype)
            captured[i] = 1 - (left[rank] if rank < len(left) else tail) / trace[i]
        return factors, captured.to(factors)


def _suffix_sums(values: Float[Tensor, "*n k"]) -> Float[Tensor, "*n k"]:
    """Sums over each entry and all after it, float64; on the CPU, since CUDA's prefix sums add in an order of their own."""
    return values.double().cpu().flip(-1).cumsum(-1).flip(-1)


def psd_factor(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Upper triangular ``A`` with ``A^T A = matrix + shift I``, in float64.

    Only the lower triangle is read. A positive semi-definite matrix of low rank, or one summed in float32, has eigenvalues that
    rounding may have pushed below zero. The shift is the smallest of 0, 1e-15, 1e-14, ..., 1e-5 times the trace for which the
    factor exists.
    A matrix that is not finite gives a factor that is not.
    """
    matrix = matrix.double()
    trace = matrix.trace()
    if trace == 0 or not trace.isfinite():
        return torch.full_like(matrix, float(trace))
    for exponent in range(-16, -4):
        shifted = matrix
        if exponent > -16:
            shifted = matrix.clone()
            shifted.diagonal().add_(10.0**exponent * trace)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return lower.mT
    raise ValueError(f"expected a positive semi-definite matrix, got one with trace {float(trace):.3g} that is not.")


def divergence(log_p: Float[Tensor, "*#n vocab"], log_q: Float[Tensor, "*n vocab"]) -> Float[Tensor, " *n"]:
    """``KL(p || q) = sum_y p(y) (exp(d_y) - 1 - d_y)`` with ``d = log q - log p``, in nats, to nearly full precision.

    The sum over ``-p d`` has terms of either sign that cancel down to the square of them; here no term is negative, as
    both distributions sum to one, and small ones come from the series, without ``exp(d) - 1 - d``'s own cancellation.
    An error that all ``d`` share, as that of the normalisation, enters by its square.
    """
    p, q = log_p.exp(), log_q.exp()
    d = torch.where(p > 0, log_q - log_p, 0.0)
    series = torch.zeros_like(d)
    for k in range(10, 1, -1):  # d^2 (1/2! + d/3! + ... + d^8/10!)
        series = (series * d + 1) / k
    series = p * d.square() * series
    return torch.where((d.abs() < 0.1) & (p > 0), series, q - p - p * d).sum(-1)
