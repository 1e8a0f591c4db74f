"""A stand-in for Ray in simulated time: as much of it as the pool uses, with machines that come late, fail and dawdle.

The driver on top is the real one; only its clock and its ``ray`` are these. Nothing here waits: the time of the next event is
the time that it is.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ray.exceptions import ActorDiedError

from fisher_ray import cluster, dispatch, driver
from fisher_ray.dispatch import Call


@dataclass(frozen=True)
class Weather:
    """How a simulated cluster behaves; times in seconds. As it stands: everything at once, and nothing fails.

    Attributes:
        compute: of a task, at the median; drawn log-normally with ``spread``, the standard deviation of the logarithm.
        stragglers, straggling: the share of attempts that take so many times as long, whatever the task.
        io: of a task before its computing, and again after it; another call of the actor may compute meanwhile.
        boot, load: until a node that is asked for is there, and until an actor on it has its model, within a fifth.
        nodes_per_second: that come at most.
        actor_lives, node_lives: mean time to the death of a process, and of a node with all on it; exponential.
        actors_per_node: places of a node.
    """

    compute: float = 0.0
    spread: float = 0.0
    stragglers: float = 0.0
    straggling: float = 1.0
    io: float = 0.0
    boot: float = 0.0
    load: float = 0.0
    nodes_per_second: float = math.inf
    actor_lives: float = math.inf
    node_lives: float = math.inf
    actors_per_node: int = 8


@dataclass(eq=False)
class _Node:
    name: str
    free: int
    alive: bool = True
    actors: dict[_Actor, None] = field(default_factory=dict)  # in an order that does not hang on addresses


@dataclass(eq=False)
class _Actor:
    """Computes one call at a time, in the order in which they came."""

    since: float = math.nan  # it has its model
    free_at: float = 0.0
    node: _Node | None = None
    dead: bool = False
    placing: Future[Any] = field(default_factory=Future)
    loading: Future[Any] = field(default_factory=Future)
    calls: dict[Future[Any], tuple[float, float, int]] = field(default_factory=dict)  # start, seconds, task


class StandIn:
    """Ray, its scheduler, an autoscaler and the machines.

    Args:
        answer: what a call gives.
        weather: how machines behave.
        seed: of what is drawn.
        burst: calls that have ended each time the driver looks.
        charged: the driver's own time passes in the simulation too.
    """

    def __init__(
        self, answer: Callable[[Call], Any], weather: Weather, seed: int = 0, burst: int = 1, charged: bool = False
    ):
        self._answer, self._weather, self._burst, self._charged = answer, weather, burst, charged
        self._random = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._arrived: deque[Future[Any]] = deque()
        self._nodes: list[_Node] = []
        self._places: deque[_Node] = deque()  # nodes with room
        self._waiting: deque[_Actor] = deque()
        self._coming, self._next_node = 0, 0.0
        self._work: dict[int, float] = {}  # of a task, drawn once
        self._finished: set[int] = set()
        self.asked_nodes = self.deaths = self.losses = self.peak = self.loaded = 0
        self.useful = self.lost = self.held = 0.0  # seconds of computing, and of actors that have their model
        self.driver_seconds = 0.0
        self._left = time.thread_time()

    @contextmanager
    def in_place(self, pool: cluster.RayPool) -> Iterator[None]:
        """Where the pool has Ray, its queue and the clock, it has this."""
        gauges = SimpleNamespace(Gauge=mock.Mock())
        ray = SimpleNamespace(remote=self._remote, put=lambda value: value, nodes=self._list_nodes, kill=self._kill)
        with (
            mock.patch.multiple(cluster, ray=ray, metrics=gauges, time=self),
            mock.patch.object(dispatch, "time", self),
            mock.patch.object(driver, "time", self),
            mock.patch.object(pool, "_ended", self),
        ):
            self._left = time.thread_time()
            yield

    @property
    def work(self) -> float:
        """Seconds of computing of all tasks that were started, each once."""
        return sum(self._work.values())

    # ---- the clock ---------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    # ---- the queue of what has ended -----------------------------------------------------------------------------------

    def put(self, future: Future[Any]) -> None:
        self._arrived.append(future)

    def get(self, timeout: float) -> Future[Any]:
        """The next to end, in whose time nothing but the simulation passes."""
        spent = time.thread_time() - self._left
        self.driver_seconds += spent
        if self._charged:
            self.now += spent
        until = self.now + timeout
        while len(self._arrived) < self._burst and self._events and self._events[0][0] <= until:
            at, _, happen = heapq.heappop(self._events)
            self.now = max(self.now, at)
            happen()
        if not self._arrived:
            self.now = until
        self._left = time.thread_time()
        return self.get_nowait()

    def get_nowait(self) -> Future[Any]:
        if not self._arrived:
            raise Empty
        return self._arrived.popleft()

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        if when < math.inf:
            self._count += 1
            heapq.heappush(self._events, (when, self._count, happen))

    # ---- ray -----------------------------------------------------------------------------------------------------------

    def _remote(self, **options: Any) -> Callable[[type], Any]:
        return lambda cls: SimpleNamespace(remote=self._start)

    def _list_nodes(self) -> list[dict[str, Any]]:
        self.asked_nodes += 1
        has = {"CPU": float(self._weather.actors_per_node)}
        return [
            {"NodeID": node.name, "NodeManagerHostname": node.name, "Alive": node.alive, "Resources": has}
            for node in self._nodes
        ]

    def _kill(self, handle: Any) -> None:
        self._end(handle.actor)

    # ---- machines --------------------------------------------------------------------------------------------------------

    def _start(self, plan: Any) -> Any:
        actor = _Actor()
        self._waiting.append(actor)
        self._at(self.now, self._seat)

        def method(begin: Callable[..., Future[Any]]) -> Any:
            def remote(*args: Any) -> Any:
                future = begin(*args)
                return SimpleNamespace(future=lambda: future)

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(
            actor=actor,
            node=method(lambda: actor.placing),
            load=method(lambda: actor.loading),
            answer=method(lambda call: self._begin(actor, call)),
        )

    def _seat(self) -> None:
        """Put actors that wait on nodes with room, and ask for more nodes where there is none."""
        while self._waiting and self._places:
            node = self._places[0]
            if not node.alive or not node.free:
                self._places.popleft()
                continue
            actor = self._waiting.popleft()
            if actor.dead:
                continue
            node.free -= 1
            node.actors[actor] = None
            actor.node = node
            actor.placing.set_result(node.name)
            self._at(self.now + self._weather.load * self._random.uniform(0.8, 1.2), lambda a=actor: self._load(a))
        places = self._weather.actors_per_node
        while self._coming * places < len(self._waiting):
            self._coming += 1
            self._next_node = max(self.now + self._weather.boot, self._next_node + 1 / self._weather.nodes_per_second)
            self._at(self._next_node, self._come)

    def _come(self) -> None:
        self._coming -= 1
        node = _Node(f"node {len(self._nodes)}", self._weather.actors_per_node)
        self._nodes.append(node)
        self._places.append(node)
        self._at(self.now + self._life(self._weather.node_lives), lambda: self._lose(node))
        self._seat()

    def _life(self, mean: float) -> float:
        return self._random.expovariate(1 / mean) if mean < math.inf else math.inf

    def _load(self, actor: _Actor) -> None:
        if actor.dead:
            return
        actor.since = self.now
        self.loaded += 1
        self.peak = max(self.peak, self.loaded)
        self._at(self.now + self._life(self._weather.actor_lives), lambda: self._die(actor))
        actor.loading.set_result(None)

    def _lose(self, node: _Node) -> None:
        node.alive = False
        self.losses += 1
        for actor in list(node.actors):
            self._end(actor)

    def _die(self, actor: _Actor) -> None:
        self.deaths += not actor.dead
        self._end(actor)

    def _end(self, actor: _Actor) -> None:
        """Of a process, with its calls; whoever ended it."""
        if actor.dead:
            return
        actor.dead = True
        if not math.isnan(actor.since):
            self.held += self.now - actor.since
            self.loaded -= 1
        for start, seconds, _ in actor.calls.values():
            self.lost += min(max(self.now - start, 0.0), seconds)
        if actor.node is not None:
            actor.node.actors.pop(actor, None)
            actor.node.free += 1
            if actor.node.alive:
                self._places.append(actor.node)
                self._at(self.now, self._seat)
        for future in [*actor.calls, actor.placing, actor.loading]:
            if not future.done():
                future.set_exception(ActorDiedError())
        actor.calls.clear()

    def _begin(self, actor: _Actor, call: Call) -> Future[Any]:
        future: Future[Any] = Future()
        if actor.dead:
            future.set_exception(ActorDiedError())
            return future
        weather, task = self._weather, call.args[0].id
        if task not in self._work:
            self._work[task] = weather.compute * math.exp(weather.spread * self._random.gauss(0, 1))
        seconds = self._work[task]
        if weather.stragglers and self._random.random() < weather.stragglers:
            seconds *= weather.straggling
        start = max(self.now + weather.io, actor.free_at)
        actor.free_at = start + seconds
        actor.calls[future] = (start, seconds, task)
        self._at(actor.free_at + weather.io, lambda: self._finish(actor, future, call))
        return future

    def _finish(self, actor: _Actor, future: Future[Any], call: Call) -> None:
        if future not in actor.calls:
            return  # it has died meanwhile
        _, seconds, task = actor.calls.pop(future)
        if task in self._finished:
            self.lost += seconds  # another attempt was first
        else:
            self._finished.add(task)
            self.useful += seconds
        future.set_result(self._answer(call))
