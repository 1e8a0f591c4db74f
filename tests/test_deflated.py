"""The deflated estimator, and exact matrices to a tolerance: against the sum over the vocabulary and its eigenvectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import Models
from test_head import LIKELY, head, moments, truth
from torch import Tensor

import jobs
from fisher_ray import Deflated, Exact, cli, estimators, open_run, score_factors, spectrum
from fisher_ray.draws import Draws, sequence_key
from fisher_ray.head import Head
from jobs import gpt2  # noqa: F401

MATRICES = 1e-10
FLOAT32 = 2e-5
# Standard errors; a |z| this large comes once in 15,000 entries, and seeds are fixed.
Z = 4.0

VARIANTS = ["plain", "bias", "scale", "softcap", "everything"]
# All tokens among those deflated, fewer tokens than dimensions, and more tokens than are deflated.
SHAPES = [(50, 12), (9, 12), (700, 12)]

ESTIMATORS = [Deflated(3, 5), Deflated(4, 0), Deflated(0, 6), Exact(0.1)]


def draws(n: int, key: int = 0) -> Draws:
    """Of n sequences, at their position 0."""
    keys = torch.tensor([sequence_key(key, i) for i in range(n)])
    return Draws(keys, torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long), "score")


def states(d_z: int, n: int = 3) -> Tensor:
    return torch.randn(n, d_z, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2


def peaked(head_: Head, top: float) -> Tensor:
    """z [1, d_z] at which the token LIKELY has about this probability."""
    row = head_.weight[LIKELY].double()
    direction = row / row.norm()
    steps = torch.linspace(0.0, 400.0, 4001, dtype=torch.float64)[:, None] * direction
    reached = top_prob(head_, steps)
    return steps[int((reached - top).abs().argmin())][None].to(head_.weight.dtype)


def top_prob(head_: Head, z: Tensor) -> Tensor:
    return (z.double() @ head_.weight.double().T).softmax(-1)[:, LIKELY]


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The rank-r part of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    top = vectors[..., -rank:]
    return top @ (values[..., -rank:, None] * top.mT)


def longest_part(log_prob: Tensor, scores: Tensor, count: int = 128) -> Tensor:
    """sum p c c^T over the tokens that give most to the trace."""
    parts = []
    for p, c in zip(log_prob.exp(), scores, strict=True):
        chosen = (p * c.square().sum(-1)).argsort(descending=True)[:count]
        parts.append(oracles.fisher(p[chosen], c[chosen]))
    return torch.stack(parts)


# ---- the part that is not drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("vocab_size", "d_z"), SHAPES)
def test_energies_are_what_each_token_gives_to_the_trace(variant: str, vocab_size: int, d_z: int):
    head_ = head(variant, vocab_size, d_z)
    log_prob, scores = truth(head_, states(d_z))
    energies = head_.predict(states(d_z)).energies()
    torch.testing.assert_close(energies, log_prob.exp() * scores.square().sum(-1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("vocab_size", "d_z"), SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_without_samples_it_is_the_leading_part(variant: str, vocab_size: int, d_z: int, rank: int):
    """Of the part of M that the 128 tokens have that give most to its trace; a lower bound of all of M."""
    head_ = head(variant, vocab_size, d_z)
    z = states(d_z)
    log_prob, scores = truth(head_, z)
    matrix = moments(log_prob, scores)
    rows, kept, captured = Deflated(rank, 0).cotangents(head_.predict(z), draws(3))
    assert rows.shape == (3, min(rank, vocab_size, d_z), d_z)
    got = rows.mT @ rows
    assert oracles.error(got, leading(longest_part(log_prob, scores), rank)) < MATRICES
    assert torch.linalg.eigvalsh(matrix - got).min() > -1e-12 * matrix.diagonal(dim1=1, dim2=2).sum(1).max()
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(captured, got.diagonal(dim1=1, dim2=2).sum(1) / trace, rtol=1e-9, atol=0)
    assert (kept == 1).all()


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("top", [None, 0.999999])
def test_any_orthonormal_basis_will_do(rank: int, top: float | None, monkeypatch: pytest.MonkeyPatch):
    """As a GPU finds one: the leading part and all that is left of C are C again, also where p is peaked."""
    head_ = head("plain", 700, 12)
    z = states(12) if top is None else peaked(head_, top)
    prediction = head_.predict(z)
    _, longest = prediction.energies().topk(128)
    rows = prediction.weighted_scores(longest)
    whole = rows.mT @ rows
    monkeypatch.setattr(estimators, "leading_vectors", lambda gram, rank: spectrum._orthogonal_iteration(gram, rank))
    found, _, rest = estimators._split_off(rows.clone(), rank)
    assert oracles.error(found.mT @ found + rest.mT @ rest, whole) < 1e-12
    kept, best = (float(m.diagonal(dim1=1, dim2=2).sum()) for m in (found.mT @ found, leading(whole, rank)))
    assert 0.97 * best < kept < (1 + 1e-12) * best


@pytest.mark.parametrize("rank", [64, 160, 192, 256])
def test_ranks_beyond_what_p_has(rank: int, monkeypatch: pytest.MonkeyPatch):
    """Where p is peaked only some columns of a GPU's basis have an eigenvalue above rounding; what is split is whole again."""
    monkeypatch.setattr(
        estimators, "leading_vectors", lambda gram, k: spectrum._orthogonal_iteration(gram.double(), k).to(gram.dtype)
    )
    generator = torch.Generator().manual_seed(0)
    weight, z = torch.randn(2000, 256, generator=generator) / 16, torch.randn(6, 256, generator=generator)
    prediction = Head(weight).predict(z * 12 / (z @ weight.T).std(1, keepdim=True))
    rows = prediction.weighted_scores(prediction.energies().topk(4 * rank)[1])
    leading_, _, rest = (part.double() for part in estimators._split_off(rows.clone(), rank))
    whole = rows.double().mT @ rows.double()
    assert oracles.error(leading_.mT @ leading_ + rest.mT @ rest, whole) < 1e-6
    assert (leading_.square().sum((1, 2)) > 0.98 * rows.double().square().sum((1, 2))).all()


@pytest.mark.parametrize("scale", [1e-18, 1e-22, 1e-30, 0.0])
def test_small_scores_are_split_as_others(scale: float):
    """The squares of those of a token that is all but certain are no float32 numbers."""
    rows = torch.randn(3, 128, 24, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(0, -3, 128)[:, None]
    expected = estimators._split_off(rows.clone(), 4)
    found = estimators._split_off(rows * scale, 4)
    for got, other in zip((found[0], found[2]), (expected[0], expected[2]), strict=True):
        torch.testing.assert_close(got, other * scale, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("vocab_size", "d_z"), SHAPES[:2])
@pytest.mark.parametrize("num_samples", [0, 3])
def test_full_rank_is_exact(variant: str, vocab_size: int, d_z: int, num_samples: int):
    head_ = head(variant, vocab_size, d_z)
    z = states(d_z)
    rows, _, captured = Deflated(100, num_samples).cotangents(head_.predict(z), draws(3))
    assert rows.shape == (3, min(vocab_size, d_z) + num_samples, d_z)
    assert oracles.error(rows.mT @ rows, moments(*truth(head_, z))) < MATRICES
    torch.testing.assert_close(captured, torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", [Deflated(6, 0), Exact(0.1)])
def test_the_sign_of_a_row_is_that_of_the_largest_entry_of_u(estimator: Any):
    """So that factors, and not only matrices, come out alike wherever they are computed."""
    head_ = head("plain", 12, 12)
    log_prob, scores = truth(head_, states(12))
    rows = estimator.cotangents(head_.predict(states(12)), draws(3)).rows[:, :4]
    along = (log_prob.exp().sqrt()[..., None] * scores) @ rows.mT  # U times the squares of the singular values
    largest = along.gather(1, along.abs().argmax(1, keepdim=True))
    assert (largest >= 0).all() and (largest > 0).any(2).all()  # a tolerance ends with rows of zeros


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_position_that_is_not_finite_has_no_eigenvectors(estimator: Any):
    """LAPACK fails on some such matrices, of 12 rows for one, and would take the other positions with it."""
    head_ = head("plain", 12, 12)
    z = states(12)
    expected = estimator.cotangents(head_.predict(z), draws(3)).rows
    z[1] = torch.nan
    got = estimator.cotangents(head_.predict(z), draws(3)).rows
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)


# ---- the drawn terms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "everything"])
@pytest.mark.parametrize(("vocab_size", "d_z"), SHAPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_it_is_unbiased(variant: str, vocab_size: int, d_z: int, rank: int):
    """Entry by entry and in the trace, over 500 keys of 40 terms each."""
    keys, num_samples = 500, 40
    head_ = head(variant, vocab_size, d_z)
    z = states(d_z, 1)
    matrix = moments(*truth(head_, z))[0]
    rows = Deflated(rank, num_samples).cotangents(head_.predict(z.expand(keys, -1)), draws(keys)).rows
    fixed, terms = rows[0, :rank], rows[:, rank:].flatten(0, 1)
    torch.testing.assert_close(rows[:, :rank], fixed.expand(keys, -1, -1), rtol=0, atol=1e-12)
    products = terms[:, :, None] * terms[:, None, :] * num_samples
    rest = matrix - fixed.T @ fixed
    z_scores = (products.mean(0) - rest) / (products.std(0) / len(products) ** 0.5)
    assert z_scores.abs().max() < Z
    assert 0.3 < z_scores.square().mean() < 2.0  # neither hidden nor shrunk
    # Of one length each, whose square is the rest of the trace: the trace has no sampling error at all.
    lengths = products.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, float(rest.trace())), rtol=1e-8, atol=0)


def test_more_samples_leave_less_error():
    """1 / sqrt(S), and far below that of scores drawn from p."""
    head_ = head("plain", 700, 12)
    z = states(12, 1).expand(400, -1)
    matrix = moments(*truth(head_, z[:1]))
    errors = []
    for num_samples in (4, 64):
        rows = Deflated(3, num_samples).cotangents(head_.predict(z), draws(400)).rows
        errors.append(float((rows.mT @ rows - matrix).norm(dim=(1, 2)).square().mean().sqrt()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("top", [0.9, 0.99, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("common", [0.0, 10.0])
@pytest.mark.parametrize("estimator", [Deflated(12, 0), Deflated(12, 4), Exact(1e-6)])
def test_float32_where_p_is_peaked(top: float, common: float, estimator: Any):
    """Rows that share a mean, ten times their own size: where M expanded as a difference would lose its digits."""
    head_ = head("plain", 50, 12, torch.float32, common)
    z = peaked(head_, top)
    assert 1 - float(top_prob(head_, z)) == pytest.approx(1 - top, rel=0.2)
    rows, _, captured = estimator.cotangents(head_.predict(z), draws(1))
    assert rows.dtype == torch.float32
    log_prob, scores = truth(head_, z)
    matrix = moments(log_prob, scores)
    assert oracles.error(rows.double().mT @ rows.double(), matrix) < 20 * FLOAT32
    # The likeliest token's score is nearly zero: what it gives to the trace, as a difference, would be noise.
    given = (log_prob.exp() * scores.square().sum(-1))[0, LIKELY]
    assert float(head_.predict(z).energies()[0, LIKELY]) == pytest.approx(float(given), rel=1e-2)
    assert float(captured) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("estimator", [Deflated(8, 8), Deflated(32, 0), Exact(0.01)], ids=repr)
@pytest.mark.parametrize("spread", [20, 30, 40, 60])
@pytest.mark.parametrize(("vocab_size", "d_z"), [(300, 64), (113, 128)])
def test_logits_of_any_range(vocab_size: int, d_z: int, spread: float, estimator: Any):
    """Among tokens that differ by a hundred nats; LAPACK's float32 solvers did not converge for some positions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, d_z, generator=generator) / d_z**0.5
    z = torch.randn(60, d_z, generator=generator)
    z *= spread / (z @ weight.T).std(1, keepdim=True)
    zeros = torch.zeros(60, dtype=torch.long)
    found = estimator.cotangents(Head(weight).predict(z), Draws(zeros[:, None].expand(60, 2), zeros, zeros, "score"))
    assert found.rows.isfinite().all() and found.captured_share.isfinite().all()


def test_a_distribution_on_one_token_has_no_factors():
    """p is one-hot in float32, and tr M is zero: nothing to draw from and nothing left out."""
    head_ = head("plain", 50, 12, torch.float32)
    z = 1e4 * head_.weight[LIKELY][None]
    for estimator in ESTIMATORS:
        rows, _, captured = estimator.cotangents(head_.predict(z), draws(1))
        assert (rows == 0).all() and captured == 1


# ---- exact to a tolerance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("vocab_size", "d_z"), [*SHAPES, (2500, 6)])
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_a_tolerance_leaves_out_no_more(variant: str, vocab_size: int, d_z: int, tolerance: float):
    head_ = head(variant, vocab_size, d_z)
    z = states(d_z)
    matrix = moments(*truth(head_, z))
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    rows, kept, captured = Exact(tolerance).cotangents(head_.predict(z), draws(3))
    assert rows.shape == (3, min(vocab_size, d_z), d_z)
    assert torch.linalg.eigvalsh(matrix - rows.mT @ rows).min() > -1e-12 * trace.max()
    share = rows.square().sum((1, 2)) / trace
    torch.testing.assert_close(captured, share, rtol=1e-9, atol=0)
    assert (share >= 1 - tolerance).all() and (kept == 1).all()
    for n in range(3):
        ranks = rows[n].norm(dim=-1) > 0
        rank = int(ranks.sum())
        assert ranks[:rank].all()  # zeros come last
        # No rank that is smaller would do, but for the quarter that tokens may leave out.
        values = torch.linalg.eigvalsh(matrix[n]).flip(0)
        least = int((values.cumsum(0) < (1 - tolerance) * trace[n]).sum()) + 1
        most = int((values.cumsum(0) < (1 - 0.75 * tolerance) * trace[n]).sum()) + 1
        assert least <= rank <= most


def test_no_tolerance_is_exact_as_before():
    head_ = head("plain", 50, 12)
    rows, _, captured = Exact().cotangents(head_.predict(states(12)), draws(3))
    assert torch.equal(rows, head_.predict(states(12)).second_moment_factor()) and (captured == 1).all()


def test_only_the_largest_rank_of_a_micro_batch_is_pulled_back(models: Models, monkeypatch: pytest.MonkeyPatch):
    split = models("gpt2")
    batch = oracles.inputs(split, [40] * 8)  # more positions than fill a product: one cotangent a pass
    pulled: list[int] = []
    tape = type(split.own_tape(batch.rows[0][None], {}, [1], (torch.zeros(1).long(), torch.zeros(1).long())))
    pull = tape.pull_each

    def noted(self: Any, groups: Any) -> Any:
        every = list(groups)
        if len(self.z) == 8 * 40:  # and none of the small passes that measure what a graph keeps
            pulled.extend([1] * len(every))
        return pull(self, every)

    monkeypatch.setattr(tape, "pull_each", noted)
    scores = score_factors(split, **batch.padded(["right"], 40), layers=[1], estimator=Exact(0.2))
    ranks = (scores.factors[1] != 0).any(-1).sum(-1)
    assert ranks.min() < ranks.max() < 24
    assert len(pulled) == ranks.max()


# ---- through models --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi", "opt", "cohere", "t5"])
def test_of_a_model(name: str, models: Models):
    """Pulled back: full rank is F, less is a lower bound, and the drawn terms are unbiased."""
    split = models(name)
    batch = oracles.inputs(split, [6])
    given: dict[str, Any] = dict(**batch.padded(["right"], 6), layers=[1], positions=[4])
    matrix = oracles.one_position(split, batch.rows[0], 4, [1], batch.encoder_of(0)).matrix(1)
    full = score_factors(split, **given, estimator=Deflated(24, 0))
    assert oracles.error(full.matrices(1), matrix[None]) < MATRICES
    for estimator in (Deflated(3, 0), Exact(0.2)):
        lower = score_factors(split, **given, estimator=estimator)
        assert torch.linalg.eigvalsh(matrix - lower.matrices(1)[0]).min() > -1e-13 * matrix.trace()
        assert oracles.error(lower.matrices(1), matrix[None]) > 1e-2
        assert 0.1 < float(lower.captured_share) < 0.95
    num_samples = 20_000
    drawn = score_factors(split, **given, estimator=Deflated(3, num_samples)).factors[1][0, 3:] * num_samples**0.5
    fixed = score_factors(split, **given, estimator=Deflated(3, 0)).matrices(1)[0]
    products = drawn[:, :, None] * drawn[:, None, :]
    z_scores = (products.mean(0) + fixed - matrix) / (products.std(0) / num_samples**0.5)
    assert z_scores.abs().max() < Z and 0.3 < z_scores.square().mean() < 2.0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["gpt2", "t5", "mamba"])
def test_padding_budget_and_batch_change_nothing(name: str, estimator: Any, models: Models):
    """Factors themselves: one other token drawn would show as an error of order one."""
    split = models(name, gradients="per_position" if name == "mamba" else "own_position")
    batch = oracles.inputs(split, [12, 4, 7])
    given: dict[str, Any] = {"layers": [0, 2], "seed": 4, "estimator": estimator}
    expected = score_factors(split, **batch.padded(["right"], 12), **given)
    for got in (
        score_factors(split, **batch.padded(["both", "left"], 19), **given),
        score_factors(split, **batch.padded(["right"], 12), **given, memory_budget=1),
    ):
        for layer in (0, 2):
            assert oracles.error(got.factors[layer], expected.factors[layer]) < 1e-6
        torch.testing.assert_close(got.captured_share, expected.captured_share, rtol=1e-8, atol=0)
    some = batch.subset([2])
    got = score_factors(split, **some.padded(["right"], 9), **given)
    here = expected.sequence == 2
    assert oracles.error(got.factors[0], expected.factors[0][here]) < 1e-6
    again = score_factors(split, **batch.padded(["right"], 12), **given)
    assert torch.equal(again.factors[0], expected.factors[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_positions_that_are_not_finite_are_left_out(estimator: Any, models: Models, monkeypatch: pytest.MonkeyPatch):
    """They have no eigenvectors, and cost the others nothing."""
    split = models("gpt2")
    batch = oracles.inputs(split, [6, 5])
    given: dict[str, Any] = dict(**batch.padded(["right"], 6), layers=[1], estimator=estimator)
    expected = score_factors(split, **given)
    predict = Head.predict

    def spoiled(self: Head, z: Tensor) -> Any:
        z = z.clone()
        z[2] = torch.nan
        return predict(self, z)

    monkeypatch.setattr(Head, "predict", spoiled)
    got = score_factors(split, **given)
    assert got.invalid == [(0, 2)]
    keep = torch.arange(11) != 2
    assert oracles.error(got.factors[1], expected.factors[1][keep]) < 1e-12


# ---- as a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.txt"
    path.write_text(jobs.some_text(1000))
    return path


def command(model: str, corpus: Path, output: Path, *flags: str) -> list[str]:
    given = ["run", "--model", model, "--corpus", str(corpus), "--output", str(output), "--layers", "1"]
    return [*given, "--executor", "local", *flags]


def exact_matrices(model: str, corpus: Path, folder: Path) -> np.ndarray:
    flags = ("--estimator", "exact", "--save", "matrices")
    assert cli.main(command(model, corpus, folder / "exact", *flags)) == cli.COMPLETE
    return jobs.Stored(folder / "exact").saved("matrices", 1).astype(np.float64)


RUNS = {
    "deflated": (("--estimator", "deflated", "--rank", "5", "--num-samples", "3"), 8, "deflated, rank 5 and 3 samples"),
    "lower bound": (
        ("--estimator", "deflated", "--rank", "5", "--num-samples", "0"), 5, "deflated, rank 5 and 0 samples",
    ),
    "tolerance": (("--estimator", "exact", "--tolerance", "0.05"), 12, "exact to 0.05 of tr M"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_run(case: str, gpt2: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    flags, rows, words = RUNS[case]
    truths = exact_matrices(gpt2, corpus, tmp_path)
    assert cli.main(command(gpt2, corpus, tmp_path / "run", *flags, "--save", "factors")) == cli.COMPLETE
    stored = jobs.Stored(tmp_path / "run")
    factors = stored.saved("factors", 1).astype(np.float64)
    assert factors.shape == (len(truths), rows, jobs.D_MODEL)
    shares = np.array([row["captured_share"] for row in stored.rows(1)])
    (summary,) = open_run(tmp_path / "run").summary
    assert summary["mean_captured_share"] == pytest.approx(shares.mean(), rel=1e-6)
    assert summary["captured_share"] == 1  # of the sums: they are no sketch
    estimand = stored.description["estimand"]
    if case == "deflated":
        assert "lower bound" not in estimand and "unbiased" in estimand
    else:
        assert "not the Fisher matrix: a lower bound" in estimand
        rest = truths - factors.mT @ factors
        assert np.linalg.eigvalsh(rest).min() > -1e-6 * truths.trace(axis1=1, axis2=2).max()
    assert shares.min() >= (0.95 if case == "tolerance" else 0.2) and shares.max() < 1
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "run")]) == cli.COMPLETE
    said = capsys.readouterr().out
    assert words in said and estimand in said
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "run"), "-o", str(page)]) == cli.COMPLETE
    assert words in page.read_text() and "captured share" in page.read_text()
    capsys.readouterr()
    assert cli.main(["diff", str(tmp_path / "exact"), str(tmp_path / "run")]) == cli.COMPLETE
    # Both estimate F, unless one leaves out a part of it and draws none.
    assert ("different quantities: they differ in lower bound" in capsys.readouterr().out) is (case != "deflated")


def test_deflated_is_what_single_positions_get(gpt2: str, corpus: Path, tmp_path: Path):  # noqa: F811
    def config(**given: Any) -> Any:
        return jobs.settings(gpt2, corpus, tmp_path / "run", **given)

    for save in ("factors", "matrices"):
        assert config(save=save).make_estimator() == Deflated(24, 8)
        assert config(save=save, estimator="sampled").estimator == "sampled"
        assert config(save=save, top_p=0.9).estimator == "sampled"
    plain = config()
    assert plain.estimator == "sampled" and plain.rank is None and plain.tolerance is None
    # The settings that were there before keep a run's fingerprint.
    assert not {"rank", "tolerance"} & set(jobs.run_here(plain)[0].description["result_fields"])


def test_another_estimator_is_another_run(
    gpt2: str,  # noqa: F811
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    flags = ("--estimator", "deflated", "--rank", "4", "--num-samples", "2")
    assert cli.main(command(gpt2, corpus, tmp_path / "run", *flags)) == cli.COMPLETE
    for other, said in (
        (("--estimator", "deflated", "--rank", "5", "--num-samples", "2"), "rank was 4, is 5"),
        (("--num-samples", "2"), "estimator was 'deflated', is 'sampled'"),
    ):
        capsys.readouterr()
        assert cli.main(command(gpt2, corpus, tmp_path / "run", *other)) == cli.REFUSED
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--estimator", "deflated", "--rank", "-1"), "rank and num_samples must be at least 0 and not both 0, got -1 and 8"),
        (("--estimator", "deflated", "--num-samples", "-2"), "must be at least 0 and not both 0, got 24 and -2"),
        (("--estimator", "deflated", "--rank", "0", "--num-samples", "0"), "not both 0, got 0 and 0"),
        (("--estimator", "sampled", "--num-samples", "0"), "num_samples must be at least 1, got 0"),
        (("--estimator", "deflated", "--top-p", "0.5"), "top_p is for estimator sampled, got 0.5 with deflated"),
        (("--estimator", "deflated", "--temperature", "2"), "temperature is for estimator sampled, got 2.0 with deflated"),
        (("--estimator", "exact", "--top-p", "0.5"), "top_p is for estimator sampled, got 0.5 with exact"),
        (("--estimator", "exact", "--temperature", "2"), "temperature is for estimator sampled, got 2.0 with exact"),
        (("--rank", "4"), "rank is for estimator deflated, got 4 with sampled. Leave it out, or ask for --estimator deflated"),
        (("--tolerance", "0.1"), "tolerance is for estimator exact, got 0.1 with sampled"),
        (("--estimator", "exact", "--tolerance", "1"), "tolerance must be a share in [0, 1), got 1.0"),
        (("--estimator", "exact", "--tolerance", "nan"), "tolerance must be a share in [0, 1), got nan"),
        (("--estimator", "most"), "invalid choice: 'most'"),
    ],
)  # fmt: skip
def test_bad_values(
    flags: tuple[str, ...],
    said: str,
    gpt2: str,  # noqa: F811
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    try:
        code = cli.main(command(gpt2, corpus, tmp_path / "run", *flags))
    except SystemExit as ended:  # the parser's own
        code = ended.code
    error = capsys.readouterr().err
    assert code == cli.BAD_INPUT and said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
