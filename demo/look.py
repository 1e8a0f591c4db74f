"""Reads a finished run with NumPy and pyarrow alone: where in the text is the model most, and least, sensitive?"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--layer", type=int, default=3)
    args = parser.parse_args()
    fisher = np.load(args.run / f"reduced/layer_{args.layer:03d}/fisher.npy", mmap_mode="r")
    print(f"layer {args.layer}: mean F {fisher.shape}, trace {np.trace(fisher):.4g}")

    table = pq.read_table(args.run / "positions", filters=pc.field("layer") == args.layer)
    if "kind" in table.column_names:
        print("\nmean trace and entropy (nats) by kind of document:")
        for row in table.group_by("kind").aggregate([("trace", "mean"), ("entropy", "mean")]).to_pylist():
            print(f"  {row['kind']:10s} {row['trace_mean']:8.4f} {row['entropy_mean']:8.3f}")
    table = table.sort_by([("document", "ascending"), ("position", "ascending")])
    order = np.argsort(table["trace"].to_numpy())
    for title, chosen in (("most", order[::-1][:8]), ("least", order[:8])):
        print(f"\n{title} sensitive: trace, entropy, and the token with the text before it")
        for i in chosen.tolist():
            row = table.slice(i, 1).to_pylist()[0]
            before = table.slice(max(0, i - min(12, row["position"])), min(12, row["position"]))["text"].to_pylist()
            line = f"{''.join(before)}[{row['text']}]".replace("\n", "⏎")
            print(f"  {row['trace']:9.4g} {row['entropy']:6.3f}  {line}")


if __name__ == "__main__":
    main()
