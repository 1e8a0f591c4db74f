"""A model whose parts are on several devices gives the numbers it gives on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
import transformers as tf
from accelerate import dispatch_model, infer_auto_device_map
from families import FAMILIES, build
from pretend import pretend_devices
from torch import Tensor

from fisher_ray import Exact, LowerLayersModel, ModelError, Sampled, SplitModel, UpperLayersModel, score_factors
from fisher_ray.scores import default_memory_budget

IDS = torch.arange(1, 29).view(2, 14)
MASK = torch.ones(2, 14, dtype=torch.int64)
MASK[0, :3] = 0

# One of each way to make positions, masks, biases, experts and heads.
CHOSEN = ["gpt2", "opt", "gemma3", "phi3", "gpt_neox", "gpt_oss", "deepseek_v3", "gpt_bigcode", "untied_t5"]


# ---- several devices, pretended --------------------------------------------------------------------------------------


def auto(model: Any) -> dict[str, str]:
    """The map that accelerate makes for three devices which only together hold the model."""
    share = sum(parameter.nbytes for parameter in model.parameters()) // 2
    inferred = infer_auto_device_map(model, {0: share, 1: share, 2: 2 * share}, model._no_split_modules)
    return {name: f"meta:{device}" for name, device in inferred.items()}


def shuffled(model: Any) -> dict[str, str]:
    """Neighbours on different devices: embeddings first, the rest in turn, the head last; tied weights stay together."""
    placed: dict[str, str] = {}
    owners: dict[int, str] = {}

    def place(path: str, module: torch.nn.Module) -> None:
        if type(module).__name__ not in model._no_split_modules and list(module.children()):
            for name, child in module.named_children():
                place(f"{path}.{name}".lstrip("."), child)
            return
        tied = [owners[id(parameter)] for parameter in module.parameters() if id(parameter) in owners]
        turn = 2 if module is model.get_output_embeddings() else len(placed) % 3
        placed[path] = tied[0] if tied else f"meta:{turn}"
        owners.update({id(parameter): placed[path] for parameter in module.parameters()})

    place("", model)
    return placed


def untied_t5() -> Any:
    """Its head is not where its embeddings are."""
    config = FAMILIES["t5"]().config
    config.tie_word_embeddings = False
    return tf.T5ForConditionalGeneration(config)


MODELS = {**FAMILIES, "untied_t5": untied_t5}


def spread(name: str, place: Any, **arguments: Any) -> SplitModel:
    """The model on three pretend devices, by accelerate's own hooks."""
    model = build(MODELS[name])
    dispatch_model(model, place(model), skip_keys=model._skip_keys_device_placement)
    assert {parameter.device.index for parameter in model.parameters()} == {0, 1, 2}
    return SplitModel(model, **arguments)


def encoder(split: SplitModel, rows: int = 2) -> dict[str, Tensor]:
    if not split.is_encoder_decoder:
        return {}
    return {"encoder_input_ids": IDS[:rows, :5], "encoder_attention_mask": MASK[:rows, 1:6]}


def tensors(split: SplitModel, result: Any) -> Iterator[Tensor]:
    """The tensors anywhere in a result, which are all on the head's device, on the CPU."""
    if isinstance(result, Tensor):
        assert result.device == split.device
        yield result.cpu().nan_to_num()
    elif isinstance(result, dict | list | tuple):
        for part in result.values() if isinstance(result, dict) else result:
            yield from tensors(split, part)
    elif hasattr(result, "__dict__"):
        yield from tensors(split, vars(result))


def same(split: SplitModel, result: Any, alone: SplitModel, truth: Any, tolerance: float) -> None:
    pairs = list(zip(tensors(split, result), tensors(alone, truth), strict=True))
    assert pairs
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# PyTorch chooses its attention kernel by the kind of device, and copies drop strides: other rounding, in float64.
_ROUNDING = 1e-11


CALLS: dict[str, dict[str, Any]] = {
    "every position": {"estimator": Sampled(2)},
    "chosen positions": {"estimator": Exact(), "positions": [3, 10]},
    "drawn tokens": {"estimator": Sampled(2, top_p=0.9), "token_source": "sampled", "num_token_draws": 2},
}


def scores(split: SplitModel) -> list[Any]:
    layers = [0, 2, 3]
    return [
        score_factors(split, IDS, attention_mask=MASK, layers=layers, **call, **encoder(split))
        for call in CALLS.values()
    ]


@pytest.mark.parametrize(("name", "place"), [*((name, shuffled) for name in CHOSEN), ("gpt2", auto), ("t5", auto)])
def test_scores(name: str, place: Any, unchecked_shapes: None):
    """The self-check, and scores in every way: one graph over all tokens, chosen ones replayed, tokens drawn."""
    alone = SplitModel(build(MODELS[name]))
    truth = scores(alone)
    with pretend_devices():
        split = spread(name, place)
        assert split.self_check is not None
        same(split, scores(split), alone, truth, _ROUNDING)


@pytest.mark.parametrize("gradients", ["own_position", "per_position"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_other_ways_in(name: str, gradients: Any, unchecked_shapes: None):
    """The published toolkit's halves, the rates that directions are read by, and both kinds of gradients."""

    def results(split: SplitModel) -> list[Any]:
        lower, upper = LowerLayersModel(split, 2), UpperLayersModel(split, 2)
        encoded = {name: ids for name, ids in encoder(split).items() if name == "encoder_input_ids"}
        hidden, before = lower(IDS, **encoded)
        at, ids = torch.tensor([3, 9], device=split.device), IDS[1:].to(split.device)
        direction = torch.linspace(-1, 1, split.d_model, dtype=torch.float64)
        tape = split.tape(ids, oracles.encoded(split, encoder(split, 1)), [1], at)
        return [
            hidden,
            before,
            upper(hidden[:, -1], hidden[:, :-1], **encoded),
            upper.jacobian(hidden[:, -1], hidden[:, :-1], **encoded),
            *split.log_probability_rates(tape, 1, direction[None]),
            tape.push(1, direction[None]),
            score_factors(split, IDS, layers=[1], estimator=Sampled(2), positions=[5], **encoder(split)),
        ]

    alone = SplitModel(build(MODELS[name]), gradients=gradients)
    truth = results(alone)
    with pretend_devices():
        split = spread(name, shuffled, gradients=gradients)
        same(split, results(split), alone, truth, _ROUNDING)


def test_what_mixes_devices_is_found():
    """The pretence is strict: no operation takes tensors of two devices, indices in main memory included."""
    with pretend_devices():
        here, there = torch.arange(6.0, device="meta:0").view(2, 3), torch.arange(3.0, device="meta:1")
        for mixed in (
            lambda: here @ there,
            lambda: here + there,
            lambda: here[torch.tensor([1])],
            lambda: here.gather(1, torch.zeros(2, 1, dtype=torch.int64, device="meta:1")),
            lambda: torch.cat([here, there[None]]),
        ):
            with pytest.raises(RuntimeError, match="mixes tensors on"):
                mixed()
        leaf = there.requires_grad_()
        (grad,) = torch.autograd.grad((here @ leaf.to("meta:0")).sum(), leaf)
        assert grad.device == torch.device("meta:1")
        assert grad.tolist() == [3.0, 5.0, 7.0]


def test_the_budget_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch, unchecked_shapes: None):
    def on(device: int | None, nbytes: int) -> SimpleNamespace:
        where = torch.device("meta") if device is None else torch.device("cuda", device)
        return SimpleNamespace(device=where, nbytes=nbytes, is_meta=device is None)

    def total_memory(device: torch.device) -> SimpleNamespace:
        assert device.type == "cuda"
        return SimpleNamespace(total_memory=1000)

    monkeypatch.setattr(torch.cuda, "get_device_properties", total_memory)
    weights = [on(0, 100), on(1, 300), on(0, 100), on(1, 100)]
    split: Any = SimpleNamespace(
        device=torch.device("cuda", 0), model=SimpleNamespace(parameters=lambda: weights), fetched_bytes=0
    )
    assert default_memory_budget(split) == 300
    weights += [on(None, 900), on(None, 120)]  # fetched for passes, a block's at a time
    split.fetched_bytes = 120
    assert default_memory_budget(split) == 240
    assert default_memory_budget(split, 0.75) == 115
    split.device = torch.device("cpu")
    assert default_memory_budget(split) == 2 << 30


# ---- device maps, for real -------------------------------------------------------------------------------------------


def saved(name: str, folder: Path) -> Path:
    build(FAMILIES[name], torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto would choose the GPUs")
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_device_maps_onto_the_cpu_change_no_bit(name: str, tmp_path: Path):
    folder = saved(name, tmp_path)
    alone = SplitModel.from_pretrained(folder)
    parts = dict.fromkeys(shuffled(alone.model), "cpu")
    truth = scores(alone)
    for device_map in ({"": "cpu"}, parts, "auto"):
        split = SplitModel.from_pretrained(folder, device_map=device_map)
        same(split, scores(split), alone, truth, 0.0)


def test_only_blocks_are_left_on_disk(tmp_path: Path):
    folder = saved("llama", tmp_path)
    parts = {**dict.fromkeys(shuffled(build(FAMILIES["llama"])), "cpu"), "model.layers.1": "disk"}
    alone, streamed = SplitModel.from_pretrained(folder), SplitModel.from_pretrained(folder, device_map=parts)
    assert streamed.streamed
    same(streamed, scores(streamed), alone, scores(alone), 1e-5)
    with pytest.raises(ModelError, match="leaves the embeddings or the head"):
        SplitModel.from_pretrained(folder, device_map={"": "disk"})


def test_device_maps_that_make_no_sense_are_refused(tmp_path: Path):
    folder = saved("llama", tmp_path)
    with pytest.raises(ValueError, match="give device or device_map, not both"):
        SplitModel.from_pretrained(folder, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match="found everywhere") as refusal:
        SplitModel.from_pretrained(folder, device_map="everywhere")
    assert "\n" not in str(refusal.value)
