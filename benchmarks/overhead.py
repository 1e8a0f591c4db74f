"""What a job costs beside the engine: one actor's tokens/s over those of the engine alone, in one run, taking turns.

    python benchmarks/overhead.py

Both compute the same tasks with the same threads: the engine in this process (windows, scores, sums and statistics, nothing
read, tokenized or written), the job by one Ray actor, from the first task's start to the last one's end. Starting Ray and
loading the model come once a run and are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch
import transformers as tf

from fisher_ray.cluster import RayPool
from fisher_ray.driver import run
from fisher_ray.plan import RunConfig, make_plan
from fisher_ray.shards import RunStore
from fisher_ray.worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="blocks of the model (6)")
    parser.add_argument("--width", type=int, default=256, help="d_model (256)")
    parser.add_argument("--documents", type=int, default=400, help="of 256 tokens (400)")
    parser.add_argument("--turns", type=int, default=3, help="(3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), args.layers, args.width, args.documents)
        bare, job = [], []
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        for turn in range(args.turns):
            bare.append(engine(config))
            job.append(one_actor(config, f"{folder}/run{turn}"))
            print(
                f"turn {turn}: engine {bare[-1]:.1f} tokens/s, job {job[-1]:.1f}, ratio {job[-1] / bare[-1]:.3f}",
                flush=True,
            )
    ratios = [j / b for j, b in zip(job, bare, strict=True)]
    print(
        f"job / engine: {statistics.median(ratios):.3f} (median of {args.turns}, {min(ratios):.3f} to {max(ratios):.3f})"
    )


def prepare(folder: Path, layers: int, width: int, documents: int) -> RunConfig:
    """A model with random weights, and token ids to read."""
    torch.manual_seed(0)
    shape = tf.GPT2Config(n_layer=layers, n_embd=width, n_head=width // 32, n_positions=257, vocab_size=8192)
    tf.GPT2LMHeadModel(shape).save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(0, 8192, (documents, 256))
    np.save(folder / "ids.npy", ids)
    return RunConfig(
        str(folder / "model"), (str(folder / "ids.npy"),), str(folder / "run"), max_actors=1, max_seq_len=257
    )


def engine(config: RunConfig) -> float:
    """Tokens a second of the worker's own scoring, without reading, writing and receipts."""
    plan = make_plan(config).on("cpu")
    worker = Worker(plan, RunStore(config.output))
    work = [worker._tokenize(task) for task in plan.make_tasks()]
    tokens = sum(len(ids) for each in work for ids in each.tokens)
    worker._score_all(work[0])  # warm
    begun = time.perf_counter()
    for each in work:
        worker._score_all(each)
    return tokens / (time.perf_counter() - begun)


def one_actor(config: RunConfig, output: str) -> float:
    """Tokens a second of a job's map, after its first task."""
    run(replace(config, output=output), RayPool, lambda plan: nullcontext(lambda progress: None))
    receipts = sorted(
        ((path.stat().st_mtime, json.loads(path.read_text())) for path in Path(output).glob("done/*.json")),
        key=lambda pair: pair[0],
    )
    # From the end of the first task to that of the last: what lies between is all steady state.
    tokens = sum(receipt["counts"]["tokens"] for _, receipt in receipts[1:])
    return tokens / (receipts[-1][0] - receipts[0][0])


if __name__ == "__main__":
    main()
