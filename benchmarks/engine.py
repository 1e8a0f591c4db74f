"""Speed of the engine against its alternatives and against the machine's matrix-multiply peak, in one run.

    python benchmarks/engine.py --device cpu

A model of GPT-2's size (``GPT2Config()``, random weights) scores ``--batch`` sequences of each of ``--seq-len`` tokens. Beside
it, in the same process, take turns with it: peers, which ``benchmarks/peers.py`` describes, at four positions spread over the
sequence; a plain forward pass of the same tokens with all logits; and a matrix product. Times are medians over ``--repeats``
rounds; what takes longer than 100 s runs once. The exact estimator runs on one sequence, at the first length alone.

Flop are those of matrix products, counted as they run, attention over all keys. Beside each ratio of times is the ratio of
flop: what lies between the two is how well the products run. Shares are of the peak measured in the run: that of torch.mm,
and on a CPU also that of oneDNN, which the engine multiplies by, and so do the peers and the forward pass, as they run on the
same modules.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from peers import Problem, Taken, cached, gpt2, hardware, interleaved, recomputed, reference, sweep
from torch import Tensor
from transformers import PreTrainedModel
from transformers import logging as transformers_logging

from fisher_ray import Exact, Sampled, SplitModel
from fisher_ray.kernels import linear

# (what, the alternative, its runs, ours)
_RATIOS = (
    ("one layer, S=8: recomputed", "recomputed", "one layer, S=8"),
    ("one layer, S=8: cached and batched", "cached and batched", "one layer, S=8"),
    ("all layers, S=8: one recomputed run for each block", "recomputed, every block", "all layers, S=8"),
    ("one layer, exact: the reference's way", "reference", "one layer, exact"),
    ("all layers, exact: the reference's way for each block", "reference, every block", "all layers, exact"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-exact", action="store_true", help="the exact estimator takes minutes on a CPU")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    device = torch.device(args.device)
    print(f"{hardware(device)}; torch {torch.__version__}; batch {args.batch}, median of {args.repeats}")
    for i, seq_len in enumerate(args.seq_len):
        exact = i == 0 and not args.skip_exact
        report(measure(gpt2().to(device), args.batch, seq_len, args.repeats, exact))


@dataclass(frozen=True)
class Measured:
    """What cases took a position, and beside them flop/s of a large matrix product: torch.mm's, and the engine's own."""

    batch: int
    seq_len: int
    peak: float
    own_peak: float
    cases: dict[str, Taken]

    def share(self, name: str) -> float:
        """Of torch.mm's peak."""
        return self.cases[name].rate / self.peak

    def own_share(self, name: str) -> float:
        """Of the peak of the engine's own product."""
        return self.cases[name].rate / self.own_peak

    def ratios(self) -> Iterator[tuple[str, float, float]]:
        """(ours and the alternative, how many times ours that takes, how many times the flop)."""
        for what, other, ours in _RATIOS:
            if other in self.cases:
                a, b = self.cases[other], self.cases[ours]
                yield what, a.seconds / b.seconds, a.flop / b.flop
        sweep_, forward = self.cases["all layers, S=1"], self.cases["forward"]
        yield "all layers, S=1, in plain forward passes", sweep_.seconds / forward.seconds, sweep_.flop / forward.flop


@torch.no_grad()
def measure(model: PreTrainedModel, batch: int, seq_len: int, repeats: int, exact: bool) -> Measured:
    """Everything at one length; the model is any with a plain head."""
    split = SplitModel(model)
    device = split.device
    ids = torch.randint(split.head.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    middle, last = split.num_layers // 2, split.num_layers - 1
    everything = list(range(split.num_layers + 1))
    few = torch.linspace(1, seq_len - 1, 4).long().tolist()

    def peer(run: Callable[[Problem, list[int]], Tensor], layer: int, positions: list[int]) -> Callable[[], object]:
        problem = Problem(split, ids, layer)
        return torch.enable_grad()(lambda: run(problem, positions))

    cases: dict[str, tuple[Callable[[], object], int]] = {  # what runs, and how many positions it covers
        "torch.mm": (product(device, model.dtype), 1),
        "linear": (product(device, model.dtype, linear), 1),
        "forward": (lambda: model(input_ids=ids, use_cache=False), ids.numel()),
        "one layer, S=8": (lambda: sweep(split, ids, [middle], Sampled(8)), ids.numel()),
        "all layers, S=8": (lambda: sweep(split, ids, everything, Sampled(8)), ids.numel()),
        "one layer, S=1": (lambda: sweep(split, ids, [middle], Sampled(1)), ids.numel()),
        "all layers, S=1": (lambda: sweep(split, ids, everything, Sampled(1)), ids.numel()),
        "recomputed": (peer(recomputed, middle, few), len(few)),
        "recomputed, first block": (peer(recomputed, 0, few), len(few)),
        "recomputed, last block": (peer(recomputed, last, few), len(few)),
        "cached and batched": (peer(cached, middle, few), len(few)),
    }
    if exact:
        cases |= {
            "one layer, exact": (lambda: sweep(split, ids[:1], [middle], Exact()), seq_len),
            "all layers, exact": (lambda: sweep(split, ids[:1], everything, Exact()), seq_len),
            "reference": (peer(reference, middle, few[-1:]), 1),
        }
    taken = interleaved({name: case for name, (case, _) in cases.items()}, repeats, device)
    each = {name: taken[name] * (1 / count) for name, (_, count) in cases.items()}
    peaks = [each.pop(name).rate for name in ("torch.mm", "linear")]
    # Linear in the number of blocks above the layer: the mean of the first and the last is that of all.
    ends = each.pop("recomputed, first block") + each.pop("recomputed, last block")
    each["recomputed, every block"] = ends * (split.num_layers / 2)
    if exact:
        each["reference, every block"] = each["reference"] * split.num_layers
    return Measured(batch, seq_len, *peaks, each)


def product(
    device: torch.device, dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], object] | None = None
) -> Callable[[], object]:
    """Eight matrix products ``x W^T`` of GPT-2's widest layer; on a GPU larger ones, which alone reach its peak.

    By torch.mm, the result in a place of its own, unless told otherwise.
    """
    rows, inner, columns = (8192, 8192, 8192) if device.type == "cuda" else (2048, 768, 3072)
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    if multiply is not None:
        once: Callable[[], object] = partial(multiply, left, right.T)
    else:
        once = partial(torch.mm, left, right, out=left.new_empty(rows, columns))

    def eight() -> None:
        for _ in range(8):
            once()

    return eight


def report(measured: Measured) -> None:
    print(
        f"\n{measured.batch} x {measured.seq_len} tokens; matrix-multiply peak {measured.peak / 1e9:.0f} GFLOP/s, the engine's "
        f"own product {measured.own_peak / 1e9:.0f}"
    )
    for name, taken in measured.cases.items():
        print(
            f"{name:26s} {1 / taken.seconds:9.2f} positions/s  {measured.share(name):5.0%} of the peak  "
            f"{measured.own_share(name):5.0%} of its own"
        )
    print(f"\n{'':56s} {'time':>7s} {'flop':>7s}")
    for what, times, flop in measured.ratios():
        print(f"{what:56s} {times:7.2f} {flop:7.2f}", flush=True)


if __name__ == "__main__":
    main()
