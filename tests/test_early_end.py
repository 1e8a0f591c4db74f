"""Runs that end once the mean is known well enough: where, over what, and that nothing but the settings decides it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs
from fisher_ray import cost, driver, open_run, reduce
from fisher_ray.cli import main
from fisher_ray.cluster import RayPool
from fisher_ray.corpus import CorpusError
from fisher_ray.dispatch import LocalPool, Servant
from fisher_ray.driver import Outcome, Progress, RefusedError, run
from fisher_ray.plan import ConfigError, RunConfig, Task, make_plan
from fisher_ray.reduce import Checkpoint, checkpoints, worst
from jobs import D_MODEL, LAYERS, Stored, cluster, gpt2  # noqa: F401

ALL = range(LAYERS + 1)


@pytest.fixture(scope="module", autouse=True)
def small_tasks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", 250)
        patch.setattr(cost, "_BLOCKS", 40)  # more tasks than blocks, so that the last of them are sums of several
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.txt"
    path.write_text(jobs.some_text(20_000))
    return path


@pytest.fixture(scope="module")
def whole(gpt2: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stored, Outcome]:  # noqa: F811
    """A run that never gets as far as asked, with factors: all there is to know about each checkpoint."""
    output = tmp_path_factory.mktemp("whole") / "run"
    given: dict[str, Any] = {"estimator": "sampled", "num_samples": 2, "save": "factors"}
    config = jobs.settings(gpt2, corpus, output, until_relative_error=1e-6, **given)
    return jobs.run_here(config)


def between(whole: tuple[Stored, Outcome], at: int) -> float:
    """A relative error that is first reached at one of the checkpoints."""
    errors = [looked.relative_error for looked in whole[1].checkpoints]
    assert errors[at] < min(errors[:at])
    return (errors[at] + min(errors[:at])) / 2


def stopped_at(whole: tuple[Stored, Outcome], at: int, output: Path, **changed: Any) -> tuple[Stored, Outcome]:
    config = replace(whole[1].plan.config, output=str(output), **changed)
    return jobs.run_here(replace(config, until_relative_error=between(whole, at)))


def factors(stored: Stored, layer: int, last: int) -> list[np.ndarray]:
    """Of the first tasks, one array each; some tasks have no position."""
    files = [receipt["files"].get(f"factors_{layer}") for receipt in stored.receipts[:last]]
    none = np.empty((0, 2, D_MODEL))
    return [none if file is None else np.load(stored.folder / file["path"]).astype(np.float64) for file in files]


def mean(some: list[np.ndarray]) -> np.ndarray:
    stacked = np.concatenate(some)
    return np.einsum("nri,nrj->ij", stacked, stacked) / len(stacked)


# ---- where -------------------------------------------------------------------------------------------------------------


def test_checkpoints_double() -> None:
    assert checkpoints(5) == [5] and checkpoints(8) == [8] and checkpoints(9) == [8, 9]
    assert checkpoints(100) == [8, 16, 32, 64, 100]


def test_errors_and_changes_against_factors(whole: tuple[Stored, Outcome]) -> None:
    """The jackknife by leaving out one block after the other, and the means themselves, in the worst layer."""
    stored, outcome = whole
    looked = outcome.checkpoints
    assert [each.tasks for each in looked] == checkpoints(outcome.tasks) and outcome.tasks > 32
    before: list[np.ndarray] = []
    for each in looked:
        errors, changes, means = [], [], []
        for layer in ALL:
            tasks = factors(stored, layer, each.tasks)
            count = min(32, each.tasks)
            bounds = [each.tasks * i // count for i in range(count + 1)]
            blocks = [block for first, last in pairwise(bounds) if sum(map(len, block := tasks[first:last]))]
            count = len(blocks)
            n, total = sum(map(len, tasks)), mean(tasks)
            left = [mean([t for j, block in enumerate(blocks) if j != i for t in block]) for i in range(count)]
            variance = (count - 1) / count * sum(np.square(each - total).sum() for each in left)
            errors.append(variance**0.5 / np.linalg.norm(total))
            means.append(total)
            if before:
                changes.append(np.linalg.norm(total - before[layer]) / np.linalg.norm(total))
        before = means
        assert each.positions == n
        assert each.relative_error == pytest.approx(max(errors), rel=1e-4)  # sums of tasks are rounded to float32
        if changes:
            assert each.relative_change == pytest.approx(max(changes), rel=1e-3)
        else:
            assert each.relative_change is None


@pytest.mark.parametrize("at", [0, 1, 2])
def test_it_ends_at_the_first_checkpoint_that_is_good_enough(
    at: int, whole: tuple[Stored, Outcome], tmp_path: Path
) -> None:
    if at == 0:
        eps = whole[1].checkpoints[0].relative_error * 1.01
        config = replace(whole[1].plan.config, output=str(tmp_path / "run"), until_relative_error=eps)
        stored, outcome = jobs.run_here(config)
    else:
        stored, outcome = stopped_at(whole, at, tmp_path / "run")
    last = [8, 16, 32][at]
    assert outcome.checkpoints == whole[1].checkpoints[: at + 1]
    assert outcome.computed == last
    for layer in ALL:
        np.testing.assert_allclose(
            stored.reduced(layer),
            mean(factors(whole[0], layer, last)),
            rtol=1e-5,
            atol=1e-7 * stored.reduced(layer).max(),
        )


def test_layers_that_are_added_up_apart_are_judged_together(
    whole: tuple[Stored, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_CALL_BYTES", 1)  # a tree a layer
    assert stopped_at(whole, 1, tmp_path / "run")[1].checkpoints == whole[1].checkpoints[:2]
    parts = [Checkpoint(8, 5, 0.1, None), Checkpoint(8, 5, 0.3, 0.2), Checkpoint(8, 5, None, 0.4)]
    assert worst(parts) == worst(parts[::-1]) == Checkpoint(8, 5, 0.3, 0.4)


def test_it_ends_at_a_change(whole: tuple[Stored, Outcome], tmp_path: Path) -> None:
    changes = [looked.relative_change for looked in whole[1].checkpoints[1:]]
    config = replace(
        whole[1].plan.config,
        output=str(tmp_path / "run"),
        until_relative_error=None,
        until_relative_change=changes[1] * 1.01,
    )
    assert changes[0] > changes[1] * 1.01
    assert jobs.run_here(config)[1].checkpoints[-1].tasks == 32


# ---- over what ---------------------------------------------------------------------------------------------------------


def test_tasks_are_shuffled_and_each_is_there_once(gpt2: str, corpus: Path) -> None:  # noqa: F811
    def ranges(**changed: Any) -> list[Any]:
        plan = make_plan(jobs.settings(gpt2, corpus, "run", **changed))
        return [task.ranges for task in plan.make_tasks()]

    in_order, drawn = ranges(), ranges(until_relative_change=0.1)
    assert sorted(drawn, key=in_order.index) == in_order
    expected = sorted(range(len(in_order)), key=lambda i: hashlib.sha256(f"0:{i}".encode()).digest())
    assert [in_order.index(each) for each in drawn] == expected != sorted(expected)
    assert ranges(until_relative_change=0.1, seed=1) != drawn


def test_how_well_the_mean_is_to_be_known_is_no_part_of_the_fingerprint(gpt2: str, corpus: Path) -> None:  # noqa: F811
    def fingerprint(**changed: Any) -> str:
        return make_plan(jobs.settings(gpt2, corpus, "run", **changed)).fingerprint

    shuffled = {
        fingerprint(until_relative_error=0.1),
        fingerprint(until_relative_error=0.2),
        fingerprint(until_relative_change=0.1),
    }
    assert len(shuffled) == 1 and fingerprint() not in shuffled


def test_runs_in_order_and_shuffled_ones_are_told_apart(whole: tuple[Stored, Outcome]) -> None:
    config = replace(whole[1].plan.config, until_relative_error=None)
    with pytest.raises(
        RefusedError, match=r"shuffled was True, is None \(whether it may end early, by --until-relative-error"
    ):
        jobs.run_here(config)


# ---- nothing but the settings decides ----------------------------------------------------------------------------------


class Ahead(LocalPool):
    """Says that it has many workers, so that tasks beyond the checkpoints are computed."""

    alive = 10


@pytest.fixture(scope="module")
def ended(whole: tuple[Stored, Outcome], tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return stopped_at(whole, 1, tmp_path_factory.mktemp("ended") / "run")[0]


def test_how_far_ahead_workers_are_changes_no_bit(whole: tuple[Stored, Outcome], ended: Stored, tmp_path: Path) -> None:
    config = replace(whole[1].plan.config, output=str(tmp_path / "run"), until_relative_error=between(whole, 1))
    outcome = run(config, Ahead)
    assert outcome.computed > 16 and outcome.checkpoints[-1].tasks == 16
    stored = Stored(tmp_path / "run")
    assert stored.bits() == ended.bits()
    reader, other = open_run(tmp_path / "run"), open_run(ended.folder)
    assert reader.complete and vars(reader.counts) == vars(other.counts) and reader.done == other.done == 16
    assert reader.positions().count_rows() == other.positions().count_rows()  # none of those that are not in the means
    assert reader.status == other.status and "ended early: relative error" in reader.status
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_actors_end_at_the_same_place(
    whole: tuple[Stored, Outcome],
    ended: Stored,
    tmp_path: Path,
    cluster: None,  # noqa: F811
) -> None:
    config = replace(
        whole[1].plan.config,
        output=str(tmp_path / "run"),
        until_relative_error=between(whole, 1),
        executor="ray",
        max_actors=2,
    )
    outcome = run(config, RayPool)
    assert [looked.tasks for looked in outcome.checkpoints] == [8, 16]
    assert Stored(tmp_path / "run").bits() == ended.bits()


class KilledError(Exception):
    """What ends a run in the middle here."""


@pytest.mark.parametrize("after", [5, 12])
def test_one_that_was_interrupted_goes_on_to_the_same_end(
    after: int, whole: tuple[Stored, Outcome], ended: Stored, tmp_path: Path
) -> None:
    config = replace(whole[1].plan.config, output=str(tmp_path / "run"), until_relative_error=between(whole, 1))

    def stop(progress: Progress) -> None:
        if progress.tasks_done >= after:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisher_ray.driver._Run._tick", lambda self: stop(self.progress()))
        with pytest.raises(KilledError):
            run(config)
    stored, outcome = jobs.run_here(config)
    assert outcome.resumed == after and outcome.computed == 16 - after
    assert stored.bits() == ended.bits()


def test_a_smaller_share_goes_on(whole: tuple[Stored, Outcome], ended: Stored, tmp_path: Path) -> None:
    output = Path(shutil.copytree(ended.folder, tmp_path / "run"))
    stored, outcome = stopped_at(whole, 2, output)
    assert (outcome.resumed, outcome.computed) == (16, 16)
    assert stored.bits() == stopped_at(whole, 2, tmp_path / "at once")[0].bits()
    again, once_more = stopped_at(whole, 2, output)
    assert once_more.computed == 0 and again.bits() == stored.bits()
    back, outcome = stopped_at(whole, 1, output)  # and a larger one takes less of what is there
    assert outcome.computed == 0 and back.bits() == ended.bits()


def test_a_complete_run_computes_nothing_however_many_workers_there_are(
    whole: tuple[Stored, Outcome], ended: Stored, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(ended.folder, tmp_path / "run"))
    stored, outcome = stopped_at(whole, 1, output, max_actors=20)
    assert outcome.computed == 0 and stored.bits() == ended.bits()


class Resized(LocalPool):
    """Notes how many workers it is to keep."""

    kept: list[int] = []  # noqa: RUF012

    def resize(self, wanted: int, kept: int) -> None:
        self.kept.append(kept)


def test_workers_are_kept_while_the_mean_is_judged(
    whole: tuple[Stored, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each checkpoint sums are added up, a few calls; tasks may be left for all of them."""
    monkeypatch.setattr(Resized, "kept", [])
    monkeypatch.setattr(reduce, "FAN_IN", 4)  # so that there are nodes below the roots
    config = replace(whole[1].plan.config, output=str(tmp_path / "run"), until_relative_error=between(whole, 1))
    outcome = run(config, Resized)
    judged = Resized.kept[: len(Resized.kept) - LAYERS - 1]
    assert outcome.checkpoints[-1].tasks == 16
    assert min(judged) >= len(whole[0].receipts) - 16 > 16


@pytest.mark.parametrize("ahead", [1, 10])
def test_first_tasks_that_cannot_be_read_are_not_the_end(
    ahead: int, gpt2: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """All of the first checkpoint's: the run goes on to those that can be, however many workers there are."""
    monkeypatch.setattr(driver, "_HOPELESS", 1000)
    compute = Servant.compute

    def unreadable(self: Servant, task: Task) -> Any:
        if task.id < 8:
            raise CorpusError(f"task {task.id} is damaged")
        return compute(self, task)

    monkeypatch.setattr(Servant, "compute", unreadable)
    monkeypatch.setattr(LocalPool, "alive", ahead)
    settings = jobs.settings(gpt2, corpus, tmp_path / "run", num_samples=1, until_relative_error=1e-6, layers="1")
    stored, outcome = jobs.run_here(settings)
    assert set(outcome.quarantined) == set(range(8)) and len(stored.receipts) == outcome.tasks - 8


def test_a_damaged_sum_is_computed_again_before_it_decides(
    whole: tuple[Stored, Outcome], ended: Stored, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(ended.folder, tmp_path / "run"))
    shutil.rmtree(output / "reduced")
    path = output / ended.receipts[3]["files"]["sums_1"]["path"]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    stored, outcome = stopped_at(whole, 1, output, verify_done=False)
    assert (outcome.computed, outcome.damaged) == (1, 1) and stored.bits() == ended.bits()


# ---- what a user sees --------------------------------------------------------------------------------------------------


def flags(config: RunConfig) -> list[str]:
    assert config.until_relative_error is not None
    return [
        "run", "--model", config.model, "--corpus", *config.corpus, "--output", config.output, "--save", "factors",
        "--estimator", "sampled", "--num-samples", "2", "--executor", "local",
        "--until-relative-error", repr(config.until_relative_error),
    ]  # fmt: skip


def test_the_command_says_where_it_ended_and_why(
    whole: tuple[Stored, Outcome], ended: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(ended.folder, tmp_path / "run"))
    config = replace(whole[1].plan.config, output=str(output), until_relative_error=between(whole, 1))
    assert main(flags(config)) == 0
    said = capsys.readouterr().out
    left = whole[1].tasks - 16
    assert f"ended early, at a relative error of {config.until_relative_error:.2%}: relative error " in said
    assert f" after 16 tasks and {open_run(output).counts.scored:,} positions; {left} tasks are left" in said
    assert main(["status", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == "complete" and facts["checkpoint"]["tasks"] == 16
    assert main(["inspect", str(output)]) == 0
    assert f"complete, 16 of {whole[1].tasks} tasks, ended early" in " ".join(capsys.readouterr().out.split())


def test_the_command_says_that_it_was_not_reached(
    whole: tuple[Stored, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(whole[1].plan.config)) == 0
    assert "a relative error of 0.00% was asked for: relative error" in capsys.readouterr().out
    assert "early" not in open_run(whole[0].folder).status


@pytest.mark.parametrize("name", ["until_relative_error", "until_relative_change"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5])
def test_what_is_no_share_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a share between 0 and 1"):
        RunConfig(model="m", corpus=("c",), output="o", **{name: value})
