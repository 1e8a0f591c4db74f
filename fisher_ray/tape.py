"""Forward passes that remember how to pull cotangents back: with one graph of all blocks, or one block's at a time.

To pull is a vector-Jacobian product, to push a Jacobian-vector product, and one block's graph at a time is gradient
checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Where = tuple[Tensor, Tensor] | None


class Tape:
    """A forward pass that remembers how to pull cotangents back, for ``n`` queries of a padded batch.

    Its graph is that of all blocks from the lowest layer up.

    Args:
        z: [batch, seq, d_z].
        streams: per layer [batch, seq, d_model].
        where: rows and columns of the queries; None: everything is one, in order.

    Attributes:
        z: [n, d_z], final hidden states.
        streams: per layer [n, d_model], the residual streams.
    """

    def __init__(self, z: Tensor, streams: Mapping[int, Tensor], where: Where):
        self._z, self._streams, self._where = z, dict(streams), where
        self.z = self._gathered(z.detach())
        self.streams = {layer: self._gathered(stream.detach()) for layer, stream in streams.items()}

    def pull(self, cotangents: Float[Tensor, "n d_z"]) -> dict[int, Float[Tensor, "n d_model"]]:
        """``J_z^T`` applied to one cotangent a query, at every layer, by one backward pass."""
        return {layer: pulled for layer, _, pulled in self.pull_each([cotangents])}

    def pull_each(
        self, cotangents: Iterable[Float[Tensor, "n d_z"]]
    ) -> Iterator[tuple[int, int, Float[Tensor, "n d_model"]]]:
        """The same for several: (layer, which of them, pulled) in any order."""
        for i, each in enumerate(cotangents):
            each, exponent = _in_range(each, self._z.dtype)
            padded = self._padded(each, self._z)
            grads = torch.autograd.grad(self._z, list(self._streams.values()), padded, retain_graph=True)
            for layer, grad in zip(self._streams, grads, strict=True):
                yield layer, i, _restored(self._gathered(grad), exponent)

    def push(self, layer: int, directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "n k d_z"]:
        """``J_z v``: how fast z moves as the stream at ``layer`` moves along each of k directions, at every query.

        A backward pass is linear in its cotangent, with the matrix ``J_z^T``; so its own backward pass multiplies by ``J_z``.
        Costs one backward pass, and one of that pass, about twice as much, a direction.
        """
        n = len(self.z)
        return torch.stack(self._moved(self._z, self._streams[layer], [v.expand(n, -1) for v in directions]), 1)

    def _moved(
        self, above: Tensor, below: Tensor, tangents: Sequence[Float[Tensor, "n a"]]
    ) -> list[Float[Tensor, "n b"]]:
        """How fast the queries' rows of ``above`` move as those of ``below`` move along each tangent."""
        cotangent = torch.zeros_like(above).requires_grad_()
        with torch.enable_grad():
            (pulled,) = torch.autograd.grad(above, below, cotangent, create_graph=True)
        moved = []
        for tangent in tangents:
            ranged, exponent = _in_range(tangent, pulled.dtype)
            (along,) = torch.autograd.grad(pulled, cotangent, self._padded(ranged, pulled), retain_graph=True)
            moved.append(_restored(self._gathered(along), exponent))
        return moved

    def _padded(self, rows: Tensor, like: Tensor) -> Tensor:
        """Zero but for the queries' rows."""
        if self._where is None:
            return rows.to(like).view_as(like)
        row, column = (index.to(like.device) for index in self._where)
        padded = torch.zeros_like(like)
        padded[row, column] = rows.to(padded)
        return padded

    def _gathered(self, padded: Tensor) -> Tensor:
        """The queries' rows, on z's device; a stream and its gradient live where the block below left them."""
        if self._where is None:
            return padded.flatten(0, 1).to(self._z.device)
        row, column = (index.to(padded.device) for index in self._where)
        return padded[row, column].to(self._z.device)


class Walk(Tape):
    """A tape of few bytes: it keeps what enters each block, and runs the blocks again to pull cotangents, from the top down.

    One block's graph is held at a time. Costs one more forward pass of the blocks above the lowest layer, however many
    cotangents are pulled. What reaches other positions than a query's own is dropped on the way, which changes nothing: none
    of it returns. That blocks meet in the stream alone is seen to by :func:`fisher_ray.architecture.block_calls`.

    Args:
        z: with the graph of what stands above the blocks.
        inputs: what enters each block from the lowest layer up, and last what leaves the last one, a leaf of z's graph.
        calls: of the blocks.
        layers: those of ``streams``.
        taping: what is in force while a pass makes its graph.

    Attributes:
        num_blocks: of the model.
    """

    def __init__(
        self,
        z: Tensor,
        inputs: Mapping[int, Tensor],
        where: Where,
        calls: Sequence[Callable[[Tensor], Tensor]],
        layers: Sequence[int],
        taping: Callable[[], AbstractContextManager[Any]],
    ):
        super().__init__(z, {layer: inputs[layer] for layer in layers}, where)
        self._inputs, self._calls, self._taping = dict(inputs), calls, taping
        self.num_blocks = len(calls)

    def pull_each(
        self, cotangents: Iterable[Float[Tensor, "n d_z"]]
    ) -> Iterator[tuple[int, int, Float[Tensor, "n d_model"]]]:
        ranged = [_in_range(each, self._z.dtype) for each in cotangents]
        if not ranged:
            return
        pulled, exponents = map(list, zip(*ranged, strict=True))
        for layer in sorted(self._inputs, reverse=True):
            above, entering = self.block(layer)
            for i, each in enumerate(pulled):
                (grad,) = torch.autograd.grad(above, entering, self._padded(each, above), retain_graph=True)
                pulled[i] = self._gathered(grad)
                if layer in self._streams:
                    yield layer, i, _restored(pulled[i], exponents[i])
            del above, entering, grad  # this block's graph, before the next one's grows

    def push(self, layer: int, directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "n k d_z"]:
        """As :meth:`Tape.push`, from the bottom up."""
        moved = [direction.expand(len(self.z), -1) for direction in directions]
        for k in range(layer, self.num_blocks + 1):
            moved = self._moved(*self.block(k), moved)
        return torch.stack(moved, 1)

    def block(self, layer: int) -> tuple[Tensor, Tensor]:
        """What leaves a block, with its graph, and the leaf that enters it; above the last one, z."""
        if layer == self.num_blocks:
            return self._z, self._inputs[layer]
        entering = self._inputs[layer].detach().requires_grad_()
        with self._taping():
            # Not the leaf itself: torch's flop counter takes none that enters a module.
            return self._calls[layer](entering.view_as(entering)), entering


def _in_range(rows: Float[Tensor, "n d"], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows that float16 has the digits of, and the exponents of the powers of two that they were divided by.

    Scores of a token that is all but certain are smaller than float16's smallest normal number, 6e-5, and backward passes are
    linear.
    """
    if dtype != torch.float16:
        return rows, None
    exponent = torch.frexp(rows.abs().amax(-1, keepdim=True)).exponent
    return _scaled(rows, -exponent), exponent


def _restored(pulled: Tensor, exponent: Tensor | None) -> Tensor:
    return pulled if exponent is None else _scaled(pulled.float(), exponent)


def _scaled(rows: Tensor, exponent: Tensor) -> Tensor:
    """``rows 2^exponent``, in two steps: PyTorch's ldexp had multiplied by the power, which may be no float32 number."""
    half = exponent // 2
    return torch.ldexp(torch.ldexp(rows, half), exponent - half)
