"""From the shards of all tasks to one mean a layer and group, with its spectrum.

Sums are added as a tree of fixed shape over the tasks: a node covers consecutive tasks, adds its children one after the
other, and is named by what it covers, so that whoever computes it, whenever, gets the same bits, and a reduction that was
interrupted goes on. Memory holds two children of one layer. The children of the root are blocks of documents, no document in
two of them, and stay on storage: standard errors come from leaving out one at a time.
"""

from __future__ import annotations

import hashlib
import io
import math
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, pairwise, takewhile
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fisher_ray.cost import FAN_IN
from fisher_ray.plan import Plan
from fisher_ray.shards import (
    Counts,
    Receipt,
    RunStore,
    distinct_workers,
    json_bytes,
    npy_bytes,
    parquet_bytes,
    reduced_folder,
    task_name,
)
from fisher_ray.sketch import Sketch
from fisher_ray.spectrum import (
    covariance,
    entropy_rank,
    factor_eigh,
    participation_ratio,
    symmetric_eigh,
    trace_rank,
    whitened_eigenvalues,
    whitened_factor_eigenvalues,
)
from fisher_ray.statistics import convergence, mean_trace
from fisher_ray.storage import StoredFile
from fisher_ray.sums import MATRICES, GroupSums, LayerSums

SUMMARY_SCHEMA = pa.schema(
    [
        ("layer", pa.int16()),
        ("group", pa.string()),
        ("positions", pa.int64()),
        ("trace", pa.float64()),
        ("trace_error", pa.float64()),
        ("blocks", pa.int64()),
        ("top_eigenvalue", pa.float64()),
        ("participation_ratio", pa.float64()),
        ("entropy_rank", pa.float64()),
        ("trace_rank_99", pa.int64()),
        ("whitened_trace", pa.float64()),
        ("whitened_top_eigenvalue", pa.float64()),
        ("whitened_entropy_rank", pa.float64()),
        ("sketch_error", pa.float64()),
        ("captured_share", pa.float64()),
        ("mean_captured_share", pa.float64()),
        ("raised", pa.list_(pa.string())),
        ("lowered", pa.list_(pa.string())),
    ],
    metadata={"fisher_ray.schema": "summary.5"},
)


# Eigenvectors of each layer whose tokens are kept.
DIRECTIONS = 4

DIRECTIONS_SCHEMA = pa.schema(
    [
        ("layer", pa.int16()),
        ("direction", pa.int32()),
        ("eigenvalue", pa.float64()),
        ("raised", pa.list_(pa.string())),
        ("lowered", pa.list_(pa.string())),
    ],
    metadata={"fisher_ray.schema": "directions.1"},
)


@dataclass(frozen=True)
class Node:
    """The sum over tasks [first, last) at some layers.

    Attributes:
        missing: tasks among them that were given up; part of the name, so that a sum without them is never taken for one
            with them.
    """

    first: int
    last: int
    layers: tuple[int, ...]
    missing: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What the node covers."""
        name = f"{self.first:08d}-{self.last:08d}-{self.layers[0]:03d}-{self.layers[-1]:03d}"
        if self.missing:
            name += f"-without-{hashlib.sha256(repr(self.missing).encode()).hexdigest()[:12]}"
        return name

    @property
    def is_task(self) -> bool:
        return self.last - self.first == 1

    def children(self) -> list[Node]:
        """At most FAN_IN parts of nearly equal length, without those in which all tasks are missing."""
        count = self.last - self.first
        parts = min(FAN_IN, count)
        bounds = [self.first + count * i // parts for i in range(parts + 1)]
        nodes = []
        for first, last in pairwise(bounds):
            missing = tuple(task for task in self.missing if first <= task < last)
            if len(missing) < last - first:
                nodes.append(Node(first, last, self.layers, missing))
        return nodes


def roots(plan: Plan, num_tasks: int, missing: Sequence[int]) -> list[Node]:
    """The trees of a run: one for as many layers as one call adds up."""
    layers, size = plan.layers, plan.cost.layers_per_call
    chunks = [tuple(layers[i : i + size]) for i in range(0, len(layers), size)]
    return [Node(0, num_tasks, chunk, tuple(sorted(missing))) for chunk in chunks]


def levels(root: Node) -> list[list[Node]]:
    """The inner nodes below a root that are no tasks, deepest first: each level needs only those before it."""
    found: list[list[Node]] = []
    level = [root]
    while level := [child for node in level for child in node.children() if not child.is_task]:
        found.append(level)
    return found[::-1]


def checkpoints(num_tasks: int) -> list[int]:
    """After how many tasks a run may end: 8, 16, 32, ..., and all. Powers of two, so that a change over one means the same."""
    return [*takewhile(lambda tasks: tasks < num_tasks, (8 << i for i in count())), num_tasks]


@dataclass(frozen=True)
class Checkpoint:
    """How well the mean F is known when so many tasks are done, in the layer where it is known worst.

    Attributes:
        tasks: done, the first of the plan.
        positions: scored in them.
        relative_error: standard error of the mean F over its Frobenius norm, by the jackknife over at most 32 blocks of tasks;
            None where fewer than two have positions.
        relative_change: of the mean F since the checkpoint before; None where there was none.
    """

    tasks: int
    positions: int
    relative_error: float | None
    relative_change: float | None

    @property
    def words(self) -> str:
        """For people."""
        error, change = (
            "unknown" if value is None else f"{value:.2%}" for value in (self.relative_error, self.relative_change)
        )
        return f"relative error {error}, change {change} after {self.tasks} tasks and {self.positions:,} positions"


def look_back(plan: Plan, store: RunStore, root: Node, before: Node | None) -> Checkpoint:
    """How well the mean over a root's tasks is known, and how it changed since an earlier root's."""
    _set_threads(plan)
    children = [_receipt(store, child) for child in root.children()]
    earlier = [_receipt(store, child) for child in before.children()] if before is not None else []
    positions = sum(child.counts.scored for child in children)
    parts = [Checkpoint(root.last, positions, None, None)]
    for layer in root.layers if positions else ():
        known = _mean_fisher(_Blocks(store, earlier, layer)) if any(child.counts.scored for child in earlier) else None
        found = convergence(_Blocks(store, children, layer), known)
        error, change = (None if math.isnan(value) else value for value in (found.error, found.since))
        parts.append(Checkpoint(root.last, positions, error, change))
    return worst(parts)


def worst(parts: Sequence[Checkpoint]) -> Checkpoint:
    """Of the checkpoints of some layers each the one of all."""
    errors, changes = (
        [value for part in parts if (value := getattr(part, name)) is not None]
        for name in ("relative_error", "relative_change")
    )
    return replace(parts[0], relative_error=max(errors, default=None), relative_change=max(changes, default=None))


def _mean_fisher(blocks: Iterable[GroupSums]) -> np.ndarray:
    total, positions = np.zeros(()), 0
    for block in blocks:
        total, positions = total + block.square("fisher"), positions + block.count
    return total / positions


@dataclass(frozen=True)
class _Blocks:
    """The sums of one layer under some receipts, read whenever they are gone through."""

    store: RunStore
    receipts: Sequence[Receipt]
    layer: int

    def __iter__(self) -> Iterator[GroupSums]:
        return filter(None, (part.total() for part in _parts(self.store, self.receipts, self.layer)))


def sum_node(plan: Plan, store: RunStore, node: Node) -> Receipt:
    """Add up a node's children and commit the sum.

    Raises:
        DamagedError: a child's file holds other bytes than were written, or is gone.
    """
    _set_threads(plan)
    children = [_receipt(store, child) for child in node.children()]
    attempt = f"{node.name}-{uuid.uuid4().hex[:8]}"
    files = {}
    for layer in node.layers:
        total = LayerSums({})
        for part in _parts(store, children, layer):
            total.merge(part)
        raw = total.to_bytes()
        files[f"sums_{layer}"] = store.store(f"tree/{attempt}/layer_{layer:03d}.npz", raw)
    return store.commit("tree", _covering(node.name, plan.fingerprint, children, files))


def finish_layers(plan: Plan, store: RunStore, root: Node) -> tuple[list[dict[str, Any]], Receipt]:
    """Add up the root's children and write means and spectra, float64, one .npy an array.

    In ``reduced/layer_KKK/``, and for every group in ``reduced/layer_KKK/group_NAME/``: ``fisher`` (mean of F),
    ``normalised_fisher`` (mean of F / tr F: another statistic for each estimator and number of samples, never to be compared
    across them), ``activation_mean``, ``activation_second_moment``, ``eigenvalues`` (descending) and ``eigenvectors`` (columns)
    of the mean F, and ``whitened_eigenvalues`` of ``Sigma^(1/2) F Sigma^(1/2)``.

    Of sketches there is ``fisher_factors`` [at most sketch, d] in place of ``fisher``, with ``F = G^T G + E`` and ``0 <= E <=
    sketch_error I``, and likewise of the other matrices; there are as many eigenvalues as rows; and the groups, which may be
    thousands, are sums in one ``groups.npz``, as tasks write them.

    Returns:
        a row of the summary for each layer and group, without the tokens, and what vouches for the files.
    """
    _set_threads(plan)
    children = [_receipt(store, child) for child in root.children()]
    rows: list[dict[str, Any]] = []
    files: dict[str, StoredFile] = {}
    for layer in root.layers:
        sums = LayerSums({})
        traces: dict[str | None, list[tuple[int, float]]] = defaultdict(list)  # of the blocks, by group and of all
        for block in _parts(store, children, layer):
            own = {name: (group.count, group.fisher.trace) for name, group in block.groups.items()}
            for name, pair in own.items():
                traces[name].append(pair)
            if own:
                positions, all_traces = zip(*own.values(), strict=True)
                traces[None].append((sum(positions), sum(all_traces)))
            sums.merge(block)
        total = sums.total()
        if total is None:
            continue
        folder = reduced_folder(layer)
        row, arrays = _means(total)
        rows.append({"layer": layer, "group": None, **row, **_error(traces[None])})
        _write_means(store, folder, arrays, files)
        if plan.config.group_by is None:
            continue
        for name in sorted(sums.groups):
            row, arrays = _means(sums.groups[name])
            rows.append({"layer": layer, "group": name, **row, **_error(traces[name])})
            if plan.config.sketch is None:
                _write_means(store, reduced_folder(layer, name), arrays, files)
        if plan.config.sketch is not None:
            path = f"{folder}/groups.npz"
            files[path] = store.store(path, sums.to_bytes())
    return rows, _covering(root.name, plan.fingerprint, children, files)


def _receipt(store: RunStore, node: Node) -> Receipt:
    if node.is_task:
        return store.receipt("done", task_name(node.first))
    return store.receipt("tree", node.name)


def _set_threads(plan: Plan) -> None:
    """As many as scores are computed with: their number is part of the bits of products and eigendecompositions."""
    torch.set_num_threads(plan.config.cpus_per_actor)


def _parts(store: RunStore, receipts: Iterable[Receipt], layer: int) -> Iterator[LayerSums]:
    """The sums at one layer under some receipts, in their order."""
    return (LayerSums.from_bytes(store.load(receipt.files[f"sums_{layer}"])) for receipt in receipts)


def _error(blocks: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Standard error of a mean trace, from positions and trace of each block, and how many they are."""
    found = mean_trace(blocks)
    return {"trace_error": float(found.error) if found.blocks > 1 else None, "blocks": found.blocks}


def _covering(name: str, fingerprint: str, children: Sequence[Receipt], files: dict[str, StoredFile]) -> Receipt:
    counts = sum((child.counts for child in children), Counts())
    stages = dict.fromkeys(stage for child in children for stage in child.seconds)
    seconds = {stage: sum(child.seconds.get(stage, 0.0) for child in children) for stage in stages}
    return Receipt(name, fingerprint, files, counts, seconds, distinct_workers(children))


def _write_means(store: RunStore, folder: str, arrays: Mapping[str, np.ndarray], files: dict[str, StoredFile]) -> None:
    for name, array in arrays.items():
        path = f"{folder}/{name}.npy"
        files[path] = store.store(path, npy_bytes(array))


def _means(sums: GroupSums) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A row of the summary, and the arrays of one mean."""
    fisher, normalised, second_moment = (torch.from_numpy(sums.mean(name)) for name in MATRICES)
    mean = torch.from_numpy(np.asarray(sums.activation, np.float64) / sums.count)
    if isinstance(sums.fisher, Sketch):
        values, vectors = factor_eigh(fisher)
        whitened = whitened_factor_eigenvalues(fisher, mean, second_moment)
    else:
        values, vectors = symmetric_eigh(fisher)
        whitened = whitened_eigenvalues(fisher, covariance(second_moment, mean))
    values = values.clamp_min(0)
    suffix = "_factors" if isinstance(sums.fisher, Sketch) else ""
    arrays = {
        f"fisher{suffix}": fisher,
        f"normalised_fisher{suffix}": normalised,
        "activation_mean": mean,
        f"activation_second_moment{suffix}": second_moment,
        "eigenvalues": values,
        "eigenvectors": vectors,
        "whitened_eigenvalues": whitened,
    }
    trace = sums.fisher.trace / sums.count
    row = {
        "positions": sums.count,
        "trace": trace,
        "top_eigenvalue": float(values[0]),
        "participation_ratio": float(participation_ratio(values)),
        "entropy_rank": float(entropy_rank(values)),
        "trace_rank_99": int(trace_rank(values)),
        "whitened_trace": float(whitened.sum()),
        "whitened_top_eigenvalue": float(whitened[0]),
        "whitened_entropy_rank": float(entropy_rank(whitened)),
        "sketch_error": sums.sketch_error,
        "captured_share": float(values.sum()) / trace if suffix and trace > 0 else 1.0,
        "mean_captured_share": sums.captured / sums.count,
    }
    return row, {name: array.numpy() for name, array in arrays.items()}


def read_array(store: RunStore, layer: int, name: str) -> np.ndarray:
    """One of the arrays of :func:`finish_layers`, over all groups."""
    return np.load(io.BytesIO(store.read(f"{reduced_folder(layer)}/{name}.npy")), allow_pickle=False)


def write_summary(
    store: RunStore,
    rows: Sequence[Mapping[str, Any]],
    moved: Mapping[int, Sequence[tuple[list[str], list[str]]]],
    covering: Receipt,
    missing: Sequence[int],
) -> dict[str, StoredFile]:
    """reduced/provenance.json (counts, self-check, versions), summary.parquet, one row a layer and group, and
    directions.parquet, one row for each of a layer's first eigenvectors.

    Args:
        rows: in their order.
        moved: tokens that each layer's first eigenvectors raise and lower.
    """
    provenance = {
        "counts": asdict(covering.counts),
        "seconds": covering.seconds,
        "workers": covering.workers,
        "tasks_left_out": list(missing),
    }
    table = pa.Table.from_pylist(list(rows), schema=SUMMARY_SCHEMA)
    directions = []
    for layer in sorted(moved):
        values = read_array(store, layer, "eigenvalues").tolist()
        directions += [
            {"layer": layer, "direction": i, "eigenvalue": values[i], "raised": raised, "lowered": lowered}
            for i, (raised, lowered) in enumerate(moved[layer])
        ]
    return {
        path: store.store(path, raw)
        for path, raw in (
            ("reduced/provenance.json", json_bytes(provenance)),
            ("reduced/summary.parquet", parquet_bytes(table)),
            ("reduced/directions.parquet", parquet_bytes(pa.Table.from_pylist(directions, DIRECTIONS_SCHEMA))),
        )
    }


def manifest(
    plan: Plan, roots: Sequence[Node], done: int, files: Mapping[str, StoredFile], looked: Sequence[Checkpoint]
) -> dict[str, Any]:
    """What makes a run reduced: files with their sha256, the tasks [0, last) and nodes they were made of, and the blocks for
    standard errors, each with the receipts that its sums are under: those of all layers together, or one for some of the
    layers. Of a run that may end early also the checkpoints it went by."""
    blocks = [
        {
            "first": chunks[0].first,
            "last": chunks[0].last,
            "without": list(chunks[0].missing),
            # A task's receipt is of all layers, and the same in each of the roots.
            "receipts": list(
                dict.fromkeys(f"done/{task_name(b.first)}" if b.is_task else f"tree/{b.name}" for b in chunks)
            ),
        }
        for chunks in zip(*(root.children() for root in roots), strict=True)
    ]
    return {
        "fingerprint": plan.fingerprint,
        "last": roots[0].last,
        "tasks": done,
        "missing": list(roots[0].missing),
        "blocks": blocks,
        "checkpoints": [asdict(checkpoint) for checkpoint in looked],
        "nodes": [node.name for root in roots for level in levels(root) for node in level],
        "files": {path: asdict(stored) for path, stored in files.items()},
    }
