"""Models cut at a layer: passes through the lower and the upper half, and the check that their scores are right.

``layer_idx = k`` names the residual stream entering block ``k``; ``k = num_layers`` is the stream after the last block,
before the final norm. The lower half maps tokens to that stream, the upper half maps the stream to the final hidden
states z; both run on the one copy of the weights of a transformers model, through hooks on its blocks.
"""

from __future__ import annotations

import inspect
import operator
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_ray.architecture import (
    HOOKS,
    ModelError,
    ModelFacts,
    block_calls,
    compile_blocks,
    find_blocks,
    find_decoder,
    find_head,
    fuse_activations,
    fuse_products,
    keep_softcapping,
    load_pretrained,
    offloaded_blocks,
    on_stream,
    slopes_kept,
    uncompiled,
)
from fisher_ray.attention import Context, attention_configs, attention_mode, held_keys, kept_keys
from fisher_ray.footprint import Footprint, LiveBytes
from fisher_ray.kernels import is_out_of_memory
from fisher_ray.numerics import full_precision
from fisher_ray.streaming import stream_blocks
from fisher_ray.tape import Tape, Walk, Where

Gradients = Literal["own_position", "per_position"]

# Largest relative error of own-position scores against one-position autograd, and of our logits against the model's.
# Mixing positions errs by 0.1 and more; in float64 the library still takes some softmaxes and logits in float32.
_LIMITS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# Sequences that go through the model together where every moved position needs one of its own.
_ROWS = 32


@dataclass(frozen=True)
class SelfCheck:
    """What was compared when a model was loaded; relative errors, the worst over positions.

    Attributes:
        scores: own-position scores at layer 0 against one-position autograd through the model's own attention, with one block's
            graph at a time where weights are streamed.
        replayed: the same for chosen positions replayed against recorded keys and values.
        walked: the same with blocks re-run one at a time; above the limit that way is refused, and the model is not. 0 where
            it was not compared: blocks that cannot be re-run alone, or streamed weights, whose ``scores`` were computed so.
        logits: our logits against the model's own.
        head: the head's pull-back against autograd through the model's own head.
        causality: final hidden states against those of the sequence cut off behind each position.
        limit: what each of the others had to stay below.
        positions: the positions compared.
        seq_len: tokens in the sequence compared.
        seconds: time taken.
    """

    scores: float
    replayed: float
    walked: float
    logits: float
    head: float
    causality: float
    limit: float
    positions: tuple[int, ...]
    seq_len: int
    seconds: float

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


# What a model that is run in a way it does not expect raises, ModelError apart.
_FAILS = (RuntimeError, LookupError, TypeError, AttributeError)

_SLOW_PATH = (
    "Pass gradients='per_position' (--gradients per_position): slower, right for many models that this refuses."
)


class _ReachedError(Exception):
    """The layer that was asked for has been reached; nothing above it needs to run."""


class SplitModel:
    """A transformers causal LM (or T5-like encoder-decoder) that can be cut before any block.

    The weights are frozen and dropout is off from here on; activations and linear layers are exchanged for ones that are the
    same functions, with all their derivatives. Hooks of the model's modules run in every pass. They must do the same at
    each position, as a pass may hold chosen positions alone; those that are there already take part in the check.

    Args:
        model: a loaded ``PreTrainedModel`` with an output head.
        tokenizer: its tokenizer, if there is one.
        gradients: ``own_position`` yields all positions from one backward pass, and is refused for models that mix
            positions outside transformers' attention interface; ``per_position`` is right for many that this refuses and
            gives every position a row and a backward pass of its own.
        compile: have torch.compile make fewer kernels of the blocks' norms and MLPs, now, in some ten seconds; for GPUs. It
            needs a C compiler. The last bits are others.
        check: compare own-position scores with one-position autograd, logits and head with the model's own.

    Raises:
        ModelError: the model fails the check, with the measured error.
        ValueError: an argument is out of range, or ``compile`` is for a model whose weights are streamed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        gradients: Gradients = "own_position",
        compile: bool = False,
        check: bool = True,
    ):
        if gradients not in ("own_position", "per_position"):
            raise ValueError(f"gradients must be own_position or per_position, got {gradients!r}.")
        _check_loaded(model)
        _refuse_inference_mode()
        self.model = model
        with _restored_on_failure(model):
            model.eval().requires_grad_(False)
            self.tokenizer = tokenizer
            self.gradients = gradients
            self.name = str(model.config._name_or_path or type(model).__name__)
            facts = ModelFacts.of(model.config)
            self.is_encoder_decoder, self.max_positions = facts.is_encoder_decoder, facts.max_positions
            self.num_layers, self.d_model = facts.num_layers, facts.d_model
            self.decoder = find_decoder(model)
            self.blocks = find_blocks(self.decoder, self.num_layers, self.name)
            self.head, self._unembedding = find_head(model), model.get_output_embeddings()
            self.sliding_window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
            stream_blocks(self.blocks)
            # A graph keeps the weights it needs, so that of all blocks would keep all of them.
            self.streamed = not self.head.weight.is_meta and any(p.is_meta for p in self.blocks.parameters())
            apart = getattr(model, "_keep_in_fp32_modules", None)
            if self.streamed and apart and self.dtype == torch.float16:
                raise ModelError(
                    f"{self.label} keeps {', '.join(sorted(apart))} in float32 where the rest is float16, which streamed "
                    "weights do not. Load it in bfloat16 or float32."
                )
            self._checked_hooks = self._hooks()
            self._takes_position_ids = "position_ids" in inspect.signature(self.decoder.forward).parameters
            self._configs = attention_configs(model)
            self._activations = fuse_activations(model)
            fuse_products(self.blocks)
            keep_softcapping(model)
            if compile:
                self._compile()
            self.self_check: SelfCheck | None = None
            if check:
                self.self_check = _self_check(self)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, int | str | torch.device] | None = None,
        stream_weights: bool = False,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        gradients: Gradients = "own_position",
        compile: bool = False,
        check: bool = True,
    ) -> SplitModel:
        """Load a model and its tokenizer by hub name or local path, from safetensors only.

        Args:
            name_or_path: hub name or directory.
            device: default: the GPU when there is one.
            device_map: in place of ``device``, for a model larger than one GPU: ``auto``, or the device of each module
                by name, as transformers takes it. Blocks that it leaves to main memory or disk are streamed.
            stream_weights: leave the weights of the blocks on disk and read one block's at a time, for a model larger than
                ``device``; embeddings and head stay. Each pass of the blocks reads all of them, so batches should be large.
            dtype: of the weights, ``float32`` unless given; scores are float32 in any case.
            revision: branch, tag or commit on the hub.
            trust_remote_code: run code that comes with the model; off unless asked for.
            gradients: see :class:`SplitModel`.
            compile: see :class:`SplitModel`.
            check: see :class:`SplitModel`.

        Raises:
            ModelError: not found, not readable, not a language model, or failing its check.
            ValueError: both ``device`` and ``device_map`` are given.
        """
        if device is not None and device_map is not None:
            raise ValueError(f"give device or device_map, not both; got {device!r} and {device_map!r}.")
        if stream_weights and device_map is not None:
            raise ValueError(f"give stream_weights or device_map, not both; got {device_map!r}.")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if stream_weights:
            device_map = offloaded_blocks(str(name_or_path), device, revision, trust_remote_code)
        model, tokenizer = load_pretrained(str(name_or_path), dtype, revision, trust_remote_code, device_map)
        if device_map is None:
            model.to(device)
        elif model.get_output_embeddings().weight.is_meta or model.get_input_embeddings().weight.is_meta:
            raise ModelError(
                f"device_map {device_map!r} leaves the embeddings or the head of {name_or_path} to main memory or disk; only "
                "blocks can be streamed. Give those a device."
            )
        return cls(model, tokenizer, gradients=gradients, compile=compile, check=check)

    @property
    def device(self) -> torch.device:
        """The head's device. What passes take and give is here, wherever the blocks are."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def fetched_bytes(self) -> int:
        """Bytes of the weights that a pass of a block fetches, at most."""
        return max(sum(p.nbytes for p in block.parameters() if p.is_meta) for block in self.blocks)

    # ---- passes ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, encoder_input_ids: Int[Tensor, "batch enc_seq"], mask: Bool[Tensor, "batch enc_seq"] | None = None
    ) -> dict[str, Tensor]:
        """The encoder's output, as the constant context that the decoder's arguments ask for."""
        if mask is None:
            mask = torch.ones_like(encoder_input_ids)
        mask = mask.long()
        with full_precision():
            out = self.model.get_encoder()(input_ids=encoder_input_ids, attention_mask=mask)
        encoded = {"encoder_hidden_states": out.last_hidden_state, "encoder_attention_mask": mask}
        return {name: value.to(self.device) for name, value in encoded.items()}

    def record(
        self,
        input_ids: Int[Tensor, "batch seq"],
        encoded: Mapping[str, Tensor],
        hidden: tuple[int, Tensor] | None = None,
    ) -> tuple[Context, Float[Tensor, "batch seq d_z"]]:
        """A forward pass without a graph: every layer's keys and values, and the final hidden states."""
        context = Context()
        with torch.no_grad(), attention_mode(self._configs, "record", context):
            _, z = self._run(input_ids, encoded, layers=(), hidden=hidden)
        return context, z

    @torch.no_grad()
    def states(
        self, input_ids: Int[Tensor, "batch seq"], encoded: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch seq d_z"]:
        """Final hidden states of a plain forward pass on the model's own attention."""
        return self._run(input_ids, encoded, ())[1]

    def own_tape(
        self,
        input_ids: Int[Tensor, "batch seq"],
        encoded: Mapping[str, Tensor],
        layers: Sequence[int],
        where: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None,
        walk: bool = False,
    ) -> Tape:
        """All tokens are queries; the tape holds those at ``where = (row, position)``, or all of them, in order."""
        return self._taped(walk, lambda: attention_mode(self._configs, "own"), input_ids, encoded, layers, where)

    def replay_tape(
        self,
        token: Int[Tensor, "batch queries"],
        positions: Int[Tensor, "batch queries"],
        context: Context,
        encoded: Mapping[str, Tensor],
        layers: Sequence[int],
        where: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None,
        hidden: tuple[int, Tensor] | None = None,
        walk: bool = False,
    ) -> Tape:
        """Chosen (position, token) queries over a recorded context; the tape holds those at ``where``, or all, in order."""
        return self._taped(
            walk,
            lambda: attention_mode(self._configs, "replay", context, positions),
            token,
            encoded,
            layers,
            where,
            positions,
            hidden,
        )

    def alone_tape(
        self,
        input_ids: Int[Tensor, "n seq"],
        encoded: Mapping[str, Tensor],
        layers: Sequence[int],
        last: Int[Tensor, " n"],
        hidden: tuple[int, Tensor] | None = None,
        twice: bool = False,
    ) -> Tape:
        """One row a query, whose score is taken at position ``last``: ordinary autograd, right however a model mixes positions.

        ``twice``: its backward passes are to be differentiated, which fused kernels have no way for.
        """
        where = (torch.arange(len(last), device=last.device), last)
        attending = partial(sdpa_kernel, SDPBackend.MATH) if twice else nullcontext
        return self._taped(False, attending, input_ids, encoded, layers, where, hidden=hidden)

    def _taped(
        self,
        walk: bool,
        attending: Callable[[], AbstractContextManager[Any]],
        input_ids: Tensor,
        encoded: Mapping[str, Tensor],
        layers: Sequence[int],
        where: Where,
        positions: Tensor | None = None,
        hidden: tuple[int, Tensor] | None = None,
    ) -> Tape:
        _refuse_inference_mode()
        lowest = min(layers)

        @contextmanager
        def taping() -> Iterator[None]:
            with torch.enable_grad(), attending(), slopes_kept(self._activations):
                yield

        if not walk and not self.streamed:
            with taping():
                streams, z = self._run(input_ids, encoded, layers, positions, hidden, leaf=lowest)
            return Tape(z, streams, where)
        check = self.self_check
        if check is not None and not check.walked <= check.limit:
            raise ModelError(
                f"the blocks of {self.label} hand each other more than the residual stream: run again one at a time, as where "
                f"memory holds no graph of them all, their scores are off by {check.walked:.1g} relative to one-position "
                f"autograd (limit {check.limit:g}). Give more memory (--memory-budget) or fewer tokens."
            )
        with taping(), block_calls(self.blocks) as calls:
            every = range(lowest, self.num_layers + 1)
            inputs, z = self._run(input_ids, encoded, every, positions, hidden, leaf=self.num_layers)
        return Walk(z, inputs, where, calls, layers, taping)

    def tape(
        self,
        input_ids: Int[Tensor, "1 seq"],
        encoded: Mapping[str, Tensor],
        layers: Sequence[int],
        positions: Int[Tensor, " n"],
    ) -> Tape:
        """The tape of chosen positions of one sequence, whichever way this model's gradients are taken."""
        if self.gradients == "per_position":
            n = len(positions)
            each = {name: value.expand(n, *value.shape[1:]) for name, value in encoded.items()}
            with uncompiled():
                return self.alone_tape(input_ids.expand(n, -1), each, layers, positions, twice=True)
        with uncompiled():  # the positions alone, as a graph that is differentiated twice is large
            context, _ = self.record(input_ids, encoded)
            return self.replay_tape(input_ids[:, positions], positions[None], context, encoded, layers, None)

    def last_tape(
        self, hidden: Float[Tensor, "batch seq d_model"], layer_idx: int, encoded: Mapping[str, Tensor], copies: int
    ) -> Tape:
        """The last positions of given residual streams at ``layer_idx``, each ``copies`` times, one after the other.

        For models whose blocks above read the stream alone, see :meth:`reads_ids`.
        """
        batch, seq, _ = hidden.shape
        ids = self._filler(hidden)
        row = torch.arange(batch, device=self.device).repeat_interleave(copies)
        if self.gradients == "per_position":
            each = {name: value[row] for name, value in encoded.items()}
            return self.alone_tape(ids[row], each, [layer_idx], torch.full_like(row, seq - 1), (layer_idx, hidden[row]))
        context, _ = self.record(ids, encoded, (layer_idx, hidden))
        queries = hidden[:, -1:].expand(-1, copies, -1)
        at = torch.full((batch, copies), seq - 1, device=self.device)
        column = torch.arange(copies, device=self.device).repeat(batch)
        return self.replay_tape(
            self._filler(queries), at, context, encoded, [layer_idx], (row, column), (layer_idx, queries)
        )

    @torch.no_grad()
    def log_probability_rates(
        self, tape: Tape, layer_idx: int, directions: Float[Tensor, "k d_model"]
    ) -> Iterator[Float[Tensor, "some n vocab_size"]]:
        """``dlog p(y | h_t + e v, x_<t) / de = g_y . v`` at ``e = 0`` for each direction v, query of a tape and token.

        The context is held constant; ``v`` need not be a unit vector. They come in order, a few at a time: those of all are
        vocab_size times as many numbers as there are directions and queries.
        """
        with full_precision():
            prediction = self.head.predict(tape.z)
        for some in directions.to(self.device).split(max(1, self.head.positions_at_once() // len(tape.z))):
            with full_precision(), uncompiled():
                pushed = tape.push(layer_idx, some)
                rates = prediction.rates(pushed).movedim(1, 0)
            yield rates

    @torch.no_grad()
    def replaced(
        self,
        input_ids: Int[Tensor, "1 seq"],
        positions: Int[Tensor, " n"],
        layer_idx: int,
        streams: Float[Tensor, "m n d_model"],
        encoded: Mapping[str, Tensor],
    ) -> Float[Tensor, "m n d_z"]:
        """Final hidden states with other residual streams at chosen positions, each without the others, the context constant.

        Args:
            input_ids: the tokens that the context is made of.
            positions: where streams are replaced.
            layer_idx: at which they are replaced.
            streams: m of them for each position.
            encoded: of the encoder, see :meth:`encode`.
        """
        queries, at = streams.flatten(0, 1), positions.repeat(len(streams))
        if self.gradients == "per_position":
            stream = self.lower(input_ids, encoded, [layer_idx])[layer_idx]
            parts: list[Tensor] = []
            for some, where in zip(queries.split(_ROWS), at.split(_ROWS), strict=True):
                rows = (torch.arange(len(some), device=self.device), where)
                hidden = stream.repeat(len(some), 1, 1)
                hidden[rows] = some.to(hidden)
                each = {name: value.expand(len(some), *value.shape[1:]) for name, value in encoded.items()}
                parts.append(self.upper(hidden, layer_idx, each, input_ids.expand(len(some), -1))[rows])
            z = torch.cat(parts)
        else:
            context, _ = self.record(input_ids, encoded)
            with attention_mode(self._configs, "replay", context, at[None]):
                _, replayed = self._run(input_ids[:, at], encoded, (), at[None], (layer_idx, queries[None]))
            z = replayed[0]
        return z.unflatten(0, streams.shape[:2])

    def lower(
        self, input_ids: Int[Tensor, "batch seq"], encoded: Mapping[str, Tensor], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch seq d_model"]]:
        """The residual streams at ``layers``; blocks above the highest of them do not run."""
        with torch.no_grad():
            streams, _ = self._run(input_ids, encoded, layers, stop=max(layers))
        return {layer: stream.to(self.device) for layer, stream in streams.items()}

    @torch.no_grad()
    def upper(
        self,
        hidden: Float[Tensor, "batch seq d_model"],
        layer_idx: int,
        encoded: Mapping[str, Tensor],
        input_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq d_z"]:
        """Final hidden states for given residual streams at ``layer_idx``.

        Without the ids of their tokens it is for models whose blocks above read the stream alone, see :meth:`reads_ids`.
        """
        ids = self._filler(hidden) if input_ids is None else input_ids
        return self._run(ids, encoded, (), hidden=(layer_idx, hidden))[1]

    @torch.no_grad()
    def reads_ids(self, layer_idx: int) -> bool:
        """Whether blocks from ``layer_idx`` up read more of the token ids than the stream: embeddings of their own, or keys of
        blocks below.

        Told from what the stream of a few tokens becomes with other ids. Costs two short forward passes.
        """
        zeros, encoded = self._zeros(min(8, self.max_positions or 8), 1)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.head.vocab_size, zeros.shape, generator=generator, device="cpu").to(self.device)
        streams, z = self._run(ids, encoded, [layer_idx])
        limit, half = _tolerance(self)
        return not _error(self.upper(streams[layer_idx], layer_idx, encoded)[0], z[0], half) <= limit

    def _filler(self, hidden: Tensor) -> Tensor:
        """Token ids for a pass whose residual stream is replaced: what the blocks below make of them is dropped."""
        return torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)

    def _run(
        self,
        input_ids: Tensor,
        encoded: Mapping[str, Tensor],
        layers: Sequence[int],
        positions: Tensor | None = None,
        hidden: tuple[int, Tensor] | None = None,
        stop: int | None = None,
        leaf: int | None = None,
    ) -> tuple[dict[int, Tensor], Tensor]:
        """One pass of the decoder: the streams at ``layers``, each on the device it is on there, and z on the head's.

        The stream at ``leaf`` becomes a leaf of the graph, which does not grow below it. ``hidden = (layer, stream)``
        replaces the stream there.
        """
        self._check_unchanged()
        streams: dict[int, Tensor] = {}
        visited: set[int] = set()
        thread = threading.get_ident()

        def visit(layer: int, stream: Any) -> Tensor:
            if threading.get_ident() != thread:  # hooks are of the model, and so of all its passes
                raise RuntimeError(f"{self.label} is used by another thread. Let one use it at a time.")
            if layer in visited:
                raise ModelError(
                    f"{self.label} runs block {layer} more than once a pass, so that its layer {layer} is not one stream. "
                    "Scores need a model whose blocks each run once."
                )
            visited.add(layer)
            if not isinstance(stream, Tensor) or stream.shape[2:] != (self.d_model,):
                what = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
                raise ModelError(
                    f"{self.label} has no stream [batch, seq, {self.d_model}] at layer {layer}, but {what}. Scores need a "
                    "model whose blocks hand on one vector a position."
                )
            if hidden is not None and layer == hidden[0]:
                stream = hidden[1].to(stream)
            if layer == leaf:
                stream = stream.detach().requires_grad_()
            if layer in layers:
                streams[layer] = stream
            if layer == stop:
                raise _ReachedError
            return stream

        handles = [on_stream(self.blocks, layer, visit) for layer in {*layers, *((hidden[0],) if hidden else ())}]
        arguments = {"input_ids": input_ids, **encoded}
        if positions is not None and self._takes_position_ids:
            arguments["position_ids"] = positions
        # A decoder makes its positions and masks on the device of its embeddings.
        first = self.decoder.get_input_embeddings().weight.device
        try:
            with full_precision():
                out = self.decoder(use_cache=False, **{name: value.to(first) for name, value in arguments.items()})
        except _ReachedError:
            return streams, torch.empty(0)
        finally:
            for handle in handles:
                handle.remove()
        missed = sorted(set(layers) - visited)
        if missed:
            raise ModelError(
                f"{self.label} has passes without some of its blocks, and so no stream at layer {missed[0]}. Scores need a "
                "model whose blocks all run."
            )
        return streams, out[0].to(self.device)

    def check_hooks(self) -> None:
        """Warn of hooks that were not there when the model was checked."""
        if self._hooks() - self._checked_hooks:
            warnings.warn(
                f"hooks were put on {self.label} after it was split. They must do the same at each position: scores of chosen "
                "positions come from passes over those alone. A new SplitModel of the model checks that.",
                stacklevel=4,
            )

    def _hooks(self) -> set[int]:
        modules = list(self.decoder.modules())
        return {key for module in modules for name in HOOKS for key in vars(module)[name]}

    def _check_unchanged(self) -> None:
        """Refuse a model that is no longer the one that was split: in training mode, or with another head."""
        if any(module.training for module in self.model.modules()):
            name = next(name for name, module in self.model.named_modules() if module.training)
            where = f"the module {name} of {self.label}" if name else self.label
            raise ModelError(f"{where} is in training mode, where dropout is on. Call model.eval() first.")
        now = self.model.get_output_embeddings()
        if now is not self._unembedding or (now.weight is not self.head.weight and not now.weight.is_meta):
            raise ModelError(
                f"{self.label} has another output head than when it was split. Make a new SplitModel of it."
            )

    # ---- what a pass costs -------------------------------------------------------------------------------------------

    @cached_property
    def footprint(self) -> Footprint:
        """What passes over all blocks keep and hold."""
        step = max(1, min(48, self.max_positions or 48) // 3)
        with uncompiled():  # what compiled modules allocate inside is not seen; it is no more
            record = None if self.gradients == "per_position" else lambda tokens: self.record(*self._zeros(tokens, 1))
            return Footprint.count(step, self._whole_tape, record, self._live_bytes)

    def _live_bytes(self) -> LiveBytes:
        """A counter without the weights; of those that are fetched for a pass only the shapes are known."""
        fetched = {shape for p in self.model.parameters() if p.is_meta for shape in (p.shape, p.shape[::-1])}
        own = [tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if not tensor.is_meta]
        return LiveBytes(own, lambda tensor: tensor.shape in fetched)

    def _whole_tape(self, tokens: int, batch: int = 1) -> Tape:
        ids, encoded = self._zeros(tokens, batch)
        if self.gradients == "per_position":
            return self.alone_tape(ids, encoded, [0], torch.full_like(ids[:, 0], tokens - 1))
        return self.own_tape(ids, encoded, [0], None)

    def _compile(self) -> None:
        """Compile the blocks now, on fixed sizes: no kernel should depend on which work comes first."""
        if self.streamed:
            raise ValueError(
                "compile is for weights that stay on the device; these are streamed. Leave one of them out."
            )
        compile_blocks(self.blocks)
        tokens = min(16, self.max_positions or 16)
        try:
            for batch in (1, 2):
                tape = self._whole_tape(tokens, batch)
                tape.pull(torch.zeros_like(tape.z))
                self.states(*self._zeros(tokens, batch))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, whichever it has
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ModelError(
                f"torch.compile cannot compile {self.label} here ({reason}). Install a C compiler, or leave --compile out."
            ) from error

    def _zeros(self, tokens: int, batch: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Token ids, and what the encoder makes of four."""
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=self.device)
        return ids, self.encode(ids[:, :4]) if self.is_encoder_decoder else {}

    def graph_bytes(self, seq_len: int, lowest_layer: int, positions: Sequence[int] | None = None) -> float:
        """Bytes that the graph of one token keeps, in a pass over ``seq_len`` tokens from ``lowest_layer`` up.

        Args:
            positions: of the tokens that are replayed; None: all go through the pass.
        """
        per_token, per_key = self.footprint.kept
        keys = kept_keys(seq_len, positions) if self.gradients == "own_position" else seq_len
        return (self.num_layers - lowest_layer) / self.num_layers * (per_token + per_key * keys)

    def working_bytes(self, seq_len: int, queries: int) -> float:
        """Bytes that a backward pass of so many a sequence holds a token beside the graph, at most; whatever the layer."""
        per_token, per_key = self.footprint.held
        return per_token + per_key * (held_keys(seq_len, queries) if self.gradients == "own_position" else seq_len)

    def recorded_bytes(self, seq_len: int) -> tuple[float, float]:
        """Bytes a token that recording a sequence leaves behind, its context, and holds at once, at most."""
        (left, left_by_key), (held, held_by_key) = self.footprint.context, self.footprint.recording
        keys = held_keys(seq_len)
        return left + left_by_key * keys, held + held_by_key * keys

    @property
    def label(self) -> str:
        """Name and class, for messages."""
        kind = type(self.model).__name__
        return kind if kind == self.name else f"{self.name} ({kind})"

    # ---- arguments ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return (
            f"SplitModel({self.label}: {self.num_layers} blocks, d_model {self.d_model}, {self.dtype}, {self.device})"
        )

    def check_layers(self, layers: Sequence[int]) -> list[int]:
        """The layers, ascending and once each; negative ones and ones above num_layers are refused."""
        try:
            numbers = [operator.index(layer) for layer in layers]
        except TypeError:
            what = f"{layers!r}. Give [{layers}]" if isinstance(layers, Integral) else repr(layers)
            raise ValueError(f"layers must be a list of whole numbers, got {what}.") from None
        for layer in numbers:
            if not 0 <= layer <= self.num_layers:
                raise ValueError(
                    f"layer_idx must be in [0, {self.num_layers}], got {layer}. "
                    f"{self.name} has {self.num_layers} blocks."
                )
        if not numbers:
            raise ValueError("layers must name at least one layer, got none.")
        return sorted(set(numbers))

    def check_encoder(self, given: bool) -> None:
        """Refuse tokens of an encoder where there is none, and an encoder without tokens."""
        if self.is_encoder_decoder != given:
            expected = "needs" if self.is_encoder_decoder else "takes no"
            raise ValueError(f"{self.name} {expected} encoder_input_ids; it is {type(self.model).__name__}.")

    def check_ids(self, input_ids: Tensor, longest: int) -> None:
        """Refuse ids outside the vocabulary and sequences longer than the model's positions."""
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be integers, got {input_ids.dtype}. Tokenize the text first.")
        if not input_ids.numel():
            raise ValueError("input_ids must hold at least one token, got none.")
        entries = self.model.get_input_embeddings().weight.shape[0]
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= entries:
            raise ValueError(
                f"token ids must be in [0, {entries}), got {low if low < 0 else high}. "
                f"Tokenize with {self.name}'s own tokenizer."
            )
        self.check_length(longest)

    def check_length(self, longest: int) -> None:
        """Refuse sequences longer than the model's positions."""
        if self.max_positions is not None and longest > self.max_positions:
            raise ValueError(
                f"sequences must have at most {self.max_positions} tokens, got {longest}: {self.name} has no positions "
                "beyond. Shorten them (--max-seq-len)."
            )


def _self_check(split: SplitModel) -> SelfCheck:
    """Compare scores, logits and head of a model just loaded with what autograd and the model itself give."""
    start = time.perf_counter()
    limit, half = _tolerance(split)
    seq_len = 48
    if split.sliding_window and split.sliding_window <= 1024:
        seq_len = max(seq_len, split.sliding_window + 16)
    seq_len = min(seq_len, split.max_positions or seq_len)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(split.head.vocab_size, (1, seq_len), generator=generator, device="cpu").to(split.device)
    # From early to late, and never the last alone: there a model that mixes positions agrees as well.
    at = torch.linspace(min(1, seq_len - 1), max(0, seq_len - 2), 5).long().unique().to(split.device)
    encoded = split.encode(ids[:, : min(seq_len, 8)]) if split.is_encoder_decoder else {}
    cut, cotangents, truths = [], [], []
    scores = replayed = walked = logits_error = 0.0
    with full_precision():
        try:
            head_error, logits = _check_head(split, ids, encoded)
            z = split.states(ids, encoded)[0]
            for t in at:
                tape = split.alone_tape(ids[:, : t + 1], encoded, [0], t[None])
                unlikely = logits[0, t].argmin()[None, None]  # a score far from zero
                cut.append(tape.z)
                cotangents.append(split.head.predict(tape.z).scores(unlikely)[:, 0])
                truths.append(tape.pull(cotangents[-1])[0])
        except _FAILS as error:
            if is_out_of_memory(error):  # of this machine now, not of the model
                raise
            raise ModelError(f"{split.label} does not run: {' '.join(str(error).split())}") from error
        cotangent, truth = torch.cat(cotangents), torch.cat(truths)
        causality = _error(z[at], torch.cat(cut), half)
        if not causality <= limit:
            raise ModelError(
                f"{split.label} is no causal model: cutting off later tokens moves its final hidden states by {causality:.1g} "
                f"(limit {limit:g}). Scores given h_t and the tokens before it need a model that sees nothing else."
            )
        if split.gradients == "own_position":
            row, columns = torch.zeros_like(at), torch.arange(len(at), device=split.device)
            try:
                own = split.own_tape(ids, encoded, [0], (row, at))
                scores = _error(own.pull(cotangent)[0], truth, half)
                context, recorded = split.record(ids, encoded)
                tape = split.replay_tape(ids[:, at], at[None], context, encoded, [0], (row, columns))
                replayed = _error(tape.pull(cotangent)[0], truth, half)
                with suppress(ModelError):  # blocks that hand each other more than the stream, which a walk refuses
                    walk = None if split.streamed else split.own_tape(ids, encoded, [0], (row, at), walk=True)
                    walked = 0.0 if walk is None else _error(walk.pull(cotangent)[0], truth, half)
                logits_error = _error(split.head.predict(recorded[0]).logits, logits[0], half)
            except _FAILS as error:
                if is_out_of_memory(error):
                    raise
                if scores <= limit:  # else its positions mix, which says more
                    raise ModelError(
                        f"{split.label} does not run on own-position attention ({type(error).__name__}: "
                        f"{' '.join(str(error).split())}). {_SLOW_PATH}"
                    ) from error
    worst = max(scores, replayed)
    if not worst <= limit:
        raise ModelError(
            f"{split.label} mixes positions outside transformers' attention interface: own-position scores are off by "
            f"{worst:.1g} relative to one-position autograd (limit {limit:g}). {_SLOW_PATH}"
        )
    if not logits_error <= limit:
        raise ModelError(
            f"{split.label} attends in a way this package does not know: its logits differ by {logits_error:.1g} from "
            f"those of its own attention (limit {limit:g}). {_SLOW_PATH}"
        )
    seconds = time.perf_counter() - start
    positions = tuple(at.tolist())
    return SelfCheck(scores, replayed, walked, logits_error, head_error, causality, limit, positions, seq_len, seconds)


def _check_head(split: SplitModel, ids: Tensor, encoded: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    """Relative error of the head's logits and pull-back at the last positions, and the model's own logits."""
    with torch.no_grad():
        _, z = split._run(ids, encoded, range(split.num_layers + 1))
    kept: dict[str, Tensor] = {}

    def leaf(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        kept["z"] = z.detach().requires_grad_()
        if isinstance(output, tuple):
            return (kept["z"], *output[1:])
        output[0 if not hasattr(output, "last_hidden_state") else "last_hidden_state"] = kept["z"]
        return output

    handle = split.decoder.register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            if split.is_encoder_decoder:
                hidden = (encoded["encoder_hidden_states"],)
                out = split.model(
                    encoder_outputs=hidden, attention_mask=encoded["encoder_attention_mask"], decoder_input_ids=ids
                )
            else:
                out = split.model(input_ids=ids, use_cache=False)
            logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
            if logits.isnan().any():
                raise ModelError(
                    f"the logits of {split.label} are not finite: its weights are damaged, or too large for {split.dtype}."
                )
            few = logits[0, -4:].log_softmax(-1)
            token = few.argmin(-1, keepdim=True)
            (truth,) = torch.autograd.grad(few.gather(1, token).sum(), kept["z"])
    finally:
        handle.remove()
    limit, half = _tolerance(split)
    prediction = split.head.predict(z[0, -4:])
    error = max(
        _error(prediction.logits, logits[0, -4:].detach(), half),
        _error(prediction.scores(token)[:, 0], truth[0, -4:], half),
    )
    if not error <= limit:
        raise ModelError(
            f"{split.label} has an output head this package does not know: its logits or their gradients differ "
            f"by {error:.1g} from final norm, scale, soft-capping and unembedding (limit {limit:g})."
        )
    return error, logits.detach()


def _tolerance(split: SplitModel) -> tuple[float, bool]:
    """The limit of the check, and whether it is one of half precision: by what has the fewest digits, head or blocks."""
    dtypes = {split.dtype, *(p.dtype for p in split.blocks.parameters() if p.is_floating_point())} & _LIMITS.keys()
    limit = max(_LIMITS[dtype] for dtype in dtypes)
    return limit, limit == _LIMITS[torch.bfloat16]


def load(model: str | Path | SplitModel) -> SplitModel:
    """A SplitModel as it is, or a named one; the last that was named is kept for as long as its files are what they were."""
    if isinstance(model, SplitModel):
        return model
    if not isinstance(model, str | Path):
        raise ValueError(
            f"model must be a name, a path or a SplitModel, got {type(model).__name__}. Give SplitModel(model, tokenizer) of a "
            "loaded one."
        )
    folder = Path(model).absolute()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return _load_named(str(model), tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@lru_cache(maxsize=1)
def _load_named(name: str, files: tuple[tuple[str, int, int], ...]) -> SplitModel:
    return SplitModel.from_pretrained(name)


def _check_loaded(model: Any) -> None:
    if not isinstance(model, nn.Module):
        what = type(model).__name__
        raise ValueError(
            f"model must be a loaded transformers model, got {what}. SplitModel.from_pretrained takes names."
        )


@contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """A model that cannot be split trains as it did before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("scores are gradients, and torch.inference_mode() has none. Use torch.no_grad().")


def _error(got: Tensor, truth: Tensor, half: bool) -> float:
    """Largest relative error over rows, in half precision the median; NaN counts as infinite.

    Rounding to half precision turns a ReLU or chooses another expert at single positions; mixing errs at all of them.
    """
    got, truth = got.double(), truth.double()
    banned = (got == truth) & truth.isinf()  # tokens that a head gives -inf
    got, truth = got.masked_fill(banned, 0), truth.masked_fill(banned, 0)
    errors = (got - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-300)
    return float((errors.median() if half else errors.max()).nan_to_num(nan=torch.inf))
