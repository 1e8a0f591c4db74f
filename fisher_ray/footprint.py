"""Bytes that passes keep and hold: counted as they are allocated, in passes over a few tokens, and not modelled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisher_ray.tape import Tape, Walk


class LiveBytes(TorchDispatchMode):
    """While in force, counts the bytes of storages that operators allocate and nothing has let go of.

    Works on the meta device too, where nothing is allocated.

    Args:
        without: tensors whose storages are not counted.
        ignored: whether what an operator gave is not counted either.

    Attributes:
        now: bytes that are alive.
        most: at any moment so far.
    """

    def __init__(self, without: Iterable[Tensor] = (), ignored: Callable[[Tensor], bool] = lambda tensor: False):
        super().__init__()
        self.now = self.most = 0
        self._ignored = ignored
        self._held = {tensor.untyped_storage()._cdata: 0 for tensor in without}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._held or self._ignored(tensor):
            return
        self._held[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._held.pop(key)


@dataclass(frozen=True)
class Footprint:
    """What one token takes that attends to k keys: (a, b) for ``a + b k`` bytes.

    Attributes:
        kept: by the graph of all blocks.
        held: beside it at once, at most, by a backward pass.
        context: by the keys and values of a recorded pass.
        recording: at once, at most, by that pass, the context included.
    """

    kept: tuple[float, float]
    held: tuple[float, float]
    context: tuple[float, float]
    recording: tuple[float, float]

    @classmethod
    def count(
        cls,
        step: int,
        taped: Callable[[int], Tape],
        recorded: Callable[[int], Any] | None,
        live: Callable[[], LiveBytes],
    ) -> Footprint:
        """From passes over sequences of one, two and three steps, whose queries attend to all of their keys.

        Args:
            taped: runs so many tokens through all blocks.
            recorded: runs them without a graph, and gives what is kept of them; None: that is never done.
            live: a counter for each pass.
        """
        sizes = [step * i for i in (1, 2, 3)]
        counted = [_counted(taped, tokens, live()) for tokens in sizes]
        noted = [(0, 0) if recorded is None else _noted(recorded, tokens, live()) for tokens in sizes]
        return cls(*(_parabola(step, bytes_) for pairs in (counted, noted) for bytes_ in zip(*pairs, strict=True)))


def _noted(recorded: Callable[[int], Any], tokens: int, live: LiveBytes) -> tuple[int, int]:
    """Bytes that a recorded pass leaves behind, and holds at once."""
    with live:
        context = recorded(tokens)
        left = live.now
        del context
    return left, live.most


def _counted(taped: Callable[[int], Tape], tokens: int, live: LiveBytes) -> tuple[int, int]:
    """Bytes that a tape keeps, and bytes held beside them."""
    with live:
        tape = taped(tokens)
        before = kept = live.now
        if isinstance(tape, Walk):  # its blocks are as one another, and the graph of one is kept at a time
            block = tape.block(tape.num_blocks - 1)
            kept = (live.now - before) * tape.num_blocks
            before = live.now
            del block
        live.most = 0
        for _ in tape.pull_each([tape.z]):
            pass
    return kept, max(0, live.most - before)


def _parabola(step: int, sizes: Sequence[int]) -> tuple[float, float]:
    """(a, b) of ``c + a n + b n^2`` through the sizes of one, two and three steps; neither is below zero."""
    first, second, third = sizes
    b = max(0.0, (third - 2 * second + first) / (2 * step**2))
    return max(0.0, (third - first) / (2 * step) - 4 * b * step), b
