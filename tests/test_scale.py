"""Costs of large runs against what small ones do, and the scheduler on a simulated cluster; benchmarks/ are imported here."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as tf
from ray.exceptions import ActorDiedError

import jobs
from fisher_ray import Sampled, cluster, cost, dispatch
from fisher_ray.cost import HARDWARE, Cost, outline
from fisher_ray.dispatch import Call, Dispatch, Failure, RunError
from fisher_ray.plan import RunConfig
from fisher_ray.shards import RunStore
from fisher_ray.storage import Storage

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import driver
import scale
from standin import StandIn, Weather

DEMO = Path(__file__).parent.parent / "demo"

# ---- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "call_bytes", "sketch"), [("2,6", 1 << 28, None), ("2,6", 1, None), ("3", 1 << 28, 24)]
)
def test_traffic_of_the_reduction_is_that_of_a_run(
    layers: str, call_bytes: int, sketch: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that a whole run reads and writes while it adds up, by more than one level of the tree."""
    monkeypatch.setattr(cost, "_CALL_BYTES", call_bytes)
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", 400)
    monkeypatch.setattr(cost, "MIN_BLOCK_BYTES", 400)
    monkeypatch.setattr(cost, "_BLOCKS", 48)
    read: list[tuple[str, int]] = []
    written: list[tuple[str, int]] = []
    reading, writing, creating = Storage.read, Storage.write, Storage.create

    def noted_read(self: Storage, path: str) -> bytes:
        raw = reading(self, path)
        read.append((path, len(raw)))
        return raw

    def noted_write(self: Storage, path: str, raw: bytes) -> None:
        written.append((path, len(raw)))
        writing(self, path, raw)

    def noted_create(self: Storage, path: str, raw: bytes) -> bool:
        written.append((path, len(raw)))
        return creating(self, path, raw)

    looked: list[int] = []
    has_positions = RunStore._has_positions

    def noted_look(self: RunStore, task: int) -> bool:
        looked.append(task)
        return has_positions(self, task)

    monkeypatch.setattr(RunStore, "_has_positions", noted_look)
    monkeypatch.setattr(Storage, "read", noted_read)
    monkeypatch.setattr(Storage, "write", noted_write)
    monkeypatch.setattr(Storage, "create", noted_create)
    corpus = (str(DEMO / "corpus.jsonl"),)
    settings: dict[str, Any] = {
        "layers": layers,
        "sketch": sketch,
        "max_docs": 45,
        "num_samples": 1,
        "positions": "0:60:2",
    }
    stored, outcome = jobs.run_here(RunConfig(str(DEMO / "model"), corpus, str(tmp_path / "run"), **settings))
    assert outcome.tasks > 32
    expected = outcome.plan.cost.reduction(outcome.tasks)
    # Documents are longer than these tasks: in some none begins, and their sums hold nothing.
    empty = sum(receipt["counts"]["scored"] == 0 for receipt in stored.receipts) * outcome.plan.cost.sums_bytes

    summed = [(path, size) for path, size in read if path.split("/")[0] in ("sums", "tree", "done")]
    # The examples that directions are tried on are a receipt each.
    assert len(summed) - len(looked) == expected.gets and 32 <= len(looked) <= outcome.tasks
    means = [(path, size) for path, size in written if path.startswith(("tree/", "reduced/layer_"))]
    assert len(means) == expected.puts
    # A sketch is not full where a task has few positions; apart from that what differs is the headers of nodes.
    bytes_read = sum(size for path, size in summed if path.endswith(".npz"))
    bytes_written = sum(size for path, size in means if not path.endswith(".json"))
    assert bytes_read == pytest.approx(expected.read - empty, rel=0.02 if sketch is None else 0.15)
    assert bytes_written == pytest.approx(expected.written, rel=0.02 if sketch is None else 0.15)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Cost:
    folder = tmp_path_factory.mktemp("gpt2")
    tf.GPT2Config().save_pretrained(folder)
    return Cost(outline(str(folder)), (0, 6, 12), Sampled(1))


def test_an_estimate_adds_up(gpt2: Cost) -> None:
    """By hand, each price alone; and nothing is gained by more actors than tasks."""
    h100, free = HARDWARE["h100"], scale.Prices(0.0, 0.0, 0.0, 0.0)
    few, many, most = (scale.estimate(gpt2, 1e9, n, 1, h100, free) for n in (10, 100, 10**7))
    assert few.tasks == math.ceil(4e9 / gpt2.task_bytes("cuda", 4 * 10**9))
    assert few.task_seconds >= gpt2.seconds(1e9 / few.tasks, h100)
    assert few.mapping == pytest.approx(math.ceil(few.tasks / 10) * few.task_seconds)
    assert many.mapping == pytest.approx(math.ceil(many.tasks / 100) * many.task_seconds)
    assert most.mapping == max(most.task_seconds, most.tasks * scale.SERVICES.driver)
    assert few.dollars == 0.0
    by_hour = scale.estimate(gpt2, 1e9, 10, 8, h100, replace(free, gpu_hour=2.0))
    assert by_hour.dollars == pytest.approx(by_hour.hours * 10 * 8 * 2.0)
    by_put = scale.estimate(gpt2, 1e9, 10, 1, h100, replace(free, put=1.0))
    assert by_put.dollars == few.tasks * gpt2.requests + gpt2.reduction(few.tasks).puts
    by_byte = scale.estimate(gpt2, 1e9, 10, 1, h100, replace(free, gb_month=1e9))
    written = few.tasks * gpt2.sums_bytes + 1e9 * gpt2.position_bytes + gpt2.reduced_bytes(few.tasks)
    assert by_byte.dollars == pytest.approx(written, rel=1e-6)


def test_limits_are_where_a_resource_is_used_up(gpt2: Cost) -> None:
    h100 = HARDWARE["h100"]
    found = {limit.resource.split(":")[0] + limit.resource[-6:]: limit for limit in scale.limits_of(gpt2, 1, h100)}
    handing_out = next(limit.actors for limit in found.values() if "driver" in limit.resource)
    one = scale.estimate(gpt2, 1e12, 1, 1, h100, scale.Prices())
    assert handing_out * scale.SERVICES.driver == pytest.approx(one.task_seconds)
    sums = next(limit.actors for limit in found.values() if "sums/" in limit.resource)
    assert sums * 3 / one.task_seconds == pytest.approx(scale.SERVICES.puts)


def test_a_fit_finds_what_made_the_figures() -> None:
    rows = [[1.0, float(a), float(b)] for a, b in product((1, 4, 9), (2e6, 5e6, 8e6))]
    seconds = [0.5 + 0.25 * a + 3e-7 * b for _, a, b in rows]
    assert scale._fitted(rows, seconds) == pytest.approx([0.5, 0.25, 3e-7])


# ---- what a call costs the driver ----------------------------------------------------------------------------------------


class CountedMember(cluster._Member):
    """Counts by how often members are compared, or looked up: what every way through a queue has to do."""

    touched = 0

    def __eq__(self, other: object) -> bool:
        CountedMember.touched += 1
        return self is other

    def __hash__(self) -> int:
        CountedMember.touched += 1
        return id(self) >> 4


class CountedRunning(dispatch._Running):
    """Counts by how often somebody asks how long a call has run."""

    touched = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "since":
            CountedRunning.touched += 1
        return super().__getattribute__(name)


def touches(workers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Of members, and of running calls, for one call in steady state: each worker has two calls of a minute or so."""
    monkeypatch.setattr(cluster, "_Member", CountedMember)
    monkeypatch.setattr(dispatch, "_Running", CountedRunning)
    config = RunConfig("none", ("none",), "memory://none", max_actors=workers)
    pool, total = cluster.RayPool(config), 8 * workers
    calls = (Call(f"task {i}", "compute", (SimpleNamespace(id=i),), 1) for i in range(total))
    handed = Dispatch(pool, 3, None, lambda: None, lambda: None).run(calls, total)
    with StandIn(lambda call: "fine", Weather(compute=60.0, spread=0.3)).in_place(pool):
        pool._gpus = 0.0
        pool.open(SimpleNamespace(config=config))  # type: ignore[arg-type]
        list(islice(handed, 2 * workers))
        before = CountedMember.touched, CountedRunning.touched
        list(islice(handed, 4 * workers))
        after = CountedMember.touched, CountedRunning.touched
        # At the end workers stand idle, and there are many to be looked through.
        assert len(list(handed)) == 2 * workers
    return (CountedMember.touched - after[0]) / (2 * workers), (after[1] - before[1]) / (4 * workers)


def test_a_call_costs_the_same_among_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way through all members a call, and none through all that runs a second while tasks wait."""
    few, many = touches(10, monkeypatch), touches(400, monkeypatch)
    assert 0 < many[0] < 1.5 * few[0] < 200
    # Once a second the oldest is looked at: 30 and less than 1 times a call.
    assert many[1] <= few[1] < 100


def test_nodes_are_asked_for_once_however_many_calls_a_loss_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    weather = Weather(compute=60.0, io=1.0, boot=30.0, node_lives=400.0, actors_per_node=50)
    config = RunConfig("none", ("none",), "memory://none", max_actors=50)
    pool = cluster.RayPool(config)
    stand_in = StandIn(lambda call: "fine", weather, seed=1)
    calls = [Call(f"task {i}", "compute", (SimpleNamespace(id=i),), 1) for i in range(1000)]
    with stand_in.in_place(pool):
        pool._gpus = 0.0
        pool.open(SimpleNamespace(config=config))  # type: ignore[arg-type]
        handed = Dispatch(pool, 3, None, lambda: None, lambda: None)
        assert Counter(outcome for _, outcome in handed.run(calls, len(calls))) == {"fine": 1000}
    assert handed.retried >= 50 * stand_in.losses >= 50
    assert 1 <= stand_in.asked_nodes <= 2 * stand_in.losses


def loading(weather: Weather, lost_after: float) -> tuple[StandIn, Iterator[Any]]:
    """What calls come to on 16 workers of two nodes, the first of which is lost."""
    pool = cluster.RayPool(RunConfig("none", ("none",), "memory://none", max_actors=16))
    stand_in = StandIn(lambda call: "fine", weather, seed=1)
    calls = [Call(f"task {i}", "compute", (SimpleNamespace(id=i),), 1) for i in range(40)]

    def ended() -> Iterator[Any]:
        with stand_in.in_place(pool):
            pool._gpus = 0.0
            pool.open(SimpleNamespace(config=pool._config))  # type: ignore[arg-type]
            stand_in._at(lost_after, lambda: stand_in._lose(stand_in._nodes[0]))
            yield from Dispatch(pool, 3, None, lambda: None, lambda: None).run(calls, len(calls))

    return stand_in, ended()


def test_a_node_lost_while_its_workers_load_ends_no_run() -> None:
    """Eight of them die at once, before any worker has its model."""
    stand_in, ended = loading(Weather(compute=60.0, boot=30.0, load=60.0), lost_after=40.0)
    assert Counter(outcome for _, outcome in ended) == {"fine": 40}
    assert stand_in.losses == 1


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "room"),
    [
        ([{"CPU": 1.0}] * 2, 2, 0.0, 0),  # two of one are not one of two
        ([{"CPU": 4.0}, {"CPU": 3.0}], 2, 0.0, 3),
        ([{"CPU": 64.0, "GPU": 1.0}] * 8, 1, 2.0, 0),
        ([{"CPU": 64.0, "GPU": 8.0}] * 2, 1, 2.0, 8),
        ([{"CPU": 64.0, "GPU": 1.0}] * 2, 1, 0.6, 2),
        ([{"CPU": 64.0, "GPU": 1.0}], 1, 0.2, 5),
        ([{"CPU": 64.0, "GPU": 1.0}], 1, 0.1, 10),
        ([{"CPU": 3.0, "GPU": 1.0}], 1, 0.1, 3),
        ([{"memory": 1e9}], 1, 0.0, 0),
    ],
)
def test_room_is_that_of_nodes(
    nodes: list[dict[str, float]], cpus: int, gpus: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor is on one node, and a share of a GPU is of one GPU."""
    pool = cluster.RayPool(RunConfig("none", ("none",), "memory://none", cpus_per_actor=cpus))
    pool._gpus = gpus
    listed = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(
        cluster.ray, "nodes", lambda: [*listed, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}]
    )
    assert pool._room() == room


def loaded(pool: cluster.RayPool, answer: Any, node: str = "a") -> list[tuple[Any, Any]]:
    """What comes of an actor that was started just now and answers so once it has tried to load its model."""
    placed: Future[Any] = Future()
    future: Future[Any] = Future()
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(replace(answer, host=node) if isinstance(answer, Failure) else answer)
    member = cluster._Member(SimpleNamespace(), placed, future, time.monotonic(), node)
    pool._members.add(member)
    pool._loading[future] = member
    return pool._loaded(future, cluster._Nodes())


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> cluster.RayPool:
    """On two machines, the first of which was there from the beginning."""
    nodes = [
        {"NodeID": name, "NodeManagerHostname": name, "Alive": True, "Resources": {"CPU": 4.0}} for name in ("a", "b")
    ]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster.ray, "kill", lambda actor: None)
    pool = cluster.RayPool(RunConfig("none", ("none",), "memory://none", max_actors=4))
    pool._gpus = 0.0
    return pool


def test_one_sick_machine_is_not_the_others_end(pool: cluster.RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it fails of, however often; others are started there after growing pauses, and the progress line says why."""
    assert loaded(pool, None) == [] and pool.waits is None
    for count in range(1, 8):
        kind = ("sticky", "error", "fatal")[count % 3]
        assert loaded(pool, Failure(kind, "CUDA error: uncorrectable ECC")) == []
        why = "CUDA error: uncorrectable ECC (on a)"
        assert pool.waits == f"{count} actors in a row did not load the model, the last: {why}"
    started: list[int] = []
    monkeypatch.setattr(pool, "_start", lambda: started.append(1))
    pool.resize(4, 8)
    assert not started
    pool._looked, pool._load_failed = 0.0, time.monotonic() - 65
    pool.resize(4, 8)
    assert len(started) == 3
    assert loaded(pool, None) == [] and pool.waits is None


def test_without_a_worker_the_third_failure_in_a_row_ends_the_run(pool: cluster.RayPool) -> None:
    sick = Failure("error", "CUDA error: uncorrectable ECC", host="a")
    assert [loaded(pool, sick) for _ in range(3)] == [[], [], [(None, sick)]]


def test_workers_that_always_die_while_they_load_end_the_run(pool: cluster.RayPool) -> None:
    *before, (_, failure) = [ended for _ in range(3) for ended in loaded(pool, ActorDiedError())]
    assert not before and failure.host == "a" and isinstance(failure.to_exception(), RunError)
    assert "workers die while they load the model; were the machines out of memory? Ray says:" in failure.message


def test_a_machine_that_leaves_says_nothing_of_the_model(pool: cluster.RayPool) -> None:
    """However often, and whatever Ray calls the end of what ran there."""
    assert [loaded(pool, ActorDiedError(), "gone") for _ in range(9)] == [[]] * 9 and pool.waits is None


def test_what_is_wrong_with_the_model_is_said_where_two_machines_say_it(
    pool: cluster.RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Failure("fatal", "worker found none", "ConfigError")
    assert loaded(pool, wrong) == []  # the sick one is the first to say something
    assert loaded(pool, wrong, "b") == [(None, replace(wrong, host="b"))]
    assert str(replace(wrong, host="b").to_exception()) == "worker found none (on b)"
    # On the only machine at once, unless more are to come.
    for placing, ends in ((1, False), (0, True)):
        alone = cluster.RayPool(pool._config)
        alone._gpus = 0.0
        alone._placing = dict.fromkeys([Future() for _ in range(placing)])  # type: ignore[arg-type]
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
        assert bool(loaded(alone, wrong)) == ends


def test_one_that_does_not_load_is_replaced(pool: cluster.RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four hours after it was placed; how long it waited for a machine does not count."""
    started: list[int] = []
    monkeypatch.setattr(pool, "_start", lambda: started.append(1))
    now = time.monotonic()
    for since in (now - 14_500, now - 14_310, math.inf):
        member = cluster._Member(SimpleNamespace(), Future(), Future(), now - 20_000, "a", since)
        pool._members.add(member)
        pool._loading[member.loaded] = member
    assert pool.waits == "2 load the model, the first since 242 minutes"
    pool.resize(3, 6)
    assert len(pool._members) == 2
    assert (
        pool.waits
        == "1 actors in a row did not load the model, the last: it did not load the model within 14400 s (on a)"
    )


def test_without_a_worker_the_third_that_does_not_load_ends_the_run(
    pool: cluster.RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that dies does: others would stand for four hours each."""
    monkeypatch.setattr(pool, "_start", lambda: None)
    for _ in range(3):
        assert pool.wait(0.0) == []
        now = time.monotonic()
        member = cluster._Member(SimpleNamespace(), Future(), Future(), now, "a", now - 14_500)
        pool._members.add(member)
        pool._loading[member.loaded] = member
        pool._looked = 0.0
        pool.resize(1, 2)
    ((key, failure),) = pool.wait(0.0)
    assert key is None and "it did not load the model within" in failure.said and pool.wait(0.0) == []


@pytest.mark.parametrize(("cpus", "said"), [(1, None), (64, "no node has the 64 CPUs and 0 GPUs that an actor needs")])
def test_what_no_node_has_is_said(cpus: int, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = cluster.RayPool(RunConfig("none", ("none",), "memory://none", max_actors=1, cpus_per_actor=cpus))
    pool._gpus = 0.0
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    member = cluster._Member(SimpleNamespace(), Future(), Future(), time.monotonic())
    pool._members.add(member)
    pool._loading[member.loaded] = member
    assert pool.waits == said


# ---- the scheduler -------------------------------------------------------------------------------------------------------

STORM = Weather(
    compute=30.0, spread=0.3, stragglers=0.02, straggling=10.0, io=1.0, boot=60.0, load=20.0, nodes_per_second=0.1,
    actor_lives=1200.0, node_lives=1800.0, actors_per_node=4,
)  # fmt: skip


def test_a_storm_loses_nothing_and_repeats_itself() -> None:
    """That every task ends exactly once is asserted in ``schedule``; here that the figures can be."""
    found = driver.schedule(400, 20, STORM, seed=3, charged=False)
    assert found.deaths > 3 and found.losses > 1 and found.retried >= found.deaths
    assert found.quarantined == 0 and found.peak <= 20
    assert found.wall > found.ideal and found.lost > 0
    assert found.useful + found.lost < found.held < 20 * found.wall
    again = driver.schedule(400, 20, STORM, seed=3, charged=False)
    assert replace(again, driver=0.0) == replace(found, driver=0.0)


def test_without_failures_all_but_the_end_is_used() -> None:
    """Equal tasks, all machines there: rounds of one task's time, with reading and writing hidden behind computing."""
    found = driver.schedule(200, 10, Weather(compute=30.0, io=1.0), charged=False)
    assert found.ideal == 20 * 30.0 and found.useful == pytest.approx(200 * 30.0)
    assert (found.lost, found.deaths, found.losses, found.retried) == (0.0, 0, 0, 0)
    assert found.ideal + 2 <= found.wall < found.ideal + 5


def test_tasks_are_given_up_where_every_attempt_dies() -> None:
    """Processes that live for a fifth of a task: no task is done twice, and each is accounted for."""
    weather = Weather(compute=100.0, actor_lives=40.0, actors_per_node=1)
    found = driver.schedule(60, 10, weather, seed=5, charged=False)
    assert 0 < found.quarantined < 60 and found.deaths > 60
