"""From text to reduced matrices: against the library one window at a time, and the same bits whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest
import torch
from test_run import rewrite

import jobs
from fisher_ray import cli, cost, driver
from fisher_ray import cluster as cluster_module
from fisher_ray import plan as plan_module
from fisher_ray.cli import REFUSED, main
from fisher_ray.dispatch import LocalPool
from fisher_ray.estimators import Exact
from fisher_ray.scores import score_factors
from fisher_ray.split import SplitModel
from jobs import LAYERS, MAX_POSITIONS, Stored, cluster, gpt2  # noqa: F401

ALL_LAYERS = range(LAYERS + 1)
STRIDE = MAX_POSITIONS // 4
FLOAT32 = 2e-5  # of float32 passes against float64 ones; a position left out of 10,000 shows as 1e-4
POSITION = 1e-3  # the same for one position's small eigenvalues and near-certain predictions
TASK_BYTES = 3_000


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tasks of what otherwise would be one or two."""
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)


def fisher_ray(*argv: Any) -> int:
    return main(["run", *map(str, argv)])


def close(got: np.ndarray, truth: np.ndarray, tolerance: float = FLOAT32) -> None:
    assert got.shape == truth.shape
    assert np.linalg.norm(got - truth) <= tolerance * np.linalg.norm(truth)


# ---- the truth, one window at a time -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stored, str]:  # noqa: F811
    """An exact run over 10 KB and the text of its file; documents of 1 to several windows."""
    folder = tmp_path_factory.mktemp("exact")
    text = jobs.some_text(10_000)
    (folder / "docs.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)
        stored, outcome = jobs.run_here(jobs.settings(gpt2, folder / "docs.txt", folder / "run", estimator="exact"))
    assert outcome.tasks == 4
    return stored, text


def tokens_of(text: str) -> list[tuple[int, list[int]]]:
    """(offset, ids) of each paragraph."""
    return [(offset, jobs.tokenizer()(part)["input_ids"]) for offset, part in jobs.paragraphs(text.encode())]


def expected_positions(text: str) -> Iterator[tuple[int, list[int], list[int], int, int]]:
    """(offset, document ids, window ids, window position, document position) of every position."""
    for offset, ids in tokens_of(text):
        for first, new, end in jobs.token_windows(len(ids), MAX_POSITIONS, STRIDE):
            for t in range(new, end):
                yield offset, ids, [0, *ids[first:end]], t - first + 1, t


def test_every_token_has_its_row(exact: tuple[Stored, str]) -> None:
    stored, text = exact
    truth = list(expected_positions(text))
    assert len({(offset, t) for offset, *_, t in truth}) == len(truth) == stored.counts()["scored"] > 3_000
    assert sum(len(ids) > MAX_POSITIONS for _, ids in tokens_of(text)) > 10
    for layer in ALL_LAYERS:
        rows = stored.rows(layer)
        got = [(r["document"], r["position"], r["token"], r["context"], r["layer"]) for r in rows]
        assert got == [(f"docs.txt:{o}", t, ids[t], at, layer) for o, ids, _, at, t in truth]
    paragraphs: dict[int, str] = {}
    for row in rows:
        offset = int(row["document"].removeprefix("docs.txt:"))
        paragraphs[offset] = paragraphs.get(offset, "") + row["text"]
    for offset, paragraph in paragraphs.items():  # the tokens' texts are what stands in the file
        assert text[offset : offset + len(paragraph)] == paragraph


def test_entropy_and_surprisal_are_the_librarys(exact: tuple[Stored, str], gpt2: str) -> None:  # noqa: F811
    stored, text = exact
    model = jobs.library_model(gpt2)
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    entropy, surprisal = [], []
    for _, ids, window, at, t in expected_positions(text):
        if (key := tuple(window)) not in seen:
            seen[key] = jobs.log_probs(model, window)
        log_p = seen[key][at]
        entropy.append(float(-(log_p.exp() * log_p).sum()))
        surprisal.append(-float(log_p[ids[t + 1]]) if t + 1 < len(ids) else None)
    rows = stored.rows(1)
    np.testing.assert_allclose([r["entropy"] for r in rows], entropy, rtol=POSITION)
    assert {r["kept_mass"] for r in rows} == {1.0}
    known = [i for i, value in enumerate(surprisal) if value is not None and rows[i]["surprisal"] is not None]
    np.testing.assert_allclose([rows[i]["surprisal"] for i in known], [surprisal[i] for i in known], rtol=POSITION)
    unknown = [i for i, row in enumerate(rows) if row["surprisal"] is None]
    assert unknown == [i for i, value in enumerate(surprisal) if value is None]  # only where a document ends


def test_matrices_are_those_of_score_factors(exact: tuple[Stored, str], gpt2: str) -> None:  # noqa: F811
    """Means and table against the engine in float64, one window at a time."""
    stored, text = exact
    model = SplitModel.from_pretrained(gpt2, dtype="float64", check=False)
    factors: dict[int, list[np.ndarray]] = {layer: [] for layer in ALL_LAYERS}
    streams: dict[int, list[np.ndarray]] = {layer: [] for layer in ALL_LAYERS}
    for _, ids in tokens_of(text):
        for first, new, end in jobs.token_windows(len(ids), MAX_POSITIONS, STRIDE):
            window = torch.tensor([[0, *ids[first:end]]])
            at = [t - first + 1 for t in range(new, end)]
            scores = score_factors(model, window, layers=list(ALL_LAYERS), estimator=Exact(), positions=at)
            for layer in ALL_LAYERS:
                factors[layer].append(scores.factors[layer].double().numpy())
                streams[layer].append(scores.activations[layer][:, 0].double().numpy())
    for layer in ALL_LAYERS:
        g, h = np.concatenate(factors[layer]), np.concatenate(streams[layer])
        f = np.einsum("nri,nrj->nij", g, g)
        trace = f.trace(axis1=1, axis2=2)
        close(stored.reduced(layer), f.mean(0))
        close(stored.reduced(layer, "normalised_fisher"), (f / trace[:, None, None]).mean(0))
        close(stored.reduced(layer, "activation_mean"), h.mean(0))
        close(stored.reduced(layer, "activation_second_moment"), h.T @ h / len(h))
        close(stored.reduced(layer, "eigenvalues"), np.linalg.eigvalsh(f.mean(0))[::-1])
        top = stored.reduced(layer, "eigenvectors")[:, 0]
        assert top @ f.mean(0) @ top == pytest.approx(np.linalg.eigvalsh(f.mean(0))[-1], rel=1e-4)

        rows = stored.rows(layer)
        eigenvalues = np.linalg.eigvalsh(f)[:, ::-1]
        share = eigenvalues.clip(1e-30) / eigenvalues.sum(1, keepdims=True)
        for name, truth in {
            "trace": trace,
            "participation_ratio": eigenvalues.sum(1) ** 2 / (eigenvalues**2).sum(1),
            "entropy_rank": np.exp(-(share * np.log(share)).sum(1)),
        }.items():
            np.testing.assert_allclose([r[name] for r in rows], truth, rtol=POSITION, err_msg=name)
        got = np.array([r["top_eigenvalues"] for r in rows])
        assert (abs(got - eigenvalues[:, : got.shape[1]]) <= POSITION * eigenvalues[:, :1]).all()
        for row, s in zip(rows, share.cumsum(1), strict=True):
            reached = s[int(row["trace_rank_99"]) - 1], s[int(row["trace_rank_99"]) - 2] * (row["trace_rank_99"] > 1)
            assert reached[0] >= 0.99 - POSITION and reached[1] < 0.99 + POSITION


def test_a_few_positions_by_plain_autograd(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """Down to the definition: every token of the vocabulary, the library's own attention."""
    (tmp_path / "docs.txt").write_text(jobs.some_text(3_000))
    config = jobs.settings(
        gpt2, tmp_path / "docs.txt", tmp_path / "run", estimator="exact", positions="3,-1", save="matrices", max_docs=6
    )
    stored, _ = jobs.run_here(config)
    model = SplitModel.from_pretrained(gpt2, dtype="float64", check=False)
    rows = iter(range(1000))
    for _, ids in tokens_of(jobs.some_text(3_000))[:6]:
        for t in sorted({t for t in (3, len(ids) - 1) if t < len(ids)}):
            first, _, end = next(w for w in jobs.token_windows(len(ids), MAX_POSITIONS, STRIDE) if w[1] <= t < w[2])
            truth = oracles.one_position(model, torch.tensor([0, *ids[first:end]]), t - first + 1, list(ALL_LAYERS))
            row = next(rows)
            for layer in ALL_LAYERS:
                assert stored.rows(layer)[row]["position"] == t
                close(stored.saved("matrices", layer)[row], truth.matrix(layer).numpy(), POSITION)
    assert next(rows) == stored.counts()["scored"]


# ---- the same bits, whatever happens -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.txt"
    path.write_text(jobs.some_text(30_000))
    return path


@pytest.fixture(scope="module")
def undisturbed(gpt2: str, corpus: Path, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Stored:  # noqa: F811
    """One actor, from beginning to end."""
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)
        assert fisher_ray("--model", gpt2, "--corpus", corpus, "--output", output, "--max-actors", 1) == 0
    stored = Stored(output)
    assert len(stored.receipts) >= 9
    return stored


@pytest.fixture
def flags(gpt2: str, corpus: Path, tmp_path: Path) -> list[Any]:  # noqa: F811
    return ["--model", gpt2, "--corpus", corpus, "--output", tmp_path / "run"]


def copy(run: Stored, folder: Path) -> Stored:
    shutil.copytree(run.folder, folder)
    return Stored(folder)


def test_two_actors(flags: list[Any], undisturbed: Stored, small_tasks: None, tmp_path: Path) -> None:
    assert fisher_ray(*flags, "--max-actors", 2) == 0
    stored = Stored(tmp_path / "run")
    assert stored.bits() == undisturbed.bits()
    assert stored.table.equals(undisturbed.table)


def test_more_actors_than_the_cluster_has_room_for(flags: list[Any], small_tasks: None, tmp_path: Path) -> None:
    """Those that never start must not be handed tasks: the run would wait for ever."""
    more = ("--max-actors", "9", "--cpus-per-actor", "4", "--max-docs", "40")
    process = jobs.command("run", *map(str, flags), *more, task_bytes=500, RAY_ADDRESS=jobs.address())
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert Stored(tmp_path / "run").counts()["documents"] == 40


def test_tasks_backwards_without_ray(
    gpt2: str,  # noqa: F811
    corpus: Path,
    undisturbed: Stored,
    small_tasks: None,
    tmp_path: Path,
) -> None:
    forwards = plan_module.Tasks.__iter__

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module.Tasks, "__iter__", lambda tasks: reversed(list(forwards(tasks))))
        stored, _ = jobs.run_here(jobs.settings(gpt2, corpus, tmp_path / "run"))
    assert stored.bits() == undisturbed.bits()
    assert stored.table.equals(undisturbed.table)


def test_only_what_is_missing_is_computed_again(
    flags: list[Any], undisturbed: Stored, small_tasks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = copy(undisturbed, tmp_path / "run")
    missing = {1, 4, len(stored.receipts) - 1}
    for task in missing:
        (stored.folder / f"done/{task:08d}.json").unlink()
    shutil.rmtree(stored.folder / "reduced")
    assert fisher_ray(*flags, "--max-actors", 1) == 0
    assert f"{len(stored.receipts) - 3} of {len(stored.receipts)} tasks were done before" in capsys.readouterr().out
    after = Stored(stored.folder)
    for before, now in zip(undisturbed.receipts, after.receipts, strict=True):
        assert (before == now) == (int(now["name"]) not in missing)
    assert after.bits() == undisturbed.bits()
    assert after.table.equals(undisturbed.table)
    assert len(list(after.folder.glob("sums/*"))) == len(after.receipts) + len(missing)  # nothing else was computed


def test_a_damaged_shard_is_never_averaged_in(
    flags: list[Any], undisturbed: Stored, small_tasks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = copy(undisturbed, tmp_path / "run")
    damaged = stored.folder / stored.receipts[2]["files"]["sums_1"]["path"]
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    shutil.rmtree(stored.folder / "reduced")
    assert fisher_ray(*flags, "--max-actors", 1) == 0
    assert "1 of them damaged and computed again" in capsys.readouterr().out
    assert Stored(stored.folder).bits() == undisturbed.bits()


def test_other_settings_in_the_same_directory(
    flags: list[Any], undisturbed: Stored, small_tasks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = copy(undisturbed, tmp_path / "run")
    files = sorted(path for path in stored.folder.rglob("*") if path.is_file())
    assert fisher_ray(*flags, "--num-samples", 4, "--seed", 3) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and "num_samples was 8, is 4" in line and "seed was 0, is 3" in line
    assert sorted(path for path in stored.folder.rglob("*") if path.is_file()) == files
    description = stored.folder / "run.json"
    rewrite(description, schema="run.3")
    before = description.read_bytes()
    assert fisher_ray(*flags) == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a run in format 'run.3', and this version writes 'run.5'" in line
    assert description.read_bytes() == before


def when_done(folder: Path, tasks: int, act: Callable[[], None], timeout: float = 120) -> threading.Thread:
    """Act as soon as so many tasks are done."""

    def watch() -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if len(list(folder.glob("done/[0-9]*.json"))) >= tasks:
                return act()
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_workers_killed(flags: list[Any], undisturbed: Stored, small_tasks: None, tmp_path: Path) -> None:
    """SIGKILL, as the kernel does when memory runs out."""
    killed = []

    def kill() -> None:
        for pid in jobs.descendants(os.getpid()):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Actor"):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    watcher = when_done(tmp_path / "run", 2, kill)
    assert fisher_ray(*flags, "--max-actors", 2) == 0
    watcher.join()
    assert killed
    assert Stored(tmp_path / "run").bits() == undisturbed.bits()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_driver_stopped(
    number: int, flags: list[Any], undisturbed: Stored, small_tasks: None, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ctrl-C where the command has started Ray itself; killed where it had joined a cluster that goes on."""
    ray_given = {"RAY_ADDRESS": jobs.address()} if number == signal.SIGKILL else {}
    process = jobs.command("run", *map(str, flags), "--max-actors", "1", task_bytes=TASK_BYTES, **ray_given)
    watcher = when_done(tmp_path / "run", 2, lambda: process.send_signal(number))
    _, err = process.communicate(timeout=120)
    watcher.join()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number], err
    if number == signal.SIGINT:
        assert "stopped" in err and "Traceback" not in err
    kept = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/done").glob("[0-9]*.json"))]
    assert 2 <= len(kept) < len(undisturbed.receipts)
    assert not (tmp_path / "run/reduced/summary.parquet").exists()
    capsys.readouterr()
    assert fisher_ray(*flags, "--max-actors", 1) == 0
    assert "tasks were done before" in capsys.readouterr().out
    stored = Stored(tmp_path / "run")
    assert all(receipt in stored.receipts for receipt in kept)
    assert stored.bits() == undisturbed.bits()


class OfRay(LocalPool):
    """A pool that takes SIGTERM over when it is opened, as Ray does, and is told to stop at one moment."""

    when = ""

    def __enter__(self) -> LocalPool:
        if self.when == "opening":
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        return self

    def __exit__(self, *_: object) -> None:
        if self.when == "closing":
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("when", "code"), [("opening", 130), ("closing", 0)])
def test_a_stop_while_the_pool_is_opened_or_closed(
    when: str, code: int, gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Is heard, and does not end the process from within Ray, with a code of its own and nothing said."""
    monkeypatch.setattr(cli, "LocalPool", OfRay)
    monkeypatch.setattr(OfRay, "when", when)
    (tmp_path / "docs.txt").write_text("one\n\ntwo\n")
    before = signal.getsignal(signal.SIGTERM)
    flags = ("--model", gpt2, "--corpus", tmp_path / "docs.txt", "--output", tmp_path / "run", "--executor", "local")
    assert fisher_ray(*flags) == code
    assert ("stopped" in capsys.readouterr().err) == (code == 130)
    assert signal.getsignal(signal.SIGTERM) is before
    assert fisher_ray(*flags) == (0 if when == "closing" else 130)


def test_a_second_signal_gives_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    with driver._Stop() as stop:
        assert stop.seconds() is None
        os.kill(os.getpid(), signal.SIGTERM)
        first = stop.seconds()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        second = stop.seconds()
    assert first is not None and second is not None
    assert 53 < first <= 54 and second <= first - 0.2


def test_paths_are_the_drivers(
    gpt2: str, undisturbed: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Ray's workers stand in another folder than a driver that has joined a running cluster, and its metrics take ASCII."""
    shutil.copytree(gpt2, tmp_path / "model")
    (tmp_path / "docs.txt").write_text("one\n\ntwo\n")
    monkeypatch.chdir(tmp_path)
    assert fisher_ray("--model", "model", "--corpus", "docs.txt", "--output", "übung λ", "--max-actors", 1) == 0
    assert Stored(tmp_path / "übung λ").counts()["documents"] == 2


@pytest.mark.parametrize(
    ("output", "tag"),
    [
        ("übung λ", "%C3%BCbung %CE%BB"),
        ("s3://a/b_c-d.e [1]~100%'\"", "s3://a/b_c-d.e [1]~100%'\""),
        ("\t🦊", "%09%F0%9F%A6%8A"),
    ],
)
def test_metrics_name_a_run_in_ascii(output: str, tag: str) -> None:
    plan = SimpleNamespace(config=SimpleNamespace(output=output))
    assert cluster_module._tags(plan) == {"run": tag}  # type: ignore[arg-type]


def test_what_is_left_to_look_at(undisturbed: Stored) -> None:
    """Names and numbers of the summary, without the package."""
    summary = pq.read_table(undisturbed.folder / "reduced/summary.parquet").to_pylist()
    counts = undisturbed.counts()
    assert [row["layer"] for row in summary] == list(ALL_LAYERS)
    for row in summary:
        fisher, eigenvalues = (undisturbed.reduced(row["layer"], name) for name in ("fisher", "eigenvalues"))
        assert row["positions"] == counts["scored"]
        assert row["trace"] == pytest.approx(fisher.trace()) and row["top_eigenvalue"] == pytest.approx(eigenvalues[0])
        assert len(row["raised"]) <= 5 and len(row["lowered"]) <= 5
        assert (fisher == fisher.T).all()
        traces = [r["trace"] for r in undisturbed.rows(row["layer"])]
        assert np.mean(traces) == pytest.approx(row["trace"], rel=1e-4)
    moved = pq.read_table(undisturbed.folder / "reduced/directions.parquet").to_pylist()
    assert [(row["layer"], row["direction"]) for row in moved] == [(k, i) for k in ALL_LAYERS for i in range(4)]
    for row in moved:
        assert row["eigenvalue"] == undisturbed.reduced(row["layer"], "eigenvalues")[row["direction"]]
    assert [row["raised"] for row in moved if row["direction"] == 0] == [row["raised"] for row in summary]
    assert (undisturbed.folder / "reduced/spectra.png").read_bytes().startswith(b"\x89PNG")
    assert undisturbed.description["config"]["num_samples"] == 8
