"""Slow and independent: the library's own forward pass, one position at a time, and sums over the whole vocabulary.

Nothing of the package is used here but the list of blocks that marks where a residual stream is; that list is itself
tested against the library's ``output_hidden_states``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisher_ray.draws import Draws
from fisher_ray.estimators import Cotangents, Exact
from fisher_ray.head import Prediction
from fisher_ray.split import SplitModel


class Float64Throughout(TorchFunctionMode):
    """Wherever code asks for float32 it gets float64.

    transformers takes softmaxes, norms and rotary angles in float32 even in a float64 model, and where two ways of
    computing one number differ by 1e-16 those islands may round apart, by 1e-7. Without them 1e-12 can be asked for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if arg is torch.float32 else arg for k, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class EveryToken(Exact):
    """The scores of all tokens as they are, so that they can be compared one by one."""

    def num_factors(self, vocab_size: int, d_z: int) -> int:
        return vocab_size

    def cotangents(self, prediction: Prediction, draws: Draws) -> Cotangents:
        everything = torch.arange(prediction.head.vocab_size).expand(prediction.n, -1)
        one = torch.ones_like(prediction.entropy)
        return Cotangents(prediction.scores(everything), one, one)


@dataclass(frozen=True)
class OnePosition:
    """The truth at one position.

    Attributes:
        log_prob: [vocab_size].
        scores: per layer [vocab_size, d_model], grad_h log p(y).
        streams: per layer [d_model], h.
    """

    log_prob: Tensor
    scores: dict[int, Tensor]
    streams: dict[int, Tensor]

    @property
    def prob(self) -> Tensor:
        return self.log_prob.exp()

    def matrix(self, layer: int) -> Tensor:
        """F = sum_y p(y) g_y g_y^T, one token after the other."""
        return fisher(self.prob, self.scores[layer])


def fisher(prob: Tensor, scores: Tensor) -> Tensor:
    """sum_y p(y) g_y g_y^T."""
    return sum(p * torch.outer(g, g) for p, g in zip(prob, scores, strict=True))


def one_position(
    split: SplitModel, tokens: Tensor, position: int, layers: Sequence[int], encoder: dict[str, Tensor] | None = None
) -> OnePosition:
    """Plain autograd through the library's own model, for one unpadded sequence ``tokens [seq]`` and one position.

    A nudge ``v_y`` is added to the stream at ``position`` in row y of a batch of copies, one for each token y, and
    ``sum_y log p(y | row y)`` is differentiated in all of them.
    """
    vocab_size = split.model.get_output_embeddings().weight.shape[0]
    nudges = {layer: torch.zeros(vocab_size, split.d_model, dtype=torch.float64) for layer in layers}
    streams: dict[int, Tensor] = {}

    def nudged(layer: int, stream: Tensor) -> Tensor:
        streams[layer] = stream[0, position].detach().clone()
        here = torch.zeros(len(tokens), dtype=stream.dtype)
        here[position] = 1.0
        return stream + here[None, :, None] * nudges[layer][:, None]

    def before(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (nudged(layer, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": nudged(layer, kwargs["hidden_states"])}

        return hook

    def after(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (nudged(len(split.blocks), output[0]), *output[1:])
        return nudged(len(split.blocks), output)

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(Float64Throughout())
        for layer in layers:
            nudges[layer].requires_grad_()
            if layer == len(split.blocks):
                handle = split.blocks[-1].register_forward_hook(after)
            else:
                handle = split.blocks[layer].register_forward_pre_hook(before(layer), with_kwargs=True)
            stack.callback(handle.remove)
        logits = library_logits(split, tokens.expand(vocab_size, -1), encoder)[:, position]
        log_prob = logits.double().log_softmax(-1)
        grads = torch.autograd.grad(log_prob.diagonal().sum(), list(nudges.values()))
    return OnePosition(log_prob[0].detach(), dict(zip(layers, grads, strict=True)), streams)


def mean_matrix(
    split: SplitModel, tokens: Tensor, position: int, fed: Tensor, layer: int, encoder: dict[str, Tensor] | None = None
) -> Tensor:
    """Brute force for drawn tokens: each of ``fed [D]`` put in at ``position``, one at a time, and the mean of F there."""
    matrices = []
    for token in fed:
        other = tokens.clone()
        other[position] = token
        matrices.append(one_position(split, other, position, [layer], encoder).matrix(layer))
    return torch.stack(matrices).mean(0)


def tempered(log_prob: Tensor, top_p: float, temperature: float) -> tuple[Tensor, float]:
    """The nucleus of p^(1/T), token by token, normalised; and the mass of p in it."""
    sharpened = (log_prob / temperature).softmax(-1)
    kept, mass = torch.zeros_like(sharpened), 0.0
    for y in sharpened.argsort(descending=True).tolist():
        kept[y] = sharpened[y]
        mass += float(sharpened[y])
        if mass >= top_p:
            break
    return kept / kept.sum(), float(log_prob.exp()[kept > 0].sum())


def library_logits(split: SplitModel, tokens: Tensor, encoder: dict[str, Tensor] | None = None) -> Tensor:
    """Logits [batch, seq, vocab_size] of the library's model on its own attention."""
    if not split.is_encoder_decoder:
        return split.model(input_ids=tokens).logits
    assert encoder is not None
    batch = len(tokens)
    return split.model(
        input_ids=encoder["encoder_input_ids"].expand(batch, -1),
        attention_mask=encoder["encoder_attention_mask"].expand(batch, -1),
        decoder_input_ids=tokens,
        use_cache=False,
    ).logits


@dataclass(frozen=True)
class Inputs:
    """A batch of sequences of different lengths, with the padding put where it is asked for."""

    rows: list[Tensor]
    encoder: dict[str, Tensor]  # arguments of score_factors; empty unless the model has an encoder

    def padded(self, sides: Sequence[str], width: int) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``; row i is padded on ``sides[i % len(sides)]``: right, left or both."""
        ids = torch.full((len(self.rows), width), 7)  # any token: what a masked place holds must not matter
        mask = torch.zeros(len(self.rows), width, dtype=torch.long)
        for i, row in enumerate(self.rows):
            spare = width - len(row)
            start = {"right": 0, "left": spare, "both": spare // 2}[sides[i % len(sides)]]
            ids[i, start : start + len(row)] = row
            mask[i, start : start + len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask, **self.encoder}

    def subset(self, order: list[int]) -> Inputs:
        return Inputs([self.rows[i] for i in order], {name: value[order] for name, value in self.encoder.items()})

    def encoder_of(self, i: int) -> dict[str, Tensor]:
        return self.subset([i]).encoder


def encoded(split: SplitModel, encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """What SplitModel's passes take in place of the encoder's tokens."""
    return split.encode(encoder["encoder_input_ids"], encoder["encoder_attention_mask"].bool()) if encoder else {}


def inputs(split: SplitModel, lengths: Sequence[int], seed: int = 0) -> Inputs:
    """Random sequences, and encoder inputs with padding on the right where the model has an encoder."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = split.head.vocab_size
    rows = [torch.randint(1, vocab_size, (length,), generator=generator) for length in lengths]
    encoder = {}
    if split.is_encoder_decoder:
        ids = torch.randint(1, vocab_size, (len(rows), 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, 4:] = 0
        encoder = {"encoder_input_ids": ids, "encoder_attention_mask": mask}
    return Inputs(rows, encoder)


def error(got: Tensor, truth: Tensor) -> float:
    """Largest relative error over the leading axes, in Frobenius norm over the last two."""
    assert got.shape == truth.shape, f"{list(got.shape)} against {list(truth.shape)}"
    norms = (got.double() - truth.double()).norm(dim=(-2, -1)) / truth.double().norm(dim=(-2, -1))
    worst = float(norms.max())
    return worst if worst == worst else float("inf")


def row_index(scores: Any, sequence: int, position: int) -> int:
    """Where in Scores a position of a sequence is."""
    (found,) = ((scores.sequence == sequence) & (scores.position == position)).nonzero().flatten().tolist()
    return found
