"""The benchmark's peers compute the matrices that they are compared by, and its flop are those that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from families import FAMILIES, VOCAB, build
from torch import Tensor

from fisher_ray import SplitModel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
POSITIONS = [1, 6, 11]
LAYER = 1

# The library takes some softmaxes in float32. Read one position off, or a context that is not constant, 0.1 and more.
ROUNDING = 1e-6


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers

    return peers


def truths(split: SplitModel, ids: Tensor) -> list[oracles.OnePosition]:
    return [oracles.one_position(split, ids, t, [LAYER]) for t in POSITIONS]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["reference", "jacrev", "curvlinops"])
def test_exact_peers(peers: Any, name: str, family: str) -> None:
    if name == "curvlinops":
        pytest.importorskip("curvlinops")
    split = SplitModel(build(FAMILIES[family]))
    ids = torch.arange(1, 25).view(2, 12)
    found = getattr(peers, name)(peers.Problem(split, ids, LAYER), POSITIONS)
    expected = torch.stack([truth.matrix(LAYER) for truth in truths(split, ids[0])])
    assert oracles.error(found, expected) < ROUNDING


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["recomputed", "cached", "one_graph", "jacrev_positions"])
def test_sampled_peers(peers: Any, name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token in place of drawn ones, once each: the mean over tokens of the outer products of their scores."""
    split = SplitModel(build(FAMILIES[family]))
    ids = torch.arange(1, 25).view(2, 12)
    monkeypatch.setattr(peers.Problem, "drawn", lambda _, log_p: torch.arange(VOCAB).expand(*log_p.shape[:-1], -1))
    found = getattr(peers, name)(peers.Problem(split, ids, LAYER, num_samples=VOCAB), POSITIONS)
    expected = torch.stack([truth.scores[LAYER].T @ truth.scores[LAYER] / VOCAB for truth in truths(split, ids[0])])
    assert oracles.error(found, expected) < ROUNDING


def test_flop_are_counted_forward_and_backward(peers: Any) -> None:
    left, right = torch.randn(4, 8, requires_grad=True), torch.randn(8, 16)
    query = torch.randn(2, 3, 10, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    cases = {
        "product": lambda: (left @ right).sum().backward(),
        "attention": lambda: attend(query, query, query),
        "and back": lambda: attend(query, query, query).sum().backward(),
    }
    flop = {name: each.flop for name, each in peers.interleaved(cases, 1, torch.device("cpu")).items()}
    attention = 2 * 2 * (2 * 3 * 10 * 10 * 8)
    assert flop == {"product": 2 * 2 * 4 * 8 * 16, "attention": attention, "and back": attention * (1 + 5 / 2)}
