"""Sums over positions, for every layer and group: what a task writes, and what the reduction adds up."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisher_ray.kernels import add_outer, as_bfloat16, parts, strip_width
from fisher_ray.sketch import FrequentDirections, Sketch, sketch_bytes

# The group of all positions, where none are asked for.
ALL = ""

# float32 products of this many rows, or of one position's where they are more, are added into float64: longer ones lose digits.
_ROWS = 4096
# Roots of traces at most this are none: their reciprocals' squares are no float32 numbers.
_NO_TRACE = 1e-18

MATRICES = ("fisher", "normalised", "second_moment")
_PLAIN = ("count", "traced", "captured", "activation")


def sums_memory(d_model: int, sketch: int | None = None) -> int:
    """Bytes that a worker holds for one layer and group; of a group with few positions a sketch takes less."""
    matrix = 8 * d_model**2 if sketch is None else sketch_bytes(sketch, d_model)
    return len(MATRICES) * matrix + 8 * (d_model + 2)


def square_flop(d_model: int) -> float:
    """flop to add the outer product of one row to a sum in full, on a CPU; a GPU's wider strips leave out less."""
    width = strip_width(d_model)
    return sum(2.0 * min(width, d_model - start) * (d_model - start) for start in range(0, d_model, width))


class Sums:
    """Sums of F, F / tr F, h and h h^T, float64, as a worker adds them up.

    Args:
        layers: ascending.
        d_model: width of the residual stream.
        groups: names; every position belongs to one.
        device: where the sums are kept.
        sketch: rows of the sketches that are kept of the matrices; None: the matrices themselves.
    """

    def __init__(
        self,
        layers: Sequence[int],
        d_model: int,
        groups: Sequence[str] = (ALL,),
        device: torch.device | str = "cpu",
        sketch: int | None = None,
    ):
        self.layers, self.groups = list(layers), list(groups)
        kept = (
            partial(_Square, d_model, device)
            if sketch is None
            else partial(FrequentDirections, sketch, d_model, device)
        )
        self._sums: dict[tuple[int, int], _Adding] = defaultdict(lambda: _Adding(kept, d_model, device))

    def add(
        self,
        layer: int,
        factors: Float[Tensor, "N R d"],
        activations: Float[Tensor, "N D d"],
        group: Int[Tensor, " N"] | None = None,
        captured: Float[Tensor, " N"] | None = None,
    ) -> None:
        """Add N positions of one layer, each to the group of the given index.

        Args:
            captured: see :attr:`fisher_ray.Scores.captured_share`; None: 1.
        """
        if captured is None:
            captured = factors.new_ones(len(factors))
        if group is None:
            self._sums[0, layer].add(factors, activations, captured)
            return
        for i in group.unique().tolist():
            here = group == i
            self._sums[i, layer].add(factors[here], activations[here], captured[here])

    def packed(self, layer: int) -> LayerSums:
        """One layer's sums, without groups that have no position."""
        found = {name: self._sums.get((i, layer)) for i, name in enumerate(self.groups)}
        return LayerSums({name: sums.packed() for name, sums in found.items() if sums is not None and sums.count})


class _Adding:
    """The sums of one layer and group while positions are added."""

    def __init__(self, kept: partial[_Square] | partial[FrequentDirections], d_model: int, device: torch.device | str):
        self.count = 0
        self.fisher, self.normalised, self.second_moment = (kept() for _ in MATRICES)
        # What h h^T is summed around, lest products in float32 lose how little h may move beside its mean. None for a sketch,
        # which is a sum of squares, and for bfloat16 numbers, which would be none with something subtracted.
        self._around: Tensor | None = None
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)  # there: a GPU is not waited for
        self.traced, self.captured, self.activation = zeros(()), zeros(()), zeros(d_model)

    def add(self, factors: Tensor, activations: Tensor, captured: Tensor) -> None:
        is_first = not self.count
        self.count += len(factors)
        self.captured += captured.double().sum()
        num_factors, num_streams = factors.shape[1], activations.shape[1]
        g, h = (as_bfloat16(rows.flatten(0, 1)) for rows in (factors, activations))
        self.activation += h.sum(0, dtype=torch.float64) / num_streams
        if is_first and isinstance(self.second_moment, _Square) and h.dtype != torch.bfloat16:
            self._around = (self.activation / self.count).to(h.dtype)
        root = torch.linalg.vector_norm(factors.flatten(1), dim=1)  # of the trace
        there = root > _NO_TRACE
        self.traced += there.sum()
        scale = root.reciprocal().where(there, 0)
        step = max(1, _ROWS // max(num_factors, num_streams))
        for start in range(0, len(factors), step):
            stop = start + step
            some = g[start * num_factors : stop * num_factors]
            self.fisher.add(some)
            self.normalised.add(some, scale=scale[start:stop].repeat_interleave(num_factors))
            streams = h[start * num_streams : stop * num_streams]
            self.second_moment.add(streams if self._around is None else streams - self._around, num_streams)

    def packed(self) -> GroupSums:
        matrices = self.fisher.finished(), self.normalised.finished(), self._second_moment()
        activation = self.activation.cpu().numpy()
        return GroupSums(self.count, int(self.traced), float(self.captured), activation, *matrices)

    def _second_moment(self) -> Matrix:
        if self._around is None or not isinstance(self.second_moment, _Square):
            return self.second_moment.finished()
        around = self._around.double()
        across = torch.outer(around, self.activation)
        return self.second_moment.finished(across + across.mT - self.count * torch.outer(around, around))


class _Square:
    """A sum of outer products, of which the upper triangle is kept up."""

    def __init__(self, d_model: int, device: torch.device | str):
        self._total = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)

    def add(self, rows: Float[Tensor, "n d"], divisor: int = 1, scale: Float[Tensor, " n"] | None = None) -> None:
        """Add the outer products of n rows, each row scaled, divided by a number."""
        left = right = rows
        if scale is not None and rows.dtype == torch.bfloat16:
            # What is scaled is no bfloat16 number: one factor of the two, and as the sum of two, twice as many rows.
            left, right = parts(rows, scale.square()).flatten(0, 1), rows.repeat(2, 1)
        elif scale is not None:
            left = right = rows * scale[:, None]
        add_outer(self._total, left, right, divisor)

    def finished(self, more: Float[Tensor, "d d"] | None = None) -> Triangle:
        """The sum, and a symmetric matrix beside it."""
        upper = torch.triu_indices(*self._total.shape, device=self._total.device)
        total = self._total if more is None else self._total + more
        return Triangle(total[upper[0], upper[1]].cpu().numpy())


@dataclass
class Triangle:
    """A finished sum of outer products: the upper triangle, row by row.

    Attributes:
        values: [d (d + 1) / 2].
    """

    values: np.ndarray

    # As a sketch has it: nothing is lost.
    shrunk = 0.0

    def __add__(self, other: Triangle) -> Triangle:
        """The sum of both, float64."""
        return Triangle(np.add(self.values, other.values, dtype=np.float64))

    @property
    def trace(self) -> float:
        d = self._width
        diagonal = np.arange(d) * d - np.arange(d) * (np.arange(d) - 1) // 2
        return float(self.values[diagonal].sum(dtype=np.float64))

    def mean(self, count: int) -> np.ndarray:
        """Divided by a count, in full, float64."""
        return self.square() / count

    def quadratic(self, vectors: np.ndarray) -> np.ndarray:
        """``u^T A u`` for every column u of [d, k], float64."""
        return (vectors * (self.square() @ vectors)).sum(0)

    def transformed(self, vectors: np.ndarray) -> np.ndarray:
        """``U^T A U`` with columns U [d, k], float64."""
        return vectors.T @ (self.square() @ vectors)

    def square(self) -> np.ndarray:
        """In full, float64."""
        matrix = np.empty((self._width, self._width))
        upper = np.triu_indices(self._width)
        matrix[upper] = self.values
        matrix.T[upper] = matrix[upper]
        return matrix

    @property
    def _width(self) -> int:
        return (math.isqrt(8 * len(self.values) + 1) - 1) // 2


Matrix = Triangle | Sketch


@dataclass
class GroupSums:
    """One group's sums at one layer.

    Attributes:
        count: positions.
        traced: positions with a trace above zero, over which F / tr F is summed.
        captured: sum of the positions' captured shares.
        activation: [d].
    """

    count: int
    traced: int
    captured: float
    activation: np.ndarray
    fisher: Matrix
    normalised: Matrix
    second_moment: Matrix

    def add(self, other: GroupSums) -> None:
        """Add another's sums to these, which become float64."""
        if len(self.activation) != len(other.activation):
            raise ValueError(f"sums of width {len(self.activation)} and {len(other.activation)} cannot be added.")
        self.count += other.count
        self.traced += other.traced
        self.captured += other.captured
        self.activation = np.add(self.activation, other.activation, dtype=np.float64)
        for name in MATRICES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def square(self, name: str) -> np.ndarray:
        """One of the matrices in full, float64."""
        matrix: np.ndarray = getattr(self, name).square()
        return matrix

    def mean(self, name: str) -> np.ndarray:
        """The mean of one of the matrices, [d, d], or the rows of its sketch; of ``normalised`` over what has a trace."""
        count = max(1, self.traced) if name == "normalised" else self.count
        matrix: np.ndarray = getattr(self, name).mean(count)
        return matrix

    @property
    def sketch_error(self) -> float:
        """The most that a sketch can have lost of any eigenvalue of the mean F; 0 of sums in full."""
        return self.fisher.shrunk / self.count


@dataclass
class LayerSums:
    """One layer's sums, by group."""

    groups: dict[str, GroupSums]

    def merge(self, other: LayerSums) -> None:
        """Add another's sums to these."""
        for name, sums in other.groups.items():
            if name in self.groups:
                self.groups[name].add(sums)
            else:
                self.groups[name] = sums

    def total(self) -> GroupSums | None:
        """Over all groups, in the order of their names; None without any."""
        total: GroupSums | None = None
        for name in sorted(self.groups):
            if total is None:
                total = GroupSums(**vars(self.groups[name]))
            else:
                total.add(self.groups[name])
        return total

    def to_bytes(self, dtype: type[np.floating] = np.float64) -> bytes:
        """An .npz with a row for each group, names sorted; ``dtype`` is that of the matrices.

        Of sketches the rows of all groups are in one array, one group's after the other's, with the number of each group's
        beside it.
        """
        names = sorted(self.groups)
        arrays: dict[str, np.ndarray] = {"groups": np.array(names, dtype=np.str_)}
        for field in _PLAIN:
            arrays[field] = _stacked([getattr(self.groups[name], field) for name in names])
        for field in MATRICES:
            matrices: list[Matrix] = [getattr(self.groups[name], field) for name in names]
            sketches = [matrix for matrix in matrices if isinstance(matrix, Sketch)]
            if sketches:
                arrays["limit"] = np.array(sketches[0].limit)
                arrays[field] = np.concatenate([sketch.rows for sketch in sketches])
                arrays[f"{field}_rows"] = np.array([len(sketch.rows) for sketch in sketches])
                arrays[f"{field}_shrunk"] = np.array([sketch.shrunk for sketch in sketches])
                arrays[f"{field}_trace"] = np.array([sketch.trace for sketch in sketches])
            else:
                arrays[field] = _stacked([matrix.values for matrix in matrices if isinstance(matrix, Triangle)])
            arrays[field] = arrays[field].astype(dtype, copy=False)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, raw: bytes) -> LayerSums:
        """The inverse of :meth:`to_bytes`."""
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            names = arrays["groups"].tolist()
            plain = [arrays[field] for field in _PLAIN]
            matrices = [_matrices(arrays, field) for field in MATRICES]
        return cls(
            {
                name: GroupSums(int(c), int(t), float(s), h, *rest)
                for name, c, t, s, h, *rest in zip(names, *plain, *matrices, strict=True)
            }
        )


def _stacked(values: Sequence[Any]) -> np.ndarray:
    return np.stack(values) if values else np.empty(0)


def _matrices(arrays: Mapping[str, np.ndarray], field: str) -> list[Matrix]:
    """One of the matrices of every group."""
    if "limit" not in arrays:
        return [Triangle(values) for values in arrays[field]]
    limit, rows = int(arrays["limit"]), arrays[f"{field}_rows"]
    parts = np.split(arrays[field], rows.cumsum()[:-1])
    numbers = zip(arrays[f"{field}_shrunk"].tolist(), arrays[f"{field}_trace"].tolist(), strict=True)
    return [Sketch(part, limit, *each) for part, each in zip(parts, numbers, strict=True)]
