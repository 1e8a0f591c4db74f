"""Products of oneDNN in place of PyTorch's own, on a CPU that has it."""

from __future__ import annotations

import copy
import pickle
import weakref
from pathlib import Path

import oracles
import pytest
import torch
from conftest import Models
from families import FAMILIES, build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from fisher_ray import Exact, Sampled, SplitModel, kernels, score_factors
from fisher_ray.architecture import FusedConv1D, FusedLinear, fuse_products
from fisher_ray.kernels import linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN")


@pytest.fixture(autouse=True)
def onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU of any maker, and by weights of any size."""
    monkeypatch.setattr(kernels, "mkl_is_at_home", lambda: False)
    monkeypatch.setattr(kernels, "_LARGE", 0)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the weights that oneDNN has multiplied by."""
    shapes: list[torch.Size] = []
    onednn = kernels._onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(weight.shape)
        return onednn(x, weight, bias)

    kernels.onednn_is_right()  # its trial is not counted
    monkeypatch.setattr(kernels, "_onednn", counted)
    return shapes


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(9, 6), (6,), (2, 3, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients(
    shape: tuple[int, ...], inputs_first: bool, with_bias: bool, multiplied: list[torch.Size]
):
    weight = randn(6, 5).T if inputs_first else randn(5, 6)
    bias = randn(5) if with_bias else None
    x, along = randn(*shape).requires_grad_(), randn(*shape[:-1], 5).requires_grad_()
    found = linear(x, weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    (pulled,) = torch.autograd.grad(found, x, along, create_graph=True)
    torch.testing.assert_close(pulled.double(), along.double() @ weight.double(), rtol=1e-6, atol=1e-6)
    tangent = randn(*shape)
    (pushed,) = torch.autograd.grad(pulled, along, tangent)  # the backward pass of the backward pass
    torch.testing.assert_close(pushed.double(), tangent.double() @ weight.double().T, rtol=1e-6, atol=1e-6)
    assert multiplied == [(5, 6), (6, 5), (5, 6)]


def test_rows_that_are_not_side_by_side():
    weight, columns = randn(5, 6), randn(6, 9)
    torch.testing.assert_close(linear(columns.T, weight), (weight @ columns).T)
    torch.testing.assert_close(linear(randn(9, 12)[:, ::2], weight), randn(9, 12)[:, ::2] @ weight.T)


def test_a_row_that_is_not_finite_is_alone_with_that():
    x = randn(4, 6)
    x[1, 2], x[3, 0] = torch.inf, torch.nan
    assert linear(x, randn(5, 6)).isfinite().all(1).tolist() == [True, False, True, False]


def test_whoever_wants_gradients_of_weights_has_them(multiplied: list[torch.Size]):
    layer = nn.Linear(6, 5)
    layer.__class__ = FusedLinear
    layer(randn(3, 6)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, randn(3, 6).sum(0).expand(5, -1))
    layer.weight.requires_grad_(False)
    layer.bias.grad = None
    layer(randn(3, 6)).sum().backward()
    assert layer.bias.grad.tolist() == [3] * 5
    assert not multiplied


def test_other_numbers_are_multiplied_as_before(multiplied: list[torch.Size]):
    weight = randn(5, 6)
    assert linear(randn(3, 6).double(), weight.double()).dtype == torch.float64
    assert linear(randn(3, 6).bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert linear(randn(3, 6).to("meta"), weight.to("meta")).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(randn(3, 6), weight).dtype == torch.bfloat16
    assert not multiplied


def test_small_weights_are_left_to_pytorch(multiplied: list[torch.Size], monkeypatch: pytest.MonkeyPatch):
    """A call and a new shape cost more there than the product; it is the weight that decides, however many rows there are."""
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "mkl_is_at_home", lambda: False)
    onednn = kernels._onednn
    monkeypatch.setattr(kernels, "_onednn", lambda *given: multiplied.append(given[1].shape) or onednn(*given))
    for rows in (1, 300):
        for width in (511, 512, 1024):
            linear(randn(rows, width), randn(1024, width))
    assert multiplied == [(1024, 512), (1024, 1024)] * 2


def test_a_graph_holds_no_input():
    """What a micro-batch takes in memory counts on it; forward mode would have it kept for its pass alone."""
    leaf = randn(3, 6).requires_grad_()
    x = leaf * 2
    y, held = linear(x, randn(5, 6)), weakref.ref(x)
    del x
    assert held() is None
    y.sum().backward()
    assert leaf.grad is not None


def test_rates_of_change():
    """Forward mode, along x, the weight and the bias, alone and together; and over reverse mode."""
    x, weight, bias = randn(3, 6), randn(5, 6), randn(5)
    rates = (randn(6, 3).T, randn(6, 5).T, randn(1, 5)[0])
    plain = torch.nn.functional.linear
    for function, at, along in (
        ((lambda f: f), (x, weight, bias), rates),
        ((lambda f: f), (x, weight), rates[:2]),
        ((lambda f: lambda x: f(x, weight, bias)), (x,), rates[:1]),
        ((lambda f: lambda weight: f(x, weight, bias)), (weight,), rates[1:2]),
        ((lambda f: lambda bias: f(x, weight, bias)), (bias,), rates[2:]),
    ):
        found, expected = (torch.func.jvp(function(f), at, along) for f in (linear, plain))
        torch.testing.assert_close(found, expected)
    found, expected = (torch.func.hessian(lambda x, f=f: f(x, weight, bias).pow(3).sum())(x) for f in (linear, plain))
    torch.testing.assert_close(found, expected)


def test_transforms_of_functions():
    assert kernels.onednn_is_right()  # as whoever has a model has asked
    weight, bias, x = randn(5, 6), randn(5), randn(4, 3, 6)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: linear(row, weight, bias)))(x)
    torch.testing.assert_close(jacobians, torch.func.vmap(torch.func.jacrev(lambda row: row @ weight.T + bias))(x))
    second = torch.func.vmap(lambda rows: linear(rows, weight, bias), in_dims=1)(x)
    torch.testing.assert_close(second, x.transpose(0, 1) @ weight.T + bias)
    weights = randn(4, 5, 6)
    torch.testing.assert_close(torch.func.vmap(linear)(x, weights), x @ weights.mT)
    torch.testing.assert_close(torch.func.vmap(linear, (None, 0))(x[0], weights), x[0] @ weights.mT)


def test_flop_are_counted():
    with FlopCounterMode(display=False) as counter:
        linear(randn(2, 3, 6), randn(5, 6), randn(5))
    assert counter.get_total_flops() == 2 * 2 * 3 * 6 * 5
    weight = randn(5, 6)
    with FlopCounterMode(display=False) as counter:
        torch.func.jvp(lambda x: linear(x, weight), (randn(2, 6),), (randn(2, 6),))
    assert counter.get_total_flops() == 2 * (2 * 2 * 6 * 5)  # of x and of its rate; the weight has none


@pytest.mark.parametrize("off", [1e-3, None])
def test_what_is_relied_on_was_tried(off: float | None, monkeypatch: pytest.MonkeyPatch):
    """One that rounds, as it may where the environment lets it, is not relied on; nor is one that is not there."""

    def other(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if off is None:
            raise NotImplementedError("mkldnn::_linear_pointwise")
        return torch.nn.functional.linear(x, weight, bias) * (1 + off)

    kernels.onednn_is_right.cache_clear()
    try:
        monkeypatch.setattr(kernels, "_onednn", other)
        assert torch.equal(linear(randn(3, 6), randn(5, 6)), torch.nn.functional.linear(randn(3, 6), randn(5, 6)))
        blocks = nn.ModuleList([nn.Linear(3, 4)])
        fuse_products(blocks)
        assert type(blocks[0]) is nn.Linear
    finally:
        kernels.onednn_is_right.cache_clear()


@pytest.mark.parametrize(
    ("maker", "mkl", "at_home"),
    [("GenuineIntel", True, True), ("AuthenticAMD", True, False), ("GenuineIntel", False, False)],
)
def test_mkl_multiplies_on_cpus_of_its_maker(
    maker: str, mkl: bool, at_home: bool, monkeypatch: pytest.MonkeyPatch, multiplied: list[torch.Size]
):
    monkeypatch.undo()
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    kernels.mkl_is_at_home.cache_clear()
    try:
        assert kernels.mkl_is_at_home() is at_home
        assert kernels.uses_onednn() is not at_home
        blocks = nn.ModuleList([nn.Linear(3, 4)])
        fuse_products(blocks)
        assert (type(blocks[0]) is nn.Linear) is at_home
    finally:
        kernels.mkl_is_at_home.cache_clear()


def test_a_bias_of_any_stride(multiplied: list[torch.Size]):
    x, weight = randn(5, 6), randn(4, 6)
    for bias in (randn(8)[::2], randn(1).expand(4)):
        torch.testing.assert_close(linear(x, weight, bias), x @ weight.T + bias)
    assert multiplied


def test_which_layers_are_exchanged():
    class Own(nn.Linear):
        pass

    layers = [nn.Linear(3, 4), Conv1D(4, 3), Own(3, 4), nn.Linear(3, 4).double(), nn.Linear(3, 4, device="meta")]
    blocks = nn.ModuleList([nn.Sequential(*layers)])
    fuse_products(blocks)
    assert [type(layer) for layer in layers] == [FusedLinear, FusedConv1D, Own, nn.Linear, FusedLinear]
    assert torch.equal(pickle.loads(pickle.dumps(layers[1])).weight, layers[1].weight)
    assert type(copy.deepcopy(layers[0])) is FusedLinear


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_scores_of_models(name: str, models: Models, multiplied: list[torch.Size], monkeypatch: pytest.MonkeyPatch):
    """A model's linear layers, there and back, and its head multiply so, and the matrices are those of float64."""
    split = SplitModel(build(FAMILIES[name], torch.float32))
    batch = oracles.inputs(split, [12, 9])
    asked = dict(**batch.padded(["right"] * 2, 12), layers=[0], estimator=Exact())
    multiplied.clear()
    scores = score_factors(split, **asked)
    layers = [layer for layer in split.blocks.modules() if type(layer) in (FusedLinear, FusedConv1D)]
    shapes = {tuple(layer.weight.shape) for layer in layers} | {(split.head.vocab_size, split.head.d_z)}
    assert layers
    assert set(multiplied) >= shapes | {shape[::-1] for shape in shapes}
    assert oracles.error(scores.matrices(0), score_factors(models(name), **asked).matrices(0)) < 1e-4
    monkeypatch.setattr(kernels, "_onednn_multiplies", lambda *_: False)
    assert oracles.error(scores.matrices(0), score_factors(split, **asked).matrices(0)) < 1e-4


def test_the_same_bits_again():
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    ids = torch.arange(1, 41).view(2, 20)
    first, second = (score_factors(split, ids, layers=[0], estimator=Sampled(3)).factors[0] for _ in range(2))
    assert torch.equal(first, second)
