"""Activations that keep their slopes are the functions that they stand for."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor, nn
from transformers.activations import ACT2FN, NewGELUActivation

from fisher_ray import Sampled, SplitModel, kernels, score_factors
from fisher_ray.architecture import Pointwise, fuse_activations, slopes_kept
from fisher_ray.tape import Walk

NAMES = [
    "gelu",
    "gelu_10",
    "gelu_new",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "silu",
    "relu",
    "relu2",
    "mish",
    "tanh",
    "sigmoid",
]


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str):
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    plain = ACT2FN[name]
    kept = Pointwise(plain)
    along = torch.randn(41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for each, leaf in zip((plain, kept), inputs, strict=True):
        with slopes_kept([kept]):
            y = each(leaf)
        torch.testing.assert_close(y, plain(x), rtol=1e-14, atol=1e-14)
        y.backward(along)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-14)


def test_only_pointwise_activations_are_exchanged():
    model = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Softmax(-1), nn.PReLU(), NewGELUActivation())
    exchanged = fuse_activations(model)
    assert [type(module) for module in model] == [nn.Linear, Pointwise, nn.Softmax, nn.PReLU, Pointwise]
    assert isinstance(model[4].activation, NewGELUActivation) and isinstance(model[4].function.__self__, nn.GELU)
    assert exchanged == fuse_activations(model) == [model[1], model[4]]


def test_slopes_are_kept_where_asked_alone():
    """What the graph holds is the slope, and not the input; afterwards it is as it was, also after a failure."""
    kept, x = Pointwise(nn.GELU()), torch.randn(5, requires_grad=True)

    def held() -> list[Tensor]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            kept(x)
        return saved

    (before,) = held()
    with slopes_kept([kept]):
        (within,) = held()
    with contextlib.suppress(RuntimeError), slopes_kept([kept]):
        raise RuntimeError
    (after,) = held()
    assert torch.equal(before, x) and torch.equal(after, x)
    slope = torch.autograd.grad(nn.functional.gelu(x).sum(), x)[0]
    torch.testing.assert_close(within, slope)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_keeps_all_its_derivatives(name: str, monkeypatch: pytest.MonkeyPatch):
    """Its owner's second derivatives, in either order of modes, are those of before; also beside a tape of ours."""
    monkeypatch.setattr(kernels, "mkl_is_at_home", lambda: False)  # linear layers are oneDNN's
    monkeypatch.setattr(kernels, "_LARGE", 0)

    def derivatives(model: nn.Module) -> list[Tensor]:
        width = model.config.hidden_size
        embedded = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))

        def loss(moved: Tensor) -> Tensor:
            h = torch.cat([embedded[:, :2], moved[None, None]], 1)
            return model(inputs_embeds=h).logits[0, -1].log_softmax(-1)[3]

        at, along = embedded[0, 2], torch.ones(width)
        slope = torch.func.jvp(loss, (at,), (along,))[1]
        reverse = torch.func.jacrev(torch.func.jacrev(loss))(at)
        forward = torch.func.jacfwd(torch.func.jacrev(loss))(at)
        return [slope, reverse, forward]

    def made() -> nn.Module:
        model = build(FAMILIES[name], torch.float32).requires_grad_(False)
        model.set_attn_implementation("eager")
        return model

    expected = derivatives(made())
    split = SplitModel(made())
    score_factors(split, torch.arange(6)[None], layers=[0], estimator=Sampled(1))
    assert expected[1].abs().max() > 1e-3
    for found, truth in zip(derivatives(split.model), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("walk", [False, True])
def test_tapes_keep_slopes(walk: bool):
    """One graph of all blocks does, and each block's graph of a walk."""
    split = SplitModel(build(FAMILIES["llama"]))
    tape = split.own_tape(torch.arange(6)[None], {}, [0], None, walk=walk)
    outputs = [tape.block(k)[0] for k in range(split.num_layers)] if isinstance(tape, Walk) else [tape._z]

    def nodes(node: Any) -> set[Any]:
        found, left = set(), [node]
        while left:
            if (one := left.pop()) is not None and one not in found:
                found.add(one)
                left += [following for following, _ in one.next_functions]
        return found

    with_slopes = [sum("WithSlope" in node.name() for node in nodes(output.grad_fn)) for output in outputs]
    assert with_slopes == ([1] * split.num_layers if walk else [split.num_layers])
