"""Eigenvalues and effective dimensions against closed forms and NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fisher_ray.spectrum import (
    _orthogonal_iteration,
    covariance,
    entropy_rank,
    factor_eigenvalues,
    leading_vectors,
    participation_ratio,
    symmetric_eigh,
    trace_rank,
    whitened_eigenvalues,
)
from fisher_ray.sums import ALL, Sums

D = 10
TIGHT = 1e-12

Rank = Callable[[Tensor], Tensor]
RANKS: list[Rank] = [participation_ratio, entropy_rank, lambda eigenvalues: trace_rank(eigenvalues, 1 - 1e-9)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(seed: int) -> Tensor:
    half = normal(D, D, seed=seed)
    return half.T @ half


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 3e5])
def test_k_equal_eigenvalues_have_rank_k(rank: Rank, scale: float) -> None:
    for k in (1, 3, D):
        eigenvalues = torch.zeros(2, D, dtype=torch.float64)
        eigenvalues[:, :k] = scale
        torch.testing.assert_close(rank(eigenvalues).double(), torch.full((2,), float(k), dtype=torch.float64))


def test_ranks_of_a_geometric_spectrum() -> None:
    """l_i = q^i: sums in closed form."""
    q = 0.5
    eigenvalues = q ** torch.arange(200, dtype=torch.float64)
    assert float(participation_ratio(eigenvalues)) == pytest.approx((1 + q) / (1 - q))
    assert float(entropy_rank(eigenvalues)) == pytest.approx(math.exp(-math.log(1 - q) - q / (1 - q) * math.log(q)))
    # The first k hold 1 - q^k: 6 hold 98.4 %, 7 hold 99.2 %.
    assert int(trace_rank(eigenvalues)) == 7 and int(trace_rank(eigenvalues, 0.5)) == 1


@pytest.mark.parametrize("rank", RANKS[:2])
@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-10, 1e30])
def test_ranks_do_not_depend_on_the_scale_in_float32(rank: Rank, scale: float) -> None:
    eigenvalues = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float32)
    torch.testing.assert_close(rank(scale * eigenvalues), rank(eigenvalues), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("num_factors", "width"), [(30, 40), (113, 128), (256, 384), (200, 64)])
def test_eigenvalues_of_rows_of_all_sizes(num_factors: int, width: int) -> None:
    """Rows as of tokens that differ by a hundred nats: LAPACK's float32 solvers raise, or give NaN, on some of them."""
    weight, z = normal(num_factors, width, seed=0) / width**0.5, normal(60, width, seed=1)
    for spread in (25, 40):
        prob = (z * spread / (z @ weight.T).std(1, keepdim=True) @ weight.T).softmax(-1)
        rows = (prob.sqrt()[..., None] * (weight - prob[:, None] @ weight)).float()
        found, expected = factor_eigenvalues(rows), factor_eigenvalues(rows.double())
        assert found.dtype == torch.float32
        assert ((found - expected).abs().amax(-1) <= 1e-5 * expected.amax(-1)).all()


@pytest.mark.parametrize("num_factors", [1, 4, D, 3 * D])
def test_factor_eigenvalues(num_factors: int) -> None:
    """The Gram matrix on whichever side is smaller: fewer factors than dimensions, and more."""
    factors = normal(5, num_factors, D)
    got = factor_eigenvalues(factors)
    assert got.shape == (5, min(num_factors, D))
    for g, eigenvalues in zip(factors.numpy(), got.numpy(), strict=True):
        truth = np.linalg.eigvalsh(g.T @ g)[::-1]
        np.testing.assert_allclose(eigenvalues, truth[: len(eigenvalues)], rtol=TIGHT, atol=TIGHT)
        assert abs(truth[len(eigenvalues) :]).max(initial=0) < TIGHT * truth[0]


def test_factor_eigenvalues_are_never_negative() -> None:
    """Rounding of a singular Gram matrix in float32 would give some below zero, and NaN in the entropy."""
    factors = normal(20, 1, D).float().expand(-1, 6, -1)
    eigenvalues = factor_eigenvalues(factors)
    assert bool((eigenvalues >= 0).all())
    torch.testing.assert_close(entropy_rank(eigenvalues), torch.ones(20), rtol=1e-4, atol=0)


def test_symmetric_eigh() -> None:
    matrix = psd(0)
    values, vectors = symmetric_eigh(matrix)
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, matrix)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(D, dtype=torch.float64))
    assert bool((values.diff() <= 0).all())
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


def test_whitened_eigenvalues() -> None:
    """They are those of Sigma F, here by a general eigensolver."""
    fisher, spread = psd(1), psd(2)
    got = whitened_eigenvalues(fisher, spread)
    truth = np.sort(np.linalg.eigvals((spread @ fisher).numpy()).real)[::-1]
    np.testing.assert_allclose(got.numpy(), truth, rtol=1e-8)


def test_whitened_eigenvalues_do_not_see_coordinates() -> None:
    """h = A h' + b, so F' = A^T F A."""
    h = normal(50, D, seed=4) @ normal(D, D, seed=5) + 3
    fisher, change, shift = psd(6), normal(D, D, seed=7), normal(D, seed=8)
    other = torch.linalg.solve(change, (h - shift).T).T
    got = [
        whitened_eigenvalues(f, x.T.cov(correction=0)) for f, x in [(fisher, h), (change.T @ fisher @ change, other)]
    ]
    torch.testing.assert_close(got[0], got[1], rtol=1e-8, atol=0)
    plain = [torch.linalg.eigvalsh(f) for f in (fisher, change.T @ fisher @ change)]
    assert float((plain[0] / plain[1]).log().abs().max()) > 1  # while those of F itself do change


@pytest.mark.parametrize("moving", [0.0, 0.01])
def test_where_h_does_not_move_there_is_nothing_to_scale_by(moving: float) -> None:
    """Though sums of float32 products say that it does, a little; a hundredth of the mean is a move."""
    sums = Sums([0], D)
    h = (normal(D, seed=9) * 3).float().expand(9000, 1, D).clone()
    h[:, 0, 2] += moving * h[:, 0, 2].abs() * normal(9000, seed=10).float()
    sums.add(0, normal(9000, 1, D, seed=11).float(), h)
    group = sums.packed(0).groups[ALL]
    mean, second_moment = (torch.from_numpy(x) for x in (group.activation / 9000, group.mean("second_moment")))
    assert float((second_moment - torch.outer(mean, mean)).abs().max()) > 0
    truth = torch.zeros(D, D, dtype=torch.float64)
    truth[2, 2] = h[:, 0, 2].double().var(correction=0)
    found = covariance(second_moment, mean)
    torch.testing.assert_close(found, truth, rtol=0.03, atol=0)
    assert bool(moving) == bool(whitened_eigenvalues(psd(12), found).any())


# ---- the leading part on a GPU -----------------------------------------------------------------------------------------


def test_orthogonal_iteration_finds_the_leading_part():
    """Of spectra that fall as those of tokens' scores do; and little less of a trace where eigenvalues are close."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 40, 40, generator=generator, dtype=torch.float64))[0]
    for rate, lost in ((0.3, 1e-8), (0.8, 0.02), (1.0, 1e-12)):
        values = rate ** torch.arange(40, dtype=torch.float64)
        matrix = (basis * values) @ basis.mT
        found = _orthogonal_iteration(matrix, 6)
        assert (found.mT @ found - torch.eye(6)).abs().max() < 1e-12
        captured = (found.mT @ matrix @ found).diagonal(dim1=1, dim2=2).sum(1)
        assert (captured > (1 - lost) * values[:6].sum()).all()
        if rate == 0.3:
            _, expected = symmetric_eigh(matrix)
            assert (found[..., :5] - expected[..., :5]).abs().max() < 1e-3


def test_orthogonal_iteration_of_few_eigenvalues_or_none():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 3, 40, generator=generator, dtype=torch.float64)
    matrix = torch.cat([rows.mT @ rows, torch.zeros(1, 40, 40, dtype=torch.float64)])
    found = _orthogonal_iteration(matrix, 5)
    assert found.isfinite().all()
    part = found @ (found.mT @ matrix)
    assert (part - matrix).norm() < 1e-10 * matrix.norm()
    few = found.mT @ found
    assert (few[0, :3, :3] - torch.eye(3)).abs().max() < 1e-10


def test_a_basis_that_cannot_be_made_orthogonal_is_none(monkeypatch: pytest.MonkeyPatch):
    factor = torch.linalg.cholesky_ex

    def failing(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lower, failed = factor(matrix)
        return lower, failed + torch.tensor([0, 3])

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    rows = torch.randn(2, 60, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _orthogonal_iteration(rows.mT @ rows, 4)
    assert (found[0].mT @ found[0] - torch.eye(4)).abs().max() < 1e-10 and not found[1].any()


def test_small_or_on_a_cpu_eigenvectors_are_solved_for():
    rows = torch.randn(2, 60, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = rows.mT @ rows
    assert torch.equal(leading_vectors(matrix, 4), symmetric_eigh(matrix)[1][..., :4])
