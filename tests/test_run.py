"""The reader against the files themselves: finished, unfinished, grouped and damaged runs, on disks and elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

import jobs
from fisher_ray import cost, driver, inspection, open_run, reduce
from fisher_ray import run as run_module
from fisher_ray.run import Run
from fisher_ray.statistics import spectrum
from fisher_ray.storage import DamagedError, StorageError, seal
from jobs import D_MODEL, LAYERS, Stored, gpt2  # noqa: F401

ALL = list(range(LAYERS + 1))


@pytest.fixture(scope="module")
def made(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A complete run whose tree has a level, by position bucket, with the factors of every position."""
    folder = tmp_path_factory.mktemp("read")
    (folder / "docs.txt").write_text(jobs.some_text(12_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", 300)
        patch.setattr(reduce, "FAN_IN", 8)
        config = jobs.settings(
            gpt2, folder / "docs.txt", folder / "run", group_by="position", save="factors", num_samples=2
        )
        _, outcome = jobs.run_here(config)
    assert outcome.tasks > 16  # so that blocks are sums of several
    return folder / "run"


@pytest.fixture
def run(made: Path) -> Run:
    return open_run(made)


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def undo(folder: Path, keep: int) -> None:
    """The run as it was when so many tasks were done."""
    shutil.rmtree(folder / "reduced")
    shutil.rmtree(folder / "tree")
    for receipt in sorted((folder / "done").iterdir())[keep:]:
        receipt.unlink()


def fisher_of(stored: Stored, layer: int) -> np.ndarray:
    """The mean of G^T G over all kept factors."""
    factors = stored.saved("factors", layer).astype(np.float64)
    return np.einsum("nri,nrj->ij", factors, factors) / len(factors)


# ---- what is there -----------------------------------------------------------------------------------------------------


def test_a_complete_run(run: Run, made: Path) -> None:
    stored = Stored(made)
    assert run.complete and run.status == f"complete, {run.tasks} of {run.tasks} tasks" and run.done == run.tasks
    assert run.layers == ALL and run.d_model == D_MODEL
    assert run.config.num_samples == 2 and run.config.group_by == "position"
    assert "unbiased" in run.estimand
    assert vars(run.counts) == stored.counts()
    assert run.groups == sorted({"0", "1"} | {f"{2**k}-{2 ** (k + 1) - 1}" for k in range(1, len(run.groups) - 1)})
    assert {row["layer"] for row in run.summary} == set(ALL)
    assert [worker["device"] for worker in run.provenance] == ["cpu"]


def test_the_summary_has_the_errors_of_traces(made: Path) -> None:
    """Those that the sums of the blocks give, of all positions and of each group."""
    run = open_run(made)
    assert {row["group"] for row in run.summary} == {None, *run.groups}
    for row in run.summary:
        blocks = run.blocks(row["layer"], row["group"])
        trace = spectrum(blocks).trace
        assert row["blocks"] == trace.blocks == len(blocks)
        assert row["trace"] == pytest.approx(float(trace.value), rel=1e-9)
        error = None if np.isnan(trace.error) else pytest.approx(float(trace.error), rel=1e-6)
        assert row["trace_error"] == error


@pytest.mark.parametrize("layer", ALL)
def test_means_are_those_of_the_positions(run: Run, made: Path, layer: int) -> None:
    stored = Stored(made)
    fisher = run.fisher(layer)
    assert isinstance(fisher, np.memmap) and fisher.dtype == np.float64
    np.testing.assert_array_equal(fisher, stored.reduced(layer))
    np.testing.assert_allclose(fisher, fisher_of(stored, layer), rtol=1e-4, atol=1e-6 * abs(fisher).max())
    np.testing.assert_array_equal(run.fisher(layer, normalised=True), stored.reduced(layer, "normalised_fisher"))
    mean, covariance = run.activation(layer)
    second = stored.reduced(layer, "activation_second_moment")
    np.testing.assert_allclose(mean, stored.reduced(layer, "activation_mean"), rtol=1e-12)
    np.testing.assert_allclose(covariance, second - np.outer(mean, mean), rtol=1e-9, atol=1e-12)
    assert run.count(layer) == len(stored.rows(layer))


def test_groups_have_means_of_their_own(run: Run, made: Path) -> None:
    assert run.count(1, "2-3") == sum(row["position"] in (2, 3) for row in Stored(made).rows(1))
    np.testing.assert_array_equal(run.fisher(1, "2-3"), np.load(made / "reduced/layer_001/group_2-3/fisher.npy"))
    assert sum(run.count(1, group) for group in run.groups) == run.count(1)


def test_spectra_are_those_of_the_means(run: Run, made: Path) -> None:
    stored = Stored(made)
    for whitened, name in ((False, "eigenvalues"), (True, "whitened_eigenvalues")):
        got = run.spectrum(2, whitened=whitened)
        truth = stored.reduced(2, name)
        np.testing.assert_allclose(got.eigenvalues.value, truth, rtol=1e-6, atol=1e-9 * truth[0])
        assert got.eigenvalues.blocks == 8
        assert (got.eigenvalues.error[:3] > 0).all()


def test_blocks_share_no_document_and_miss_none(run: Run, made: Path) -> None:
    blocks = run.blocks(0)
    assert len(blocks) == 8
    assert sum(block.count for block in blocks.sums) == run.count(0)
    np.testing.assert_allclose(blocks.mean("fisher").numpy(), run.fisher(0), rtol=1e-12)
    described = json.loads((made / "reduced/manifest.json").read_text())["blocks"]
    documents: set[str] = set()
    for block in described:
        mine: set[str] = set()
        for receipt in Stored(made).receipts[block["first"] : block["last"]]:
            if "positions" in receipt["files"]:
                mine |= set(ds.dataset(made / receipt["files"]["positions"]["path"]).to_table()["document"].to_pylist())
        assert mine and not mine & documents
        documents |= mine


# ---- unfinished runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 5, 30])
def test_an_unfinished_run_is_read_as_far_as_it_is(copied: Path, keep: int) -> None:
    undo(copied, keep)
    run, stored = open_run(copied), Stored(copied)
    assert not run.complete and run.status.startswith(f"unfinished: {keep} of {run.tasks} tasks")
    assert run.summary == []
    assert vars(run.counts) == stored.counts()
    np.testing.assert_allclose(run.fisher(1), fisher_of(stored, 1), rtol=1e-4, atol=1e-6 * run.fisher(1).max())
    assert len(run.blocks(1)) == sum("positions" in receipt["files"] for receipt in stored.receipts)
    assert run.positions().count_rows() == len(stored.table)
    assert sum(run.count(1, group) for group in run.groups) == run.count(1)
    assert np.trace(run.fisher(1, normalised=True)) == pytest.approx(1, rel=1e-5)


def test_a_run_that_has_done_nothing_yet(copied: Path) -> None:
    undo(copied, 0)
    run = open_run(copied)
    assert run.done == 0 and run.groups == [] and run.positions().count_rows() == 0
    with pytest.raises(ValueError, match=r"no position .* is scored yet at layer 1"):
        run.fisher(1)


def test_a_reduction_of_fewer_tasks_than_are_done_is_not_taken_for_one_of_all(copied: Path) -> None:
    sorted((copied / "done").iterdir())[3].unlink()
    run = open_run(copied)
    assert not run.complete and run.done == run.tasks - 1


def test_without_a_sound_manifest_the_sums_of_tasks_serve(copied: Path, made: Path) -> None:
    manifest = copied / "reduced/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    run = open_run(copied)
    assert not run.complete and run.status.startswith(f"unfinished: {run.tasks} of {run.tasks} tasks")
    np.testing.assert_allclose(run.fisher(1), open_run(made).fisher(1), rtol=1e-12)


# ---- positions ---------------------------------------------------------------------------------------------------------


def test_positions_are_read_through_filters(run: Run, made: Path) -> None:
    got = run.positions().to_table(["document", "trace"], ds.field("layer") == 2)
    truth = [row for row in Stored(made).table.to_pylist() if row["layer"] == 2]
    assert got.column_names == ["document", "trace"]
    assert got["trace"].to_pylist() == [row["trace"] for row in truth]


def test_attempts_that_no_receipt_names_are_not_read(copied: Path) -> None:
    rows = open_run(copied).positions().count_rows()
    shutil.copy(next((copied / "positions").iterdir()), copied / "positions/00000000-deadbeef.parquet")
    assert open_run(copied).positions().count_rows() == rows


def test_factors_and_matrices_come_with_their_rows(run: Run, made: Path) -> None:
    stored = Stored(made)
    rows, factors = 0, stored.saved("factors", 1)
    for shard, matrices in zip(run.factors(1), run.matrices(1), strict=True):
        n = len(shard.table)
        np.testing.assert_array_equal(shard.array, factors[rows : rows + n])
        np.testing.assert_allclose(matrices.array, shard.array.swapaxes(1, 2) @ shard.array, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(shard.table["trace"], (shard.array**2).sum((1, 2)), rtol=1e-4)
        assert set(shard.table["layer"].to_pylist()) == {1}
        rows += n
    assert rows == len(factors)


def test_one_positions_matrix_is_found_by_its_name(run: Run, made: Path) -> None:
    stored = Stored(made)
    rows, factors = stored.rows(2), stored.saved("factors", 2).astype(np.float64)
    for i in (0, len(rows) // 2, len(rows) - 1):
        got = run.matrix(2, rows[i]["document"], rows[i]["position"])
        np.testing.assert_allclose(got, factors[i].T @ factors[i], rtol=1e-12)
    with pytest.raises(ValueError, match=r"no scored position 999 in a document 'docs.txt:0'"):
        run.matrix(2, "docs.txt:0", 999)


def test_one_positions_matrix_costs_no_others(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a task of thousands the squares of all would be gigabytes; and its task is looked up once for all layers."""
    row = Stored(made).rows(2)[0]
    squared, looked = run_module._squared, []
    monkeypatch.setattr(run_module, "_squared", lambda rows: (looked.append(len(rows)), squared(rows))[1])
    task_of = Run.task_of
    monkeypatch.setattr(Run, "task_of", lambda self, name: (looked.append(name), task_of(self, name))[1])
    inspection.one_position(run, row["document"], row["position"])
    assert looked == [row["document"], *[1] * len(run.layers)]


def test_what_was_not_kept_is_said(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "docs.txt").write_text(jobs.some_text(600))
    jobs.run_here(jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "run", layers="1"))
    run = open_run(tmp_path / "run")
    for read in (run.factors, run.matrices):
        with pytest.raises(ValueError, match=r"keeps no .* --save summary"):
            read(1)
    with pytest.raises(ValueError, match=r"layer must be one of \[1\], got 0"):
        run.fisher(0)
    with pytest.raises(ValueError, match=r"no group 'de' .* without --group-by"):
        run.fisher(1, "de")


def test_a_run_in_memory_reads_the_same(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    """As on any storage that is no disk."""
    (tmp_path / "docs.txt").write_text(jobs.some_text(600))
    _, outcome = jobs.run_here(jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "run"))
    elsewhere = "memory://reader/run"
    config = jobs.settings(gpt2, tmp_path / "docs.txt", elsewhere, executor="local")
    there = driver.run(config)
    here, far = open_run(tmp_path / "run"), open_run(elsewhere)
    assert not isinstance(far.fisher(1), np.memmap)
    np.testing.assert_array_equal(far.fisher(1), here.fisher(1))
    assert far.positions().to_table().equals(here.positions().to_table())
    assert there.counts == outcome.counts


# ---- what is not as it should be ---------------------------------------------------------------------------------------


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no run"):
        open_run(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds no run of ours"):
        open_run(tmp_path / "other")


def rewrite(path: Path, **changed: Any) -> None:
    values = json.loads(path.read_text())
    del values["sha256"]
    path.write_bytes(seal({**values, **changed}))


def test_a_run_of_a_newer_format(copied: Path) -> None:
    rewrite(copied / "run.json", schema="run.99")
    with pytest.raises(StorageError, match=r"format 'run.99', and this version reads 'run.5'"):
        open_run(copied)


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("reduced/layer_001/fisher.npy", lambda run: run.fisher(1)),
        ("reduced/summary.parquet", lambda run: run.summary),
        ("tree/*/layer_001.npz", lambda run: run.blocks(1)),
        ("factors/*/layer_001.npy", lambda run: list(run.factors(1))),
    ],
)
def test_damage_is_found_when_it_is_read_and_the_rest_is_there(copied: Path, path: str, read: Any) -> None:
    victim = next(iter(sorted(copied.glob(path))))
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    run = open_run(copied)
    with pytest.raises(DamagedError, match="is damaged"):
        read(run)
    assert run.fisher(2).shape == (D_MODEL, D_MODEL)
