"""What large runs would cost, from counts that tests hold against real runs, and seconds fitted to measurements made here.

    python benchmarks/scale.py check      # fit on small runs, predict others: some minutes
    python benchmarks/scale.py table      # hours and dollars of large runs: a minute, nothing is computed
    python benchmarks/scale.py limits     # which resource is used up first, and at how many actors

``check`` runs small models through the whole package in this process, fits seconds a task, a flop, a row and a byte, and says
how far the predictions for runs that were not fitted are off. ``table`` and ``limits`` take flop, bytes, requests and memory
from :class:`fisher_ray.cost.Cost`, and ASSUME the speeds and prices below, which are nobody's measurement: no GPU and no
object store of a cloud was at hand.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import transformers as tf
from overhead import save_model, save_text
from transformers import logging as transformers_logging

from fisher_ray import Sampled, cost, driver
from fisher_ray.cost import HARDWARE, Cost, outline
from fisher_ray.plan import MAX_SUMS, RunConfig, make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="+", choices=("check", "table", "limits"))
    parser.add_argument("--gpu", choices=sorted(HARDWARE), default="h100")
    parser.add_argument("--share", type=float, help="of the GPU's peak that is reached (measured on an H200)")
    parser.add_argument("--gpu-hour", type=float, default=Prices.gpu_hour, help="dollars; assumed")
    parser.add_argument(
        "--task-times", type=float, default=1.0, help="tasks larger than planned by so much (--task-bytes)"
    )
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hardware = HARDWARE[args.gpu]
    if args.share is not None:
        hardware = replace(hardware, share=dict.fromkeys(hardware.share, args.share))
    prices = Prices(gpu_hour=args.gpu_hour)
    for what in args.what:
        print(f"\n{what}", flush=True)
        if what == "check":
            check()
        elif what == "table":
            table(hardware, prices, replace(SERVICES, task_times=args.task_times))
        else:
            limits(hardware)


# ---- what is assumed -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prices:
    """Dollars, assumed in November 2026: a GPU-hour of an H100 between specialised clouds and the large ones' contracts, and
    Amazon's list prices for S3 Standard in us-east-1."""

    gpu_hour: float = 4.0
    put: float = 0.005 / 1000
    get: float = 0.0004 / 1000
    gb_month: float = 0.023


@dataclass(frozen=True)
class Services:
    """Speeds, assumed but for the driver's; seconds and bytes a second.

    Attributes:
        storage: of one actor with an object store; what cost.py takes for planning tasks.
        shared: of all actors together when they load one model.
        puts, gets: a second and prefix, as Amazon gives for S3.
        listing: of one request that lists a thousand names.
        driver: a task's time in the driver; measured, benchmarks/driver.py.
        boot: of a node.
        token_bytes: of text.
        task_times: tasks larger than planned by so much, as ``--task-bytes`` makes them.
    """

    storage: float = 200e6
    shared: float = 100e9
    puts: float = 3500.0
    gets: float = 5500.0
    listing: float = 0.1
    driver: float = 122e-6
    boot: float = 180.0
    token_bytes: float = 4.0
    task_times: float = 1.0


SERVICES = Services()


# ---- the model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A run of so many tokens on so many actors; seconds and dollars.

    Attributes:
        start: nodes and models.
        mapping: all tasks, in as many rounds as they make.
        reducing: the tree, level by level, and the eigenvalues at its root.
        stored: bytes that are left.
    """

    tasks: int
    task_seconds: float
    start: float
    mapping: float
    reducing: float
    stored: float
    dollars: float

    @property
    def hours(self) -> float:
        return (self.start + self.mapping + self.reducing) / 3600


def estimate(
    one: Cost, tokens: float, actors: int, gpus: int, hardware: Any, prices: Prices, services: Services = SERVICES
) -> Estimate:
    """Actors of ``gpus`` GPUs each, of which one computes at a time: a model over several goes through them in turn."""
    total = tokens * SERVICES.token_bytes
    tasks = math.ceil(total / one.task_bytes("cuda", int(total)) / services.task_times)
    computing = one.seconds(tokens / tasks, hardware)
    positions = tokens / tasks * one.share
    writing = (one.sums_bytes + positions * one.position_bytes) / SERVICES.storage
    each = max(computing, writing)  # two calls of an actor take turns
    mapping = max(math.ceil(tasks / actors) * each, tasks * SERVICES.driver)
    start = SERVICES.boot + one.weight_bytes * max(1 / SERVICES.storage / 10, actors / SERVICES.shared)
    tree = one.reduction(tasks)
    reducing = tree_seconds(one, tasks, actors) + decomposing_seconds(one, actors)
    stored = tasks * one.sums_bytes + tokens * one.share * one.position_bytes + tree.written
    puts, gets = tasks * one.requests + tree.puts, tasks + tree.gets
    hours = (start + mapping + reducing) / 3600
    dollars = hours * actors * gpus * prices.gpu_hour + puts * prices.put + gets * prices.get
    return Estimate(tasks, each, start, mapping, reducing, stored, dollars + stored / 1e9 * prices.gb_month)


def tree_seconds(one: Cost, tasks: int, actors: int) -> float:
    """Of the reduction: each level as many calls at once as there are actors, which read their children one by one."""
    calls = -(-len(one.layers) // one.layers_per_call)
    size = one.reduction(tasks).read / max(1, tasks)  # of a child, about
    seconds, children = 0.0, tasks
    while children > 1:
        nodes = -(-children // 32)
        rounds = math.ceil(nodes * calls / actors)
        seconds += rounds * min(32, children) * size / calls / SERVICES.storage
        children = nodes
    return seconds


def decomposing_seconds(one: Cost, actors: int) -> float:
    """Of the eigenvalues of each mean, and of what they are after whitening, by one thread of an actor; a sketch's are few.

    Measured on a core that multiplies 40 GFLOP/s, at widths of 768 to 2,048: 7.5e-10 s times the cube of the width.
    """
    calls = math.ceil(len(one.layers) / one.layers_per_call)
    means = one.layers_per_call * (1 + one.num_groups * (one.num_groups > 1))
    return 0.0 if one.sketch else math.ceil(calls / actors) * means * 7.5e-10 * one.model.d_model**3


# ---- large runs ----------------------------------------------------------------------------------------------------------

# Shapes of the published configurations, written out.
SHAPES: dict[str, tuple[Any, str, int]] = {
    "GPT-2 small": (tf.GPT2Config(), "float32", 1),
    "8B": (
        tf.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=8192,
        ),
        "bfloat16",
        1,
    ),
    "70B": (
        tf.LlamaConfig(
            vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, max_position_embeddings=8192,
        ),
        "bfloat16",
        8,
    ),
}  # fmt: skip


@contextmanager
def settings() -> Iterator[list[tuple[str, str, Cost, int]]]:
    """(model, what, cost, GPUs an actor) of every setting."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, dtype, gpus) in SHAPES.items():
            config.save_pretrained(Path(folder) / name)
            shapes = outline(str(Path(folder) / name), dtype=dtype)
            layers = tuple(range(shapes.num_layers + 1))
            rows = shapes.d_model // 16
            few = layers[:: max(1, len(layers) // 8)][-9:]
            found.append((name, f"all {len(layers)} streams in full", Cost(shapes, layers, Sampled(1)), gpus))
            chosen = layers if name == "GPT-2 small" else few
            what = f"{len(chosen)} streams, --sketch {rows}"
            found.append((name, what, Cost(shapes, chosen, Sampled(1), sketch=rows), gpus))
            if name != "GPT-2 small":
                found.append((name, f"{len(few)} streams in full", Cost(shapes, few, Sampled(1)), gpus))
        yield found


def fits(one: Cost, hardware: Any, gpus: int) -> str:
    if one.sums_memory > MAX_SUMS:
        return f"refused: {one.sums_memory / 2**30:.0f} GiB of sums"
    if one.fits(hardware, gpus) is not None:
        return f"no: {one.memory(1) / 2**30:.0f} GiB"
    return f"{one.memory(1) / 2**30:.0f} of {gpus * hardware.memory / 2**30:.0f} GiB"


def table(hardware: Any, prices: Prices, services: Services) -> None:
    rate = f"{hardware.rate('float32') / 1e12:.0f} and {hardware.rate('bfloat16') / 1e12:.0f} TFLOP/s"
    print(f"{hardware.name}: {rate} in float32 and half precision; ${prices.gpu_hour} an hour")
    print(
        "| model | sums | memory with one position | tokens | tasks | GPUs | hours | of them reducing | dollars | stored |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    with settings() as cases:
        for name, what, one, gpus in cases:
            room = fits(one, hardware, gpus)
            if not room[0].isdigit():
                print(f"| {name} | {what} | {room} | | | | | | | |", flush=True)
                continue
            for tokens in (1e9, 1e12):
                for count in (8, 64, 1024):
                    found = estimate(one, tokens, count // gpus, gpus, hardware, prices, services)
                    print(
                        f"| {name} | {what} | {room} | {'1 B' if tokens == 1e9 else '1 T'} | {found.tasks:,} | {count:,} | "
                        f"{_short(found.hours)} | {found.reducing / 3600 / found.hours:.0%} | {_short(found.dollars)} | "
                        f"{_bytes(found.stored)} |",
                        flush=True,
                    )


@dataclass(frozen=True)
class Limit:
    """Where a resource is used up: at so many actors, and what takes it away."""

    resource: str
    actors: float
    remedy: str


def limits_of(one: Cost, gpus: int, hardware: Any, tokens: float = 1e12) -> list[Limit]:
    """The number of actors from which on each resource holds the others up, fewest first."""
    found = estimate(one, tokens, 1, gpus, hardware, Prices())
    layers, tasks, each = len(one.layers), found.tasks, found.task_seconds
    computing = one.seconds(tokens / tasks, hardware)
    writing = each if each > computing else one.sums_bytes / SERVICES.storage
    compute_all = tasks * each
    doubled = (1 << i for i in range(22))
    slow_tree = next((n for n in doubled if tree_seconds(one, tasks, n) > 0.1 * compute_all / n), math.inf)
    found_limits = [
        Limit("tasks: fewer than actors", tasks, "more text a run"),
        Limit(
            "driver: handing out", each / SERVICES.driver, "more samples a position; a run for each part of the corpus"
        ),
        Limit(
            "storage: PUT of sums/", SERVICES.puts * each / layers, "fewer layers; the service splits prefixes in time"
        ),
        Limit("storage: PUT of done/", SERVICES.puts * each, "more samples a position; a run for each part"),
        Limit("reduction above 10 % of the time", slow_tree, "tasks for the GPU's real speed (--task-bytes)"),
        Limit(
            "loading: longer than a node boots",
            SERVICES.boot * SERVICES.shared / one.weight_bytes,
            "weights in the image or on the node's disk",
        ),
    ]
    if writing > computing:
        found_limits.append(Limit("writing a task takes longer than computing it", 1, "sketches, fewer layers"))
    return sorted(found_limits, key=lambda limit: limit.actors)


def limits(hardware: Any) -> None:
    with settings() as cases:
        for name, what, one, gpus in cases:
            if not fits(one, hardware, gpus)[0].isdigit():
                continue
            print(f"\n{name}, {what}, 1 T tokens; actors of {gpus} GPU{'s' * (gpus > 1)}")
            for limit in limits_of(one, gpus, hardware):
                print(f"  {limit.resource:46s} from {_short(limit.actors):>8s} actors on   {limit.remedy}")
            found = estimate(one, 1e12, 64, gpus, hardware, Prices())
            again = found.tasks / 1000 * SERVICES.listing
            print(f"  a resumed run lists receipts for {again:,.0f} s in one request after the other, and reads back")
            hours = found.stored / SERVICES.storage / 3600 / 64
            print(f"  {_bytes(found.stored)} on its actors, {hours:,.1f} h on 64 (--no-verify: none)")
            nodes = 32 * one.reduction(1024).read / 1024
            print(
                f"  a checkpoint of an early end reads up to {_bytes(3 * nodes)}: its blocks twice, and those before once"
            )


def _short(value: float) -> str:
    if math.isinf(value):
        return "none"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


# ---- against measurements ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A small run: what it did by the count, and what it took."""

    name: str
    one: Cost
    tasks: list[dict[str, float]]
    reducing: float
    total: float

    def counts(self, task: dict[str, float]) -> list[float]:
        """What a task's computing is made of: one task, flop, and rows of the table."""
        return [1.0, task["through"] * self.one.flop_per_token, task["scored"] * len(self.one.layers)]

    @property
    def writes(self) -> list[float]:
        """What a task's writing is made of: one task, files, and bytes of sums."""
        return [1.0, float(self.one.requests), float(self.one.sums_bytes)]

    @property
    def tree(self) -> list[float]:
        """What the reduction is made of: one run, files, bytes, decompositions of every layer, d^3 each, and passes that find
        the tokens that its first directions move."""
        traffic = self.one.reduction(len(self.tasks))
        files, layers = traffic.gets + traffic.puts, float(len(self.one.layers))
        return [
            1.0, files, traffic.read + traffic.written, layers * self.one.model.d_model**3, layers * self.one.weight_bytes,
        ]  # fmt: skip


# (width, samples, bytes of a task, tasks, layers): fitted on, and predicted.
FITTED = [
    (128, 1, 2_000, 4, "all"), (128, 4, 1_000, 34, "6"), (256, 1, 6_000, 3, "0,6"), (192, 2, 2_000, 5, "all"),
    (128, 2, 8_000, 2, "3"), (320, 1, 4_000, 3, "all"), (256, 2, 2_000, 12, "6"), (128, 1, 1_000, 36, "all"),
]  # fmt: skip
HELD_OUT = [
    (192, 1, 4_000, 6, "0,6"), (256, 2, 2_000, 5, "all"), (128, 1, 1_000, 36, "3,6"), (320, 1, 4_000, 4, "6"),
    (192, 4, 2_000, 16, "0,3,6"),
]  # fmt: skip


def check() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ran_one(Path(folder) / "warm-up", *FITTED[0])
        fitted, held_out = (
            [ran_one(Path(folder) / f"{kind}-{i}", *case) for i, case in enumerate(cases)]
            for kind, cases in (("fitted", FITTED), ("held-out", HELD_OUT))
        )
    rates = Rates.fit(fitted)
    rates.show()
    print(
        "| run | | tasks | computing, predicted | writing, predicted | reducing, predicted | in all | predicted | error |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind, runs in (("fitted", fitted), ("held out", held_out)):
        errors = []
        for ran in runs:
            found = rates.predict(ran)
            real = {stage: sum(task[stage] for task in ran.tasks) for stage in ("compute", "write")}
            errors.append(found["total"] / ran.total - 1)
            stages = (
                (real["compute"], found["compute"]),
                (real["write"], found["write"]),
                (ran.reducing, found["tree"]),
            )
            parts = " | ".join(f"{measured:.2f} / {predicted:.2f}" for measured, predicted in stages)
            last = f"{ran.total:.2f} | {found['total']:.2f} | {errors[-1]:+.0%}"
            print(f"| {ran.name} | {kind} | {len(ran.tasks)} | {parts} | {last} |")
        print(
            f"{kind}: {np.mean(np.abs(errors)):.1%} off in the mean, {max(map(abs, errors)):.0%} at worst", flush=True
        )


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of what runs are made of."""

    compute: list[float]
    write: list[float]
    tree: list[float]
    read: float
    start: float

    @classmethod
    def fit(cls, runs: list[Ran]) -> Rates:
        tasks = [(ran, task) for ran in runs for task in ran.tasks]
        rest = [
            ran.total - ran.reducing - sum(t["read"] + t["compute"] + t["write"] for t in ran.tasks) for ran in runs
        ]
        return cls(
            _fitted([ran.counts(task) for ran, task in tasks], [task["compute"] for _, task in tasks]),
            _fitted([ran.writes for ran, _ in tasks], [task["write"] for _, task in tasks]),
            _fitted([ran.tree for ran in runs], [ran.reducing for ran in runs]),
            sum(task["read"] for _, task in tasks) / sum(task["through"] for _, task in tasks),
            float(np.median(rest)),
        )

    def show(self) -> None:
        task, flop, row = self.compute
        print(
            f"computing: {task:.3g} s a task, {1e-9 / flop if flop else math.inf:.3g} GFLOP/s, {1e6 * row:.3g} us a row"
        )
        task, file, byte = self.write
        print(f"writing: {task:.3g} s a task, {1e3 * file:.3g} ms a file, {1e9 * byte:.3g} s a GB")
        print(f"reading: {1e6 * self.read:.3g} us a token")
        run, file, byte, cube, weight = self.tree
        print(
            f"reducing: {run:.3g} s a run, {1e3 * file:.3g} ms a file, {1e9 * byte:.3g} s a GB, {1e9 * cube:.3g} s for 1e9 of "
            f"L d^3, {1e9 * weight:.3g} s for a GB of weights and layer"
        )
        print(f"around it all: {self.start:.3g} s")

    def predict(self, ran: Ran) -> dict[str, float]:
        found = {
            "compute": sum(float(np.dot(ran.counts(task), self.compute)) for task in ran.tasks),
            "write": len(ran.tasks) * float(np.dot(ran.writes, self.write)),
            "read": sum(task["through"] for task in ran.tasks) * self.read,
            "tree": float(np.dot(ran.tree, self.tree)),
        }
        return {**found, "total": sum(found.values()) + self.start}


def _fitted(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Coefficients >= 0 with the least squared relative error."""
    from scipy.optimize import nnls

    a, b = np.array(rows), np.array(seconds)
    scale = a.max(0)
    found, _ = nnls(a / scale / b[:, None], np.ones(len(b)))
    return [float(value) for value in found / scale]


def ran_one(folder: Path, width: int, samples: int, task_bytes: int, tasks: int, layers: str) -> Ran:
    """A whole run in this process."""
    folder.mkdir()
    save_model(folder / "model", "mid", width)
    corpus = save_text(folder / "corpus", "mid", task_bytes * tasks)
    config = RunConfig(
        str(folder / "model"), (str(corpus),), str(folder / "run"), layers=layers, num_samples=samples, max_seq_len=128,
        executor="local", device="cpu",
    )  # fmt: skip
    reducing_since = 0.0
    reduce = driver._Run._reduce

    def timed(self: Any, last: int) -> Any:
        nonlocal reducing_since
        reducing_since = time.perf_counter()
        return reduce(self, last)

    with (
        mock.patch.multiple(cost, MIN_TASK_BYTES=task_bytes, MIN_BLOCK_BYTES=task_bytes),
        mock.patch.object(driver._Run, "_reduce", timed),
    ):
        one = make_plan(config).cost
        start = time.perf_counter()
        driver.run(config)
        end = time.perf_counter()
    done = []
    for path in sorted((folder / "run/done").glob("*.json")):
        receipt = json.loads(path.read_text())
        counts = receipt["counts"]
        # Windows of one task overlap and start with a sink: a tenth, about.
        done.append(
            {**receipt["seconds"], "scored": counts["scored"], "through": counts["tokens"] + counts["documents"]}
        )
    name = f"d = {width}, S = {samples}, {len(one.layers)} streams, {task_bytes // 1000} kB"
    return Ran(name, one, done, end - reducing_since, end - start)


if __name__ == "__main__":
    sys.exit(main())
