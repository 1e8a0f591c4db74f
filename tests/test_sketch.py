"""Frequent Directions: the bound on random and on real factors, merged in any order, and runs that keep sketches."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import jobs
from fisher_ray import Exact, SplitModel, cost, directions, inspection, iter_scores, open_run, reduce, report
from fisher_ray.cli import main
from fisher_ray.plan import ConfigError, make_plan
from fisher_ray.report_html import html_report
from fisher_ray.run import Run
from fisher_ray.sketch import FrequentDirections, Sketch
from fisher_ray.sums import LayerSums, Sums
from jobs import D_MODEL, LAYERS, gpt2  # noqa: F401

DEMO = Path(__file__).parent.parent / "demo"
ROUNDING = 1e-12  # of the trace: what float64 leaves of sums of a few thousand squares


def decaying(n: int, d: int, power: float, seed: int = 0) -> torch.Tensor:
    """Rows whose covariance has eigenvalues ``i^-power`` in a random basis."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.standard_normal((d, d)))[0]
    spread = np.arange(1, d + 1) ** (-power / 2)
    return torch.from_numpy(random.standard_normal((n, d)) * spread @ basis)


@pytest.fixture(scope="module")
def demo_scores() -> torch.Tensor:
    """Score factors of the demo model in its middle, all rows of all positions."""
    model = SplitModel.from_pretrained(DEMO / "model")
    ids = model.tokenizer((DEMO / "corpus.jsonl").read_text()[:900])["input_ids"]
    window = torch.tensor([[model.tokenizer.bos_token_id, *ids][: model.max_positions]])
    found = [s.factors[3] for s in iter_scores(model, window, layers=[3], estimator=Exact())]
    return torch.cat(found).flatten(0, 1)


def sketch_of(rows: torch.Tensor, limit: int) -> Sketch:
    directions = FrequentDirections(limit, rows.shape[1])
    directions.add(rows)
    return directions.finished()


def assert_bound(sketch: Sketch, rows: torch.Tensor) -> np.ndarray:
    """What the sketch promises, against the sum in full; gives the eigenvalues of the difference."""
    full = rows.double().numpy().T @ rows.double().numpy()
    trace = full.trace()
    lost = np.linalg.eigvalsh(full - sketch.square())
    assert len(sketch.rows) <= sketch.limit
    assert sketch.trace == pytest.approx(trace, rel=1e-12, abs=0)
    assert lost[0] > -ROUNDING * trace
    assert lost[-1] < sketch.shrunk + ROUNDING * trace
    assert sketch.shrunk * (sketch.limit + 1) < trace - sketch.square().trace() + ROUNDING * trace
    tail = np.linalg.eigvalsh(full)[::-1]
    for k in range(sketch.limit + 1):
        assert sketch.shrunk < tail[k:].sum() / (sketch.limit + 1 - k) + ROUNDING * trace
    return lost


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("n", "limit"), [(500, 8), (501, 3), (40, 16), (48, 16), (49, 16), (5, 8)])
def test_the_bound_holds_on_random_rows(n: int, limit: int, power: float) -> None:
    rows = decaying(n, 40, power)
    sketch = sketch_of(rows, limit)
    lost = assert_bound(sketch, rows)
    if n > limit:
        assert lost[-1] > 0.2 * sketch.shrunk > 0  # and it is no idle bound


def test_the_bound_holds_on_real_factors(demo_scores: torch.Tensor) -> None:
    for limit in (4, 16, 40):
        sketch = sketch_of(demo_scores, limit)
        assert_bound(sketch, demo_scores)
    assert sketch.shrunk < 0.2 * np.linalg.eigvalsh(sketch.square())[-1]  # and is of use


@pytest.mark.parametrize("rank", [1, 7, 8])
def test_of_rows_that_span_no_more_than_it_holds_nothing_is_lost(rank: int) -> None:
    rows = decaying(300, 40, 1.0) @ torch.linalg.qr(decaying(40, rank, 0.0)).Q @ decaying(rank, 40, 0.0, seed=1)
    sketch = sketch_of(rows, 8)
    assert sketch.shrunk < ROUNDING * sketch.trace
    np.testing.assert_allclose(sketch.square(), rows.T @ rows, rtol=0, atol=1e-10 * sketch.trace)


def test_rows_of_zeros_and_none_at_all() -> None:
    sketch = sketch_of(torch.zeros(50, 6), 2)
    assert sketch.trace == sketch.shrunk == 0 and not sketch.square().any()
    assert sketch_of(torch.empty(0, 6), 2).square().shape == (6, 6)


def test_batches_change_no_bit() -> None:
    rows = decaying(333, 30, 1.0)
    whole = sketch_of(rows, 7)
    for size in (1, 10, 100):
        directions = FrequentDirections(7, 30)
        for batch in rows.split(size):
            directions.add(batch)
        got = directions.finished()
        assert (got.rows == whole.rows).all() and (got.shrunk, got.trace) == (whole.shrunk, whole.trace)


def test_the_order_of_merging_changes_nothing_beyond_the_bound(demo_scores: torch.Tensor) -> None:
    """Every order and both shapes of four parts, of random and of real rows."""
    for rows in (decaying(400, 40, 1.0), demo_scores[:400], demo_scores[-400:]):
        parts = [sketch_of(part, 10) for part in rows.split(100)]
        merged = []
        for a, b, c, d in itertools.permutations(parts):
            merged += [((a + b) + c) + d, (a + b) + (c + d)]
        for sketch in merged:
            assert_bound(sketch, rows)
            away = np.abs(np.linalg.eigvalsh(sketch.square() - merged[0].square())).max()
            assert away < max(sketch.shrunk, merged[0].shrunk) + ROUNDING * sketch.trace


def test_parts_are_left_as_they_were() -> None:
    one, other = sketch_of(decaying(50, 20, 1.0), 5), sketch_of(decaying(50, 20, 1.0, seed=1), 5)
    before = one.rows.copy(), one.shrunk, one.trace
    _ = one + other
    assert (one.rows == before[0]).all() and (one.shrunk, one.trace) == before[1:]


@pytest.mark.parametrize("num_draws", [1, 3])
def test_sums_of_groups_as_sketches(num_draws: int) -> None:
    """Groups with more positions than rows, with fewer, and with none, there and back through bytes."""
    generator = torch.Generator().manual_seed(0)
    factors, activations = (torch.randn(60, k, 12, generator=generator) for k in (2, num_draws))
    member = torch.tensor([0] * 50 + [2] * 2 + [3] * 8)
    names = ["a", "none", "two", "eight"]
    full, sums = Sums([1], 12, names), Sums([1], 12, names, sketch=5)
    for each in (full, sums):
        each.add(1, factors, activations, member)
    packed = sums.packed(1)
    back = LayerSums.from_bytes(packed.to_bytes())
    assert sorted(back.groups) == ["a", "eight", "two"]
    for name, group in back.groups.items():
        whole = full.packed(1).groups[name]
        assert (group.count, group.traced) == (whole.count, whole.traced)
        np.testing.assert_allclose(group.activation, whole.activation, rtol=1e-12)
        for matrix in ("fisher", "normalised", "second_moment"):
            sketch = getattr(group, matrix)
            assert sketch.limit == 5 and (sketch.rows == getattr(packed.groups[name], matrix).rows).all()
            lost = np.linalg.eigvalsh(whole.square(matrix) - sketch.square())
            room = 1e-6 * sketch.trace  # squares are summed in float32 first
            assert -room < lost[0] and lost[-1] < sketch.shrunk + room
            assert sketch.trace == pytest.approx(whole.square(matrix).trace(), rel=1e-6)
    assert len(back.groups["two"].fisher.rows) == 4 and back.groups["two"].fisher.shrunk == 0
    total = back.total()
    assert total is not None and total.count == 60


# ---- runs --------------------------------------------------------------------------------------------------------------

SKETCH = 4


@pytest.fixture(scope="module")
def runs(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:  # noqa: F811
    """The same run with its sums in full and as sketches, grouped by position."""
    folder = tmp_path_factory.mktemp("sketched")
    (folder / "docs.txt").write_text(jobs.some_text(12_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", 300)
        patch.setattr(reduce, "FAN_IN", 8)
        for sketch in (None, SKETCH):
            config = jobs.settings(
                gpt2, folder / "docs.txt", folder / str(sketch), group_by="position", num_samples=2, sketch=sketch
            )
            jobs.run_here(config)
    return open_run(folder / "None"), open_run(folder / str(SKETCH))


def test_a_run_of_sketches_against_the_same_in_full(runs: tuple[Run, Run]) -> None:
    full, sketched = runs
    assert sketched.complete and sketched.groups == full.groups
    for layer in range(LAYERS + 1):
        for group in (None, *full.groups):
            error, exact = sketched.sketch_error(layer, group), full.fisher(layer, group)
            room = 1e-6 * np.trace(exact)  # the sums of a task are rounded to float32
            lost = np.linalg.eigvalsh(exact - sketched.fisher(layer, group))
            assert -room < lost[0] and lost[-1] < error + room
            assert sketched.count(layer, group) == full.count(layer, group)
            assert sketched.fisher_factors(layer, group).shape[0] <= SKETCH
        assert error > 0.0 or full.count(layer, group) * 2 <= SKETCH
        assert full.sketch_error(layer) == 0
        lost = full.fisher(layer, normalised=True) - sketched.fisher(layer, normalised=True)
        sums = sketched.blocks(layer).total
        assert (
            np.linalg.eigvalsh(lost)[0] > -1e-6 and np.linalg.eigvalsh(lost)[-1] < sums.normalised.shrunk / sums.traced
        )
        mean, covariance = full.activation(layer)
        np.testing.assert_allclose(sketched.activation(layer)[0], mean, rtol=1e-6, atol=1e-9)
        assert np.linalg.eigvalsh(covariance - sketched.activation(layer)[1])[0] > -1e-6 * np.trace(covariance)


def test_the_summary_says_what_a_sketch_has_lost(runs: tuple[Run, Run]) -> None:
    for row, other in zip(runs[1].summary, runs[0].summary, strict=True):
        assert (row["layer"], row["group"], row["positions"]) == (other["layer"], other["group"], other["positions"])
        assert row["trace"] == pytest.approx(other["trace"], rel=1e-6)
        below = other["top_eigenvalue"] - row["top_eigenvalue"]
        assert -1e-6 * row["trace"] < below < row["sketch_error"] + 1e-6 * row["trace"]
        kept = np.trace(runs[1].fisher(row["layer"], row["group"]))
        assert row["captured_share"] == pytest.approx(kept / row["trace"], rel=1e-6)
        assert other["captured_share"] == 1 and other["sketch_error"] == 0
        assert row["captured_share"] + D_MODEL * row["sketch_error"] / row["trace"] > 1 - 1e-6


def test_steps_are_as_long_by_sketches(runs: tuple[Run, Run]) -> None:
    """A tenth of the standard deviation of h, whose trace is exact where its sketch lacks most of it."""
    whole, sketched = (directions.safe_directions(run, 1, share=0.5, documents=1) for run in runs)
    assert sketched.norm == pytest.approx(whole.norm, rel=1e-5)
    assert sketched.random_kl.value > 0


def test_spectra_of_nothing_are_drawn(runs: tuple[Run, Run]) -> None:
    rows = [{**row, "trace": 0.0, "whitened_trace": 0.0} for row in runs[0].summary if row["group"] is None]
    layers = [row["layer"] for row in rows]
    plan: Any = SimpleNamespace(layers=layers, facts=SimpleNamespace(d_model=D_MODEL), config=runs[0].config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "read_array", lambda *_: np.zeros(D_MODEL))
        assert report.spectra_png(plan, runs[0].store, rows).startswith(b"\x89PNG")
    assert inspection._sparkline([0.0, 0.0]) == ""


def test_readers_say_that_sums_are_sketches(runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]) -> None:
    for run, said in zip(runs, (False, True), strict=True):
        assert (f"sums are sketches of {SKETCH} rows: an eigenvalue may be too small" in html_report(run).html) is said
        assert main(["inspect", run.store.uri]) == 0
        told = capsys.readouterr().out
        assert (f"sums are sketches of {SKETCH} rows" in told) is said
        assert ("What is whitened is so by a sketch too: a lower bound" in told) is said
        assert main(["inspect", run.store.uri, "--layer", "1", "--json"]) == 0
        total = run.blocks(1).total  # added up in another order than what is stored, and with a bound of its own
        facts = json.loads(capsys.readouterr().out)
        assert facts["sketch_error"] == pytest.approx(total.fisher.shrunk / total.count)
        held = sum(row["eigenvalue"] for row in facts["directions"])
        assert facts["directions"][-1]["cumulative_share"] == pytest.approx(held / facts["trace"][0])
        assert run.sketch_error(1) == pytest.approx(total.fisher.shrunk / total.count, rel=0.05)


def test_sketches_do_not_know_how_far_off_they_are(runs: tuple[Run, Run], capsys: pytest.CaptureFixture[str]) -> None:
    """Errors would be those of what is left; only the trace of F, and what its eigenvalues are at least, keep theirs."""
    for run, lossy in zip(runs, (False, True), strict=True):
        plain, whitened = run.spectrum(1), run.spectrum(1, whitened=True)
        for name in ("participation_ratio", "entropy_rank", "anisotropy"):
            assert np.isnan(getattr(plain, name).error) == np.isnan(getattr(whitened, name).error) == lossy
        assert np.isnan(whitened.trace.error) == np.isnan(whitened.eigenvalues.error).all() == lossy
        assert plain.trace.error > 0 and plain.eigenvalues.error[0] > 0
    assert main(["diff", runs[0].store.uri, runs[1].store.uri, "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["layers"]:
        assert row["paired"] and row["sketch_errors"][0] == 0 < row["sketch_errors"][1]
        assert row["trace"]["change"] == pytest.approx([0, 0], abs=1e-5 * row["trace"]["values"][0])
        assert row["entropy_rank"]["change"][1] is None and row["whitened_trace"]["change"][1] is None
    for other, said in ((0, False), (1, True)):
        assert main(["diff", runs[0].store.uri, runs[other].store.uri]) == 0
        assert ("note: of sketches" in capsys.readouterr().out) is said


def test_what_is_stored_of_a_sketch_is_what_is_read(runs: tuple[Run, Run]) -> None:
    run = runs[1]
    folder = Path(run.store.uri.removeprefix("file://")) / "reduced/layer_001"
    factors = np.load(folder / "fisher_factors.npy")
    unit = np.load(folder / "normalised_fisher_factors.npy")
    np.testing.assert_array_equal(run.fisher(1, normalised=True), unit.T @ unit)
    values, vectors = np.load(folder / "eigenvalues.npy"), np.load(folder / "eigenvectors.npy")
    np.testing.assert_allclose(vectors * values @ vectors.T, factors.T @ factors, atol=1e-12 * values[0])
    mean, second = np.load(folder / "activation_mean.npy"), np.load(folder / "activation_second_moment_factors.npy")
    sigma = second.T @ second - np.outer(mean, mean)
    whitened = np.load(folder / "whitened_eigenvalues.npy")
    expected = np.sort(np.linalg.eigvals(factors.T @ factors @ sigma).real)[::-1][: len(whitened)]
    np.testing.assert_allclose(whitened, expected.clip(0), atol=1e-10 * whitened[0])
    assert not (folder / "fisher.npy").exists() and not list(folder.glob("group_*"))
    with np.load(folder / "groups.npz") as groups:
        assert groups["groups"].tolist() == run.groups


def test_a_run_of_sketches_that_is_not_finished(runs: tuple[Run, Run], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(runs[1].store.uri.removeprefix("file://"), tmp_path / "run"))
    shutil.rmtree(copied / "reduced")
    shutil.rmtree(copied / "tree")
    run = open_run(copied)
    assert not run.complete and run.groups == runs[1].groups
    error = run.sketch_error(1)
    assert np.abs(np.linalg.eigvalsh(run.fisher(1) - runs[1].fisher(1))).max() < max(error, runs[1].sketch_error(1))
    assert run.fisher_factors(1).shape == (SKETCH, D_MODEL)


def test_the_error_of_a_trace_is_that_of_sums_in_full(runs: tuple[Run, Run]) -> None:
    full, sketched = (run.spectrum(1) for run in runs)
    assert sketched.trace.value == pytest.approx(float(full.trace.value), rel=1e-6)
    assert sketched.trace.error == pytest.approx(float(full.trace.error), rel=1e-3)


def test_a_sketch_that_saves_nothing_is_refused(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "docs.txt").write_text("some text")
    with pytest.raises(ConfigError, match=r"sketch must be below 6, half of d_model, got 6"):
        make_plan(jobs.settings(gpt2, tmp_path / "docs.txt", "run", sketch=6))


def test_factors_of_a_run_in_full_are_refused(runs: tuple[Run, Run]) -> None:
    with pytest.raises(ValueError, match="keeps its sums in full"):
        runs[0].fisher_factors(1)


@pytest.mark.parametrize("sketched", [False, True])
def test_quadratic_forms_are_those_of_the_square(sketched: bool):
    sums = Sums([0], 12, sketch=4 if sketched else None)
    rows = torch.randn(40, 1, 12, generator=torch.Generator().manual_seed(0))
    sums.add(0, rows, rows)
    matrix = sums.packed(0).groups[""].fisher
    vectors = np.random.default_rng(0).normal(size=(12, 3))
    expected = np.einsum("ik,ij,jk->k", vectors, matrix.square(), vectors)
    np.testing.assert_allclose(matrix.quadratic(vectors), expected, rtol=1e-12)
