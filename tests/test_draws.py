"""Random draws: the generator's published answers, the distribution of tokens, and names that batching cannot change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Models
from families import FAMILIES, build
from oracles import inputs

from fisher_ray import Sampled, SplitModel, score_factors
from fisher_ray.draws import Draws, drawing_bytes, sequence_key
from fisher_ray.estimators import tempered
from fisher_ray.head import Head
from fisher_ray.kernels import philox

# Standard errors. Under the null a |z| this large comes once in 1.6 million; the tests are fixed by their seeds anyway.
Z = 5.0


# Philox4x32-10 of the Random123 distribution's kat_vectors: counter, key, answer.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), PUBLISHED)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str):
    assert [f"{int(word):08x}" for word in philox(words(counter), words(key))] == answer.split()


def named(names: list[tuple[int, int, int]], stream: str = "score", seed: int = 0) -> Draws:
    """Draws for (sequence, position, first sample)."""
    sequence, position, first = (torch.tensor(column) for column in zip(*names, strict=True))
    key = torch.tensor([sequence_key(seed, int(i)) for i in sequence])
    return Draws(key, position, first, stream)


def test_uniforms_are_named_by_key_position_sample_stream_and_lane():
    base = named([(0, 3, 0)]).uniforms(4, range(7))
    assert base.shape == (1, 4, 7)
    assert base.dtype == torch.float64
    assert ((base > 0) & (base < 1)).all()
    assert len(base.unique()) == base.numel()
    torch.testing.assert_close(named([(0, 3, 2)]).uniforms(2, range(7)), base[:, 2:], rtol=0, atol=0)
    torch.testing.assert_close(named([(0, 3, 0)]).uniforms(4, range(3, 7)), base[..., 3:], rtol=0, atol=0)
    for other in (named([(1, 3, 0)]), named([(0, 4, 0)]), named([(0, 3, 0)], "token"), named([(0, 3, 0)], seed=1)):
        assert not (other.uniforms(4, range(7)) == base).any()


@pytest.mark.parametrize("together", [1, 100, 700])
def test_samples_may_be_drawn_a_few_at_a_time(together: int, monkeypatch: pytest.MonkeyPatch):
    """The same tokens in less memory."""
    weights = torch.rand(3, 900, generator=torch.Generator().manual_seed(0))
    draws = named([(0, 3, 5), (5, 0, 2), (0, 4, 0)])
    at_once = draws.tokens(weights, 50)
    whole = drawing_bytes(3, 50, 900, weights.device)
    monkeypatch.setattr("fisher_ray.draws._UNIFORMS", together)
    assert torch.equal(draws.tokens(weights, 50), at_once)
    assert drawing_bytes(3, 50, 900, weights.device) < whole / 5


def test_uniforms_of_a_batch_are_those_of_its_rows():
    names = [(0, 3, 0), (5, 0, 2), (0, 4, 0), (2, 3, 8)]
    together = named(names).uniforms(3, range(2, 9))
    for order in ([3, 1, 0, 2], [2, 0], [1]):
        apart = named([names[i] for i in order]).uniforms(3, range(2, 9))
        assert torch.equal(apart, together[order])
    assert torch.equal(named(names)[slice(1, 3)].uniforms(3, range(2, 9)), together[1:3])


def test_uniforms_are_uniform_and_uncorrelated():
    count = 2**16
    draws = named([(i, 7, 0) for i in range(64)])
    uniforms = draws.uniforms(count // 64, range(4)).reshape(count, 4)
    tenth = torch.histc(uniforms.flatten(), 10, 0, 1)
    expected = 4 * count / 10
    assert float(((tenth - expected) ** 2 / expected).sum()) < 9 + Z * (2 * 9) ** 0.5
    centred = (uniforms - 0.5) * 12**0.5
    correlation = centred.T @ centred / count**0.5 - torch.eye(4) * count**0.5
    off = correlation[~torch.eye(4, dtype=torch.bool)]
    assert off.abs().max() < Z
    assert (centred[1:] * centred[:-1]).mean(0).abs().max() * count**0.5 < Z


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 16, 61, 100])  # 7, 61: the blocks do not divide the vocabulary
def test_tokens_follow_their_weights(vocab_size: int):
    generator = torch.Generator().manual_seed(vocab_size)
    weights = torch.rand(2, vocab_size, generator=generator, dtype=torch.float64) ** 3 * 17  # not normalised
    if vocab_size > 2:
        weights[:, 1::3] = 0.0
    count = 20_000
    tokens = named([(0, 0, 0), (1, 5, 3)]).tokens(weights, count)
    assert tokens.shape == (2, count)
    for row, drawn in zip(weights, tokens, strict=True):
        seen = drawn.bincount(minlength=vocab_size).double()
        p = row / row.sum()
        assert len(seen) == vocab_size
        assert (seen[p == 0] == 0).all()
        some = (p > 0) & (p < 1)
        z = (seen - count * p)[some] / (count * p * (1 - p))[some].sqrt()
        assert z.numel() == 0 or z.abs().max() < Z


def test_a_draw_does_not_depend_on_how_many_are_drawn_or_beside_whom():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 61, generator=generator)
    names = [(i, i % 2, 0) for i in range(5)]
    tokens = named(names).tokens(weights, 32)
    assert torch.equal(named(names).tokens(weights, 8), tokens[:, :8])
    assert torch.equal(named([(i, t, 8) for i, t, _ in names]).tokens(weights, 24), tokens[:, 8:])
    assert torch.equal(named(names[::-1]).tokens(weights.flip(0), 32).flip(0), tokens)


def test_sequence_keys_differ_by_seed_and_name():
    keys = {sequence_key(seed, name) for seed in (0, 1, 2**40) for name in (0, 1, "a", b"b", "a:1")}
    assert len(keys) == 15
    assert all(0 <= word < 2**32 for key in keys for word in key)
    assert sequence_key(3, 7) == sequence_key(3, "7")  # ids read back from a file as text name the same draws


@pytest.mark.parametrize("cut", ["permuted", "padded", "split", "positions"])
def test_the_same_tokens_are_drawn_however_a_batch_is_made(cut: str, models: Models):
    """Tokens fed in and scores drawn: named by sequence and position alone."""
    split = models("gpt2")
    batch = inputs(split, [12, 9, 7, 12])
    names = ["a", "b", "c", "d"]

    def run(order: list[int], sides: list[str], width: int, positions: list[int] | None = None):
        some = batch.subset(order)
        return score_factors(
            split, **some.padded(sides, width), layers=[1], estimator=Sampled(4), token_source="sampled",
            num_token_draws=2, keys=[names[i] for i in order], positions=positions, seed=11,
        )  # fmt: skip

    whole = run([0, 1, 2, 3], ["right"], 12)
    fed = {
        (int(i), int(t)): (f, g)
        for i, t, f, g in zip(whole.sequence, whole.position, whole.fed, whole.factors[1], strict=True)
    }
    parts = {
        "permuted": lambda: [([2, 0, 3, 1], run([2, 0, 3, 1], ["right"], 12))],
        "padded": lambda: [([0, 1, 2, 3], run([0, 1, 2, 3], ["left", "both"], 17))],
        "split": lambda: [([i], run([i], ["right"], 12)) for i in range(4)],
        "positions": lambda: [([0, 1, 2, 3], run([0, 1, 2, 3], ["right"], 12, [2, -1]))],
    }[cut]()
    seen = 0
    for order, scores in parts:
        for i, t, f, g in zip(scores.sequence, scores.position, scores.fed, scores.factors[1], strict=True):
            expected, factors = fed[order[int(i)], int(t)]
            assert torch.equal(f, expected)
            # Another token would change a factor by its own size; rounding changes its last digits.
            torch.testing.assert_close(g, factors, rtol=1e-10, atol=1e-12)
            seen += 1
    assert seen == (8 if cut == "positions" else len(fed))


def test_keys_default_to_the_tokens_themselves(models: Models):
    split = models("gpt2")
    batch = inputs(split, [12, 9])
    alike = batch.subset([0, 1, 0])
    scores = score_factors(split, **alike.padded(["right", "left", "left"], 14), layers=[0], estimator=Sampled(2))
    first, second, third = (scores.factors[0][scores.sequence == i] for i in range(3))
    torch.testing.assert_close(first, third, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(first[:9], second)


# ---- in float32, as users have it ------------------------------------------------------------------------------------


def test_mean_over_draws_of_small_scores():
    """Of a token that is all but certain, whose scores have squares that are no float32 numbers."""
    split = SplitModel(build(FAMILIES["phi"], torch.float32))
    with torch.no_grad():
        split.model.lm_head.bias[3] += 60
    drawn: dict[str, Any] = {"token_source": "sampled", "num_token_draws": 8, "estimator": Sampled(8)}
    scores = score_factors(split, torch.arange(4, 14)[None], layers=[0], **drawn)
    single = score_factors(split, torch.arange(4, 14)[None], layers=[0], **{**drawn, "num_token_draws": 1})
    assert len(scores) == 9 and scores.factors[0].isfinite().all()
    assert 0 < single.factors[0].abs().max() < 1e-23
    # Drawn tokens are the certain one: each draw's factors are alike but for their samples, and so is their mean.
    first, mean = (each.factors[0].double().square().sum((1, 2)) for each in (single, scores))
    assert ((mean / first).log().abs() < 5).all()


def test_the_coldest_temperature_leaves_the_likeliest_token():
    head = Head(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 9)
    prediction = head.predict(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
    weights, _ = tempered(prediction, 1.0, 1e-30)
    assert torch.equal(weights, torch.nn.functional.one_hot(prediction.logits.argmax(-1), 50).float())
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Sampled(1, temperature=1e-39)
