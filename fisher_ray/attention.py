"""Own-position attention: gradients flow only through a query's own key and value.

The logits at position ``t`` depend on the residual stream ``h_t`` through position ``t``'s own path alone once the
earlier positions are held constant. If every attention layer treats all keys and values but the query's own as
constants, one backward pass of ``sum_t log p(y_t)`` yields the isolated score of every position, at every layer it
passes. With ``s_ti = scale q_t . k_i``, ``P = softmax(s)`` and ``o_t = sum_i P_ti v_i``, a cotangent ``b_t`` at ``o_t``
is pulled back to

    ds_ti = P_ti (b_t . v_i - b_t . o_t)
    dq_t  = scale sum_i ds_ti k_i,    dk_t = scale ds_tt q_t,    dv_t = P_tt b_t.

Queries go block by block and see no key behind their block's last (nor before their window), so half of the square is
never computed. Of longer sequences only the log-sum-exp of each query's scores is kept and P is computed anew in each
backward pass: memory grows with the sequence and not with its square. On a GPU, flash attention computes o, the log-sum-exp and
dq in half precision where its mask is the plain causal one; what is left, dk_t and dv_t, is of the diagonal alone.

The function is registered with transformers as an attention implementation, so it serves every architecture that
dispatches through ``AttentionInterface``. It knows three modes, set by :func:`attention_mode`:

* ``own``: own-position gradients, every token of the row a query;
* ``record``: a forward pass without a graph that remembers each layer's keys, values, mask and bias in a :class:`Context`;
* ``replay``: the queries are chosen (position, token) pairs, their off-diagonal keys and values come from a
  :class:`Context`, and only the diagonal is their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fisher_ray.kernels import diagonal, flash_attends, flash_attention, flash_query_gradient

IMPLEMENTATION = "fisher_ray"

# Queries of a block. On a CPU its scores should stay in cache (measured: 64 to 256 are alike, 512 a third slower at 2,048
# tokens). On a GPU more fill the device: as many as have 2^27 scores, 512 MiB.
_BLOCK = 128
_GPU_SCORES = 1 << 27

# The longest sequence whose attention weights are kept for the backward passes. Measured at GPT-2's width: to compute them
# anew costs a backward pass 5 % at 1,024 tokens and 10 % at 2,048, and keeping them takes a quarter and half as much memory
# as all else that the graph keeps.
_KEPT = 1024

# What transformers' attention modules hand over that changes nothing here: windows and causality arrive in the mask,
# rotary positions are already in q and k, and the rest asks for outputs nobody reads.
_HARMLESS = frozenset({
    "sliding_window", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "encoder_hidden_states",
    "encoder_attention_mask", "layer_idx",
})  # fmt: skip


def kept_keys(seq_len: int, positions: Sequence[int] | None = None) -> float:
    """Attention weights that the graph of an own-position pass keeps a query and head, the mean over the queries.

    Args:
        positions: of the queries that are replayed, ascending; None: all are queries.
    """
    if seq_len > _KEPT:
        return 0.0
    positions = range(seq_len) if positions is None else positions
    blocks = (positions[start : start + _BLOCK] for start in range(0, len(positions), _BLOCK))
    return sum(len(block) * (block[-1] + 1) for block in blocks) / len(positions)


def held_keys(seq_len: int, queries: int | None = None) -> float:
    """Attention scores that a pass holds at once a query and head: those of one block, spread over the queries of a sequence.

    Args:
        queries: that are replayed; None: all tokens are.
    """
    queries = queries or seq_len
    return min(queries, _BLOCK) * seq_len / queries


@dataclass(frozen=True)
class _Window:
    """A mask by positions: made for a block of queries at a time, so that no [seq, seq] tensor ever is.

    Attributes:
        sees: transformers' mask function of (row of the batch, head, query's position, key's position).
        batch: rows.
        size: keys that a query sees at most, itself the last.
    """

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: int
    size: int

    def __getitem__(self, index: tuple[slice, ...]) -> _Window:
        """Of all queries: a model that could go on with the last ones alone cuts those out that are asked for (Gemma 4)."""
        if any(part.start or part.stop is not None for part in index):
            raise NotImplementedError(f"part of a window cannot be cut out: expected all of it, got {index}.")
        return self

    def visible(self, queries: Int[Tensor, "#batch rows"], keys: slice) -> Bool[Tensor, "batch 1 rows keys"]:
        row = torch.arange(self.batch, device=queries.device)[:, None, None, None]
        key = torch.arange(keys.start, keys.stop, device=queries.device)
        return self.sees(row, torch.zeros_like(row), queries[:, None, :, None], key).expand(self.batch, 1, -1, -1)


# None is the plain causal mask.
_Mask = Bool[Tensor, "#batch #heads seq seq"] | _Window | None


@dataclass
class _Layer:
    """Keys, values and position terms of one attention layer over a context."""

    key: Float[Tensor, "batch kv_heads seq head_dim"]
    value: Float[Tensor, "batch kv_heads seq value_dim"]
    mask: _Mask
    bias: Float[Tensor, "#batch heads seq seq"] | None
    broken: Bool[Tensor, "batch 1 1 seq"] | None


@dataclass
class Context:
    """Every attention layer's keys and values over the observed tokens, held constant."""

    layers: dict[nn.Module, _Layer] = field(default_factory=dict)


@dataclass(frozen=True)
class _Mode:
    name: Literal["own", "record", "replay"]
    context: Context | None = None
    positions: Int[Tensor, "batch queries"] | None = None
    ends: Sequence[int] = ()


_ENTERING = Lock()
_MODE: ContextVar[_Mode | None] = ContextVar("fisher_ray_attention_mode", default=None)
_ANOTHER = "the model is being scored by another thread. Let one use it at a time."


def attention_configs(model: nn.Module) -> list[Any]:
    """The configurations that say which attention the modules of a model run."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())


@contextmanager
def attention_mode(
    configs: Sequence[Any],
    name: Literal["own", "record", "replay"],
    context: Context | None = None,
    positions: Int[Tensor, "batch queries"] | None = None,
) -> Iterator[None]:
    """Run the model of these configurations on this module's attention; its own implementation is restored on leaving.

    Raises:
        RuntimeError: another thread is at it, perhaps with another model of the same configuration.
    """
    _register()
    # Asked for once: a GPU is waited for. Before anything is changed, as waiting may end in an error.
    ends = [] if positions is None else (positions.amax(0) + 1).tolist()
    with _ENTERING:
        before = [config._attn_implementation for config in configs]
        if IMPLEMENTATION in before:
            raise RuntimeError(_ANOTHER)
        for config in configs:
            config._attn_implementation = IMPLEMENTATION
    token = _MODE.set(_Mode(name, context, positions, ends))
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
        _MODE.reset(token)


@cache
def _register() -> None:
    """Tell transformers of this implementation; when a model is scored, as its own imports take a second."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> _Window | Tensor | None:
    """The mask that transformers asks for: None, a window where it is given by positions alone, else a tensor."""
    mode = _MODE.get()
    if mode is not None and mode.name == "replay" and attention_mask is None:
        return None  # queries see what the context's mask says; one of their own would be [queries, queries]
    plain = allow_is_causal_skip and attention_mask is None and q_length == kv_length and q_offset == kv_offset == 0
    if plain and local_size is not None and kv_length >= local_size:
        return _Window(mask_function, batch_size, local_size)
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip, **kwargs,
    )  # fmt: skip
    return made


def _attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attention_mask: Bool[Tensor, "#batch #heads queries keys"] | _Window | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    position_bias: Float[Tensor, "#batch heads queries keys"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], None]:
    """The attention implementation that transformers calls."""
    mode = _MODE.get()
    if mode is None:
        raise RuntimeError(_ANOTHER)
    unknown = {name for name, given in kwargs.items() if given is not None} - _HARMLESS
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, which own-position "
            "attention does not know. Use gradients='per_position' for this model."
        )
    if dropout:
        raise ValueError(f"attention dropout must be 0, got {dropout}. Call model.eval() first.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not getattr(module, "is_causal", True):  # cross-attention carries constants: nothing to isolate
        assert attention_mask is None or isinstance(attention_mask, Tensor)
        return _over_constants(query * scale, key, value, attention_mask, softcap, s_aux, position_bias), None

    own_key, own_value, where = key, value, None
    broken = _broken(key, value)
    if mode.name == "replay":
        assert mode.context is not None and mode.positions is not None
        try:
            layer = mode.context.layers[module]
        except KeyError:
            raise RuntimeError(f"{type(module).__name__} attends in replay but did not in recording") from None
        where = mode.positions.to(query.device)  # blocks may be on several devices
        key, value, broken = layer.key, layer.value, layer.broken
        attention_mask, position_bias = layer.mask, layer.bias
        query = _tempered(module, query, where)
    else:
        if broken is not None:
            key, value = (x.masked_fill(broken.mT, 0.0) for x in (key, value))
        if mode.name == "record":
            assert mode.context is not None
            mode.context.layers[module] = _Layer(key, value, attention_mask, position_bias, broken)
    seen = _Seen(where, mode.ends, attention_mask, query.shape[2], key.shape[2])
    out = _OwnPosition.apply(
        query, own_key, own_value, key.detach(), value.detach(), seen, position_bias, s_aux, scale, softcap
    )
    if broken is not None:
        out = out.masked_fill(seen.any_of(broken, query), torch.nan)
    return out.transpose(1, 2), None


def _tempered(module: Any, query: Tensor, positions: Int[Tensor, "batch queries"]) -> Tensor:
    """Queries of Llama 4's layers without rotary positions, by their positions and not by their places in the row.

    Such layers scale them by ``1 + s log(1 + floor((t + 1) / f))``, and take the place of a query in its row for t.
    """
    if getattr(module, "use_rope", True) or not getattr(module, "attn_temperature_tuning", False):
        return query

    def scale(t: Tensor) -> Tensor:
        return 1 + module.attn_scale * torch.log1p(torch.floor((t.float() + 1) / module.floor_scale))

    place = torch.arange(query.shape[2], device=query.device)
    return query * (scale(positions) / scale(place))[:, None, :, None].to(query)


def _broken(key: Tensor, value: Tensor) -> Bool[Tensor, "batch 1 1 keys"] | None:
    """Positions whose key or value is not finite, if there are any.

    A weight of zero times NaN is NaN, so they would reach the queries before them, which do not see them.
    """
    if bool((key.sum(dtype=torch.float32) + value.sum(dtype=torch.float32)).isfinite()):
        return None
    return ~(key.isfinite().all(-1) & value.isfinite().all(-1)).all(1)[:, None, None]


def _over_constants(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Float[Tensor, "batch queries heads value_dim"]:
    """Ordinary attention of queries, scaled already, over keys and values that no gradient asks for."""
    key, value = (_each_head(x, query.shape[1] // key.shape[1]) for x in (key, value))
    scores = query @ key.mT
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = total.logaddexp(sinks.to(total).view(-1, 1, 1))
    return ((scores - total).exp().to(value.dtype) @ value).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class _Seen:
    """Which keys queries see, block by block.

    Attributes:
        where: positions of the queries among the keys, [batch, queries]; None: the queries are the keys' own, in order.
        ends: of each replayed query the position after its own, the largest in the batch.
        mask: of all positions.
    """

    where: Int[Tensor, "batch queries"] | None
    ends: Sequence[int]
    mask: _Mask
    queries: int
    keys: int

    def blocks(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that some of them may see."""
        for start in range(0, self.queries, rows):
            stop = min(start + rows, self.queries)
            if isinstance(self.mask, Tensor):
                yield slice(start, stop), slice(0, self.keys)
            elif self.where is not None:
                yield slice(start, stop), slice(0, max(self.ends[start:stop]))
            else:
                first = max(0, start + 1 - self.mask.size) if self.mask is not None else 0
                yield slice(start, stop), slice(first, stop)

    def visible(self, rows: slice, keys: slice, device: torch.device) -> Bool[Tensor, "#batch #heads rows keys"]:
        if isinstance(self.mask, Tensor):
            return self.rows_of(self.mask, rows, keys)
        at = torch.arange(rows.start, rows.stop, device=device)[None] if self.where is None else self.where[:, rows]
        if self.mask is not None:
            return self.mask.visible(at, keys)
        return torch.arange(keys.start, keys.stop, device=device) <= at[:, None, :, None]

    def hide(self, scores: Float[Tensor, "batch heads rows keys"], rows: slice, keys: slice) -> None:
        """Set the scores of keys that are not seen to -inf."""
        if self.mask is None and self.where is None:  # all of the keys before the block are seen
            scores, keys = scores[..., rows.start - keys.start :], rows
        scores.masked_fill_(~self.visible(rows, keys, scores.device), -torch.inf)

    def rows_of(self, square: Tensor, rows: slice, keys: slice) -> Tensor:
        """The block of a [#batch, #heads, seq, seq] mask or bias."""
        if self.where is None:
            return square[:, :, rows, keys]
        at = self.where[:, rows]
        square = square[..., keys].expand(at.shape[0], -1, -1, -1)
        return square.gather(2, at[:, None, :, None].expand(-1, square.shape[1], -1, square.shape[-1]))

    def any_of(self, broken: Bool[Tensor, "batch 1 1 keys"], query: Tensor) -> Bool[Tensor, "#batch #heads queries 1"]:
        """Whether a query sees any of the broken keys; its own, in replay, is its own affair."""
        found = []
        for rows, keys in self.blocks(_rows(query, self.keys)):
            seen = self.visible(rows, keys, query.device) & broken[..., keys]
            if self.where is not None:
                own = self.where[:, None, rows, None].expand(-1, seen.shape[1], -1, -1)
                seen = seen.expand(len(own), -1, -1, -1).scatter(-1, own, False)
            found.append(seen.any(-1, keepdim=True))
        return torch.cat(found, 2)

    def own(self, block: Float[Tensor, "batch heads rows keys"], rows: slice, keys: slice) -> Tensor:
        """[batch, heads, rows]: each query's entry at its own position."""
        if self.where is None:
            return block.diagonal(rows.start - keys.start, -2, -1)
        return block.gather(-1, self._index(block, rows)).squeeze(-1)

    def set_own(self, block: Float[Tensor, "batch heads rows keys"], rows: slice, own: Tensor) -> None:
        """Replace, in replay, each query's entry at its own position."""
        block.scatter_(-1, self._index(block, rows), own[..., None].to(block.dtype))

    def _index(self, block: Tensor, rows: slice) -> Tensor:
        assert self.where is not None
        return self.where[:, None, rows, None].expand(-1, block.shape[1], -1, 1)

    def take(self, per_key: Float[Tensor, "batch kv_heads keys dim"]) -> Float[Tensor, "batch kv_heads queries dim"]:
        """In replay: what the context has at the queries' positions."""
        assert self.where is not None
        return per_key.gather(2, self.where[:, None, :, None].expand(-1, per_key.shape[1], -1, per_key.shape[-1]))


def _rows(query: Float[Tensor, "batch heads queries head_dim"], keys: int) -> int:
    """Queries of a block."""
    return max(_BLOCK, _GPU_SCORES // (query.shape[0] * query.shape[1] * keys) if query.is_cuda else 0)


class _OwnPosition(torch.autograd.Function):
    """Own-position attention in blocks of queries; the graph keeps P of short sequences, and no other [queries, keys] tensor.

    Its backward pass is linear in the cotangent and may be differentiated in that, not in queries, keys or values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        key: Tensor,
        value: Tensor,
        seen: _Seen,
        bias: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        batch, heads, queries, _ = query.shape
        group = heads // key.shape[1]
        scaled = query * scale
        replayed = seen.where is not None
        own_score = _dots(scaled, own_key) if replayed else None
        block = _Scores(seen, own_score, bias, softcap)
        ctx.block, ctx.scale, ctx.num_kept, ctx.flash = block, scale, 0, False
        plain = not replayed and seen.mask is None and bias is None and sinks is None and softcap is None
        if plain and flash_attends(query, value):
            out, log_total = flash_attention(scaled, key, value)
            ctx.flash = True
            ctx.save_for_backward(scaled, own_key, own_value, key, value, out, log_total[..., None])
            return out
        key, value = key.contiguous(), value.contiguous()
        out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)  # as the caller wants it
        moved = _each_head(own_value - seen.take(value), group) if replayed else None
        log_total = scaled.new_empty(batch, heads, queries, 1, dtype=torch.promote_types(query.dtype, torch.float32))
        kept: list[Tensor] = []
        slopes: list[Tensor] = []
        for rows, keys in seen.blocks(_rows(query, key.shape[2])):
            scores, slope = block(scaled, key, rows, keys)
            highest = scores.amax(-1, keepdim=True)
            if sinks is not None:  # a learned score that takes probability and gives no value
                sink = sinks.to(scores.dtype).view(-1, 1, 1)
                highest = highest.maximum(sink)
            weights = scores.sub_(highest).exp_()
            total = weights.sum(-1, keepdim=True)
            if sinks is not None:
                total += (sink - highest).exp()
            log_total[:, :, rows] = highest + total.log()
            probs = weights.div_(total).to(query.dtype)
            out[:, :, rows] = _product(probs, value[:, :, keys])
            if moved is not None:  # the context's value at the query's own position belongs to the observed token
                out[:, :, rows] += seen.own(probs, rows, keys)[..., None] * moved[:, :, rows]
            if key.shape[2] <= _KEPT and any(ctx.needs_input_grad):
                kept.append(probs)
                if slope is not None:
                    slopes.append(slope)
            del scores, weights, probs  # this block's memory, before the next one takes its own
        ctx.save_for_backward(scaled, own_key, own_value, key, value, out, log_total, *kept, *slopes)
        ctx.num_kept = len(kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, own_key, own_value, key, value, out, log_total, *kept = (x.detach() for x in ctx.saved_tensors)
        block, group = ctx.block, scaled.shape[1] // key.shape[1]
        if ctx.flash and not torch.is_grad_enabled():  # its backward pass has no backward pass
            log_total = log_total.squeeze(-1)
            dquery = flash_query_gradient(grad, scaled, key, value, out, log_total, ctx.scale)
            dkey, dvalue = diagonal(scaled, key, value, grad, out, log_total)
            return dquery, dkey, dvalue, *(None,) * 7
        mean_rise = (grad * out).sum(-1, keepdim=True)
        own_rise = _dots(grad, own_value) if block.own is not None else None
        dquery = torch.empty_like(scaled)
        # Copies: views of the diagonals would keep every block.
        own_prob, own_dscore = (scaled.new_empty(scaled.shape[:3]) for _ in range(2))
        for i, (rows, keys) in enumerate(block.seen.blocks(_rows(scaled, key.shape[2]))):
            if kept:
                probs, slope = kept[i], kept[ctx.num_kept + i] if ctx.num_kept < len(kept) else None
            else:
                scores, slope = block(scaled, key, rows, keys)
                probs = scores.sub_(log_total[:, :, rows]).exp_().to(scaled.dtype)
                del scores
            dscores = _product(grad[:, :, rows], value[:, :, keys].mT)
            if own_rise is not None:
                block.seen.set_own(dscores, rows, own_rise[:, :, rows])
            dscores.sub_(mean_rise[:, :, rows]).mul_(probs)
            if slope is not None:
                dscores.mul_(slope)
            dquery[:, :, rows] = _product(dscores, key[:, :, keys])
            own_prob[:, :, rows] = block.seen.own(probs, rows, keys)
            own_dscore[:, :, rows] = block.seen.own(dscores, rows, keys)
            del probs, dscores
        if block.own is not None:
            dquery += own_dscore[..., None] * _each_head(own_key - block.seen.take(key), group)
        dkey = _each_group(own_dscore[..., None] * scaled, group)
        dvalue = _each_group(own_prob[..., None] * grad, group)
        return dquery.mul_(ctx.scale), dkey, dvalue, *(None,) * 7


@dataclass(frozen=True)
class _Scores:
    """Attention scores of a block of queries, and the slope of their soft-capping."""

    seen: _Seen
    own: Float[Tensor, "batch heads queries"] | None
    bias: Float[Tensor, "#batch heads seq seq"] | None
    softcap: float | None

    def __call__(self, query: Tensor, key: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        scores, slope = _product(query[:, :, rows], key[:, :, keys].mT), None
        if self.own is not None:  # the query's own key in place of the observed token's
            self.seen.set_own(scores, rows, self.own[:, :, rows])
        if self.softcap is not None:
            capped = scores.div_(self.softcap).tanh_()
            slope = 1 - capped.square()
            scores = capped * self.softcap
        if self.bias is not None:
            scores += self.seen.rows_of(self.bias, rows, keys)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        self.seen.hide(scores, rows, keys)
        return scores, slope


def _product(per_head: Tensor, per_key_head: Tensor) -> Float[Tensor, "batch heads rows x"]:
    """``per_head [batch, heads, rows, n] @ per_key_head [batch, kv_heads, n, x]``, one product a key head."""
    batch, heads, rows, n = per_head.shape
    grouped = per_head.reshape(batch, per_key_head.shape[1], -1, n) @ per_key_head
    return grouped.view(batch, heads, rows, -1)


def _each_head(per_key_head: Tensor, group: int) -> Tensor:
    """[batch, kv_heads, ...] for each of the heads."""
    return per_key_head if group == 1 else per_key_head.repeat_interleave(group, 1)


def _dots(per_head: Tensor, per_key_head: Tensor) -> Float[Tensor, "batch heads seq"]:
    """Each head's dot product with its key head's, position by position."""
    grouped = per_head.unflatten(1, (per_key_head.shape[1], -1))
    return (grouped * per_key_head[:, :, None]).sum(-1).flatten(1, 2)


def _each_group(per_head: Tensor, group: int) -> Tensor:
    """[batch, heads, ...] summed over the heads of each key head."""
    return per_head if group == 1 else per_head.unflatten(1, (-1, group)).sum(2)
