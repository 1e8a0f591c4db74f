"""What becomes of calls that fail, kill, hang or dawdle, on a pool that does as it is told and a clock that it moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jobs
from fisher_ray import dispatch
from fisher_ray.architecture import ModelError
from fisher_ray.corpus import CorpusError
from fisher_ray.dispatch import Call, Dispatch, Failure, MachineError, RunError, Servant, StoppedError
from fisher_ray.driver import _for_workers
from fisher_ray.plan import make_plan
from fisher_ray.storage import DamagedError, StorageError
from jobs import gpt2  # noqa: F401

HANGS = object()


class Clock:
    """Time that passes when someone waits."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(dispatch, "time", clock)
    return clock


class Pool:
    """Workers that answer what ``behave(call, attempt)`` says after a tenth of a second, two calls at a time each.

    Of ``hosts`` machines each has every so-manieth worker, and a ``sick`` one answers for itself.
    """

    device, alive, pending, machines, waits = "cpu", 0, 0, 2, None

    def __init__(
        self, clock: Clock, workers: int, behave: Callable[[Call, int], Any], hosts: int = 1, sick: Any = None
    ):
        self.clock, self.behave, self.hosts, self.sick = clock, behave, hosts, sick
        self.site = {i: str(i % hosts) for i in range(workers)}
        self.taken: Counter[str] = Counter()
        self.count = workers
        self.on: dict[int, list[int]] = {i: [] for i in range(workers)}
        self.calls: dict[int, tuple[Call, Any, int]] = {}
        self.attempts: dict[str, int] = {}
        self.companions: dict[str, set[str]] = {}
        self.killed: list[int] = []
        self.died: list[int] = []
        self.most = 0

    def open(self, plan: Any) -> None:
        pass

    def report(self, progress: Any) -> None:
        pass

    def resize(self, wanted: int, kept: int) -> None:
        assert kept >= wanted
        self.most = max(self.most, wanted)

    @property
    def sites(self) -> set[str]:
        return {self.site[worker] for worker in self.on}

    def machine(self, worker: int) -> str:
        return self.site[worker]

    def room(self, alone: bool, avoid: Collection[Any]) -> int | None:
        free = [w for w, keys in self.on.items() if w not in avoid and len(keys) < (1 if alone else 2)]
        free = [w for w in free if self.site[w] not in avoid]
        free = [w for w in free if not any(self.calls[key][2] for key in self.on[w])]
        return min(free, key=lambda w: len(self.on[w]), default=None)

    def submit(self, worker: int, call: Call, alone: bool) -> int:
        key = len(self.attempts) + sum(self.attempts.values()) + 1
        self.attempts[call.name] = self.attempts.get(call.name, 0) + 1
        for other in self.on[worker]:
            self.companions.setdefault(call.name, set()).add(self.calls[other][0].name)
        self.taken[self.site[worker]] += 1
        is_sick = self.sick is not None and self.site[worker] == "0"
        self.calls[key] = (call, self.sick if is_sick else self.behave(call, self.attempts[call.name]), alone)
        self.on[worker].append(key)
        return key

    def wait(self, timeout: float) -> list[tuple[Any, Any]]:
        self.clock.now += 0.1
        ended = [(key, Failure("died", "killed")) for key in self.died]
        self.died = []
        for worker, keys in list(self.on.items()):
            for key in list(keys):
                if key not in keys:
                    continue
                outcome = self.calls[key][1]
                if outcome is HANGS:
                    continue
                keys.remove(key)
                ended.append((key, outcome))
                if isinstance(outcome, Failure) and outcome.kind in ("died", "lost"):
                    ended += [(other, Failure(outcome.kind, "with it")) for other in keys]
                    keys.clear()
                    self._replace(worker)
        if not ended:
            self.clock.now += timeout
        return ended

    def kill(self, worker: int) -> None:
        if worker in self.on:
            self.killed.append(worker)
            self.died += self.on[worker]
            self._replace(worker)

    def _replace(self, worker: int) -> None:
        del self.on[worker]
        self.on[self.count], self.site[self.count] = [], self.site[worker]
        self.count += 1


def made(pool: Pool, max_attempts: int = 3, timeout: float | None = None, stopping: Any = lambda: None) -> Dispatch:
    return Dispatch(pool, max_attempts, timeout, lambda: None, stopping)


def calls(n: int) -> list[Call]:
    return [Call(f"task {i}", "compute", (i,), 1) for i in range(n)]


def outcomes(pool: Pool, n: int, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for call, outcome in made(pool, **settings).run(calls(n), n):
        assert call.name not in found
        found[call.name] = outcome
    return found


def test_every_call_ends_once(clock: Clock) -> None:
    pool = Pool(clock, 3, lambda call, attempt: call.args[0] * 10)
    assert outcomes(pool, 50) == {f"task {i}": i * 10 for i in range(50)}
    assert set(pool.attempts.values()) == {1} and pool.most == 50
    assert outcomes(pool, 0) == {}


def test_an_error_is_tried_again_and_not_for_ever(clock: Clock) -> None:
    def behave(call: Call, attempt: int) -> Any:
        if call.args[0] == 3:
            return Failure("error", "always")
        return Failure("error", "once") if call.args[0] == 5 and attempt == 1 else "fine"

    pool = Pool(clock, 2, behave)
    begun = clock.now
    found = outcomes(pool, 8, max_attempts=4)
    assert found.pop("task 3") == Failure("error", "always") and set(found.values()) == {"fine"}
    assert pool.attempts["task 3"] == 4 and pool.attempts["task 5"] == 2
    assert clock.now - begun > 0.5 + 1 + 2  # pauses between attempts grow


@pytest.mark.parametrize("kind", ["input", "fatal", "damaged"])
def test_what_no_attempt_changes_is_not_tried_again(kind: Any, clock: Clock) -> None:
    pool = Pool(clock, 2, lambda call, attempt: Failure(kind, "no") if call.args[0] == 1 else "fine")
    assert outcomes(pool, 4)["task 1"].kind == kind
    assert pool.attempts["task 1"] == 1


def test_what_kills_its_worker_takes_nobody_along_twice(clock: Clock) -> None:
    pool = Pool(clock, 2, lambda call, attempt: Failure("died", "") if call.args[0] in (4, 5) else "fine")
    found = outcomes(pool, 12)
    assert {name for name, outcome in found.items() if outcome != "fine"} == {"task 4", "task 5"}
    assert pool.attempts["task 4"] == pool.attempts["task 5"] == 3
    assert max(count for name, count in pool.attempts.items() if name not in ("task 4", "task 5")) == 2


def test_further_attempts_are_alone(clock: Clock) -> None:
    """Another one that kills the worker would count against it, and it would be given up for that."""
    beside = set()

    def behave(call: Call, attempt: int) -> Any:
        others = {pool.calls[key][0].name for keys in pool.on.values() for key in keys}
        if call.args[0] == 0 and attempt > 1:
            beside.update(others)
        elif "task 0" in others and pool.attempts["task 0"] > 1:
            beside.add(call.name)
        return Failure("error", "always") if call.args[0] == 0 else "fine"

    pool = Pool(clock, 1, behave)
    assert outcomes(pool, 40)["task 0"] == Failure("error", "always")
    assert pool.attempts["task 0"] == 3 and not beside


def test_lost_machines_are_not_the_tasks_fault(clock: Clock) -> None:
    pool = Pool(clock, 2, lambda call, attempt: Failure("lost", "") if call.args[0] == 1 and attempt <= 12 else "fine")
    assert set(outcomes(pool, 6).values()) == {"fine"}
    pool = Pool(clock, 2, lambda call, attempt: Failure("lost", "") if call.args[0] == 1 else "fine")
    assert outcomes(pool, 6)["task 1"].kind == "lost"
    assert pool.attempts["task 1"] == dispatch._MAX_BLAMELESS["lost"]


def test_a_storage_that_fails_for_a_while_is_no_tasks_fault(clock: Clock) -> None:
    """Whatever is asked for in ten seconds of it; one that never answers is given up after a minute and a half."""
    begun = clock.now

    def behave(call: Call, attempt: int) -> Any:
        fails = clock.now < begun + 10 or call.args[0] == 3
        return Failure("stumbled", "no answer") if fails else "fine"

    pool = Pool(clock, 4, behave)
    found = outcomes(pool, 300)
    assert found.pop("task 3").kind == "stumbled" and set(found.values()) == {"fine"}
    assert pool.attempts["task 3"] == 9 and 90 < clock.now - begun < 120
    assert not pool.killed


def test_a_broken_device_costs_its_process(clock: Clock) -> None:
    pool = Pool(clock, 1, lambda call, attempt: Failure("sticky", "") if attempt == 1 and call.args[0] == 0 else "fine")
    assert set(outcomes(pool, 3).values()) == {"fine"}
    assert pool.killed == [0]


def test_what_hangs_is_ended(clock: Clock) -> None:
    pool = Pool(clock, 2, lambda call, attempt: HANGS if call.args[0] == 2 else "fine")
    found = outcomes(pool, 5, timeout=7.25)
    hung = found.pop("task 2")
    assert hung.kind == "hung"
    assert hung.message == "took more than 7.25 s"  # the limit, however late its end was heard of
    assert set(found.values()) == {"fine"}
    assert len(pool.killed) == pool.attempts["task 2"] >= 3


def test_by_itself_it_waits_30_times_the_usual(clock: Clock) -> None:
    pool = Pool(clock, 1, lambda call, attempt: HANGS if call.args[0] == 5 and attempt == 1 else "fine")
    begun = clock.now
    assert set(outcomes(pool, 6).values()) == {"fine"}
    assert dispatch._HUNG_AT_LEAST < clock.now - begun < dispatch._HUNG_AT_LEAST + 60


def test_the_slow_get_a_second_attempt_elsewhere(clock: Clock) -> None:
    pool = Pool(clock, 2, lambda call, attempt: HANGS if call.args[0] == 7 and attempt == 1 else "fine")
    begun = clock.now
    assert set(outcomes(pool, 8).values()) == {"fine"}
    assert pool.attempts["task 7"] == 2 and clock.now - begun < 30
    assert len(pool.killed) == 1  # the first attempt, which nobody waits for


def test_slow_is_by_weight(clock: Clock) -> None:
    """What is a hundred times as much may take a hundred times as long."""
    pool = Pool(clock, 2, lambda call, attempt: HANGS if call.args[0] == 7 else "fine")
    heavy = [*calls(7), Call("task 7", "compute", (7,), 1000)]
    ticks = 0

    def stopping() -> float | None:
        nonlocal ticks
        ticks += 1
        return 0.0 if ticks > 60 else None

    with pytest.raises(StoppedError):
        list(made(pool, stopping=stopping).run(heavy, 8))
    assert pool.attempts["task 7"] == 1


@pytest.mark.parametrize(("expected", "limit"), [(0.0, 3600.0), (1.0, 3600.0), (20.0, 8000.0)])
def test_how_long_the_first_may_take_is_what_slow_devices_would(clock: Clock, expected: float, limit: float) -> None:
    pool = Pool(clock, 1, lambda call, attempt: HANGS if attempt == 1 else "fine")
    begun = clock.now
    (ended,) = Dispatch(pool, 3, None, lambda: None, lambda: None, lambda: expected).run(
        [Call("task", "compute", (0,), 100)], 1
    )
    assert ended[1] == "fine" and limit < clock.now - begun < limit + 30


def test_calls_that_no_others_are_like_have_hours(clock: Clock) -> None:
    """After a thousand quick tasks a sum may take hours; one worker that stands still does not hold it up that long.

    Nor is a mean begun twice: both would write the same files, and one what the other's checksums are not of.
    """
    ends = clock.now + 5 * 3600

    def behave(call: Call, attempt: int) -> Any:
        return HANGS if call.method == "finish" else "fine"

    pool = Pool(clock, 1, behave)
    dispatching = made(pool, stopping=lambda: 0.0 if clock.now > ends else None)
    assert [outcome for _, outcome in dispatching.run(calls(1000), 1000)] == ["fine"] * 1000
    finish = Call("mean", "finish", (), repeatable=False)
    with pytest.raises(StoppedError):
        list(dispatching.run([finish], 1))
    assert pool.attempts["mean"] == 1 and clock.now > ends and len(pool.killed) == 1  # by the stop
    pool = Pool(clock, 2, lambda call, attempt: HANGS if attempt == 1 else "fine")
    begun = clock.now
    assert [outcome for _, outcome in made(pool, timeout=5.0).run([Call("sum", "sum", ())], 1)] == ["fine"]
    assert 60 < clock.now - begun < 90
    pool, ends = Pool(clock, 2, behave), clock.now + 3600
    with pytest.raises(StoppedError):
        list(made(pool, stopping=lambda: 0.0 if clock.now > ends else None).run([finish], 1))
    assert pool.attempts["mean"] == 1


def test_a_mean_does_not_outlive_the_round_that_is_broken_off(clock: Clock) -> None:
    """The next round begins it anew, and both would write the same files; a sum's files are an attempt's own."""
    pool = Pool(clock, 3, lambda call, attempt: "fine" if call.name == "sum 0" else HANGS)
    mean = Call("mean", "finish", (), repeatable=False)
    round = made(pool).run([Call("sum 0", "sum", ()), mean, Call("sum 1", "sum", ())], 3)
    assert next(round)[0].name == "sum 0"
    (at_work,) = [worker for worker, keys in pool.on.items() if any(pool.calls[key][0] is mean for key in keys)]
    round.close()
    assert pool.killed == [at_work]


def test_reading_back_says_nothing_of_how_long_tasks_take(clock: Clock) -> None:
    """Checks are quick or slow by what they read; a task that hangs behind many of them is ended all the same."""
    pool = Pool(clock, 1, lambda call, attempt: HANGS if call.name == "task 7" and attempt == 1 else "fine")
    checks = [Call(f"check {i}", "check", (i,)) for i in range(60)]
    mixed = [*checks, *(Call(f"task {i}", "compute", (i,), 100_000) for i in range(8))]
    begun = clock.now
    assert {outcome for _, outcome in made(pool).run(mixed, len(mixed))} == {"fine"}
    assert clock.now - begun < 2 * dispatch._HUNG_AT_LEAST


def test_a_stop_lets_what_is_in_flight_finish(clock: Clock) -> None:
    pool = Pool(clock, 2, lambda call, attempt: "fine")
    found: list[str] = []
    ended = made(pool, stopping=lambda: 10.0 if found else None).run(calls(100), 100)
    with pytest.raises(StoppedError):
        found.extend(call.name for call, _ in ended)
    assert len(found) == len(pool.attempts) == 4  # both workers' two


def test_a_stop_does_not_wait_for_ever(clock: Clock) -> None:
    deadline = clock.now + 5
    pool = Pool(clock, 2, lambda call, attempt: HANGS)
    stop = made(pool, stopping=lambda: deadline - clock.now if pool.attempts else None)
    with pytest.raises(StoppedError):
        list(stop.run(calls(10), 10))
    assert clock.now <= deadline + 1.5


def test_a_call_is_not_given_up_while_another_attempt_runs(clock: Clock) -> None:
    """The second attempt of a slow call dies, and one failure is all that is allowed; the first ends well."""

    class Slow(Pool):
        def wait(self, timeout: float) -> list[tuple[Any, Any]]:
            ended = super().wait(timeout)
            if any(isinstance(outcome, Failure) for _, outcome in ended):
                (first,) = (key for key, (call, outcome, _) in self.calls.items() if outcome is HANGS)
                self.calls[first] = (self.calls[first][0], "fine", False)
            return ended

    pool = Slow(
        clock,
        2,
        lambda call, attempt: "fine" if call.args[0] != 3 else HANGS if attempt == 1 else Failure("died", "no memory"),
    )
    assert outcomes(pool, 4, max_attempts=1) == {f"task {i}": "fine" for i in range(4)}
    assert pool.attempts["task 3"] == 2


def unwell(host: str) -> Failure:
    return Failure("unwell", "writing failed", "StorageError", host=host)


@pytest.mark.parametrize("kind", ["sticky", "unwell"])
def test_what_shared_a_worker_that_is_ended_is_not_blamed(kind: str, clock: Clock) -> None:
    """With a single attempt a call."""

    def behave(call: Call, attempt: int) -> Any:
        if call.args[0] == 0 and attempt == 1:
            return Failure(kind, "broken", host="a")  # type: ignore[arg-type]
        return HANGS if call.args[0] == 1 and attempt == 1 else "fine"

    pool = Pool(clock, 1, behave)
    found = {call.name: outcome for call, outcome in made(pool, max_attempts=1).run(calls(2), 2)}
    assert found["task 1"] == "fine" and (found["task 0"] == "fine") == (kind == "unwell")
    assert pool.attempts["task 1"] == 2 and pool.companions["task 1"] >= {"task 0"}


def test_what_one_machine_does_not_reach_others_do(clock: Clock) -> None:
    """Its worker is replaced each time, and with one attempt a call nothing is given up."""
    pool = Pool(clock, 3, lambda call, attempt: unwell("b") if attempt <= call.args[0] % 4 else "fine")
    dispatching = made(pool, max_attempts=1)
    assert [outcome for _, outcome in dispatching.run(calls(8), 8)] == ["fine"] * 8
    assert len(pool.killed) >= 6 and dispatching.last_failure is not None
    assert dispatching.last_failure.endswith("writing failed (on b)")


@pytest.mark.parametrize(("machines", "hosts", "attempts"), [(2, "ab", 2), (2, "a", 9), (1, "a", 1)])
def test_what_no_machine_reaches_is_not_there(clock: Clock, machines: int, hosts: str, attempts: int) -> None:
    pool = Pool(clock, 1, lambda call, attempt: unwell(hosts[attempt % len(hosts)]))
    pool.machines = machines
    ((_, failure),) = made(pool).run(calls(1), 1)
    assert failure.kind == "unwell" and pool.attempts == {"task 0": attempts}
    assert isinstance(failure.to_exception(), StorageError)


def test_the_pools_own_failure_ends_everything(clock: Clock) -> None:
    class Broken(Pool):
        def wait(self, timeout: float) -> list[tuple[Any, Any]]:
            return [(None, Failure("fatal", "no such model", "ModelError"))]

    with pytest.raises(ModelError, match="no such model"):
        outcomes(Broken(clock, 1, lambda call, attempt: "fine"), 3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CorpusError("x"), "input"),
        (ModelError("x"), "fatal"),
        (StorageError("x"), "unwell"),
        (MachineError("x"), "unwell"),
        (DamagedError("sums/a", "x"), "damaged"),
        (RuntimeError("x"), "error"),
        (MemoryError("x"), "error"),
        (ConnectionResetError("x"), "stumbled"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "sticky"),
        (RuntimeError("CUDA out of memory"), "error"),
    ],
)
def test_sorting(error: Exception, kind: str) -> None:
    failure = Failure.of(error)
    assert failure.kind == kind and "x" in failure.message + "x"
    if kind in ("input", "fatal", "unwell") and not isinstance(error, MachineError):
        assert type(failure.to_exception()) is type(error)
    assert failure.path == ("sums/a" if kind == "damaged" else "")


# ---- machines that see something else ----------------------------------------------------------------------------------


def test_a_machine_without_the_run_or_the_corpus_computes_nothing(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """What it would write were lost with its disk, and what it does not find is not gone: it is no task's fault."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(jobs.some_text(300))
    _, outcome = jobs.run_here(jobs.settings(gpt2, folder, tmp_path / "run"))
    plan = outcome.plan
    seen = _for_workers(plan)
    assert 1 <= len(seen.sources) <= 8
    task = plan.make_tasks()[0]

    def refusal(config: Any, sources: Any) -> str:
        failure = Servant(replace(seen, config=config, sources=sources)).answer(Call("x", "compute", (task,)))
        assert isinstance(failure, Failure) and failure.kind == "unwell", failure
        return failure.message

    elsewhere = tmp_path / "elsewhere"
    assert f"does not see the run at {elsewhere}" in refusal(replace(seen.config, output=str(elsewhere)), seen.sources)
    assert not elsewhere.exists()
    gone = tuple(replace(source, path=f"{source.path}.not") for source in seen.sources)
    assert f"does not see the corpus: {gone[0].path} is not there" in refusal(seen.config, gone)
    Servant(replace(seen, sources=(*gone, seen.sources[0]))).load()  # a file that is gone is its task's affair
    assert isinstance(Failure.of(RunError("x")).to_exception(), RunError)


def test_a_machine_that_has_lost_the_corpus_has_lost_no_file(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "corpus").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"corpus/{name}.txt").write_text("one two")
    _, outcome = jobs.run_here(jobs.settings(gpt2, tmp_path / "corpus", tmp_path / "run"))
    servant = Servant(_for_workers(outcome.plan))
    compute = Call("x", "compute", (outcome.plan.make_tasks()[0],))
    assert not isinstance(servant.answer(compute), Failure)
    (tmp_path / "corpus/a.txt").unlink()
    assert servant.answer(compute).kind == "input"
    (tmp_path / "corpus/b.txt").unlink()
    failure = servant.answer(compute)
    assert failure.kind == "unwell" and "does not see the corpus" in failure.message


def test_workers_load_the_commit_that_was_fingerprinted(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """A branch of a hub's may move while they are still to come; a local model has no commit."""
    (tmp_path / "docs.txt").write_text("one two")
    plan = make_plan(jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "run"))
    assert _for_workers(plan).config.revision is None
    commit = "0123456789abcdef" * 2 + "01234567"
    hub = replace(
        plan, config=replace(plan.config, model="some/model"), result_fields={**plan.result_fields, "weights": commit}
    )
    assert _for_workers(hub).config.revision == commit


# ---- machines that are sick ----------------------------------------------------------------------------------------------


class Fast(Pool):
    """Where a sick machine fails at once and the others take a minute a call: it is the first with room, again and again."""

    def wait(self, timeout: float) -> list[tuple[Any, Any]]:
        self.clock.now += 0.1
        due = {key for key, (_, outcome, _) in self.calls.items() if isinstance(outcome, Failure)}
        ended = [(key, self.calls[key][1]) for key in self.calls if key in due or self.clock.now >= self.ends[key]]
        for key, _ in ended:
            del self.calls[key]
        for keys in self.on.values():
            keys[:] = [key for key in keys if key in self.calls]
        return ended

    def submit(self, worker: int, call: Call, alone: bool) -> int:
        key = super().submit(worker, call, alone)
        self.ends = {**getattr(self, "ends", {}), key: self.clock.now + 60.0}
        return key


@pytest.mark.parametrize("kind", ["error", "stumbled"])
def test_a_sick_machine_costs_no_call(kind: Any, clock: Clock) -> None:
    """It has room before all others each time, and would fail at everything there is."""
    pool = Fast(clock, 8, lambda call, attempt: "fine", hosts=8, sick=Failure(kind, "403 Forbidden"))
    assert set(outcomes(pool, 400).values()) == {"fine"}
    # Some 30 minutes: it is asked after 8, 16, 32, ... seconds again, and not 18,000 times.
    assert 3 <= pool.taken["0"] < 16


def test_a_call_is_tried_again_on_another_machine(clock: Clock) -> None:
    """Though the first one is as free, and fails at this call alone."""
    places: list[str] = []

    class Told(Pool):
        def submit(self, worker: int, call: Call, alone: bool) -> int:
            if call.name == "task 3":
                places.append(self.site[worker])
            return super().submit(worker, call, alone)

    pool = Told(clock, 3, lambda call, attempt: Failure("error", "no") if call.name == "task 3" else 1, hosts=3)
    assert outcomes(pool, 9)["task 3"] == Failure("error", "no")
    assert sorted(places) == ["0", "1", "2"]


def test_where_all_machines_fail_none_rests(clock: Clock) -> None:
    """It would only take longer to say so."""
    pool = Pool(clock, 4, lambda call, attempt: Failure("error", "no such library"), hosts=2)
    began = clock.now
    assert len(outcomes(pool, 20)) == 20 and pool.attempts == {f"task {i}": 3 for i in range(20)}
    assert clock.now - began < 60


def test_a_machine_that_recovers_is_asked_again(clock: Clock) -> None:
    """After a rest, and from one success on like the others."""
    pool = Pool(clock, 4, lambda call, attempt: 1, hosts=2, sick=Failure("stumbled", "no route"))
    handed = made(pool).run(calls(4000), 4000)
    for ended, _ in enumerate(handed):
        if ended == 200:
            assert pool.taken["0"] < 20
            pool.sick = None
    assert pool.taken["0"] > 1000


def test_a_machine_that_fails_now_and_then_does_not_rest(clock: Clock) -> None:
    class Moody(Pool):
        def submit(self, worker: int, call: Call, alone: bool) -> int:
            self.sick = Failure("stumbled", "reset by peer") if self.taken["0"] % 2 else None
            return super().submit(worker, call, alone)

    pool = Moody(clock, 4, lambda call, attempt: 1, hosts=2)
    assert len(outcomes(pool, 400)) == 400 and pool.taken["0"] > 150


@pytest.mark.parametrize(("proven", "attempts"), [(False, 4), (True, 20)])
def test_before_anything_has_ended_fewer_lost_machines_are_enough(proven: bool, attempts: int, clock: Clock) -> None:
    pool = Pool(clock, 1, lambda call, attempt: Failure("lost", "node died"))
    handed = Dispatch(pool, 3, None, lambda: None, lambda: None, proven=lambda: proven).run(calls(1), 1)
    assert [outcome.kind for _, outcome in handed] == ["lost"] and pool.attempts == {"task 0": attempts}


def test_no_worker_leaves_while_calls_wait(clock: Clock) -> None:
    """Short ones, for which nobody is started."""
    kept: list[tuple[int, int, int]] = []

    class Resized(Pool):
        def resize(self, wanted: int, kept_: int) -> None:
            kept.append((left, wanted, kept_))

    left = 64
    for _ in made(Resized(clock, 2, lambda call, attempt: 1)).run(calls(64), 64, width=16):
        left -= 1
    assert kept[0] == (64, 4, 64) and all(some >= max(there, 2 * wanted) for there, wanted, some in kept)
