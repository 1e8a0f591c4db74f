"""Eigenvalues of Fisher matrices and the effective dimensions read off them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def factor_eigenvalues(factors: Float[Tensor, "n R d_model"]) -> Float[Tensor, "n rank"]:
    """Eigenvalues of ``G^T G``, descending, min(R, d_model) of them: the others are zero."""
    gram = factors @ factors.mT if factors.shape[1] <= factors.shape[2] else factors.mT @ factors
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)


def participation_ratio(eigenvalues: Float[Tensor, "*n rank"]) -> Float[Tensor, "*n"]:
    """``(sum l)^2 / sum l^2``: how many equal eigenvalues would have the same second moment."""
    return eigenvalues.sum(-1).square() / eigenvalues.square().sum(-1)


def entropy_rank(eigenvalues: Float[Tensor, "*n rank"]) -> Float[Tensor, "*n"]:
    """``exp(-sum q log q)`` with ``q = l / sum l`` (Roy and Vetterli, 2007)."""
    share = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def trace_rank(eigenvalues: Float[Tensor, "*n rank"], share: float = 0.99) -> Int[Tensor, "*n"]:
    """How many of the largest (descending) eigenvalues hold ``share`` of the trace."""
    # A product and no cumsum: CUDA's prefix sums of floats add in an order of their own.
    largest = eigenvalues @ torch.ones(eigenvalues.shape[-1:] * 2).triu().to(eigenvalues)
    reached = largest < share * eigenvalues.sum(-1, keepdim=True)
    return reached.sum(-1) + 1


def symmetric_eigh(matrix: Float[Tensor, "*n d d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d d"]]:
    """Eigenvalues, descending, and the eigenvectors as columns, each with its largest entry positive."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1), _oriented(vectors.flip(-1))


def factor_eigh(factors: Float[Tensor, "R d"]) -> tuple[Float[Tensor, " rank"], Float[Tensor, "d rank"]]:
    """The same of ``G^T G``, of whose eigenvalues min(R, d) are not zero for certain."""
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


def whitening(
    mean: Float[Tensor, " d"], second_moment: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """``Sigma^(1/2)`` and its pseudo-inverse, with ``Sigma`` the covariance of h."""
    values, vectors = torch.linalg.eigh(second_moment - torch.outer(mean, mean))
    values = values.clamp_min(0)
    moves = values > 1e-12 * values.max()  # along the others h is constant, and nothing can be scaled by how it varies
    inverse = values.rsqrt().where(moves, 0)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * inverse) @ vectors.mT


def whitened_eigenvalues(
    fisher: Float[Tensor, "d d"], mean: Float[Tensor, " d"], second_moment: Float[Tensor, "d d"]
) -> Float[Tensor, " d"]:
    """Eigenvalues of ``Sigma^(1/2) F Sigma^(1/2)``, descending, with ``Sigma`` the covariance of h.

    They do not change under a linear change of coordinates of h, so layers compare; nats^2.
    """
    root, _ = whitening(mean, second_moment)
    return torch.linalg.eigvalsh(root @ fisher @ root).flip(-1).clamp_min(0)


def whitened_factor_eigenvalues(
    factors: Float[Tensor, "R d"], mean: Float[Tensor, " d"], second_moment_factors: Float[Tensor, "S d"]
) -> Float[Tensor, " R"]:
    """The same where ``F = G^T G`` and ``E[h h^T] = H^T H``: those of ``G Sigma G^T``, which are all that are not zero."""
    along, across = factors @ second_moment_factors.mT, factors @ mean
    return torch.linalg.eigvalsh(along @ along.mT - torch.outer(across, across)).flip(-1).clamp_min(0)
