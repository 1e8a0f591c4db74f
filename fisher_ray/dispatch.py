"""Calls to workers: what can be asked of one, where workers run, and how calls are tried again. No Ray here."""

from __future__ import annotations

import heapq
import math
import socket
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, Protocol

import torch

from fisher_ray.architecture import ModelError
from fisher_ray.corpus import CorpusError, is_seen
from fisher_ray.numerics import settings_restored
from fisher_ray.plan import ConfigError, Device, Plan, RunConfig, Task
from fisher_ray.reduce import DIRECTIONS, Checkpoint, Node, finish_layers, look_back, read_array, sum_node
from fisher_ray.shards import Counts, Receipt, RunStore
from fisher_ray.storage import DamagedError, OutageError, StorageError, is_transient, several
from fisher_ray.worker import InTurn, Worker, at_once

_SHARED = "Corpus, model and output have to be at the same place on every machine."

# A task whose node was lost is not to blame for it, yet one that loses every node it is on has to end too. Nor is one whose
# reading failed as the storage did, for longer than readers wait, or whose machine reaches no storage; so many pauses are a
# minute and a half.
_MAX_BLAMELESS = {"lost": 20, "stumbled": 9, "unwell": 9}
# But where no task has ended yet, every one may take its machine along, as memory that runs out does on Kubernetes.
_MAX_LOST_UNPROVEN = 4
# A machine where so many calls in a row failed rests, for 2 to the power of their number in seconds, while there are others.
_SICK, _LONGEST_REST = 3, 600.0
# Seconds that a call waits for another machine than those where it has failed.
_ELSEWHERE = 60.0
# Times what tasks of its size take after which one gets a second attempt, and after which one counts as hung.
_SLOW, _HUNG = 3.0, 30.0
_SLOW_AT_LEAST, _HUNG_AT_LEAST, _HUNG_UNKNOWN = 5.0, 600.0, 3600.0
# Times what the slowest device is expected to take after which a task counts as hung, before any has ended.
_UNKNOWN = 4.0
# Of calls that no others are like: eigenvectors of many groups of 8,192 dimensions take one thread hours.
_SLOW_OTHERS, _HUNG_OTHERS = 60.0, 86400.0


class RunError(RuntimeError):
    """A run that could not finish; what is done stays done."""


class StoppedError(RuntimeError):
    """A run that was asked to stop; what is done stays done."""


class MachineError(RunError):
    """This machine does not reach what a run needs; another may."""


STOPPED = "stopped; what is done is kept, and the same command goes on."


# ---- what workers are asked, and what they answer ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a worker.

    Attributes:
        name: for messages, one of a kind within a run.
        method: of :class:`Servant`.
        weight: what its time is in proportion to, beside others of its run; None: nothing is known of it.
        repeatable: whether a second attempt may run beside a slow one. Not where both would write the same files: rounding
            may differ between machines, and a manifest could hold one attempt's checksum of a file that the other wrote last.
    """

    name: str
    method: str
    args: tuple[Any, ...]
    weight: int | None = None
    repeatable: bool = True


@dataclass(frozen=True)
class Failure:
    """Why a call gave no result.

    Attributes:
        kind: ``input``: the corpus, and no other attempt would end otherwise; ``fatal``: the whole run cannot go on;
            ``damaged``: a stored file, whose path is ``path``; ``error``: perhaps not the next time; ``stumbled``: a storage
            or a network did; ``sticky``: nor by the same process; ``unwell``: nor by the same machine, unless others say so
            too; ``died``: the process ended; ``lost``: its machine is gone; ``hung``: it took too long.
        host: the machine, where it is another than the driver's may be.
    """

    kind: Literal["input", "fatal", "damaged", "error", "stumbled", "sticky", "unwell", "died", "lost", "hung"]
    message: str
    error: str = ""
    path: str = ""
    host: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Sort what a worker raised; the one place that tells transient from final."""
        message = " ".join(str(error).split())
        name = type(error).__name__
        if isinstance(error, DamagedError):
            return cls("damaged", message, name, error.path)
        if isinstance(error, CorpusError):
            return cls("input", message, name)
        if isinstance(error, ModelError | ConfigError):
            return cls("fatal", message, name)
        if isinstance(error, StorageError | MachineError):
            return cls("unwell", message, name)
        if isinstance(error, RunError):
            return cls("error", message, name)
        if is_transient(error):
            return cls("stumbled", f"{name}: {message}", name)
        # After most errors of a device every further call fails, in this process only.
        device = isinstance(error, torch.AcceleratorError) or ("CUDA" in message and "out of memory" not in message)
        return cls("sticky" if device else "error", f"{name}: {message}", name)

    def to_exception(self) -> Exception:
        """The error as the driver raises it."""
        kinds: dict[str, type[Exception]] = {
            kind.__name__: kind for kind in (ModelError, ConfigError, CorpusError, StorageError, OutageError)
        }
        return kinds.get(self.error, RunError)(self.said)

    @property
    def said(self) -> str:
        """The message, and on which machine."""
        return f"{self.message} (on {self.host})" if self.host else self.message


class Servant:
    """Everything that a process of the pool can be asked to do. The model is loaded when it is first needed.

    Args:
        plan: the run's.
        in_turn: calls what computes, where calls come from several threads.
    """

    def __init__(self, plan: Plan, in_turn: InTurn = at_once):
        self.plan, self._in_turn = plan, in_turn
        self._worker: Worker | None = None
        self._loading = threading.Lock()

    @cached_property
    def store(self) -> RunStore:
        """The run; opened when it is first needed too, so that what fails is told as of a call."""
        return RunStore(self.plan.config.output)

    def load(self) -> Worker:
        """The worker, made where there is none.

        Raises:
            MachineError: this machine sees another directory where the run is, or nothing of the corpus. Its shards would be
                lost, and it would report files as gone that are there.
        """
        with self._loading:
            if self._worker is None:
                run = self.store.read_run()
                if run is None or run["fingerprint"] != self.plan.fingerprint:
                    raise MachineError(f"{socket.gethostname()} does not see the run at {self.store.uri}. {_SHARED}")
                self._look_for_corpus()
                self._worker = self._in_turn(Worker, self.plan, self.store)
            return self._worker

    def answer(self, call: Call) -> Any:
        """The result of a call, or the Failure."""
        try:
            try:
                return getattr(self, call.method)(*call.args)
            except CorpusError:
                self._look_for_corpus()  # a disk that is no longer mounted has lost no file
                raise
        except Exception as error:
            return Failure.of(error)

    def _look_for_corpus(self) -> None:
        if not is_seen(self.plan.sources):
            some = self.plan.sources[0].path
            raise MachineError(f"{socket.gethostname()} does not see the corpus: {some} is not there. {_SHARED}")

    def compute(self, task: Task) -> Receipt:
        return self.load().compute(task, self._in_turn)

    def check(self, folder: str, names: Sequence[str]) -> tuple[Counts, list[str]]:
        """Read back what receipts vouch for: counts of the sound ones, and the names of the others."""
        counts, damaged = Counts(), []
        found = several(lambda name: self.store.check(folder, name, self.plan.fingerprint)[0], names, 4)
        for name, receipt in zip(names, found, strict=True):
            if receipt is None:
                damaged.append(name)
            else:
                counts += receipt.counts
        return counts, damaged

    def sum(self, node: Node) -> None:
        sum_node(self.plan, self.store, node)

    def look_back(self, root: Node, before: Node | None) -> Checkpoint:
        return look_back(self.plan, self.store, root, before)

    def finish(self, root: Node) -> tuple[list[dict[str, Any]], Receipt]:
        return self._in_turn(finish_layers, self.plan, self.store, root)

    def moved_tokens(self, tasks: Sequence[Task]) -> dict[int, list[tuple[list[str], list[str]]]]:
        directions = {
            layer: read_array(self.store, layer, "eigenvectors")[:, :DIRECTIONS].T for layer in self.plan.layers
        }
        moved: dict[int, list[tuple[list[str], list[str]]]] = self._in_turn(self.load().moved_tokens, tasks, directions)
        return moved


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

    @property
    def machines(self) -> int:
        """How many machines workers can be on now."""

    @property
    def waits(self) -> str | None:
        """Why there are no more workers, where that is known."""

    def open(self, plan: Plan) -> None:
        """Start no worker yet, but know how."""

    def resize(self, wanted: int, kept: int) -> None:
        """Grow to so many workers, within what configuration and cluster allow; drop idle ones beyond ``kept``."""

    @property
    def sites(self) -> Collection[str]:
        """The machines that workers are on now."""

    def machine(self, worker: Any) -> str:
        """The machine that a worker is on, or was."""

    def room(self, alone: bool, avoid: Collection[Any]) -> Any:
        """A worker that can take a call, with nothing else on it if ``alone``; None if there is none now.

        Args:
            avoid: workers, and machines.
        """

    def submit(self, worker: Any, call: Call, alone: bool) -> Any:
        """Start a call."""

    def wait(self, timeout: float) -> list[tuple[Any, Any]]:
        """(key, result or Failure) of calls that ended; key None for a Failure of the pool itself."""

    def kill(self, worker: Any) -> None:
        """End a worker at once; its calls fail as ``died``."""

    def report(self, progress: Mapping[str, Any]) -> None:
        """Tell the metrics how far the run is."""


class LocalPool:
    """One worker in this process, for debugging and for machines without Ray."""

    alive, pending, machines, waits = 1, 0, 1, None
    sites: Collection[str] = ("",)

    def __init__(self, config: RunConfig):
        self.device: Device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._calls: deque[tuple[int, Call]] = deque()
        self._count = 0

    def __enter__(self) -> LocalPool:
        self._settings = settings_restored()
        self._settings.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._settings.__exit__(*error)

    def open(self, plan: Plan) -> None:
        self._servant = Servant(plan)

    def resize(self, wanted: int, kept: int) -> None:
        pass

    def machine(self, worker: Any) -> str:
        return ""

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

    def report(self, progress: Mapping[str, Any]) -> None:
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
    blameless: Counter[str] = field(default_factory=Counter)
    unwell: set[str] = field(default_factory=set)  # machines that do not reach what it needs
    sites: set[str] = field(default_factory=set)  # machines where it failed
    running: set[Any] = field(default_factory=set)


class Dispatch:
    """Hands calls to a pool until each has ended: with a result, or a Failure that no further attempt would change.

    A call that fails is tried again after a pause, ``max_attempts`` times, with nothing else on its worker: it cannot take an
    innocent one along twice, and is given up for what it did itself. One whose machine was lost, or whose storage failed, is
    tried again as often as that can be bad luck; what two machines do not reach, or the only one, is not there. While there are
    other machines a call is not tried again where it failed, and a machine where one call after the other fails is left alone
    for a growing while: it would be idle first each time, and fail at all calls that there are.

    When nothing waits, slow ones get a second attempt on another worker; of two the first to commit counts.

    Args:
        pool: where to.
        max_attempts: failures of one call before it is given up.
        timeout: seconds after which a call that has a weight counts as hung; None: by what others of its weight took.
        expected: seconds a unit of weight, at most, for as long as no call has told; asked where one takes long.
        proven: whether calls of this kind have ended well before.
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
        expected: Callable[[], float] = lambda: 0.0,
        proven: Callable[[], bool] = lambda: True,
    ):
        self._pool, self._max_attempts, self._timeout = pool, max_attempts, timeout
        self._tick, self._stopping, self._expected, self._proven = tick, stopping, expected, proven
        self.retried = 0
        self.last_failure: str | None = None  # of a call that is tried again
        self._pace: deque[float] = deque(maxlen=101)
        self._failing: Counter[str] = Counter()  # calls that failed on a machine since one ended well there
        self._resting: dict[str, float] = {}  # machines, and until when

    def run(self, calls: Iterable[Call], total: int, width: int = 1, ahead: int = 0) -> Generator[tuple[Call, Any]]:
        """Yield (call, result or Failure) as they end.

        Args:
            calls: taken one by one as workers have room. Close the generator where not all of them are waited for.
            total: how many there are.
            width: calls for which one more worker is worth having.
            ahead: calls that may come after these: idle workers are kept for them.
        """
        self._waiting = iter(calls)
        self._next: Call | None = None
        self._later: list[tuple[float, int, Call]] = []
        self._tries: dict[str, _Tries] = {}
        self._running: dict[Any, _Running] = {}
        self._hung: dict[Any, float] = {}  # and the seconds that each had
        self._bystanders: set[Any] = set()  # what else was on a worker that was killed
        left, looked = total, 0.0
        try:
            while left:
                self._tick()
                seconds = self._stopping()
                if seconds is not None and (seconds <= 0 or not self._running):
                    raise StoppedError(STOPPED)
                if seconds is None:
                    wanted = -(-left // width)
                    # As many again for second attempts, if they are there; and none leaves that has its model while calls wait.
                    self._pool.resize(wanted, max(2 * wanted, left) + ahead)
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
        finally:
            for running in self._running.values():
                # Nothing waits for attempts that came second; and what is not repeatable would write into the next round.
                if not left or not running.call.repeatable:
                    self._pool.kill(running.worker)

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
            alone = call.name in self._tries and self._tries[call.name].failed > 0
            # One that has to be alone holds up the others until a worker has run empty.
            worker = self._pool.room(alone, self._avoided(call, self._later[0][0] if due else 0.0))
            if worker is None:
                return
            if due:
                heapq.heappop(self._later)
            else:
                self._next = None
            self._submit(worker, call, alone)

    def _avoided(self, call: Call, since: float) -> Collection[str]:
        """Machines that a call which waits since then is kept from, where workers are on others too."""
        now = time.monotonic()
        resting = {site for site, until in self._resting.items() if until > now}
        tries = self._tries.get(call.name)
        failed = tries.sites if tries is not None and now < since + _ELSEWHERE else set()
        for avoided in (resting | failed, resting):
            if avoided and any(site not in avoided for site in self._pool.sites):
                return avoided
        return ()

    def _submit(self, worker: Any, call: Call, alone: bool) -> None:
        key = self._pool.submit(worker, call, alone)
        self._running[key] = _Running(call, worker, time.monotonic())
        self._tries.setdefault(call.name, _Tries()).running.add(key)

    def _look(self, now: float, may_start: bool) -> None:
        """End what hangs, and start second attempts of what is slow when nothing else waits."""
        waiting = self._next is not None or self._later
        least = _SLOW_AT_LEAST if may_start and not waiting else _HUNG_AT_LEAST
        if self._timeout is not None:
            least = min(least, self._timeout)
        # They lie in the order in which they were started, so behind the first that is young enough all are.
        for key, running in list(takewhile(lambda item: now - item[1].since > least, self._running.items())):
            taken, call = now - running.since, running.call
            slow, limit = self._limits(call, taken)
            if taken > limit and key not in self._hung:
                self._hung[key] = limit
                self._kill(key, running.worker)
            tries = self._tries.get(call.name)
            if (
                may_start
                and taken > slow
                and not waiting
                and call.repeatable
                and tries is not None
                and len(tries.running) == 1
                and not tries.failed
            ):
                worker = self._pool.room(True, [running.worker, *self._avoided(call, now)])
                if worker is not None:
                    self._submit(worker, call, alone=False)

    def _kill(self, key: Any, worker: Any) -> None:
        """End a worker for what one call on it did."""
        self._bystanders |= {
            other for other, running in self._running.items() if running.worker is worker and other != key
        }
        self._pool.kill(worker)

    def _limits(self, call: Call, taken: float) -> tuple[float, float]:
        """Seconds after which a call is slow, and after which it counts as hung."""
        if call.weight is None:
            return _SLOW_OTHERS, _HUNG_OTHERS
        slow, hung = math.inf, _HUNG_UNKNOWN
        if len(self._pace) >= 3:
            expected = statistics.median(self._pace) * call.weight
            slow, hung = max(_SLOW_AT_LEAST, _SLOW * expected), max(_HUNG_AT_LEAST, _HUNG * expected)
        elif taken > hung:
            hung = max(hung, _UNKNOWN * self._expected() * call.weight)
        return slow, hung if self._timeout is None else self._timeout

    def _ended(self, key: Any, outcome: Any) -> Iterator[tuple[Call, Any]]:
        """Take note of an attempt's end; yield the call if it is that of the call too."""
        running = self._running.pop(key, None)
        if running is None:  # of an earlier round that was broken off
            return
        call, site = running.call, self._pool.machine(running.worker)
        if not isinstance(outcome, Failure):
            self._failing.pop(site, None)
        tries = self._tries.get(call.name)
        if tries is None or key not in tries.running:  # another attempt was first
            return
        tries.running.discard(key)
        if not isinstance(outcome, Failure):
            if call.weight is not None:
                self._pace.append((time.monotonic() - running.since) / max(call.weight, 1))
            del self._tries[call.name]  # what else runs for it goes on unheard
            yield call, outcome
            return
        if key in self._hung:
            outcome = replace(outcome, kind="hung", message=f"took more than {self._hung[key]:g} s")
        elif key in self._bystanders and outcome.kind == "died":
            outcome = replace(outcome, kind="lost")
        if outcome.kind in ("sticky", "unwell"):
            self._kill(key, running.worker)
        if outcome.kind not in ("input", "fatal", "damaged", "lost"):
            tries.sites.add(site)
            self._failing[site] += 1
            if self._failing[site] >= _SICK:
                self._resting[site] = time.monotonic() + min(_LONGEST_REST, 2.0 ** min(self._failing[site], 10))
        if outcome.kind in _MAX_BLAMELESS:
            tries.blameless[outcome.kind] += 1
        else:
            tries.failed += 1
        final = outcome.kind in ("input", "fatal", "damaged")
        if outcome.kind == "unwell":
            tries.unwell.add(outcome.host)
            final = len(tries.unwell) > 1 or self._pool.machines < 2
        limits = dict(_MAX_BLAMELESS)
        if outcome.kind == "lost" and key not in self._bystanders and not self._proven():
            limits["lost"] = _MAX_LOST_UNPROVEN
        unlucky = any(tries.blameless[kind] >= most for kind, most in limits.items())
        if final or (not tries.running and (unlucky or tries.failed >= self._max_attempts)):
            del self._tries[call.name]
            yield call, outcome
        elif not tries.running:  # else another attempt may yet end well
            self.retried += 1
            self.last_failure = f"{call.name}: {outcome.said}"
            pause = min(30.0, 0.25 * 2 ** (tries.failed + tries.blameless.total()))
            heapq.heappush(self._later, (time.monotonic() + pause, self.retried, call))
