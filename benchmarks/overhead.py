"""What a job costs beyond its arithmetic: one actor on Ray against the bare engine on the same tokens with the same threads.

    python benchmarks/overhead.py --model mid  # 6 layers, d = 256, text and the demo's tokenizer
    python benchmarks/overhead.py --model gpt2 --tasks 2 --task-bytes 16384 --repeats 1  # GPT2Config(), token ids

Three things take turns in one call:

* ``engine``: ``iter_scores`` and ``Sums.add`` over all tasks' batches, tokenized beforehand, in this process;
* ``worker``: ``Worker.compute`` of all tasks one after the other in this process: reads, tokenizes, scores, computes the
  table's columns, writes and commits;
* ``job``: ``driver.run`` with one actor on Ray, a new directory each time. Its map phase is from the start of the first task
  to the end of the last, as the receipts tell: start-up and reduction are printed apart.

The ratio of the job's rate to the engine's is what the rest costs; the lines below it say where it goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["RAY_AUTH_MODE"] = "disabled"  # the cluster here is this machine's own
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import ray
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers import logging as transformers_logging

from fisher_ray import cost, worker
from fisher_ray.cluster import RayPool
from fisher_ray.driver import run
from fisher_ray.plan import Plan, RunConfig, Task, make_plan
from fisher_ray.shards import RunStore
from fisher_ray.sums import Sums
from fisher_ray.worker import Worker

DEMO = Path(__file__).parent.parent / "demo"
SEQ_LEN = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("mid", "gpt2"), default="mid")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--task-bytes", type=int, help="of text, or 4 a token id (what the plan of a large corpus has)")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    save_model(folder / "model", args.model)
    config = RunConfig(
        str(folder / "model"),
        (str(save_text(folder / "small", args.model, 20_000)),),
        str(folder / "warm-up"),
        layers=args.layers,
        num_samples=args.num_samples,
        max_seq_len=SEQ_LEN,
        cpus_per_actor=args.threads,
        max_actors=1,
    )
    planned = make_plan(config).cost.task_bytes("cpu", 1 << 60)
    size = args.task_bytes or planned
    corpus = save_text(folder / "corpus", args.model, size * args.tasks)
    config = replace(config, corpus=(str(corpus),))
    # A corpus this small would be cut into 32 tasks otherwise.
    with mock.patch.multiple(cost, MIN_TASK_BYTES=size, MIN_BLOCK_BYTES=size):
        plan = make_plan(config).on("cpu")
        tasks = list(plan.make_tasks())
        ray.init(num_cpus=args.threads, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        engine = Worker(replace(plan, sources=()), RunStore(config.output))
        works = [engine._tokenize(task) for task in tasks]
        tokens = sum(len(work.tokens[i]) for work in works for i in range(len(work.tokens)))
        print(
            f"{args.model}: {args.threads} threads, {len(plan.layers)} streams, S = {args.num_samples}; {len(tasks)} tasks of "
            f"{size:,} bytes ({planned:,} in a large corpus), {tokens:,} tokens; median of {args.repeats}",
            flush=True,
        )
        bare(engine, works[:1])
        seconds: dict[str, list[float]] = {}
        for i in range(args.repeats):
            taken = {
                "engine": bare(engine, works),
                **in_worker(plan, engine, tasks, str(folder / f"worker-{i}")),
                **job(replace(config, output=str(folder / f"job-{i}"))),
                "engine again": bare(engine, works),
            }
            said = ", ".join(f"{name} {taken[name]:.1f} s" for name in ("engine", "worker", "job", "engine again"))
            print(f"round {i + 1}: {said}", flush=True)
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
        ray.shutdown()
    report(seconds, tokens)


def report(seconds: dict[str, list[float]], tokens: int) -> None:
    each = {name: statistics.median(values) for name, values in seconds.items()}
    rounds = zip(seconds["engine"], seconds["engine again"], strict=True)
    engines = [(before + after) / 2 for before, after in rounds]
    engine, job_ = statistics.median(engines), each["job"]
    ratios = [e / j for e, j in zip(engines, seconds["job"], strict=True)]
    print(f"\nengine  {tokens / engine:10.1f} tokens/s  {engine:8.2f} s")
    print(f"worker  {tokens / each['worker']:10.1f} tokens/s  {each['worker']:8.2f} s")
    print(f"job     {tokens / job_:10.1f} tokens/s  {job_:8.2f} s")
    print(f"job / engine: {statistics.median(ratios):.3f}   (each round: {', '.join(f'{r:.3f}' for r in ratios)})")
    print(f"the engine against itself, before and after: {max(_apart(seconds)):.3f} at most\n")
    for name, value in {
        "in this process, one task after the other": None,
        "  scoring beyond the engine": each["worker: compute"] - engine,
        "    of it the table's columns": each["worker: columns"],
        "  reading and tokenizing": each["worker: read"],
        "  writing and committing": each["worker: write"],
        "in the actor, where two calls take turns": None,
        "  computing beyond the engine": each["job: compute"] - engine,
        "  reading, some of it behind computing": each["job: read"],
        "  writing, some of it behind computing": each["job: write"],
        "  nothing computing": job_ - each["job: compute"],
        "outside the map phase": None,
        "  until the first task starts": each["job: start"],
        "  from the last task's end": each["job: end"],
    }.items():
        print(name if value is None else f"{name:46s} {value:8.2f} s  {value / engine:7.1%} of the engine's time")


def _apart(seconds: dict[str, list[float]]) -> list[float]:
    pairs = zip(seconds["engine"], seconds["engine again"], strict=True)
    return [max(a, b) / min(a, b) for a, b in pairs]


# ---- what is timed -------------------------------------------------------------------------------------------------------


def bare(engine: Worker, works: list[Any]) -> float:
    """Seconds of scores and sums alone."""
    start = time.perf_counter()
    for work in works:
        sums = Sums(engine.layers, engine.model.d_model)
        for batch in engine._batches(work.windows):
            for scores in engine._scores(batch, work):
                for layer in engine.layers:
                    sums.add(layer, scores.factors[layer], scores.activations[layer])
    return time.perf_counter() - start


def in_worker(plan: Plan, engine: Worker, tasks: list[Task], output: str) -> dict[str, float]:
    """Seconds of all tasks in this process, by stage."""
    engine.store = RunStore(output)
    columns = 0.0

    def timed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal columns
            start = time.perf_counter()
            result = real(*args)
            columns += time.perf_counter() - start
            return result

        return call

    stages: Counter[str] = Counter()
    start = time.perf_counter()
    with (
        mock.patch.object(worker, "_statistics", timed(worker._statistics)),
        mock.patch.object(worker, "_per_position", timed(worker._per_position)),
    ):
        for task in tasks:
            stages.update(engine.compute(task).seconds)
    return {
        "worker": time.perf_counter() - start,
        **{f"worker: {stage}": value for stage, value in stages.items()},
        "worker: columns": columns,
    }


def job(config: RunConfig) -> dict[str, float]:
    """Seconds of the map phase of a whole job, of what comes before and after it, and of all receipts by stage."""
    start = time.time()
    outcome = run(config, RayPool)
    end = time.time()
    store = outcome.store
    ended = {path.stem: path.stat().st_mtime for path in Path(config.output, "done").glob("*.json")}
    receipts = {name: store.receipt("done", name) for name in ended}
    first = min(ended, key=ended.__getitem__)
    # The first to end waited for no other, so its stages follow one another.
    began = ended[first] - sum(receipts[first].seconds.values())
    stages: Counter[str] = Counter()
    for receipt in receipts.values():
        stages.update(receipt.seconds)
    last = max(ended.values())
    return {
        "job": last - began,
        "job: start": began - start,
        "job: end": end - last,
        **{f"job: {stage}": value for stage, value in stages.items()},
    }


# ---- what it is run on ---------------------------------------------------------------------------------------------------


def save_model(folder: Path, kind: str, width: int = 256) -> None:
    """``mid`` of another width has heads of the same size."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config())
    else:
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
        sizes = {"n_layer": 6, "n_embd": width, "n_head": width // 32, "n_positions": 512, "vocab_size": len(tokenizer)}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def save_text(path: Path, kind: str, size: int) -> Path:
    """The demo's documents over and over; for GPT-2's size random token ids, 4 bytes each."""
    if kind == "gpt2":
        path = path.with_suffix(".npy")
        rows = max(1, size // (4 * SEQ_LEN))
        np.save(path, np.random.default_rng(0).integers(50257, size=(rows, SEQ_LEN - 1), dtype=np.int32))
        return path
    path = path.with_suffix(".jsonl")
    lines = (DEMO / "corpus.jsonl").read_text().splitlines(keepends=True)
    text: list[str] = []
    while sum(map(len, text)) < size:
        text += lines
    path.write_text("".join(text)[:size].rpartition("\n")[0] + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
