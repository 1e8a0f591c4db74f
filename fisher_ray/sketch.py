"""Sums of outer products in a few rows: Frequent Directions.

A sketch of ``A^T A``, the sum of ``a a^T`` over rows a, is a matrix B of at most ``limit`` rows with ``0 <= A^T A - B^T B <=
shrunk I``. Rows are stacked below it; where they become too many, all squared singular values lose the (limit + 1)-th, which
leaves ``limit`` of them, and ``shrunk`` grows by as much. Every such step takes ``limit + 1`` times that from the trace, so

    shrunk <= (tr A^T A - tr B^T B) / (limit + 1),    and so    shrunk <= |A - A_k|_F^2 / (limit + 1 - k)

for every k <= limit, with ``A_k`` the best approximation of rank k. Both hold of sketches that were added up too, in any
order. Liberty, KDD 2013; Ghashami, Liberty, Phillips and Woodruff, SIAM Journal on Computing 45 (2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Rows that are stacked below a sketch before it is shrunk, per row of it: the cost of shrinking is shared by as many.
_STACKED = 2


def sketch_bytes(limit: int, d_model: int) -> int:
    """Memory of a sketch while rows are added to it."""
    return 8 * (1 + _STACKED) * limit * d_model


def sketch_flop(limit: int, d_model: int) -> float:
    """flop of adding one row: a Gram matrix of all rows, and the product that turns them, shared by the rows stacked."""
    stacked = (1 + _STACKED) * limit
    return 2 * (stacked + limit) * stacked * d_model / (_STACKED * limit)


@dataclass
class Sketch:
    """A finished sketch.

    Attributes:
        rows: B, [at most limit, d].
        limit: most rows that it keeps when it is added to.
        shrunk: largest eigenvalue that ``A^T A - B^T B`` can have.
        trace: of ``A^T A``, exact.
    """

    rows: np.ndarray
    limit: int
    shrunk: float
    trace: float

    def __add__(self, other: Sketch) -> Sketch:
        """The sketch of both sums, float64."""
        stacked = np.concatenate([self.rows, other.rows], dtype=np.float64)
        rows, lost = _shrink(torch.from_numpy(stacked), self.limit)
        return Sketch(rows.numpy(), self.limit, self.shrunk + other.shrunk + lost, self.trace + other.trace)

    def mean(self, count: int) -> np.ndarray:
        """Factors G with ``G^T G = B^T B / count``, [at most limit, d], float64."""
        return self.rows.astype(np.float64) / count**0.5

    def quadratic(self, vectors: np.ndarray) -> np.ndarray:
        """``|B u|^2`` for every column u of [d, k], float64."""
        return np.square(self.rows @ vectors).sum(0)

    def transformed(self, vectors: np.ndarray) -> np.ndarray:
        """``(B U)^T B U`` with columns U [d, k], float64."""
        rows = self.rows @ vectors
        return rows.T @ rows

    def square(self) -> np.ndarray:
        """``B^T B``, float64."""
        rows = self.rows.astype(np.float64)
        return rows.T @ rows


class FrequentDirections:
    """A sketch that rows are added to, float64, on their device.

    It is shrunk after fixed numbers of rows, so that how they are divided into batches changes nothing.
    """

    def __init__(self, limit: int, d_model: int, device: torch.device | str = "cpu"):
        self.limit = limit
        self._parts = [torch.empty(0, d_model, dtype=torch.float64, device=device)]
        self._shrunk = 0.0
        self._trace = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: Float[Tensor, "n d"], divisor: int = 1, scale: Float[Tensor, " n"] | None = None) -> None:
        """Add the outer products of n rows, each row scaled, divided by a number."""
        if scale is not None:
            rows = rows * scale[:, None]
        rows = rows.double() / divisor**0.5
        while len(rows):
            room = (1 + _STACKED) * self.limit - sum(map(len, self._parts))
            self._parts.append(rows[:room].clone())
            if len(rows) >= room:
                self._shrink()
            rows = rows[room:]

    def finished(self) -> Sketch:
        """The sketch as it is now."""
        self._shrink()
        return Sketch(self._parts[0].cpu().numpy(), self.limit, self._shrunk, float(self._trace))

    def _shrink(self) -> None:
        stacked = torch.cat(self._parts)
        self._trace += stacked[len(self._parts[0]) :].square().sum()
        kept, lost = _shrink(stacked, self.limit)
        self._parts, self._shrunk = [kept], self._shrunk + lost


def _shrink(rows: Float[Tensor, "n d"], limit: int) -> tuple[Float[Tensor, "m d"], float]:
    """At most ``limit`` rows, and what their squared singular values have lost."""
    if len(rows) <= limit:
        return rows, 0.0
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    lost = values[limit]
    # Turned onto the singular vectors, where a factor that is at most one makes each row as short as it has to be.
    factor = (1 - lost / values[:limit]).clamp_min(0).sqrt().nan_to_num(0)
    return (vectors[:, :limit] * factor).mT @ rows, float(lost)
