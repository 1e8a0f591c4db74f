"""The survey of the library's models says of each what becomes of it, and does not believe what it measures against."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fisher_ray import SplitModel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def survey(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import architectures

    return architectures


def test_each_is_scored_or_refused(survey: Any) -> None:
    """By every way: its own attention, one pass a position, blocks that hand on no vectors or do not all run, another head."""
    found = {
        name: survey.examine(survey.small_model(name))
        for name in ("llama4_text", "mamba", "openai-gpt", "mllama", "bert")
    }
    kinds = {name: each.kind for name, each in found.items()}
    assert kinds == {
        "llama4_text": "scored", "mamba": "per position", "openai-gpt": "refused", "mllama": "refused", "bert": "refused"
    }  # fmt: skip
    assert max(found[name].error for name in ("llama4_text", "mamba")) < 1e-6
    for name, words in (
        ("mamba", "mixes positions"),
        ("openai-gpt", "has no stream [batch, seq, 32] at layer 4, but list"),
        ("mllama", "has passes without some of its blocks"),
        ("bert", "has an output head this package does not know"),
    ):
        assert words in found[name].said


def test_wrong_scores_are_seen(survey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = survey.score_factors

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = scores(*args, **kwargs)
        found.factors[4][-2] *= 1.01
        return found

    monkeypatch.setattr(survey, "score_factors", wrong)
    model = survey.small_model("gpt2")
    assert survey.deviation(SplitModel(model)) == pytest.approx(0.02, rel=0.1)
    assert survey.examine(model).kind == "wrong"


@pytest.mark.parametrize(("dies", "kind"), [("small_model", "not built"), ("examine", "wrong")])
def test_what_dies_is_told(dies: str, kind: str, survey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "small_model", lambda name: name)
    monkeypatch.setattr(survey, dies, lambda _: os._exit(7))
    assert survey._apart("gpt2") == (kind, "the process ended with exit code 7", 0.0)
