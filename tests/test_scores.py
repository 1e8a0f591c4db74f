"""Drawn tokens against brute force, what batching and memory may change, invalid positions, and bad arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import oracles
import pytest
import torch
from conftest import Models
from families import FAMILIES, VOCAB, build
from torch import Tensor

from fisher_ray import (
    Deflated,
    Exact,
    ModelError,
    Sampled,
    Scores,
    SplitModel,
    iter_scores,
    score_factors,
)
from fisher_ray.attention import attention_mode
from fisher_ray.estimators import Estimator
from fisher_ray.scores import Pass, _slices
from fisher_ray.tape import Tape

# Against brute force. With the observed token's key in the query's gradient .03 to .4, with its value in the scores'
# gradient .04 to 5, with it fed in place of the drawn one .5 to 7.
MATRICES = 1e-10
# Between two ways of cutting the same work, in float64: sums in another order. One other token drawn: 2 to 4.
ROUNDING = 1e-11
Z = 4.0

pytestmark = pytest.mark.usefixtures("float64_throughout")


# ---- tokens drawn from p(. | x_<t) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "t5", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("num_token_draws", [1, 4])
def test_drawn_tokens_equal_brute_force(name: str, num_token_draws: int, models: Models):
    """Exact, every drawn token fed in one at a time. Exact has 24 factors a draw: 4 draws are factored anew, in 24."""
    split = models(name)
    batch = oracles.inputs(split, [12, 9, 7])
    wanted = [(1, 6, 11), (1, 8), (3,)]
    layers = [0, 2]
    scores = score_factors(
        split, **batch.padded(["right", "left", "both"], 14), layers=layers, positions=wanted, estimator=Exact(),
        token_source="sampled", num_token_draws=num_token_draws,
    )  # fmt: skip
    assert scores.fed.shape == (6, num_token_draws)
    for n, (i, position) in enumerate((row, t) for row in range(3) for t in wanted[row]):
        assert (int(scores.sequence[n]), int(scores.position[n])) == (i, position)
        assert scores.token[n] == batch.rows[i][position]
        for layer in layers:
            assert scores.factors[layer].shape[1] == split.d_model
            truth = oracles.mean_matrix(split, batch.rows[i], position, scores.fed[n], layer, batch.encoder_of(i))
            assert oracles.error(scores.matrices(layer)[n], truth) < MATRICES
        entropies, surprisals = [], []
        for d, token in enumerate(scores.fed[n]):
            other = batch.rows[i].clone()
            other[position] = token
            alone = oracles.one_position(split, other, position, layers, batch.encoder_of(i))
            for layer in layers:
                torch.testing.assert_close(scores.activations[layer][n, d], alone.streams[layer], rtol=0, atol=1e-12)
            entropies.append(-(alone.prob * alone.log_prob).sum())
            if position + 1 < len(other):
                surprisals.append(-alone.log_prob[other[position + 1]])
        torch.testing.assert_close(scores.entropy[n], torch.stack(entropies).mean(), rtol=0, atol=1e-12)
        if surprisals:
            torch.testing.assert_close(scores.surprisal[n], torch.stack(surprisals).mean(), rtol=0, atol=1e-12)
        else:
            assert scores.surprisal[n].isnan()


@pytest.mark.parametrize(("num_token_draws", "num_samples"), [(1, 3), (3, 2), (5, 7)])  # 15 factors, and 35 > d_model
def test_sampled_scores_of_drawn_tokens(num_token_draws: int, num_samples: int, models: Models):
    """Each draw has its own samples; the mean over draws is that of their matrices."""
    split = models("gpt2")
    batch = oracles.inputs(split, [9])
    estimator = Sampled(num_samples)
    arguments = dict(**batch.padded(["right"], 9), layers=[1], positions=[4], token_source="sampled")
    scores = score_factors(split, **arguments, estimator=estimator, num_token_draws=num_token_draws)
    factors = scores.factors[1][0]
    assert factors.shape[0] == min(num_token_draws * num_samples, 24)
    if num_token_draws * num_samples > 24:
        # Factored anew: no factor is a score any longer, but the matrix is that of scores of the tokens fed in.
        one = score_factors(split, **arguments, estimator=estimator)
        assert one.fed[0, 0] == scores.fed[0, 0]
        rest = factors.T @ factors * num_token_draws - one.factors[1][0].T @ one.factors[1][0]
        eigenvalues = torch.linalg.eigvalsh(rest)
        assert eigenvalues[0] > -1e-10 * eigenvalues.sum()
        return
    found = []
    for d, token in enumerate(scores.fed[0]):
        other = batch.rows[0].clone()
        other[4] = token
        truth = oracles.one_position(split, other, 4, [1]).scores[1]
        own = factors[d * num_samples : (d + 1) * num_samples] * (num_samples * num_token_draws) ** 0.5
        distance, nearest = torch.cdist(own, truth, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        assert distance.max() < 1e-11 * truth.norm(dim=-1).max()
        found.append(nearest)
    if num_token_draws > 1:
        assert len(torch.stack(found).unique(dim=0)) == num_token_draws  # not one set of samples for all draws


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (0.8, 2.0)])
def test_drawn_tokens_follow_the_distribution_before_them(top_p: float, temperature: float, models: Models):
    """p(. | x_<t): the prediction at t - 1, tempered by its own top_p and temperature and not by the estimator's."""
    split, count = models("gpt2"), 4000
    batch = oracles.inputs(split, [9])
    scores = score_factors(
        split, **batch.padded(["right"], 9), layers=[3], positions=[1, 5], estimator=Sampled(1, 0.9, 0.7),
        token_source="sampled", num_token_draws=count, token_top_p=top_p, token_temperature=temperature,
    )  # fmt: skip
    for n, position in enumerate([1, 5]):
        log_prob = oracles.library_logits(split, batch.rows[0][None])[0, position - 1].log_softmax(-1)
        q = oracles.tempered(log_prob, top_p, temperature)[0]
        seen = scores.fed[n].bincount(minlength=61).double()
        assert (seen[q == 0] == 0).all()
        z = (seen - count * q)[q > 0] / (count * q * (1 - q))[q > 0].sqrt()
        assert z.abs().max() < Z
        untempered = log_prob.exp()
        if (top_p, temperature) != (1.0, 1.0):
            assert ((seen - count * untempered) / (count * untempered).sqrt()).abs().max() > 1.5 * Z


def test_position_zero_has_no_drawn_token(models: Models):
    split = models("gpt2")
    batch = oracles.inputs(split, [5, 1, 3])
    scores = score_factors(
        split, **batch.padded(["right"], 5), layers=[0], estimator=Sampled(1), token_source="sampled"
    )
    assert list(zip(scores.sequence.tolist(), scores.position.tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (0, 4), (2, 1), (2, 2),
    ]  # fmt: skip


# ---- what batching may change: nothing but rounding ------------------------------------------------------------------


def assert_same(got: Scores, expected: Scores, rounding: float = ROUNDING) -> None:
    """The same positions, the same tokens fed in and drawn, the same numbers."""
    assert torch.equal(got.sequence, expected.sequence)
    assert torch.equal(got.position, expected.position)
    assert torch.equal(got.token, expected.token)
    assert torch.equal(got.fed, expected.fed)
    assert got.invalid == expected.invalid
    for layer in expected.factors:
        # Factors themselves, so that one other token drawn would show as an error of order one.
        assert oracles.error(got.factors[layer], expected.factors[layer]) < rounding
        assert oracles.error(got.activations[layer], expected.activations[layer]) < rounding
    for name in ("entropy", "surprisal", "kept_mass", "captured_share"):
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=rounding, atol=rounding, equal_nan=True
        )


PER_POSITION = ("position", "token", "fed", "entropy", "surprisal", "kept_mass", "captured_share")
CASES = {
    "observed": {"estimator": Sampled(3, top_p=0.9)},
    "drawn": {"estimator": Sampled(3), "token_source": "sampled", "num_token_draws": 2},
    "exact": {"estimator": Exact(), "positions": [1, -2, -1]},
    "deflated": {"estimator": Deflated(3, 5)},
    "drawn, deflated": {"estimator": Deflated(2, 2), "token_source": "sampled", "num_token_draws": 2},
    "lower bound": {"estimator": Exact(0.2), "positions": [1, -2, -1]},
}
LENGTHS = [12, 4, 7]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5", "mamba"])
def test_padding_budget_and_batch_change_nothing(name: str, case: str, models: Models):
    split = models(name, gradients="per_position" if name == "mamba" else "own_position")
    batch = oracles.inputs(split, LENGTHS)
    arguments: dict[str, Any] = {"layers": [0, 2, 3], "seed": 4, **CASES[case]}
    expected = score_factors(split, **batch.padded(["right"], 12), **arguments)
    assert expected.halvings == 0

    assert_same(score_factors(split, **batch.padded(["left"], 12), **arguments), expected)
    assert_same(score_factors(split, **batch.padded(["both", "right"], 19), **arguments), expected)

    assert_same(score_factors(split, **batch.padded(["right"], 12), **arguments, memory_budget=1), expected)

    for order in ([2, 0, 1], [1], [1, 2]):
        some = batch.subset(order)
        scores = score_factors(split, **some.padded(["right"], 12), **arguments)
        # To the order of the whole batch: rows of sequence order[0], then order[1], ...
        rows = torch.cat([(expected.sequence == i).nonzero().flatten() for i in order])
        picked = Scores(
            factors={k: g[rows] for k, g in expected.factors.items()},
            activations={k: h[rows] for k, h in expected.activations.items()},
            sequence=torch.tensor([order.index(int(i)) for i in expected.sequence[rows]]),
            **{name: getattr(expected, name)[rows] for name in PER_POSITION},
        )
        assert_same(scores, picked)


@pytest.mark.parametrize(("budget", "sizes"), [(1, [1] * 23), (300_000, None), (2**30, [23])])
def test_chunks_come_in_order(budget: int, sizes: list[int] | None, models: Models):
    split = models("gpt2")
    batch = oracles.inputs(split, LENGTHS)
    arguments: dict[str, Any] = {"layers": [1], "estimator": Sampled(2), "memory_budget": budget}
    chunks = list(iter_scores(split, **batch.padded(["right"], 12), **arguments))
    pairs = [pair for c in chunks for pair in zip(c.sequence.tolist(), c.position.tolist(), strict=True)]
    assert pairs == [(i, t) for i, length in enumerate(LENGTHS) for t in range(length)]
    if sizes is None:
        assert 1 < len(chunks) < 23
    else:
        assert [len(chunk) for chunk in chunks] == sizes


def test_position_lists(models: Models):
    split = models("gpt2")
    batch = oracles.inputs(split, [6, 4])
    arguments: dict[str, Any] = {**batch.padded(["left"], 6), "layers": [1], "estimator": Exact()}
    everything = score_factors(split, **arguments)
    assert everything.position.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    for positions, expected in {
        (2, -1): [(0, 2), (0, 5), (1, 2), (1, 3)],
        ((-1, 5, 5, 0), ()): [(0, 0), (0, 5)],  # once each, in order
        ((), (-4,)): [(1, 0)],
    }.items():
        scores = score_factors(split, **arguments, positions=positions)
        assert list(zip(scores.sequence.tolist(), scores.position.tolist(), strict=True)) == expected
        for n, (i, t) in enumerate(expected):
            m = oracles.row_index(everything, i, t)
            assert oracles.error(scores.matrices(1)[n], everything.matrices(1)[m]) < ROUNDING


# ---- out of memory ---------------------------------------------------------------------------------------------------


def short_of_memory(most: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], message: str) -> None:
    """Tapes of more than ``most`` queries do not fit."""
    initialise = Tape.__init__

    def checked(self: Tape, z: Tensor, streams: Any, where: tuple[Tensor, Tensor] | None) -> None:
        if (z[..., 0].numel() if where is None else len(where[0])) > most:
            raise error(message)
        initialise(self, z, streams, where)

    monkeypatch.setattr(Tape, "__init__", checked)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory."),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        (MemoryError, ""),
        (RuntimeError, "Triton Error [CUDA]: out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize("case", ["observed", "drawn"])
def test_out_of_memory_halves_and_goes_on(
    case: str, error: type[BaseException], message: str, models: Models, monkeypatch: pytest.MonkeyPatch
):
    split = models("gpt2")
    batch = oracles.inputs(split, LENGTHS)
    arguments: dict[str, Any] = {**batch.padded(["right"], 12), "layers": [0, 3], **CASES[case]}
    expected = score_factors(split, **arguments)
    short_of_memory(20, monkeypatch, error, message)
    chunks = list(iter_scores(split, **arguments))
    # Each cut turns one micro-batch into two.
    assert sum(chunk.halvings for chunk in chunks) == len(chunks) - 1 > 0
    scores = score_factors(split, **arguments)
    assert scores.halvings == len(chunks) - 1
    assert_same(scores, expected)


def test_the_slow_paths_copies_are_by_tokens(models: Models):
    """A copy of a query is a sequence there: of one with as many tokens as fill a product none is made, for its 61 factors."""
    split = models("bloom", gradients="per_position")
    tokens = []
    hook = split.blocks[1].register_forward_hook(lambda block, args, _: tokens.append(args[0].shape[:2].numel()))
    ids = torch.arange(240)[None] % VOCAB
    for position, copies in ((239, 1), (79, 3)):
        tokens.clear()
        score_factors(split, ids, layers=[1], estimator=Exact(), positions=[position])
        assert max(tokens) == (position + 1) * copies
    hook.remove()


def test_a_single_position_out_of_memory(models: Models, monkeypatch: pytest.MonkeyPatch):
    split = models("gpt2")
    batch = oracles.inputs(split, [6])
    short_of_memory(0, monkeypatch, torch.OutOfMemoryError, "CUDA out of memory.")
    with pytest.raises(MemoryError, match="out of memory with a single position of a sequence of 6 tokens") as refusal:
        score_factors(split, **batch.padded(["right"], 6), layers=[0], estimator=Sampled(1))
    assert "\n" not in str(refusal.value)


def test_other_errors_are_not_taken_for_memory(models: Models, monkeypatch: pytest.MonkeyPatch):
    split = models("gpt2")
    batch = oracles.inputs(split, [6])
    short_of_memory(0, monkeypatch, RuntimeError, "something else")
    with pytest.raises(RuntimeError, match="something else"):
        score_factors(split, **batch.padded(["right"], 6), layers=[0], estimator=Sampled(1))


# ---- numbers that are none -------------------------------------------------------------------------------------------


def poisoned(value: float, token: int, gradients: str) -> SplitModel:
    """A checked model, one token of which then has an embedding that is not finite."""
    model = build(FAMILIES["llama"])
    split = SplitModel(model, gradients=gradients)
    model.model.embed_tokens.weight[token, 3] = value
    return split


@pytest.mark.parametrize("path", ["whole", "replayed", "alone"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("earlier", ["later positions and other sequences", "earlier positions"])
def test_what_is_not_finite_is_left_out_with_its_place(path: str, value: float, earlier: str, models: Models):
    """The position of a poisoned token and the later ones, which see it, are invalid; all others are there and right."""
    gradients = "per_position" if path == "alone" else "own_position"
    clean, split = models("llama", gradients=gradients), poisoned(value, 60, gradients)
    rows = [row.clamp(max=58) for row in oracles.inputs(split, [12, 9, 7] + [12] * 9).rows]
    rows[1][4] = rows[2][0] = 60
    batch = oracles.Inputs(rows, {})
    arguments: dict[str, Any] = {**batch.padded(["right", "left"], 14), "layers": [0, 2], "estimator": Sampled(2)}
    if path != "whole":
        arguments["positions"] = [(1, 5), (2, 3, 4, 8), (0, 6)] + [()] * 9
    scores, expected = score_factors(split, **arguments), score_factors(clean, **arguments)
    asked = set(zip(expected.sequence.tolist(), expected.position.tolist(), strict=True))
    hit = asked & ({(1, t) for t in range(4, 9)} | {(2, t) for t in range(7)})
    before = asked & {(1, t) for t in range(4)}
    if earlier == "earlier positions":
        assert not before & set(scores.invalid)
    assert set(scores.invalid) - before == hit
    assert len(set(scores.invalid)) == len(scores.invalid)
    assert len(scores) + len(scores.invalid) == len(expected)
    for n, pair in enumerate(zip(scores.sequence.tolist(), scores.position.tolist(), strict=True)):
        m = oracles.row_index(expected, *pair)
        for layer in (0, 2):
            assert oracles.error(scores.factors[layer][n], expected.factors[layer][m]) < ROUNDING


@pytest.mark.parametrize("gradients", ["own_position", "per_position"])
@pytest.mark.parametrize("token", [0, 7])  # the engine's own padding, and the token under our mask
@pytest.mark.parametrize("positions", [None, [1]])
def test_what_padding_holds_does_not_matter(gradients: str, token: int, positions: list[int] | None):
    """Weight zero times a NaN is a NaN: one token's weights must not reach sequences in which it does not occur."""
    split = poisoned(float("nan"), token, gradients)
    batch = oracles.inputs(split, [12, 5])
    rows = [row.clamp(min=8) for row in batch.rows]
    arguments = oracles.Inputs(rows, {}).padded(["right"], 14)
    scores = score_factors(split, **arguments, layers=[0], estimator=Sampled(1), positions=positions)
    assert scores.invalid == []


@pytest.mark.parametrize("estimator", [Exact(), Sampled(2)])
def test_when_nothing_is_finite(estimator: Exact | Sampled, models: Models):
    model = build(FAMILIES["gpt2"])
    split = SplitModel(model)
    model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    batch = oracles.inputs(split, [4])
    scores = score_factors(split, **batch.padded(["right"], 4), layers=[0, 3], estimator=estimator)
    assert len(scores) == 0
    assert scores.invalid == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert scores.matrices(0).shape == (0, 24, 24)


def test_scores_that_overflow_are_invalid(models: Models):
    """Logits and p are finite and only the pulled-back score is not."""
    model = build(FAMILIES["gpt2"])
    split = SplitModel(model)
    batch = oracles.inputs(split, [4])
    handle = split.blocks[1].register_full_backward_hook(lambda module, grads, _: (grads[0] * float("inf"), *grads[1:]))
    scores = score_factors(split, **batch.padded(["right"], 4), layers=[0, 2], estimator=Sampled(1))
    handle.remove()
    assert scores.invalid == [(0, 0), (0, 1), (0, 2), (0, 3)]


# ---- the model is left as it was -------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(models: Models):
    split = models("gemma2")
    ids = oracles.inputs(split, [9]).rows[0][None]

    def state() -> list[Any]:
        modules = list(split.model.modules())
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]
        return [hooks, [m.config._attn_implementation for m in modules if hasattr(m, "config")]]

    before, logits = state(), oracles.library_logits(split, ids)
    score_factors(split, ids, layers=[0], estimator=Sampled(1))
    split.lower(ids, {}, [1])  # stops half-way
    with pytest.raises(IndexError):
        split.own_tape(ids + 100, {}, [0], (ids[0] * 0, ids[0] * 0))  # ends in an error
    assert state() == before
    assert torch.equal(oracles.library_logits(split, ids), logits)
    assert not any(p.requires_grad or p.grad is not None for p in split.model.parameters())


def test_log_probability_rates_are_directional_derivatives(models: Models):
    """dlog p(y)/de = g_y . v."""
    for name in ("gpt2", "gemma3", "t5", "gptj"):
        split = models(name, gradients="per_position" if name == "gptj" else "own_position")
        batch = oracles.inputs(split, [9])
        v = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for layer in (0, 2):
            encoder = batch.encoder_of(0)
            tape = split.tape(batch.rows[0][None], oracles.encoded(split, encoder), [0, layer], torch.tensor([1, 5, 8]))
            rates = next(split.log_probability_rates(tape, layer, v[None]))[0]
            for n, position in enumerate((1, 5, 8)):
                truth = oracles.one_position(split, batch.rows[0], position, [layer], encoder)
                expected = truth.scores[layer] @ v
                assert (rates[n] - expected).norm() / expected.norm() < 1e-6  # the library's softmaxes are float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probability_rates_of_half_precision(dtype: torch.dtype):
    """To the rounding of the weights, also along directions that change little."""
    half = SplitModel(build(FAMILIES["llama"], dtype))
    exact = SplitModel(build(FAMILIES["llama"], dtype).double())
    ids, at, v = torch.arange(1, 13)[None], torch.tensor([3, 7, 11]), torch.eye(24)
    expected, got = (torch.cat([*s.log_probability_rates(s.tape(ids, {}, [1], at), 1, v)]) for s in (exact, half))
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.03
    assert errors.max() < 0.3


@pytest.mark.parametrize("walk", [False, True])
def test_backward_passes_are_linear_in_float16(walk: bool):
    """Scores of a token that is all but certain are far below float16's smallest number; not a digit of theirs is lost."""
    split = SplitModel(build(FAMILIES["llama"], torch.float16))
    tape = split.own_tape(torch.arange(1, 41).view(2, 20), {}, [0, 2], None, walk)
    cotangents = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    smaller = torch.ldexp(cotangents, -torch.arange(40)[:, None])
    expected, got = tape.pull(cotangents), tape.pull(smaller)
    for layer in (0, 2):
        assert got[layer].dtype != torch.float16
        assert torch.equal(torch.ldexp(got[layer], torch.arange(40)[:, None]), expected[layer])


def test_a_model_in_training_mode_is_refused():
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    split.model.train()
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel is in training mode.*Call model.eval\(\) first"):
        score_factors(split, IDS, layers=[1], estimator=Sampled(1))


def test_scores_are_not_for_inference_mode():
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Use torch.no_grad\(\)"):
        score_factors(split, IDS, layers=[1], estimator=Sampled(1))


def test_a_wait_that_fails_leaves_the_model_free(monkeypatch: pytest.MonkeyPatch):
    """A GPU's errors, and Ctrl-C, are raised where its numbers are waited for."""
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    before = split.model.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), attention_mode(split._configs, "replay", None, torch.tensor([[1]])):
            pass
    assert split.model.config._attn_implementation == before
    score_factors(split, IDS, layers=[1], estimator=Sampled(1))


def test_one_thread_scores_a_model_at_a_time():
    """Another is refused, and the model has its own attention back when the first is done."""
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    before = split.model.config._attn_implementation
    with ThreadPoolExecutor(1) as other, attention_mode(split._configs, "own"):
        refused = other.submit(score_factors, split, IDS, layers=[1], estimator=Sampled(1)).exception()
        assert split.model.config._attn_implementation != before
        elsewhere = other.submit(split.model, IDS).exception()  # with our attention, and none of its modes
        assert isinstance(elsewhere, RuntimeError) and "another thread" in str(elsewhere)
    assert isinstance(refused, RuntimeError)
    assert "another thread" in str(refused)
    assert split.model.config._attn_implementation == before


@pytest.mark.parametrize("first", ["score", "lower"])
def test_a_model_that_another_thread_uses_meanwhile(first: str):
    """Hooks are of the model: a pass of another thread would leave its streams in place of ours, or cut its own off."""
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32), gradients="per_position")
    entered, left = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        entered.set()
        left.wait(10)

    handle = split.blocks[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as other:
        if first == "score":
            running = other.submit(score_factors, split, IDS, layers=[1], estimator=Sampled(1))
        else:
            running = other.submit(split.lower, IDS, {}, [1])
        entered.wait(10)
        handle.remove()
        with pytest.raises(RuntimeError, match="used by another thread"):
            split.model(IDS)
        left.set()
        running.result()
    split.model(IDS)


@pytest.mark.parametrize("gradients", ["own_position", "per_position"])
def test_a_block_that_runs_twice_a_pass_is_refused(gradients: Any):
    """Its stream is no one stream; the slow path, which has the same hooks, had passed the check and been wrong."""
    model = build(FAMILIES["llama"])
    model.model.layers = torch.nn.ModuleList([model.model.layers[0]] * 3)
    with pytest.raises(ModelError, match="runs block 0 more than once a pass"):
        SplitModel(model, gradients=gradients)


@pytest.mark.parametrize("estimator", [Sampled(8), Deflated(3, 2), Exact()], ids=str)
def test_rows_are_in_order_whatever_the_budget(estimator: Estimator):
    """Also where a sequence fits beside others and not alone, as what a query takes is less where there are more."""
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    lengths = [16, 3, 48, 23]
    ids = torch.ones(4, 48, dtype=torch.long)
    mask = torch.arange(48) < torch.tensor(lengths)[:, None]
    whole = sum(lengths)
    for budget in range(100_000, 4_000_000, 300_000):
        scores = score_factors(
            split, ids, layers=[0], estimator=estimator, attention_mask=mask, memory_budget=budget
        )  # fmt: skip
        order = scores.sequence * 48 + scores.position
        assert len(scores) == whole and bool((order.diff() > 0).all()), budget


def test_order_is_kept_where_memory_is_not_monotone(monkeypatch: pytest.MonkeyPatch):
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))

    def memory(self: Pass, rows: list[int], positions: list[list[int]]) -> float:
        return 2.0 if len(rows) == 1 and len(positions[0]) > 3 else 1.0  # long ones fit beside others only

    monkeypatch.setattr(Pass, "memory", memory)
    ids = torch.ones(3, 6, dtype=torch.long)
    mask = torch.arange(6) < torch.tensor([2, 6, 2])[:, None]
    scores = score_factors(split, ids, layers=[0], estimator=Sampled(1), attention_mask=mask, memory_budget=1)
    assert scores.sequence.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2]


def test_tokens_that_the_head_does_not_know_have_no_surprisal():
    """Embeddings may have more rows than the head: Mllama's do."""
    model = build(FAMILIES["llama"], torch.float32)
    known = VOCAB - 5
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:known].clone())
    split = SplitModel(model)
    ids = torch.tensor([[1, VOCAB - 1, 3, 4]])
    scores = score_factors(split, ids, layers=[1], estimator=Sampled(1), following=[2])
    assert scores.surprisal.isnan().tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match=rf"following must be tokens in \[0, {known}\) or None, got {known}"):
        score_factors(split, ids, layers=[1], estimator=Sampled(1), following=[known])


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("layers", [np.arange(1, 3), torch.tensor([1, 2]), [np.int64(1), torch.tensor(2)]])
def test_layers_may_be_numbers_of_numpy_and_torch(layers: Any, models: Models):
    scores = score_factors(models("gpt2"), IDS, layers=layers, estimator=Sampled(1))
    assert all(type(layer) is int for layer in scores.factors) and scores.factors.keys() == {1, 2}


def test_streams_keep_no_copies_alive(models: Models):
    """A position goes through the model once for each factor, and its stream is the same in all of them."""
    scores = score_factors(models("gpt2"), IDS[:1], layers=[1], estimator=Exact(), positions=[3])
    assert scores.activations[1].untyped_storage().nbytes() == scores.activations[1].nbytes


@pytest.mark.parametrize("size", [1e18, 1e30])
def test_what_is_too_long_to_be_squared_is_invalid(size: float):
    """Norms bring such streams back to size, and sums of their squares would be infinite for all positions."""
    model = build(FAMILIES["llama"], torch.float32)
    model.model.embed_tokens.weight.data[9] *= size
    scores = score_factors(SplitModel(model), IDS, layers=[0, 1], estimator=Sampled(2))
    assert scores.invalid == [(1, 2)] and len(scores.position) == 11
    assert all((h**2).sum().isfinite() for h in scores.activations.values())


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("lists", [np.array, torch.tensor])
def test_positions_and_tokens_may_be_numbers_of_numpy_and_torch(lists: Callable[[Any], Any], models: Models):
    asked: dict[str, Any] = {"layers": [1], "estimator": Sampled(1)}
    for positions in (lists([3, 5]), list(lists([3, 5])), [lists([3, 5])] * 2, lists([[3, 5]] * 2)):
        scores = score_factors(models("gpt2"), IDS, positions=positions, **asked)
        assert scores.position.tolist() == [3, 5] * 2
    expected, *others = (
        score_factors(models("gpt2"), IDS, positions=[-1], following=following, **asked).surprisal
        for following in ([3, 4], lists([3, 4]), [lists(3), 4])
    )
    assert expected.isfinite().all()
    assert all(torch.equal(found, expected) for found in others)


# ---- bad arguments ---------------------------------------------------------------------------------------------------

IDS = torch.arange(1, 13).view(2, 6)
HOLES = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
EMPTY = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])

BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "layer above": (lambda: {"layers": [4]}, r"layer_idx must be in \[0, 3\], got 4. GPT2LMHeadModel has 3 blocks"),
    "layer below": (lambda: {"layers": [-1]}, r"layer_idx must be in \[0, 3\], got -1"),
    "no layers": (lambda: {"layers": []}, "layers must name at least one layer"),
    "position above": (lambda: {"positions": [6]}, r"positions of sequence 0 must be in \[0, 6\), or negative; got 6"),
    "position below": (
        lambda: {"positions": [-7]},
        r"positions of sequence 0 must be in \[0, 6\), or negative; got -7",
    ),
    "position of one": (
        lambda: {"positions": [[0], [9]]},
        r"positions of sequence 1 must be in \[0, 6\), or negative; got 9",
    ),
    "positions short": (lambda: {"positions": [[0]]}, "one list for each of the 2 sequences, got 1"),
    "no positions": (lambda: {"positions": []}, "no positions to score"),
    "no positions at all": (lambda: {"positions": [[], []]}, "no positions to score"),
    "nothing to draw": (lambda: {"input_ids": IDS[:, :1], "token_source": "sampled"}, "no positions to score"),
    "drawn at zero": (
        lambda: {"positions": [0], "token_source": "sampled"},
        r"must be in \[1, 6\), as nothing is before",
    ),
    "id above": (lambda: {"input_ids": IDS + 60}, r"token ids must be in \[0, 61\), got 72"),
    "id below": (lambda: {"input_ids": IDS - 5}, r"token ids must be in \[0, 61\), got -4"),
    "no ids": (lambda: {"input_ids": IDS[:0]}, r"must be a tensor \[batch, seq\] of token ids, and not empty"),
    "too long": (lambda: {"input_ids": torch.ones(1, 65).long()}, "at most 64 tokens, got 65"),
    "holes": (lambda: {"attention_mask": HOLES}, "real tokens of sequence 1 must be contiguous"),
    "empty row": (lambda: {"attention_mask": EMPTY}, "sequence 0 has no real tokens"),
    "no draws": (lambda: {"token_source": "sampled", "num_token_draws": 0}, "num_token_draws must be at least 1"),
    "draws of observed": (lambda: {"num_token_draws": 2}, "num_token_draws must be at least 1, and 1 with observed"),
    "token top_p 0": (lambda: {"token_top_p": 0.0}, r"token_top_p must be in \(0, 1\], got 0.0"),
    "token top_p 1.5": (lambda: {"token_top_p": 1.5}, r"token_top_p must be in \(0, 1\], got 1.5"),
    "token temperature": (lambda: {"token_temperature": 0.0}, "token_temperature must be above 0 and finite"),
    "keys": (lambda: {"keys": ["a"]}, "keys must have an entry for each of the 2 sequences, got 1"),
    "encoder superfluous": (lambda: {"encoder_input_ids": IDS}, "takes no encoder_input_ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, models: Models):
    make, message = BAD[case]
    arguments = {"input_ids": IDS, "layers": [1], "estimator": Sampled(1), **make()}
    with pytest.raises(ValueError, match=message) as refusal:
        score_factors(models("gpt2"), arguments.pop("input_ids"), **arguments)
    assert "\n" not in str(refusal.value)


UNSHAPED = {
    "token source": (lambda: {"token_source": "model"}, "token_source must be observed or sampled, got 'model'"),
    "one axis": (
        lambda: {"input_ids": IDS[0]},
        r"a tensor \[batch, seq\] of token ids, and not empty, got shape \[6\]",
    ),
    "text": (lambda: {"input_ids": "Hello"}, "of token ids, and not empty, got str"),
    "a list": (lambda: {"input_ids": IDS.tolist()}, "of token ids, and not empty, got list"),
    "an estimator's name": (lambda: {"estimator": "exact"}, r"estimator must be Exact\(\), .* got 'exact'"),
    "one layer": (lambda: {"layers": 1}, r"layers must be a list of whole numbers, got 1. Give \[1\]"),
    "all layers": (lambda: {"layers": "all"}, "layers must be a list of whole numbers, got 'all'"),
    "one position": (lambda: {"positions": 5}, "positions must be a list of whole numbers, .* got 5"),
    "a word for positions": (lambda: {"positions": "last"}, "positions must be a list of whole numbers, .* got 'last'"),
    "a mask for positions": (lambda: {"positions": IDS[0] > 3}, r"not a mask of booleans. Give mask.nonzero"),
    "masks for positions": (lambda: {"positions": (IDS > 3).tolist()}, r"not a mask of booleans. Give mask.nonzero"),
    "tensors of masks": (lambda: {"positions": list(IDS > 3)}, r"not a mask of booleans. Give mask.nonzero"),
    "arrays of masks": (lambda: {"positions": list((IDS > 3).numpy())}, r"not a mask of booleans. Give mask.nonzero"),
    "one of torch's booleans": (
        lambda: {"positions": [[1, torch.tensor(True)], [2]]},
        r"not a mask of booleans. Give mask.nonzero",
    ),
    "a place between": (lambda: {"positions": [1, 2.5]}, r"a list of whole numbers, .* got \[1, 2.5\]"),
    "places between": (lambda: {"positions": [1.0, 2.0]}, "a list of whole numbers, .* got 1.0"),
    "numbers and lists": (lambda: {"positions": [1, [2]]}, r"a list of whole numbers, .* got \[1, \[2\]\]"),
    "a token between": (
        lambda: {"following": [None, 3.5]},
        r"following must be tokens in \[0, 61\) or None, got 3.5",
    ),
    "half a draw": (
        lambda: {"token_source": "sampled", "num_token_draws": 2.0},
        r"num_token_draws must be a whole number below 2\^31, got 2.0",
    ),
    "half a seed": (lambda: {"seed": 1.5}, r"seed must be a whole number below 2\^63, got 1.5"),
    "a long seed": (lambda: {"seed": 10**70}, r"seed must be a whole number below 2\^63, got 10{70}"),
    "a long seed below 0": (lambda: {"seed": -(10**70)}, r"seed must be a whole number below 2\^63, got -10{70}"),
    "mask shape": (lambda: {"attention_mask": IDS[:, :5]}, r"shape of input_ids, \[2, 6\], got \[2, 5\]"),
    "mask batch": (lambda: {"attention_mask": IDS[:1]}, r"shape of input_ids, \[2, 6\], got \[1, 6\]"),
    "not integers": (lambda: {"input_ids": IDS.double()}, "input_ids must be integers, got torch.float64"),
}


@pytest.mark.parametrize("case", UNSHAPED)
def test_bad_shapes_and_types(case: str, models: Models, unchecked_shapes: None):
    """What the shape annotations would have caught has its own clear line where they are off."""
    make, message = UNSHAPED[case]
    arguments = {"input_ids": IDS, "layers": [1], "estimator": Sampled(1), **make()}
    with pytest.raises(ValueError, match=message) as refusal:
        score_factors(models("gpt2"), arguments.pop("input_ids"), **arguments)
    assert "\n" not in str(refusal.value)


MASK = torch.ones_like(IDS)
BAD_ENCODER: dict[str, tuple[str, dict[str, Any], str]] = {
    "missing": ("t5", {}, "needs encoder_input_ids"),
    "batch": ("t5", {"encoder_input_ids": IDS[:1]}, r"encoder_input_ids must .*\[1, 6\]"),
    "mask shape": ("t5", {"encoder_input_ids": IDS, "encoder_attention_mask": MASK[:, :4]}, "encoder_attention_mask"),
    "mask empty": ("t5", {"encoder_input_ids": IDS, "encoder_attention_mask": 0 * MASK}, "encoder_attention_mask"),
    "vocabulary": ("t5", {"encoder_input_ids": IDS + 60}, r"token ids must be in \[0, 61\), got 72"),
    "mask without encoder": ("gpt2", {"encoder_attention_mask": MASK}, "encoder_attention_mask"),
}


@pytest.mark.parametrize("case", BAD_ENCODER)
def test_bad_encoder_arguments(case: str, models: Models, unchecked_shapes: None):
    name, arguments, message = BAD_ENCODER[case]
    with pytest.raises(ValueError, match=message) as refusal:
        score_factors(models(name), IDS, layers=[1], estimator=Sampled(1), **arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("n", "size"), [(512, 166), (7, 3), (1, 5), (5, 5), (6, 5), (0, 4)])
def test_rows_are_cut_evenly(n: int, size: int):
    """As few parts as there can be, and no short one at the end."""
    sizes = [len(range(n)[some]) for some in _slices(n, size)]
    assert sum(sizes) == n and len(sizes) == -(-n // size) and max(sizes, default=0) <= size
    assert not sizes or sizes[0] - sizes[-1] < len(sizes)
