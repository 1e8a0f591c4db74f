"""Workers as Ray actors, and jobs on Ray clusters: the only module that imports Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import string
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import quote

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util import metrics

from fisher_ray.dispatch import Call, Failure, RunError, Servant, StoppedError
from fisher_ray.plan import ConfigError, Device, Plan, RunConfig
from fisher_ray.shards import Receipt

# Workers that die while they load their model, one after the other, before any has loaded it. Those that die together, as
# with their node, count once: each has to have been started after the one before was gone.
_MAX_LOADS = 3
# Seconds on a machine after which a worker that has not loaded its model is given up, as a stuck mount or driver says nothing;
# 140 GB come over 10 MB/s in that time. And after which it is told that the model is still being loaded.
_LOADS_WITHIN, _LOADS_LONG = 14_400.0, 300.0
_LOOK_EVERY = 1.0

# Set where the Ray that RAY_ADDRESS names was started by a sweep on its own machine, and has no node to come.
STARTED_HERE = "FISHER_RAY_STARTED_HERE"

# Metrics, which Ray exports as ray_fisher_ray_NAME: of the driver by what of Progress they show, of the actors by what of a
# receipt's Counts they add up. The actors' histogram is fisher_ray_task_seconds, by stage.
GAUGES = {
    "tasks_done": "tasks_done",
    "tasks_total": "tasks",
    "tasks_quarantined": "quarantined",
    "tasks_retried": "retried",
    "actors_alive": "actors_alive",
    "actors_pending": "actors_pending",
}
COUNTERS = {
    "tokens": ("tokens", "tokens of the corpus read"),
    "positions": ("scored", "positions scored"),
    "invalid": ("invalid", "positions whose activations or scores were not finite"),
    "halvings": ("halvings", "micro-batches halved for want of memory"),
}


def _tags(plan: Plan) -> dict[str, str]:
    """Of every metric; Ray takes ASCII alone."""
    return {"run": quote(plan.config.output, safe=string.punctuation + " ")}


class _Actor:
    """A :class:`Servant` in a process of its own, that counts what it does."""

    def __init__(self, plan: Plan):
        # Calls come from two threads, and one of its own computes. Each thread that does so has its own pool of OpenMP's; with
        # more of their threads than CPUs they sleep between any two loops, which costs two CPUs 8 % of the time.
        self._thread = ThreadPoolExecutor(1)
        self._servant = Servant(plan, lambda function, *args: self._thread.submit(function, *args).result())
        self._counters = {
            added: metrics.Counter(f"fisher_ray_{name}", description=what, tag_keys=("run",))
            for name, (added, what) in COUNTERS.items()
        }
        self._seconds = metrics.Histogram(
            "fisher_ray_task_seconds",
            description="time of a task by stage",
            boundaries=[0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000],
            tag_keys=("run", "stage"),
        )
        for metric in (*self._counters.values(), self._seconds):
            metric.set_default_tags(_tags(plan))

    def node(self) -> str:
        """Its id."""
        return str(ray.get_runtime_context().get_node_id())

    def load(self) -> Failure | None:
        """Nothing, once the model is loaded."""
        try:
            self._servant.load()
        except Exception as error:
            return replace(Failure.of(error), host=socket.gethostname())
        return None

    def answer(self, call: Call) -> Any:
        result = self._servant.answer(call)
        if isinstance(result, Failure):
            return replace(result, host=socket.gethostname())
        if isinstance(result, Receipt):
            for added, counter in self._counters.items():
                if value := getattr(result.counts, added):
                    counter.inc(value)
            for stage, seconds in result.seconds.items():
                self._seconds.observe(seconds, tags={"stage": stage})
        return result


@dataclass(eq=False)
class _Member:
    """An actor and what it is doing.

    Attributes:
        placed: what tells its node, as soon as it has one.
        loaded: what tells that it has its model.
        started: when, by the monotonic clock.
        node: where it runs, once that is known.
        since: when that was.
        site: the node, for as long as it has its model.
    """

    actor: Any
    placed: Future[Any]
    loaded: Future[Any]
    started: float
    node: str | None = None
    since: float = math.inf
    site: str | None = None
    calls: set[Future[Any]] = field(default_factory=set)
    alone: bool = False
    dead: bool = False


class RayPool:
    """Actors on a Ray cluster, joined where one is given and else started in this process and stopped at the end.

    The pool asks for as many actors as there is work for, at most ``max_actors``: those that wait for a node are what an
    autoscaler sees as demand. Idle ones are dropped when the work runs out, so that nodes can leave.

    What a call's end costs does not grow with the actors: Ray announces each, where ``ray.wait`` looks at every call that
    runs (measured: 20,000 of them take 17 ms), and members are found without going through the others.
    """

    def __init__(self, config: RunConfig):
        self._config = config
        self._members: set[_Member] = set()
        self._running: dict[Future[Any], _Member] = {}
        self._loading: dict[Future[Any], _Member] = {}
        self._placing: dict[Future[Any], _Member] = {}
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()  # filled by threads of Ray's
        # Members in the order in which they are asked next; the values mean nothing.
        self._idle: OrderedDict[_Member, None] = OrderedDict()
        self._busy: OrderedDict[_Member, None] = OrderedDict()
        self._sites: Counter[str] = Counter()  # members that have their model, by node
        self._hung: list[tuple[Any, Any]] = []  # what :meth:`wait` gives next
        self._looked = 0.0
        self._failed_loads, self._load_failed, self._load_failure = 0, -math.inf, ""
        self._refusing: set[str] = set()  # machines on which the model, or the settings, cannot be
        self._spread = True

    def __enter__(self) -> RayPool:
        # One that is started here has no node to come.
        named = ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))
        grows = named and not os.environ.get(STARTED_HERE)
        self._context = joined()
        self._context.__enter__()
        try:
            gpus = self._config.gpus_per_actor
            if gpus is None:
                has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
                gpus = 1.0 if self._config.device == "cuda" or (has_gpus and self._config.device is None) else 0.0
            self._gpus = gpus
            self.device: Device = self._config.device or ("cuda" if gpus else "cpu")
            if not (grows and (self._config.max_actors or self._config.min_actors > 1)) and not self._room():
                have = ray.cluster_resources()
                raise ConfigError(
                    f"no node has the {self._needs}; "
                    f"{'the cluster' if grows else 'this machine'} has {have.get('CPU', 0):g} and {have.get('GPU', 0):g}. Ask "
                    "for fewer (--cpus-per-actor, --gpus-per-actor), or for --max-actors on a cluster that grows with demand."
                )
            if self._config.gpus_per_actor is None and self._config.device is None and not self._room():
                raise ConfigError(
                    "no node is there yet that has room for an actor, so nothing says what to compute on. Give "
                    "--gpus-per-actor 1, or --device cpu."
                )
        except BaseException:
            self._context.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for member in list(self._members):
            self._drop(member)
        self._context.__exit__(None, None, None)

    @property
    def alive(self) -> int:
        return len(self._members) - len(self._loading)

    @property
    def pending(self) -> int:
        return len(self._loading)

    @property
    def machines(self) -> int:
        return sum(node["Alive"] and self._on_node(node["Resources"]) > 0 for node in ray.nodes())

    @property
    def waits(self) -> str | None:
        if self._failed_loads:
            return f"{self._failed_loads} actors in a row did not load the model, the last: {self._load_failure}"
        if self.alive or not self.pending:
            return None
        since = [member.since for member in self._loading.values() if member.since < math.inf]
        longest = time.monotonic() - min(since, default=math.inf)
        if longest > _LOADS_LONG:
            return f"{len(since)} load the model, the first since {longest / 60:.0f} minutes"
        return None if self._room() else f"no node has the {self._needs}"

    @property
    def _needs(self) -> str:
        return f"{self._config.cpus_per_actor} CPUs and {self._gpus:g} GPUs that an actor needs"

    def open(self, plan: Plan) -> None:
        # Ray restarts nothing by itself: the driver counts what fails.
        options: dict[str, Any] = {
            "num_cpus": self._config.cpus_per_actor,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 2,
        }
        self._class = ray.remote(**options)(_Actor)
        self._plan = ray.put(plan)
        self._gauges = {
            shown: metrics.Gauge(f"fisher_ray_{name}", description=name.replace("_", " "), tag_keys=("run",))
            for name, shown in GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags(_tags(plan))

    def resize(self, wanted: int, kept: int) -> None:
        # A second call on a worker hides reading and writing; where others would stand idle it only delays the end.
        self._spread = wanted > len(self._members)
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked = time.monotonic()
        for member in [m for m in self._loading.values() if self._looked - m.since > _LOADS_WITHIN]:
            self._drop(member)
            host = _Nodes().host(member.node or "") or ""
            self._hung += self._not_loaded(
                member, Failure("hung", f"it did not load the model within {_LOADS_WITHIN:g} s", host=host)
            )
        most = self._config.max_actors or max(self._config.min_actors, self._room())
        # After one that did not load the next has time: what it died of may pass.
        if self._looked >= self._load_failed + 2.0 ** min(self._failed_loads, 6):
            for _ in range(min(wanted, most) - len(self._members)):
                self._start()
        surplus = len(self._members) - max(min(kept, most), 1)
        for member in [*self._loading.values(), *self._idle][: max(0, surplus)]:
            self._drop(member)

    @property
    def sites(self) -> Collection[str]:
        return self._sites.keys()

    def machine(self, worker: _Member) -> str:
        return worker.node or ""

    def room(self, alone: bool, avoid: Collection[Any]) -> _Member | None:
        for queue in (self._idle,) if alone or not self._spread else (self._idle, self._busy):
            for _ in range(len(queue)):
                member = next(iter(queue))
                queue.move_to_end(member)
                if member not in avoid and self.machine(member) not in avoid:
                    return member
        return None

    def submit(self, worker: _Member, call: Call, alone: bool) -> Future[Any]:
        future = self._announced(worker.actor.answer.remote(call))
        self._running[future] = worker
        worker.calls.add(future)
        worker.alone = alone
        self._place(worker)
        return future

    def wait(self, timeout: float) -> list[tuple[Any, Any]]:
        ended, self._hung = self._hung, []
        alive = _Nodes()
        for future in self._arrived(timeout if self._running or self._loading else min(timeout, 0.2)):
            if future in self._placing:
                member = self._placing.pop(future)
                with contextlib.suppress(RayError):  # what loading ends by says more
                    member.node, member.since = future.result(), time.monotonic()
            elif future in self._loading:
                ended += self._loaded(future, alive)
            elif future in self._running:  # else of a member that was dropped while it loaded
                member = self._running.pop(future)
                member.calls.discard(future)
                member.alone = False
                try:
                    ended.append((future, future.result()))
                    self._place(member)
                except RayError as error:
                    ended.append((future, self._died(member, error, alive)))
        return ended

    def kill(self, worker: _Member) -> None:
        self._drop(worker)

    def report(self, progress: Mapping[str, Any]) -> None:
        for shown, gauge in self._gauges.items():
            gauge.set(progress[shown])

    # ---- members -----------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """Actors that the cluster's nodes have place for, whoever uses them now."""
        return sum(self._on_node(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def _on_node(self, resources: Mapping[str, float]) -> int:
        """Actors that a node has place for: an actor is on one node, and a share of a GPU is of one GPU."""
        rooms = int(resources.get("CPU", 0) // self._config.cpus_per_actor)
        if self._gpus:
            gpus = int(resources.get("GPU", 0))
            # A tenth of a GPU has room ten times, and 1 // 0.1 is 9.
            rooms = min(rooms, gpus // int(self._gpus) if self._gpus >= 1 else gpus * int(1 / self._gpus + 1e-9))
        return rooms

    def _announced(self, ref: Any) -> Future[Any]:
        """What a call will give, put among what has ended once it has."""
        future: Future[Any] = ref.future()
        future.add_done_callback(self._ended.put)
        return future

    def _arrived(self, timeout: float) -> list[Future[Any]]:
        """What has ended: everything there is by now, or the first to come within a time."""
        arrived: list[Future[Any]] = []
        with contextlib.suppress(Empty):
            arrived.append(self._ended.get(timeout=timeout))
            while True:
                arrived.append(self._ended.get_nowait())
        return arrived

    def _start(self) -> None:
        actor = self._class.remote(self._plan)
        told = (self._announced(actor.node.remote()), self._announced(actor.load.remote()))
        member = _Member(actor, *told, time.monotonic())
        self._members.add(member)
        self._placing[member.placed] = self._loading[member.loaded] = member

    def _loaded(self, future: Future[Any], alive: _Nodes) -> list[tuple[Any, Any]]:
        member = self._loading.pop(future)
        try:
            answer = future.result()
        except RayError as error:
            answer = self._died(member, error, alive)
            if answer.kind == "lost":  # a machine that leaves says nothing of the model
                return []
            why = "workers die while they load the model; were the machines out of memory?"
            answer = replace(answer, kind="error", message=f"{why} Ray says: {answer.message}")
        else:
            if answer is None:
                self._failed_loads = 0
                member.site = self.machine(member)
                self._sites[member.site] += 1
                self._place(member)
                return []
            self._drop(member)
            if answer.kind == "fatal" and not self.alive:
                self._refusing.add(answer.host)
                # The model's fault, or the settings', where two machines say so, or there is no other.
                if len(self._refusing) > 1 or (self.machines < 2 and not self._placing):
                    return [(None, answer)]
        return self._not_loaded(member, answer)

    def _not_loaded(self, member: _Member, failure: Failure) -> list[tuple[Any, Any]]:
        """Take note of one that did not load its model; of those that were started together one counts."""
        if member.started >= self._load_failed:
            self._failed_loads, self._load_failed = self._failed_loads + 1, time.monotonic()
            self._load_failure = failure.said
        # One machine that cannot is not the others' end.
        return [] if self.alive or self._failed_loads < _MAX_LOADS else [(None, failure)]

    def _place(self, member: _Member) -> None:
        """Put a member where it will be found: among the idle, or those that take a second call."""
        for queue in (self._idle, self._busy):
            queue.pop(member, None)
        if member.dead or member.alone or len(member.calls) > 1:
            return
        (self._busy if member.calls else self._idle)[member] = None

    def _drop(self, member: _Member) -> None:
        member.dead = True
        if member.site is not None:
            self._sites[member.site] -= 1
            self._sites += Counter()  # without those that have none left
            member.site = None
        self._members.discard(member)
        self._loading.pop(member.loaded, None)
        self._placing.pop(member.placed, None)
        self._place(member)
        with contextlib.suppress(RayError):
            ray.kill(member.actor)

    def _died(self, member: _Member, error: RayError, alive: _Nodes) -> Failure:
        self._drop(member)
        # The end of a process is told by its machine. Where nobody tells it within a second the machine is silent too, though
        # it takes Ray up to 19 s to count it as dead.
        silent = isinstance(error, ActorUnavailableError)
        lost = silent or (member.node is not None and alive.host(member.node) is None)
        return Failure(
            "lost" if lost else "died", _one_line(error), host=(member.node and alive.host(member.node)) or ""
        )


def _one_line(error: BaseException) -> str:
    """What an error says; of a long one begin and end, as a traceback's last line says why."""
    said = " ".join(str(error).split())
    return said if len(said) <= 300 else f"{said[:120]} ... {said[-170:]}"


class _Nodes:
    """The nodes that are alive, asked for once, on first use: a lost node ends many calls at the same moment."""

    @cached_property
    def _hosts(self) -> dict[str, str]:
        return {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}

    def host(self, node: str) -> str | None:
        """The name of a node's machine; None where the node is gone."""
        return self._hosts.get(node)


@contextlib.contextmanager
def joined() -> Iterator[str]:
    """Ray: joined where RAY_ADDRESS names a cluster, else started in this process; what was started is stopped.

    Yields:
        the address, for other processes.
    """
    started = not ray.is_initialized()
    if started:
        given = os.environ.get("RAY_ADDRESS")
        # Without an address Ray would join whatever cluster was started on this machine last.
        local: dict[str, Any] = {} if given else {"include_dashboard": False}
        try:
            ray.init(
                given or "local", logging_level=logging.ERROR, log_to_driver=False, configure_logging=True, **local
            )
        except (ConnectionError, RuntimeError, RayError) as error:
            # It does not answer, is of another version, or wants a token.
            what = f"the Ray cluster at {given} cannot be joined" if given else "Ray cannot be started on this machine"
            raise ConfigError(f"{what}: {_one_line(error)}") from error
        except KeyboardInterrupt:
            ray.shutdown()
            raise
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        if started:
            ray.shutdown()


def submit(
    entrypoint: str, address: str | None, working_dir: str, env: Mapping[str, str], say: Callable[[str], None]
) -> tuple[str, int | None]:
    """Submit a job and follow its log to the end.

    Args:
        entrypoint: the shell command.
        address: of the cluster's job server; default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265.
        working_dir: sent along.
        env: variables of the job.
        say: called with pieces of the log.

    Returns:
        SUCCEEDED, STOPPED or FAILED, and the exit code of the job's own process where it has one. Ray's own command gives 0
        for a stopped job and 1 for every failed one.

    Raises:
        ConfigError: no job server answers, or it takes no job.
        RunError: it answers no more.
        StoppedError: following was interrupted; the job goes on.
    """
    from aiohttp import ClientError  # here, as workers and most commands do without
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)  # it announces each end of a connection
    try:
        client = JobSubmissionClient(address)
    except (OSError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"no Ray job server answers: {_one_line(error)} Give the address of a running one's dashboard (--address "
            "http://HOST:8265, or RAY_API_SERVER_ADDRESS), and where it asks for a token the cluster's (RAY_AUTH_TOKEN)."
        ) from error
    job = _submitted(client, entrypoint, {"working_dir": working_dir, "env_vars": dict(env)})
    say(f"job {job}: {entrypoint}\n")

    said = 0

    async def follow() -> None:
        nonlocal said
        at = 0
        async for piece in client.tail_job_logs(job):
            at += len(piece)
            if at > said:
                say(piece[said - at :])
                said = at

    # The connection may end before the job does and starts from the log's beginning again; the status comes last.
    try:
        while not (info := _asked(client, job)).status.is_terminal():
            try:
                asyncio.run(follow())
            except BrokenPipeError:  # whoever read the log has left
                raise
            except (RuntimeError, OSError, RayError, ClientError):
                pass
            time.sleep(0.5)
        # What came after the last connection broke.
        with contextlib.suppress(RuntimeError, OSError, RayError, ClientError):
            say(client.get_job_logs(job)[said:])
    except KeyboardInterrupt:
        raise StoppedError(f"no longer followed; job {job} goes on. To end it: ray job stop {job}") from None
    return str(info.status.value), info.driver_exit_code


def _asked(client: Any, job: str) -> Any:
    """What the job server says of a job; asked for a minute where it does not answer."""
    for delay in (1, 2, 4, 8, 15, 30, None):
        try:
            return client.get_job_info(job)
        except (OSError, RuntimeError, RayError) as error:
            if delay is None:
                raise RunError(
                    f"the job server answers no more: {_one_line(error)} Job {job} may go on: ray job status {job}"
                ) from error
            time.sleep(delay)
    raise AssertionError("unreachable")


def _submitted(client: Any, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """A job's id; a cluster that has just been started answers 500 until its agents are up."""
    for delay in (1, 2, 4, 8, 8, 8, None):
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
        except (OSError, RuntimeError, RayError) as error:
            if delay is None or "No available agent" not in str(error):
                raise ConfigError(f"the job was not accepted: {_one_line(error)}") from error
            time.sleep(delay)
    raise AssertionError("unreachable")
