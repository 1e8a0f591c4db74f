"""Tasks on Ray actors: the only module that imports Ray.

The driver hands out tasks and collects receipts; matrices go from actor to storage and never through the driver. What is
done is known from storage alone, so the same command after any interruption computes only what is missing.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from fisher_ray.architecture import ModelError
from fisher_ray.corpus import CorpusError
from fisher_ray.plan import ConfigError, Plan, RunConfig, Task, make_plan
from fisher_ray.reduce import read_array, reduce_shards, write_summary
from fisher_ray.shards import Counts, Receipt, RunStore, StorageError
from fisher_ray.worker import Worker

# A worker that dies takes its task along; a task that killed this many is not tried again.
_MAX_ATTEMPTS = 3

# No other attempt would end otherwise.
_FINAL = (CorpusError, ModelError, StorageError, MemoryError, ValueError)


class RunError(RuntimeError):
    """A run that could not finish; what is done stays done."""


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        rows: the summary, one row a layer.
        counts: what became of the corpus's tokens.
        halvings: micro-batches halved for want of memory.
        resumed: tasks that were done before.
    """

    plan: Plan
    store: RunStore
    rows: list[dict[str, Any]]
    counts: Counts
    halvings: int
    resumed: int


class _Actor:
    """A worker in a process of its own. The model is loaded by the first call, so that its errors arrive whole."""

    def __init__(self, plan: Plan):
        self.plan, self.store = plan, RunStore(plan.config.output)
        self.worker: Worker | None = None

    def _held(self) -> Worker:
        if self.worker is None:
            self.worker = Worker(self.plan, self.store)
        return self.worker

    def compute(self, task: Task) -> Receipt:
        return self._held().compute(task)

    def reduce(self, receipts: list[Receipt], example: Task) -> list[dict[str, Any]]:
        rows = reduce_shards(self.plan, self.store, receipts)
        directions = {layer: read_array(self.store, layer, "eigenvectors")[:, 0].copy() for layer in self.plan.layers}
        moved = self._held().moved_tokens(example, directions)
        for row in rows:
            row["raised"], row["lowered"] = moved[row["layer"]]
        write_summary(self.store, rows, receipts)
        return rows


Progress = Callable[[int, Counts], None]


def run(config: RunConfig, progress: Callable[[Plan], AbstractContextManager[Progress]]) -> Outcome:
    """Plan, compute and reduce a run, or go on with one that was interrupted.

    Args:
        config: what to run.
        progress: given the plan, a context whose value is told (weight of the tasks done, counts) whenever a task is.

    Raises:
        ModelError, ConfigError, CorpusError, StorageError: input that cannot be; nothing is left behind where nothing was
            there before and no task was done.
        RunError: a task failed for good, or nothing could be scored.
    """
    plan = make_plan(config)
    store = RunStore(config.output)
    existing = store.read_run()
    if existing is None:
        store.create_run(_description(plan), plan.table())
    else:
        _check_same(plan, existing, store)
    done = store.receipts(plan.fingerprint)
    resumed = len(done)
    try:
        with _Ray():
            pool = _Pool(plan, len(plan.tasks) - resumed)
            with progress(plan) as tell:
                _map(plan, pool, done, tell)
            return _reduced(plan, store, pool, done, resumed)
    except BaseException:
        if existing is None and not any(r.counts.scored for r in store.receipts(plan.fingerprint).values()):
            store.discard()
        raise


def _description(plan: Plan) -> dict[str, Any]:
    return {
        "schema": "run.1",
        "config": plan.config.asdict(),
        "fingerprint": plan.fingerprint,
        "result_fields": plan.result_fields,
        "layers": plan.layers,
        "tasks": len(plan.tasks),
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
    raise StorageError(f"{store.uri} holds another run: {named}. Choose another output directory or the same settings.")


class _Ray:
    """Ray, joined where a cluster is given and else started in this process; what was started is stopped."""

    def __enter__(self) -> None:
        self.started = not ray.is_initialized()
        if self.started:
            given = os.environ.get("RAY_ADDRESS")
            local: dict[str, Any] = {} if given else {"include_dashboard": False}
            ray.init(address=given, logging_level=logging.ERROR, log_to_driver=False, configure_logging=True, **local)

    def __exit__(self, *_: object) -> None:
        if self.started:
            ray.shutdown()


class _Pool:
    """Actors, each with the task it works on."""

    def __init__(self, plan: Plan, tasks: int):
        size, gpus = _pool_size(plan.config, tasks)
        self._class = ray.remote(num_cpus=plan.config.cpus_per_actor, num_gpus=gpus)(_Actor)
        self._plan = ray.put(_for_workers(plan))
        self.idle = [self._class.remote(self._plan) for _ in range(size)]
        self.busy: dict[Any, tuple[Any, Task]] = {}

    def submit(self, task: Task) -> None:
        actor = self.idle.pop()
        self.busy[actor.compute.remote(task)] = (actor, task)

    def replace(self) -> None:
        self.idle.append(self._class.remote(self._plan))


def _for_workers(plan: Plan) -> Plan:
    """A plan as workers need it: tasks travel one by one, and a worker's current directory may be another."""
    model = Path(plan.config.model)
    config = replace(
        plan.config,
        model=str(model.resolve()) if model.exists() else plan.config.model,
        output=RunStore(plan.config.output).uri,
    )
    return Plan(config, plan.facts, (), plan.result_fields)


def _pool_size(config: RunConfig, tasks: int) -> tuple[int, float]:
    """(actors, GPUs an actor): as asked for, else one an accelerator, else as many as the cores allow."""
    resources = ray.cluster_resources()
    gpus = config.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if resources.get("GPU", 0) >= 1 else 0.0
    room = int(resources.get("CPU", 0) // config.cpus_per_actor)
    if gpus:
        room = min(room, int(resources.get("GPU", 0) // gpus))
    if room < 1:
        raise ConfigError(
            f"an actor needs {config.cpus_per_actor} CPUs and {gpus:g} GPUs; the cluster has "
            f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g}. "
            "Ask for fewer (--cpus-per-actor, --gpus-per-actor)."
        )
    return max(1, min(config.actors or room, room, tasks)), gpus


def _map(plan: Plan, pool: _Pool, done: dict[int, Receipt], progress: Progress) -> None:
    """Compute the tasks that are not done, adding their receipts to ``done``."""
    queue = deque(task for task in plan.tasks if task.id not in done)
    attempts: dict[int, int] = {}
    weight = sum(task.weight for task in plan.tasks if task.id in done)
    counts = _total(done)
    while queue or pool.busy:
        progress(weight, counts)
        while queue and pool.idle:
            pool.submit(queue.popleft())
        (ready,), _ = ray.wait(list(pool.busy), num_returns=1)
        actor, task = pool.busy.pop(ready)
        try:
            receipt = done[task.id] = ray.get(ready)
            weight, counts = weight + task.weight, counts + receipt.counts
            pool.idle.append(actor)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, CorpusError | ModelError | StorageError):
                raise cause from None
            attempts[task.id] = attempts.get(task.id, 0) + 1
            if isinstance(cause, _FINAL) or attempts[task.id] >= _MAX_ATTEMPTS:
                raise _failed(task, f"{type(cause).__name__}: {cause}", attempts[task.id]) from error
            pool.idle.append(actor)
            queue.append(task)
        except RayActorError as error:
            attempts[task.id] = attempts.get(task.id, 0) + 1
            if attempts[task.id] >= _MAX_ATTEMPTS:
                raise _failed(
                    task, "its worker died each time; was the machine out of memory?", _MAX_ATTEMPTS
                ) from error
            pool.replace()
            queue.append(task)
    progress(weight, counts)


def _total(done: dict[int, Receipt]) -> Counts:
    return sum((receipt.counts for receipt in done.values()), Counts())


def _reduced(plan: Plan, store: RunStore, pool: _Pool, done: dict[int, Receipt], resumed: int) -> Outcome:
    """Reduce on one of the actors, where the model is at hand to say which tokens the directions move."""
    counts = _total(done)
    if counts.scored == 0:
        raise RunError(
            f"nothing to score: {counts.documents} documents with {counts.tokens} tokens, {counts.empty} of them empty, "
            f"{counts.skipped} tokens skipped, {counts.invalid} invalid. Check the corpus and --positions."
        )
    example = next(task for task in plan.tasks if done[task.id].counts.scored)
    receipts = [done[task.id] for task in plan.tasks]
    try:
        rows = ray.get(pool.idle[-1].reduce.remote(receipts, example))
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise RunError("the worker that reduced the run died; the same command reduces again.") from error
    halvings = sum(receipt.halvings for receipt in receipts)
    return Outcome(plan, store, rows, counts, halvings, resumed)


def _failed(task: Task, why: str, attempts: int) -> RunError:
    first = task.ranges[0]
    tries = f"{attempts} times" if attempts > 1 else "and would again"
    return RunError(
        f"task {task.id} ({first.path}, from {first.start}) failed {tries}: {' '.join(why.split())} "
        "What is done is kept; the same command goes on."
    )
