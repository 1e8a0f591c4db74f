"""When a run goes on past tasks that fail, or on other machines, and when it ends because the fault is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jobs
from fisher_ray import cost, driver
from fisher_ray.corpus import CorpusError
from fisher_ray.dispatch import Call, Failure, LocalPool, RunError, Servant
from fisher_ray.driver import RefusedError, run
from fisher_ray.plan import RunConfig, Task
from fisher_ray.shards import RunStore
from jobs import Stored, gpt2  # noqa: F401


@pytest.fixture
def config(gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:  # noqa: F811
    """Of twelve tasks, each tried once; two that fail while more than four wait are two too many."""
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", 500)
    monkeypatch.setattr(driver, "_HOPELESS", 2)
    monkeypatch.setattr(driver, "_MORE", 2)
    (tmp_path / "docs.txt").write_text(jobs.some_text(5_500))
    return jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "run", layers="1", num_samples=1, max_attempts=1)


def fails(monkeypatch: pytest.MonkeyPatch, tasks: Callable[[int], bool], error: Exception) -> None:
    compute = Servant.compute

    def computed(self: Servant, task: Task) -> Any:
        if tasks(task.id):
            raise error
        return compute(self, task)

    monkeypatch.setattr(Servant, "compute", computed)


def notes(config: RunConfig) -> set[int]:
    return set(map(int, RunStore(config.output).names("quarantine")))


def test_what_breaks_on_the_way_takes_no_task_along(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an image without a library does, or a store that answers no more: none is set aside, and the run goes on later."""
    with monkeypatch.context() as broken:
        fails(broken, lambda task: task >= 4, RuntimeError("no such library"))
        with pytest.raises(
            RunError, match=r"^2 tasks failed in a row, and none succeeded\. The last: task 5 .*library"
        ):
            jobs.run_here(config)
        assert notes(config) == set() and len(Stored(config.output).receipts) == 4
        # Nor does it when it is begun anew, though tasks were done before.
        with pytest.raises(RunError, match="2 tasks failed in a row"):
            jobs.run_here(config)
    _, outcome = jobs.run_here(config)
    assert (outcome.tasks, outcome.resumed, outcome.computed, outcome.quarantined) == (12, 4, 8, {})


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ({4, 5, 6}, CorpusError("no JSON")),  # what is said of the corpus is so
        ({4, 6}, RuntimeError("no such library")),  # others succeed in between
        ({9, 10, 11}, RuntimeError("no such library")),  # nothing is left that they could speak for
    ],
)
def test_tasks_are_set_aside_for_what_they_did_themselves(
    failing: set[int], error: Exception, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as poison:
        fails(poison, failing.__contains__, error)
        _, outcome = jobs.run_here(config)
        assert set(outcome.quarantined) == failing == notes(config)
        # Tried anew they fail again, and their notes are never away.
        again = replace(config, retry_quarantined=True)
        fails(poison, lambda task: notes(config) != failing, RuntimeError("a note is away"))
        assert set(jobs.run_here(again)[1].quarantined) == failing == notes(config)
    _, outcome = jobs.run_here(again)
    assert not outcome.quarantined and not notes(config)


def test_machines_that_are_lost_under_every_task_end_the_run(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any task has ended: what their memory cannot hold it cannot hold the twentieth time either."""
    attempts: list[str] = []

    def lost(self: Servant, call: Call) -> Failure:
        attempts.append(call.name)
        return Failure("lost", "the node died")

    monkeypatch.setattr(Servant, "answer", lost)
    with pytest.raises(RunError, match=r"^the first task failed, .* was lost each time; did its memory run out\?"):
        jobs.run_here(config)
    assert max(map(attempts.count, attempts)) == 4 and not Path(config.output).exists()


def test_a_run_goes_on_on_the_device_that_it_began_on(config: RunConfig) -> None:
    """Whatever there is by then: a cluster's nodes with GPUs come and go."""
    asked: list[str | None] = []

    def pool(config: RunConfig) -> LocalPool:
        asked.append(config.device)
        return LocalPool(config)

    assert run(config, pool).computed == 12 and run(config, pool).resumed == 12
    assert asked == [None, "cpu"]
    with pytest.raises(RefusedError, match="device was 'cpu', is 'cuda'"):
        run(replace(config, device="cuda"), pool)
