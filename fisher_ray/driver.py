"""The course of a run on any pool of workers: plan, compute, check, reduce; quarantine, resuming, stopping. No Ray here.

What is done is known from storage alone, so the same command after any interruption computes only what is missing. Only
receipts come back from workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice, takewhile
from types import FrameType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fisher_ray.dispatch import STOPPED, Call, Dispatch, Failure, LocalPool, Pool, RunError, StoppedError
from fisher_ray.plan import ConfigError, Plan, RunConfig, Task, Tasks, make_plan
from fisher_ray.reduce import Checkpoint, Node, checkpoints, levels, manifest, roots, worst, write_summary
from fisher_ray.report import spectra_png
from fisher_ray.shards import RUN_VERSION, Counts, Lease, Receipt, RefusedError, RunStore, receipt_of, task_name
from fisher_ray.storage import DamagedError, OutageError, StorageError, StoredFile
from fisher_ray.worker import WINDOWS

T = TypeVar("T")

# Tasks that fail one after the other, before the first one succeeds or while so many times as many wait: then the fault is
# not theirs.
_HOPELESS, _MORE = 16, 10
# Receipts that one call of a check reads back, with all they vouch for.
_CHECKED = 32
_PROGRESS_EVERY = 15.0
# Times that one task or node is computed again in a reduction, as it reads back damaged.
_MENDED = 3
# Seconds that Ray's job server leaves between SIGTERM and SIGKILL unless this variable says otherwise.
_STOP_VARIABLE, _STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S", 3.0


@dataclass(frozen=True)
class Progress:
    """How far a run is, as shown and as written to progress.json.

    Attributes:
        state: ``computing``, ``reducing``, ``complete``, ``quarantined`` (complete but for those), ``stopped`` or ``failed``.
        weight: bytes of the corpus done, of ``total_weight``.
        tokens_per_second: over the last minute.
        seconds_left: None where it cannot be said.
        checkpoint: the last one looked back from, of a run that may end early.
        actors_wait: why there are no more actors, where that is known.
        last_failure: why the last call that was tried again had failed, and where.
    """

    state: str
    tasks_done: int
    tasks: int
    weight: int
    total_weight: int
    counts: Counts
    tokens_per_second: float
    seconds_left: float | None
    actors_alive: int
    actors_pending: int
    retried: int
    quarantined: int
    checkpoint: Checkpoint | None = None
    actors_wait: str | None = None
    last_failure: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        rows: the summary, one row a layer and group.
        counts: what became of the corpus's tokens.
        resumed: tasks that were done before.
        computed: tasks computed now.
        damaged: tasks that were done before and found damaged.
        quarantined: why, for each task that was given up.
        checkpoints: of a run that may end early, the last one where it did.
    """

    plan: Plan
    store: RunStore
    rows: list[dict[str, Any]]
    counts: Counts
    tasks: int
    resumed: int
    computed: int
    damaged: int
    quarantined: dict[int, str]
    checkpoints: list[Checkpoint]


Show = Callable[[Progress], None]


def _silent(plan: Plan) -> AbstractContextManager[Show]:
    return contextlib.nullcontext(lambda progress: None)


def run(
    config: RunConfig,
    open_pool: Callable[[RunConfig], AbstractContextManager[Pool]] = LocalPool,
    show: Callable[[Plan], AbstractContextManager[Show]] = _silent,
) -> Outcome:
    """Plan, compute and reduce a run, or go on with one that was interrupted.

    Args:
        config: what to run.
        open_pool: gives the workers; default: one in this process.
        show: given the plan, a context whose value is told how far the run is, about once a second; default: nobody.

    Raises:
        ModelError, ConfigError, CorpusError, StorageError: input that cannot be, or has nothing to score; nothing is left
            behind where nothing was there before and no task was done.
        RefusedError: the directory holds another run, or another driver works on it.
        StoppedError: SIGTERM or Ctrl-C.
        RunError: nothing could be computed.
    """
    plan, store = make_plan(config), RunStore(config.output)
    before = None
    with contextlib.suppress(DamagedError):
        before = store.read_run()  # a directory that is no run's is refused before anything is started
    if before is not None and config.device is None:  # nodes with GPUs may have left, or come
        config = replace(config, device=before["result_fields"].get("device"))
    made = store.missing_folders()
    with _Stop() as stop, contextlib.ExitStack() as workers:
        pool = workers.enter_context(open_pool(config))
        stop.listen()
        plan = plan.on(pool.device)
        tasks, is_new = _opened(plan, store)
        lease = Lease(store)
        try:
            tasks = _placed(plan, store, tasks)
            pool.open(_for_workers(plan))
            with show(plan) as tell:
                return _Run(plan, tasks, store, pool, lease, stop, tell).go()
        except (ValueError, RunError, StorageError):
            workers.close()  # none is to commit what is removed, and no heartbeat to write it anew
            lease.rest()
            with contextlib.suppress(StorageError):  # the error that there was says more
                if is_new and lease.lost is None and not _scored(store):  # else it is another driver's now
                    store.remove_run(made)
            raise
        finally:
            lease.release()


class _Stop:
    """Hears SIGTERM, as the end of a job: how many seconds are left then.

    From before the pool is opened until after it is closed: what came in between would end the process without a word.
    """

    def __init__(self) -> None:
        self._deadline: float | None = None
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Stop:
        self._before = signal.getsignal(signal.SIGTERM)
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def listen(self) -> None:
        """Take the signal over, again after Ray has: it ends the process with a handler of its own."""
        if self._main:
            signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._deadline is not None:  # a second signal gives no more time
            return
        given = float(os.environ.get(_STOP_VARIABLE, _STOP_SECONDS))
        # What is left over is for the last words: progress.json, the lease, and the message.
        self._deadline = time.monotonic() + max(0.0, given - max(2.0, 0.1 * given))

    def seconds(self) -> float | None:
        return None if self._deadline is None else self._deadline - time.monotonic()


def _opened(plan: Plan, store: RunStore) -> tuple[Tasks, bool]:
    """The tasks of a run, and whether it is new; what is damaged of its description is written again."""
    try:
        existing = store.read_run()
    except DamagedError as error:
        if not _has_receipts_of(plan, store):
            raise StorageError(
                f"{error} No receipt tells whether it was this run; choose another directory."
            ) from error
        tasks = plan.make_tasks()
        _describe(plan, store, tasks)
        return tasks, False
    if existing is None:
        tasks = plan.make_tasks()
        if store.create_run(_description(plan, tasks), tasks.raw):
            return tasks, True
        existing = store.read_run() or {}
    _check_same(plan, existing, store)
    stored = StoredFile(**existing["plan"])
    try:
        return Tasks(store.load(stored)), False
    except DamagedError:
        tasks = plan.make_tasks()
        store.write(stored.path, tasks.raw)
        store.load(stored)
        return tasks, False


def _placed(plan: Plan, store: RunStore, tasks: Tasks) -> Tasks:
    """The tasks over the corpus where it is now; where it or the model has moved, those who read the run are told so."""
    (first, *_) = tasks[0].ranges
    run = store.read_run()
    if run is None:
        raise RefusedError(f"the run at {store.uri} was removed by another driver, which failed. Try again.")
    before, now = run["config"], plan.config.asdict()
    if first.path == plan.root + first.name and all(before[name] == now[name] for name in _PLACES):
        return tasks
    moved = tasks.below(plan.root)
    _describe(plan, store, moved)
    return moved


def _describe(plan: Plan, store: RunStore, tasks: Tasks) -> None:
    """Write a run's description and tasks; killed in between, the tasks are made anew from the corpus."""
    store.write_sealed("run.json", _description(plan, tasks))
    store.write("plan.parquet", tasks.raw)


def _scored(store: RunStore) -> bool:
    """Whether a run has produced anything."""
    return any(store.receipt("done", name).counts.scored for name in store.names("done"))


def _has_receipts_of(plan: Plan, store: RunStore) -> bool:
    for name in sorted(store.names("done")):
        with contextlib.suppress(DamagedError):
            return store.receipt("done", name).fingerprint == plan.fingerprint
    return False


def _description(plan: Plan, tasks: Tasks) -> dict[str, Any]:
    return {
        "schema": RUN_VERSION,
        "config": plan.config.asdict(),
        "fingerprint": plan.fingerprint,
        "result_fields": plan.result_fields,
        "layers": plan.layers,
        "d_model": plan.facts.d_model,
        "tasks": len(tasks),
        "plan": asdict(StoredFile("plan.parquet", hashlib.sha256(tasks.raw).hexdigest(), len(tasks.raw))),
        "estimand": _estimand(plan.config),
        "tokens": {str(token): text for token, text in plan.tokens.items()},
    }


def _estimand(config: RunConfig) -> str:
    """What the mean matrix is an estimate of, in words."""
    if config.is_lower_bound:
        part = f"but for {config.tolerance:g} of tr M" if config.tolerance else f"of rank {config.rank}"
        what = f"not the Fisher matrix: a lower bound of it, its leading part {part}, without sampling error"
    elif config.estimator == "exact":
        what = "the Fisher matrix, without sampling error"
    elif config.top_p == 1.0 and config.temperature == 1.0:
        what = "the Fisher matrix, unbiased"
    else:
        what = f"not the Fisher matrix: the second moment of scores at tokens drawn with top_p {config.top_p} and temperature "
        what += str(config.temperature)
    where = (
        "at the corpus's tokens" if config.token_source == "observed" else "averaged over tokens drawn from the model"
    )
    return f"{what}, {where}"


# Settings by which those who read a run later find what it is of; what that is is told by digests.
_PLACES = ("corpus", "model", "revision")

# Of fields that no flag is named like.
_MEANING = {
    "gpus_per_actor": " (whose memory decides how many positions go together, where --memory-budget does not)",
    "shuffled": " (whether it may end early, by --until-relative-error or --until-relative-change)",
}


def _check_same(plan: Plan, existing: dict[str, Any], store: RunStore) -> None:
    if existing.get("schema") != RUN_VERSION:
        raise RefusedError(
            f"{store.uri} holds a run in format {existing.get('schema')!r}, and this version writes {RUN_VERSION!r}. Choose "
            "another output directory, or the version that began it."
        )
    if existing.get("fingerprint") == plan.fingerprint:
        return
    before, now = existing.get("result_fields", {}), plan.result_fields
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    named = "; ".join(
        _corpus_change(plan, existing, store)
        if key == "corpus"
        else f"{key} was {before.get(key)!r}, is {now.get(key)!r}{_MEANING.get(key, '')}"
        for key in different
    )
    raise RefusedError(f"{store.uri} holds another run: {named}. Choose another output directory or the same settings.")


def _corpus_change(plan: Plan, existing: dict[str, Any], store: RunStore) -> str:
    """Which files of the corpus are not as they were when the run was begun."""
    told = "the corpus is another one"
    try:
        tasks = Tasks(store.load(StoredFile(**existing["plan"])))
    except (DamagedError, FileNotFoundError):
        return told
    before = {part.name: (part.size, part.version) for task in tasks for part in task.ranges}
    now = {source.name: (source.size, source.version) for source in plan.sources if source.size}
    kinds = {
        "changed": sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
        "gone": sorted(before.keys() - now.keys()),
        # New, mostly. With a number of documents a plan names the files that it takes them from and no others.
        "not in the run": sorted(now.keys() - before.keys()) if plan.config.max_docs is None else [],
    }
    found = [
        f"{len(names):,} {'file is' if len(names) == 1 else 'files are'} {kind} ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return f"{told}: {', '.join(found) or 'other files, or in another order'}; they are told by path, size and time of change"


# Files of the corpus that a worker looks for before it takes any task.
_FILES = 8


def _for_workers(plan: Plan) -> Plan:
    """A plan as workers need it: with a few of the corpus's files, and an output that is the same in any current directory."""
    few = plan.sources[:: math.ceil(len(plan.sources) / _FILES) or 1]
    config = replace(plan.config.pinned(plan.result_fields["weights"]), output=RunStore(plan.config.output).uri)
    return replace(plan, config=config, sources=few)


class _Run:
    """One driver's work on a run."""

    def __init__(
        self, plan: Plan, tasks: Tasks, store: RunStore, pool: Pool, lease: Lease, stop: _Stop, tell: Show
    ) -> None:
        self.plan, self.tasks, self.store, self.pool, self.lease = plan, tasks, store, pool, lease
        self._stop, self._tell = stop, tell
        config = plan.config
        expected = partial(plan.cost.slowest_seconds_per_byte, config.device or "cpu")
        self.dispatch = Dispatch(
            pool, config.max_attempts, config.task_timeout, self._tick, stop.seconds, expected, lambda: any(self.done)
        )
        self.state = "computing"
        self.done = bytearray(len(tasks))  # a flag a task: a million tasks weigh a megabyte
        self.counts = Counts()
        self.quarantined: dict[int, str] = {}
        self._noted: set[int] = set()  # tasks of which a note says that they were given up
        self._failed: list[tuple[Task, Failure]] = []  # since a task was last computed
        self._first_failure: Failure | None = None
        self.looked: list[Checkpoint] = []
        self.weight = self.damaged = self.computed = self._tokens = 0
        self._began = self._written = time.monotonic()
        self._speed = deque([(self._began, 0)])  # when so many tokens had been computed, over the last minute
        self._weight_before = 0

    def go(self) -> Outcome:
        try:
            resumed = self._take_stock()
            self._record_progress(self.progress())  # the last driver's would be taken for this one's
            check = resumed > 0 and self.plan.config.verify_done
            if self.plan.config.ends_early:
                last = self._map_until_known(check)
            else:
                last = len(self.tasks)
                self._map(last, check)
            self.state = "reducing"
            rows, self.counts = self._sound(last, partial(self._reduce, last))
        except BaseException as error:
            self.state = "stopped" if isinstance(error, StoppedError | KeyboardInterrupt) else "failed"
            if not isinstance(self.lease.lost, RefusedError):  # the file is another driver's by now
                with contextlib.suppress(StorageError):
                    self._write_progress()
            if isinstance(error, KeyboardInterrupt):
                raise StoppedError(STOPPED) from None
            raise
        self.quarantined = {task: why for task, why in self.quarantined.items() if task < last}
        self.state = "quarantined" if self.quarantined else "complete"
        self._write_progress()
        return Outcome(
            self.plan,
            self.store,
            rows,
            self.counts,
            len(self.tasks),
            resumed,
            self.computed,
            self.damaged,
            self.quarantined,
            self.looked,
        )

    # ---- map ---------------------------------------------------------------------------------------------------------

    def _take_stock(self) -> int:
        """Mark what is done and what was given up, each from one listing; how many tasks are done."""
        for name in self.store.names("done"):
            if int(name) < len(self.done):
                self.done[int(name)] = 1
        resumed = self.done.count(1)
        for name in sorted(self.store.names("quarantine")):
            if int(name) >= len(self.done):
                continue
            task, path = int(name), f"quarantine/{name}.json"
            if self.done[task]:
                self.store.remove(path)
                continue
            self._noted.add(task)
            if self.plan.config.retry_quarantined:
                continue
            with contextlib.suppress(DamagedError):  # a damaged note is no reason not to try
                self.quarantined[task] = str(self.store.read_sealed(path)["error"])
        if resumed:
            self.weight = self._weight_before = sum(task.weight for task in self.tasks if self.done[task.id])
        return resumed

    def _map_until_known(self, check: bool) -> int:
        """Compute tasks until the mean is known as well as asked for, or all are done; how many of them the result is over.

        How far ahead is computed depends on the workers; which checkpoint is the last does not.
        """
        config, before = self.plan.config, 0
        for last in checkpoints(len(self.tasks)):
            missing = self._closed(last).count(0)
            if missing or check:
                workers = max(config.max_actors or config.min_actors, self.pool.alive + self.pool.pending)
                ahead = before + 2 * workers if missing else last
                self._map(min(len(self.tasks), max(last, ahead)), check)
                check = False
            found = self._sound(last, partial(self._look_back, last, before))
            self.looked.append(found)
            for value, enough in (
                (found.relative_error, config.until_relative_error),
                (found.relative_change, config.until_relative_change),
            ):
                if value is not None and enough is not None and value <= enough:
                    return last
            before = last
        return last

    def _look_back(self, last: int, before: int) -> Checkpoint:
        trees = self._trees(last)
        earlier: Sequence[Node | None] = self._trees(before) if before else [None] * len(trees)
        ahead = len(self.tasks) - last
        self._sum_nodes(trees, ahead)
        calls = (
            Call(f"look back from {now.name}", "look_back", (now, then))
            for now, then in zip(trees, earlier, strict=True)
        )
        return worst(self._all(calls, ahead=ahead))

    def _closed(self, last: int) -> bytearray:
        """A flag for each of the first tasks: whether it is done or given up."""
        closed = self.done[:last]  # as it is now: flags change while calls are handed out
        for task in self.quarantined:
            if task < last:
                closed[task] = 1
        return closed

    def _map(self, last: int, check: bool) -> None:
        """Compute what is not done of the first tasks; read back what is, and compute again what turns out damaged."""
        while True:
            closed = self._closed(last)
            some = takewhile(lambda task: task.id < last, self.tasks)
            todo = (_computing(task) for task in some if not closed[task.id])
            checks, number = self._checks() if check else (iter(()), 0)
            if not closed.count(0) and not number:
                break
            check = False
            ahead = len(self.tasks) - last
            for call, outcome in self.dispatch.run(chain(todo, checks), closed.count(0) + number, ahead=ahead):
                if call.method == "check":
                    self._checked(call, outcome)
                elif isinstance(outcome, Failure):
                    self._give_up(call.args[0], outcome)
                else:
                    self._computed(call.args[0], outcome)
            self._note()
        if not any(self.done) and last == len(self.tasks):
            # Nothing could be computed: the first reason is as good as an answer to the command.
            raise self._first_failure.to_exception() if self._first_failure else RunError(self._given_up())

    def _checks(self) -> tuple[Iterator[Call], int]:
        """Calls that read back everything done, and how many they are."""
        done = bytes(self.done)
        tasks = (task_name(i) for i, flag in enumerate(done) if flag)
        nodes = sorted(self.store.names("tree"))

        def calls() -> Iterator[Call]:
            for folder, names in (("done", tasks), ("tree", iter(nodes))):
                while some := list(islice(names, _CHECKED)):
                    yield Call(f"check of {folder}/{some[0]}", "check", (folder, some))

        return calls(), -(-done.count(1) // _CHECKED) - (-len(nodes) // _CHECKED)

    def _checked(self, call: Call, outcome: Any) -> None:
        folder = call.args[0]
        if isinstance(outcome, Failure):
            raise outcome.to_exception()
        counts, damaged = outcome
        if folder == "tree":
            for name in damaged:
                self.store.remove(f"tree/{name}.json")
            return
        self.counts += counts
        self.damaged += len(damaged)
        tasks = [int(name) for name in damaged if int(name) < len(self.done)]
        for name in set(damaged) - set(map(task_name, tasks)):
            self.store.remove(f"done/{name}.json")
        self._undo(tasks)

    def _undo(self, tasks: Sequence[int]) -> None:
        self.store.undo(tasks)
        for task in tasks:
            self.done[task] = 0
            self.weight -= self.tasks[task].weight

    def _computed(self, task: Task, receipt: Receipt) -> None:
        self.done[task.id] = 1
        self.computed += 1
        self.weight += task.weight
        self.counts += receipt.counts
        self._tokens += receipt.counts.tokens
        self._note()
        if task.id in self._noted:  # it was tried anew
            self.store.remove(_note_path(task))
            self._noted.remove(task.id)

    def _give_up(self, task: Task, failure: Failure) -> None:
        """Quarantine a task, or end the run where the fault is not the task's."""
        if failure.kind in ("fatal", "unwell"):
            raise failure.to_exception()
        self._first_failure = self._first_failure or failure
        where, others = task.ranges[0], len({source.path for source in task.ranges}) - 1
        span = f", rows or bytes {where.start} to {where.stop}" if where.stop >= 0 else ""
        more = f", and {others} more file{'s' * (others > 1)}" if others else ""
        line = f"task {task.id} ({where.path.removeprefix('file://')}{span}{more}): {_said(failure)}"
        self.quarantined[task.id] = line
        self._failed.append((task, failure))
        if self._is_hopeless():
            number = len(self._failed)
            some = "task" if number == 1 else f"{number} tasks"
            many = f"{some} failed in a row" if any(self.done) else f"the first {some} failed"
            raise replace(failure, message=f"{many}, and none succeeded. The last: {line}").to_exception()

    def _is_hopeless(self) -> bool:
        """Whether what fails is not the tasks' fault: none has succeeded since many failed, and many more would."""
        if not any(self.done):
            return len(self._failed) >= _HOPELESS or self._failed[-1][1].kind == "lost"
        failed = sum(failure.kind != "input" for _, failure in self._failed)  # what is said of the corpus is so
        left = len(self.tasks) - self.done.count(1) - len(self.quarantined)
        return failed >= max(_HOPELESS, 2 * self.pool.alive) and left > _MORE * failed

    def _note(self) -> None:
        """Set aside for good what has failed, which waits until others show that the fault is its own."""
        for task, failure in self._failed:
            line, ranges = self.quarantined[task.id], [asdict(r) for r in task.ranges]
            note = {"task": task.id, "kind": failure.kind, "error": line, "ranges": ranges}
            self.store.write_sealed(_note_path(task), note)
            self._noted.add(task.id)
        self._failed.clear()

    def _given_up(self) -> str:
        first = next(iter(self.quarantined.values()))
        count = len(self.quarantined)
        return f"nothing is left to compute: {count} tasks were given up. {first} Try again with --retry-quarantined."

    # ---- reduce ------------------------------------------------------------------------------------------------------

    def _sound(self, last: int, add_up: Callable[[], T]) -> T:
        """What adding up the first tasks gives, which are computed again where they turn out damaged on the way."""
        times: Counter[str] = Counter()
        while True:
            try:
                return add_up()
            except DamagedError as error:
                of = self._mend(error)
                times[of] += 1
                if times[of] > _MENDED:
                    raise RunError(
                        f"{error} It was computed {_MENDED} times, and each time read back as something else. Check the "
                        "storage; the same command goes on."
                    ) from error
                state, self.state = self.state, "computing"
                self._map(last, check=False)
                self.state = state

    def _reduce(self, last: int) -> tuple[list[dict[str, Any]], Counts]:
        """The table of layers and groups, and what the first tasks found."""
        trees = self._trees(last)
        return self._reduced_before(trees) or self._reduce_once(trees)

    def _trees(self, last: int) -> list[Node]:
        """Of the sum over the first tasks, without those that were given up."""
        missing = [task for task in self.quarantined if task < last and not self.done[task]]
        return roots(self.plan, last, missing)

    def _reduced_before(self, trees: Sequence[Node]) -> tuple[list[dict[str, Any]], Counts] | None:
        """The reduction of before, where it is of the same tasks and sound."""
        done = {task_name(i) for i, flag in enumerate(self.done) if flag}
        if any(self.store.verify_reduced(self.plan.fingerprint, done, self.store.names("tree"))):
            return None
        made = self.store.read_sealed("reduced/manifest.json")
        if (made["last"], made["missing"]) != (trees[0].last, list(trees[0].missing)):
            return None
        table = pq.read_table(pa.BufferReader(self.store.read("reduced/summary.parquet")))
        return table.to_pylist(), Counts(**made["counts"])

    def _sum_nodes(self, trees: Sequence[Node], ahead: int = 0) -> None:
        """Everything below the roots that is not there yet."""
        there = self.store.names("tree")
        for level in zip(*(levels(tree) for tree in trees), strict=True):
            nodes = [node for chunk in level for node in chunk if node.name not in there]
            self._all((Call(f"sum {node.name}", "sum", (node,)) for node in nodes), ahead=ahead)

    def _reduce_once(self, trees: Sequence[Node]) -> tuple[list[dict[str, Any]], Counts]:
        self._sum_nodes(trees, ahead=len(trees))
        self.store.remove("reduced/manifest.json")  # before its files become others
        rows: list[dict[str, Any]] = []
        files: dict[str, StoredFile] = {}
        means = (Call(f"mean {tree.name}", "finish", (tree,), repeatable=False) for tree in trees)
        finished = self._all(means, width=1)  # each decomposes matrices
        for some, covering in finished:
            rows += some
            files |= covering.files
        counts = covering.counts
        if counts.scored == 0:
            raise ConfigError(
                f"nothing to score: {counts.documents} documents with {counts.tokens} tokens, {counts.empty} of them empty, "
                f"{counts.skipped} tokens skipped, {counts.invalid} invalid. Check the corpus and --positions."
            )
        done = [task for task in range(trees[0].last) if self.done[task]]
        examples = [self.tasks[task] for task in self.store.examples(done, WINDOWS)]
        (moved,) = self._all([Call("tokens that directions move", "moved_tokens", (examples,))])
        for row in rows:
            row["raised"], row["lowered"] = moved[row["layer"]][0] if row["group"] is None else (None, None)
        rows.sort(key=lambda row: (row["layer"], row["group"] is not None, row["group"] or ""))
        missing = trees[0].missing
        files |= write_summary(self.store, rows, moved, covering, missing)
        picture = spectra_png(self.plan, self.store, [row for row in rows if row["group"] is None])
        files["reduced/spectra.png"] = self.store.store("reduced/spectra.png", picture)
        made = manifest(self.plan, trees, len(done), files, self.looked) | {"counts": asdict(counts)}
        self.store.write_sealed("reduced/manifest.json", made)
        return rows, counts

    def _all(self, calls: Iterable[Call], ahead: int = 0, width: int = 16) -> list[Any]:
        """Results of calls of the reduction, in the order of the calls; the first failure ends it."""
        listed = list(calls)
        results: dict[str, Any] = {}
        with contextlib.closing(self.dispatch.run(listed, len(listed), width, ahead)) as ended:
            for call, outcome in ended:
                if isinstance(outcome, Failure):
                    if outcome.kind == "damaged":
                        raise DamagedError(outcome.path, outcome.message)
                    raise outcome.to_exception()
                results[call.name] = outcome
        return [results[call.name] for call in listed]

    def _mend(self, error: DamagedError) -> str:
        """Make undone what a damaged file belongs to; its receipt."""
        receipt = receipt_of(error.path)
        if receipt is None:
            raise error
        folder, name = receipt
        if folder == "done":
            self.damaged += 1
            self._undo([int(name)])
        else:
            self.store.remove(f"{folder}/{name}.json")
        return f"{folder}/{name}.json"

    # ---- progress ----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self.lease.lost is not None:
            raise self.lease.lost
        now = time.monotonic()
        if now - self._speed[-1][0] >= 1.0:
            self._speed.append((now, self._tokens))
            while now - self._speed[1][0] >= 60.0:
                self._speed.popleft()
            progress = self.progress()
            self._tell(progress)
            self.pool.report(asdict(progress))
        if now - self._written >= _PROGRESS_EVERY:
            with contextlib.suppress(OutageError):  # whoever has results to write will say so
                self._write_progress()

    def progress(self) -> Progress:
        now = time.monotonic()
        then, before = self._speed[0]
        new = self.weight - self._weight_before
        left = (now - self._began) * (self.tasks.weight - self.weight) / new if new > 0 else None
        return Progress(
            self.state,
            self.done.count(1),
            len(self.tasks),
            self.weight,
            self.tasks.weight,
            self.counts,
            (self._tokens - before) / max(now - then, 1e-3),
            0.0 if self.state in ("reducing", "complete", "quarantined") else left,
            self.pool.alive,
            self.pool.pending,
            self.dispatch.retried,
            len(self.quarantined),
            self.looked[-1] if self.looked else None,
            self.pool.waits,
            self.dispatch.last_failure,
        )

    def _write_progress(self) -> None:
        progress = self.progress()
        self._tell(progress)
        self._record_progress(progress)

    def _record_progress(self, progress: Progress) -> None:
        self._written = time.monotonic()
        self.store.write_sealed("progress.json", {**asdict(progress), "written": time.time()})


def _note_path(task: Task) -> str:
    return f"quarantine/{task_name(task.id)}.json"


def _computing(task: Task) -> Call:
    return Call(f"task {task.id}", "compute", (task,), task.weight)


def _said(failure: Failure) -> str:
    """A failure in words."""
    told: Mapping[str, str] = {
        "died": "its worker process died each time; was the machine out of memory?",
        "lost": "the machine it ran on was lost each time; did its memory run out?",
        "hung": f"it did not end: {failure.message}; --task-timeout sets how long to wait.",
    }
    return replace(failure, message=told.get(failure.kind, failure.message)).said
