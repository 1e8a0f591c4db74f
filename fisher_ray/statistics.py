"""How far a mean over a corpus can be trusted: standard errors by the jackknife over blocks of documents.

The corpus is taken for a sample of documents from a larger population, and an error says how far the population's value may
be from the one computed. Positions of one document depend on each other, so what is left out at a time is a block of whole
documents, as with clusters in surveys (Wolter, Introduction to Variance Estimation, 2007, chapter 4). How many positions a
block holds is as random as what they are, so blocks are not weighed by it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.special import stdtrit
from torch import Tensor

from fisher_ray.spectrum import anisotropy, covariance, symmetric_eigh, trace_rank, whitening
from fisher_ray.sums import GroupSums, Matrix, Triangle

# Neighbouring eigenvalues closer than this many of their standard errors are told apart by no sample of this size.
_SEPARATED = 3.0
# Ways to halve a corpus at random.
_SPLITS = 8
# Share of its trace that a sketch with room for all that there is may yet have lost.
_ROUNDING = 1e-9
# Eigenvalues below this share of the largest are none: their logarithms are those of rounding.
_NEGLIGIBLE = 1e-14
# Share of a dimension that its bias, as estimated, may be.
_MOST_CORRECTED = 1 / 3


@dataclass(frozen=True)
class Estimate:
    """A quantity, or an array of them, with its standard error.

    Attributes:
        value: of the whole corpus, less the bias.
        error: standard error; NaN with fewer than two blocks.
        blocks: what the error was computed from.
        moved: by how much leaving out each block moves the value, [blocks, ...]; None where the error comes from no jackknife.
        bias: of what the mean itself gives, where that is known: ``value + bias`` is read off the mean.
    """

    value: np.ndarray
    error: np.ndarray
    blocks: int
    moved: np.ndarray | None = None
    bias: np.ndarray | float = 0.0

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds, by Student's t with ``blocks - 1`` degrees of freedom."""
        reach = stdtrit(max(1, self.blocks - 1), 0.5 + level / 2) * self.error
        return self.value - reach, self.value + reach

    def minus(self, other: Estimate, numbers: tuple[Sequence[int], Sequence[int]] | None = None) -> Estimate:
        """The difference of two estimates, of independent samples or of the same documents.

        Args:
            other: of a quantity of the same shape.
            numbers: which blocks of the same documents those of this estimate are, and those of the other. A block in which
                only one of them has positions leaves the other's value as it is. None: the samples are independent.
        """
        value, bias = self.value - other.value, self.bias - other.bias
        if numbers is None or self.moved is None or other.moved is None:
            return Estimate(value, np.hypot(self.error, other.error), min(self.blocks, other.blocks), bias=bias)
        every = sorted({*numbers[0], *numbers[1]})
        left = []
        for estimate, present in zip((self, other), numbers, strict=True):
            left.append(np.zeros((len(every), *value.shape)))
            left[-1][np.searchsorted(every, present)] = estimate.moved
        return _estimate(value, left[0] - left[1], bias)


def jackknife(value: Tensor, without: Tensor, corrected: bool = False) -> Estimate:
    """Standard error from the values that leaving out each block gives: ``sqrt((B - 1) / B sum_b (without_b - value)^2)``.

    Args:
        value: [...], of all blocks.
        without: [B, ...], of all but one.
        corrected: take off the bias of order 1 / B, ``(B - 1) (mean_b without_b - value)`` (Quenouille, 1956), for quantities
            that are not linear in the mean and known to second order. The error is then around the mean of ``without``.
    """
    whole, left = value.double().numpy(), without.double().numpy()
    if len(left) < 2 or not corrected:
        return _estimate(whole, left - whole)
    middle = left.mean(0)
    bias = (len(left) - 1) * (middle - whole)
    return _estimate(whole - bias, left - middle, bias)


def _estimate(value: np.ndarray, moved: np.ndarray, bias: np.ndarray | float = 0.0) -> Estimate:
    count = len(moved)
    if count < 2:
        return Estimate(value, np.full_like(value, np.nan), count)
    return Estimate(value, np.sqrt((count - 1) / count * np.square(moved).sum(0)), count, moved, bias)


class Blocks:
    """Sums of one layer and group over blocks of documents, and the means that leaving out one of them gives.

    Args:
        sums: of each block, in the order of the corpus; those without a position, or None, do not count.

    Attributes:
        sums: of those that count.
        numbers: which of the blocks given those are.
        total: over all.
    """

    def __init__(self, sums: Sequence[GroupSums | None]):
        found = {number: block for number, block in enumerate(sums) if block is not None and block.count}
        self.numbers, self.sums = list(found), list(found.values())
        if not self.sums:
            raise ValueError("no block of documents has a position.")
        self.total = GroupSums(**vars(self.sums[0]))
        for block in self.sums[1:]:
            self.total.add(block)

    def __len__(self) -> int:
        return len(self.sums)

    def __iter__(self) -> Iterator[GroupSums]:
        return iter(self.sums)

    def trace(self) -> Estimate:
        """The mean trace of F, exact also where sums are sketches."""
        return mean_trace([(block.count, block.fisher.trace) for block in self.sums])

    def mean(self, name: Literal["fisher", "second_moment", "activation"]) -> Tensor:
        """The mean over all positions; [d, d], of ``activation`` [d]."""
        total = np.asarray(self.total.activation, np.float64) if name == "activation" else self.total.square(name)
        return torch.from_numpy(total / self.total.count)

    def moves(self, of: Callable[[GroupSums], np.ndarray]) -> tuple[Tensor, Iterator[Tensor]]:
        """A mean, and by how much leaving out each of the blocks moves it (the only one: by nothing).

        Args:
            of: a linear function of sums.
        """
        count = self.total.count
        mean = of(self.total) / count
        moved = ((b.count * mean - of(b)) / max(1, count - b.count) for b in self.sums)
        return torch.from_numpy(mean), map(torch.from_numpy, moved)


def mean_trace(blocks: Sequence[tuple[int, float]]) -> Estimate:
    """The mean trace of F from the number of positions in each block and the trace of their sum."""
    counts, traces = (np.array(column) for column in zip(*blocks, strict=True))
    mean = np.array(traces.sum() / counts.sum())
    return _estimate(mean, (counts * mean - traces) / np.maximum(1, counts.sum() - counts))


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a mean Fisher matrix, or of ``Sigma^(1/2) F Sigma^(1/2)``, with their errors and what is read off them.

    Attributes:
        eigenvalues: [d], descending, nats^2 per squared unit of h; nats^2 if whitened.
        eigenvectors: [d, d], columns; of the whitened matrix in whitened coordinates.
        trace: of the same unit.
        participation_ratio, entropy_rank, trace_rank_99: effective dimensions, see :mod:`fisher_ray.spectrum`. Noise of the
            mean makes them too small, and the first two are corrected for it (``bias``), but where that would change them by
            more than a third: one block outweighs the others then. The last is not, and has no error (NaN): it is an integer,
            which leaving out a block mostly leaves as it is, and a jackknife needs a quantity that moves a little with every
            block.
        anisotropy: ``|F / (tr F / d) - I|``, the relative distance from a Euclidean metric.

    Of sketches that have lost part of F eigenvalues are lower bounds, with the error of what is left. Dimensions and anisotropy
    are those of the sketch, and what is whitened may be many times too small: nothing is known of how far off they are, and
    they have no error either (NaN). The trace of F is exact.
    """

    eigenvalues: Estimate
    eigenvectors: np.ndarray
    trace: Estimate
    participation_ratio: Estimate
    entropy_rank: Estimate
    trace_rank_99: Estimate
    anisotropy: Estimate

    def clusters(self, count: int) -> list[range]:
        """Runs of eigenvalues that this corpus cannot tell apart, those that begin with one of the first ``count``.

        Neighbours are told apart by a gap of three standard errors of the difference, taken as if independent, which is the
        cautious side. The last run goes on as far as it does. Without errors there are none.
        """
        if self.eigenvalues.blocks < 2:
            return []
        values, errors = self.eigenvalues.value, self.eigenvalues.error
        gaps = values[:-1] - values[1:]
        apart = np.flatnonzero(gaps > _SEPARATED * np.hypot(errors[:-1], errors[1:])) + 1
        runs = (range(first, last) for first, last in pairwise([0, *apart.tolist(), len(values)]))
        return [run for run in runs if run.start < count]


def spectrum(blocks: Blocks, whitened: bool = False) -> Spectrum:
    """Spectrum of the mean F, or of ``Sigma^(1/2) F Sigma^(1/2)`` with ``Sigma`` the covariance of h.

    Leaving out a block moves the matrix by X, in the coordinates of its eigenvectors: one decomposition in all, and two matrix
    products a block. Eigenvalue i moves by ``X_ii``, to first order. The participation ratio and the entropy rank are taken to
    second order, where noise of the mean biases them; see :func:`_spectral_sums`.
    """
    if whitened:
        root, inverse = whitening(covariance(blocks.mean("second_moment"), blocks.mean("activation")))
        values, vectors = symmetric_eigh(root @ blocks.mean("fisher") @ root)
        moves = _whitened_moves(blocks, values, root @ vectors, inverse @ vectors)
    else:
        values, vectors = symmetric_eigh(blocks.mean("fisher"))
        moves = _transformed_moves(blocks, "fisher", vectors)
    moved, sums, sums_without = _spectral_sums(values, moves)
    left = values + moved
    read = (blocks.total.fisher, blocks.total.second_moment) if whitened else (blocks.total.fisher,)
    lossy = any(matrix.shrunk > _ROUNDING * matrix.trace for matrix in read)

    def estimate(value: Tensor, without: Tensor, corrected: bool = False, known: bool = not lossy) -> Estimate:
        found = jackknife(value, without, corrected=corrected and known)
        return found if known else replace(found, error=np.full_like(found.error, np.nan), moved=None)

    def dimension(of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Estimate:
        found = estimate(of(*sums), of(*sums_without), corrected=True)
        plain = found.value + found.bias
        if np.abs(found.bias) > _MOST_CORRECTED * plain:
            return replace(found, value=plain, bias=np.zeros(()))
        possible = found.value.clip(1, len(values))  # a correction is an estimate too
        return replace(found, value=possible, bias=plain - possible)

    positive = values.clamp_min(0), left.clamp_min(0)
    return Spectrum(
        estimate(*positive, known=not (whitened and lossy)),
        vectors.numpy(),
        estimate(values.sum(), left.sum(-1)) if whitened else blocks.trace(),
        dimension(lambda trace, squares, _: trace.square() / squares),
        dimension(lambda trace, _, entropy: (trace.log() - entropy / trace).exp()),
        Estimate(trace_rank(positive[0]).double().numpy(), np.array(np.nan), len(blocks)),
        estimate(anisotropy(positive[0]), anisotropy(positive[1])),
    )


def _transformed_moves(blocks: Blocks, name: Literal["fisher", "second_moment"], vectors: Tensor) -> Iterator[Tensor]:
    """``U^T dA U`` for each block, dA the change of a mean matrix where the block is left out."""
    columns = vectors.numpy()
    return blocks.moves(lambda sums: getattr(sums, name).transformed(columns))[1]


def _whitened_moves(blocks: Blocks, values: Tensor, along: Tensor, back: Tensor) -> Iterator[Tensor]:
    """The same of the whitened matrix, to second order in what the diagonal and the trace of squares see.

    ``F Sigma`` has the eigenvalues l of the whitened matrix, with left and right eigenvectors ``a = Sigma^(1/2) v`` and
    ``c = Sigma^(-1/2) v``. Its change is ``D + L E + D E`` there, with ``D = a^T dF a`` and ``E = c^T dSigma c``.
    """
    first, firsts = blocks.moves(lambda sums: sums.activation @ back.numpy())
    changes = _transformed_moves(blocks, "fisher", along), _transformed_moves(blocks, "second_moment", back), firsts
    for fisher, second, shift in zip(*changes, strict=True):
        spread = second - torch.outer(first + shift, first + shift) + torch.outer(first, first)
        move = fisher + values[:, None] * spread
        move.diagonal().add_((fisher * spread).sum(1))
        yield move


def _spectral_sums(values: Tensor, moves: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``sum l``, ``sum l^2`` and ``sum l log l`` over eigenvalues, and what moves X of the matrix make of them.

    To second order, in the coordinates of the eigenvectors (Daleckii and Krein, 1965), with divided differences of f'::

        tr f(L + X) = sum_i f(l_i) + sum_i f'(l_i) X_ii + 1/2 sum_ij (f'(l_i) - f'(l_j)) / (l_i - l_j) X_ij X_ji

    Returns:
        the diagonals of X, [B, d]; the three sums, [3]; those after each move, [3, B].
    """
    sizes = values.clamp_min(0)
    floored = sizes.clamp_min(_NEGLIGIBLE * sizes.max())  # where F vanishes, so does what a block has of it
    smaller = torch.minimum(floored[:, None], floored)
    gaps = (floored[:, None] - floored).abs() / smaller
    curvature = torch.where(gaps > 0, gaps.log1p() / gaps, 1) / smaller  # of l log l; that of l^2 is 2
    diagonals, seconds = [], []
    for move in moves:
        squares = move * move.mT
        diagonals.append(move.diagonal().clone())  # a view would keep every matrix
        seconds.append(torch.stack([squares.new_zeros(()), squares.sum(), (curvature * squares).sum() / 2]))
    sums = torch.stack([sizes.sum(), sizes.square().sum(), torch.xlogy(sizes, floored).sum()])
    slopes = torch.stack([torch.ones_like(sizes), 2 * sizes, 1 + floored.log()])
    moved = torch.stack(diagonals)
    return moved, sums, sums[:, None] + slopes @ moved.mT + torch.stack(seconds, 1)


def quadratic_form(blocks: Blocks, directions: Tensor) -> Estimate:
    """``v^T F v`` with the mean F for directions [k, d], one a row; nats^2 per squared unit of v."""
    columns = directions.mT.numpy()
    value, moves = blocks.moves(lambda sums: sums.fisher.quadratic(columns))
    return jackknife(value, value + torch.stack(list(moves)))


def half_angles(blocks: Blocks, count: int) -> np.ndarray:
    """Angles in degrees between each of the first ``count`` eigenvectors of random halves of the corpus; [8, count].

    Small where the corpus resolves a direction. Two random directions of d dimensions are at nearly 90 degrees; so is each of
    a pair of eigenvectors whose eigenvalues are too close to tell them apart.
    """
    random = np.random.default_rng(0)
    angles = []
    for _ in range(_SPLITS if len(blocks) > 1 else 0):
        order = random.permutation(len(blocks))
        one, other = (_leading([blocks.sums[i].fisher for i in half], count) for half in np.array_split(order, 2))
        angles.append(np.rad2deg(np.arccos(np.abs((one * other).sum(0)).clip(max=1))))
    return np.stack(angles) if angles else np.empty((0, count))


def _leading(parts: Sequence[Matrix], count: int) -> np.ndarray:
    """The first ``count`` eigenvectors of a sum, as columns."""
    # Triangles are added as they are; of sketches the squares, as their sum would lose part of itself again.
    packed = isinstance(parts[0], Triangle)
    total = reduce(operator.add, parts).square() if packed else reduce(operator.add, (part.square() for part in parts))
    last = len(total) - 1
    return eigh(total, subset_by_index=(max(0, len(total) - count), last), overwrite_a=True)[1][:, ::-1]


@dataclass(frozen=True)
class Convergence:
    """How the mean F settles as blocks of documents are added.

    Attributes:
        positions: [B], that each mean is over.
        change: [B], relative Frobenius distance to the mean before; NaN for the first.
        error: relative standard error of the mean over all blocks, in the Frobenius norm.
        since: relative Frobenius distance of that mean to one known before; NaN without.
    """

    positions: np.ndarray
    change: np.ndarray
    error: float
    since: float


def convergence(blocks: Iterable[GroupSums], known: np.ndarray | None = None) -> Convergence:
    """How the mean F settles.

    Args:
        blocks: of documents; read twice, and held one at a time, so no iterator.
        known: a mean F of before.
    """
    if iter(blocks) is blocks:
        raise TypeError(
            "blocks are read twice: expected a sequence or another iterable that begins anew, got an iterator."
        )
    total: Any = 0.0
    positions: list[int] = []
    changes: list[float] = []
    for block in filter(lambda sums: sums.count, blocks):
        before, count = total, positions[-1] if positions else 0
        total = before + block.square("fisher")
        positions.append(count + block.count)
        changes.append(_relative_change(before / count, total / positions[-1]) if count else float("nan"))
    if not positions:
        raise ValueError("no block of documents has a position.")
    n, variance = positions[-1], 0.0
    for block in filter(lambda sums: sums.count, blocks if len(positions) > 1 else ()):
        moved = (total - block.square("fisher")) / (n - block.count) - total / n
        variance += (len(positions) - 1) / len(positions) * float(np.square(moved).sum())  # as in jackknife
    error = _over_norm(variance**0.5, total / n) if len(positions) > 1 else float("nan")
    since = float("nan") if known is None else _relative_change(known, total / n)
    return Convergence(np.array(positions), np.array(changes), error, since)


def _relative_change(before: np.ndarray, now: np.ndarray) -> float:
    """``|F' - F| / |F'|`` in the Frobenius norm."""
    return _over_norm(float(np.linalg.norm(now - before)), now)


def _over_norm(size: float, matrix: np.ndarray) -> float:
    """NaN where the matrix is zero, as it is of a model that is certain everywhere."""
    norm = float(np.linalg.norm(matrix))
    return size / norm if norm > 0 else float("nan")
