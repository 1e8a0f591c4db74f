"""The course of a run on any pool of workers: plan, compute, check, reduce; retries, quarantine, stopping. No Ray here.

What is done is known from storage alone, so the same command after any interruption computes only what is missing. Only
receipts come back from workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fisher_ray.architecture import ModelError
from fisher_ray.corpus import CorpusError
from fisher_ray.plan import ConfigError, Device, Plan, RunConfig, Task, Tasks, make_plan
from fisher_ray.reduce import Node, finish_layers, levels, manifest, read_array, roots, sum_node, write_summary
from fisher_ray.report import spectra_png
from fisher_ray.shards import Counts, Lease, Receipt, RefusedError, RunStore, task_name
from fisher_ray.storage import DamagedError, StorageError, StoredFile, seal
from fisher_ray.worker import Worker

# A task whose node was lost is not to blame for it, yet one that loses every node it is on has to end too.
_MAX_LOST = 20
# Tasks that fail one after the other before the first one succeeds: then the fault is not theirs.
_HOPELESS = 16
# Times what tasks of its size take after which one gets a second attempt, and after which one counts as hung.
_SLOW, _HUNG = 3.0, 30.0
_SLOW_AT_LEAST, _HUNG_AT_LEAST, _HUNG_UNKNOWN = 5.0, 600.0, 3600.0
# Receipts that one call of a check reads back, with all they vouch for.
_CHECKED = 32
_PROGRESS_EVERY = 15.0
# Seconds that Ray's job server leaves between SIGTERM and SIGKILL unless this variable says otherwise.
_STOP_VARIABLE, _STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S", 3.0


class RunError(RuntimeError):
    """A run that could not finish; what is done stays done."""


class StoppedError(RuntimeError):
    """A run that was asked to stop; what is done stays done."""


# ---- what workers are asked, and what they answer ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a worker.

    Attributes:
        name: for messages, one of a kind within a run.
        method: of :class:`Servant`.
        weight: what its time is in proportion to.
    """

    name: str
    method: str
    args: tuple[Any, ...]
    weight: int = 1


@dataclass(frozen=True)
class Failure:
    """Why a call gave no result.

    Attributes:
        kind: ``input``: the corpus, and no other attempt would end otherwise; ``fatal``: the whole run cannot go on;
            ``damaged``: a stored file, whose path is ``path``; ``error``: perhaps not the next time; ``sticky``: nor by
            the same process; ``died``: the process ended; ``lost``: its machine is gone; ``hung``: it took too long.
    """

    kind: Literal["input", "fatal", "damaged", "error", "sticky", "died", "lost", "hung"]
    message: str
    error: str = ""
    path: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Sort what a worker raised; the one place that tells transient from final."""
        message = " ".join(str(error).split())
        name = type(error).__name__
        if isinstance(error, DamagedError):
            return cls("damaged", message, name, error.path)
        if isinstance(error, CorpusError):
            return cls("input", message, name)
        if isinstance(error, ModelError | ConfigError | StorageError):
            return cls("fatal", message, name)
        # After most errors of a device every further call fails, in this process only.
        device = isinstance(error, torch.AcceleratorError) or ("CUDA" in message and "out of memory" not in message)
        return cls("sticky" if device else "error", f"{name}: {message}", name)

    def to_exception(self) -> Exception:
        """The error as the driver raises it."""
        kinds: dict[str, type[Exception]] = {
            kind.__name__: kind for kind in (ModelError, ConfigError, CorpusError, StorageError, RefusedError)
        }
        return kinds.get(self.error, RunError)(self.message)


class Servant:
    """Everything that a process of the pool can be asked to do. The model is loaded when it is first needed."""

    def __init__(self, plan: Plan):
        self.plan, self.store = plan, RunStore(plan.config.output)
        self._worker: Worker | None = None
        self._loading = threading.Lock()

    def load(self) -> Worker:
        with self._loading:
            if self._worker is None:
                self._worker = Worker(self.plan, self.store)
            return self._worker

    def answer(self, call: Call) -> Any:
        """The result of a call, or the Failure."""
        try:
            return getattr(self, call.method)(*call.args)
        except Exception as error:
            return Failure.of(error)

    def compute(self, task: Task) -> Receipt:
        return self.load().compute(task)

    def check(self, folder: str, names: Sequence[str]) -> tuple[Counts, list[str]]:
        """Read back what receipts vouch for: counts of the sound ones, and the names of the others."""
        counts, damaged = Counts(), []
        for name in names:
            receipt, _ = self.store.check(folder, name, self.plan.fingerprint)
            if receipt is None:
                damaged.append(name)
            else:
                counts += receipt.counts
        return counts, damaged

    def sum(self, node: Node) -> None:
        sum_node(self.plan, self.store, node)

    def finish(self, root: Node) -> tuple[list[dict[str, Any]], Receipt]:
        torch.set_num_threads(self.plan.config.cpus_per_actor)  # their number is part of an eigendecomposition's bits
        return finish_layers(self.plan, self.store, root)

    def moved_tokens(self, task: Task) -> dict[int, tuple[list[str], list[str]]]:
        directions = {layer: read_array(self.store, layer, "eigenvectors")[:, 0].copy() for layer in self.plan.layers}
        return self.load().moved_tokens(task, directions)


class Pool(Protocol):
    """Where workers run. A worker is whatever value :meth:`room` gives, a key whatever :meth:`submit` gives."""

    @property
    def device(self) -> Device:
        """What the workers compute on."""

    @property
    def alive(self) -> int:
        """Workers that have their model."""

    @property
    def pending(self) -> int:
        """Workers that wait for a machine, or load their model."""

    def open(self, plan: Plan) -> None:
        """Start no worker yet, but know how."""

    def resize(self, wanted: int, kept: int) -> None:
        """Grow to so many workers, within what configuration and cluster allow; drop idle ones beyond ``kept``."""

    def room(self, alone: bool, avoid: Collection[Any]) -> Any:
        """A worker that can take a call, with nothing else on it if ``alone``; None if there is none now."""

    def submit(self, worker: Any, call: Call, alone: bool) -> Any:
        """Start a call."""

    def wait(self, timeout: float) -> list[tuple[Any, Any]]:
        """(key, result or Failure) of calls that ended; key None for a Failure of the pool itself."""

    def kill(self, worker: Any) -> None:
        """End a worker at once; its calls fail as ``died``."""

    def report(self, progress: Progress) -> None:
        """Tell the metrics."""


class LocalPool:
    """One worker in this process, for debugging and for machines without Ray."""

    alive, pending = 1, 0

    def __init__(self, config: RunConfig):
        self.device: Device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._calls: deque[tuple[int, Call]] = deque()
        self._count = 0

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, plan: Plan) -> None:
        self._servant = Servant(plan)

    def resize(self, wanted: int, kept: int) -> None:
        pass

    def room(self, alone: bool, avoid: Collection[Any]) -> Any:
        return None if self._calls or avoid else self

    def submit(self, worker: Any, call: Call, alone: bool) -> int:
        self._count += 1
        self._calls.append((self._count, call))
        return self._count

    def wait(self, timeout: float) -> list[tuple[Any, Any]]:
        if not self._calls:
            time.sleep(timeout)
            return []
        key, call = self._calls.popleft()
        return [(key, self._servant.answer(call))]

    def kill(self, worker: Any) -> None:
        pass

    def report(self, progress: Progress) -> None:
        pass


# ---- handing out calls ---------------------------------------------------------------------------------------------------


@dataclass
class _Running:
    call: Call
    worker: Any
    since: float


@dataclass
class _Tries:
    """What became of a call's attempts so far."""

    failed: int = 0
    lost: int = 0
    alone: bool = False
    running: set[Any] = field(default_factory=set)


class Dispatch:
    """Hands calls to a pool until each has ended: with a result, or a Failure that no further attempt would change.

    A call that fails is tried again after a pause, ``max_attempts`` times; one whose process died is tried again with nothing
    else on its worker, so that it cannot take an innocent one along twice. One whose machine was lost is tried again as
    often as that can be bad luck. When nothing waits, slow ones get a second attempt on another worker; of two the first
    to commit counts.

    Args:
        pool: where to.
        max_attempts: failures of one call before it is given up.
        timeout: seconds after which a call counts as hung; None: by what calls of its weight take.
        tick: called about once a second; may raise to end everything.
        stopping: seconds left once a stop was asked for, else None.
    """

    def __init__(
        self,
        pool: Pool,
        max_attempts: int,
        timeout: float | None,
        tick: Callable[[], None],
        stopping: Callable[[], float | None],
    ):
        self._pool, self._max_attempts, self._timeout = pool, max_attempts, timeout
        self._tick, self._stopping = tick, stopping
        self.retried = 0
        self._pace: deque[float] = deque(maxlen=101)

    def run(self, calls: Iterable[Call], total: int, width: int = 1) -> Iterator[tuple[Call, Any]]:
        """Yield (call, result or Failure) as they end.

        Args:
            calls: taken one by one as workers have room.
            total: how many there are.
            width: calls for which one more worker is worth having.
        """
        self._waiting = iter(calls)
        self._next: Call | None = None
        self._later: list[tuple[float, int, Call]] = []
        self._tries: dict[str, _Tries] = {}
        self._running: dict[Any, _Running] = {}
        self._hung: set[Any] = set()
        self._late: set[Any] = set()
        left, looked = total, 0.0
        while left:
            self._tick()
            seconds = self._stopping()
            if seconds is not None and (seconds <= 0 or not self._running):
                raise StoppedError("stopped; what is done is kept, and the same command goes on.")
            if seconds is None:
                wanted = -(-left // width)
                self._pool.resize(wanted, 2 * wanted)  # as many again for second attempts, if they are there
                self._fill()
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                self._look(looked, seconds is None)
            for key, outcome in self._pool.wait(min(1.0, seconds or 1.0)):
                if key is None:
                    raise outcome.to_exception()
                for ended in self._ended(key, outcome):
                    left -= 1
                    yield ended
        for key in self._late:
            self._pool.kill(self._running[key].worker)  # nothing waits for attempts that came second

    def _fill(self) -> None:
        """Give every worker that has room a call."""
        while True:
            due = bool(self._later) and self._later[0][0] <= time.monotonic()
            if due:
                call = self._later[0][2]
            else:
                if self._next is None:
                    self._next = next(self._waiting, None)
                if self._next is None:
                    return
                call = self._next
            alone = call.name in self._tries and self._tries[call.name].alone
            # One that has to be alone holds up the others until a worker has run empty.
            worker = self._pool.room(alone, ())
            if worker is None:
                return
            if due:
                heapq.heappop(self._later)
            else:
                self._next = None
            self._submit(worker, call, alone)

    def _submit(self, worker: Any, call: Call, alone: bool) -> None:
        key = self._pool.submit(worker, call, alone)
        self._running[key] = _Running(call, worker, time.monotonic())
        self._tries.setdefault(call.name, _Tries()).running.add(key)

    def _look(self, now: float, may_start: bool) -> None:
        """End what hangs, and start second attempts of what is slow when nothing else waits."""
        pace = statistics.median(self._pace) if len(self._pace) >= 3 else None
        waiting = self._next is not None or self._later
        for key, running in list(self._running.items()):
            taken, call = now - running.since, running.call
            if self._timeout is not None:
                limit = self._timeout
            else:
                limit = max(_HUNG_AT_LEAST, _HUNG * pace * call.weight) if pace is not None else _HUNG_UNKNOWN
            if taken > limit and key not in self._hung:
                self._hung.add(key)
                self._pool.kill(running.worker)
            tries = self._tries.get(call.name)
            slow = pace is not None and taken > max(_SLOW_AT_LEAST, _SLOW * pace * call.weight)
            if may_start and slow and not waiting and tries is not None and len(tries.running) == 1 and not tries.alone:
                worker = self._pool.room(True, [running.worker])
                if worker is not None:
                    self._submit(worker, call, alone=False)

    def _ended(self, key: Any, outcome: Any) -> Iterator[tuple[Call, Any]]:
        """Take note of an attempt's end; yield the call if it is that of the call too."""
        running = self._running.pop(key, None)
        if running is None:  # of an earlier round that was broken off
            return
        call = running.call
        tries = self._tries.get(call.name)
        if tries is None or key not in tries.running:
            self._late.discard(key)  # another attempt was first
            return
        tries.running.discard(key)
        if not isinstance(outcome, Failure):
            self._pace.append((time.monotonic() - running.since) / max(call.weight, 1))
            self._forget(call)
            yield call, outcome
            return
        if key in self._hung:
            outcome = replace(outcome, kind="hung", message=f"took more than {time.monotonic() - running.since:.0f} s")
        if outcome.kind == "sticky":
            self._pool.kill(running.worker)
        if outcome.kind == "lost":
            tries.lost += 1
        else:
            tries.failed += 1
        tries.alone = tries.alone or outcome.kind in ("died", "hung")
        final = outcome.kind in ("input", "fatal", "damaged")
        if final or tries.failed >= self._max_attempts or tries.lost >= _MAX_LOST:
            self._forget(call)
            yield call, outcome
        elif not tries.running:
            self.retried += 1
            pause = min(30.0, 0.25 * 2 ** (tries.failed + tries.lost))
            heapq.heappush(self._later, (time.monotonic() + pause, self.retried, call))

    def _forget(self, call: Call) -> None:
        """A call has ended; what else runs for it goes on unheard."""
        self._late |= self._tries.pop(call.name).running


# ---- a run ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a run is, as shown and as written to progress.json.

    Attributes:
        state: ``computing``, ``reducing``, ``complete``, ``quarantined`` (complete but for those), ``stopped`` or ``failed``.
        weight: bytes of the corpus done, of ``total_weight``.
        tokens_per_second: over the last minute.
        seconds_left: None where it cannot be said.
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


Show = Callable[[Progress], None]


def run(
    config: RunConfig,
    open_pool: Callable[[RunConfig], AbstractContextManager[Pool]],
    show: Callable[[Plan], AbstractContextManager[Show]],
) -> Outcome:
    """Plan, compute and reduce a run, or go on with one that was interrupted.

    Args:
        config: what to run.
        open_pool: gives the workers.
        show: given the plan, a context whose value is told how far the run is, about once a second.

    Raises:
        ModelError, ConfigError, CorpusError, StorageError: input that cannot be; nothing is left behind where nothing was
            there before and no task was done.
        RefusedError: the directory holds another run, or another driver works on it.
        StoppedError: SIGTERM was received.
        RunError: nothing could be computed, or nothing could be scored.
    """
    plan, store = make_plan(config), RunStore(config.output)
    with contextlib.suppress(DamagedError):
        store.read_run()  # a directory that is no run's is refused before anything is started
    made = store.first_missing()
    with open_pool(config) as pool, _Stop() as stop:
        plan = plan.on(pool.device)
        tasks, is_new = _opened(plan, store)
        try:
            lease = Lease(store)
            try:
                pool.open(_for_workers(plan))
                with show(plan) as tell:
                    return _Run(plan, tasks, store, pool, lease, stop, tell).go()
            finally:
                lease.release()
        except RefusedError:
            raise  # it is another driver's now
        except (ValueError, RunError, StorageError):
            if is_new and not _scored(store):
                store.remove_all(made)
            raise


class _Stop:
    """Hears SIGTERM, as the end of a job: how many seconds are left then."""

    def __init__(self) -> None:
        self._deadline: float | None = None

    def __enter__(self) -> _Stop:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
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
        store.write("plan.parquet", tasks.raw)
        store.write("run.json", seal(_description(plan, tasks)))
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
        "schema": "run.2",
        "config": plan.config.asdict(),
        "fingerprint": plan.fingerprint,
        "result_fields": plan.result_fields,
        "layers": plan.layers,
        "d_model": plan.facts.d_model,
        "tasks": len(tasks),
        "plan": asdict(StoredFile("plan.parquet", hashlib.sha256(tasks.raw).hexdigest(), len(tasks.raw))),
        "estimand": _estimand(plan.config),
    }


def _estimand(config: RunConfig) -> str:
    """What the mean matrix is an estimate of, in words."""
    if config.estimator == "exact":
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


def _check_same(plan: Plan, existing: dict[str, Any], store: RunStore) -> None:
    if existing.get("fingerprint") == plan.fingerprint:
        return
    before, now = existing.get("result_fields", {}), plan.result_fields
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    named = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in different)
    raise RefusedError(f"{store.uri} holds another run: {named}. Choose another output directory or the same settings.")


def _for_workers(plan: Plan) -> Plan:
    """A plan as workers need it: without the corpus's files, and with paths that hold in any current directory."""
    model = Path(plan.config.model)
    config = replace(
        plan.config,
        model=str(model.resolve()) if model.exists() else plan.config.model,
        output=RunStore(plan.config.output).uri,
    )
    return replace(plan, config=config, sources=())


class _Run:
    """One driver's work on a run."""

    def __init__(
        self, plan: Plan, tasks: Tasks, store: RunStore, pool: Pool, lease: Lease, stop: _Stop, tell: Show
    ) -> None:
        self.plan, self.tasks, self.store, self.pool, self.lease = plan, tasks, store, pool, lease
        self._stop, self._tell = stop, tell
        config = plan.config
        self.dispatch = Dispatch(pool, config.max_attempts, config.task_timeout, self._tick, stop.seconds)
        self.state = "computing"
        self.done = bytearray(len(tasks))  # a flag a task: a million tasks weigh a megabyte
        self.counts = Counts()
        self.quarantined: dict[int, str] = {}
        self._first_failure: Failure | None = None
        self.weight = self.damaged = self.computed = 0
        self._began = self._written = time.monotonic()
        self._speed: deque[tuple[float, int]] = deque(maxlen=60)
        self._weight_before = 0

    def go(self) -> Outcome:
        try:
            resumed = self._take_stock()
            self._map(check=resumed > 0 and self.plan.config.verify_done)
            self.state = "reducing"
            rows, covering = self._reduce()
        except BaseException as error:
            self.state = "stopped" if isinstance(error, StoppedError | KeyboardInterrupt) else "failed"
            with contextlib.suppress(StorageError):
                self._write_progress()
            raise
        self.state = "quarantined" if self.quarantined else "complete"
        self._write_progress()
        return Outcome(
            self.plan,
            self.store,
            rows,
            covering.counts,
            len(self.tasks),
            resumed,
            self.computed,
            self.damaged,
            self.quarantined,
        )

    # ---- map ---------------------------------------------------------------------------------------------------------

    def _take_stock(self) -> int:
        """Mark what is done and what was given up, each from one listing; how many tasks are done."""
        for name in self.store.names("done"):
            if name.isdigit() and int(name) < len(self.done):
                self.done[int(name)] = 1
        resumed = self.done.count(1)
        for path in self.store.list("quarantine"):
            task = int(Path(path).stem)
            if self.plan.config.retry_quarantined or self.done[task]:
                self.store.remove(path)
                continue
            with contextlib.suppress(DamagedError):  # a damaged note is no reason not to try
                self.quarantined[task] = str(self.store.read_sealed(path)["error"])
        if resumed:
            self.weight = self._weight_before = sum(task.weight for task in self.tasks if self.done[task.id])
        return resumed

    def _map(self, check: bool) -> None:
        """Compute what is not done; read back what is, and compute again what turns out damaged."""
        failed_first = 0
        while True:
            closed = bytearray(self.done)  # as it is now: flags change while calls are handed out
            for task in self.quarantined:
                closed[task] = 1
            todo = (_computing(task) for task in self.tasks if not closed[task.id])
            checks, number = self._checks() if check else (iter(()), 0)
            if not closed.count(0) and not number:
                break
            check = False
            for call, outcome in self.dispatch.run(chain(todo, checks), closed.count(0) + number):
                if call.method == "check":
                    self._checked(call, outcome)
                elif isinstance(outcome, Failure):
                    failed_first += 1
                    self._give_up(call.args[0], outcome, hopeless=failed_first >= _HOPELESS and not any(self.done))
                else:
                    self._computed(call.args[0], outcome)
        if not any(self.done):
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
                    yield Call(f"check of {folder}/{some[0]}", "check", (folder, some), 0)

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
        for name in damaged:
            self.damaged += 1
            if name.isdigit() and int(name) < len(self.done):
                self._undo(int(name))
            else:
                self.store.remove(f"done/{name}.json")

    def _undo(self, task: int) -> None:
        self.store.undo(task, self.store.names("tree"))
        self.done[task] = 0
        self.weight -= self.tasks[task].weight

    def _computed(self, task: Task, receipt: Receipt) -> None:
        self.done[task.id] = 1
        self.computed += 1
        self.weight += task.weight
        self.counts += receipt.counts

    def _give_up(self, task: Task, failure: Failure, hopeless: bool) -> None:
        """Quarantine a task, or end the run where the fault is not the task's."""
        if failure.kind == "fatal":
            raise failure.to_exception()
        self._first_failure = self._first_failure or failure
        where = task.ranges[0]
        span = f"rows or bytes {where.start} to {where.stop}" if where.stop >= 0 else "whole"
        more = f" and {len(task.ranges) - 1} more ranges" if len(task.ranges) > 1 else ""
        line = f"task {task.id} ({where.path.removeprefix('file://')}, {span}{more}): {_said(failure)}"
        if hopeless:
            many = f"the first {_HOPELESS} tasks failed, and none succeeded. The last: {line}"
            raise replace(failure, message=many).to_exception()
        self.quarantined[task.id] = line
        note = {"task": task.id, "kind": failure.kind, "error": line, "ranges": [asdict(r) for r in task.ranges]}
        self.store.write(f"quarantine/{task_name(task.id)}.json", seal(note))

    def _given_up(self) -> str:
        first = next(iter(self.quarantined.values()))
        count = len(self.quarantined)
        return f"nothing is left to compute: {count} tasks were given up. {first} Try again with --retry-quarantined."

    # ---- reduce ------------------------------------------------------------------------------------------------------

    def _reduce(self) -> tuple[list[dict[str, Any]], Receipt]:
        """Add everything up, computing again what turns out damaged on the way."""
        for _ in range(3):
            missing = [task for task in self.quarantined if not self.done[task]]
            trees = roots(self.plan, len(self.tasks), missing)
            reduced = self._reduced_before(trees)
            if reduced is not None:
                return reduced
            try:
                return self._reduce_once(trees)
            except DamagedError as error:
                self._mend(error.path)
                self.state = "computing"
                self._map(check=False)
                self.state = "reducing"
        raise RunError(
            "the storage damages files faster than they are computed. Check it; fisher-ray verify says which."
        )

    def _reduced_before(self, trees: Sequence[Node]) -> tuple[list[dict[str, Any]], Receipt] | None:
        """The reduction of before, where it is of the same tasks and sound."""
        done = {task_name(i) for i, flag in enumerate(self.done) if flag}
        if any(self.store.verify_reduced(self.plan.fingerprint, done, self.store.names("tree"))):
            return None
        made = self.store.read_sealed("reduced/manifest.json")
        if made["missing"] != list(trees[0].missing):
            return None
        table = pq.read_table(pa.BufferReader(self.store.read("reduced/summary.parquet")))
        covering = Receipt("all", self.plan.fingerprint, {}, Counts(**made["counts"]))
        return table.to_pylist(), covering

    def _reduce_once(self, trees: Sequence[Node]) -> tuple[list[dict[str, Any]], Receipt]:
        there = self.store.names("tree")
        for level in zip(*(levels(tree) for tree in trees), strict=True):
            nodes = [node for chunk in level for node in chunk if node.name not in there]
            self._all(Call(f"sum {node.name}", "sum", (node,)) for node in nodes)
        rows: list[dict[str, Any]] = []
        files: dict[str, StoredFile] = {}
        finished = self._all(Call(f"mean {tree.name}", "finish", (tree,)) for tree in trees)
        for some, covering in finished:
            rows += some
            files |= covering.files
        counts = covering.counts
        if counts.scored == 0:
            raise RunError(
                f"nothing to score: {counts.documents} documents with {counts.tokens} tokens, {counts.empty} of them empty, "
                f"{counts.skipped} tokens skipped, {counts.invalid} invalid. Check the corpus and --positions."
            )
        (moved,) = self._all([Call("tokens that directions move", "moved_tokens", (self._example(),))])
        for row in rows:
            row["raised"], row["lowered"] = moved[row["layer"]] if row["group"] is None else (None, None)
        rows.sort(key=lambda row: (row["layer"], row["group"] is not None, row["group"] or ""))
        missing = trees[0].missing
        files |= write_summary(self.store, rows, covering, missing)
        picture = spectra_png(self.plan, self.store, [row for row in rows if row["group"] is None])
        files["reduced/spectra.png"] = self.store.store("reduced/spectra.png", picture)
        made = manifest(self.plan, trees, self.done.count(1), files) | {"counts": asdict(counts)}
        self.store.write_sealed("reduced/manifest.json", made)
        return rows, covering

    def _all(self, calls: Iterable[Call]) -> list[Any]:
        """Results of calls of the reduction, in the order of the calls; the first failure ends it."""
        listed = list(calls)
        results: dict[str, Any] = {}
        for call, outcome in self.dispatch.run(listed, len(listed), width=16):
            if isinstance(outcome, Failure):
                if outcome.kind == "damaged":
                    raise DamagedError(outcome.path, outcome.message)
                raise outcome.to_exception()
            results[call.name] = outcome
        return [results[call.name] for call in listed]

    def _example(self) -> Task:
        """A task with scored positions, the first that there is."""
        for i, flag in enumerate(self.done):
            if flag and self.store.receipt("done", task_name(i)).counts.scored:
                return self.tasks[i]
        raise AssertionError("no task has scored positions, and the reduction has counted some")

    def _mend(self, path: str) -> None:
        """Make undone what a damaged file belongs to."""
        folder, name = path.split("/")[:2]
        if folder in ("done", "sums"):
            self.damaged += 1
            self._undo(int(name[:8]))
        else:
            node = name.removesuffix(".json") if name.endswith(".json") else name.rsplit("-", 1)[0]
            self.store.remove(f"tree/{node}.json")

    # ---- progress ----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self.lease.lost is not None:
            raise RefusedError(f"{self.store.uri}: {self.lease.lost}.")
        now = time.monotonic()
        if not self._speed or now - self._speed[-1][0] >= 1.0:
            self._speed.append((now, self.counts.tokens))
            progress = self.progress()
            self._tell(progress)
            self.pool.report(progress)
        if now - self._written >= _PROGRESS_EVERY:
            self._write_progress()

    def progress(self) -> Progress:
        now = time.monotonic()
        (then, before), (last, tokens) = (self._speed[0], self._speed[-1]) if self._speed else ((now, 0), (now, 0))
        new = self.weight - self._weight_before
        left = (now - self._began) * (self.tasks.weight - self.weight) / new if new > 0 else None
        return Progress(
            self.state,
            self.done.count(1),
            len(self.tasks),
            self.weight,
            self.tasks.weight,
            self.counts,
            (tokens - before) / (last - then) if last > then else 0.0,
            left if self.weight < self.tasks.weight else 0.0,
            self.pool.alive,
            self.pool.pending,
            self.dispatch.retried,
            len(self.quarantined),
        )

    def _write_progress(self) -> None:
        self._written = time.monotonic()
        progress = self.progress()
        self._tell(progress)
        self.store.write_sealed("progress.json", {**asdict(progress), "written": time.time()})


def _computing(task: Task) -> Call:
    return Call(f"task {task.id}", "compute", (task,), task.weight)


def _said(failure: Failure) -> str:
    """A failure in words."""
    told: Mapping[str, str] = {
        "died": "its worker process died each time; was the machine out of memory?",
        "lost": "the machine it ran on was lost each time.",
        "hung": f"it did not end: {failure.message}; --task-timeout sets how long to wait.",
    }
    return told.get(failure.kind, failure.message)
