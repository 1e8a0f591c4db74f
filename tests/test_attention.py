"""Attention in blocks of queries: the same as in one, in memory that does not grow with the square of the sequence."""

from __future__ import annotations

import oracles
import pytest
import torch
from conftest import Models
from transformers import masking_utils

from fisher_ray import Exact, Sampled, attention, score_factors

# Windows, soft-capping, sinks and position biases among them.
KINDS = ["gpt2", "mistral", "gemma2", "gpt_oss", "t5"]


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kept", [0, 1024])
@pytest.mark.parametrize("chosen", [None, (1, 7, 18)])
def test_blocks_of_any_size_give_the_same(
    name: str, kept: int, chosen: tuple[int, ...] | None, models: Models, monkeypatch: pytest.MonkeyPatch
):
    """Values and gradients; the window of 5 begins within blocks and at their edges."""
    split = models(name)
    batch = oracles.inputs(split, [19] * 8)
    asked = dict(**batch.padded(["right"], 19), layers=[0, 2], estimator=Exact(), positions=chosen)
    before = score_factors(split, **asked)
    monkeypatch.setattr(attention, "_KEPT", kept)
    for block in (1, 4, 18):
        monkeypatch.setattr(attention, "_BLOCK", block)
        after = score_factors(split, **asked)
        torch.testing.assert_close(after.entropy, before.entropy, rtol=0, atol=1e-12)
        for layer in (0, 2):
            assert oracles.error(after.activations[layer], before.activations[layer]) < 1e-12
            assert oracles.error(after.matrices(layer), before.matrices(layer)) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "gpt_oss"])
def test_memory_of_long_sequences_is_no_square(name: str, models: Models, monkeypatch: pytest.MonkeyPatch):
    """Neither what the graph keeps, nor what a backward pass holds at once."""
    split = models(name)
    monkeypatch.setattr(attention, "_BLOCK", 4)
    kept, most = [], []
    for weights_kept in (0, 1024):
        monkeypatch.setattr(attention, "_KEPT", weights_kept)
        for seq_len in (16, 32, 64):
            with split._live_bytes() as live:
                tape = split._whole_tape(seq_len)
                kept.append(live.now)
                tape.pull(tape.z)
            most.append(live.most)
            del tape
    for short, middle, long in (kept[:3], most[:3]):
        # What is the same for each length cancels: the second step is twice the first.
        assert long - middle == pytest.approx(2 * (middle - short), rel=0.02)
    if name == "gpt2":  # a window leaves no square to keep
        for short, middle, long in (kept[3:], most[3:]):
            assert long - middle > 2.1 * (middle - short)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "cohere2"])
def test_no_mask_of_a_long_sequence_is_made(name: str, models: Models, monkeypatch: pytest.MonkeyPatch):
    """Neither of causality nor of a window: transformers hands over none, or one by positions."""
    split = models(name)
    seen = []
    mask = attention._Seen.__init__

    def noted(self, where, ends, mask_, queries, keys):
        seen.append(mask_)
        mask(self, where, ends, mask_, queries, keys)

    monkeypatch.setattr(attention._Seen, "__init__", noted)
    for seq_len in (5, 40):  # the window's own length, and more
        seen.clear()
        split.record(torch.zeros(1, seq_len, dtype=torch.long), {})
        assert len(seen) == split.num_layers
        assert any(isinstance(each, attention._Window) for each in seen)
        assert not any(isinstance(each, torch.Tensor) for each in seen)


def test_no_mask_of_replayed_queries_is_made(models: Models, monkeypatch: pytest.MonkeyPatch):
    """Positions that repeat look to transformers like packed sequences, which get a mask of [queries, queries]."""
    split = models("llama")
    made: list[int] = []
    mask = masking_utils.sdpa_mask
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *given, **more: [made.append(1), mask(*given, **more)][1])
    asked = {"layers": [0], "estimator": Sampled(1), "token_source": "sampled", "num_token_draws": 3}
    score_factors(split, torch.arange(20)[None], **asked)  # and what is measured once
    made.clear()
    assert len(score_factors(split, torch.arange(20)[None], **asked)) == 19
    assert len(made) == 1  # of the context


@pytest.mark.parametrize(("seq_len", "mean"), [(100, 100.0), (128, 128.0), (256, 192.0), (1024, 576.0), (1025, 0.0)])
def test_kept_keys(seq_len: int, mean: float):
    assert attention.kept_keys(seq_len) == mean


def test_kept_keys_of_replayed_queries():
    assert attention.kept_keys(1024, [1023]) == 1024
    assert attention.kept_keys(1024, range(7, 1024, 8)) == 1024  # one block
    assert attention.kept_keys(1024, range(3, 1024, 4)) == (512 + 1024) / 2


def test_held_keys():
    assert [attention.held_keys(seq_len) for seq_len in (16, 128, 4096)] == [16, 128, 128]
    assert [attention.held_keys(4096, queries) for queries in (1, 128, 256)] == [4096, 4096, 2048]


@pytest.mark.parametrize("name", ["indices", "block_table"])
def test_what_attention_is_given_beside_a_mask_is_refused_by_name(name: str):
    """Indices choose the keys that a query sees, beyond so many tokens."""
    query = torch.randn(1, 2, 5, 4)
    with (
        attention.attention_mode([], "own"),
        pytest.raises(NotImplementedError, match=rf"Module passes {name} to its attention, which own-position"),
    ):
        attention._attention(torch.nn.Module(), query, query, query, None, **{name: torch.zeros(1)})
