"""The same bits, or a clear word why not, whatever breaks: tasks, workers, drivers, input. Minutes long: make test-faults."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray._private.utils
import torch
import transformers as tf
from faults import TASK_BYTES, Place, run_under_kills, until

import jobs
from fisher_ray import cost, driver
from fisher_ray.cli import main
from fisher_ray.shards import Lease, RunStore
from fisher_ray.worker import Worker
from jobs import LAYERS, Stored, cluster, gpt2  # noqa: F401

pytestmark = pytest.mark.faults

ALL_LAYERS = range(LAYERS + 1)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven tasks of what otherwise would be one."""
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.txt"
    path.write_text(jobs.some_text(30_000))
    return path


@pytest.fixture(scope="module")
def undisturbed(gpt2: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)
        stored, outcome = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path_factory.mktemp("runs") / "undisturbed"))
    assert outcome.tasks == 11 and not outcome.quarantined
    return stored


@pytest.fixture
def place(gpt2: str, corpus: Path, tmp_path: Path) -> Place:  # noqa: F811
    return Place(tmp_path, gpt2, corpus)


@pytest.fixture
def faults_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults in this process too, for runs without Ray."""
    spec = importlib.util.spec_from_file_location("poison", jobs.POISON / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    poison = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(poison)
    monkeypatch.setattr(Worker, "compute", Worker.compute)  # put back at the end
    poison.patch(Worker)


def in_the_background(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def lines_of(err: str) -> list[str]:
    assert "Traceback" not in err, err
    return err.splitlines()


# ---- by hand -----------------------------------------------------------------------------------------------------------


def mean_without(run: Stored, left_out: set[int], layer: int) -> np.ndarray:
    """The mean F over a run's other tasks, from what those stored."""
    total, count = 0.0, 0
    for receipt in run.receipts:
        if int(receipt["name"]) not in left_out and receipt["counts"]["scored"]:
            with np.load(run.folder / receipt["files"][f"sums_{layer}"]["path"]) as sums:
                total = total + sums["fisher"].astype(np.float64).sum(0)
                count += int(sums["count"].sum())
    d = jobs.D_MODEL
    mean = np.zeros((d, d))
    mean[np.triu_indices(d)] = total / count
    return mean + np.triu(mean, 1).T


def check_left_out(place: Place, undisturbed: Stored, left_out: set[int]) -> None:
    """The other tasks are what they always are, and the means and the summary are theirs."""
    stored = place.stored
    assert {int(receipt["name"]) for receipt in stored.receipts} == set(range(11)) - left_out
    scored = sum(r["counts"]["scored"] for r in undisturbed.receipts if int(r["name"]) not in left_out)
    summary = {row["layer"]: row for row in pq.read_table(place.run / "reduced/summary.parquet").to_pylist()}
    for layer in ALL_LAYERS:
        expected = mean_without(undisturbed, left_out, layer)
        everything = mean_without(undisturbed, set(), layer)
        difference = np.abs(stored.reduced(layer) - expected).max()
        assert difference <= 1e-14 < 1e-5 < np.abs(everything - expected).max()
        traces = [row["trace"] for row in stored.rows(layer)]
        assert len(traces) == scored == summary[layer]["positions"]
        assert np.mean(traces) == pytest.approx(np.trace(expected), rel=1e-5) == summary[layer]["trace"]
    assert json.loads((place.run / "reduced/provenance.json").read_text())["tasks_left_out"] == sorted(left_out)


def check_given_up(err: str, place: Place, reasons: dict[int, str]) -> None:
    """Each task with its file and its reason, then what to do; the same in quarantine/ and in fisher-ray status."""
    *named, last = lines_of(err)
    assert len(named) == len(reasons)
    notes = place.quarantined()
    assert notes.keys() == reasons.keys()
    for task, reason in reasons.items():
        (line,) = (line for line in named if line.startswith(f"given up: task {task} ("))
        assert f"({place.corpus}, rows or bytes " in line and reason in line, line
        assert line == f"given up: {notes[task]['error']}"
        assert {part["path"] for part in notes[task]["ranges"]} == {f"file://{place.corpus}"}
    assert last.startswith(f"error: {len(reasons)} of 11 tasks were given up") and "--retry-quarantined" in last


def check_status(place: Place, reasons: dict[int, str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["status", str(place.run)]) == 0
    out = capsys.readouterr().out
    assert f"{11 - len(reasons)} of 11 done, {len(reasons)} quarantined" in out
    for task, reason in reasons.items():
        (line,) = (line for line in out.splitlines() if line.startswith(f"given up: task {task} ("))
        assert reason in line


# ---- poisoned tasks ----------------------------------------------------------------------------------------------------


def test_poisoned_tasks(
    place: Place, undisturbed: Stored, cluster: None, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """One that raises, one that kills, one that wants too much memory, one that hangs, one that breaks its device."""
    reasons = {1: "RuntimeError: poisoned on purpose", 3: "died each time", 5: "MemoryError", 7: "more than 8 s"}
    place.faults({1: "fail", 3: "kill", 5: "allocate", 7: "hang", 8: "break_device"})
    flags = ("--max-actors", 2, "--max-attempts", 2, "--task-timeout", 8)
    process = place.command(*flags)  # with a Ray of its own
    _, err = process.communicate(timeout=240)
    assert process.returncode == 4, err
    check_given_up(err, place, reasons)
    check_left_out(place, undisturbed, set(reasons))
    tries = place.tries()
    # What broke its device was tried again in another process. One that shared a worker with that, with a killer or with what
    # hung had no fair try, and gets another.
    broken, *others = (noted["pid"] for noted in place.attempts() if noted["task"] == 8)
    assert others and broken not in others
    assert all(tries[task] >= 2 for task in reasons) and max(tries.values()) <= 3

    before = place.done(), place.stored.bits(), place.attempts()
    place.faults({})
    check_status(place, reasons, capsys)
    assert place.here(*flags) == 4
    check_given_up(capsys.readouterr().err, place, reasons)
    assert (place.done(), place.stored.bits(), place.attempts()) == before

    assert place.here(*flags, "--retry-quarantined") == 0
    assert lines_of(capsys.readouterr().err) == []
    assert place.tries() == tries + Counter(reasons.keys())
    assert before[0].items() < place.done().items() and not place.quarantined()
    assert place.stored.bits() == undisturbed.bits()
    check_status(place, {}, capsys)


def test_poisoned_tasks_without_ray(
    place: Place, undisturbed: Stored, faults_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {0: "RuntimeError: poisoned on purpose", 9: "MemoryError"}
    place.faults({0: "fail", 9: "allocate"})
    flags = ("--executor", "local")
    assert place.here(*flags) == 4
    check_given_up(capsys.readouterr().err, place, reasons)
    check_left_out(place, undisturbed, set(reasons))
    assert place.tries() == {task: 3 if task in reasons else 1 for task in range(11)}

    before = place.done(), place.stored.bits(), place.attempts()
    place.faults({})
    check_status(place, reasons, capsys)
    assert place.here(*flags) == 4
    check_given_up(capsys.readouterr().err, place, reasons)
    assert (place.done(), place.stored.bits(), place.attempts()) == before
    assert place.here(*flags, "--retry-quarantined") == 0
    assert place.stored.bits() == undisturbed.bits()


def test_the_memory_monitor(place: Place, undisturbed: Stored) -> None:
    """Ray kills workers before the kernel has to; the limit is set 4 GiB above what this machine uses now."""
    total, used = ray._private.utils.get_system_memory(), ray._private.utils.get_used_memory()
    if total - used < 10 * GIB:
        pytest.skip("needs 10 GiB of free memory")
    (place.folder / "eat_mib").write_text(str(6 << 10))
    place.faults({4: "eat"})
    monitor = {"RAY_memory_usage_threshold": f"{(used + 4 * GIB) / total:.3f}", "RAY_memory_monitor_refresh_ms": "50"}
    process = place.command("--max-actors", 1, "--max-attempts", 2, **monitor)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 4, err
    check_given_up(err, place, {4: "was the machine out of memory?"})
    check_left_out(place, undisturbed, {4})


# ---- killed and slow workers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_actors", "kills"), [(1, 2), (3, 4)])
def test_actors_killed(
    num_actors: int, kills: int, place: Place, undisturbed: Stored, cluster: None  # noqa: F811
) -> None:  # fmt: skip
    storm = run_under_kills(place, num_actors, kills, seed=num_actors)
    assert (storm.code, storm.killed, storm.tasks) == (0, kills, 11)
    assert place.stored.bits() == undisturbed.bits()
    assert storm.repeated <= 2 * kills  # each kill costs the two tasks that an actor has at most


def test_stragglers_are_doubled(place: Place, undisturbed: Stored, cluster: None) -> None:  # noqa: F811
    place.faults({4: "slow_once"})  # sleeps for a minute the first time
    assert place.here("--max-actors", 2) == 0
    took = time.time() - place.attempts()[0]["time"]
    tries = place.tries()
    assert tries[4] == 2 and len({noted["pid"] for noted in place.attempts() if noted["task"] == 4}) == 2
    assert tries.total() == 12
    assert took < 45
    assert place.stored.bits() == undisturbed.bits()


# ---- drivers -----------------------------------------------------------------------------------------------------------


def test_two_drivers_at_once(place: Place, undisturbed: Stored, cluster: None) -> None:  # noqa: F811
    place.faults({"*": "slow"})
    both = [place.command("--max-actors", 1, RAY_ADDRESS=jobs.address()) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    (winner, _), (loser, err) = sorted(zip(both, said, strict=True), key=lambda pair: pair[0].returncode)
    assert (winner.returncode, loser.returncode) == (0, 3), said
    (line,) = lines_of(err)
    assert line.startswith(f"error: another driver works on {place.run}: process {winner.pid} on ")
    assert place.stored.bits() == undisturbed.bits()
    assert place.tries() == dict.fromkeys(range(11), 1)


def test_who_comes_second_removes_nothing(
    place: Place, undisturbed: Stored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the making of a run and the taking of its lease another driver may come first."""
    opened, others = driver._opened, []

    def overtaken(*given: Any) -> Any:
        result = opened(*given)
        others.append(Lease(RunStore(str(place.run))))
        return result

    monkeypatch.setattr(driver, "_opened", overtaken)
    assert place.here("--executor", "local") == 3
    (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith("error: another driver works on")
    assert (place.run / "run.json").exists()
    others[0].release()
    monkeypatch.setattr(driver, "_opened", opened)
    assert place.here("--executor", "local") == 0
    assert place.stored.bits() == undisturbed.bits()


def test_a_driver_killed_before_its_plan_is_written(place: Place, undisturbed: Stored) -> None:
    """The description is written first, so that of two drivers one is refused; the plan is made again from it."""
    place.run.mkdir()
    shutil.copy(undisturbed.folder / "run.json", place.run)
    assert place.here("--executor", "local") == 0
    assert place.stored.bits() == undisturbed.bits()


def test_drivers_killed(place: Place, undisturbed: Stored, cluster: None) -> None:  # noqa: F811
    """Four times in one run; with workers in the driver's process, and on a cluster where they outlive it for a while."""
    place.faults({"*": "slow"})
    chance = random.Random(0)
    marks = sorted(chance.sample(range(8), 4))
    for mark, executor in zip(marks, ("ray", "local", "ray", "local"), strict=True):
        kept, begun = place.done(), time.time()
        process = place.command("--max-actors", 1, "--executor", executor, RAY_ADDRESS=jobs.address())
        until(lambda mark=mark: (place.run / "lease").exists() and len(place.done()) >= mark)
        time.sleep(chance.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        until(lambda pid=process.pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        # Nobody has asked for its exit code yet, as under a container's first process that never does.
        asked = time.monotonic()
        Lease(RunStore(str(place.run))).release()
        assert time.monotonic() - asked < 3, "a dead driver of this machine is waited for"
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert kept.items() <= place.done().items()
        assert not kept.keys() & {noted["task"] for noted in place.attempts() if noted["time"] > begun}
    kept, begun = place.done(), time.time()
    assert mark <= len(kept) < 11
    assert place.here("--max-actors", 1) == 0
    assert kept.items() <= place.done().items()
    assert not kept.keys() & {noted["task"] for noted in place.attempts() if noted["time"] > begun}
    assert place.tries().total() <= 11 + 4 * 2
    assert place.stored.bits() == undisturbed.bits()


def test_a_driver_killed_while_it_reduces(
    place: Place, undisturbed: Stored, monkeypatch: pytest.MonkeyPatch, cluster: None  # noqa: F811
) -> None:  # fmt: skip
    process = place.command("--executor", "local")
    until(lambda: (place.run / "reduced").exists())
    process.kill()
    process.communicate()
    assert len(place.done()) == 11 and not (place.run / "reduced/manifest.json").exists()
    place.faults({})
    assert place.here("--executor", "local") == 0
    assert not place.attempts()
    assert place.stored.bits() == undisturbed.bits()


def test_sigterm(place: Place, undisturbed: Stored, cluster: None) -> None:  # noqa: F811
    """As at the end of a job: what is in flight is finished and kept."""
    place.faults({"*": "slow"})
    variables = {"RAY_ADDRESS": jobs.address(), "RAY_JOB_STOP_WAIT_TIME_S": "20"}
    process = place.command("--max-actors", 2, **variables)
    until(lambda: len(place.done()) >= 2)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - asked < 20
    assert process.returncode == 130
    assert lines_of(err) == ["stopped; what is done is kept, and the same command goes on."]
    begun = place.tries()
    assert set(begun.values()) == {1} and len(begun) < 11
    assert begun.keys() == {noted["task"] for noted in place.attempts("end")} == place.done().keys()
    assert json.loads((place.run / "progress.json").read_text())["state"] == "stopped"
    assert not list(place.run.glob("lease/*"))
    assert place.here("--max-actors", 1) == 0
    assert place.tries() == dict.fromkeys(range(11), 1)
    assert place.stored.bits() == undisturbed.bits()


# ---- garbage -----------------------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    model = tf.GPT2LMHeadModel.from_pretrained(place.model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = float("nan")
    model.save_pretrained(place.folder / "nan")
    jobs.tokenizer().save_pretrained(place.folder / "nan")
    bad = replace(place, model=str(place.folder / "nan"))
    code = bad.here("--executor", "local")
    (line,) = lines_of(capsys.readouterr().err)
    assert code == 2, line
    assert line.startswith("error: ") and "finite" in line
    assert not place.run.exists()


def test_a_file_changed_during_the_run(place: Place, faults_here: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what was planned nothing is left to compute from; what was computed before stays."""
    folder = place.folder / "corpus"
    folder.mkdir()
    text = jobs.some_text(15_000)
    (folder / "a.txt").write_text(text[:12_000])
    (folder / "b.txt").write_text(text[12_000:])
    place = replace(place, corpus=folder)
    place.faults({3: "wait"})

    def change() -> None:
        until(lambda: 3 in place.tries())
        raw = (folder / "b.txt").read_bytes()
        (folder / "b.txt").write_bytes(raw[::-1])  # as many bytes
        (place.folder / "go").touch()

    thread = in_the_background(change)
    assert place.here("--executor", "local") == 4
    thread.join()
    plan = pq.read_table(place.run / "plan.parquet").to_pylist()
    changed = {row["task"] for row in plan if row["name"] == "b.txt"}
    assert changed and min(changed) >= 3 and len(place.done()) >= 3
    notes = place.quarantined()
    assert notes.keys() == changed and place.done().keys() == {row["task"] for row in plan} - changed
    *named, _ = lines_of(capsys.readouterr().err)
    for line, note in zip(named, notes.values(), strict=True):
        assert line == f"given up: {note['error']}" and note["kind"] == "input"
        assert f"{folder}/b.txt has changed since the run was planned" in line
    assert place.tries() == {row["task"]: 1 for row in plan}  # no other attempt would end otherwise


@pytest.mark.parametrize("flags", [("--executor", "local"), ("--max-actors", 1)], ids=["local", "ray"])
def test_an_unreadable_document(
    flags: tuple[Any, ...], place: Place, cluster: None, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    raw = bytearray(jobs.some_text(75_000).encode())  # the first 64 KiB are looked at before anything starts
    raw[70_000] = 0xFF
    place = replace(place, corpus=place.folder / "docs.txt")
    place.corpus.write_bytes(raw)
    place.faults({})
    assert place.here(*flags) == 4
    plan = pq.read_table(place.run / "plan.parquet").to_pylist()
    (bad,) = place.quarantined()
    (row,) = (row for row in plan if row["task"] == bad)
    assert row["start"] <= 70_000 < row["stop"] + 3_000  # a paragraph belongs to where it begins
    assert place.quarantined()[bad]["kind"] == "input"
    first, _ = lines_of(capsys.readouterr().err)
    assert first.startswith(f"given up: task {bad} ({place.corpus}, ") and "not UTF-8: byte 70000 is 0xff" in first
    assert place.done().keys() == {row["task"] for row in plan} - {bad}
    assert place.tries()[bad] <= 1


@pytest.mark.parametrize("num_docs", [30, 3_000], ids=["few tasks", "many tasks"])
def test_nothing_but_unreadable_documents(num_docs: int, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Token ids that the model does not have are seen by workers only."""
    place = replace(place, corpus=place.folder / "docs.jsonl")
    place.corpus.write_text(f'{{"text": [5, {jobs.VOCAB}]}}\n' * num_docs)
    before = sorted(place.folder.iterdir())
    code = place.here("--executor", "local")
    (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith("error: ") and f"token ids must be in [0, {jobs.VOCAB}), got {jobs.VOCAB}" in line
    assert sorted(place.folder.iterdir()) == before
    assert code == 2
