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

from fisher_ray.spectrum import anisotropy, entropy_rank, participation_ratio, symmetric_eigh, trace_rank, whitening
from fisher_ray.sums import GroupSums, Matrix, Triangle

# Neighbouring eigenvalues closer than this many of their standard errors are told apart by no sample of this size.
_SEPARATED = 3.0
# Ways to halve a corpus at random.
_SPLITS = 8
# Share of its trace that a sketch with room for all that there is may yet have lost.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A quantity, or an array of them, with its standard error.

    Attributes:
        value: of the whole corpus.
        error: standard error; NaN with fewer than two blocks.
        blocks: what the error was computed from.
        without: the values that leaving out each block gives, [blocks, ...]; None where the error comes from no jackknife.
    """

    value: np.ndarray
    error: np.ndarray
    blocks: int
    without: np.ndarray | None = None

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
        if numbers is None or self.without is None or other.without is None:
            return Estimate(self.value - other.value, np.hypot(self.error, other.error), min(self.blocks, other.blocks))
        every = sorted({*numbers[0], *numbers[1]})
        left = []
        for estimate, present in zip((self, other), numbers, strict=True):
            without = np.repeat(estimate.value[None], len(every), 0)
            without[np.searchsorted(every, present)] = estimate.without
            left.append(without)
        return _jackknife(self.value - other.value, left[0] - left[1])


def jackknife(value: Tensor, without: Tensor) -> Estimate:
    """Standard error from the values that leaving out each block gives: ``sqrt((B - 1) / B sum_b (without_b - value)^2)``.

    Args:
        value: [...], of all blocks.
        without: [B, ...], of all but one.
    """
    return _jackknife(value.double().numpy(), without.double().numpy())


def _jackknife(value: np.ndarray, without: np.ndarray) -> Estimate:
    count = len(without)
    if count < 2:
        return Estimate(value, np.full_like(value, np.nan), count)
    return Estimate(value, np.sqrt((count - 1) / count * np.square(without - value).sum(0)), count, without)


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

    def quadratic(self, name: Literal["fisher", "second_moment"], vectors: Tensor) -> tuple[Tensor, Tensor]:
        """``u^T A u`` with a mean matrix A for every column u; [k], and without each of the blocks [blocks, k]."""
        columns = vectors.numpy()
        return self._with_and_without(lambda sums: getattr(sums, name).quadratic(columns))

    def linear(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """``u . m`` with the mean activation m, as :meth:`quadratic`."""
        columns = vectors.numpy()
        return self._with_and_without(lambda sums: sums.activation @ columns)

    def _with_and_without(self, of: Callable[[GroupSums], np.ndarray]) -> tuple[Tensor, Tensor]:
        """A mean, and that without each of the blocks (of one alone as it is), from a linear function of sums."""
        count = self.total.count
        mean = of(self.total) / count
        left = [mean + (b.count * mean - of(b)) / (count - b.count) for b in self.sums if b.count < count]
        return torch.from_numpy(mean), torch.from_numpy(np.stack(left or [mean]))


def mean_trace(blocks: Sequence[tuple[int, float]]) -> Estimate:
    """The mean trace of F from the number of positions in each block and the trace of their sum."""
    counts, traces = (np.array(column) for column in zip(*blocks, strict=True))
    rest = np.maximum(1, counts.sum() - counts)
    return _jackknife(np.array(traces.sum() / counts.sum()), (traces.sum() - traces) / rest)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a mean Fisher matrix, or of ``Sigma^(1/2) F Sigma^(1/2)``, with their errors and what is read off them.

    Attributes:
        eigenvalues: [d], descending, nats^2 per squared unit of h; nats^2 if whitened.
        eigenvectors: [d, d], columns; of the whitened matrix in whitened coordinates.
        trace: of the same unit.
        participation_ratio, entropy_rank, trace_rank_99: effective dimensions, see :mod:`fisher_ray.spectrum`. The last has no
            error (NaN): it is an integer, which leaving out a block mostly leaves as it is, and a jackknife needs a quantity
            that moves a little with every block.
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

    Leaving out a block moves eigenvalue i by ``u_i^T dF u_i``, to first order: one decomposition in all, and a matrix product a
    block. Of the whitened matrix with eigenvectors ``v_i`` the change is ``a_i^T dF a_i + l_i c_i^T dSigma c_i``, with
    ``a_i = Sigma^(1/2) v_i`` and ``c_i = Sigma^(-1/2) v_i``: ``F Sigma`` has the same eigenvalues, and those are its left and
    right eigenvectors.
    """
    fisher = blocks.mean("fisher")
    if whitened:
        root, inverse = whitening(blocks.mean("activation"), blocks.mean("second_moment"))
        values, vectors = symmetric_eigh(root @ fisher @ root)
        whole, left = blocks.quadratic("fisher", root @ vectors)
        along = inverse @ vectors
        (second, seconds), (first, firsts) = blocks.quadratic("second_moment", along), blocks.linear(along)
        left = left + values * ((seconds - firsts.square()) - (second - first.square()))
    else:
        values, vectors = symmetric_eigh(fisher)
        whole, left = blocks.quadratic("fisher", vectors)
    left = values + (left - whole)
    read = (blocks.total.fisher, blocks.total.second_moment) if whitened else (blocks.total.fisher,)
    lossy = any(matrix.shrunk > _ROUNDING * matrix.trace for matrix in read)

    positive = values.clamp_min(0), left.clamp_min(0)

    def estimate(
        function: Callable[[Tensor], Tensor], of: tuple[Tensor, Tensor] = positive, known: bool = not lossy
    ) -> Estimate:
        found = jackknife(*map(function, of))
        return found if known else replace(found, error=np.full_like(found.error, np.nan), without=None)

    return Spectrum(
        estimate(lambda each: each, known=not (whitened and lossy)),
        vectors.numpy(),
        estimate(lambda each: each.sum(-1), of=(values, left)) if whitened else blocks.trace(),
        estimate(participation_ratio),
        estimate(entropy_rank),
        Estimate(trace_rank(positive[0]).double().numpy(), np.array(np.nan), len(blocks)),
        estimate(anisotropy),
    )


def quadratic_form(blocks: Blocks, directions: Tensor) -> Estimate:
    """``v^T F v`` with the mean F for directions [k, d], one a row; nats^2 per squared unit of v."""
    return jackknife(*blocks.quadratic("fisher", directions.mT))


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
