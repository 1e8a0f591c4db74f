"""Norms and MLPs through torch.compile, traced and differentiated as for a GPU and then run as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from families import FAMILIES, build
from torch._dynamo.utils import counters

from fisher_ray import ModelError, Sampled, SplitModel, architecture, score_factors
from fisher_ray.plan import ConfigError, RunConfig


@pytest.fixture(autouse=True)
def traced(unchecked_shapes: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(architecture, "_BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["frames"]["ok"]


def scores(split: SplitModel, batch: int, seq_len: int, **more: Any) -> dict[int, torch.Tensor]:
    ids = torch.arange(1, 1 + batch * seq_len).remainder(60).view(batch, seq_len)
    encoder = {"encoder_input_ids": ids[:, :5]} if split.is_encoder_decoder else {}
    return score_factors(split, ids, layers=[0, 1, 3], estimator=Sampled(2), **more, **encoder).factors


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3", "mixtral", "t5"])
def test_the_same_scores_from_graphs_made_at_the_start(name: str):
    plain, compiled = SplitModel(build(FAMILIES[name])), SplitModel(build(FAMILIES[name]), compile=True)
    made = graphs()
    assert made > 0
    asked: list[tuple[int, int, dict[str, Any]]] = [
        (2, 20, {}),
        (3, 7, {}),
        (1, 30, {}),
        (2, 20, {"positions": [3, 9]}),
    ]
    for batch, seq_len, more in asked:
        got, expected = (scores(split, batch, seq_len, **more) for split in (compiled, plain))
        for layer, factors in expected.items():
            assert oracles.error(got[layer], factors) < 1e-6  # norms in float32 within float64 models
    assert graphs() == made


def test_products_with_jacobians_take_blocks_as_they_are():
    plain, compiled = (SplitModel(build(FAMILIES["llama"]), compile=compile) for compile in (False, True))
    ids, at = torch.arange(1, 15)[None], torch.tensor([2, 9, 13])
    directions = torch.randn(3, plain.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pushed = [split.tape(ids, {}, [1], at).push(1, directions) for split in (plain, compiled)]
    assert oracles.error(pushed[1], pushed[0]) < 1e-6


def test_without_a_compiler_the_model_is_refused(monkeypatch: pytest.MonkeyPatch):
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(architecture, "_BACKEND", broken)
    with pytest.raises(
        ModelError, match=r"cannot compile LlamaForCausalLM here .*no compiler.*, or leave --compile out"
    ):
        SplitModel(build(FAMILIES["llama"]), compile=True)


def test_weights_that_are_streamed_are_refused(tmp_path: Path):
    model = build(FAMILIES["gpt2"], torch.float32)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compile is for weights that stay on the device; these are streamed"):
        SplitModel.from_pretrained(tmp_path, stream_weights=True, compile=True)
    with pytest.raises(ConfigError, match="compile is for weights that stay on the device, got stream_weights"):
        RunConfig(model="m", corpus=("c",), output="o", stream_weights=True, compile=True)
