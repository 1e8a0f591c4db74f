"""Estimators of the Fisher matrix: sets of cotangents at the final hidden state z.

An estimator turns a next-token distribution into ``R`` cotangents a position whose second moment is
``M = sum_y p(y) c_y c_y^T``, exactly or in expectation. Pulled back to a residual stream they are the score factors
``G [R, d_model]``, weights folded in, and ``F = G^T G``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisher_ray.draws import Draws, drawing_bytes
from fisher_ray.head import VOCAB_CHUNK, Head, Prediction
from fisher_ray.kernels import SOFTMAX_BLOCK
from fisher_ray.spectrum import leading_vectors

_ONE = 2.0**52  # in fixed point
# Tokens whose part of M is deflated: so many times the rank, and at least. Measured (benchmarks/README.md): more leave less
# error, and their eigenvectors, whose cost is cubic, stay below a twentieth of the backward passes through half of GPT-2.
_DEFLATED, _LEAST_DEFLATED = 4, 128
# Numbers of their rows that are worked on at once: 16 MiB in float32, on a GPU 512, since each chunk is hundreds of launches.
_CHUNK, _GPU_CHUNK = 1 << 22, 1 << 27


class Cotangents(NamedTuple):
    """What an estimator gives of n positions.

    Attributes:
        rows: the cotangents at z.
        kept_mass: probability of the tokens that they stand for.
        captured_share: of ``tr M``, what is in rows that no draw decides: 1 for all of it, 0 where every row is drawn.
    """

    rows: Float[Tensor, "n R d_z"]
    kept_mass: Float[Tensor, " n"]
    captured_share: Float[Tensor, " n"]


@dataclass(frozen=True)
class Exact:
    """No sampling error: the cotangents are a factor of M itself, min(vocab_size, d_z) of them.

    With a ``tolerance`` they are as many leading eigenvectors as leave at most this share of ``tr M`` out, and rows of zeros
    after them, which are not pulled back. The matrix is then a lower bound, ``F_r <= F``. What is left out of tr F depends
    on the layer; ``captured_share`` is that of tr M.

    Args:
        tolerance: in [0, 1).
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be a share in [0, 1), got {self.tolerance}. 0 leaves nothing out.")

    def num_factors(self, vocab_size: int, d_z: int) -> int:
        """R, cotangents a position."""
        return min(vocab_size, d_z)

    def held(self, n: int, head: Head) -> int:
        """Numbers that predictions at n positions and what is made of them hold at once, at most; counted."""
        numbers = n * head.vocab_size
        # Of one position at a time rows of W, what M is summed in, and its eigenvectors.
        one = 2 * min(head.vocab_size, VOCAB_CHUNK) * head.d_z + 10 * head.d_z**2
        return (9 if self.tolerance else 3 if head.softcap is None else 4) * numbers + one

    def cotangents(self, prediction: Prediction, draws: Draws) -> Cotangents:
        """The leading part of M, or all of it."""
        one = torch.ones_like(prediction.entropy)
        if self.tolerance == 0:
            return Cotangents(prediction.second_moment_factor(), one, one)
        rows, captured = prediction.leading_factor(self.tolerance)
        return Cotangents(rows, one, captured)


@dataclass(frozen=True)
class Sampled:
    """``c_y / sqrt(S)`` for ``S`` tokens ``y ~ p``: unbiased; relative error ``sqrt((E|g|^4 / |F|^2 - 1) / S)``.

    ``temperature`` and ``top_p`` draw the tokens from another distribution (the temperature first, then the smallest set
    of tokens whose mass reaches ``top_p``) and leave the scores those of p. The expectation is then no longer the Fisher
    matrix of the model; the mass of p that was kept is recorded.

    Args:
        num_samples: S, tokens drawn a position.
        top_p: in (0, 1].
        temperature: above 0.
    """

    num_samples: int
    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_whole("num_samples", self.num_samples)
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}.")
        check_tempering(self.top_p, self.temperature)

    def num_factors(self, vocab_size: int, d_z: int) -> int:
        """R, cotangents a position."""
        return self.num_samples

    def held(self, n: int, head: Head) -> int:
        """Numbers that predictions at n positions and what is drawn from them hold at once, at most; counted."""
        numbers, drawing = n * head.vocab_size, _drawing(n, self.num_samples, head)
        if self.top_p != 1.0:
            return 12 * numbers + drawing
        if self.temperature != 1.0:
            return 5 * numbers + drawing
        # Logits, p, and what p is computed or, on a GPU or with soft-capping, multiplied with.
        whole = head.weight.is_cuda or head.softcap is not None
        return 2 * numbers + max(drawing, numbers if whole else min(numbers, SOFTMAX_BLOCK))

    def cotangents(self, prediction: Prediction, draws: Draws) -> Cotangents:
        """Scores of drawn tokens."""
        weights, kept = tempered(prediction, self.top_p, self.temperature)
        tokens = draws.tokens(weights, self.num_samples)
        rows = prediction.scores(tokens).div_(math.sqrt(self.num_samples))
        return Cotangents(rows, kept, torch.zeros_like(kept))


@dataclass(frozen=True)
class Deflated:
    """The leading part of M as it is, and ``S`` terms of the rest drawn by their size: unbiased, with far less variance.

    ``M = A^T A`` for the rows ``sqrt(p_y) c_y`` of ``A [vocab_size, d_z]``. Let C be the K = max(4 r, 128) longest of them and
    ``U_r`` the leading left singular vectors of C. Then

        M = B^T B + sum_a a a^T,    B = U_r^T C,    a in {rows of C - U_r B} and {the other rows of A}.

    B is pulled back as it is, and S of the a, drawn with ``q ~ |a|^2``, as ``a / sqrt(S q)``. The sum holds for whatever
    orthonormal ``U_r``, so rounding in the eigenvectors neither biases nor costs digits.

    Without samples it is a lower bound, ``F_r <= F`` (no ``v^T F v`` is too large), and no longer the Fisher matrix; without
    rank it is importance sampling alone.

    Costs, beyond the scores of K + S tokens, ``2 vocab_size d_z + 2 K^2 d_z`` flop a position and the eigenvectors of a
    [K, K] matrix.

    Args:
        rank: r, of the leading part; there are at most min(vocab_size, d_z), and more asks for no more. What is outside C is
            no part of it, whatever the rank.
        num_samples: S.
    """

    rank: int
    num_samples: int

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_whole("num_samples", self.num_samples)
        if self.rank < 0 or self.num_samples < 0 or self.rank + self.num_samples == 0:
            raise ValueError(
                f"rank and num_samples must be at least 0 and not both 0, got {self.rank} and {self.num_samples}."
            )

    def num_factors(self, vocab_size: int, d_z: int) -> int:
        """R, cotangents a position."""
        return min(self.rank, vocab_size, d_z) + self.num_samples

    def held(self, n: int, head: Head) -> int:
        """Numbers that predictions at n positions and what is drawn from them hold at once, at most; counted."""
        deflated = self._deflated(head.vocab_size, head.d_z)
        rows, gram = deflated * max(head.d_z, self.num_samples), deflated**2
        # Beside C what is taken from it, or its Gram matrices in the hands of a solver, which works on one at a time.
        step = min(n, self._step(head))
        together = step * max(2 * (rows + gram), rows + 5 * gram) + 2 * gram
        return 4 * n * head.vocab_size + together + _drawing(step, self.num_samples, head)

    def cotangents(self, prediction: Prediction, draws: Draws) -> Cotangents:
        """The leading part, then the drawn terms."""
        n, vocab_size, d_z = prediction.n, prediction.head.vocab_size, prediction.head.d_z
        rank = min(self.rank, vocab_size, d_z)
        weights = prediction.energies()  # becomes |a|^2
        _, longest = weights.topk(self._deflated(vocab_size, d_z))
        rows = weights.new_empty(n, rank + self.num_samples, d_z)
        step = self._step(prediction.head)
        for some in (slice(start, min(start + step, n)) for start in range(0, n, step)):
            self._fill(rows[some], rank, prediction, some, longest[some], weights[some], draws[some])
        captured = rows[:, :rank].square().sum((1, 2))
        trace = captured + weights.sum(-1)
        return Cotangents(rows, torch.ones_like(captured), (captured / trace).where(trace > 0, 1))

    def _fill(
        self,
        rows: Float[Tensor, "some R d_z"],
        rank: int,
        prediction: Prediction,
        some: slice,
        tokens: Int[Tensor, "some K"],
        weights: Float[Tensor, "some vocab_size"],
        draws: Draws,
    ) -> None:
        """The rows of some positions; weights become ``|a|^2``."""
        leading, basis, rest = _split_off(prediction.weighted_scores(tokens, some), rank)
        rows[:, :rank] = leading
        weights.scatter_(1, tokens, rest.square().sum(-1))
        if self.num_samples == 0:
            return
        drawn = draws.tokens(weights, self.num_samples)
        part = (drawn[..., None] == tokens[:, None]).to(basis.dtype) @ basis  # its row of U_r; none outside C
        terms = prediction.weighted_scores(drawn, some) - part @ leading
        chance = weights.gather(1, drawn) / weights.sum(-1, keepdim=True)
        # Nothing is left where all of the weights are zero.
        scale = (self.num_samples * chance).rsqrt().where(chance > 0, 0)
        rows[:, rank:] = terms.mul_(scale[..., None])

    def _deflated(self, vocab_size: int, d_z: int) -> int:
        """K, tokens whose part of M is deflated."""
        return min(vocab_size, max(_DEFLATED * min(self.rank, vocab_size, d_z), _LEAST_DEFLATED))

    def _step(self, head: Head) -> int:
        """Positions worked on at once, by the numbers of their rows, of the Gram matrices, or of which of them are drawn."""
        deflated = self._deflated(head.vocab_size, head.d_z)
        chunk = _GPU_CHUNK if head.weight.is_cuda else _CHUNK
        return max(1, chunk // (deflated * max(head.d_z, self.num_samples, deflated)))


def _split_off(
    rows: Float[Tensor, "n K d_z"], rank: int
) -> tuple[Float[Tensor, "n rank d_z"], Float[Tensor, "n K rank"], Float[Tensor, "n K d_z"]]:
    """``B = U^T C``, U, and ``C - U B``, which takes the place of C."""
    if rank == 0:
        return rows[:, :0], rows[..., :0], rows
    # Near 1 meanwhile: the squares of scores of a token that is all but certain are no float32 numbers.
    exponent = torch.frexp(rows.abs().amax((1, 2), keepdim=True)).exponent.clamp(-126, 126)
    rows.ldexp_(-exponent)
    gram = rows @ rows.mT
    gram /= gram.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None]
    # Among entries of 1e-14 and less LAPACK's float32 solvers do not converge, and below rounding they tell nothing.
    gram = torch.nn.functional.hardshrink(gram, torch.finfo(gram.dtype).eps)
    # A matrix that is not finite, or is zero, has no eigenvectors; rows that are not finite show that they are none.
    finite = gram.isfinite().flatten(1).all(1)[:, None, None]
    basis = leading_vectors(gram.where(finite, 0), rank)
    leading = basis.mT @ rows
    rest = rows.sub_(basis @ leading)
    return leading.ldexp_(exponent), basis, rest.ldexp_(exponent)


def _drawing(n: int, num_samples: int, head: Head) -> int:
    """Numbers in place of the bytes that drawing holds."""
    return drawing_bytes(n, num_samples, head.vocab_size, head.weight.device) // 4


Estimator = Exact | Sampled | Deflated


def check_whole(name: str, value: object, bits: int = 31) -> None:
    """Refuse what is no number of so many bits; the sign is not looked at."""
    if not isinstance(value, Integral) or isinstance(value, bool) or abs(int(value)) >= 2**bits:
        raise ValueError(f"{name} must be a whole number below 2^{bits}, got {value}.")


# A temperature whose reciprocal is a float32 number with room to spare; the likeliest token alone is left long before.
_COLDEST = 1e-30


def check_tempering(top_p: float, temperature: float, prefix: str = "") -> None:
    """Refuse a nucleus or a temperature that is no such thing."""
    if not 0 < top_p <= 1:
        raise ValueError(f"{prefix}top_p must be in (0, 1], got {top_p}. 1 keeps every token.")
    if not _COLDEST <= temperature < math.inf:
        raise ValueError(
            f"{prefix}temperature must be above 0 and finite, got {temperature}. 1 draws from p itself, and {_COLDEST:g} is as "
            "cold as float32 numbers go."
        )


def tempered(
    prediction: Prediction, top_p: float, temperature: float
) -> tuple[Float[Tensor, "n vocab_size"], Float[Tensor, " n"]]:
    """Unnormalised weights of p sharpened by ``temperature``, cut to its ``top_p`` nucleus; and the mass of p kept."""
    weights = prediction.prob
    if temperature != 1.0:
        logits = prediction.logits
        weights = ((logits - logits.max(-1, keepdim=True).values) / temperature).exp()
    if top_p == 1.0:
        return weights, torch.ones_like(prediction.entropy)
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    # In fixed point, where sums do not depend on the order: CUDA's prefix sums of floats add in an order of their own.
    share = (ranked / ranked.sum(-1, keepdim=True) * _ONE).long()
    before = share.cumsum(-1) - share
    outside = torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before >= int(top_p * _ONE))
    outside.scatter_(1, order[:, :1], False)
    weights = weights.masked_fill(outside, 0.0)
    return weights, prediction.prob.masked_fill(outside, 0.0).sum(-1)
