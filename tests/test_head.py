"""The head's pull-back: scores and exact second moments at z, in float64 against autograd and in float32 when p is peaked."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import Models
from families import FAMILIES, build
from oracles import error, fisher
from torch import Tensor

from fisher_ray import Deflated, Exact, ModelError, Sampled, SplitModel
from fisher_ray.draws import Draws
from fisher_ray.estimators import Estimator
from fisher_ray.footprint import LiveBytes
from fisher_ray.head import Head, Prediction, divergence, psd_factor

# Without the mean row .8 to 2; with the slope of soft-capping left out .002 to .1.
TIGHT = 1e-12
# With only the first chunk of the vocabulary .2.
MOMENT = 1e-10
# Measured below 3e-6; what the naive forms give is tabulated below.
FLOAT32 = 2e-5

LIKELY = 3
VARIANTS = ["plain", "bias", "scale", "softcap", "everything"]


def head(variant: str, vocab_size: int, d_z: int, dtype: torch.dtype = torch.float64, common: float = 0.0) -> Head:
    """Random rows around a common mean ``common`` times their own size."""
    generator = torch.Generator().manual_seed(vocab_size)
    normal = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(vocab_size, d_z, **normal) * 0.3
    weight[LIKELY] *= 3  # so that its probability can come close to 1 under soft-capping, too
    plain = Head((weight + common * 0.3 * torch.randn(d_z, **normal)).to(dtype))
    everything = replace(plain, bias=torch.randn(vocab_size, **normal).to(dtype), scale=0.4, softcap=30.0)
    kept = {"plain": (), "bias": ("bias",), "scale": ("scale",), "softcap": ("softcap",)}.get(variant)
    return everything if kept is None else replace(plain, **{name: getattr(everything, name) for name in kept})


def logits(head: Head, z: Tensor) -> Tensor:
    """The definition, in float64."""
    affine = z.double() @ head.weight.double().T
    if head.bias is not None:
        affine = affine + head.bias.double()
    affine = affine * head.scale
    return affine if head.softcap is None else head.softcap * (affine / head.softcap).tanh()


def truth(head: Head, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p [n, vocab_size] and grad_z log p(y) [n, vocab_size, d_z] by autograd, in float64."""
    n = len(z)
    copies = z.double().repeat_interleave(head.vocab_size, 0).requires_grad_()
    with torch.enable_grad():
        log_prob = logits(head, copies).log_softmax(-1)
        own = log_prob.view(n, head.vocab_size, head.vocab_size).diagonal(dim1=1, dim2=2)
        (grads,) = torch.autograd.grad(own.sum(), copies)
    return own.detach(), grads.view(n, head.vocab_size, head.d_z)


def moments(log_prob: Tensor, scores: Tensor) -> Tensor:
    """M = sum_y p(y) c_y c_y^T."""
    return torch.stack([fisher(p, c) for p, c in zip(log_prob.exp(), scores, strict=True)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("vocab_size", "d_z"), [(50, 12), (9, 12), (2500, 6)])  # 2,500 rows are two chunks
def test_prediction_equals_autograd(variant: str, vocab_size: int, d_z: int):
    head_ = head(variant, vocab_size, d_z)
    z = torch.randn(3, d_z, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    log_prob, scores = truth(head_, z)
    prediction = head_.predict(z)
    everything = torch.arange(vocab_size).expand(3, -1)

    torch.testing.assert_close(prediction.logits, logits(head_, z), rtol=TIGHT, atol=TIGHT)
    torch.testing.assert_close(prediction.prob, log_prob.exp(), rtol=TIGHT, atol=0)
    torch.testing.assert_close(prediction.tail, 1 - log_prob.exp().max(-1).values, rtol=1e-10, atol=0)
    torch.testing.assert_close(prediction.entropy, -(log_prob.exp() * log_prob).sum(-1), rtol=TIGHT, atol=0)
    token = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    torch.testing.assert_close(prediction.log_prob(token), log_prob[range(3), token], rtol=TIGHT, atol=TIGHT)

    assert error(prediction.scores(everything), scores) < TIGHT
    assert (log_prob.exp()[..., None] * prediction.scores(everything)).sum(1).abs().max() < TIGHT  # mean score zero
    factor = prediction.second_moment_factor()
    assert factor.shape == (3, min(vocab_size, d_z), d_z)
    assert error(factor.mT @ factor, moments(log_prob, scores)) < MOMENT


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_moment_of_several_strips(variant: str):
    """Summed over all tokens, and over those that a tolerance leaves, more than the matrix is wide."""
    head_ = head(variant, 450, 400)
    z = torch.randn(2, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4
    expected = moments(*truth(head_, z))
    prediction = head_.predict(z)
    factor = prediction.second_moment_factor()
    assert error(factor.mT @ factor, expected) < MOMENT
    leading, captured = prediction.leading_factor(1e-9)
    assert error(leading.mT @ leading, expected) < 1e-8
    left = 1 - leading.square().sum((1, 2)) / expected.diagonal(0, 1, 2).sum(1)
    assert (left < 1e-9).all() and (captured > 1 - 1e-9).all()


def test_a_constant_on_all_logits_changes_nothing():
    plain = head("plain", 50, 12)
    z = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shifted = replace(plain, bias=torch.full((50,), 7.5, dtype=torch.float64))
    everything = torch.arange(50).expand(3, -1)
    one, other = plain.predict(z), shifted.predict(z)
    assert error(other.scores(everything), one.scores(everything)) < TIGHT
    assert error(other.second_moment_factor(), one.second_moment_factor()) < TIGHT
    torch.testing.assert_close(other.entropy, one.entropy, rtol=TIGHT, atol=0)


@pytest.mark.parametrize("vocab_size", [50, 9])
def test_a_forbidden_token_contributes_nothing(vocab_size: int):
    """A logit of minus infinity, as models have for padded vocabulary entries."""
    head_ = head("bias", vocab_size, 12)
    head_.bias[4] = -torch.inf
    z = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keep = [y for y in range(vocab_size) if y != 4]
    fewer = Head(head_.weight[keep], head_.bias[keep])
    got, expected = head_.predict(z), fewer.predict(z)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=TIGHT, atol=0)
    factor, factor_without = got.second_moment_factor(), expected.second_moment_factor()
    assert error(factor.mT @ factor, factor_without.mT @ factor_without) < TIGHT


def peaked(head_: Head, target: float) -> Tensor:
    """z along which one token takes probability ``target``, by bisection in float64."""
    mean = head_.weight.double().mean(0)
    direction = head_.weight[LIKELY].double() - mean
    if head_.softcap is not None:  # along the common mean all logits would run into the cap together
        direction -= (direction @ mean) / (mean @ mean) * mean

    def likeliest(length: float) -> float:
        return float(logits(head_, length * direction[None]).softmax(-1).max())

    high = 1e-3  # from below: far out a soft-capped head is flat again
    while likeliest(high) < target:
        high *= 1.05
    low = high / 1.05
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if likeliest(middle) < target else (low, middle)
    return (high * direction)[None].to(head_.weight.dtype)


COMMON = 10.0  # as in trained models, rows lie far closer to each other than to zero


# Largest relative error in float32, 600 tokens, heads without soft-capping:
#
#     p_max                                       .9         .999       .99999
#     scores, this package                        1e-6       2e-6       2e-6
#     M, this package                             6e-7       1e-6       8e-7
#     scores, w_y - W^T p                         2e-5       3e-3       1.6
#     M, W^T diag(p) W - m m^T                    1e-4       1e-2       9
#     smallest eigenvalue / trace of the latter   1e-3      -3e-3      -1e-2
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", [0.9, 0.999, 0.99999])
@pytest.mark.parametrize("vocab_size", [600, 24])
def test_float32_keeps_its_digits_when_p_is_peaked(variant: str, target: float, vocab_size: int):
    head_ = head(variant, vocab_size, 32, torch.float32, common=COMMON)
    z = peaked(head_, target)
    log_prob, scores = truth(head_, z)  # of the rounded rows and z: what is measured is the arithmetic
    assert abs(log_prob.exp().max() - target) < 0.1 * (1 - target)
    prediction = head_.predict(z)
    got = prediction.scores(torch.arange(vocab_size)[None])
    assert got.dtype == torch.float32
    errors = (got[0].double() - scores[0]).norm(dim=-1) / scores[0].norm(dim=-1)
    assert errors.max() < FLOAT32
    factor = prediction.second_moment_factor()
    assert factor.dtype == torch.float32
    matrix = factor.mT @ factor
    assert error(matrix, moments(log_prob, scores)) < FLOAT32
    eigenvalues = torch.linalg.eigvalsh(matrix.double())
    assert eigenvalues.min() > -1e-6 * eigenvalues.sum()
    torch.testing.assert_close(prediction.tail.double(), 1 - log_prob.exp().max(-1).values, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("gap", [20, 40, 60, 80, 92, 96, 100, 110])
@pytest.mark.parametrize("estimator", [Exact(), Exact(0.01), Deflated(12, 4)], ids=repr)
def test_the_likeliest_token_may_be_far_ahead(gap: float, estimator: Estimator):
    """Where what the others give is smaller than float32 has digits for, up to 80 nats with nearly all of them."""
    generator = torch.Generator().manual_seed(0)
    weight, z = torch.randn(300, 32, generator=generator), torch.randn(1, 32, generator=generator)
    logits = z @ weight.T
    first, second = logits.topk(2).values[0]
    one = torch.nn.functional.one_hot(logits.argmax(-1), 300)
    level = logits + (second - first) * one
    zeros = torch.zeros(1, dtype=torch.long)
    draws = Draws(zeros[:, None].expand(1, 2), zeros, zeros, "score")
    usual, found = (estimator.cotangents(Prediction(Head(weight), level + by * one), draws) for by in (20, gap))
    rows = found.rows
    assert rows.isfinite().all()
    if gap <= 80:  # the others are as they were among themselves
        torch.testing.assert_close(found.captured_share, usual.captured_share, rtol=0, atol=1e-3)
    if gap <= 80 and estimator == Exact():
        double = Prediction(Head(weight.double()), (level + gap * one).double()).second_moment_factor()
        rows = rows[0].double()
        assert error(rows.mT @ rows, double[0].mT @ double[0]) < 1e-4


@pytest.mark.parametrize("variant", ["plain", "softcap"])
def test_p_outlives_a_product_that_fails(variant: str, monkeypatch: pytest.MonkeyPatch):
    """Its top entry is another number meanwhile; whoever asks again with more memory had gone on with that."""
    head_ = head(variant, 50, 12)
    z = torch.randn(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prediction, expected = head_.predict(z), head_.predict(z)
    every = torch.arange(50).expand(2, -1)
    with monkeypatch.context() as patch:
        patch.setattr(Head, "weighted_rows", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
        with pytest.raises(torch.OutOfMemoryError):
            prediction.scores(every)
    assert torch.equal(prediction.prob, expected.prob)
    assert torch.equal(prediction.scores(every), expected.scores(every))


def test_rows_that_change_are_squared_again():
    """Also where the change is not counted: adapters are merged through .data."""
    head_ = head("plain", 50, 12)
    first = head_.squared_rows()
    head_.weight.data.mul_(2)
    torch.testing.assert_close(head_.squared_rows(), 4 * first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_used_as_float32(dtype: torch.dtype):
    """Weights in half precision are exact float32 numbers, so nothing but the rounding of z is lost."""
    half = head("everything", 2500, 12, dtype)
    full = replace(half, weight=half.weight.float(), bias=half.bias.float())
    z = torch.randn(2, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    got, expected = half.predict(z), full.predict(z.float())
    assert got.logits.dtype == torch.float32
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    everything = torch.arange(2500).expand(2, -1)
    torch.testing.assert_close(got.scores(everything), expected.scores(everything), rtol=1e-4, atol=1e-6)
    one, other = got.second_moment_factor(), expected.second_moment_factor()
    assert error(one.mT @ one, other.mT @ other) < 1e-5


def test_psd_factor():
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    low_rank = thin.mT @ thin
    for matrix in (low_rank, low_rank + torch.eye(5), low_rank * 1e-30, torch.zeros(5, 5)):
        factor = psd_factor(matrix)
        torch.testing.assert_close(factor.mT @ factor, matrix.double(), rtol=0, atol=1e-13 * float(matrix.trace()))
    # Rounding of a float32 sum makes eigenvalues of -1e-7: those are absorbed.
    rounded = low_rank.float().double() - 1e-7 * low_rank.trace() * torch.eye(5)
    factor = psd_factor(rounded)
    assert (factor.mT @ factor - rounded).norm() < 1e-5 * low_rank.trace()
    with pytest.raises(ValueError, match="expected a positive semi-definite matrix"):
        psd_factor(torch.diag(torch.tensor([1.0, 1.0, -0.1])))
    assert not psd_factor(torch.full((3, 3), torch.nan)).isfinite().any()


def test_heads_of_models(models: Models):
    """Scale, soft-capping and bias are found where each family keeps them."""
    assert models("phi").head.bias is not None
    assert models("llama").head.bias is None
    assert models("cohere").head.scale == 0.3
    assert models("granite").head.scale == pytest.approx(1 / 3)
    assert models("t5").head.scale == pytest.approx(24**-0.5)
    assert models("gemma2").head.softcap == 3.0
    assert models("gpt2").head.weight is models("gpt2").model.transformer.wte.weight  # tied
    assert models("llama").head.weight is not models("llama").model.model.embed_tokens.weight  # untied
    assert models("opt").head.d_z == 16  # a projection between d_model and z
    assert models("opt").d_model == 24


ALTERED = {
    "scaled": lambda logits: 2 * logits,
    "soft-capped": lambda logits: 4 * (logits / 4).tanh(),
    "shifted by token": lambda logits: logits + torch.linspace(0, 1, logits.shape[-1]).to(logits),
    "reversed": lambda logits: logits.flip(-1),
}


@pytest.mark.parametrize("change", ALTERED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", ["own_position", "per_position"])
def test_an_altered_head_is_refused(change: str, dtype: torch.dtype, gradients: str, monkeypatch: pytest.MonkeyPatch):
    model = build(FAMILIES["llama"], dtype)
    SplitModel(model, gradients=gradients)  # as it is, it passes
    forward = model.forward

    def altered(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = ALTERED[change](out.logits)
        return out

    monkeypatch.setattr(model, "forward", altered)
    with pytest.raises(ModelError, match="LlamaForCausalLM has an output head this package does not know") as refusal:
        SplitModel(model, gradients=gradients)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("estimator", "n", "softcap"),
    [
        (Exact(), 4, None),
        (Exact(), 4, 30.0),
        (Exact(0.1), 4, None),
        (Sampled(1), 4, None),
        (Sampled(1), 64, None),
        (Sampled(1), 64, 30.0),
        (Sampled(8, top_p=0.9), 4, None),
        (Sampled(8, temperature=0.7), 4, None),
        (Sampled(1024), 4, None),
        (Deflated(24, 8), 4, None),
        (Deflated(24, 8), 4, 30.0),
        (Deflated(0, 512), 4, None),
    ],
    ids=repr,
)
def test_what_an_estimator_holds(estimator: Estimator, n: int, softcap: float | None):
    """Of a vocabulary that is large beside all else; a softmax takes ten rows of it together."""
    vocab_size, d_z = 200_000, 4
    weight, z = (torch.randn(rows, d_z, dtype=torch.float32) for rows in (vocab_size, n))
    zeros = torch.zeros(n, dtype=torch.long)
    with LiveBytes([weight]) as live:
        head = Head(weight, softcap=softcap)
        estimator.cotangents(head.predict(z), Draws(zeros[:, None].expand(n, 2), zeros, zeros, "score"))
    expected = 4 * estimator.held(n, head)
    assert 0.75 * expected < live.most < 1.05 * expected


@pytest.mark.parametrize("estimator", [Deflated(200, 8), Exact(0.05), Deflated(4, 4)], ids=repr)
def test_what_decompositions_hold(estimator: Estimator):
    """Where the matrices of few positions are larger than their rows and than the vocabulary, or their rows are many chunks."""
    n = 2_000 if estimator == Deflated(4, 4) else 8
    weight, z = torch.randn(2_000, 256, dtype=torch.float32) / 16, torch.randn(n, 256, dtype=torch.float32)
    zeros = torch.zeros(n, dtype=torch.long)
    with LiveBytes([weight]) as live:
        head = Head(weight)
        found = estimator.cotangents(head.predict(z), Draws(zeros[:, None].expand(n, 2), zeros, zeros, "score"))
    assert live.most - found.rows.nbytes < 1.05 * 4 * estimator.held(n, head)


def test_the_divergence_has_what_p_gives_nothing_to():
    log_q = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    for unlikely in (-300.0, -800.0):  # exp(-800) is none
        log_p = torch.tensor([0.0, unlikely], dtype=torch.float64)
        assert divergence(log_p, log_q) == pytest.approx(-math.log(0.7), rel=1e-12)
