"""Sums over positions, for every layer and group: what a task writes, and what the reduction adds up."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# The group of all positions, where none are asked for.
ALL = ""

# float32 products of at most this many rows are added into float64: longer ones lose digits.
_ROWS = 4096

MATRICES = ("fisher", "normalised", "second_moment")


class Sums:
    """Sums of F, F / tr F, h and h h^T, float64, as a worker adds them up.

    Args:
        layers: ascending.
        d_model: width of the residual stream.
        groups: names; every position belongs to one.
        device: where the sums are kept.

    Attributes:
        count: [G, L], positions.
        traced: [G, L], positions with a trace above zero, over which F / tr F is summed.
        fisher, normalised, second_moment: [G, L, d, d].
        activation: [G, L, d].
    """

    def __init__(
        self, layers: Sequence[int], d_model: int, groups: Sequence[str] = (ALL,), device: torch.device | str = "cpu"
    ):
        self.layers, self.groups = list(layers), list(groups)
        shape = (len(self.groups), len(self.layers))
        self.count = torch.zeros(shape, dtype=torch.int64)
        self.traced = torch.zeros(shape, dtype=torch.int64)
        self.fisher, self.normalised, self.second_moment = (
            torch.zeros(*shape, d_model, d_model, dtype=torch.float64, device=device) for _ in MATRICES
        )
        self.activation = torch.zeros(*shape, d_model, dtype=torch.float64, device=device)

    def add(
        self,
        layer: int,
        factors: Float[Tensor, "N R d"],
        activations: Float[Tensor, "N D d"],
        group: Int[Tensor, " N"] | None = None,
    ) -> None:
        """Add N positions of one layer, each to the group of the given index."""
        if group is None:
            self._add(0, layer, factors, activations)
            return
        for i in group.unique().tolist():
            self._add(i, layer, factors[group == i], activations[group == i])

    def _add(self, group: int, layer: int, factors: Tensor, activations: Tensor) -> None:
        at = (group, self.layers.index(layer))
        step = max(1, _ROWS // max(factors.shape[1], activations.shape[1]))
        for start in range(0, len(factors), step):
            g, h = factors[start : start + step], activations[start : start + step]
            trace = g.square().sum((1, 2))
            traced = trace > 0
            unit = (g * trace.rsqrt().where(traced, 0)[:, None, None]).flatten(0, 1)
            g = g.flatten(0, 1)
            self.fisher[at] += g.mT @ g
            self.normalised[at] += unit.mT @ unit
            self.activation[at] += h.mean(1).double().sum(0)
            flat = h.flatten(0, 1)
            self.second_moment[at] += (flat.mT @ flat) / h.shape[1]
            self.count[at] += len(h)
            self.traced[at] += int(traced.sum())

    def packed(self, layer: int) -> LayerSums:
        """One layer's sums as upper triangles, without groups that have no position."""
        d, i = self.fisher.shape[-1], self.layers.index(layer)
        upper = torch.triu_indices(d, d, device=self.fisher.device)
        groups = {}
        for j, name in enumerate(self.groups):
            if self.count[j, i]:
                triangles = [getattr(self, m)[j, i, upper[0], upper[1]].cpu().numpy() for m in MATRICES]
                counts = int(self.count[j, i]), int(self.traced[j, i])
                groups[name] = GroupSums(*counts, self.activation[j, i].cpu().numpy(), *triangles)
        return LayerSums(groups)


@dataclass
class GroupSums:
    """One group's sums at one layer; matrices are upper triangles, row by row, [d (d + 1) / 2]."""

    count: int
    traced: int
    activation: np.ndarray
    fisher: np.ndarray
    normalised: np.ndarray
    second_moment: np.ndarray

    def add(self, other: GroupSums) -> None:
        """Add another's sums to these, which become float64."""
        self.count += other.count
        self.traced += other.traced
        for name in ("activation", *MATRICES):
            mine = getattr(self, name)
            if mine.shape != getattr(other, name).shape:
                raise ValueError(f"sums of width {len(self.activation)} and {len(other.activation)} cannot be added.")
            setattr(self, name, np.add(mine, getattr(other, name), dtype=np.float64))

    def square(self, name: str) -> np.ndarray:
        """One of the matrices in full, float64."""
        d = len(self.activation)
        matrix = np.empty((d, d))
        upper = np.triu_indices(d)
        matrix[upper] = getattr(self, name)
        matrix.T[upper] = matrix[upper]
        return matrix


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
        """An .npz with a row for each group, names sorted; ``dtype`` is that of the triangles."""
        names = sorted(self.groups)
        arrays: dict[str, np.ndarray] = {"groups": np.array(names, dtype=np.str_)}
        for field in ("count", "traced", "activation", *MATRICES):
            values = [getattr(self.groups[name], field) for name in names]
            arrays[field] = np.stack(values) if values else np.empty(0)
            if field in MATRICES:
                arrays[field] = arrays[field].astype(dtype, copy=False)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, raw: bytes) -> LayerSums:
        """The inverse of :meth:`to_bytes`."""
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            names = arrays["groups"].tolist()
            columns = [arrays[field] for field in ("count", "traced", "activation", *MATRICES)]
        return cls({name: GroupSums(int(c), int(t), *rest) for name, c, t, *rest in zip(names, *columns, strict=True)})
