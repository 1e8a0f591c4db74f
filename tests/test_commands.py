"""The commands beside run, and what a job's log says."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import torch
import yaml
from aiohttp import ServerDisconnectedError
from flaky import permissions_bind
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus
from rich.console import Console

import jobs
from fisher_ray import cli, cost, driver, shards
from fisher_ray import cluster as cluster_module
from fisher_ray import sweep as sweep_module
from fisher_ray.cli import main
from fisher_ray.cluster import RayPool
from fisher_ray.driver import Progress
from fisher_ray.plan import ConfigError, RunConfig, make_plan, reckon
from fisher_ray.shards import Counts, Lease, RunStore
from fisher_ray.sweep import read_sweep
from fisher_ray.worker import Worker
from jobs import LAYERS, Stored, cluster, gpt2  # noqa: F401

TASK_BYTES = 1_500


@pytest.fixture(scope="module")
def finished(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Stored:  # noqa: F811
    folder = tmp_path_factory.mktemp("finished")
    (folder / "docs.txt").write_text(jobs.some_text(9_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)
        stored, outcome = jobs.run_here(jobs.settings(gpt2, folder / "docs.txt", folder / "run"))
    assert outcome.tasks > 4
    return stored


@pytest.fixture
def run(finished: Stored, tmp_path: Path) -> Stored:
    """A copy to damage."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return Stored(tmp_path / "run")


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)


def said(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 0) -> str:
    assert main([str(a) for a in argv]) == code
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 2) -> str:
    assert main([str(a) for a in argv]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# ---- status, verify, clean -----------------------------------------------------------------------------------------------


def test_reading_a_run_loads_neither_ray_nor_models(run: Stored, tmp_path: Path) -> None:
    """They take longer to import than a command takes to answer."""
    commands = [["status"], ["verify"], ["clean"], ["inspect"], ["diff", "--layers", f"0,{LAYERS}"]]
    commands += [["export", "-o", str(tmp_path / "out.npz")], ["report", "-o", str(tmp_path / "out.html")]]
    script = f"""
import sys
from fisher_ray.cli import main
assert not any(main([name, {str(run.folder)!r}, *flags]) for name, *flags in {commands})
print("loaded:", *{{"ray", "transformers.modeling_utils", "torch._dynamo"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_status_of_a_finished_run(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = len(run.receipts)
    out = said(capsys, "status", run.folder)
    assert "complete" in out and f"{tasks} of {tasks} done" in out and "driver: none" in out
    facts = json.loads(said(capsys, "status", run.folder, "--json"))
    assert facts["state"] == "complete" and facts["tasks_done"] == facts["tasks"] == tasks
    assert facts["counts"] == {**run.counts(), "halvings": 0} and facts["quarantine"] == []


def test_status_shows_what_can_still_be_read(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = len(run.receipts)
    path = run.folder / "progress.json"
    path.write_bytes(path.read_bytes()[:-2])
    assert main(["status", str(run.folder)]) == 5
    shown = capsys.readouterr()
    assert f"tasks:  {tasks} of {tasks} done" in shown.out
    assert "left out:" in shown.err and "progress.json is damaged" in " ".join(shown.err.split())
    path.unlink()
    out = said(capsys, "status", run.folder)
    assert "starting" in out and "driver: none" in out


def test_status_of_a_run_at_work(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    (run.folder / "done/00000001.json").unlink()
    lease = Lease(RunStore(str(run.folder)))
    facts = json.loads(said(capsys, "status", run.folder, "--json"))
    out = said(capsys, "status", run.folder)
    (run.folder / "progress.json").unlink()  # as in its first seconds
    begun = said(capsys, "status", run.folder)
    lease.release()
    assert facts["tasks_done"] == facts["tasks"] - 1 and facts["driver"].startswith("process ")
    assert f"driver: {facts['driver']}, actors " in out
    assert f"driver: {facts['driver']}\n" in begun


def test_status_of_a_run_whose_driver_has_died(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    """On this machine it can be seen to be gone; of others only how long nothing was written."""
    progress = json.loads((run.folder / "progress.json").read_text())
    for machine, died in ((shards._machine(), True), ("another", False)):
        holder = {"host": "there", "machine": machine, "pid": os.getpid(), "started": "before", "beat": 3}
        (run.folder / "lease").mkdir(exist_ok=True)
        (run.folder / "lease/000001.json").write_bytes(shards.seal(holder))
        out = said(capsys, "status", run.folder)
        assert ("which has died: the same command goes on" in out) is died
        assert ("actors" in out) is not died
    assert "counts" in progress


def test_status_of_a_run_that_was_killed(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody has written since that its driver is at work no more."""
    store = RunStore(str(run.folder))
    progress = store.read_sealed("progress.json")
    store.write_sealed("progress.json", {**progress, "state": "computing"})
    assert json.loads(said(capsys, "status", run.folder, "--json"))["state"] == "interrupted"
    out = said(capsys, "status", run.folder)
    assert ": interrupted, " in out and f"tokens: {progress['counts']['tokens']:,} of tasks" in out
    lease = Lease(store)
    out = said(capsys, "status", run.folder)
    lease.release()
    assert ": computing, " in out and "a second" in out


def test_status_of_a_run_that_nobody_has_heard_of_for_long(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether its driver on another machine lives cannot be known; how fast it is, it has not said. Clocks may differ."""
    store = RunStore(str(run.folder))
    progress = {**store.read_sealed("progress.json"), "state": "computing", "seconds_left": 7.0}
    store.write_sealed(
        "lease/000001.json", {"host": "there", "machine": "another", "pid": 1, "started": "0", "beat": 3}
    )
    for hours, ago in ((36, "36:00:0"), (0, "0:00:0"), (-5, "0:00:00 ago")):
        store.write_sealed("progress.json", {**progress, "written": time.time() - 3600 * hours})
        out = said(capsys, "status", run.folder)
        assert f"computing, {ago}" in out and "driver: process 1 on there" in out
        for words in (" a second", "left", "actors"):
            assert (words in out) == (hours < 1), words
        facts = json.loads(said(capsys, "status", run.folder, "--json"))
        assert 0 <= facts["seconds_since_written"] - max(0, 3600 * hours) < 60


def test_a_short_run_that_ended_early_has_been_fast_and_has_nothing_left(
    gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "docs.txt").write_text("\n\n".join(f"one {i}" for i in range(200)))
    seen: list[Progress] = []
    recorded = driver._Run._record_progress
    monkeypatch.setattr(
        driver._Run, "_record_progress", lambda self, state: (seen.append(state), recorded(self, state))[1]
    )
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() / 1_000, time=time.time)
    monkeypatch.setattr(driver, "time", clock)  # shorter than any look at it
    flags = ["--layers", "1", "--task-bytes", "40", "--until-relative-error", "0.9", "--executor", "local"]
    said(capsys, "run", "--model", gpt2, "--corpus", tmp_path / "docs.txt", "--output", tmp_path / "run", *flags)
    facts = json.loads(said(capsys, "status", tmp_path / "run", "--json"))
    assert (
        facts["state"] == "complete"
        and facts["tasks_done"] < facts["tasks"]
        and facts["weight"] < facts["total_weight"]
    )
    assert facts["seconds_left"] == 0 and facts["tokens_per_second"] > 0
    assert [(state.state, state.seconds_left, state.tokens_per_second) for state in seen[:-1]] == [
        ("computing", None, 0)
    ]


def test_status_counts_what_was_done_before(
    run: Stored, finished: Stored, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that goes on, also without reading anything back."""
    (run.folder / "done/00000002.json").unlink()
    shutil.rmtree(run.folder / "reduced")
    said(capsys, "run", "--config", run.folder / "run.json", "--output", run.folder, "--no-verify")
    assert f"tokens: {finished.counts()['tokens']:,}" in said(capsys, "status", run.folder)


def test_a_run_that_fails_leaves_what_is_beside_it(
    gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """Two that are begun in one new folder: what fails takes its own and no more."""
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    beside = tmp_path / "runs/new/other/run.json"
    going = driver._Run.go

    def go(self: Any) -> Any:
        beside.parent.mkdir()
        beside.write_text("of another driver")
        return going(self)

    argv = ["run", "--model", gpt2, "--corpus", str(tmp_path / "empty.jsonl"), "--executor", "local"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver._Run, "go", go)
        assert main([*argv, "--output", str(tmp_path / "runs/new/one")]) == 2
    assert "nothing to score" in capsys.readouterr().err
    assert [p for p in (tmp_path / "runs").rglob("*") if p.is_file()] == [beside]
    assert not (tmp_path / "runs/new/one").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(beside.parent.parent)
        beside.unlink()
        assert main([*argv, "--output", "."]) == 2
        assert "nothing to score" in capsys.readouterr().err


def test_what_is_no_number_is_null_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Of a model so sure of itself that F vanishes, as its measures are shares of nothing."""
    model = jobs.tf.AutoModelForCausalLM.from_pretrained(jobs.save_model(tmp_path / "model", "untied"))
    with torch.no_grad():
        model.lm_head.weight *= 1e7
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "docs.txt").write_text(jobs.some_text(2_000))
    flags = ["--executor", "local", "--estimator", "exact"]
    corpus = ["--corpus", tmp_path / "docs.txt", "--output", tmp_path / "run"]
    said(capsys, "run", "--model", tmp_path / "model", *corpus, *flags)
    store = RunStore(str(tmp_path / "run"))
    checkpoint = {"tasks": 8, "relative_error": None, "relative_change": math.nan}
    store.write_sealed("progress.json", {**store.read_sealed("progress.json"), "checkpoint": checkpoint})
    nulls = []
    for argv in (["status"], ["inspect"], ["inspect", "--position", "docs.txt:0:3"]):
        out = said(capsys, argv[0], tmp_path / "run", *argv[1:], "--json")
        json.loads(out, parse_constant=pytest.fail)
        nulls.append("null" in out)
    assert nulls == [True, True, True]


def test_a_terminal_without_the_letters(run: Stored) -> None:
    folder = run.folder.rename(run.folder.parent / "übung λ")
    process = jobs.command("status", str(folder), PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert out.startswith(f"{folder.parent}/?bung ?: complete")


@pytest.mark.parametrize("flag", ["", "--json"])
def test_whoever_reads_may_leave(flag: str, finished: Stored) -> None:
    """As ``fisher-ray inspect RUN | head`` does."""
    command = f"{sys.executable} -m fisher_ray.cli inspect {finished.folder} {flag} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == "" and done.returncode == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", "-o", "/dev/full"], "must name a file in a directory that exists, got /dev/full"),
        (["report", "-o", "nosuch/report.html"], "must name a file in a directory that exists"),
        (["export", "-o", "nosuch/means.npz"], "must name a file in a directory that exists"),
        (["validate", "-o", "nosuch/law.png"], "must name a file in a directory that exists"),
        (["project", "-o", "nosuch/at.parquet"], "must name a file in a directory that exists"),
        (["project", "-o", "."], "must name a file in a directory that exists, got ."),
    ],
)
def test_places_that_cannot_be_written(
    argv: list[str], message: str, finished: Stored, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argv[0], str(finished.folder), *argv[1:]]) in (1, 2)
    said_ = capsys.readouterr()
    (line,) = said_.err.splitlines()
    assert message in line and said_.out == ""


def test_a_job_that_nobody_takes_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", "http://127.0.0.1:1", "--", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no Ray job server answers: ") and "127.0.0.1:1" in line and "--address" in line


@pytest.mark.parametrize(
    ("asked", "here", "gpus"),
    [
        ({"device": "cuda", "max_actors": 2}, "", 1.0),  # whose nodes with GPUs are still to come
        ({"gpus_per_actor": 0.5, "max_actors": 2}, "", 0.5),
        ({"device": "cpu", "min_actors": 4}, "", 0.0),
        # What the first node would have decides nothing: a later one, or the next command, may find another.
        ({"min_actors": 4}, "", "nothing says what to compute on. Give --gpus-per-actor 1, or --device cpu"),
        ({"max_actors": 2}, "", "nothing says what to compute on. Give --gpus-per-actor 1, or --device cpu"),
        ({}, "", "no node has the"),
        ({"max_actors": 2}, "1", "no node has the"),  # a sweep's own Ray, to which no node comes
    ],
)
def test_what_workers_ask_for_where_no_node_is_yet(
    asked: dict[str, Any], here: str, gpus: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster_module.STARTED_HERE, here)
    monkeypatch.setattr(cluster_module, "joined", nullcontext)
    monkeypatch.setattr(cluster_module.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster_module.ray, "cluster_resources", dict)
    monkeypatch.setattr(cluster_module.ray, "nodes", list)
    pool = RayPool(RunConfig(model="m", corpus=("c",), output="o", **asked))
    if isinstance(gpus, str):
        with pytest.raises(ConfigError, match=gpus):
            pool.__enter__()
    else:
        assert pool.__enter__()._gpus == gpus


def test_a_cluster_that_cannot_be_joined_is_one_line(
    gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """It does not answer, asks for a token, or is of another version."""
    (tmp_path / "docs.txt").write_text("one two")
    flags = ["run", "--model", gpt2, "--corpus", str(tmp_path / "docs.txt"), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(cluster_module.ray, "is_initialized", lambda: False)
    for error in (ConnectionError("no\nanswer"), AuthenticationError("no token"), RuntimeError("version mismatch")):

        def fails(address: str, *_: Any, error: Exception = error, **__: Any) -> None:
            assert address == os.environ.get("RAY_ADDRESS", "local")
            raise error

        monkeypatch.setattr(cluster_module.ray, "init", fails)
        for address, words in (
            ("there:6379", "the Ray cluster at there:6379 cannot be joined"),
            (None, "on this machine"),
        ):
            monkeypatch.delenv("RAY_ADDRESS", raising=False)
            if address:
                monkeypatch.setenv("RAY_ADDRESS", address)
            assert main(flags) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert words in line and " ".join(str(error).split())[:10] in line
    assert not (tmp_path / "run").exists()


class _Jobs:
    """A job server that is away now and then, and a job that ends at the third answer."""

    def __init__(self, address: str | None):
        self.asked = 0

    def submit_job(self, **_: Any) -> str:
        return "raysubmit_1"

    async def tail_job_logs(self, job: str) -> Any:
        yield "working\n"
        raise RuntimeError("the connection was closed")

    def get_job_logs(self, job: str) -> str:
        return "working\nthe table of results\n"

    def get_job_info(self, job: str) -> Any:
        self.asked += 1
        if self.asked % 2:
            raise requests.ConnectionError("refused")
        ended = self.asked > 5
        status = JobStatus.SUCCEEDED if ended else JobStatus.RUNNING
        return SimpleNamespace(status=status, driver_exit_code=0 if ended else None)


class _Cut(_Jobs):
    """What is between goes away, as a proxy or a tunnel does."""

    async def tail_job_logs(self, job: str) -> Any:
        yield "working\n"
        raise ServerDisconnectedError


class _Gone(_Jobs):
    def get_job_info(self, job: str) -> Any:
        raise requests.ConnectionError("refused")


class _Interrupted(_Jobs):
    async def tail_job_logs(self, job: str) -> Any:
        yield "working\n"
        raise KeyboardInterrupt


class _Closed(_Jobs):
    def __init__(self, address: str | None):
        raise AuthenticationError("the cluster wants a token")


@pytest.mark.parametrize(
    ("server", "code", "words"),
    [
        (_Jobs, 0, ""),
        (_Cut, 0, ""),
        (
            _Gone,
            1,
            "error: the job server answers no more: refused Job raysubmit_1 may go on: ray job status raysubmit_1",
        ),
        (_Interrupted, 130, "no longer followed; job raysubmit_1 goes on. To end it: ray job stop raysubmit_1"),
        (_Closed, 2, "error: no Ray job server answers: the cluster wants a token"),
    ],
)
def test_following_a_job(
    server: type, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", server)
    monkeypatch.setattr(cluster_module.time, "sleep", lambda seconds: None)
    assert main(["submit", "--", "run"]) == code
    shown = capsys.readouterr()
    assert shown.err.count("\n") == (code > 0) and words in shown.err
    assert code or (shown.out.count("working") == 1 and shown.out.endswith("\nthe table of results\n"))


def test_variables_of_a_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}

    class Noting(_Jobs):
        def submit_job(self, runtime_env: dict[str, Any], **_: Any) -> str:
            given.update(runtime_env["env_vars"])
            return "raysubmit_1"

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Noting)
    monkeypatch.setattr(cluster_module.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert main(["submit", "--env", "HF_TOKEN", "--env", "A=b=c", "--env", "EMPTY=", "--", "run"]) == 0
    assert given == {"RAY_JOB_STOP_WAIT_TIME_S": "60", "HF_TOKEN": "secret", "A": "b=c", "EMPTY": ""}
    assert "secret" not in capsys.readouterr().out
    for wrong in ("NOT_SET_HERE", "=x"):
        assert main(["submit", "--env", wrong, "--", "run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: --env {wrong}: expected NAME=VALUE, or the name of a variable that is set here."


@pytest.mark.parametrize("command", ["status", "verify", "clean"])
def test_of_no_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "nothing")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no run" in line
    (tmp_path / "notes.txt").write_text("mine")
    assert main([command, str(tmp_path)]) == 2
    assert "no run of ours" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_verify_names_what_is_wrong(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = len(run.receipts)
    assert f"{tasks} of {tasks} tasks, everything as it was written" in said(capsys, "verify", run.folder)
    victim = run.folder / run.receipts[1]["files"]["positions"]["path"]
    raw = bytearray(victim.read_bytes())
    raw[100] ^= 4
    victim.write_bytes(raw)
    (run.folder / "reduced/layer_000/fisher.npy").unlink()
    out = said(capsys, "verify", run.folder, code=5)
    assert (
        f"positions/{victim.name} is damaged" in out
        and "layer_000/fisher.npy is missing" in out
        and "2 problems" in out
    )
    for name in ("00000000", "00000001", "00000002", "00000003"):
        (run.folder / f"done/{name}.json").unlink()
    assert "the run is not complete" in said(capsys, "verify", run.folder, code=5)


def test_clean_removes_what_no_receipt_names_and_asks_first(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    (run.folder / "report.html").write_text("one's own")
    (run.folder / "figures").mkdir()
    (run.folder / "figures/a.png").write_text("one's own")
    before = sorted(path for path in run.folder.rglob("*") if path.is_file())
    orphan = run.folder / "sums/00000001-dead0000/layer_000.npz"
    orphan.parent.mkdir()
    orphan.write_bytes(b"half")
    temporary = run.folder / "positions/.writing-abc"
    temporary.write_bytes(b"ha")
    out = said(capsys, "clean", run.folder)
    assert "sums/00000001-dead0000/layer_000.npz" in out and ".writing-abc" in out and "2 files" in out
    assert orphan.exists() and temporary.exists()
    assert "2 files that no receipt names removed" in said(capsys, "clean", run.folder, "--remove")
    assert sorted(path for path in run.folder.rglob("*") if path.is_file()) == before
    assert "everything as it was written" in said(capsys, "verify", run.folder)


def test_clean_lists_what_there_is_where_nothing_can_be_written(
    run: Stored, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.folder / "sums/x").write_bytes(b"of a killed attempt")
    shutil.rmtree(run.folder / "lease", ignore_errors=True)
    run.folder.chmod(0o555)
    with permissions_bind():
        assert "sums/x\n1 files that no receipt names would be removed" in said(capsys, "clean", run.folder)
        assert "Permission denied" in refused(capsys, "clean", run.folder, "--remove")
    run.folder.chmod(0o755)
    assert (run.folder / "sums/x").exists()


def test_clean_leaves_what_a_damaged_receipt_may_name(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    receipt = run.folder / "done/00000001.json"
    sound = receipt.read_bytes()
    receipt.write_bytes(sound[:-20])
    (run.folder / "sums/00000002-dead").mkdir()
    (run.folder / "sums/00000002-dead/layer_000.npz").write_bytes(b"of a killed attempt")
    out = said(capsys, "clean", run.folder, "--remove")
    assert out.splitlines() == ["sums/00000002-dead/layer_000.npz", "1 files that no receipt names removed"]
    receipt.write_bytes(sound)
    assert "everything as it was written" in said(capsys, "verify", run.folder)


def test_clean_keeps_away_from_a_run_at_work(run: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    (run.folder / "sums/x").write_bytes(b"in the making")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease.__init__, "__defaults__", (2.0,))
        lease = Lease(RunStore(str(run.folder)))
        assert main(["clean", str(run.folder), "--remove"]) == 3
    lease.release()
    assert "another driver works on" in capsys.readouterr().err
    assert (run.folder / "sums/x").exists()


# ---- settings that come back --------------------------------------------------------------------------------------------


def test_a_run_is_replayed_with_another_estimator(finished: Stored, tmp_path: Path) -> None:
    """What the file has of the estimator it was made with stays behind; what is given stays refused."""
    values = json.loads((finished.folder / "run.json").read_text())
    values["config"].update(estimator="deflated", rank=5)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))

    def config(**given: Any) -> RunConfig:
        return cli._config({"config": path, "estimator": None, "rank": None, **given})

    assert (config().estimator, config().rank) == ("deflated", 5)
    assert (config(estimator="deflated").rank, config(rank=3).rank) == (5, 3)
    assert (config(estimator="sampled").estimator, config(estimator="sampled").rank) == ("sampled", None)
    with pytest.raises(ConfigError, match="rank is for estimator deflated"):
        config(estimator="sampled", rank=3)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (1, "unknown: one block of documents"),
        (5, "from 5 blocks of documents (few, so the errors are rough)"),
        (9, "from 9 blocks of documents"),
    ],
)
def test_a_run_says_what_its_errors_are_made_of(
    tasks: int, words: str, gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    corpus = rows(tmp_path / "docs.jsonl", *({"text": f"one two {i}"} for i in range(tasks)))
    flags = [
        "--layers",
        "1",
        "--num-samples",
        "1",
        "--executor",
        "local",
        "--task-bytes",
        len(corpus.read_bytes()) // tasks,
    ]
    out = said(capsys, "run", "--model", gpt2, "--corpus", corpus, "--output", tmp_path / "run", *flags)
    assert f"standard errors:      {words}\n" in out


def test_a_colon_in_a_file_is_no_sixties(tmp_path: Path) -> None:
    """As YAML had it once: 1:20 would be position 80."""
    path = tmp_path / "run.yaml"
    for written, kept in (
        ("1:20", "1:20"), ("1:20:3", "1:20:3"), ("-1", "-1"), ("80", "80"), ("0x10", "16"), ("[0, -1]", "0,-1"),
    ):  # fmt: skip
        path.write_text(f"model: m\ncorpus: c\noutput: o\npositions: {written}\nseed: 12\n")
        config = cli._config({"config": path})
        assert (config.positions, config.seed) == (kept, 12)
    path.write_text("output: o\ncommon: {model: m, corpus: c}\nproduct: {positions: [1:20, 5]}\n")
    assert [config.positions for config in read_sweep(path).points.values()] == ["1:20", "5"]


def test_a_runs_own_description_replays_it(
    finished: Stored, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, "run", "--config", finished.folder / "run.json", "--output", tmp_path / "again")
    assert "reduced/spectra.png" in out
    assert Stored(tmp_path / "again").bits() == finished.bits()


def test_a_finished_run_is_not_computed_again(
    run: Stored, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, files = len(run.receipts), {p: p.stat().st_mtime_ns for p in run.folder.rglob("*.np[yz]")}
    assert f"{tasks} of {tasks} tasks were done before" in said(
        capsys, "run", "--config", run.folder / "run.json", "--output", run.folder
    )
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*.np[yz]")} == files


def test_a_plan_is_made_once(run: Stored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever size tasks would have now, a run keeps its own."""
    for least in ("MIN_TASK_BYTES", "MIN_BLOCK_BYTES"):
        monkeypatch.setattr(cost, least, 10 * TASK_BYTES)
    out = said(capsys, "run", "--config", run.folder / "run.json", "--output", run.folder)
    assert f"{len(run.receipts)} of {len(run.receipts)} tasks" in out


# ---- plan ----------------------------------------------------------------------------------------------------------------


def test_plan_counts_what_the_run_counts(
    finished: Stored, gpt2: str, small_tasks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    corpus = finished.description["config"]["corpus"][0]
    flags = ["--model", gpt2, "--corpus", corpus, "--output", tmp_path / "run"]
    facts = json.loads(said(capsys, "plan", *flags, "--json", "--gpu", "h100,cpu"))
    counts = finished.counts()
    assert facts["exact"] and facts["tasks"] == len(finished.receipts)
    assert (facts["documents"], facts["tokens"], facts["scored"]) == tuple(
        counts[name] for name in ("documents", "tokens", "scored")
    )
    written = sum(
        (finished.folder / p["path"]).stat().st_size
        for r in finished.receipts
        for n, p in r["files"].items()
        if "sums" in n
    )
    assert 0.8 < facts["tasks"] * cost_of(gpt2, corpus).sums_bytes / written < 1.3
    assert [m["hardware"] for m in facts["hardware"]] == ["h100", "cpu"] and not any(
        m["fits"] for m in facts["hardware"]
    )
    assert not (tmp_path / "run").exists()
    out = said(capsys, "plan", *flags)
    assert f"{counts['tokens']:,} in" in out and "(exact)" in out and "device hours" in out


@pytest.mark.parametrize("source", ["observed", "sampled"])
def test_plan_counts_windows_without_a_sink(source: str, tmp_path: Path) -> None:
    """As a worker cuts them, and the first token of a document is not drawn from nothing."""
    model = jobs.save_model(tmp_path / "model", with_tokenizer=False, with_sink=False)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(2, jobs.VOCAB, (5, 70)))
    config = jobs.settings(model, tmp_path / "a.npy", tmp_path / "run", layers="2", token_source=source, num_samples=1)
    plan = make_plan(config)
    amount = reckon(plan, tasks := plan.make_tasks())
    worker = Worker(plan, RunStore(str(tmp_path / "run")))
    cut = [window for task in tasks for _, window, _ in worker.windows(task)]
    assert amount.window_tokens == sum(len(window.ids) for window in cut)
    assert amount.scored == sum(len(window.scored) for window in cut) == (350 if source == "observed" else 345)


def test_plan_counts_the_groups_of_a_task(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Of 24 values of a column a task has few, and writes sums of those alone."""
    lines = [json.dumps({"text": jobs.some_text(300), "kind": f"kind {i}"}) for i in range(24)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    three = 3 * max(map(len, lines)) + 3
    flags = [
        "--corpus",
        tmp_path / "docs.jsonl",
        "--output",
        tmp_path / "run",
        "--group-by",
        "kind",
        "--task-bytes",
        three,
    ]
    facts = json.loads(said(capsys, "plan", "--model", gpt2, *flags, "--json"))
    assert (facts["tasks"], facts["groups"], facts["task_groups"]) == (8, 24, 3)
    config = jobs.settings(
        gpt2, tmp_path / "docs.jsonl", tmp_path / "run", layers="all", group_by="kind", task_bytes=three, num_samples=1
    )
    store = RunStore(str(tmp_path / "run"))
    plan = make_plan(config)
    worker = Worker(plan, store)
    for task in plan.make_tasks():
        worker.compute(task)
    written = sum(path.stat().st_size for path in (tmp_path / "run/sums").glob("*/*.npz"))
    planned = facts["storage"]["summary"] - facts["scored"] * plan.cost.position_bytes
    assert 0.8 < planned / written < 1.3


def cost_of(model: str, corpus: str) -> Any:
    return make_plan(jobs.settings(model, corpus, "run")).cost


def test_plan_says_when_it_estimates(gpt2: str, tmp_path: Path, small_tasks: None) -> None:  # noqa: F811
    (tmp_path / "docs.txt").write_text(jobs.some_text(60_000))
    plan = make_plan(jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "run"))
    tasks = plan.make_tasks()
    assert len(tasks) > 20
    amount = reckon(plan, tasks)
    assert amount.sampled == 8
    truth = sum(len(jobs.tokenizer()(p)["input_ids"]) for _, p in jobs.paragraphs((tmp_path / "docs.txt").read_bytes()))
    assert amount.tokens == pytest.approx(truth, rel=0.25) and amount.tokens != truth


def test_plan_never_counts_more_documents_than_are_taken(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """Where those that it reads are shorter than others."""
    (tmp_path / "docs.txt").write_text("\n\n".join([*(f"one two {i}" for i in range(90)), "and " * 1_000]))
    for most in (91, 500):
        plan = make_plan(jobs.settings(gpt2, tmp_path / "docs.txt", "run", task_bytes=100, max_docs=most))
        amount = reckon(plan, tasks := plan.make_tasks())
        assert amount.sampled < len(tasks) and amount.documents <= most and (amount.documents > 91) == (most == 500)


def test_plan_refuses_what_cannot_fit(gpt2: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:  # noqa: F811
    (tmp_path / "docs.txt").write_text("one\n")
    monkeypatch.setitem(cost.HARDWARE, "l4", replace(cost.HARDWARE["l4"], memory=1 << 20))
    flags = ["--model", gpt2, "--corpus", str(tmp_path / "docs.txt"), "--output", str(tmp_path / "run")]
    assert main(["plan", *flags, "--gpu", "l4"]) == 2
    captured = capsys.readouterr()
    assert "of memory" in captured.err and "What would fit" in captured.err
    assert main(["plan", *flags, "--gpu", "l5"]) == 2
    assert "gpu must be of" in capsys.readouterr().err


# ---- what is refused before anything is made ----------------------------------------------------------------------------


def rows(path: Path, *some: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-tokens", str(10**20)], f"batch_tokens must be at least 1 and below 2^63, got {10**20}"),
        (["--task-timeout", "inf"], "task_timeout must be at least 1 and below 2^63, got inf"),
        (["--gpus-per-actor", "inf"], "gpus_per_actor must be a fraction of one GPU or a whole number, got inf"),
        (["--gpus-per-actor", "nan"], "gpus_per_actor must be a fraction of one GPU or a whole number, got nan"),
        (["--layers", "0-99999999999"], "layers must be in [0, 2], got"),
        (["--corpus", "simplecache::s3://bucket/a.txt"], "s3://bucket/a.txt chains file systems by '::'"),
        (["--corpus", "zip://a.txt::/tmp/a.zip"], "chains file systems by '::'"),
        (["--output", "simplecache::memory://run"], "chains file systems by '::'"),
        (["--group-by", "zero"], "docs.jsonl:0: character 3 of column 'zero' is a zero byte, not text"),
        (["--column", "ids"], "docs.jsonl:0: token ids must be in [0, 400), got -1"),
        (["--column", "ids", "--group-by", "token"], "docs.jsonl:0: token ids must be in [0, 400), got -1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(
    command: str, flags: list[str], words: str, gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    corpus = rows(tmp_path / "docs.jsonl", {"text": "one two", "ids": [3, -1], "zero": "one\0"})
    more = ["--executor", "local", *flags]
    begun = time.monotonic()
    line = refused(capsys, command, "--model", gpt2, "--corpus", corpus, "--output", tmp_path / "run", *more)
    assert words in line and time.monotonic() - begun < 20
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


def test_too_little_memory_is_one_line(
    finished: Stored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no run gives up a task for it: a command that loads the run's model on a GPU that others fill."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cli, "model_of", full)
    assert main(["project", str(finished.folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: out of memory: CUDA out of memory. Ask for less at once, or free what others hold."


def test_an_unknown_flag_is_answered_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--model", "m", "--layer", "1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --layer 1. See fisher-ray run --help.\n"


@pytest.mark.parametrize(
    ("spec", "chosen"), [(None, None), ("all", [0, 3, 6, 9]), ("6,0,6", [6, 0]), ("3", [3]), ("9,3-3", [9, 3])]
)
def test_layers_of_a_run(spec: str | None, chosen: list[int] | None) -> None:
    assert cli._layers(spec, [0, 3, 6, 9]) == chosen


def test_project_refuses_no_documents(finished: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--json"], ["-o", "nosuch/a.parquet"]):
        assert "max_docs must be at least 1, got 0" in refused(
            capsys, "project", finished.folder, "--max-docs", 0, *argv
        )


def test_an_output_within_the_corpus_is_refused(
    gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """A second run would read what the first has written; beside it, and beside what a glob takes, is fine."""
    (tmp_path / "texts/below").mkdir(parents=True)
    (tmp_path / "texts/docs.txt").write_text("one two\n")
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    for corpus in ("texts", "texts/", "x/../texts", "~/texts", "texts/**", f"file://{tmp_path}/texts"):
        monkeypatch.setenv("HOME", str(tmp_path))
        named = corpus if "://" in corpus else f"{tmp_path}/texts{'/**' if '*' in corpus else ''}"
        for output in ("texts/run", "texts", "texts/below/../run", f"file://{tmp_path}/texts/new/run"):
            for command in ("run", "plan"):
                argv = [command, "--model", gpt2, "--corpus", corpus, "--output", output, "--executor", "local"]
                assert f"output {output} is in {named}, of the corpus" in refused(capsys, *argv)
    assert sorted(tmp_path.rglob("*")) == there
    for corpus, output in (("texts", "texts-run"), ("texts/*.txt", "texts/run")):
        said(
            capsys,
            "run",
            "--model",
            gpt2,
            "--corpus",
            corpus,
            "--output",
            output,
            "--executor",
            "local",
            "--layers",
            "1",
        )


# ---- the log -------------------------------------------------------------------------------------------------------------


def test_one_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(cli, "time", clock)
    text = io.StringIO()
    state = Progress("computing", 1, 40, 10, 400, Counts(tokens=5), 1234.5, 3725.0, 2, 1, 3, 4)
    line = cli._line(state)
    with cli._progress(Console(file=text, width=40)) as tell:
        for _ in range(100):
            tell("computing", 10, 400, line)
            clock.now += 1.0
        tell("reducing", 10, 400, line)
    lines = text.getvalue().splitlines()
    assert len(lines) == 100 // 15 + 1 + 1
    assert lines[0] == (
        "computing: 1/40 tasks, 1,234 tokens/s, 1:02:05 left, actors 2 alive 1 pending, 3 retried, 4 quarantined"
    )
    assert lines[-1].startswith("reducing: ")


# ---- sweeps --------------------------------------------------------------------------------------------------------------


def sweep_file(folder: Path, **values: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_sweep_is_a_run_for_each_point(
    gpt2: str, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """Side by side on one cluster."""
    monkeypatch.setenv("RAY_ADDRESS", jobs.address())
    (tmp_path / "docs.txt").write_text(jobs.some_text(2_000))
    common = {"model": gpt2, "corpus": str(tmp_path / "docs.txt"), "layers": "0,2", "max_docs": 5, "max-actors": 1}
    product = {"estimator": ["sampled"], "seed": [0, 1]}
    path = sweep_file(tmp_path, output=str(tmp_path / "out"), side_by_side=2, common=common, product=product)
    out = said(capsys, "sweep", path)
    names = [f"estimator=sampled,seed={seed}" for seed in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*names, "summary.parquet"])
    rows = pq.read_table(tmp_path / "out/summary.parquet").to_pylist()
    assert [(row["point"], row["layer"]) for row in rows] == [(name, layer) for name in names for layer in (0, 2)]
    for row in rows:
        fisher = np.load(tmp_path / "out" / row["point"] / f"reduced/layer_{row['layer']:03d}/fisher.npy")
        assert row["trace"] == pytest.approx(fisher.trace()) and row["code"] == 0
        assert row["setting_seed"] == row["point"].rpartition("=")[2]
    assert rows[0]["trace"] != rows[2]["trace"]  # of another seed
    columns = pq.read_schema(tmp_path / "out" / names[0] / "reduced/summary.parquet")
    assert pq.read_schema(tmp_path / "out/summary.parquet").equals(
        pa.schema([("point", pa.string()), ("code", pa.int64()), ("setting_seed", pa.string()), *columns])
    )
    table = out[out.rindex("99 % rank") :]
    assert all(table.count(name) == 2 for name in names)
    # One point is lost, and the same command brings it back.
    shutil.rmtree(tmp_path / "out" / names[1])
    again = said(capsys, "sweep", path)
    assert again.count("tasks were done before") == 1
    assert pq.read_table(tmp_path / "out/summary.parquet").to_pylist() == rows


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_job_does_not_write_into_its_copy_of_the_working_directory(
    command: str, gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    copied = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    Path("docs.txt").write_text("one two\n")
    common = {"model": gpt2, "corpus": ["docs.txt"], "executor": "local"}
    sweep_file(copied, output="out", common=common, points=[{"seed": 1}])
    flags = ["--model", gpt2, "--corpus", "docs.txt", "--output", "out", "--executor", "local"]
    assert main([command, *(flags if command == "run" else ["sweep.yaml"])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output out is in the job's copy of its working directory, which goes with the job" in line
    # Its files have new times of change on every node and in every job: another corpus each time.
    flags[5] = str(tmp_path / "out")
    sweep_file(copied, output=str(tmp_path / "out"), common=common, points=[{"seed": 1}])
    assert main([command, *(flags if command == "run" else ["sweep.yaml"])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "docs.txt is in the job's copy of its working directory, which has other times of change on every node" in line
    )
    assert not Path("out").exists() and not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    Path("docs.txt").write_text("one two\n")
    assert main(["run", *flags[:4], "--output", str(tmp_path / "out"), "--executor", "local"]) == 0


def test_what_a_path_looks_like_is_no_markup(
    gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "docs.txt").write_text("one two\n")
    output = str(tmp_path / "r[/b][a]")
    said(capsys, "run", "--model", gpt2, "--corpus", tmp_path / "docs.txt", "--output", output, "--executor", "local")
    for command in ("status", "inspect", "verify"):
        assert output in said(capsys, command, output)


def test_a_run_is_read_from_any_directory(
    gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """Where model and corpus were given by relative paths."""
    shutil.copytree(gpt2, tmp_path / "here/model")
    (tmp_path / "here/docs.txt").write_text(jobs.some_text(500))
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--executor", "local", "--layers", "1"]
    said(capsys, "run", "--model", "model", "--corpus", "docs.txt", "--output", "run", *flags)
    monkeypatch.chdir(tmp_path)
    assert "raises" in said(capsys, "project", "here/run", "--top", "1")
    absolute = [tmp_path / "here" / name for name in ("model", "docs.txt", "run")]
    again = ["--model", absolute[0], "--corpus", absolute[1], "--output", absolute[2], *flags]
    assert "tasks were done before" in said(capsys, "run", *again)


def test_a_glob_behind_a_tilde_is_written_as_it_is_found_anywhere(
    gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("one two\n")
    flags = ["--model", gpt2, "--corpus", "~/texts/*.txt", "--output", "~/run", "--executor", "local", "--layers", "1"]
    said(capsys, "run", *flags)
    assert Stored(tmp_path / "run").description["config"]["corpus"] == [f"{tmp_path}/texts/*.txt"]
    monkeypatch.setenv("HOME", "/nowhere")
    assert "1 of 1 tasks were done before" in said(
        capsys, "run", "--config", tmp_path / "run/run.json", "--output", tmp_path / "run"
    )


@pytest.mark.parametrize(
    ("moved", "killed"), [(["texts"], False), (["texts"], True), (["model"], False), (["texts", "model"], True)]
)
def test_a_run_goes_on_where_its_corpus_and_model_are_now(
    moved: list[str], killed: bool, gpt2: str, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """Whoever reads it later is sent there. What stands in the old place by now, as large and as old, is not read."""
    shutil.copytree(gpt2, tmp_path / "old/model")
    (tmp_path / "old/texts/below").mkdir(parents=True)
    (tmp_path / "new").mkdir()
    for name, text in zip(("a", "b", "below/c"), jobs.some_text(6_000).split("\n\n", 2), strict=True):
        (tmp_path / f"old/texts/{name}.txt").write_text(text)
    place = {name: tmp_path / "old" / name for name in ("model", "texts")}
    run = ["--output", tmp_path / "run", "--executor", "local", "--layers", "1"]
    said(capsys, "run", "--model", place["model"], "--corpus", place["texts"], *run)
    before = Stored(tmp_path / "run")
    bits, table, plan = before.bits(), before.table, (tmp_path / "run/plan.parquet").read_bytes()
    assert len(before.receipts) > 3
    for receipt in sorted((tmp_path / "run/done").iterdir())[1:4]:
        receipt.unlink()
    shutil.rmtree(tmp_path / "run/reduced")
    for name in moved:
        place[name] = (tmp_path / "old" / name).rename(tmp_path / "new" / name)
    for path in (tmp_path / "new").rglob("*.txt"):
        other = tmp_path / "old" / path.relative_to(tmp_path / "new")
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(path.read_bytes().swapcase())
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))

    again = ["run", "--model", place["model"], "--corpus", place["texts"], *run]
    if killed:  # between run.json and plan.parquet
        writing = RunStore.write

        def write(store: RunStore, path: str, raw: bytes) -> None:
            if path == "plan.parquet":
                raise KeyboardInterrupt
            writing(store, path, raw)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunStore, "write", write)
            said(capsys, *again, code=130)
        assert (tmp_path / "run/plan.parquet").read_bytes() == plan
        assert f"{tmp_path}/new" in (tmp_path / "run/run.json").read_text()
    out = said(capsys, *again)
    assert f"{len(before.receipts) - 3} of {len(before.receipts)} tasks were done before" in out
    after = Stored(tmp_path / "run")
    assert after.bits() == bits and after.table.equals(table) and not (tmp_path / "run/quarantine").exists()
    config = after.description["config"]
    assert (config["model"], config["corpus"]) == (str(place["model"]), [str(place["texts"])])
    parts = pq.read_table(tmp_path / "run/plan.parquet").to_pylist()
    assert {part["path"] for part in parts} == {f"file://{place['texts']}/{name}.txt" for name in ("a", "b", "below/c")}
    assert "everything as it was written" in said(capsys, "verify", tmp_path / "run")
    assert "pass" in said(capsys, "validate", tmp_path / "run", "--positions", "2")
    assert f"{len(before.receipts)} of {len(before.receipts)} tasks" in said(capsys, *again)


def test_a_sweep_goes_on_past_a_point_that_fails(
    gpt2: str, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "docs.txt").write_text("one two\n\nthree four\n")
    points = [{"layers": "77", "seed": 2}, {"layers": "1", "seed": 1}, {"layers": 2, "seed": 3}]
    common = {"model": gpt2, "corpus": [str(tmp_path / "docs.txt")], "executor": "local"}
    out = said(
        capsys, "sweep", sweep_file(tmp_path, output=str(tmp_path / "out"), common=common, points=points), code=2
    )
    assert f"layers must be in [0, {LAYERS}], got 77" in out
    rows = {row["point"]: row for row in pq.read_table(tmp_path / "out/summary.parquet").to_pylist()}
    assert {point: row["code"] for point, row in rows.items()} == {
        "layers=77,seed=2": 2, "layers=1,seed=1": 0, "layers=2,seed=3": 0
    }  # fmt: skip
    # A point without a run comes first and leaves the table its columns; without any there is no table.
    assert "all points" in out and "participation_ratio" in pq.read_schema(tmp_path / "out/summary.parquet").names
    none = sweep_file(tmp_path, output=str(tmp_path / "none"), common=common, points=points[:1])
    assert "all points" not in said(capsys, "sweep", none, code=2) and not (tmp_path / "none/summary.parquet").exists()
    # A point that is refused has no numbers of what is in its place.
    others = {**common, "max_docs": 1}
    changed = sweep_file(tmp_path, output=str(tmp_path / "out"), common=others, points=points[1:2])
    assert "holds another run: max_docs was None, is 1" in said(capsys, "sweep", changed, code=3)
    rows = sweep_module._rows(sweep_module.read_sweep(changed), [3])
    assert [row["trace"] for row in rows] == [None]
    sweep_file(tmp_path, output=str(tmp_path / "out"), common=common, points=points)
    # What is damaged or not reduced is no row of numbers, and costs the others nothing.
    (tmp_path / "out/layers=1,seed=1/reduced/summary.parquet").write_bytes(b"damaged")
    (tmp_path / "out/layers=2,seed=3/reduced/manifest.json").unlink()
    found = sweep_module._rows(sweep_module.read_sweep(tmp_path / "sweep.yaml"), [2, 0, 4])
    assert [(row["code"], row["trace"]) for row in found] == [(2, None), (0, None), (4, None)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": "o", "points": []}, "points"),
        ({"output": "o", "product": {"seed": 3}}, "each with a list of values"),
        ({"output": "o", "product": {"seed": [1]}, "points": [{"seed": 1}]}, "either product"),
        ({"output": "o"}, "either product"),
        ({"points": [{"seed": 1}]}, "must hold output"),
        ({"output": "o", "points": [{"seed": 1}], "parallel": 2}, "unknown setting 'parallel'"),
        ({"output": "o", "points": [{"seed": 1}], "side_by_side": 0}, "side_by_side"),
        ({"output": "o", "points": [{"sead": 1}], "common": {"model": "m", "corpus": "c"}}, "unknown setting 'sead'"),
        ({"output": "o", "points": [{"top_p": 3.0}], "common": {"model": "m", "corpus": "c"}}, "point top_p=3.0: "),
        ({"output": "o", "points": [{"seed": 1}], "common": {"corpus": "c"}}, "model must be given"),
        ({"output": "o", "points": [{1: 2, "seed": 3}]}, "must be a list of settings by name"),
        ({"output": "o", "product": {1: [2], "seed": [3]}}, "must hold settings, each with a list of values"),
    ],
)
def test_a_sweeps_file_is_checked_before_anything_runs(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sweep(sweep_file(tmp_path, **values))


def test_points_that_are_spelled_alike_are_told_apart_or_refused(tmp_path: Path) -> None:
    common = {"model": "m", "corpus": "c"}
    product = {"columns": [["one two"], ["one", "two"], ["two", "one"], "one two"]}
    sweep = read_sweep(sweep_file(tmp_path, output="out", common=common, product=product))
    assert [config.columns for config in sweep.points.values()] == [
        ("one two",),
        ("one", "two"),
        ("two", "one"),
        ("one two",),
    ]
    assert len({config.output for config in sweep.points.values()}) == 4
    for points, name in (
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], "seed=1"),
        ([{"layers": 1}, {"layers": "1"}], "layers=1"),
        ([{"columns": ["a b"], "seed": 1}, {"seed": 1, "columns": ["a b"]}], "columns=a-b,seed=1-"),
    ):
        with pytest.raises(ConfigError, match=f"two points in the sweep .* are called {name}"):
            read_sweep(sweep_file(tmp_path, output="out", common=common, points=points))


def test_points_have_folders_of_their_own(tmp_path: Path) -> None:
    models = ["a/b", "a-b", "a b", "x" * 300, "x" * 299 + "y"]
    product = {"model": models, "columns": [["one"], ["one", "two"]]}
    sweep = read_sweep(sweep_file(tmp_path, output="s3://bucket/out/", common={"corpus": "c"}, product=product))
    assert len(sweep.points) == 10
    for name, config in sweep.points.items():
        assert config.output == f"s3://bucket/out/{name}" and "/" not in name and len(name) <= 100
