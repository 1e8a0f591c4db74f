"""Eigenvalues of Fisher matrices and the effective dimensions read off them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The largest matrices that CUDA's solver takes many of at once. Measured on an H200: the eigenvectors of 256 of width 32 take
# 0.4 ms, of width 64 210 ms and of width 128 460 ms.
_SOLVED_TOGETHER = 32
# Numbers of the matrices whose eigenvalues are found at once.
_SOLVED = 1 << 20
# Steps of orthogonal iteration. Measured on the demo's model: with eigenvectors rank 4 captures 82.35 % of tr M and rank 24
# 96.30 %, after as many steps 82.27 and 96.28 %.
_ITERATIONS = 8
# Share of E[h_i^2] that rounding leaves of the variance of a coordinate that does not vary, as sums are of float32 products.
# Measured: at most 8e-7, and at least 3e-3 where the demo's stream moves.
_CONSTANT = 2e-6


def factor_eigenvalues(factors: Float[Tensor, "n R d_model"]) -> Float[Tensor, "n rank"]:
    """Eigenvalues of ``G^T G``, descending, min(R, d_model) of them: the others are zero."""
    found = []
    for some in factors.split(max(1, _SOLVED // min(factors.shape[1:]) ** 2)):
        gram = some @ some.mT if factors.shape[1] <= factors.shape[2] else some.mT @ some
        # In float64, as LAPACK's float32 solvers do not converge on some matrices whose entries differ by 1e12 and more.
        found.append(torch.linalg.eigvalsh(gram.double()).to(gram.dtype))
    return torch.cat(found).flip(-1).clamp_min(0)


def solving_bytes(n: int, num_factors: int, d_model: int) -> int:
    """Bytes that the eigenvalues of n positions take at once, at most."""
    one = min(num_factors, d_model) ** 2
    return 20 * min(n * one, max(one, _SOLVED))  # in float32, in float64, and once more in the hands of the solver


def participation_ratio(eigenvalues: Float[Tensor, "*n rank"]) -> Float[Tensor, "*n"]:
    """``(sum l)^2 / sum l^2``: how many equal eigenvalues would have the same second moment."""
    share = eigenvalues / eigenvalues.sum(-1, keepdim=True)  # squares of what is below 1e-19 are none in float32
    return 1 / share.square().sum(-1)


def entropy_rank(eigenvalues: Float[Tensor, "*n rank"]) -> Float[Tensor, "*n"]:
    """``exp(-sum q log q)`` with ``q = l / sum l`` (Roy and Vetterli, 2007)."""
    share = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def trace_rank(eigenvalues: Float[Tensor, "*n rank"], share: float = 0.99) -> Int[Tensor, "*n"]:
    """How many of the largest eigenvalues hold ``share`` of the trace."""
    eigenvalues = eigenvalues.sort(-1, descending=True).values
    # A product and no cumsum: CUDA's prefix sums of floats add in an order of their own.
    largest = eigenvalues @ eigenvalues.new_ones(eigenvalues.shape[-1:] * 2).triu()
    short = largest < share * eigenvalues.sum(-1, keepdim=True)
    return short.sum(-1) + 1


def symmetric_eigh(matrix: Float[Tensor, "*n d d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d d"]]:
    """Eigenvalues, descending, and the eigenvectors as columns, each with its largest entry positive; of the lower triangle."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1), _oriented(vectors.flip(-1))


def leading_vectors(matrix: Float[Tensor, "n d d"], rank: int) -> Float[Tensor, "n d rank"]:
    """Orthonormal columns that span the leading eigenvectors of positive semi-definite matrices, in their order.

    On a GPU large ones are solved one after the other, for the time of thousands of backward passes: there by orthogonal
    iteration (Golub and Van Loan, Matrix Computations, 7.3), which is products of all at once. It ends before two close
    eigenvectors are told apart; columns without an eigenvalue above rounding are then zero.
    """
    if matrix.is_cuda and matrix.shape[-1] > _SOLVED_TOGETHER:
        return _orthogonal_iteration(matrix.double(), rank).to(matrix.dtype)
    return symmetric_eigh(matrix)[1][..., :rank]


def _orthogonal_iteration(matrix: Float[Tensor, "n d d"], rank: int) -> Float[Tensor, "n d rank"]:
    d = matrix.shape[-1]
    start = torch.randn(d, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0), device="cpu")
    basis = start.to(matrix.device).expand(len(matrix), -1, -1)
    # More than Cholesky's own rounding: with 1e-14 columns of 128 and more, some of them of rounding alone, had no factor.
    barely = 1e-13 * torch.eye(rank, dtype=matrix.dtype, device=matrix.device)
    for _ in range(_ITERATIONS):
        basis = torch.nn.functional.normalize(matrix @ basis, dim=-2, eps=1e-300)
        # Columns of one length, nearly orthogonal in the end: Cholesky's factor orthogonalises them without loss.
        lower, failed = torch.linalg.cholesky_ex(basis.mT @ basis + barely)
        basis = torch.linalg.solve_triangular(lower, basis.mT, upper=False).mT
    sound = (failed == 0) & basis.isfinite().flatten(1).all(1)
    return _oriented(basis.where(sound[:, None, None], 0))


def factor_eigh(factors: Float[Tensor, "R d"]) -> tuple[Float[Tensor, " rank"], Float[Tensor, "d rank"]]:
    """The first min(R, d) of ``G^T G``, as :func:`symmetric_eigh` gives them; its other eigenvalues are zero."""
    _, singular, vectors = torch.linalg.svd(factors, full_matrices=False)
    return singular.square(), _oriented(vectors.mT)


def _oriented(vectors: Tensor) -> Tensor:
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * largest.sign()


def anisotropy(eigenvalues: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """``|F / (tr F / d) - I|``, spectral norm, from all d eigenvalues, descending: 0 for a Euclidean metric, at most d - 1."""
    relative = eigenvalues / eigenvalues.mean(-1, keepdim=True) - 1
    return torch.maximum(relative[..., 0].abs(), relative[..., -1].abs())


def subspace_overlaps(bases: Float[Tensor, "L d k"]) -> Float[Tensor, "L L"]:
    """``|U_i^T U_j|_F^2 / k`` for orthonormal columns: 1 where two span the same space, k / d in the mean for random ones."""
    return torch.einsum("idk,jdl->ijkl", bases, bases).square().sum((2, 3)) / bases.shape[2]


def covariance(second_moment: Float[Tensor, "d d"], mean: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
    """``E[h h^T] - E[h] E[h]^T``, zero in coordinates whose variance is that of rounding: h is taken as constant there."""
    found = second_moment - torch.outer(mean, mean)
    constant = found.diagonal() <= _CONSTANT * second_moment.diagonal()
    return found.masked_fill(constant | constant[:, None], 0)


def whitening(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """``Sigma^(1/2)`` and its pseudo-inverse, with ``Sigma`` the covariance of h."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    moves = values > 1e-12 * values.max()  # along the others h is constant, and nothing can be scaled by how it varies
    inverse = values.rsqrt().where(moves, 0)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * inverse) @ vectors.mT


def whitened_eigenvalues(fisher: Float[Tensor, "d d"], covariance: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Eigenvalues of ``Sigma^(1/2) F Sigma^(1/2)``, descending, with ``Sigma`` the covariance of h.

    They do not change under a linear change of coordinates of h, so layers compare; nats^2.
    """
    root, _ = whitening(covariance)
    return torch.linalg.eigvalsh(root @ fisher @ root).flip(-1).clamp_min(0)


def whitened_factor_eigenvalues(
    factors: Float[Tensor, "R d"], mean: Float[Tensor, " d"], second_moment_factors: Float[Tensor, "S d"]
) -> Float[Tensor, " R"]:
    """The same where ``F = G^T G`` and ``E[h h^T] = H^T H``: those of ``G Sigma G^T``, which are all that are not zero."""
    along, across = factors @ second_moment_factors.mT, factors @ mean
    return torch.linalg.eigvalsh(along @ along.mT - torch.outer(across, across)).flip(-1).clamp_min(0)
