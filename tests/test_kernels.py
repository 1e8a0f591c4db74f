"""What GPUs run in place of the engine's own way, with stand-ins for their kernels that a CPU has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from conftest import Models
from test_head import head
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fisher_ray import Exact, SplitModel, attention, kernels, score_factors, scores
from fisher_ray.kernels import add_outer, as_bfloat16, diagonal, flash_attends, on_tensor_cores, parts, product, softmax
from fisher_ray.sums import Sums

# Windows in every layer, soft-capping, sinks, position biases, values of another width than keys.
NEVER = {"mistral", "phi3", "starcoder2", "gemma2", "gpt_oss", "t5", "deepseek_v3"}

ATEN = torch.ops.aten


# ---- flash attention ---------------------------------------------------------------------------------------------------


def grouped(query: Tensor, *per_key_head: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in per_key_head]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The CPU's kernel, which has float64, takes the place of CUDA's; how often it was called."""
    called = {"forward": 0, "backward": 0}

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        called["forward"] += 1
        kernel = ATEN._scaled_dot_product_flash_attention_for_cpu
        found: tuple[Tensor, Tensor] = kernel(query, *grouped(query, key, value), 0.0, True, scale=1.0)
        return found

    def backward(
        grad: Tensor, scaled: Tensor, key: Tensor, value: Tensor, out: Tensor, log_total: Tensor, scale: float
    ) -> Tensor:
        called["backward"] += 1
        kernel = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
        found: Tensor = kernel(grad, scaled, *grouped(scaled, key, value), out, log_total, 0.0, True, scale=1.0)[0]
        return found * scale

    for module in (attention, kernels):
        monkeypatch.setattr(module, "flash_attention", forward)
        monkeypatch.setattr(module, "flash_query_gradient", backward)
    monkeypatch.setattr(attention, "flash_attends", lambda query, value: query.shape[-1] == value.shape[-1])
    return called


def test_flash_attention_equals_blocks(family: SplitModel, flash: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scores, "_FULL_PRODUCT", 1)  # one pass over all tokens, though they are few
    batch = oracles.inputs(family, [19, 13, 7])
    asked = dict(**batch.padded(["right"] * 3, 19), layers=[0, 2], estimator=Exact())
    fused = score_factors(family, **asked)
    never = family.model.config.model_type in NEVER
    assert (flash["forward"] == 0, flash["backward"] == 0) == (never, never)
    monkeypatch.setattr(attention, "flash_attends", lambda query, value: False)
    blocks = score_factors(family, **asked)
    torch.testing.assert_close(fused.entropy, blocks.entropy, rtol=0, atol=1e-12)
    for layer in (0, 2):
        assert oracles.error(fused.activations[layer], blocks.activations[layer]) < 1e-12
        assert oracles.error(fused.matrices(layer), blocks.matrices(layer)) < 1e-12


def test_products_with_jacobians_know_flash_attention(
    flash: dict[str, int], models: Models, monkeypatch: pytest.MonkeyPatch
):
    """Its backward pass cannot be differentiated, so that of the blocks is."""
    split = models("llama")
    flash.update(forward=0, backward=0)  # of its check
    ids, at = torch.arange(1, 15)[None], torch.tensor([2, 9, 13])
    directions = torch.randn(3, split.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = split.tape(ids, {}, [1], at).push(1, directions)
    assert flash["forward"] > 0 == flash["backward"]
    monkeypatch.setattr(attention, "flash_attends", lambda query, value: False)
    assert oracles.error(fused, split.tape(ids, {}, [1], at).push(1, directions)) < 1e-12


def test_what_flash_attention_is_tried_with(flash: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    """The trial accepts a kernel that is right, and refuses one that is not or that there is not."""
    tried, cpu = kernels._flash_is_right.__wrapped__, torch.device("cpu")
    for width in (8, 64, 256):
        assert tried(cpu, torch.bfloat16, width) and tried(cpu, torch.float16, width)
    right = kernels.flash_attention
    for wrong in (
        lambda *given: (right(*given)[0], right(*given)[1] + 0.1),
        lambda *given: (right(*given)[0], right(*given)[1][..., None]),
        lambda query, key, value: right(query * 1.1, key, value),
    ):
        monkeypatch.setattr(kernels, "flash_attention", wrong)
        assert not tried(cpu, torch.bfloat16, 64)
    monkeypatch.setattr(kernels, "flash_attention", right)
    monkeypatch.setattr(kernels, "flash_query_gradient", lambda grad, *rest: grad)
    assert not tried(cpu, torch.bfloat16, 64)
    monkeypatch.undo()
    assert not tried(cpu, torch.bfloat16, 64)  # CUDA's kernel takes no tensors of a CPU


def test_kernels_of_cuda_take_what_they_are_given():
    """As far as shapes and signatures go: torch knows those of its kernels without a GPU."""
    with FakeTensorMode():
        query = torch.empty(2, 4, 200, 64, dtype=torch.bfloat16, device="cuda")
        key, value = (torch.empty(2, 2, 200, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out, log_total = kernels.flash_attention(query, key, value)
        assert (out.shape, log_total.shape, log_total.dtype) == (query.shape, (2, 4, 200), torch.float32)
        rows, weight = (torch.empty(64, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        assert kernels._multiplied(rows, weight).dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "width", "value_width", "expected"),
    [
        (torch.bfloat16, 64, 64, True), (torch.float16, 256, 256, True), (torch.float32, 64, 64, False),
        (torch.bfloat16, 60, 60, False), (torch.bfloat16, 264, 264, False), (torch.bfloat16, 192, 128, False),
    ],
)  # fmt: skip
def test_which_attention_is_fused(
    dtype: torch.dtype, width: int, value_width: int, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    query, value = torch.empty(1, 1, 1, width, dtype=dtype), torch.empty(1, 1, 1, value_width, dtype=dtype)
    assert not flash_attends(query, value)  # nothing on a CPU
    monkeypatch.setattr(kernels, "_DEVICES", ("cpu",))
    assert not flash_attends(query, value)  # tried, and not right
    tried = []
    monkeypatch.setattr(kernels, "_flash_is_right", lambda *given: not tried.append(given))
    assert flash_attends(query, value) == expected
    assert tried == [(query.device, dtype, width)] * expected


# ---- fused passes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stand-ins for Triton's kernels, which a CPU has not."""
    stand_in = SimpleNamespace(softmax=kernels._softmax, diagonal=kernels._diagonal)
    monkeypatch.setattr(kernels, "_fused", lambda: stand_in)
    monkeypatch.setattr(kernels, "_DEVICES", ("cpu",))
    for trial in (kernels._softmax_is_right, kernels._diagonal_is_right):
        trial.cache_clear()
    yield stand_in
    for trial in (kernels._softmax_is_right, kernels._diagonal_is_right):
        trial.cache_clear()


def logits(dtype: torch.dtype) -> Tensor:
    return 10 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_what_is_summed_over_the_vocabulary():
    x = logits(torch.float64)
    x[1, 4:] = -torch.inf
    found = softmax(x)
    below = x - x.max(-1, keepdim=True).values
    rest = below.exp().scatter(1, x.argmax(-1, keepdim=True), 0.0)
    assert torch.equal(found.highest, x.max(-1).values) and torch.equal(found.top, x.argmax(-1))
    torch.testing.assert_close(found.tail, rest.sum(-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.moment, (rest * below.clamp_min(-1e30)).sum(-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.prob, x.softmax(-1), rtol=1e-13, atol=1e-300)
    x[2, 3] = torch.nan
    found = softmax(x)
    assert found.tail.isnan().nonzero().tolist() == found.prob.isnan().all(1).nonzero().tolist() == [[2]]


def test_a_softmax_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch):
    """Rows that end before they start anew, as products write them; a last block with fewer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 112, generator=generator, dtype=torch.float64).mul_(5)[:, :100]
    whole = kernels._softmax(x)
    monkeypatch.setattr(kernels, "SOFTMAX_BLOCK", 299)  # two rows
    blocks = kernels._softmax(x)
    for got, expected in zip(blocks, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(blocks.prob, x.softmax(-1), rtol=1e-13, atol=0)
    assert blocks.prob.stride() == (112, 1)


def test_a_fused_softmax_is_taken_where_it_is_right(fused: SimpleNamespace):
    tried = kernels._softmax_is_right.__wrapped__
    cpu = torch.device("cpu")
    assert tried(cpu)
    taken = []
    fused.softmax = lambda x: taken.append(x) or kernels._softmax(x)
    softmax(logits(torch.float64))
    assert taken == []  # float32 alone
    x = logits(torch.float32)
    found = softmax(x)
    assert taken[-1] is x and all(torch.equal(a, b) for a, b in zip(found, kernels._softmax(x), strict=True))
    for i, wrong in enumerate((1.001, 0, 1.001, 1.001, 1.001)):
        fused.softmax = lambda x, i=i, wrong=wrong: tuple(
            y * wrong if i == j else y for j, y in enumerate(kernels._softmax(x))
        )
        assert not tried(cpu), kernels.Softmax._fields[i]
    fused.softmax = None  # there is none
    with pytest.warns(UserWarning, match=r"the fused softmax cannot run here.*slower: TypeError"):
        assert not tried(cpu)
    fused.softmax = lambda x: short_of_memory()
    with pytest.raises(torch.OutOfMemoryError):
        tried(cpu)


def short_of_memory() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_gradients_of_a_position_s_own_key_and_value():
    """Against autograd: ordinary attention whose keys and values have no gradient elsewhere."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, heads, 9, 8) for heads in (4, 2, 2, 4))
    query, key, value, grad = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    key, value = key.requires_grad_(), value.requires_grad_()
    k, v = grouped(query, key, value)
    own = torch.eye(9, dtype=torch.float64)
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    scores = (query @ (k.detach()).mT) * (1 - own) + (query @ k.mT) * own
    probs = scores.masked_fill(later, -torch.inf).softmax(-1)
    out = (probs * (1 - own)) @ v.detach() + (probs * own) @ v
    expected = torch.autograd.grad(out, (key, value), grad)
    log_total = scores.masked_fill(later, -torch.inf).logsumexp(-1)
    found = diagonal(query, key.detach(), value.detach(), grad, out.detach(), log_total.detach())
    for a, b in zip(found, expected, strict=True):
        assert oracles.error(a, b) < 1e-14


def test_a_fused_diagonal_is_taken_where_it_is_right(fused: SimpleNamespace):
    tried, cpu = kernels._diagonal_is_right.__wrapped__, torch.device("cpu")
    assert tried(cpu, torch.bfloat16, 64) and tried(cpu, torch.float16, 24)
    taken = []
    fused.diagonal = lambda *given: taken.append(given) or kernels._diagonal(*given)
    given = [torch.ones(1, heads, 3, 8, dtype=torch.bfloat16) for heads in (4, 2, 2, 4, 4)]
    diagonal(*given, torch.full((1, 4, 3), 9.0))
    assert len(taken) == 2 and taken[1][0] is given[0]  # the trial's, and these
    for i in range(2):
        fused.diagonal = lambda *given, i=i: tuple(
            x * 1.1 if i == j else x for j, x in enumerate(kernels._diagonal(*given))
        )
        assert not tried(cpu, torch.bfloat16, 64)
    fused.diagonal = lambda *given: tuple(x[:1] for x in kernels._diagonal(*given))
    assert not tried(cpu, torch.bfloat16, 64)


# ---- products on tensor cores --------------------------------------------------------------------------------------------


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """Exact products of bfloat16 numbers and float32 sums, as tensor cores have; their shapes."""
    shapes = []

    def multiplied(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        shapes.append((*a.shape, b.shape[1]))
        return a.float() @ b.float()

    monkeypatch.setattr(kernels, "_multiplied", multiplied)
    monkeypatch.setattr(kernels, "_DEVICES", ("cpu",))
    kernels._add_in_float32.cache_clear()
    assert kernels._have_cores(torch.device("cpu"))
    shapes.clear()
    yield shapes
    kernels._add_in_float32.cache_clear()


def test_two_parts_are_nearly_all_of_a_number():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator) * 10 ** torch.empty(1000).uniform_(-25, 25, generator=generator)
    x[:4] = torch.tensor([0.0, 1 + 2**-7, 1 + 2**-15, -1 / 3])
    found = parts(x[:, None])[..., 0]
    assert found.dtype == torch.bfloat16
    left = (found.double().sum(0) - x.double()).abs()
    assert (left[:3] == 0).all() and (left <= 2**-17 * x.double().abs()).all()
    assert 2**-20 < float(left[4:].norm() / x[4:].double().norm()) < 2**-18


def test_products_keep_most_digits_of_float32(tensor_cores: list[tuple[int, int, int]]):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 5, 300, generator=generator)
    half = torch.randn(300, 7, generator=generator).bfloat16()
    found = product(wide, half)
    assert found.dtype == torch.float32 and found.shape == (2, 5, 7)
    assert oracles.error(found, wide.double() @ half.double()) < 4e-6
    assert tensor_cores.pop() == (20, 300, 7)
    assert oracles.error(product(wide.bfloat16(), half), wide.bfloat16().double() @ half.double()) < 1e-6
    assert tensor_cores.pop() == (10, 300, 7)
    assert on_tensor_cores(wide, half) and on_tensor_cores(half, half)
    assert not on_tensor_cores(wide.double(), half)
    assert not on_tensor_cores(wide, half.float()) and not on_tensor_cores(wide.half(), half.half())


def test_a_trace_of_next_to_nothing_is_none(tensor_cores: list[tuple[int, int, int]]):
    """The square of its root's reciprocal is no float32 number, and one position must not make the sum NaN."""
    factors = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    factors[1] *= 2.0**-70
    sums = Sums([0], 8, [""], "cpu")
    sums.add(0, factors, torch.ones(3, 1, 8), None, torch.ones(3))
    packed = sums.packed(0).groups[""]
    assert packed.traced == 2
    assert math.isfinite(packed.normalised.trace)


def test_a_symmetric_product_in_strips():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 500, generator=generator, dtype=torch.float64)
    weights = torch.rand(30, 1, generator=generator, dtype=torch.float64)
    total = torch.eye(500, dtype=torch.float64)
    add_outer(total, rows * weights, rows, 3)
    expected = torch.eye(500) + rows.mT @ (rows * weights) / 3
    torch.testing.assert_close(total.triu(), expected.triu(), rtol=1e-13, atol=1e-13)
    assert (total[192:384, :192] == 0).all()  # what is left out


def test_a_cpu_multiplies_in_float32():
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    assert not on_tensor_cores(half, half) and as_bfloat16(half.float()).dtype == torch.float32


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_heads_on_tensor_cores(variant: str, tensor_cores: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch):
    """z times W once; p times W, and rows of float32 times W, in two parts each."""
    half = head(variant, 2500, 12, torch.bfloat16)
    z = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)).bfloat16()
    tokens = torch.arange(2500).expand(3, -1)

    def found() -> dict[str, Tensor]:
        prediction = half.predict(z)
        tangents = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(3))
        return {
            "logits": prediction.logits, "scores": prediction.scores(tokens), "energies": prediction.energies(),
            "variance": prediction.variance(tangents),
        }  # fmt: skip

    got = found()
    assert tensor_cores == [(3, 12, 2500), (6, 2500, 12), (6, 12, 2500), (12, 12, 2500)]
    monkeypatch.setattr(kernels, "_DEVICES", ())
    for name, expected in found().items():
        assert oracles.error(got[name], expected) < 1e-5, name
    assert len(tensor_cores) == 4


@pytest.mark.parametrize("sketch", [None, 4])
def test_sums_on_tensor_cores(sketch: int | None, tensor_cores: list[tuple[int, int, int]]):
    """Only of numbers that are bfloat16's: gradients of such a model, not those of another."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(50, 3, 16, generator=generator).bfloat16().float()
    factors[4] = 0.0
    streams = torch.randn(50, 1, 16, generator=generator).bfloat16().float()
    off = factors * (1 + 2**-20)
    for given, times in ((factors, 3), (off, 1)):
        tensor_cores.clear()
        sums = Sums([0], 16, sketch=sketch)
        sums.add(0, given, streams)
        found = sums.packed(0).groups[""]
        # What is scaled is a sum of two, row by row.
        shapes = [(16, 150, 16), (16, 300, 16), (16, 50, 16)] if times == 3 else [(16, 50, 16)]
        assert tensor_cores == (shapes if sketch is None else [])
        g, h = given.double(), streams.double()
        trace = g.square().sum((1, 2), keepdim=True)
        unit = g / trace.sqrt().where(trace > 0, 1)
        for name, rows in (("fisher", g), ("normalised", unit), ("second_moment", h)):
            rows = rows.flatten(0, 1)
            if sketch is None:
                assert oracles.error(torch.from_numpy(found.square(name)), rows.mT @ rows) < 4e-6, name
            else:
                assert getattr(found, name).trace == pytest.approx(float(rows.square().sum()), rel=1e-6)


def test_what_tensor_cores_are_tried_with(monkeypatch: pytest.MonkeyPatch):
    """Sums in float32 are accepted, sums of fewer digits and products that there are not are refused."""
    tried, cpu = kernels._add_in_float32.__wrapped__, torch.device("cpu")
    assert not tried(cpu)  # which has no product of another dtype than its factors
    monkeypatch.setattr(kernels, "_multiplied", lambda a, b: a.float() @ b.float())
    assert tried(cpu)
    monkeypatch.setattr(kernels, "_multiplied", lambda a, b: (a @ b).float())
    assert not tried(cpu)
