"""Activations that keep their slopes are the functions that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN, NewGELUActivation

from fisher_ray.architecture import Pointwise, fuse_activations

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
        torch.testing.assert_close(each(leaf), plain(x), rtol=1e-14, atol=1e-14)
        each(leaf).backward(along)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-14)


def test_only_pointwise_activations_are_exchanged():
    model = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Softmax(-1), nn.PReLU(), NewGELUActivation())
    fuse_activations(model)
    assert [type(module) for module in model] == [nn.Linear, Pointwise, nn.Softmax, nn.PReLU, Pointwise]
    assert isinstance(model[4].activation, nn.GELU)
