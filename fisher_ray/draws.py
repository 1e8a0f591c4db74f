"""Random draws that depend on nothing but their own name.

A draw is named by (seed, key of its sequence, position, sample, stream). Its uniforms come from Philox4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a counter-based generator: no state, so batch composition,
padding, order and device change no uniform. Tokens come from the uniforms by the Gumbel-max rule, which changes a token
only where the two best candidates are closer than the rounding error of the logits; inverting a cumulative sum over a
vocabulary would change one wherever any of its boundaries moved across the uniform.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisher_ray.kernels import philox

_STREAMS = {"score": 0, "token": 1}
# Uniforms that are made at once: on a GPU more, as each time is tens of launches.
_UNIFORMS, _GPU_UNIFORMS = 1 << 20, 1 << 24


def sequence_key(seed: int, name: str | int | bytes) -> tuple[int, int]:
    """The 64-bit Philox key of one named sequence under one seed, as two words."""
    raw = name if isinstance(name, bytes) else str(name).encode()
    digest = hashlib.blake2b(raw, digest_size=8, key=str(operator.index(seed)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@dataclass(frozen=True)
class Draws:
    """Names of the draws at ``n`` positions: the Philox key of each one's sequence, its position and its first sample."""

    key: Int[Tensor, "n 2"]
    position: Int[Tensor, " n"]
    first_sample: Int[Tensor, " n"]
    stream: Literal["score", "token"]

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(self.key[rows], self.position[rows], self.first_sample[rows], self.stream)

    def uniforms(self, num_samples: int, lanes: range) -> Float[Tensor, "n num_samples lanes"]:
        """Uniforms in (0, 1), float64, for each sample and each lane (a draw's own supply of uniforms)."""
        device = self.key.device
        words = torch.arange(lanes.start // 4, -(-lanes.stop // 4), device=device)
        sample = self.first_sample[:, None, None] + torch.arange(num_samples, device=device)[:, None]
        stream = torch.full_like(self.position, _STREAMS[self.stream])[:, None, None]
        bits = philox(
            (words, sample, self.position[:, None, None], stream),
            (self.key[:, 0, None, None], self.key[:, 1, None, None]),
        ).flatten(-2)
        start = lanes.start % 4
        return (bits[..., start : start + len(lanes)].double() + 0.5) * 2.0**-32

    def tokens(self, weights: Float[Tensor, "n vocab_size"], num_samples: int) -> Int[Tensor, "n num_samples"]:
        """``num_samples`` independent tokens a row, each with probability proportional to its weight.

        Two Gumbel-max races in place of one over the vocabulary: first between blocks of about sqrt(vocab_size) tokens
        by their total weight, then between the tokens of the winning block; 2 sqrt(vocab_size) uniforms a draw, of as many
        samples at once as memory is counted for.
        """
        n, vocab_size = weights.shape
        width = _width(vocab_size)
        num_blocks = -(-vocab_size // width)
        last = (num_blocks - 1) * width
        totals = [
            weights[:, :last].unflatten(1, (num_blocks - 1, width)).sum(-1),
            weights[:, last:].sum(-1, keepdim=True),
        ]
        blocks = torch.cat(totals, 1)[:, None]

        def drawn(start: int, count: int) -> Tensor:
            draws = replace(self, first_sample=self.first_sample + start)
            first = width * draws._race(blocks, count, range(num_blocks))
            inside = first[..., None] + torch.arange(width, device=weights.device)
            behind = inside >= vocab_size
            few = weights.gather(1, inside.masked_fill_(behind, 0).flatten(1)).view(n, count, width)
            return first + draws._race(few.masked_fill_(behind, 0.0), count, range(num_blocks, num_blocks + width))

        step = _together(n, vocab_size, weights.device)
        return torch.cat([drawn(i, min(step, num_samples - i)) for i in range(0, num_samples, step)], 1)

    def _race(self, weights: Tensor, num_samples: int, lanes: range) -> Tensor:
        """argmax(log w + Gumbel) = argmin(exponential / w), which needs one logarithm fewer."""
        return (-self.uniforms(num_samples, lanes).log() / weights.double()).argmin(-1)


def drawing_bytes(n: int, num_samples: int, vocab_size: int, device: torch.device) -> int:
    """Bytes that drawing so many tokens at n positions holds at once beside their weights; counted."""
    return 40 * n * _width(vocab_size) * min(num_samples, _together(n, vocab_size, device))


def _width(vocab_size: int) -> int:
    """Tokens of a block, and about as many blocks, between which a token is drawn."""
    return max(1, round(vocab_size**0.5))


def _together(n: int, vocab_size: int, device: torch.device) -> int:
    """Samples drawn at once at n positions."""
    return max(1, (_GPU_UNIFORMS if device.type == "cuda" else _UNIFORMS) // max(1, n * _width(vocab_size)))
