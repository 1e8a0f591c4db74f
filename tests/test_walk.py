"""Blocks run again from the top down: the same scores, and one block's graph at a time."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from conftest import Models
from families import FAMILIES, build

from fisher_ray import Sampled, score_factors
from fisher_ray.scores import Pass
from fisher_ray.split import SplitModel
from fisher_ray.tape import Walk

KINDS = ["gpt2", "llama", "gemma2", "gpt_oss", "mixtral", "opt", "t5"]


def never(self: Pass) -> bool:
    return False


def always(self: Pass) -> bool:
    return True


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("case", ["whole", "replayed", "drawn"])
def test_walking_gives_the_same(name: str, case: str, models: Models, monkeypatch: pytest.MonkeyPatch):
    split = models(name)
    batch = oracles.inputs(split, [12] * 12)
    asked: dict[str, Any] = dict(**batch.padded(["right"], 12), layers=[1, 3], estimator=Sampled(3))
    if case == "replayed":
        asked["positions"] = (2, 9)
    if case == "drawn":
        asked |= {"positions": (2, 9), "token_source": "sampled", "num_token_draws": 2}
    found = {}
    for way in (never, always):
        monkeypatch.setattr(Pass, "walks", property(way))
        found[way] = score_factors(split, **asked)
    for layer in (1, 3):
        torch.testing.assert_close(
            found[always].activations[layer], found[never].activations[layer], rtol=0, atol=1e-12
        )
        assert oracles.error(found[always].factors[layer], found[never].factors[layer]) < 1e-12


def test_a_walk_of_scores_that_are_all_zero(models: Models, monkeypatch: pytest.MonkeyPatch):
    """p has one token in float32, whose score is zero: nothing is pulled."""
    model = build(FAMILIES["llama"], torch.float32)
    model.lm_head.weight.data.mul_(2e5)
    split = SplitModel(model, check=False)
    monkeypatch.setattr(Pass, "walks", property(always))
    scores = score_factors(split, torch.arange(1, 13)[None], layers=[0, 2], estimator=Sampled(2))
    assert len(scores) == 12 and not any(g.any() for g in scores.factors.values())


def test_a_walk_equals_one_position_autograd(models: Models, monkeypatch: pytest.MonkeyPatch):
    split = models("llama")
    batch = oracles.inputs(split, [12, 9])
    monkeypatch.setattr(Pass, "walks", property(always))
    scores = score_factors(split, **batch.padded(["right"], 12), layers=[0, 2, 3], estimator=oracles.EveryToken())
    for i, position in ((0, 1), (0, 11), (1, 6)):
        truth = oracles.one_position(split, batch.rows[i], position, [0, 2, 3])
        n = oracles.row_index(scores, i, position)
        for layer in (0, 2, 3):
            assert oracles.error(scores.factors[layer][n], truth.scores[layer]) < 1e-6  # the library's float32 islands


def test_memory_decides(models: Models, monkeypatch: pytest.MonkeyPatch):
    """A budget that holds the graph of the longest sequence: no walk; one that does not: a walk, in fewer micro-batches."""
    split = models("gpt2")
    ran: list[bool] = []
    original = SplitModel.own_tape

    def noted(self: SplitModel, *args: Any, **kwargs: Any) -> Any:
        tape = original(self, *args, **kwargs)
        ran.append(isinstance(tape, Walk))
        return tape

    monkeypatch.setattr(SplitModel, "own_tape", noted)
    ids = torch.randint(61, (12, 48))
    token = split.graph_bytes(48, 0)
    for budget, walks in ((12 * 48 * 3 * token, False), (300 * token, True)):
        ran.clear()
        score_factors(split, ids, layers=[0, 3], estimator=Sampled(1), memory_budget=int(budget))
        assert ran
        assert set(ran) == {walks}


def test_a_walk_holds_one_blocks_graph(models: Models):
    """What is saved for backward passes at once: of one block, where a graph of the whole model holds all three."""
    split = models("llama")
    ids = torch.randint(61, (4, 40))
    row, column = torch.arange(4).repeat_interleave(40), torch.arange(40).repeat(4)
    held = {}
    for walk in (False, True):
        alive, most = 0, 0

        class Saved:
            def __init__(self, tensor: torch.Tensor):
                nonlocal alive, most
                self.tensor = tensor.detach()  # with its history an output would keep itself alive
                alive += tensor.nbytes
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            tape = split.own_tape(ids, {}, [0], (row, column), walk)
            for _ in tape.pull_each([tape.z, tape.z]):
                pass
        held[walk] = most
        del tape
    assert held[True] < 0.45 * held[False]


def test_pushing_through_a_walk_is_pushing_through_the_whole(models: Models):
    split = models("llama")
    ids = torch.randint(61, (1, 10))
    where = (torch.zeros(3, dtype=torch.long), torch.tensor([1, 5, 9]))
    directions = torch.randn(2, split.d_model, dtype=torch.float64)
    whole, walk = (split.own_tape(ids, {}, [1], where, walk).push(1, directions) for walk in (False, True))
    assert oracles.error(walk, whole) < 1e-6


def test_directions_of_any_length_in_float16():
    """A Jacobian is linear: what is too small or too large for float16 is scaled on its way."""
    split = SplitModel(build(FAMILIES["llama"], torch.float16))
    ids, at = torch.arange(1, 13)[None], torch.tensor([3, 7])
    directions = torch.nn.functional.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    (unit,) = split.probability_rates(ids, at, 0, directions)
    for length in (1e-7, 1e5):
        (rates,) = split.probability_rates(ids, at, 0, length * directions)
        assert oracles.error(rates / length, unit) < 0.02, length
