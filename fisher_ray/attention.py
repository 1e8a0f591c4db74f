"""Own-position attention: gradients flow only through a query's own key and value.

The logits at position ``t`` depend on the residual stream ``h_t`` through position ``t``'s own path alone once the
earlier positions are held constant. If every attention layer treats all keys and values but the query's own as
constants, one backward pass of ``sum_t log p(y_t)`` yields the isolated score of every position, at every layer it
passes. With ``s_ti = scale q_t . k_i``, ``P = softmax(s)`` and ``o_t = sum_i P_ti v_i``, a cotangent ``b_t`` at ``o_t``
is pulled back to

    ds_ti = P_ti (b_t . v_i - b_t . o_t)
    dq_t  = scale sum_i ds_ti k_i,    dk_t = scale ds_tt q_t,    dv_t = P_tt b_t.

The function is registered with transformers as an attention implementation, so it serves every architecture that
dispatches through ``AttentionInterface``. It knows four modes, set by :func:`attention_mode`:

* ``plain``: ordinary causal attention with full gradients (the oracle, and each model's plain forward pass);
* ``own``: own-position gradients, every token of the row a query;
* ``record``: ``plain`` without a graph, remembering each layer's keys, values, mask and bias in a :class:`Context`;
* ``replay``: the queries are chosen (position, token) pairs, their off-diagonal keys and values come from a
  :class:`Context`, and only the diagonal is their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

IMPLEMENTATION = "fisher_ray"

# What transformers' attention modules hand over that changes nothing here: windows and causality arrive in the mask,
# rotary positions are already in q and k, and the rest asks for outputs nobody reads.
_HARMLESS = frozenset({
    "sliding_window", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "encoder_hidden_states",
    "encoder_attention_mask", "indices", "layer_idx",
})  # fmt: skip


@dataclass
class _Layer:
    """Keys, values and position terms of one attention layer over a context."""

    key: Float[Tensor, "batch kv_heads seq head_dim"]
    value: Float[Tensor, "batch kv_heads seq value_dim"]
    mask: Bool[Tensor, "#batch #heads seq seq"] | None
    bias: Float[Tensor, "#batch heads seq seq"] | None
    broken: Bool[Tensor, "batch 1 1 seq"] | None


@dataclass
class Context:
    """Every attention layer's keys and values over the observed tokens, held constant."""

    layers: dict[nn.Module, _Layer] = field(default_factory=dict)


@dataclass(frozen=True)
class _Mode:
    name: Literal["plain", "own", "record", "replay"] = "plain"
    context: Context | None = None
    positions: Int[Tensor, "batch queries"] | None = None


_MODE: ContextVar[_Mode] = ContextVar("fisher_ray_attention_mode", default=_Mode())  # noqa: B039 (frozen)


@contextmanager
def attention_mode(
    model: nn.Module,
    name: Literal["plain", "own", "record", "replay"],
    context: Context | None = None,
    positions: Int[Tensor, "batch queries"] | None = None,
) -> Iterator[None]:
    """Run ``model`` on this module's attention in the given mode; its own implementation is restored on leaving."""
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    token = _MODE.set(_Mode(name, context, positions))
    try:
        for config in configs.values():
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _MODE.reset(token)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attention_mask: Bool[Tensor, "#batch #heads queries keys"] | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    position_bias: Float[Tensor, "#batch heads queries keys"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], None]:
    """The attention implementation that transformers calls."""
    unknown = {name for name, given in kwargs.items() if given is not None} - _HARMLESS
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, which own-position "
            "attention does not know. Use gradients='per_position' for this model."
        )
    if dropout:
        raise ValueError(f"attention dropout must be 0, got {dropout}. Call model.eval() first.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mode = _MODE.get()
    causal = getattr(module, "is_causal", True)
    if not causal or mode.name == "plain":  # cross-attention and encoders carry constants: nothing to isolate
        mask = _visible(query, key, attention_mask, causal)
        probs = _probabilities(query, key, scale, softcap, s_aux, position_bias, mask)
        return _transposed(_weighted(probs, value)), None

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
        attention_mask, position_bias = _rows(layer.mask, where), _rows(layer.bias, where)
    else:
        attention_mask = _visible(query, key, attention_mask, causal)
        if broken is not None:
            key, value = (x.masked_fill(broken.mT, 0.0) for x in (key, value))
        if mode.name == "record":
            assert mode.context is not None
            mode.context.layers[module] = _Layer(key, value, attention_mask, position_bias, broken)
    out = _OwnPosition.apply(
        query,
        own_key,
        own_value,
        key.detach(),
        value.detach(),
        where,
        attention_mask,
        position_bias,
        s_aux,
        scale,
        softcap,
    )
    if broken is not None:
        seen = attention_mask & broken if attention_mask is not None else broken
        if where is not None:
            seen = seen.expand(-1, -1, query.shape[2], -1).scatter(-1, where[:, None, :, None], False)
        out = out.masked_fill(seen.any(-1, keepdim=True), torch.nan)
    return _transposed(out), None


def _broken(key: Tensor, value: Tensor) -> Bool[Tensor, "batch 1 1 keys"] | None:
    """Positions whose key or value is not finite, if there are any.

    A weight of zero times NaN is NaN, so they would reach the queries before them, which do not see them.
    """
    if bool((key.float().sum() + value.float().sum()).isfinite()):
        return None
    return ~(key.isfinite().all(-1) & value.isfinite().all(-1)).all(1)[:, None, None]


_Own = tuple[Tensor | None, Tensor | None]  # the queries' own keys, and their positions in the context


class _OwnPosition(torch.autograd.Function):
    """Explicit own-position attention; the graph keeps P and no other [queries, keys] tensor (two with soft-capping)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        key: Tensor,
        value: Tensor,
        where: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        probs = _probabilities(query, key, scale, softcap, sinks, bias, mask, (own_key, where))
        group = query.shape[1] // key.shape[1]
        own_prob = _own_entries(probs, where)
        out = _weighted(probs, value)
        if where is not None:  # the context's value at the query's own position belongs to the observed token
            observed = _take(value, where)
            out = out + own_prob[..., None] * (own_value - observed).repeat_interleave(group, 1)
        slope = None
        if softcap is not None:
            raw = _raw_scores(query, key, scale, (own_key, where))
            slope = raw.div_(softcap).tanh_().square_().neg_().add_(1)
        ctx.save_for_backward(query, own_key, own_value, key, value, where, probs, out, slope)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, own_key, own_value, key, value, where, probs, out, slope = ctx.saved_tensors
        group = query.shape[1] // key.shape[1]
        batch, heads, queries, _ = query.shape
        own_prob = _own_entries(probs, where)
        dscores = (_grouped(grad, group) @ value.transpose(-1, -2)).view(batch, heads, queries, -1)
        if where is not None:
            own = (grad * own_value.repeat_interleave(group, 1)).sum(-1)
            dscores.scatter_(-1, _index(where, heads), own[..., None])
        dscores.sub_((grad * out).sum(-1, keepdim=True)).mul_(probs)
        if slope is not None:
            dscores.mul_(slope)
        own_dscore = _own_entries(dscores, where)[..., None] * ctx.scale
        dkey = (own_dscore * query).unflatten(1, (-1, group)).sum(2)
        dvalue = (own_prob[..., None] * grad).unflatten(1, (-1, group)).sum(2)
        dquery = (_grouped(dscores, group) @ key).view(query.shape).mul_(ctx.scale)
        if where is not None:
            observed = _take(key, where)
            dquery += own_dscore * (own_key - observed).repeat_interleave(group, 1)
        return dquery, dkey, dvalue, *(None,) * 8


def _raw_scores(query: Tensor, key: Tensor, scale: float, own: _Own = (None, None)) -> Tensor:
    """scale q . k, [batch, heads, queries, keys]; in replay the own entry is the query's own key's."""
    own_key, where = own
    group = query.shape[1] // key.shape[1]
    scores = (_grouped(query, group) @ key.transpose(-1, -2)).view(*query.shape[:3], key.shape[2])
    if own_key is not None and where is not None:
        own_score = (query * own_key.repeat_interleave(group, 1)).sum(-1, keepdim=True)
        scores = scores.scatter_(-1, _index(where, query.shape[1]), own_score)
    return scores * scale


def _probabilities(
    query: Tensor,
    key: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    own: _Own = (None, None),
) -> Tensor:
    """Attention weights [batch, heads, queries, keys] in the dtype of the query, the softmax at least in float32."""
    scores = _raw_scores(query, key, scale, own)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:  # a learned logit that takes probability and gives no value
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1].to(query.dtype)
    return scores.softmax(-1).to(query.dtype)


def _visible(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The boolean mask of keys a query sees; transformers hands over None for the plain causal one."""
    if mask is not None or not causal:
        return mask
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]


def _grouped(per_head: Tensor, group: int) -> Tensor:
    """[batch, heads, queries, x] -> [batch, kv_heads, group * queries, x]: one product a key head."""
    return per_head.reshape(per_head.shape[0], per_head.shape[1] // group, -1, per_head.shape[-1])


def _weighted(probs: Tensor, value: Tensor) -> Tensor:
    """Sums of the values under the attention weights, [batch, heads, queries, value_dim]."""
    out = _grouped(probs, probs.shape[1] // value.shape[1]) @ value
    return out.view(*probs.shape[:3], value.shape[-1])


def _index(where: Tensor, heads: int) -> Tensor:
    return where[:, None, :, None].expand(-1, heads, -1, 1)


def _own_entries(scores: Tensor, where: Tensor | None) -> Tensor:
    """[batch, heads, queries]: the entry of each query's own position."""
    if where is None:
        return scores.diagonal(dim1=-2, dim2=-1)
    return scores.gather(-1, _index(where, scores.shape[1])).squeeze(-1)


def _take(per_key: Tensor, where: Tensor) -> Tensor:
    """Rows of [batch, kv_heads, keys, dim] at the queries' positions."""
    index = where[:, None, :, None].expand(-1, per_key.shape[1], -1, per_key.shape[-1])
    return per_key.gather(2, index)


def _rows(square: Tensor | None, where: Tensor) -> Tensor | None:
    """Rows of a [#batch, #heads, seq, seq] mask or bias at the queries' positions."""
    if square is None:
        return None
    square = square.expand(where.shape[0], -1, -1, -1)
    index = where[:, None, :, None].expand(-1, square.shape[1], -1, square.shape[-1])
    return square.gather(2, index)


def _transposed(per_head: Tensor) -> Tensor:
    return per_head.transpose(1, 2).contiguous()


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
