"""Fisher matrices of language-model activations: how a small nudge to a residual stream changes the next token.

``F = E_y[grad_h log p(y|h) grad_h log p(y|h)^T]`` for every position and layer, computed from one backward pass a
sample by own-position gradients. The engine needs neither Ray nor storage; the job modules build on it.
"""

from fisher_ray.architecture import ModelError
from fisher_ray.estimators import Exact, Sampled
from fisher_ray.reference import (
    LowerLayersModel,
    UpperLayersModel,
    calculate_fisher,
    fim_expected_gradient_outerproduct,
)
from fisher_ray.scores import Scores, iter_scores, score_factors
from fisher_ray.split import SelfCheck, SplitModel

__version__ = "0.1.0"

__all__ = [
    "Exact",
    "LowerLayersModel",
    "ModelError",
    "Sampled",
    "Scores",
    "SelfCheck",
    "SplitModel",
    "UpperLayersModel",
    "calculate_fisher",
    "fim_expected_gradient_outerproduct",
    "iter_scores",
    "score_factors",
]
