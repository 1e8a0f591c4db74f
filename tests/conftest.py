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

from fisher_ray import directions, driver, report, worker

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


# ---- the ends of runs in this process, which take longer than such small runs themselves -------------------------------

# Modules that look at the tokens which directions move, count what is read for them, or hold runs here against runs in other
# processes.
MOVED_TOKENS = {"test_directions", "test_docs", "test_formats", "test_object_store", "test_report", "test_scale"}

_pictures: dict[tuple[Any, ...], bytes] = {}


def a_picture(plan: Any, store: Any, rows: list[dict[str, Any]]) -> bytes:
    """The first one of its kind: of one layer or several, of an estimator, of anything at all or of zeros."""
    kind = (
        len(rows) > 1,
        plan.config.estimator,
        *(any(row[name] > 0 for row in rows) for name in ("trace", "whitened_trace")),
    )
    if kind not in _pictures:
        _pictures[kind] = report.spectra_png(plan, store, rows)
    return _pictures[kind]


@pytest.fixture(scope="module", autouse=True)
def short_ends(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pictures are drawn once, and moved tokens are of eight windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "spectra_png", a_picture)
        if request.module.__name__ not in MOVED_TOKENS:
            for module in (directions, driver, worker):
                patch.setattr(module, "WINDOWS", 8)
        yield


@pytest.fixture(scope="module")
def no_pictures_yet() -> None:
    """The next run's picture is its own."""
    _pictures.clear()


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run's own."""
    monkeypatch.setattr(driver, "spectra_png", report.spectra_png)
