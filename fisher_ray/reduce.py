"""From the shards of all tasks to one mean a layer, with its spectrum."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from fisher_ray.plan import Plan
from fisher_ray.shards import Counts, Receipt, RunStore, Sums, npy_bytes, parquet_bytes
from fisher_ray.spectrum import (
    entropy_rank,
    participation_ratio,
    symmetric_eigh,
    trace_rank,
    whitened_eigenvalues,
)

SUMMARY_SCHEMA = pa.schema(
    [
        ("layer", pa.int16()),
        ("positions", pa.int64()),
        ("trace", pa.float64()),
        ("top_eigenvalue", pa.float64()),
        ("participation_ratio", pa.float64()),
        ("entropy_rank", pa.float64()),
        ("trace_rank_99", pa.int64()),
        ("whitened_trace", pa.float64()),
        ("whitened_top_eigenvalue", pa.float64()),
        ("whitened_entropy_rank", pa.float64()),
        ("raised", pa.list_(pa.string())),
        ("lowered", pa.list_(pa.string())),
    ],
    metadata={"fisher_ray.schema": "summary.1"},
)


def reduce_shards(plan: Plan, store: RunStore, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
    """Sum the tasks' sums in the order of the tasks and write means and spectra, float64, one .npy an array.

    In ``reduced/layer_KKK/``: ``fisher`` (mean of F), ``normalised_fisher`` (mean of F / tr F: another statistic for each
    estimator and number of samples, never to be compared across them), ``activation_mean``,
    ``activation_second_moment``, ``eigenvalues`` (descending) and ``eigenvectors`` (columns) of the mean F, and
    ``whitened_eigenvalues`` of ``Sigma^(1/2) F Sigma^(1/2)``.

    Returns:
        a row of the summary for each layer, without the tokens.
    """
    total = Sums(plan.layers, plan.facts.d_model)
    for receipt in sorted(receipts, key=lambda r: r.task):
        total.merge(Sums.from_bytes(store.load(receipt.files["sums"])))
    rows = []
    for i, layer in enumerate(total.layers):
        count, traced = int(total.count[i]), int(total.traced[i])
        fisher, second_moment = total.fisher[i] / count, total.second_moment[i] / count
        mean = total.activation[i] / count
        values, vectors = symmetric_eigh(fisher)
        values = values.clamp_min(0)
        whitened = whitened_eigenvalues(fisher, mean, second_moment)
        for name, array in {
            "fisher": fisher,
            "normalised_fisher": total.normalised[i] / max(traced, 1),
            "activation_mean": mean,
            "activation_second_moment": second_moment,
            "eigenvalues": values,
            "eigenvectors": vectors,
            "whitened_eigenvalues": whitened,
        }.items():
            store.write(f"reduced/layer_{layer:03d}/{name}.npy", npy_bytes(array.numpy()))
        rows.append(
            {
                "layer": layer,
                "positions": count,
                "trace": float(fisher.trace()),
                "top_eigenvalue": float(values[0]),
                "participation_ratio": float(participation_ratio(values)),
                "entropy_rank": float(entropy_rank(values)),
                "trace_rank_99": int(trace_rank(values)),
                "whitened_trace": float(whitened.sum()),
                "whitened_top_eigenvalue": float(whitened[0]),
                "whitened_entropy_rank": float(entropy_rank(whitened)),
            }
        )
    return rows


def read_array(store: RunStore, layer: int, name: str) -> np.ndarray:
    """One of the arrays of :func:`reduce_shards`."""
    return np.load(io.BytesIO(store.read(f"reduced/layer_{layer:03d}/{name}.npy")), allow_pickle=False)


def write_summary(store: RunStore, rows: list[dict[str, Any]], receipts: Sequence[Receipt]) -> None:
    """reduced/provenance.json (counts, self-check, versions) and, last of all, summary.parquet, one row a layer."""
    provenance = {
        "counts": asdict(sum((receipt.counts for receipt in receipts), Counts())),
        "halvings": sum(receipt.halvings for receipt in receipts),
        "seconds": sum(receipt.seconds for receipt in receipts),
        "worker": receipts[0].worker,
    }
    store.write("reduced/provenance.json", (json.dumps(provenance, indent=1, sort_keys=True) + "\n").encode())
    store.write("reduced/summary.parquet", parquet_bytes(pa.Table.from_pylist(rows, schema=SUMMARY_SCHEMA)))
