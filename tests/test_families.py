"""Own-position scores of every family against plain autograd, one position at a time."""

from __future__ import annotations

import re

import oracles
import pytest
import torch
from conftest import Models
from families import FAMILIES, OTHERS, build

from fisher_ray import Exact, ModelError, SplitModel, attention, score_factors

# Measured 1e-15. Without the path through a query's own value .36 to .95, without its own key .025 to .55, with a stream
# hooked one block too low .29; the slope of attention's soft-capping alone is 3e-5 in this Gemma 2.
SCORES = 1e-12
# Without the encoder's mask .3 to .9.
MATRICES = 1e-10
# The library takes float32 softmaxes in a float64 model: 4e-7. Without sinks .15, without T5's position bias .07.
LOGITS = 1e-5

LENGTH = 12  # more than the sliding window of 5
POSITIONS = (1, 6, 11)  # early, middle, late


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("path", "attended"), [("whole", "kept"), ("replayed", "kept"), ("whole", "anew")])
def test_scores_equal_one_position_autograd(
    family: SplitModel, path: str, attended: str, monkeypatch: pytest.MonkeyPatch
):
    """Every token's score, every layer; padding on the right, on the left and on both sides in one batch.

    Attention in one block with its weights kept, as in any sequence this short, and in blocks of queries with the weights
    computed anew in each backward pass, as in long ones.
    """
    if attended == "anew":
        monkeypatch.setattr(attention, "_BLOCK", 5)
        monkeypatch.setattr(attention, "_KEPT", 0)
    # Twelve sequences of twelve are enough tokens for one graph over whole rows to be chosen.
    batch = oracles.inputs(family, [12, 12, 12, 9, 8, 7] + [12] * 6)
    layers = list(range(family.num_layers + 1))
    checked = {0: POSITIONS, 1: POSITIONS, 2: POSITIONS, 3: (0, 4, 8), 4: (2, 7), 5: (6,)}
    ran = spy(family, monkeypatch)
    scores = score_factors(
        family,
        **batch.padded(["right", "left", "both"], width=16),
        layers=layers,
        estimator=oracles.EveryToken(),
        positions=None if path == "whole" else [checked.get(i, ()) for i in range(12)],
    )
    assert (
        ran[-1] == {"whole": "own_tape", "replayed": "replay_tape"}[path]
    )  # what a graph takes may be measured before
    assert not scores.invalid
    for i, positions in checked.items():
        for position in positions:
            truth = oracles.one_position(family, batch.rows[i], position, layers, batch.encoder_of(i))
            n = oracles.row_index(scores, i, position)
            for layer in layers:
                assert oracles.error(scores.factors[layer][n], truth.scores[layer]) < SCORES, (i, position, layer)
                torch.testing.assert_close(scores.activations[layer][n, 0], truth.streams[layer], rtol=0, atol=1e-12)
            entropy = -(truth.prob * truth.log_prob).sum()
            torch.testing.assert_close(scores.entropy[n], entropy, rtol=0, atol=1e-12)
            if position + 1 < len(batch.rows[i]):
                surprisal = -truth.log_prob[batch.rows[i][position + 1]]
                torch.testing.assert_close(scores.surprisal[n], surprisal, rtol=0, atol=1e-12)
            else:
                assert scores.surprisal[n].isnan()
            assert scores.token[n] == scores.fed[n, 0] == batch.rows[i][position]


def test_layers_are_those_of_the_library(family: SplitModel):
    """Stream k is the library's hidden_states[k]; only its last one is taken after the final norm."""
    batch = oracles.inputs(family, [LENGTH])
    scores = score_factors(
        family, **batch.padded(["right"], LENGTH), layers=range(family.num_layers + 1), estimator=Exact()
    )
    encoded = oracles.encoded(family, batch.encoder)
    out = family.decoder(input_ids=batch.rows[0][None], output_hidden_states=True, use_cache=False, **encoded)
    assert len(out.hidden_states) == family.num_layers + 1
    for layer, stream in enumerate(out.hidden_states[:-1]):
        torch.testing.assert_close(scores.activations[layer][:, 0], stream[0], rtol=LOGITS, atol=LOGITS)


def test_logits_equal_the_library(family: SplitModel):
    batch = oracles.inputs(family, [LENGTH, 9])
    for i, row in enumerate(batch.rows):
        encoder = batch.encoder_of(i)
        encoded = oracles.encoded(family, encoder)
        everywhere = (torch.zeros_like(row), torch.arange(len(row)))
        tape = family.own_tape(row[None], encoded, [0], everywhere)
        context, recorded = family.record(row[None], encoded)
        replayed = family.replay_tape(row[None], everywhere[1][None], context, encoded, [0], everywhere)
        truth = oracles.library_logits(family, row[None], encoder)
        for z in (tape.z, recorded[0], replayed.z):
            assert oracles.error(family.head.predict(z).logits[None], truth) < LOGITS


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_models_that_mix_positions_are_refused_with_the_measured_error(name: str):
    with pytest.raises(ModelError, match="mixes positions outside transformers' attention interface") as refusal:
        SplitModel(build(OTHERS[name]))
    message = str(refusal.value)
    assert type(build(OTHERS[name])).__name__ in message
    assert "per_position" in message
    assert "\n" not in message
    (measured,) = re.findall(r"off by (\S+) relative", message)
    assert float(measured) > 0.1


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", [*sorted(OTHERS), "gpt2", "gemma2", "t5"])
def test_per_position_gradients_equal_one_position_autograd(name: str, models: Models):
    split = models(name, gradients="per_position")
    batch = oracles.inputs(split, [LENGTH, 9, 7])
    layers = list(range(split.num_layers + 1))
    wanted = [POSITIONS, (0, 4, 8), (6,)]
    arguments = dict(**batch.padded(["right", "left", "both"], 14), layers=layers, positions=wanted)
    scores = score_factors(split, **arguments, estimator=oracles.EveryToken())
    matrices = score_factors(split, **arguments, estimator=Exact())
    for i, positions in enumerate(wanted):
        for position in positions:
            truth = oracles.one_position(split, batch.rows[i], position, layers, batch.encoder_of(i))
            n = oracles.row_index(scores, i, position)
            for layer in layers:
                assert oracles.error(scores.factors[layer][n], truth.scores[layer]) < SCORES
                assert oracles.error(matrices.matrices(layer)[n], truth.matrix(layer)) < MATRICES


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_per_position_gradients_of_drawn_tokens_equal_brute_force(name: str, models: Models):
    split = models(name, gradients="per_position")
    batch = oracles.inputs(split, [LENGTH, 9])
    wanted = [POSITIONS, (1, 8)]
    scores = score_factors(
        split, **batch.padded(["left"], LENGTH), layers=[1], positions=wanted, estimator=Exact(),
        token_source="sampled", num_token_draws=3,
    )  # fmt: skip
    for n, (i, position) in enumerate((row, t) for row in range(2) for t in wanted[row]):
        truth = oracles.mean_matrix(split, batch.rows[i], position, scores.fed[n], 1)
        assert oracles.error(scores.matrices(1)[n], truth) < MATRICES


def spy(split: SplitModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tapes that ran, in order."""
    ran: list[str] = []

    def watch(name: str) -> None:
        original = getattr(split, name)

        def noted(*args, **kwargs):
            ran.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(split, name, noted)

    for name in ("own_tape", "replay_tape", "alone_tape"):
        watch(name)
    return ran


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_soft_capping_is_not_left_to_sdpa(name: str):
    """As some releases of transformers do: their logits are then not those of the model."""
    model = build({**FAMILIES, **OTHERS}[name], torch.float64)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"
    split = SplitModel(model)
    assert split.model.config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")
    assert split.self_check is not None and split.self_check.logits < 2e-6
