"""What reading ten million positions through a filter takes: seconds, and by how much the process grows.

    python benchmarks/reader.py --rows 10000000

A run directory is made up first, its shards of 100,000 rows each; then a process of its own opens it and

* counts the rows of one layer with a trace above the 99.9th percentile, and reads four of their columns;
* goes over one column of all rows, batch by batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from fisher_ray import open_run
from fisher_ray.plan import RunConfig
from fisher_ray.shards import RUN_VERSION, TOP_EIGENVALUES, Counts, Receipt, RunStore, parquet_bytes, positions_schema
from fisher_ray.storage import StoredFile

ROWS = 100_000
LAYERS = 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_up(folder, args.rows // ROWS)
        print(f"{args.rows:,} rows in {args.rows // ROWS} files, {size / 2**20:,.0f} MiB", flush=True)
        process = multiprocessing.get_context("spawn").Process(target=read, args=(folder,))
        process.start()
        process.join()


def make_up(folder: str, tasks: int) -> int:
    """A run whose positions are random numbers; its bytes."""
    store, random, size = RunStore(folder), np.random.default_rng(0), 0
    schema = positions_schema((), {})
    config = RunConfig("made-up", ("made-up",), folder)
    for task in range(tasks):
        numbers = {f.name: random.lognormal(size=ROWS).astype(np.float32) for f in schema if f.type == pa.float32()}
        offsets = np.arange(ROWS + 1, dtype=np.int32) * TOP_EIGENVALUES
        values = random.lognormal(size=ROWS * TOP_EIGENVALUES).astype(np.float32)
        at = np.arange(ROWS) // LAYERS
        columns = {
            **numbers,
            "document": [f"text-{task:05d}.jsonl:{i // 500 * 4000}" for i in at],
            "position": at % 500,
            "layer": np.arange(ROWS) % LAYERS,
            "token": random.integers(0, 50_000, ROWS),
            "text": [f" t{i}" for i in random.integers(0, 50_000, ROWS)],
            "context": at % 500,
            "top_eigenvalues": pa.ListArray.from_arrays(offsets, values),
        }
        raw = parquet_bytes(pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema))
        stored = store.store(f"positions/{task:08d}-00000000.parquet", raw, ROWS)
        store.commit("done", Receipt(f"{task:08d}", "made-up", {"positions": stored}, Counts(scored=ROWS // LAYERS)))
        size += len(raw)
    store.create_run(
        {
            "schema": RUN_VERSION, "config": config.asdict(), "fingerprint": "made-up", "layers": list(range(LAYERS)),
            "d_model": 768, "tasks": tasks, "plan": vars(StoredFile("plan.parquet", "", 0)), "estimand": "random numbers",
        },
        b"",
    )  # fmt: skip
    return size


def read(folder: str) -> None:
    assert open_run  # it and what it imports are there before memory is looked at
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far, which is the parent's; Linux
    say("nothing read yet")
    start = time.perf_counter()
    run = open_run(folder)
    positions = run.positions()
    say(f"opened in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    columns = ["document", "position", "text", "trace"]
    large = positions.to_table(columns, (ds.field("layer") == 3) & (ds.field("trace") > float(np.exp(3.09))))
    say(f"{len(large):,} rows of layer 3 in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    count = sum(np.asarray(batch["trace"]).size for batch in positions.to_batches(columns=["trace"], batch_readahead=4))
    say(f"{count:,} rows of one column in {time.perf_counter() - start:.1f} s")


def say(what: str) -> None:
    """What was done, and the process's largest size so far."""
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    print(f"{what}: {peak / 1024:,.0f} MiB at most so far", flush=True)


if __name__ == "__main__":
    main()
