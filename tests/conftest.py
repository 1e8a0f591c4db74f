from __future__ import annotations

import os

# Before transformers and torch are imported: no network, one thread, no news.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

with install_import_hook("fisher_ray", "beartype.beartype"):  # shapes in annotations hold, in the tests only
    import fisher_ray  # noqa: F401
    from fisher_ray.split import SplitModel

import oracles
from families import FAMILIES, OTHERS, build
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)

Models = Callable[..., SplitModel]


@pytest.fixture(scope="session")
def models() -> Models:
    """``models(name)``: the tiny random model of a family in float64, built and checked once a session."""

    @cache
    def make(name: str, gradients: Any = "own_position", seed: int = 0) -> SplitModel:
        return SplitModel(build({**FAMILIES, **OTHERS}[name], seed=seed), gradients=gradients)

    return make


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, models: Models) -> SplitModel:
    """Every family in turn."""
    return models(request.param)


@pytest.fixture
def float64_throughout() -> Iterator[None]:
    """See :class:`oracles.Float64Throughout`."""
    with oracles.Float64Throughout():
        yield


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """As users run it: without the shape checks of the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
