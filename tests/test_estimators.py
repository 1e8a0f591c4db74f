"""Exact and sampled Fisher matrices of whole models: the full-vocabulary sum, the laws, the distribution of samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
import transformers as tf
from conftest import Models
from families import FAMILIES, build
from torch import Tensor, nn

from fisher_ray import (
    Deflated,
    Exact,
    Sampled,
    Scores,
    SplitModel,
    UpperLayersModel,
    fim_expected_gradient_outerproduct,
    score_factors,
)
from fisher_ray.estimators import tempered
from fisher_ray.head import Head, Prediction

MATRICES = 1e-10  # one layer off, or in other coordinates, .1 and more
# Standard errors; a |z| this large comes once in 15,000 entries, and seeds are fixed.
Z = 4.0

MODELS = ["gpt2", "llama", "gemma2", "gemma3", "mistral", "opt", "cohere", "t5"]

pytestmark = pytest.mark.usefixtures("float64_throughout")


def narrow_vocabulary() -> SplitModel:
    """Fewer tokens than dimensions: the factors are then the vocabulary's own scores."""
    return SplitModel(
        build(lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=16, vocab_size=17)))
    )


def exact(split: SplitModel, batch: oracles.Inputs, layers: list[int], **arguments) -> Scores:
    width = max(map(len, batch.rows))
    return score_factors(split, **batch.padded(["right"], width), layers=layers, estimator=Exact(), **arguments)


# ---- exact: V > d and V < d ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS, "narrow vocabulary"])
def test_exact_equals_the_sum_over_the_vocabulary(name: str, models: Models):
    split = narrow_vocabulary() if name == "narrow vocabulary" else models(name)
    batch = oracles.inputs(split, [12, 9])
    layers = list(range(split.num_layers + 1))
    scores = exact(split, batch, layers)
    rank = min(split.head.vocab_size, split.head.d_z)
    for i, position in [(0, 0), (0, 6), (0, 11), (1, 1), (1, 8)]:
        truth = oracles.one_position(split, batch.rows[i], position, layers, batch.encoder_of(i))
        n = oracles.row_index(scores, i, position)
        for layer in layers:
            assert scores.factors[layer].shape == (21, rank, split.d_model)
            matrix = scores.matrices(layer)[n]
            assert oracles.error(matrix, truth.matrix(layer)) < MATRICES
            # The expectation of the scores is zero: a matrix with m m^T left in it would be another one.
            assert (truth.prob @ truth.scores[layer]).norm() < 1e-12 * truth.scores[layer].norm()
    assert (scores.kept_mass == 1).all()
    for layer in layers:
        matrices = scores.matrices(layer)
        assert torch.equal(matrices, matrices.mT)
        eigenvalues = torch.linalg.eigvalsh(matrices)
        assert (eigenvalues.min(-1).values > -1e-13 * eigenvalues.sum(-1)).all()


NORMS = {"gpt2": "ln_f", "llama": "norm", "cohere": "norm", "t5": "final_layer_norm"}


@pytest.mark.parametrize("name", NORMS)
def test_closed_form_at_the_last_layer(name: str, models: Models):
    """F = J^T M J with M = W^T (diag p - p p^T) W scaled, and J of the final norm alone."""
    split = models(name)
    batch = oracles.inputs(split, [7])
    scores = exact(split, batch, [split.num_layers])
    norm: nn.Module = getattr(split.decoder, NORMS[name])
    rows = split.model.get_output_embeddings().weight * {"cohere": 0.3, "t5": 24**-0.5}.get(name, 1.0)
    for n in range(7):
        h = scores.activations[split.num_layers][n, 0]
        jacobian = torch.func.jacrev(norm)(h)
        p = (rows @ norm(h)).softmax(-1)
        moment = rows.T @ (p.diag() - torch.outer(p, p)) @ rows
        assert oracles.error(scores.matrices(split.num_layers)[n], jacobian.T @ moment @ jacobian) < MATRICES


# ---- laws ------------------------------------------------------------------------------------------------------------


def test_a_constant_on_all_logits_changes_nothing(models: Models, monkeypatch: pytest.MonkeyPatch):
    split = models("phi")  # its head has a bias
    batch = oracles.inputs(split, [9])
    before = exact(split, batch, [1])
    monkeypatch.setattr(split, "head", replace(split.head, bias=split.head.bias + 3.7))
    after = exact(split, batch, [1])
    assert oracles.error(after.matrices(1), before.matrices(1)) < MATRICES
    torch.testing.assert_close(after.entropy, before.entropy, rtol=1e-12, atol=0)
    monkeypatch.setattr(split, "head", replace(split.head, bias=split.head.bias * 2))
    assert oracles.error(exact(split, batch, [1]).matrices(1), before.matrices(1)) > 1e-2


class Coordinates(nn.Module):
    """A block that takes and gives the stream in other coordinates: h' = A^-1 h."""

    def __init__(self, block: nn.Module, a: Tensor):
        super().__init__()
        self.block, self.a = block, a

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        out = self.block(hidden_states @ self.a.T, *args, **kwargs)
        inverse = torch.linalg.inv(self.a).T
        return (out[0] @ inverse, *out[1:]) if isinstance(out, tuple) else out @ inverse


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_matrices_change_as_a_metric_does_under_new_coordinates(name: str):
    """h = A h' gives F' = A^T F A at every layer."""
    # Both built here: the frequencies of rotary angles are in float64 then, which those of a shared model may not be.
    split, model = SplitModel(build(FAMILIES[name])), build(FAMILIES[name])
    generator = torch.Generator().manual_seed(5)
    a = torch.eye(24, dtype=torch.float64) + 0.3 * torch.randn(24, 24, generator=generator, dtype=torch.float64)
    core = model.transformer if name == "gpt2" else model.model
    blocks, norm = ("h", "ln_f") if name == "gpt2" else ("layers", "norm")
    stack = getattr(core, blocks)
    for k in range(len(stack)):
        stack[k] = Coordinates(stack[k], a)
    stack[0].register_forward_pre_hook(
        lambda module, args, kwargs: (
            ((args[0] @ torch.linalg.inv(a).T, *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": kwargs["hidden_states"] @ torch.linalg.inv(a).T})
        ),
        with_kwargs=True,
    )
    getattr(core, norm).register_forward_pre_hook(lambda module, args: (args[0] @ a.T, *args[1:]))
    changed = SplitModel(model)
    batch = oracles.inputs(split, [9])
    layers = list(range(split.num_layers + 1))
    before, after = exact(split, batch, layers), exact(changed, batch, layers)
    for layer in layers:
        torch.testing.assert_close(after.activations[layer] @ a.T, before.activations[layer], rtol=1e-9, atol=1e-9)
        assert oracles.error(after.matrices(layer), a.T @ before.matrices(layer) @ a) < MATRICES
    assert oracles.error(after.matrices(1), before.matrices(1)) > 1e-1


@pytest.mark.parametrize("name", MODELS)
def test_later_tokens_change_nothing(name: str, models: Models):
    split = models(name)
    batch = oracles.inputs(split, [12])
    other = batch.rows[0].clone()
    other[7:] = (other[7:] + 5) % 60
    changed = replace(batch, rows=[other])
    shorter = replace(batch, rows=[batch.rows[0][:7]])
    layers = [0, 2]
    truth = exact(split, batch, layers)
    for some in (changed, shorter):
        scores = exact(split, some, layers)
        for layer in layers:
            assert oracles.error(scores.matrices(layer)[:7], truth.matrices(layer)[:7]) < MATRICES
    assert oracles.error(exact(split, changed, [0]).matrices(0)[7:], truth.matrices(0)[7:]) > 1e-2


@pytest.mark.parametrize("name", [*MODELS, "narrow vocabulary", "gptj"])
def test_lower_then_upper_is_the_whole_model(name: str, models: Models):
    split = narrow_vocabulary() if name == "narrow vocabulary" else None
    split = split or models(name, gradients="per_position" if name == "gptj" else "own_position")
    batch = oracles.inputs(split, [9, 9])
    ids = torch.stack(batch.rows)
    encoder = {} if not batch.encoder else {"encoder_input_ids": batch.encoder["encoder_input_ids"]}
    if encoder:  # this interface takes no encoder mask
        batch = replace(batch, encoder={**encoder, "encoder_attention_mask": torch.ones(2, 6).long()})
    encoded = oracles.encoded(split, batch.encoder)
    for layer in range(split.num_layers + 1):
        streams = split.lower(ids, encoded, [layer])[layer]
        upper = UpperLayersModel(split, layer)
        logits = upper(streams[:, -1], streams[:, :-1], **encoder)
        scores, probs = upper.jacobian(streams[:, -1], streams[:, :-1], **encoder)
        matrices = fim_expected_gradient_outerproduct(scores, probs)
        direct = exact(split, batch, [layer], positions=[-1])
        for i in range(2):
            truth = oracles.one_position(split, batch.rows[i], 8, [layer], batch.encoder_of(i))
            torch.testing.assert_close(logits[i].log_softmax(-1), truth.log_prob, rtol=0, atol=1e-12)
            torch.testing.assert_close(probs[i], truth.prob, rtol=1e-11, atol=0)
            assert oracles.error(scores[i], truth.scores[layer]) < 1e-12
            assert oracles.error(matrices[i], truth.matrix(layer)) < MATRICES
            assert oracles.error(direct.matrices(layer)[i], matrices[i]) < MATRICES


def test_second_order_expansion_of_the_divergence(models: Models):
    """KL(p(h) || p(h + v)) = v^T F v / 2 + O(|v|^3), in random directions, context held constant."""
    split = models("llama")
    batch = oracles.inputs(split, [9])
    for layer in range(split.num_layers + 1):
        scores = exact(split, batch, [layer], positions=[-1])
        h, matrix = scores.activations[layer][0, 0], scores.matrices(layer)[0]
        assert matrix.trace() > 1e-2  # gradients of ordinary size
        streams = split.lower(batch.rows[0][None], {}, [layer])[layer]
        generator = torch.Generator().manual_seed(layer)
        directions = torch.randn(16, 24, generator=generator, dtype=torch.float64)
        v = directions * (1e-3 * h.norm() / directions.norm(dim=-1, keepdim=True))
        upper = UpperLayersModel(split, layer)
        moved = upper((h + v), streams[:, :-1].expand(16, -1, -1)).log_softmax(-1)
        still = upper(h[None], streams[:, :-1]).log_softmax(-1)
        divergence = (still.exp() * (still - moved)).sum(-1)
        ratio = divergence / (0.5 * torch.einsum("ni,ij,nj->n", v, matrix, v))
        assert (ratio - 1).abs().max() < 0.01


# ---- sampled ---------------------------------------------------------------------------------------------------------

SAMPLES = 20_000


def z_scores(factors: Tensor, expected: Tensor, num_samples: int) -> Tensor:
    """Standard errors between the mean of ``num_samples`` outer products and their expectation, entry by entry."""
    scores = factors * num_samples**0.5  # weights 1/sqrt(S) taken out again
    products = scores[:, :, None] * scores[:, None, :]
    return (products.mean(0) - expected) / (products.std(0) / num_samples**0.5).clamp_min(1e-300)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "t5"])
def test_sampled_is_unbiased(name: str, models: Models):
    split = models(name)
    batch = oracles.inputs(split, [6])
    arguments = dict(**batch.padded(["right"], 6), layers=[1], positions=[4])
    sampled = score_factors(split, **arguments, estimator=Sampled(SAMPLES), seed=3)
    truth = oracles.one_position(split, batch.rows[0], 4, [1], batch.encoder_of(0))
    z = z_scores(sampled.factors[1][0], truth.matrix(1), SAMPLES)
    assert z.abs().max() < Z
    assert 0.5 < z.square().mean() < 2.0  # the errors are of the size that sampling has, neither hidden nor shrunk
    # Each factor is the score of some token.
    every = truth.scores[1] / SAMPLES**0.5
    distance = torch.cdist(sampled.factors[1][0, :500], every, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
    assert distance.values.max() < 1e-11 * every.norm(dim=-1).max()
    assert (sampled.kept_mass == 1).all()


def test_seeds(models: Models):
    split = models("gpt2")
    batch = oracles.inputs(split, [12, 9])

    def run(seed: int) -> Tensor:
        arguments = batch.padded(["right"], 12)
        return score_factors(split, **arguments, layers=[0], estimator=Sampled(3), seed=seed).factors[0]

    assert torch.equal(run(5), run(5))
    different = (run(5) != run(6)).flatten(1).any(1)
    assert different.float().mean() > 0.9


def test_samples_are_independent_across_positions_and_samples(models: Models):
    """One uniform used twice would halve the effective number of samples without a trace in any mean."""
    split, num_samples = models("gpt2"), 4000
    batch = oracles.inputs(split, [8])
    scores = score_factors(
        split, **batch.padded(["right"], 8), layers=[3], positions=[5, 6], estimator=Sampled(num_samples)
    )
    truths = [oracles.one_position(split, batch.rows[0], t, [3]) for t in (5, 6)]
    first, second = (
        torch.cdist(g * num_samples**0.5, truth.scores[3]).argmin(-1)
        for g, truth in zip(scores.factors[3], truths, strict=True)
    )
    p, q = (truth.prob for truth in truths)
    for one, other, chance in [(first, second, p @ q), (first[1:], first[:-1], p @ p)]:
        agreements = (one == other).sum()
        spread = (len(one) * chance * (1 - chance)).sqrt() * 2  # neighbouring pairs share a sample
        assert abs(agreements - len(one) * chance) < Z * spread


TEMPERED = [(1.0, 0.5), (1.0, 2.0), (0.7, 1.0), (0.7, 0.5), (0.3, 2.0), (1e-6, 1.0)]


@pytest.mark.parametrize(("top_p", "temperature"), TEMPERED)
def test_tempering(top_p: float, temperature: float):
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(61, 8, generator=generator, dtype=torch.float64))
    z = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    prediction: Prediction = head.predict(z)
    weights, kept = tempered(prediction, top_p, temperature)
    for n in range(4):
        expected, mass = oracles.tempered((head.weight @ z[n]).log_softmax(-1), top_p, temperature)
        torch.testing.assert_close(weights[n] / weights[n].sum(), expected, rtol=1e-12, atol=0)
        assert float(kept[n]) == pytest.approx(mass if top_p < 1 else 1.0, rel=1e-12, abs=0)
    if top_p == 1e-6:
        assert ((weights > 0).sum(-1) == 1).all()


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 0.5), (0.7, 1.0), (0.5, 2.0)])
def test_tempered_samples_follow_the_tempered_distribution(top_p: float, temperature: float, models: Models):
    """The expectation is sum_y q(y) g_y g_y^T: the tokens are q's, the scores p's; it is not the Fisher matrix."""
    split = models("gpt2")
    batch = oracles.inputs(split, [6])
    sampled = score_factors(
        split, **batch.padded(["right"], 6), layers=[1], positions=[4], estimator=Sampled(SAMPLES, top_p, temperature)
    )
    truth = oracles.one_position(split, batch.rows[0], 4, [1])
    q, mass = oracles.tempered(truth.log_prob, top_p, temperature)
    assert z_scores(sampled.factors[1][0], oracles.fisher(q, truth.scores[1]), SAMPLES).abs().max() < Z
    assert z_scores(sampled.factors[1][0], truth.matrix(1), SAMPLES).abs().max() > 2 * Z
    assert float(sampled.kept_mass) == pytest.approx(mass if top_p < 1 else 1.0, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": -3}, "num_samples must be at least 1, got -3"),
        ({"num_samples": 1, "top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"num_samples": 1, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"num_samples": 1, "top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan"),
        ({"num_samples": 1, "temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"num_samples": 1, "temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
        ({"num_samples": 1, "temperature": float("inf")}, "temperature must be above 0 and finite, got inf"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message) as refusal:
        Sampled(**arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("number", [2.5, 10**20, True])
def test_numbers_that_are_not_whole_or_without_bound(number: Any, unchecked_shapes: None):
    for estimator in (Sampled, lambda number: Deflated(2, number), lambda number: Deflated(number, 2)):
        with pytest.raises(ValueError, match=rf"(num_samples|rank) must be a whole number below 2\^31, got {number}"):
            estimator(number)
