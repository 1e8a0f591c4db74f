"""Blocks run again from the top down: the same scores, and one block's graph at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import transformers
from conftest import Models
from families import FAMILIES, build

from fisher_ray import Exact, ModelError, Sampled, score_factors
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


class Gathers(torch.nn.Module):
    """A block that adds what an earlier one has left behind, of the same position."""

    def __init__(self, block: torch.nn.Module, left: list[torch.Tensor]):
        super().__init__()
        self.block, self.left = block, left

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.block(hidden, *args, **kwargs)
        if len(self.left) == 2:
            out = out + 0.5 * self.left.pop(0)
        self.left.append(out)
        return out


def test_blocks_that_leave_something_behind_unseen_are_not_walked():
    model = build(FAMILIES["llama"], torch.float32)
    left: list[torch.Tensor] = []
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = Gathers(block, left)
    model.model.register_forward_pre_hook(lambda *_: left.clear())
    split = SplitModel(model)
    assert split.self_check is not None and split.self_check.scores < 1e-4 and split.self_check.walked > 0.1
    ids = torch.arange(1, 13)[None]
    assert score_factors(split, ids, layers=[0], estimator=Sampled(1)).factors[0].isfinite().all()
    with pytest.raises(ModelError, match="hand each other more than the residual stream: run again one at a time"):
        score_factors(split, ids, layers=[0], estimator=Sampled(1), memory_budget=1)


@pytest.fixture(scope="module")
def shares_keys() -> Any:
    """Gemma 4, whose last blocks take keys and values of earlier ones."""
    config = transformers.Gemma4TextConfig(
        vocab_size=61, vocab_size_per_layer_input=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=512,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM(config).float()


def test_blocks_that_share_keys_are_not_walked(shares_keys: Any):
    split = SplitModel(shares_keys)
    assert split.self_check is not None and split.self_check.scores < 1e-4 and split.self_check.walked == 0
    ids = torch.randint(3, 61, (1, 16), generator=torch.Generator().manual_seed(0))
    scores = score_factors(split, ids, layers=[0], estimator=Exact())
    alone = score_factors(
        SplitModel(shares_keys, gradients="per_position"), ids, layers=[0], estimator=Exact(), positions=[3, 12]
    )
    assert oracles.error(scores.matrices(0)[[3, 12]], alone.matrices(0)) < 1e-4
    with pytest.raises(ModelError, match=r"hand each other more than the residual stream \(shared_kv_states\)"):
        score_factors(split, ids, layers=[0], estimator=Exact(), memory_budget=1)


@pytest.mark.parametrize("gradients", ["own_position", "per_position"])
def test_blocks_that_share_keys_are_not_streamed(gradients: Any, shares_keys: Any, tmp_path: Path):
    shares_keys.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(shared_kv_states\), so that they cannot be run again one at a time"):
        SplitModel.from_pretrained(tmp_path, gradients=gradients, stream_weights=True)


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
    (unit,) = split.log_probability_rates(split.tape(ids, {}, [0], at), 0, directions)
    for length in (1e-7, 1e5):
        (rates,) = split.log_probability_rates(split.tape(ids, {}, [0], at), 0, length * directions)
        assert oracles.error(rates / length, unit) < 0.02, length
