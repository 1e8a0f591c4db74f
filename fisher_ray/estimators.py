"""Estimators of the Fisher matrix: sets of cotangents at the final hidden state z.

An estimator turns a next-token distribution into ``R`` cotangents a position whose second moment is
``M = sum_y p(y) c_y c_y^T``, exactly or in expectation. Pulled back to a residual stream they are the score factors
``G [R, d_model]``, weights folded in, and ``F = G^T G``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisher_ray.draws import Draws
from fisher_ray.head import Prediction

_ONE = 2.0**52  # in fixed point


@dataclass(frozen=True)
class Exact:
    """No sampling error: the cotangents are a factor of M itself, min(vocab_size, d_z) of them."""

    def num_factors(self, vocab_size: int, d_z: int) -> int:
        """R, cotangents a position."""
        return min(vocab_size, d_z)

    def cotangents(self, prediction: Prediction, draws: Draws) -> tuple[Float[Tensor, "n R d_z"], Float[Tensor, " n"]]:
        """The cotangents and the probability mass they stand for, 1."""
        return prediction.second_moment_factor(), torch.ones_like(prediction.entropy)


@dataclass(frozen=True)
class Sampled:
    """``c_y / sqrt(S)`` for ``S`` tokens ``y ~ p``: unbiased, with relative error of order 1 / sqrt(S).

    ``temperature`` and ``top_p`` draw the tokens from another distribution (the temperature first, then the smallest set
    of tokens whose mass reaches ``top_p``) and leave the scores those of p. The expectation is then no longer the Fisher
    matrix of the model; the mass of p that was kept is recorded.

    Args:
        num_samples: S, tokens drawn a position.
        top_p: in (0, 1].
        temperature: above 0.
    """

    num_samples: int
    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}.")
        check_tempering(self.top_p, self.temperature)

    def num_factors(self, vocab_size: int, d_z: int) -> int:
        """R, cotangents a position."""
        return self.num_samples

    def cotangents(self, prediction: Prediction, draws: Draws) -> tuple[Float[Tensor, "n R d_z"], Float[Tensor, " n"]]:
        """The cotangents and the probability mass of the tokens that could be drawn."""
        weights, kept = tempered(prediction, self.top_p, self.temperature)
        tokens = draws.tokens(weights, self.num_samples)
        return prediction.scores(tokens).div_(math.sqrt(self.num_samples)), kept


Estimator = Exact | Sampled


def check_tempering(top_p: float, temperature: float, prefix: str = "") -> None:
    """Refuse a nucleus or a temperature that is no such thing."""
    if not 0 < top_p <= 1:
        raise ValueError(f"{prefix}top_p must be in (0, 1], got {top_p}. 1 keeps every token.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{prefix}temperature must be above 0 and finite, got {temperature}. 1 draws from p itself.")


def tempered(
    prediction: Prediction, top_p: float, temperature: float
) -> tuple[Float[Tensor, "n vocab_size"], Float[Tensor, " n"]]:
    """Unnormalised weights of p sharpened by ``temperature``, cut to its ``top_p`` nucleus; and the mass of p kept."""
    weights = prediction.prob
    if temperature != 1.0:
        scaled = prediction.logits / temperature
        weights = (scaled - scaled.max(-1, keepdim=True).values).exp()
    if top_p == 1.0:
        return weights, torch.ones_like(prediction.entropy)
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    # In fixed point, where sums do not depend on the order: CUDA's prefix sums of floats add in an order of their own.
    share = (ranked / ranked.sum(-1, keepdim=True) * _ONE).long()
    before = share.cumsum(-1) - share
    outside = torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before >= int(top_p * _ONE))
    outside.scatter_(1, order[:, :1], False)
    weights = weights.masked_fill(outside, 0.0)
    return weights, prediction.prob.masked_fill(outside, 0.0).sum(-1)
