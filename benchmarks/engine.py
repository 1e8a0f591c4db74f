"""Speed of the engine against its alternatives and against the machine's matrix-multiply peak, in one run.

    python benchmarks/engine.py --device cpu

A model of GPT-2's size (``GPT2Config()``, random weights) scores ``--batch`` sequences of ``--seq-len`` tokens. Beside it,
in the same process:

* ``recomputed``: one position at a time, the context's forward pass anew for each, S backward passes (SDPA);
* ``cached``: one position at a time, the context's keys and values cached, the S cotangents as a batch (SDPA);
* ``reference``: exact, one position: d_model backward passes, the [V, d] chain, the outer product;
* ``forward``: a plain forward pass of the same tokens with all logits (SDPA).

The alternatives are timed on a few positions spread evenly over the sequence, and scaled up. Each figure is a median over
``--repeats`` rounds in which everything takes its turn.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers import logging as transformers_logging

from fisher_ray import Exact, Sampled, SplitModel, score_factors
from fisher_ray.estimators import Estimator
from fisher_ray.shards import Sums

LAYER = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-exact", action="store_true", help="the exact estimator takes minutes on a CPU")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).to(device).eval().requires_grad_(False)
    split = SplitModel(model)
    ids = torch.randint(50257, (args.batch, args.seq_len), device=device)
    few = torch.linspace(1, args.seq_len - 1, 4).long().tolist()
    everything = list(range(model.config.n_layer + 1))
    print(
        f"{_hardware(device)}; torch {torch.__version__}; {args.batch} x {args.seq_len} tokens, median of {args.repeats}"
    )

    def engine(layers: list[int], estimator: Estimator, rows: Tensor = ids) -> Callable[[], None]:
        def sweep() -> None:
            scores = score_factors(split, rows, layers=layers, estimator=estimator)
            sums = Sums(layers, split.d_model, device)
            for layer in layers:
                sums.add(layer, scores.factors[layer], scores.activations[layer])

        return sweep

    tokens = ids.numel()
    cases: dict[str, tuple[Callable[[], None], float]] = {  # what runs, and how many positions it covers
        "peak": (_product(device), 1),
        "forward": (lambda: _forward(model, ids), tokens),
        "S=8, layer 6": (engine([LAYER], Sampled(8)), tokens),
        "S=8, all layers": (engine(everything, Sampled(8)), tokens),
        "S=1, layer 6": (engine([LAYER], Sampled(1)), tokens),
        "S=1, all layers": (engine(everything, Sampled(1)), tokens),
        "recomputed, layer 6": (lambda: [_recomputed(model, ids, t, LAYER, 8) for t in few], len(few)),
        "recomputed, layer 0": (lambda: [_recomputed(model, ids, t, 0, 8) for t in few], len(few)),
        "cached, layer 6": (lambda: [_cached(model, ids, t, LAYER, 8) for t in few], len(few)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case, _ in cases.values():
        case()
    for _ in range(args.repeats):
        for name, (case, _) in cases.items():
            seconds[name].append(_timed(case, device))
    each = {name: statistics.median(taken) / cases[name][1] for name, taken in seconds.items()}
    peak = _PRODUCT_FLOP / each.pop("peak")
    print(f"matrix-multiply peak: {peak / 1e9:.0f} GFLOP/s\n")
    counted = {
        "forward": _flop(args.seq_len, [], 0),
        "S=8, layer 6": _flop(args.seq_len, [LAYER], 8),
        "S=8, all layers": _flop(args.seq_len, everything, 8),
        "S=1, layer 6": _flop(args.seq_len, [LAYER], 1),
        "S=1, all layers": _flop(args.seq_len, everything, 1),
    }
    for name, taken in each.items():
        share = f"  {counted[name] / taken / peak:5.0%} of the peak" if name in counted else ""
        print(f"{name:22s} {1 / taken:9.2f} positions/s{share}")

    print()
    one, all_layers = each["S=8, layer 6"], each["S=8, all layers"]
    print(f"one layer, S=8, against recomputed:         {each['recomputed, layer 6'] / one:6.1f}")
    print(f"one layer, S=8, against cached and batched: {each['cached, layer 6'] / one:6.1f}")
    recomputed_all = 12 * (each["recomputed, layer 6"] + each["recomputed, layer 0"]) / 2
    print(f"all layers, S=8, against 12 recomputed:     {recomputed_all / all_layers:6.1f}   (mean of layers 0 and 6)")
    print(f"all layers, S=1, in plain forward passes:   {each['S=1, all layers'] / each['forward']:6.2f}")
    if not args.skip_exact:
        print()
        reference = _timed(lambda: _reference_exact(model, ids, args.seq_len - 1, LAYER), device)
        print(f"{'reference, layer 6':22s} {1 / reference:9.3f} positions/s")
        for name, layers, runs in (("layer 6", [LAYER], 1), ("all layers", everything, 12)):
            taken = _timed(engine(layers, Exact(), ids[:1]), device) / args.seq_len
            share = _flop(args.seq_len, layers, 768, exact=True) / taken / peak
            print(f"{'exact, ' + name:22s} {1 / taken:9.3f} positions/s  {share:5.0%} of the peak", end="")
            print(f"   {runs * reference / taken:6.1f} times {runs} x reference")
    if device.type == "cuda":
        print(f"\npeak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    else:
        print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def _flop(seq_len: int, layers: list[int], num_factors: int, exact: bool = False) -> float:
    """Multiply-adds, two flop each, of matrix products a position: GPT-2 small, attention over all keys."""
    d, vocab, blocks = 768, 50257, 12
    block = 2 * 12 * d * d + 4 * seq_len * d
    total = blocks * block + 2 * vocab * d
    if layers:
        total += 2 * vocab * d + num_factors * (blocks - min(layers)) * block
        total += len(layers) * 2 * d * d * (2 * num_factors + 1)  # F, F / tr F and h h^T
    if exact:
        total += 2 * vocab * d * d
    return total


_PRODUCT_FLOP = 2.0 * 4096 * 3072 * 768 * 4


def _product(device: torch.device) -> Callable[[], None]:
    left, right = torch.randn(4096, 768, device=device), torch.randn(768, 3072, device=device)
    out = torch.empty(4096, 3072, device=device)

    def multiply() -> None:
        for _ in range(4):
            torch.mm(left, right, out=out)

    return multiply


@torch.no_grad()
def _forward(model: GPT2LMHeadModel, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False)


class _Leaf:
    """Makes the stream entering a block a leaf of the graph while it is in force."""

    def __init__(self, model: GPT2LMHeadModel, layer: int):
        self.handle = model.transformer.h[layer].register_forward_pre_hook(self._hook)

    def _hook(self, _: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.stream = args[0].detach().requires_grad_()
        return (self.stream, *args[1:])

    def __enter__(self) -> _Leaf:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _recomputed(model: GPT2LMHeadModel, ids: Tensor, t: int, layer: int, num_samples: int) -> None:
    """Scores at one position: forward over its context, S backward passes."""
    with _Leaf(model, layer) as leaf:
        logits = model(input_ids=ids[:1, : t + 1], use_cache=False, logits_to_keep=1).logits[0, -1]
    log_p = logits.log_softmax(-1)
    for y in torch.multinomial(log_p.exp(), num_samples, replacement=True):
        torch.autograd.grad(log_p[y], leaf.stream, retain_graph=True)


def _cached(model: GPT2LMHeadModel, ids: Tensor, t: int, layer: int, num_samples: int) -> None:
    """Scores at one position: keys and values of its context cached once a sequence, S copies of its token as a batch."""
    cache = _CACHES.get(id(ids))
    if cache is None:
        with torch.no_grad():
            cache = _CACHES[id(ids)] = model(input_ids=ids[:1], use_cache=True).past_key_values
    own = DynamicCache()
    for i, kept in enumerate(cache.layers):
        own.update(
            kept.keys[:, :, :t].expand(num_samples, -1, -1, -1),
            kept.values[:, :, :t].expand(num_samples, -1, -1, -1),
            i,
        )
    with _Leaf(model, layer) as leaf:
        at = torch.full((num_samples, 1), t, device=ids.device)
        logits = model(
            input_ids=ids[:1, t : t + 1].expand(num_samples, -1), position_ids=at, past_key_values=own, use_cache=True
        ).logits[:, -1]
    log_p = logits.log_softmax(-1)
    drawn = torch.multinomial(log_p[0].exp(), num_samples, replacement=True)
    torch.autograd.grad(log_p.gather(1, drawn[:, None]).sum(), leaf.stream)


_CACHES: dict[int, DynamicCache] = {}


def _reference_exact(model: GPT2LMHeadModel, ids: Tensor, t: int, layer: int) -> Tensor:
    """The exact matrix at one position as the published toolkit computes it, from its description."""
    with _Leaf(model, layer) as leaf:
        z = model.transformer(input_ids=ids[:1, : t + 1], use_cache=False).last_hidden_state[0, -1]
    rows = [torch.autograd.grad(z[i], leaf.stream, retain_graph=True)[0][0, -1] for i in range(len(z))]
    weight = model.lm_head.weight
    p = (weight @ z.detach()).softmax(-1)
    jacobian = weight @ torch.stack(rows)
    scores = jacobian - p @ jacobian
    return scores.T @ (p[:, None] * scores)


def _timed(case: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    case()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
