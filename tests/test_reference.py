"""The interface of the published single-GPU toolkit."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import transformers as tf
from conftest import Models
from families import FAMILIES, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fisher_ray import (
    LowerLayersModel,
    SplitModel,
    UpperLayersModel,
    calculate_fisher,
    fim_expected_gradient_outerproduct,
)

MATRICES = 1e-10

pytestmark = pytest.mark.usefixtures("float64_throughout")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word ``w7`` is token 7; token 0 pads."""
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 61)}}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def split(tokenizer: PreTrainedTokenizerFast) -> SplitModel:
    """A GPT-2 with that tokenizer."""
    return SplitModel(build(FAMILIES["gpt2"]), tokenizer)


ROWS = [torch.tensor([5, 9, 31, 2, 44, 17]), torch.tensor([8, 3, 60]), torch.tensor([12, 13, 14, 15])]


def padded(side: str) -> dict[str, Tensor]:
    return oracles.Inputs(ROWS, {}).padded([side], 6)


def truths(split: SplitModel, layer: int) -> Tensor:
    """F at the last token of each row, one position at a time."""
    return torch.stack([oracles.one_position(split, row, len(row) - 1, [layer]).matrix(layer) for row in ROWS])


@pytest.mark.parametrize("vocab_size", [61, 12])
def test_the_slow_path_pulls_in_turn(vocab_size: int):
    """As many cotangents as the final stream is wide, or as there are tokens, from one pass of each sequence."""
    config = tf.BloomConfig(vocab_size=vocab_size, hidden_size=24, n_layer=3, n_head=4)
    bloom = SplitModel(build(lambda: tf.BloomForCausalLM(config)), gradients="per_position")
    ids = torch.tensor([[5, 9, 3, 2, 7], [8, 3, 6, 1, 1]])
    rows = []
    hook = bloom.blocks[1].register_forward_hook(lambda block, args, _: rows.append(len(args[0])))
    hidden, _ = LowerLayersModel(bloom, 1)(ids)
    grads, probs = UpperLayersModel(bloom, 1).jacobian(hidden[:, -1], hidden[:, :-1])
    hook.remove()
    assert max(rows) == 2
    expected = [oracles.one_position(bloom, row, 4, [1]).matrix(1) for row in ids]
    assert oracles.error(fim_expected_gradient_outerproduct(grads, probs), torch.stack(expected)) < MATRICES


# ---- lower and upper halves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_lower_layers(name: str, models: Models):
    split = models(name)
    batch = oracles.inputs(split, [9, 9])
    ids = torch.stack(batch.rows)
    encoder = {"encoder_input_ids": batch.encoder["encoder_input_ids"]} if batch.encoder else {}
    batch.encoder.pop("encoder_attention_mask", None)
    for layer in range(split.num_layers + 1):
        hidden, previous = LowerLayersModel(split, layer)(ids, **encoder)
        assert hidden.shape == (2, 9, 24)
        if layer == 0:
            assert previous is None
        else:
            assert torch.equal(previous, LowerLayersModel(split, layer - 1)(ids, **encoder)[0])
        for i, row in enumerate(batch.rows):
            own = {k: v[i : i + 1] for k, v in encoder.items()}
            mask = {"encoder_attention_mask": torch.ones(1, 6).long()} if own else {}
            truth = oracles.one_position(split, row, 5, [layer], {**own, **mask})
            torch.testing.assert_close(hidden[i, 5], truth.streams[layer], rtol=0, atol=1e-12)
            alone, alone_previous = LowerLayersModel(split, layer)(row, **own)
            assert alone.shape == (9, 24)
            torch.testing.assert_close(alone, hidden[i], rtol=0, atol=1e-12)
            assert (alone_previous is None) == (layer == 0)
            if alone_previous is not None:
                torch.testing.assert_close(alone_previous, previous[i], rtol=0, atol=1e-12)


def test_upper_layers_shapes(split: SplitModel):
    hidden, _ = LowerLayersModel(split, 2)(torch.stack([ROWS[0], ROWS[0].flip(0)]))
    upper = UpperLayersModel(split, 2)
    assert upper(hidden[:, -1], hidden[:, :-1]).shape == (2, 61)
    scores, probs = upper.jacobian(hidden[:, -1], hidden[:, :-1])
    assert scores.shape == (2, 61, 24)
    assert probs.shape == (2, 61)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, dtype=torch.float64))
    assert fim_expected_gradient_outerproduct(scores, probs).shape == (2, 24, 24)
    # No context: a sequence of one token.
    assert upper(hidden[:, 0], hidden[:, :0]).shape == (2, 61)


def test_upper_layers_refuse_other_shapes(split: SplitModel, unchecked_shapes: None):
    hidden, _ = LowerLayersModel(split, 2)(torch.stack([ROWS[0], ROWS[0].flip(0)]))
    upper = UpperLayersModel(split, 2)
    for latents, context in [(hidden[:1, -1], hidden[:, :-1]), (hidden, hidden), (hidden[:, -1], hidden[:, -1])]:
        for method in (upper, upper.jacobian):
            with pytest.raises(ValueError, match=r"final_latents must be \[batch, 24\] and context") as refusal:
                method(latents, context)
            assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"final_latents must be \[batch, 24\] .* got \[2, 23\]"):
        upper(hidden[:, -1, 1:], hidden[:, :-1, 1:])
    longest = upper.split.max_positions
    assert longest is not None
    context = hidden[:, :1].expand(-1, longest, -1)
    with pytest.raises(ValueError, match=rf"at most {longest} tokens, got {longest + 1}"):
        upper(hidden[:, -1], context)
    assert upper(hidden[:, -1], context[:, 1:]).isfinite().all()
    for method in (upper, upper.jacobian):
        with pytest.raises(ValueError, match=r"of at least one sequence, got \[0, 24\] and \[0, 5, 24\]"):
            method(hidden[:0, -1], hidden[:0, :-1])
    with pytest.raises(ValueError, match="at least one token, got none"):
        LowerLayersModel(split, 2)(ROWS[0][:0])


def test_expected_outer_product():
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    probs = torch.rand(3, 7, generator=generator, dtype=torch.float64).softmax(-1)
    probs[1, 2] = 0.0
    got = fim_expected_gradient_outerproduct(grads, probs)
    expected = torch.stack([oracles.fisher(p, g) for p, g in zip(probs, grads, strict=True)])
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(got, got.mT)


# ---- the matrix at the last real position ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_calculate_fisher_of_whatever_names_a_batch(layer: int, split: SplitModel, tokenizer: Any):
    expected = truths(split, layer)
    texts = [" ".join(f"w{i}" for i in row.tolist()) for row in ROWS]
    tokenizer.padding_side = "left"
    left = tokenizer(texts, padding=True, return_tensors="pt")
    tokenizer.padding_side = "right"
    right = tokenizer(texts, padding=True, return_tensors="pt")
    assert left["input_ids"][1, 0] == right["input_ids"][1, -1] == 0
    for name, tokens in {
        "texts": (texts,),
        "left": (left,),
        "right": (right,),
        "plain dict": (dict(left),),
        "lists": ({key: value.tolist() for key, value in left.items()},),
        "mask beside": (right["input_ids"], right["attention_mask"]),
        "other padding": (padded("left")["input_ids"], padded("left")["attention_mask"]),
    }.items():
        got = calculate_fisher(split, layer, *tokens)
        assert got.shape == (3, 24, 24), name
        assert oracles.error(got, expected) < MATRICES, name
    assert oracles.error(calculate_fisher(split, layer, ROWS[0][None]), expected[:1]) < MATRICES


def test_calculate_fisher_of_an_encoder_decoder(models: Models):
    split = models("t5")
    batch = oracles.inputs(split, [6])
    ids = batch.encoder["encoder_input_ids"]
    encoder = {"encoder_input_ids": ids, "encoder_attention_mask": torch.ones_like(ids)}
    truth = oracles.one_position(split, batch.rows[0], 5, [1], encoder).matrix(1)
    got = calculate_fisher(split, 1, batch.rows[0][None], encoder_input_ids=ids)
    assert oracles.error(got[0], truth) < MATRICES
    with pytest.raises(ValueError, match="needs encoder_input_ids"):
        calculate_fisher(split, 1, batch.rows[0][None])
    with pytest.raises(ValueError, match="needs encoder_input_ids"):
        LowerLayersModel(split, 1)(batch.rows[0][None])


def test_an_encoders_padding_is_masked_or_refused(tokenizer: PreTrainedTokenizerFast):
    split = SplitModel(build(FAMILIES["t5"]), tokenizer)
    ids, texts = torch.stack([ROWS[0], ROWS[0].flip(0)]), ROWS[1:]
    encoder = {f"encoder_{name}": each for name, each in oracles.Inputs(texts, {}).padded(["left"], 6).items()}
    got = calculate_fisher(split, 1, ids, **encoder)
    assert got.dtype == torch.float64
    for i, text in enumerate(texts):
        alone = {"encoder_input_ids": text[None], "encoder_attention_mask": torch.ones_like(text[None])}
        assert oracles.error(got[i], oracles.one_position(split, ids[i], 5, [1], alone).matrix(1)) < MATRICES
    for side in ("left", "right"):
        bare = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side=side)
        message = (
            r"sequence 0 begins or ends with the pad token \(0\) and there is no encoder_attention_mask. Pass encoder_"
        )
        refused(message, split, 1, ids, encoder_input_ids=bare)
        calculate_fisher(split, 1, ids, encoder_input_ids=bare, encoder_attention_mask=torch.ones_like(bare))


def test_sampled(split: SplitModel):
    arguments = padded("left").values()
    exact = truths(split, 1)
    got = calculate_fisher(split, 1, *arguments, num_samples=2000, seed=3)
    # Relative error of order 1/sqrt(2000) = 2 % times the spread of the scores.
    assert 1e-4 < oracles.error(got, exact) < 0.2
    assert torch.equal(got, calculate_fisher(split, 1, *arguments, num_samples=2000, seed=3))
    assert not torch.equal(got, calculate_fisher(split, 1, *arguments, num_samples=2000, seed=4))
    few = calculate_fisher(split, 1, *arguments, num_samples=3)
    assert (torch.linalg.matrix_rank(few, rtol=1e-9) <= 3).all()
    # One token likely enough is all there is in a tiny nucleus: a matrix of rank one.
    cut = calculate_fisher(split, 1, *arguments, num_samples=50, top_p=1e-6)
    assert (torch.linalg.matrix_rank(cut, rtol=1e-9) == 1).all()
    cold = calculate_fisher(split, 1, *arguments, num_samples=50, temperature=1e-3)
    torch.testing.assert_close(cold, cut, rtol=1e-9, atol=1e-12)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(message: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        calculate_fisher(*arguments, **named)
    assert "\n" not in str(refusal.value)


def test_padding_without_a_mask_is_refused(split: SplitModel):
    for row in ([0, 5, 6], [5, 6, 0]):
        refused(r"sequence 1 begins or ends with the pad token \(0\)", split, 1, torch.tensor([[7, 8, 9], row]))
        refused(r"begins or ends with the pad token", split, 1, {"input_ids": torch.tensor([row])})
        # With a mask that says the token is real, it is.
        calculate_fisher(split, 1, torch.tensor([row]), torch.ones(1, 3).long())
    calculate_fisher(split, 1, torch.tensor([[5, 0, 6]]))
    refused(r"of token ids, and not empty, got shape \[1, 0\]", split, 1, torch.empty(1, 0).long())


def test_bad_arguments(split: SplitModel, models: Models):
    ids = ROWS[0][None]
    refused(r"layer_idx must be in \[0, 3\], got 4", split, 4, ids)
    refused(r"layer_idx must be in \[0, 3\], got -1", split, -1, ids)
    refused("num_samples must be at least 1, got 0", split, 1, ids, num_samples=0)
    refused(r"top_p must be in \(0, 1\], got 1.5", split, 1, ids, num_samples=1, top_p=1.5)
    refused("temperature must be above 0", split, 1, ids, num_samples=1, temperature=0.0)
    refused("text 1 has no tokens", split, 1, ["w5 w6", ""])
    refused("has no tokenizer; pass token ids", models("gpt2"), 1, ["w5"])
    refused("a tokenizer's output or a list of texts", split, 1, "w5 w6")
    refused(r"token ids must be in \[0, 61\), got 61", split, 1, ids + 17)
    refused("takes no encoder_input_ids", split, 1, ids, encoder_input_ids=ids)
    refused("contiguous", split, 1, ids, torch.tensor([[1, 0, 1, 1, 1, 1]]))
    for half in (LowerLayersModel, UpperLayersModel):
        with pytest.raises(ValueError, match=r"layer_idx must be in \[0, 3\], got 4"):
            half(split, 4)
    with pytest.raises(ValueError, match="token ids must be in"):
        LowerLayersModel(split, 1)(ids + 60)


def test_truncating_arguments_need_samples(split: SplitModel):
    """top_p and temperature of an exact matrix would silently do nothing."""
    refused("num_samples", split, 1, ROWS[0][None], top_p=0.5)
    refused("num_samples", split, 1, ROWS[0][None], temperature=0.5)


def test_scores_that_are_not_finite_are_refused():
    model = build(FAMILIES["gpt2"])
    split = SplitModel(model)
    model.transformer.wte.weight[9, 0] = float("nan")
    refused("not finite at the last position of sequence 0", split, 1, ROWS[0][None])


def test_no_texts(split: SplitModel):
    refused("batch_tokens|input_ids", split, 1, [])
