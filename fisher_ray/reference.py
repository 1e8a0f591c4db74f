"""The interface of the published single-GPU toolkit, on this engine: same names, same meanings.

Each ``model_name`` is a hub name, a local path or a :class:`~fisher_ray.SplitModel`; named models are loaded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisher_ray.architecture import ModelError
from fisher_ray.estimators import Exact, Sampled
from fisher_ray.numerics import full_precision
from fisher_ray.scores import score_factors
from fisher_ray.split import SplitModel, load

ModelName = str | Path | SplitModel


class LowerLayersModel:
    """Everything below block ``layer_idx``: tokens to residual streams."""

    def __init__(self, model_name: ModelName, layer_idx: int):
        self.split = load(model_name)
        (self.layer_idx,) = self.split.check_layers([layer_idx])

    def __call__(
        self, tokens: Int[Tensor, "*batch seq"], encoder_input_ids: Int[Tensor, "batch enc_seq"] | None = None
    ) -> tuple[Float[Tensor, "*batch seq d_model"], Float[Tensor, "*batch seq d_model"] | None]:
        """``(hidden_states, prev_states)``: the streams entering blocks ``layer_idx`` and ``layer_idx - 1``.

        ``prev_states`` is None at layer 0. Tokens without a batch axis give streams without one.
        """
        batch = torch.atleast_2d(tokens).to(self.split.device)
        self.split.check_ids(batch, batch.shape[1])
        wanted = [self.layer_idx] if self.layer_idx == 0 else [self.layer_idx - 1, self.layer_idx]
        streams = self.split.lower(batch, _encoded(self.split, encoder_input_ids), wanted)
        if tokens.ndim == 1:
            streams = {layer: stream[0] for layer, stream in streams.items()}
        return streams[self.layer_idx], streams.get(self.layer_idx - 1)


class UpperLayersModel:
    """Everything from block ``layer_idx`` up: residual streams to next-token logits at the last position.

    Raises:
        ModelError: blocks from there up read more than the stream, see :meth:`~fisher_ray.SplitModel.reads_ids`.
    """

    def __init__(self, model_name: ModelName, layer_idx: int):
        self.split = load(model_name)
        (self.layer_idx,) = self.split.check_layers([layer_idx])
        if self.split.reads_ids(self.layer_idx):
            raise ModelError(
                f"blocks of {self.split.label} from layer {layer_idx} up read more of the tokens than the residual stream. Use "
                "calculate_fisher or score_factors, which take the ids."
            )

    def __call__(
        self,
        final_latents: Float[Tensor, "batch d_model"],
        context: Float[Tensor, "batch context d_model"],
        encoder_input_ids: Int[Tensor, "batch enc_seq"] | None = None,
    ) -> Float[Tensor, "batch vocab_size"]:
        """Logits after a last position whose stream is ``final_latents`` and earlier ones whose streams are ``context``."""
        hidden = self._hidden(final_latents, context)
        with torch.no_grad(), full_precision():
            z = self.split.upper(hidden, self.layer_idx, _encoded(self.split, encoder_input_ids))
            return self.split.head.predict(z[:, -1]).logits

    @torch.no_grad()
    def jacobian(
        self,
        final_latents: Float[Tensor, "batch d_model"],
        context: Float[Tensor, "batch context d_model"],
        encoder_input_ids: Int[Tensor, "batch enc_seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch vocab_size d_model"], Float[Tensor, "batch vocab_size"]]:
        """``(scores, probs)``: grad of log p(y) in ``final_latents`` for every token y, and p; ``context`` is constant.

        Costs min(vocab_size, d_z) backward passes and ``vocab_size d_z d_model`` products a sequence.
        """
        split, hidden = self.split, self._hidden(final_latents, context)
        encoded = _encoded(split, encoder_input_ids)
        batch = len(hidden)
        vocab_size, d_z = split.head.vocab_size, split.head.d_z
        count = min(vocab_size, d_z)
        # With own-position gradients a copy is one more query; else a sequence of its own, which pulls them in turn.
        copies = count if split.gradients == "own_position" else 1
        with full_precision():
            tape = split.last_tape(hidden, self.layer_idx, encoded, copies)
            prediction = split.head.predict(tape.z[::copies])
            everything = torch.arange(vocab_size, device=split.device).expand(batch, -1)
            scores = prediction.scores(everything)
            identity = torch.eye(d_z).to(scores).expand(batch, -1, -1)
            cotangents = scores if vocab_size <= d_z else identity
            turns = [each.flatten(0, 1) for each in cotangents.split(copies, 1)]
            pulled = {i: each for _, i, each in tape.pull_each(turns)}
            rows = torch.cat([pulled[i].view(batch, copies, -1) for i in range(len(turns))], 1).to(scores.dtype)
            return rows if vocab_size <= d_z else scores @ rows, prediction.prob

    def _hidden(self, final_latents: Tensor, context: Tensor) -> Tensor:
        batch, d_model = len(final_latents), self.split.d_model
        shapes = (batch, d_model), (batch, *context.shape[1:2], d_model)
        if (final_latents.shape, context.shape) != shapes or not batch:
            raise ValueError(
                f"final_latents must be [batch, {d_model}] and context [batch, seq - 1, {d_model}] of at least one sequence, "
                f"got {list(final_latents.shape)} and {list(context.shape)}."
            )
        self.split.check_length(context.shape[1] + 1)
        return torch.cat([context, final_latents[:, None]], 1).to(self.split.device, self.split.dtype)


def fim_expected_gradient_outerproduct(
    grads: Float[Tensor, "batch vocab_size d_model"], probs: Float[Tensor, "batch vocab_size"]
) -> Float[Tensor, "batch d_model d_model"]:
    """``F = sum_y p(y) g_y g_y^T`` for each sequence, symmetric, in nats^2 per squared unit of h."""
    weighted = grads * probs.sqrt()[..., None]
    with full_precision():
        return weighted.mT @ weighted


def calculate_fisher(
    model_name: ModelName,
    layer_idx: int,
    batch_tokens: Int[Tensor, "batch seq"] | Mapping[str, Any] | Sequence[str],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    num_samples: int | None = None,
    *,
    top_p: float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
    encoder_input_ids: Int[Tensor, "batch enc_seq"] | None = None,
    encoder_attention_mask: Int[Tensor, "batch enc_seq"] | None = None,
) -> Float[Tensor, "batch d_model d_model"]:
    """The Fisher matrix at the last real position of each sequence.

    Args:
        model_name: hub name, path or SplitModel.
        layer_idx: 0..num_layers.
        batch_tokens: token ids, a tokenizer's output with its mask, or texts, which get no other tokens than the tokenizer's
            own: put the sink (BOS, else EOS) that a run's windows begin with before ids that are to be compared with a run's.
        attention_mask: true at real tokens; padding on either side. Without one every token is real.
        num_samples: scores sampled a position; None: exact.
        top_p: nucleus of the sampled scores, in (0, 1].
        temperature: temperature of the sampled scores, above 0.
        seed: of the sampled scores.
        encoder_input_ids: tokens of the encoder, for an encoder-decoder.
        encoder_attention_mask: true at the encoder's real tokens. Without one every token is real.

    Returns:
        F in float32 (float64 for a float64 model), on the model's device, in nats^2 per squared unit of h.

    Raises:
        ValueError: a row of bare ids, the encoder's too, begins or ends with the tokenizer's pad token and no mask says whether
            it is real; or an argument is out of range.
    """
    split = load(model_name)
    if num_samples is None and (top_p != 1.0 or temperature != 1.0):
        raise ValueError("top_p and temperature belong to sampled scores; give num_samples as well.")
    ids, mask = _token_batch(split, batch_tokens, attention_mask)
    if encoder_input_ids is not None and encoder_attention_mask is None:
        _refuse_padding(split, torch.atleast_2d(encoder_input_ids), "encoder_attention_mask")
    scores = score_factors(
        split,
        ids,
        layers=[layer_idx],
        estimator=Exact() if num_samples is None else Sampled(num_samples, top_p, temperature),
        attention_mask=mask,
        positions=[-1],
        encoder_input_ids=encoder_input_ids,
        encoder_attention_mask=encoder_attention_mask,
        seed=seed,
    )
    if scores.invalid:
        raise ValueError(f"scores are not finite at the last position of sequence {scores.invalid[0][0]}.")
    return scores.matrices(layer_idx)


def _encoded(split: SplitModel, encoder_input_ids: Tensor | None) -> dict[str, Tensor]:
    split.check_encoder(encoder_input_ids is not None)
    if encoder_input_ids is None:
        return {}
    split.check_ids(encoder_input_ids, encoder_input_ids.shape[1])
    return split.encode(encoder_input_ids.to(split.device))


def _refuse_padding(split: SplitModel, ids: Tensor, mask: str) -> None:
    """Refuse rows of ids that begin or end with the pad token, where the mask of that name was not given."""
    pad = getattr(split.tokenizer, "pad_token_id", None)
    if pad is None:
        return
    padded = (torch.cat([ids[:, :1], ids[:, -1:]], 1) == pad).any(1).nonzero().flatten()
    if len(padded):
        raise ValueError(
            f"sequence {int(padded[0])} begins or ends with the pad token ({pad}) and there is no {mask}. "
            f"Pass {mask}, ones at real tokens."
        )


def _token_batch(
    split: SplitModel, tokens: Tensor | Mapping[str, Any] | Sequence[str], mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Ids and mask from whatever names a batch of sequences."""
    if isinstance(tokens, Tensor):
        ids = torch.atleast_2d(tokens)
        if mask is None:
            _refuse_padding(split, ids, "attention_mask")
        return ids, None if mask is None else torch.atleast_2d(mask)
    if isinstance(tokens, Mapping):
        found = tokens.get("attention_mask") if mask is None else mask
        return _token_batch(
            split, torch.as_tensor(tokens["input_ids"]), None if found is None else torch.as_tensor(found)
        )
    if isinstance(tokens, str) or not tokens or not all(isinstance(text, str) for text in tokens):
        raise ValueError("batch_tokens must be token ids [batch, seq], a tokenizer's output or a list of texts.")
    if split.tokenizer is None:
        raise ValueError(f"{split.name} has no tokenizer; pass token ids in place of texts.")
    rows = [split.tokenizer(text)["input_ids"] for text in tokens]
    if not all(rows):
        raise ValueError(f"text {[bool(row) for row in rows].index(False)} has no tokens.")
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
