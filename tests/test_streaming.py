"""Weights that stay where they are stored and are fetched for each pass of a block."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from families import FAMILIES, build
from transformers import LlamaConfig, LlamaForCausalLM

import jobs
from fisher_ray import ModelError, Sampled, kernels, open_run, score_factors
from fisher_ray.cost import outline
from fisher_ray.plan import RunConfig
from fisher_ray.scores import Pass
from fisher_ray.split import SplitModel
from fisher_ray.worker import load_model

DEMO = Path(__file__).parents[1] / "demo"


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    build(FAMILIES[name], dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_streamed_weights_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Blocks' weights are read from disk for each pass: the same numbers, and none of them is there before or after."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = saved(name, tmp_path)
    whole, streamed = SplitModel.from_pretrained(folder), SplitModel.from_pretrained(folder, stream_weights=True)
    assert streamed.streamed
    assert not whole.streamed
    assert not list(tmp_path.glob("temporary/*"))  # of experts that were joined and written anew
    batch = oracles.inputs(whole, [12, 9])
    asked: dict[str, Any] = dict(**batch.padded(["right"], 12), layers=[0, 2], estimator=Sampled(3))
    for chosen in (None, (2, 7)):
        expected, got = (score_factors(split, **asked, positions=chosen) for split in (whole, streamed))
        for layer in (0, 2):
            assert oracles.error(got.factors[layer].double(), expected.factors[layer].double()) < 1e-5
    assert all(parameter.is_meta for parameter in streamed.blocks.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "t5"])
def test_streamed_weights_are_not_counted_as_a_graphs(name: str, tmp_path: Path):
    folder = saved(name, tmp_path)
    whole, streamed = SplitModel.from_pretrained(folder), SplitModel.from_pretrained(folder, stream_weights=True)
    # But for z, the final norm and T5's position biases, which are much of so small a model.
    assert streamed.graph_bytes(48, 0) == pytest.approx(whole.graph_bytes(48, 0), rel=0.2)
    assert outline(folder, stream_weights=True).graph_bytes(48, 0) == pytest.approx(
        streamed.graph_bytes(48, 0), rel=0.02
    )


def test_a_pass_of_a_block_has_its_weights_and_no_others(tmp_path: Path):
    split = SplitModel.from_pretrained(saved("llama", tmp_path), stream_weights=True)
    there: list[tuple[int, list[bool]]] = []

    def note(k: int) -> Callable[..., None]:
        def here(*_: object) -> None:
            there.append((k, [all(p.is_meta for p in block.parameters()) for block in split.blocks]))
            assert not any(p.is_meta for p in split.blocks[k].parameters())

        return here

    for k, block in enumerate(split.blocks):
        block.self_attn.register_forward_hook(note(k))
    tape = split.own_tape(torch.randint(61, (4, 40)), {}, [0], None)
    tape.pull(torch.randn_like(tape.z))
    assert [k for k, _ in there] == [0, 1, 2, 2, 1, 0]  # forward, and walked from the top down
    assert all(absent == [i != k for i in range(3)] for k, absent in there)


def test_weights_that_cannot_be_read_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An error, no weights of any block, those read before it included; and once they can be read, the scores of before."""
    split = SplitModel.from_pretrained(saved("llama", tmp_path), stream_weights=True)
    ids = torch.randint(61, (1, 12))
    before = score_factors(split, ids, layers=[1], estimator=Sampled(2)).factors[1]
    read = OffloadedWeightsLoader.__getitem__

    def reading(self: OffloadedWeightsLoader, name: str) -> torch.Tensor:
        if name.endswith("1.mlp.down_proj.weight"):
            raise OSError(f"{name} cannot be read")
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(OffloadedWeightsLoader, "__getitem__", reading)
        with pytest.raises(OSError, match=r"1.mlp.down_proj.weight cannot be read"):
            score_factors(split, ids, layers=[1], estimator=Sampled(2))
    assert all(parameter.is_meta for parameter in split.blocks.parameters())
    assert torch.equal(score_factors(split, ids, layers=[1], estimator=Sampled(2)).factors[1], before)


def test_a_model_that_is_split_again_reads_as_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split = SplitModel.from_pretrained(saved("llama", tmp_path), stream_weights=True)
    reads: list[str] = []
    read = OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(
        OffloadedWeightsLoader, "__getitem__", lambda self, name: [reads.append(name), read(self, name)][1]
    )
    ids = torch.randint(61, (1, 12))
    for model in (split, SplitModel(split.model, check=False)):
        reads.clear()
        model.states(ids, {})
        assert sorted(reads) == sorted(name for name, parameter in split.model.named_parameters() if parameter.is_meta)


def test_a_graph_of_one_block_is_budgeted(tmp_path: Path):
    """Also where each position has a pass of its own; and such a pass can be differentiated twice."""
    folder = saved("gpt2", tmp_path)
    ids = torch.randint(61, (1, 12))
    held, pushed = {}, {}
    for streams in (False, True):
        split = SplitModel.from_pretrained(folder, stream_weights=streams, gradients="per_position")
        taken = Pass(
            split,
            list(ids),
            [-1],
            [0],
            Sampled(1),
            False,
            1,
            1.0,
            1.0,
            torch.zeros(1, 2, dtype=torch.long),
            None,
            None,
            0,
        )
        held[streams] = taken._taped([0], [[5, 6]], 12)[1]
        tape = split.tape(ids, {}, [0], torch.tensor([5, 6]))
        pushed[streams] = tape.push(0, torch.eye(24)[:2])
    assert held[True] < 0.6 * held[False]
    torch.testing.assert_close(pushed[True], pushed[False])


def test_parts_that_stay_in_float32_are_not_streamed_in_float16(tmp_path: Path):
    folder = saved("t5", tmp_path)
    with pytest.raises(ModelError, match="keeps wo in float32 where the rest is float16"):
        SplitModel.from_pretrained(folder, dtype="float16", stream_weights=True)


def test_a_copy_fetches_for_itself(tmp_path: Path):
    split = SplitModel.from_pretrained(saved("llama", tmp_path), stream_weights=True)
    copied = SplitModel(copy.deepcopy(split.model), check=False)
    ids = torch.randint(61, (1, 12))
    ran: list[str] = []
    split.blocks[0].self_attn.register_forward_hook(lambda *_: ran.append("split"))
    copied.blocks[0].self_attn.register_forward_hook(lambda *_: ran.append("copied"))
    assert torch.equal(copied.states(ids, {}), split.states(ids, {}))
    assert ran == ["copied", "split"]


def test_streamed_layers_multiply_as_those_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights large enough for oneDNN: not one bit is another than where they stay and blocks are walked."""
    monkeypatch.setattr(kernels, "mkl_is_at_home", lambda: False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=768, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    whole, streamed = (SplitModel.from_pretrained(tmp_path, stream_weights=each, check=False) for each in (False, True))
    ids = torch.randint(61, (2, 20))
    assert torch.equal(streamed.states(ids, {}), whole.states(ids, {}))
    cotangent = torch.randn(40, 768)
    expected, got = (each.own_tape(ids, {}, [0, 1], None, walk=True).pull(cotangent) for each in (whole, streamed))
    assert all(torch.equal(got[layer], expected[layer]) for layer in (0, 1))


def test_weights_are_streamed_or_placed(tmp_path: Path):
    with pytest.raises(ValueError, match="give stream_weights or device_map, not both; got 'auto'"):
        SplitModel.from_pretrained(tmp_path, stream_weights=True, device_map="auto")


def test_a_run_streams_weights(tmp_path: Path):
    """Told to, it reads them block by block, and finds the mean F that it finds without."""
    found = {}
    for streams in (False, True):
        config = RunConfig(
            model=str(DEMO / "model"),
            corpus=(str(DEMO / "corpus.jsonl"),),
            output=str(tmp_path / str(streams)),
            layers="2,5",
            max_docs=3,
            stream_weights=streams,
        )
        assert load_model(config).streamed is streams
        jobs.run_here(config)
        found[streams] = open_run(config.output)
    for layer in (2, 5):
        whole, streamed = (torch.from_numpy(found[streams].fisher(layer)) for streams in (False, True))
        assert oracles.error(streamed, whole) < 1e-5
    assert found[True].description["fingerprint"] != found[False].description["fingerprint"]
