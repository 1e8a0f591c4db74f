"""Score factors of a language model at chosen positions and layers.

For each position the estimator gives R cotangents at the final hidden state; pulled back to the residual streams they
are the score factors ``G [R, d_model]`` with ``F = G^T G``. One backward pass of own-position gradients pulls a
cotangent of every position through every layer. Work is cut into micro-batches that fit a memory budget.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisher_ray.attention import kept_keys
from fisher_ray.draws import Draws, sequence_key
from fisher_ray.estimators import Estimator, check_tempering, check_whole, tempered
from fisher_ray.head import psd_factor
from fisher_ray.kernels import is_out_of_memory
from fisher_ray.numerics import full_precision
from fisher_ray.spectrum import solving_bytes
from fisher_ray.split import SplitModel
from fisher_ray.tape import Tape

TokenSource = Literal["observed", "sampled"]

# Fewer rows than this leave a matrix product waiting for the weights: chosen positions are then repeated, each copy
# with a cotangent of its own; and where memory holds no graph of twice as many tokens, none of a whole model is built.
_FULL_PRODUCT = 256
# On a GPU fewer leave it waiting for the next launch.
_GPU_FULL_PRODUCT = 4096
# The largest norm of a stream or of a position's factors that is taken for finite: sums of 4,096 such squares are, in float32.
_LONGEST = 1e17


@dataclass
class Scores:
    """Score factors at N positions, rows ordered by sequence and position.

    Attributes:
        factors: per layer [N, R, d_model]; ``F = G^T G`` in nats^2 per squared unit of h.
        activations: per layer [N, D, d_model]: the streams h, one for each token fed in (D = 1 for observed tokens).
        sequence: [N], row of ``input_ids``.
        position: [N], counted over the sequence's own tokens, so padding does not shift it, and over a sink where there is
            one: a run's tables count a document's tokens alone (:func:`fisher_ray.directions.window`).
        token: [N], the observed token there.
        fed: [N, D], the tokens fed in: the observed one, or those drawn.
        entropy: [N], of p(. | h_t, x_<t), nats; the mean over D.
        surprisal: [N], -log p of the observed next token, nats; the mean over D; NaN where there is none.
        kept_mass: [N], probability mass that the estimator's truncation kept; 1 without.
        captured_share: [N], of ``tr M``, the trace of F at the final hidden state, what is in factors that no draw decides:
            1 where they are exact, 0 where all are sampled; the mean over D.
        invalid: (sequence, position) of rows left out because activations, p or scores were not finite, or longer than 1e17.
        halvings: how often memory ran out and a micro-batch was cut in two.
    """

    factors: dict[int, Float[Tensor, "N R d_model"]]
    activations: dict[int, Float[Tensor, "N D d_model"]]
    sequence: Int[Tensor, " N"]
    position: Int[Tensor, " N"]
    token: Int[Tensor, " N"]
    fed: Int[Tensor, "N D"]
    entropy: Float[Tensor, " N"]
    surprisal: Float[Tensor, " N"]
    kept_mass: Float[Tensor, " N"]
    captured_share: Float[Tensor, " N"]
    invalid: list[tuple[int, int]] = field(default_factory=list)
    halvings: int = 0

    def __len__(self) -> int:
        return len(self.sequence)

    def matrices(self, layer: int) -> Float[Tensor, "N d_model d_model"]:
        """``F = G^T G``, symmetric to the last bit."""
        factors = self.factors[layer]
        with full_precision():
            product = factors.mT @ factors
        return (product + product.mT) / 2


def score_factors(
    model: SplitModel,
    input_ids: Int[Tensor, "batch seq"],
    *,
    layers: Sequence[int],
    estimator: Estimator,
    attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None = None,
    positions: Sequence[int] | Sequence[Sequence[int]] | None = None,
    token_source: TokenSource = "observed",
    num_token_draws: int = 1,
    token_top_p: float = 1.0,
    token_temperature: float = 1.0,
    keys: Sequence[str | int] | None = None,
    encoder_input_ids: Int[Tensor, "batch enc_seq"] | None = None,
    encoder_attention_mask: Int[Tensor, "batch enc_seq"] | Bool[Tensor, "batch enc_seq"] | None = None,
    following: Sequence[int | None] | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
) -> Scores:
    """Score factors of ``p(. | h_t, x_<t)`` at every chosen position and layer.

    Args:
        model: the model.
        input_ids: tokens; for an encoder-decoder those of the decoder.
        layers: any of 0..num_layers; ``k`` is the residual stream entering block ``k``, ``num_layers`` the stream after
            the last block, before the final norm.
        estimator: ``Exact()``, ``Sampled(num_samples)`` or ``Deflated(rank, num_samples)``.
        attention_mask: true at real tokens, which must be contiguous in each row; padding left, right or both changes
            nothing. None: every token is real.
        positions: for all sequences, or a list for each; counted over a sequence's own tokens, negative from its end. Lists
            may be tensors or arrays of whole numbers. None: all of them.
        token_source: ``observed`` takes the token at t from ``input_ids``; ``sampled`` draws ``num_token_draws`` tokens
            from p(. | x_<t), feeds each in at t, and averages the matrices there. Position 0 has nothing to draw from
            and is left out.
        num_token_draws: D, tokens drawn a position; only with ``sampled``.
        token_top_p: nucleus of the token draws, in (0, 1].
        token_temperature: temperature of the token draws, above 0.
        keys: names of the sequences for the random draws; default: a hash of their ids.
        encoder_input_ids: tokens of the encoder, for an encoder-decoder.
        encoder_attention_mask: true at the encoder's real tokens.
        following: the token after each sequence's last, or None; for the surprisal there.
        seed: of all draws.
        memory_budget: bytes that one micro-batch may take; default: 2 GiB, on a GPU half of what the weights leave of
            its memory. Changing it may change rounding.

    Returns:
        Scores in float32 (float64 for a float64 model), on the model's device.

    Raises:
        ValueError: an argument is out of range; the message says what was expected.
        MemoryError: not even one position fits.

    Cost: one forward pass, R backward passes over the blocks from the lowest layer up, ``2 vocab_size d_model`` flop a
    position each for logits and for their mean row; exact: ``2 vocab_size d_model^2`` flop a position more, of which
    up to half is left out.
    """
    chunks = list(
        iter_scores(
            model,
            input_ids,
            layers=layers,
            estimator=estimator,
            attention_mask=attention_mask,
            positions=positions,
            token_source=token_source,
            num_token_draws=num_token_draws,
            token_top_p=token_top_p,
            token_temperature=token_temperature,
            keys=keys,
            encoder_input_ids=encoder_input_ids,
            encoder_attention_mask=encoder_attention_mask,
            following=following,
            seed=seed,
            memory_budget=memory_budget,
        )
    )

    try:
        return _joined(chunks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"the scores of {sum(map(len, chunks))} positions do not fit in memory; use iter_scores."
        ) from None


def _joined(chunks: list[Scores]) -> Scores:
    if len(chunks) == 1:
        return chunks[0]

    def joined(parts: list[Any]) -> Any:
        if isinstance(parts[0], dict):
            return {layer: joined([part[layer] for part in parts]) for layer in parts[0]}
        return torch.cat(parts) if isinstance(parts[0], Tensor) else sum(parts[1:], parts[0])

    return Scores(**{name: joined([getattr(chunk, name) for chunk in chunks]) for name in vars(chunks[0])})


def iter_scores(
    model: SplitModel,
    input_ids: Int[Tensor, "batch seq"],
    *,
    layers: Sequence[int],
    estimator: Estimator,
    attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None = None,
    positions: Sequence[int] | Sequence[Sequence[int]] | None = None,
    token_source: TokenSource = "observed",
    num_token_draws: int = 1,
    token_top_p: float = 1.0,
    token_temperature: float = 1.0,
    keys: Sequence[str | int] | None = None,
    encoder_input_ids: Int[Tensor, "batch enc_seq"] | None = None,
    encoder_attention_mask: Int[Tensor, "batch enc_seq"] | Bool[Tensor, "batch enc_seq"] | None = None,
    following: Sequence[int | None] | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
) -> Iterator[Scores]:
    """The same as :func:`score_factors`, in chunks of bounded memory, in order."""
    if not isinstance(model, SplitModel):
        raise ValueError(f"model must be a SplitModel, got {type(model).__name__}. Give SplitModel(model).")
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator must be Exact(), Sampled(8) or the like, got {estimator!r}.")
    model.check_hooks()
    rows = _real_tokens(model, input_ids, attention_mask)
    if token_source not in ("observed", "sampled"):
        raise ValueError(f"token_source must be observed or sampled, got {token_source!r}.")
    check_whole("num_token_draws", num_token_draws)
    check_whole("seed", seed, 63)
    if num_token_draws < 1 or (token_source == "observed" and num_token_draws != 1):
        raise ValueError(
            f"num_token_draws must be at least 1, and 1 with observed tokens, got {num_token_draws} with {token_source}."
        )
    check_tempering(token_top_p, token_temperature, "token_")
    model.check_encoder(encoder_input_ids is not None)
    if encoder_input_ids is not None:
        _check_encoder(model, len(rows), encoder_input_ids, encoder_attention_mask)
    elif encoder_attention_mask is not None:
        raise ValueError("encoder_attention_mask is given without encoder_input_ids.")
    for name, given in (("keys", keys), ("following", following)):
        if given is not None and len(given) != len(rows):
            raise ValueError(f"{name} must have an entry for each of the {len(rows)} sequences, got {len(given)}.")
    tokens: list[Any] = [None] * len(rows) if following is None else _plain(following)
    for token in tokens:
        if token is not None and not (isinstance(token, Integral) and 0 <= int(token) < model.head.vocab_size):
            raise ValueError(f"following must be tokens in [0, {model.head.vocab_size}) or None, got {token}.")
    pass_ = Pass(
        model=model,
        rows=rows,
        following=[-1 if token is None else token for token in tokens],
        layers=model.check_layers(layers),
        estimator=estimator,
        draws_tokens=token_source == "sampled",
        num_token_draws=num_token_draws,
        token_top_p=token_top_p,
        token_temperature=token_temperature,
        keys=torch.tensor(
            [
                sequence_key(seed, keys[i] if keys is not None else row.to(torch.int64).cpu().numpy().tobytes())
                for i, row in enumerate(rows)
            ],
            device=model.device,
        ),
        encoder=None if encoder_input_ids is None else encoder_input_ids.to(model.device),
        encoder_mask=None if encoder_attention_mask is None else encoder_attention_mask.to(model.device).bool(),
        budget=memory_budget if memory_budget is not None else default_memory_budget(model),
    )
    chosen = chosen_positions(rows, positions, first=1 if token_source == "sampled" else 0)
    return pass_.run(chosen)


def default_memory_budget(model: SplitModel, share: float = 1.0) -> int:
    """Bytes for one micro-batch: 2 GiB, on a GPU half of what the weights leave of a share of its memory, on several the least.

    The other half is for sums, for what the allocator keeps, and for what is not counted: on a GPU attention goes by larger
    blocks than :func:`fisher_ray.attention.held_keys` says, up to 1.5 GiB of them.
    """
    if model.device.type != "cuda":
        return 2 << 30
    weights = {model.device: 0}
    for parameter in model.model.parameters():
        if not parameter.is_meta:
            weights[parameter.device] = weights.get(parameter.device, 0) + parameter.nbytes
    return min(
        int(share * torch.cuda.get_device_properties(device).total_memory - taken - model.fetched_bytes) // 2
        for device, taken in weights.items()
    )


def _real_tokens(model: SplitModel, input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Each sequence's real tokens. Padding ends here: rows are padded anew, on the right, where no query sees it."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        got = f"shape {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor [batch, seq] of token ids, and not empty, got {got}.")
    if attention_mask is None:
        rows = list(input_ids)
    else:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, got {list(attention_mask.shape)}."
            )
        rows = []
        for i, mask in enumerate(attention_mask.bool()):
            real = mask.nonzero().flatten()
            if len(real) == 0:
                raise ValueError(f"sequence {i} has no real tokens: its attention_mask is zero everywhere.")
            if int(real[-1] - real[0]) + 1 != len(real):
                raise ValueError(f"the real tokens of sequence {i} must be contiguous; its attention_mask has holes.")
            rows.append(input_ids[i, real[0] : real[-1] + 1])
    model.check_ids(torch.cat(rows), max(map(len, rows)))
    return [row.to(model.device, torch.int64) for row in rows]


def _check_encoder(model: SplitModel, batch: int, ids: Tensor, mask: Tensor | None) -> None:
    if ids.ndim != 2 or len(ids) != batch or ids.numel() == 0:
        raise ValueError(f"encoder_input_ids must be [{batch}, enc_seq], one row a sequence, got {list(ids.shape)}.")
    model.check_ids(ids, ids.shape[1])
    if mask is not None and (mask.shape != ids.shape or not bool(mask.bool().any(1).all())):
        raise ValueError(
            f"encoder_attention_mask must have the shape of encoder_input_ids, {list(ids.shape)}, and a real token in each "
            f"row; got {list(mask.shape)}."
        )


def _plain(given: Any) -> Any:
    """Numbers of Python, and lists of them, for tensors and arrays, also within lists."""
    if isinstance(given, Tensor | np.ndarray | np.generic):
        return given.tolist()
    return [_plain(each) for each in given] if isinstance(given, list | tuple) else given


def chosen_positions(
    rows: list[Tensor], positions: Sequence[int] | Sequence[Sequence[int]] | None, first: int
) -> list[list[int]]:
    """Positions of each sequence, ascending."""
    per_row: Sequence[Any]
    positions = _plain(positions)
    if positions is None:
        per_row = [range(first, len(row)) for row in rows]
    elif isinstance(positions, list) and positions and not isinstance(positions[0], Integral):
        per_row = positions
        if len(per_row) != len(rows):
            raise ValueError(f"positions must have one list for each of the {len(rows)} sequences, got {len(per_row)}.")
    else:
        per_row = [positions] * len(rows)
    chosen = []
    for i, (row, wanted) in enumerate(zip(rows, per_row, strict=True)):
        if not isinstance(wanted, Collection) or not all(isinstance(t, Integral) for t in wanted):
            raise ValueError(f"positions must be a list of whole numbers, or one for each sequence, got {wanted!r}.")
        if any(isinstance(t, bool) for t in wanted):
            raise ValueError("positions are places, not a mask of booleans. Give mask.nonzero().flatten().")
        counted = {t + len(row) if t < 0 else t: t for t in map(operator.index, wanted)}
        for position, given in counted.items():
            if not first <= position < len(row):
                nothing = ", as nothing is before the first to draw its token from" if first else ""
                raise ValueError(
                    f"positions of sequence {i} must be in [{first}, {len(row)}){nothing}, or negative; got {given}."
                )
        chosen.append(sorted(counted))
    if not any(chosen):
        raise ValueError("no positions to score: none were given, or every sequence is too short.")
    return chosen


@dataclass(frozen=True)
class _Batch:
    """Positions of a few sequences that go through the model together."""

    rows: list[int]
    positions: list[list[int]]

    def halves(self) -> tuple[_Batch, _Batch] | None:
        if len(self.rows) > 1:
            cut = len(self.rows) // 2
            return _Batch(self.rows[:cut], self.positions[:cut]), _Batch(self.rows[cut:], self.positions[cut:])
        only = self.positions[0]
        if len(only) > 1:
            cut = len(only) // 2
            return _Batch(self.rows, [only[:cut]]), _Batch(self.rows, [only[cut:]])
        return None


@dataclass(frozen=True)
class Pass:
    """One call's arguments, checked, and the way from positions to scores."""

    model: SplitModel
    rows: list[Tensor]
    following: list[int]
    layers: list[int]
    estimator: Estimator
    draws_tokens: bool
    num_token_draws: int
    token_top_p: float
    token_temperature: float
    keys: Int[Tensor, "batch 2"]
    encoder: Tensor | None
    encoder_mask: Tensor | None
    budget: int

    @property
    def num_factors(self) -> int:
        return self.estimator.num_factors(self.model.head.vocab_size, self.model.head.d_z)

    def run(self, chosen: list[list[int]]) -> Iterator[Scores]:
        for batch in self.batches(chosen):
            yield from self._attempt(batch, 0)

    # ---- cutting into micro-batches ----------------------------------------------------------------------------------

    def batches(self, chosen: list[list[int]]) -> Iterator[_Batch]:
        """Sequences in order, as many together as fit; a sequence that does not fit alone by blocks of positions."""
        rows: list[int] = []
        for i, positions in enumerate(chosen):
            if not positions:
                continue
            if rows and self.memory([*rows, i], [*(chosen[r] for r in rows), positions]) > self.budget:
                yield _Batch(rows, [chosen[r] for r in rows])
                rows = []
            if self.memory([i], [positions]) <= self.budget:
                rows.append(i)
                continue
            if rows:  # it fits beside others and not alone: what a query takes is less where there are more
                yield _Batch(rows, [chosen[r] for r in rows])
                rows = []
            size = len(positions)
            while size > 1 and self.memory([i], [positions[-size:]]) > self.budget:  # the last ones see most keys
                size = -(-size // 2)
            for start in range(0, len(positions), size):
                yield _Batch([i], [positions[start : start + size]])
        if rows:
            yield _Batch(rows, [chosen[r] for r in rows])

    def memory(self, rows: list[int], positions: list[list[int]]) -> float:
        """Bytes that a micro-batch takes, at most: while cotangents are pulled, or while statistics are made of its scores."""
        model, draws, num_layers = self.model, self.num_token_draws, len(self.layers)
        scored = sum(map(len, positions))
        queries = scored * draws
        longest = max(len(self.rows[i]) for i in rows)
        if model.gradients == "per_position":  # whose rows end with the last position
            longest = 1 + max(wanted[-1] for wanted in positions)
        number = torch.promote_types(model.dtype, torch.float32).itemsize
        stream = model.d_model * model.dtype.itemsize

        # Of every query: its streams, its cotangents, and what they are pulled back to.
        tokens, kept, gathers = self._taped(rows, positions, longest)
        asked = self.num_factors * model.head.d_z * number
        if gathers:
            asked += num_layers * stream
        pulled = self.num_factors * num_layers * model.d_model * number
        if self.walks:
            pulled += self.num_factors * stream
        # A backward pass holds the gradients of all streams; predictions stand on the graph before it.
        held = tokens * (model.working_bytes(longest, tokens // len(rows)) + num_layers * stream)
        head = model.head
        predicting = number * self.estimator.held(min(queries, head.positions_at_once()), head)
        pulling = kept + max(held + queries * pulled, predicting) + queries * asked
        recording = 0.0
        if model.gradients == "own_position" and not self.whole(rows, positions):
            recording = len(rows) * longest * model.recorded_bytes(longest)[1]

        finished = min(draws * self.num_factors, model.d_model) if draws > 1 else self.num_factors
        scores = num_layers * (finished * number + draws * number) * model.d_model
        if draws > 1:  # both what is averaged and the mean
            scores += num_layers * draws * self.num_factors * model.d_model * number
        solving = solving_bytes(scored, finished, model.d_model)
        return float(max(recording, pulling, scored * scores + solving))

    def _taped(self, rows: list[int], positions: list[list[int]], longest: int) -> tuple[int, float, bool]:
        """Tokens of the tape, padding and copies included, the bytes that it keeps, and whether it holds more than queries."""
        model, queries = self.model, sum(map(len, positions)) * self.num_token_draws
        # Of rows replayed side by side a block sees as many keys as the one that sees most.
        replayed = None if self.whole(rows, positions) else max(positions, key=partial(kept_keys, longest))
        token = model.graph_bytes(longest, self.layers[0], replayed)
        if self.walks:  # the graph of one block, and what enters each
            blocks = model.num_layers - self.layers[0]
            token = model.graph_bytes(longest, model.num_layers - 1, replayed)
            token += blocks * model.d_model * model.dtype.itemsize
        if model.gradients == "per_position":
            tokens = queries * longest * self.copies(queries * longest)
            return tokens, tokens * token, True
        if self.whole(rows, positions):
            tokens = len(rows) * longest
            return tokens, tokens * token, tokens > queries
        context = len(rows) * longest * model.recorded_bytes(longest)[0]
        copies = self.copies(queries)
        tokens = len(rows) * max(map(len, positions)) * self.num_token_draws * copies
        return tokens, context + tokens * token, tokens > queries * copies

    @cached_property
    def walks(self) -> bool:
        """Whether blocks are run again from the top down, one graph at a time, in place of one graph of them all.

        That is one more forward pass, and is done where weights are streamed, and where the budget holds no graph of the
        longest sequence, or of tokens enough for matrix products to be full.
        """
        if self.model.streamed:
            return True
        if self.model.gradients == "per_position" or self.model.num_layers - self.layers[0] < 2:
            return False
        longest = max(map(len, self.rows))
        tokens = min(max(longest, 2 * _FULL_PRODUCT), sum(map(len, self.rows)))
        return tokens * self.model.graph_bytes(longest, self.layers[0]) > self.budget

    def copies(self, tokens: int) -> int:
        """Copies of each query, so that one backward pass pulls as many cotangents as fill a matrix product.

        ``tokens``: of one copy of all, which are more than queries where each has its own sequence.
        """
        return max(1, min(self.num_factors, self._full_product // tokens))

    @property
    def _full_product(self) -> int:
        return _GPU_FULL_PRODUCT if self.model.device.type == "cuda" else _FULL_PRODUCT

    def whole(self, rows: list[int], positions: list[list[int]]) -> bool:
        """Whether one graph over all tokens is cheaper than recording them and replaying the chosen positions."""
        if self.draws_tokens:
            return False
        tokens = len(rows) * max(len(self.rows[i]) for i in rows)
        queries = len(rows) * max(map(len, positions))
        if tokens < self._full_product // 2 and self.copies(queries) > 1:
            return False
        return tokens * (1 + self.num_factors) <= tokens + queries * (1 + self.num_factors)

    def _attempt(self, batch: _Batch, halvings: int) -> Iterator[Scores]:
        """Score a micro-batch; out of memory cuts it in two and goes on."""
        try:
            scores = self._score(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            halves = batch.halves()
            if halves is None:
                raise MemoryError(
                    f"out of memory with a single position of a sequence of {len(self.rows[batch.rows[0]])} tokens, "
                    f"{len(self.layers)} layers and {self.num_factors} factors. Ask for fewer layers or samples, a "
                    "shorter sequence, or half-precision weights."
                ) from None
        else:
            scores.halvings = halvings
            yield scores
            return
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        yield from self._attempt(halves[0], halvings + 1)
        yield from self._attempt(halves[1], 0)

    # ---- one micro-batch ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _score(self, batch: _Batch) -> Scores:
        device = self.model.device
        row = torch.tensor([i for i, wanted in enumerate(batch.positions) for _ in wanted], device=device)
        position = torch.tensor([t for wanted in batch.positions for t in wanted], device=device)
        tokens, lengths = self._padded(batch.rows)
        sequence = torch.tensor(batch.rows, device=device)[row]
        names = self.keys[sequence]
        with full_precision():
            tape, fed, copies = self._forward(batch, tokens, row, position, names)
            num_draws = fed.shape[1]
            # From here on a query is a (position, token draw); its copies on the tape follow each other.
            query_position = position.repeat_interleave(num_draws)
            next_token = self._next(batch.rows, tokens, lengths)[row, position]
            queried_next = next_token.clamp_min(0).repeat_interleave(num_draws)
            first_sample = (torch.arange(num_draws, device=device) * self.num_factors).repeat(len(row))
            draws = Draws(names.repeat_interleave(num_draws, 0), query_position, first_sample, "score")
            cotangents, *per_query = self._cotangents(tape.z[::copies], draws, queried_next)
            factors = {
                layer: self.averaged(g, num_draws) for layer, g in self._pulled(tape, cotangents, copies).items()
            }
            streams = tape.streams
            del tape, cotangents  # the graph, before what is made of the scores
        entropy, surprisal, kept, captured = (value.view(-1, num_draws).mean(1) for value in per_query)
        activations = {
            # Not a view: what is kept of it would keep all copies.
            layer: stream[::copies].to(entropy.dtype, copy=copies > 1).unflatten(0, (-1, num_draws))
            for layer, stream in streams.items()
        }
        valid = entropy.isfinite()
        for tensors in (factors, activations):
            for tensor in tensors.values():
                # NaN and infinity are not below it; and of what is, sums of outer products are finite.
                valid &= torch.linalg.vector_norm(tensor.flatten(1), dim=1) < _LONGEST
        good = slice(None) if bool(valid.all()) else valid  # a copy of the factors is made only where it must be
        return Scores(
            factors={layer: tensor[good] for layer, tensor in factors.items()},
            activations={layer: tensor[good] for layer, tensor in activations.items()},
            sequence=sequence[good],
            position=position[good],
            token=tokens[row, position][good],
            fed=fed[good],
            entropy=entropy[good],
            surprisal=surprisal.masked_fill(next_token < 0, torch.nan)[good],
            kept_mass=kept[good],
            captured_share=captured[good],
            invalid=list(zip(sequence[~valid].tolist(), position[~valid].tolist(), strict=True)),
        )

    def _padded(self, rows: list[int]) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, " batch"]]:
        """Sequences padded on the right, where causality hides the padding, and their lengths.

        The padding repeats a sequence's first token: another one's activations might not be finite.
        """
        own = [self.rows[i] for i in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-1)
        return tokens.where(tokens >= 0, tokens[:, :1]), torch.tensor([*map(len, own)], device=tokens.device)

    def _next(self, rows: list[int], tokens: Tensor, lengths: Tensor) -> Int[Tensor, "batch seq"]:
        """The token after each, -1 where there is none, or none that the head knows: embeddings may have more."""
        after = tokens.roll(-1, 1)
        last = torch.tensor([self.following[i] for i in rows], device=tokens.device)
        after = after.scatter(1, lengths[:, None] - 1, last[:, None])
        return after.masked_fill(after >= self.model.head.vocab_size, -1)

    def _forward(
        self, batch: _Batch, tokens: Tensor, row: Tensor, position: Tensor, names: Tensor
    ) -> tuple[Tape, Int[Tensor, "N D"], int]:
        """The tape of all queries in the order (position, token draw, copy), the tokens fed in, and the copies of each."""
        model = self.model
        encoded: Mapping[str, Tensor] = {}
        if self.encoder is not None:
            encoded = model.encode(
                self.encoder[batch.rows], None if self.encoder_mask is None else self.encoder_mask[batch.rows]
            )
        fed = tokens[row, position][:, None]
        alone = model.gradients == "per_position"
        if not alone and self.whole(batch.rows, batch.positions):
            everything = fed.shape[0] == tokens.numel()
            where = None if everything else (row, position)
            return model.own_tape(tokens, encoded, self.layers, where, self.walks), fed, 1

        context, z = (None, None) if alone else model.record(tokens, encoded)
        if self.draws_tokens:
            z = model.states(tokens, encoded) if z is None else z
            fed = self._drawn(z[row, position - 1], Draws(names, position, torch.zeros_like(position), "token"))
        del z  # as large as a layer's keys
        copies = self.copies(fed.numel() * (int(position.max()) + 1 if alone else 1))
        repeats = fed.shape[1] * copies
        flat_row, flat_position = row.repeat_interleave(repeats), position.repeat_interleave(repeats)
        flat_fed = fed.flatten().repeat_interleave(copies)
        if context is None:
            own = tokens[flat_row, : int(position.max()) + 1]
            later = torch.arange(own.shape[1], device=own.device) > flat_position[:, None]
            own = own.where(~later, own[:, :1])
            own[torch.arange(len(own), device=own.device), flat_position] = flat_fed
            each = {name: value[flat_row] for name, value in encoded.items()}
            return model.alone_tape(own, each, self.layers, flat_position), fed, copies
        column = torch.cat([torch.arange(len(wanted) * repeats, device=row.device) for wanted in batch.positions])
        shape = (len(tokens), int(column.max()) + 1)
        query_token, query_position = (
            tokens[:, :1].repeat(1, shape[1]),
            torch.zeros_like(tokens[:, :1]).repeat(1, shape[1]),
        )
        query_token[flat_row, column], query_position[flat_row, column] = flat_fed, flat_position
        where = None if len(column) == query_token.numel() else (flat_row, column)
        tape = model.replay_tape(query_token, query_position, context, encoded, self.layers, where, walk=self.walks)
        return tape, fed, copies

    def _drawn(self, z: Float[Tensor, "N d_z"], draws: Draws) -> Int[Tensor, "N D"]:
        """Tokens drawn from p(. | x_<t) at the final hidden states before each position."""
        drawn = []
        for rows in _slices(len(z), self.model.head.positions_at_once()):
            weights, _ = tempered(self.model.head.predict(z[rows]), self.token_top_p, self.token_temperature)
            drawn.append(draws[rows].tokens(weights, self.num_token_draws))
        return torch.cat(drawn)

    def _cotangents(self, z: Float[Tensor, "n d_z"], draws: Draws, next_token: Int[Tensor, " n"]) -> list[Tensor]:
        """The estimator's cotangents [n, R, d_z]; entropy, surprisal of the next token, kept mass and captured share [n]."""
        parts = []
        for rows in _slices(len(z), self.model.head.positions_at_once()):
            prediction = self.model.head.predict(z[rows])
            cotangents, kept, captured = self.estimator.cotangents(prediction, draws[rows])
            surprisal = -prediction.log_prob(next_token[rows])
            parts.append((cotangents, prediction.entropy, surprisal, kept, captured))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def _pulled(self, tape: Tape, cotangents: Float[Tensor, "n R d_z"], copies: int) -> dict[int, Tensor]:
        """Score factors [n, R, d_model] a layer: one backward pass for every ``copies`` cotangents that are not all zero."""
        n, num_factors, d_z = cotangents.shape
        pulls = (cotangents != 0).any(-1).any(0).tolist()
        together = [some for some in _slices(num_factors, copies) if any(pulls[some])]
        complete = sum(some.stop - some.start for some in together) == num_factors
        new = cotangents.new_empty if complete else cotangents.new_zeros
        factors = {layer: new(n, num_factors, self.model.d_model) for layer in self.layers}

        def group(some: slice) -> Float[Tensor, "m d_z"]:
            missing = copies - (some.stop - some.start)
            taken = (
                cotangents[:, some] if not missing else torch.nn.functional.pad(cotangents[:, some], (0, 0, 0, missing))
            )
            return taken.reshape(n * copies, d_z)

        for layer, i, pulled in tape.pull_each(map(group, together)):
            some = together[i]
            factors[layer][:, some] = pulled.unflatten(0, (n, copies))[:, : some.stop - some.start]
        return factors

    def averaged(self, factors: Float[Tensor, "n R d_model"], num_draws: int) -> Float[Tensor, "N R_D d_model"]:
        """Factors of the mean matrix over token draws: the draws' own side by side, or d_model new ones where fewer."""
        if num_draws == 1:
            return factors
        stacked = factors.unflatten(0, (-1, num_draws)).flatten(1, 2) / math.sqrt(num_draws)
        if stacked.shape[1] <= self.model.d_model:
            return stacked
        return torch.stack([psd_factor(g.mT @ g) for g in map(Tensor.double, stacked)]).to(stacked.dtype)


def _slices(n: int, size: int) -> Iterator[slice]:
    """As few as have at most ``size``, nearly alike: a short last one would be a slow product."""
    count = max(1, -(-n // size))
    step = max(1, -(-n // count))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
