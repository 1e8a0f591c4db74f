"""Fisher matrices of language-model activations: how a small nudge to a residual stream changes the next token.

``F = E_y[grad_h log p(y|h) grad_h log p(y|h)^T]`` for every position and layer, computed from one backward pass a
sample by own-position gradients. The engine needs neither Ray nor storage; the job modules build on it, and ``open_run``
reads what a job has left.
"""

from typing import TYPE_CHECKING, Any

from fisher_ray.architecture import ModelError
from fisher_ray.estimators import Deflated, Exact, Sampled
from fisher_ray.reference import (
    LowerLayersModel,
    UpperLayersModel,
    calculate_fisher,
    fim_expected_gradient_outerproduct,
)
from fisher_ray.scores import Scores, iter_scores, score_factors
from fisher_ray.split import SelfCheck, SplitModel

if TYPE_CHECKING:
    from fisher_ray.run import Run, open_run

__version__ = "0.1.0"

__all__ = [
    "Deflated",
    "Exact",
    "LowerLayersModel",
    "ModelError",
    "Run",
    "Sampled",
    "Scores",
    "SelfCheck",
    "SplitModel",
    "UpperLayersModel",
    "calculate_fisher",
    "fim_expected_gradient_outerproduct",
    "iter_scores",
    "open_run",
    "score_factors",
]


def __getattr__(name: str) -> Any:
    """The reader, when it is asked for: the engine is imported without Arrow and file systems."""
    if name in ("Run", "open_run"):
        from fisher_ray import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers: the reader too."""
    return sorted({*globals(), *__all__})
