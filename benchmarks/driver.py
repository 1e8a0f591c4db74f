"""What the driver itself costs at a million tasks: planning, handing out, and finding out what is done.

    python benchmarks/driver.py plan resume simulated     # about ten minutes, no Ray
    python benchmarks/driver.py ray --actors 50           # 50 processes of some 400 MB

* ``plan``: ``make_plan`` and ``make_tasks`` over one sparse text file, over sparse files on a local disk, and over the
  listing of an object store.
* ``resume``: the listing of all done markers, and what follows from it, with everything done.
* ``simulated``: the real ``_Run``, ``Dispatch`` and ``RayPool`` over a stand-in for ``ray`` whose actors answer at once; and
  over a pool that does nothing, which leaves what does not depend on Ray.
* ``failures``: the same over a simulated cluster of 10,000 actors, whose machines come on demand, die and dawdle.
* ``ray``: the same over real actors on logical CPUs that answer with a receipt at once.

Every case runs in a process of its own. Memory is by how much its resident size grew.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import multiprocessing
import os
import pstats
import resource
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["RAY_AUTH_MODE"] = "disabled"  # the cluster here is this machine's own

from fsspec.implementations.memory import MemoryFileSystem
from standin import StandIn, Weather

from fisher_ray import cluster
from fisher_ray.dispatch import Call, LocalPool
from fisher_ray.driver import _for_workers, _Run, _Stop
from fisher_ray.plan import Plan, RunConfig, Task, make_plan
from fisher_ray.reduce import levels, roots
from fisher_ray.shards import Counts, Lease, Receipt, RunStore, task_name
from fisher_ray.storage import StoredFile

MODEL = str(Path(__file__).parent.parent / "demo/model")
MIB = 1 << 20
# One entry of an S3 answer of up to 1,000, as the service sends it.
_ENTRY = (
    "<Contents><Key>runs/name-of-a-run/done/00000000.json</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag><ChecksumAlgorithm>CRC32</ChecksumAlgorithm>"
    "<ChecksumType>FULL_OBJECT</ChecksumType><Size>1500</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="+", choices=("plan", "resume", "simulated", "failures", "ray"))
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1_000, help="simulated ones")
    parser.add_argument("--actors", type=int, default=50, help="real ones")
    parser.add_argument("--failing", type=int, default=10_000, help="actors of the cluster that fails")
    parser.add_argument("--failing-tasks", type=int, default=200_000)
    parser.add_argument("--ray-tasks", type=int, default=20_000)
    parser.add_argument(
        "--profile", action="store_true", help="print where a simulated run's time goes; it takes longer"
    )
    args = parser.parse_args()
    few = max(1, args.tasks // 10)
    for what in args.what:
        print(f"\n{what}", flush=True)
        if what == "plan":
            for tasks in (few, args.tasks):
                _apart(plan_text, tasks)
            _apart(plan_files, few)
            _apart(plan_listed, args.tasks)
        elif what == "resume":
            _apart(resume, args.tasks)
        elif what == "simulated":
            _apart(simulated, "no pool", args.tasks, args.workers, 1, args.profile)
            for burst in (1, 32):
                _apart(simulated, "RayPool", args.tasks, args.workers, burst, args.profile)
        elif what == "failures":
            _apart(failures, args.failing_tasks, args.failing)
        else:
            _apart(on_ray, args.actors, args.ray_tasks, args.profile)


def _apart(case: Callable[..., None], *args: Any) -> None:
    """Run a case in a process of its own, whose memory nothing else has grown."""
    process = multiprocessing.get_context("spawn").Process(target=case, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{case.__name__}{args} failed")


class _Measured:
    """Seconds, and MiB by which the process's largest resident size grew."""

    def __enter__(self) -> _Measured:
        Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far; Linux
        self._before, self._start = _resident(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        self.grown, self.kept = max(0.0, peak - self._before), _resident() - self._before

    def __str__(self) -> str:
        return f"{self.seconds:8.2f} s, memory +{self.grown:,.0f} MiB at its peak, +{self.kept:,.0f} MiB kept"


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


def _say(name: str, measured: _Measured, more: str = "") -> None:
    print(f"{name:48s} {measured}{more}", flush=True)


# ---- planning ------------------------------------------------------------------------------------------------------------


def _config(corpus: str | Path, output: str = "memory://run", **settings: Any) -> RunConfig:
    return RunConfig(MODEL, (str(corpus),), output, **settings)


def _start_of_text() -> bytes:
    """What planning looks at; the rest of a sparse file is zeros that nobody reads."""
    return b"a line of text\n" * 5000


def _target(folder: str) -> int:
    """Bytes of a task of a corpus that is large enough."""
    small = Path(folder) / "small.txt"
    small.write_bytes(_start_of_text())
    return make_plan(_config(small)).cost.task_bytes("cpu", 1 << 60)


def _planned(name: str, config: RunConfig, expected: int) -> None:
    make_plan(_config(Path(__file__).parent.parent / "demo/corpus.jsonl")).cost  # noqa: B018  the model's outline, loaded once
    with _Measured() as measured:
        plan = make_plan(config).on("cpu")
        tasks = plan.make_tasks()
    assert len(tasks) == expected, (len(tasks), expected)
    more = f"; plan.parquet {len(tasks.raw) / MIB:.2f} MiB, {len(tasks.raw) / len(tasks):.1f} B a task"
    _say(f"{expected:,} tasks from {name}", measured, more)
    with _Measured() as measured:
        assert sum(1 for _ in tasks) == expected
    _say("  all of them decoded, one at a time", measured)
    start = time.perf_counter()
    assert tasks[expected // 2].id == expected // 2
    print(f"  one of them decoded: {1e3 * (time.perf_counter() - start):.1f} ms", flush=True)


def plan_text(tasks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_bytes(_start_of_text())
        os.truncate(corpus, tasks * _target(folder))
        _planned("a text file", _config(corpus), tasks)


def plan_files(tasks: int) -> None:
    """Three local files a task."""
    with tempfile.TemporaryDirectory() as folder:
        size = int(_target(folder) * 0.3)
        corpus = Path(folder) / "corpus"
        for i in range(3 * tasks):
            if i % 1000 == 0:
                (corpus / f"{i // 1000:05d}").mkdir(parents=True)
            path = corpus / f"{i // 1000:05d}/{i % 1000:03d}.txt"
            path.write_bytes(_start_of_text()[:size] if i == 0 else b"")
            os.truncate(path, size)
        _planned("three local files each", _config(corpus), tasks)


def plan_listed(tasks: int) -> None:
    """One object a task: as many objects as tasks."""
    with tempfile.TemporaryDirectory() as folder:
        size = int(_target(folder) * 0.6)
    first = _start_of_text()[:size].ljust(size, b"\n")
    MemoryFileSystem().pipe_file("/corpus/part-0000000.txt", first)
    with _listing("/corpus", (f"part-{i:07d}.txt" for i in range(1, tasks)), size):
        _planned("an object each, listed", _config("memory://corpus"), tasks)


@contextmanager
def _listing(folder: str, names: Iterable[str], size: int) -> Iterator[None]:
    """Adds to one listing of a folder in memory what an object store would tell of so many objects."""
    found = MemoryFileSystem.find

    def find(self: MemoryFileSystem, path: str, *args: Any, **options: Any) -> Any:
        listed = found(self, path, *args, **options)
        if path.rstrip("/") == folder:
            for i, name in enumerate(names):
                key = f"{folder}/{name}"
                listed[key] = {
                    "Key": key,
                    "LastModified": datetime.fromtimestamp(1.7e9 + i, UTC),
                    "ETag": f'"{i:032x}"',
                    "ChecksumAlgorithm": ["CRC32"],
                    "ChecksumType": "FULL_OBJECT",
                    "Size": size,
                    "StorageClass": "STANDARD",
                    "type": "file",
                    "size": size,
                    "name": key,
                }
        return listed

    with mock.patch.object(MemoryFileSystem, "find", find):
        yield


# ---- a run without its computing -------------------------------------------------------------------------------------------


@contextmanager
def _a_run(tasks: int, pool: Any, **settings: Any) -> Iterator[_Run]:
    """The driver's own object, over a plan of so many tasks and a store in memory."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_bytes(_start_of_text())
        os.truncate(corpus, tasks * _target(folder))
        config = RunConfig(MODEL, (str(corpus),), "memory://run", **settings)
        plan = make_plan(config).on("cpu")
        planned = plan.make_tasks()
    assert len(planned) == tasks
    store = RunStore(config.output)
    lease = Lease(store)
    try:
        yield _Run(plan, planned, store, pool, lease, _Stop(), lambda progress: None)
    finally:
        lease.release()


def _receipt(plan: Plan, task: int) -> Receipt:
    """As large as a real one."""
    name = task_name(task)
    files = {
        key: StoredFile(f"sums/{name}-01234567/{key}.npz", "0" * 64, 12_345, None)
        for key in ("positions", *(f"sums_{layer}" for layer in plan.layers))
    }
    versions = dict.fromkeys(("python", "torch", "transformers", "pyarrow", "numpy"), "1.2.3")
    seconds = {"read": 0.01, "compute": 1.0, "write": 0.02}
    counts = Counts(documents=40, tokens=8_000, scored=8_000)
    return Receipt(name, plan.fingerprint, files, counts, seconds, {"device": "cpu", "versions": versions})


def resume(tasks: int) -> None:
    """Everything is done: what the same command finds out before it looks at what was reduced."""
    with _a_run(tasks, _Echo(1_000)) as run:
        names = (f"{task_name(i)}.json" for i in range(tasks))
        with _listing("/run/done", names, 1_500), _Measured() as measured:
            done = run.store.names("done")
        assert len(done) == tasks
        requests = -(-tasks // 1_000)
        more = f"; of S3 {requests:,} requests, {tasks * len(_ENTRY) / MIB:,.0f} MiB of answers"
        _say(f"{tasks:,} done markers listed", measured, more)
        with mock.patch.object(run.store, "names", lambda folder: done if folder == "done" else set()):
            with _Measured() as measured:
                assert run._take_stock() == tasks
            _say("  taken stock of, the listing apart", measured)
            with _Measured() as measured:
                run._map(len(run.tasks), check=True)
            _say("  checks handed out to a pool that does nothing", measured)
            with _Measured() as measured:
                list(run._reduced_before(roots(run.plan, tasks, [])) or [])
            _say("  looked whether it is reduced", measured)
        with _Measured() as measured:
            (tree,) = roots(run.plan, tasks, [])
            nodes = [node.name for level in levels(tree) for node in level]
        _say(f"  {len(nodes):,} sums named, {len(levels(tree))} levels", measured)
        missing = 10
        start = time.perf_counter()
        with _listing("/run/tree", [f"{node}.json" for node in nodes], 1_500):
            for task in range(0, tasks, tasks // missing):
                run._undo(task)
        print(f"  one damaged task undone: {1e3 * (time.perf_counter() - start) / missing:.0f} ms", flush=True)


class _Echo(LocalPool):
    """Workers that have always just finished, the oldest call first: what is left is the driver's own work."""

    def __init__(self, workers: int):
        self.alive, self.plan = workers, None
        self._free = 2 * workers
        self._queue: deque[tuple[int, Call]] = deque()
        self._keys = 0

    def room(self, alone: bool, avoid: Collection[Any]) -> Any:
        return self if self._free else None

    def submit(self, worker: Any, call: Call, alone: bool) -> int:
        self._free -= 1
        self._keys += 1
        self._queue.append((self._keys, call))
        return self._keys

    def wait(self, timeout: float) -> list[tuple[Any, Any]]:
        self._free += 1
        key, call = self._queue.popleft()
        if call.method == "check":
            return [(key, (Counts(documents=len(call.args[1])), []))]
        return [(key, _receipt(self.plan, call.args[0].id))]


def simulated(over: str, tasks: int, workers: int, burst: int, profile: bool) -> None:
    pool: Any = _Echo(workers) if over == "no pool" else cluster.RayPool(_config("none", max_actors=workers))
    with _a_run(tasks, pool) as run:
        pool.plan = run.plan
        stand_in = StandIn(lambda call: _receipt(run.plan, call.args[0].id), Weather(), burst=burst)
        with stand_in.in_place(pool) if over == "RayPool" else nullcontext():
            if over == "RayPool":
                _staffed(pool, run, workers)
            start = time.perf_counter()
            for _ in range(100):
                _receipt(run.plan, 0)
            own = (time.perf_counter() - start) / 100
            with _Measured() as measured, _profiled(profile):
                assert run._take_stock() == 0
                run._map(len(run.tasks), check=False)
        assert run.computed == tasks
        name = f"{over}, {workers:,} workers" + (f", {burst} ended at a time" if over == "RayPool" else "")
        each = measured.seconds / tasks - own
        _say(f"{tasks:,} tasks, {name}", measured, f"; {1e6 * each:.1f} us a task without making its receipt")


def _staffed(pool: cluster.RayPool, run: _Run, workers: int) -> None:
    """Open a pool over the stand-in, and wait until all workers are there."""
    pool._gpus = 0.0
    pool.open(_for_workers(run.plan))
    while pool.alive < workers:
        pool.resize(workers, workers)
        pool.wait(1.0)


@dataclass(frozen=True)
class Simulated:
    """What became of a simulated run.

    Attributes:
        wall: seconds until the last task was done.
        ideal: seconds that all actors would take from the first moment on, with nothing failing and nothing uneven.
        useful, lost, held: actor-seconds: of attempts that counted, of those that did not, and of actors with their model.
        driver: seconds of the driver's own.
    """

    tasks: int
    wall: float
    ideal: float
    useful: float
    lost: float
    held: float
    driver: float
    deaths: int
    losses: int
    peak: int
    retried: int
    quarantined: int


def schedule(tasks: int, actors: int, weather: Weather, seed: int = 0, charged: bool = True) -> Simulated:
    """The real driver, dispatch and pool over a simulated cluster, from no node at all to the last task.

    Every task ends exactly once, or this raises.
    """
    pool = cluster.RayPool(_config("none", max_actors=actors, task_timeout=None))
    with _a_run(tasks, pool) as run:
        receipts: Counter[str] = Counter()
        stand_in = StandIn(lambda call: _receipt(run.plan, call.args[0].id), weather, seed, charged=charged)
        computed = run._computed

        def ended(task: Task, receipt: Receipt) -> None:
            receipts[receipt.name] += 1
            computed(task, receipt)

        with stand_in.in_place(pool), mock.patch.object(run, "_computed", ended):
            pool._gpus = 0.0
            pool.open(_for_workers(run.plan))
            run._map(len(run.tasks), check=False)
            wall = stand_in.now
            for member in list(pool._members):
                pool._drop(member)
        assert set(receipts.values()) == {1} and len(receipts) + len(run.quarantined) == tasks
        return Simulated(
            tasks,
            wall,
            stand_in.work / actors,
            stand_in.useful,
            stand_in.lost,
            stand_in.held,
            stand_in.driver_seconds,
            stand_in.deaths,
            stand_in.losses,
            stand_in.peak,
            run.dispatch.retried,
            len(run.quarantined),
        )


# Spot machines on a bad day; a task as the plan cuts them, of some minutes.
BAD_DAY = Weather(
    compute=200.0, spread=0.3, stragglers=0.001, straggling=10.0, io=4.0, boot=180.0, load=60.0, nodes_per_second=2.0,
    actor_lives=48 * 3600.0, node_lives=24 * 3600.0,
)  # fmt: skip


def failures(tasks: int, actors: int) -> None:
    """The same work on the same cluster, with what goes wrong coming in one by one."""
    calm = Weather(compute=BAD_DAY.compute, spread=BAD_DAY.spread, io=BAD_DAY.io)
    slow = replace(BAD_DAY, actor_lives=math.inf, node_lives=math.inf, stragglers=0.0)
    cases = {
        "nothing fails, all nodes there": calm,
        "nodes come on demand": slow,
        "and stragglers": replace(slow, stragglers=BAD_DAY.stragglers),
        "and processes and nodes die": BAD_DAY,
        "ten times as often": replace(
            BAD_DAY, actor_lives=BAD_DAY.actor_lives / 10, node_lives=BAD_DAY.node_lives / 10
        ),
    }
    for name, weather in cases.items():
        with _Measured() as measured:
            found = schedule(tasks, actors, weather)
        print(
            f"{name:32s} wall {found.wall / 3600:.2f} h, {found.wall / found.ideal:.3f} of the ideal; actors useful "
            f"{found.useful / found.held:.1%} of their time, work lost {found.lost / found.useful:.2%}; {found.deaths} "
            f"processes and {found.losses} nodes died, {found.retried} attempts more, {found.quarantined} given up; driver "
            f"{found.driver:.0f} s of CPU, {1e6 * found.driver / tasks:.0f} us a task, {found.driver / found.wall:.1%} of "
            f"the time, memory +{measured.grown:.0f} MiB with the simulation's own",
            flush=True,
        )


@contextmanager
def _profiled(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    pstats.Stats(profile).sort_stats("tottime").print_stats(16)


# ---- on Ray --------------------------------------------------------------------------------------------------------------


class _NoOp:
    """An actor that has nothing to load and answers with a receipt at once."""

    def __init__(self, plan: Plan):
        self._plan = plan

    def ready(self) -> str:
        return "node"

    def answer(self, call: Call) -> Receipt:
        return _receipt(self._plan, call.args[0].id)


def on_ray(actors: int, tasks: int, profile: bool) -> None:
    cluster.ray.init(num_cpus=actors, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    _NoOp.__module__ = _receipt.__module__ = "__main__"  # sent along with the actors, which cannot import this file
    with (
        mock.patch.object(cluster, "_Actor", _NoOp),
        cluster.RayPool(_config("none")) as pool,
        _a_run(tasks, pool, max_actors=actors) as run,
    ):
        pool.open(_for_workers(run.plan))
        with _Measured() as measured:
            while pool.alive < actors:
                pool.resize(tasks, tasks)
                pool.wait(1.0)
        _say(f"{actors} actors started, with torch imported", measured)
        with _Measured() as measured, _profiled(profile):
            run._map(len(run.tasks), check=False)
        assert run.computed == tasks
        _say(f"{tasks:,} tasks on {actors} actors", measured, f"; {tasks / measured.seconds:,.0f} tasks/s")
    cluster.ray.shutdown()


if __name__ == "__main__":
    main()
