"""What the estimators' error is, as a function of backward passes, flop and seconds; and what their cotangents cost.

    python benchmarks/estimators.py --model demo/model --corpus demo/corpus.jsonl
    python benchmarks/estimators.py --size

The first compares with exact scores in float64, at ``--layers``, over documents spread over the corpus. Decided before
anything was measured: the error of a position is ``|F' - F| / |F|``, Frobenius; its mean and its median are over positions
(heavy tails make the mean, most positions the median), by terciles of the entropy of p, and averaged over ``--seeds``. The
error of the mean F of all positions is the root of its mean square over seeds. Seconds are of float32, all layers asked for
in one pass, everything in turn, the median of ``--repeats``.

The second times a model of GPT-2's size (``GPT2Config()``, random weights) at layer 6: what cotangents cost beside backward
passes, and exact scores to a tolerance. Random weights give a flat p. So that p is as uneven as a trained model's, logits
are also made larger, which the entropy that is printed shows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import logging as transformers_logging

from fisher_ray import Deflated, Exact, Sampled, Scores, SplitModel, score_factors
from fisher_ray.corpus import Layout, find_ranges, find_sources, read_documents
from fisher_ray.cost import Cost, outline
from fisher_ray.draws import Draws, sequence_key
from fisher_ray.estimators import Estimator

ESTIMATORS: list[Estimator] = [
    Sampled(8), Sampled(16), Sampled(64), Sampled(256), Sampled(1024),
    Deflated(0, 64), Deflated(4, 0), Deflated(16, 0), Deflated(64, 0),
    Deflated(4, 4), Deflated(6, 2), Deflated(12, 4), Deflated(24, 8),
    Deflated(32, 32), Deflated(40, 24), Deflated(48, 16), Deflated(56, 8),
    Exact(0.1), Exact(1e-2), Exact(1e-3), Exact(),
]  # fmt: skip
SAMPLED, DEFLATED, LOWER = Sampled(64), Deflated(48, 16), Deflated(4, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--corpus", default="demo/corpus.jsonl")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", action="store_true", help="time a model of GPT-2's size")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.size:
        for gain in (1.0, 7.0):
            _at_size(gain, args.repeats)
        return

    reference = SplitModel.from_pretrained(args.model, dtype="float64")
    model = SplitModel.from_pretrained(args.model)
    ids, mask = _documents(reference, args.corpus, args.documents)

    def scored(split: SplitModel, estimator: Estimator, seed: int = 0) -> Scores:
        return score_factors(split, ids, layers=args.layers, estimator=estimator, attention_mask=mask, seed=seed)

    exact = scored(reference, Exact())
    truth = {layer: exact.matrices(layer) for layer in args.layers}
    seconds = _in_turn({str(e): lambda e=e: scored(model, e) for e in ESTIMATORS}, args.repeats)  # type: ignore[misc]
    order = exact.entropy.argsort()
    terciles = [part.sort().values for part in order.tensor_split(3)]
    shapes = outline(args.model)
    bounds = [float(exact.entropy[order[len(order) * i // 3]]) for i in (1, 2)]
    print(f"{args.model}: {len(exact)} positions, terciles of the entropy at {bounds[0]:.2g} and {bounds[1]:.2g} nats")
    print(f"\n{'':30}passes      flop  us/position  captured", end="")
    print("  layer   error: mean and median, and of the terciles".ljust(75) + "of the mean F")
    found: dict[tuple[str, int], tuple[float, float, float]] = {}
    for estimator in ESTIMATORS:
        drawn = isinstance(estimator, Sampled) or (isinstance(estimator, Deflated) and estimator.num_samples > 0)
        errors: dict[int, list[Tensor]] = {layer: [] for layer in args.layers}
        squared = dict.fromkeys(args.layers, 0.0)
        seeds = range(args.seeds if drawn else 1)
        for seed in seeds:
            scores = scored(model, estimator, seed)
            for layer, expected in truth.items():
                matrices, mean = scores.matrices(layer).double(), expected.mean(0)
                errors[layer].append((matrices - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2)))
                squared[layer] += float((matrices.mean(0) - mean).norm() / mean.norm()) ** 2 / len(seeds)
        passes = float((scores.factors[args.layers[0]] != 0).any(-1).sum(-1).double().mean())
        flop = Cost(shapes, tuple(args.layers), estimator, max_seq_len=ids.shape[1]).flop_per_token
        taken = seconds[str(estimator)] / len(exact) * 1e6
        said = f"{_short(estimator):28} {passes:7.1f}  {flop:.2e}  {taken:11.0f}  {float(scores.captured_share.mean()):8.3f}"
        for layer in args.layers:
            each = torch.stack(errors[layer])
            parts = [
                (float(e.mean()), float(e.median(1).values.mean())) for e in (each, *(each[:, t] for t in terciles))
            ]
            found[str(estimator), layer] = (*parts[0], squared[layer] ** 0.5)
            told = "  ".join(f"{m:.2g} {h:.2g}".ljust(15) for m, h in parts)
            print(f"{said}  {layer:5}   {told}{squared[layer] ** 0.5:.2g}", flush=True)
    print()
    slow = seconds[str(DEFLATED)]
    equal = max(
        (e for e in ESTIMATORS if isinstance(e, Sampled) and seconds[str(e)] <= slow), key=lambda e: e.num_samples
    )
    longer = min(
        (e for e in ESTIMATORS if isinstance(e, Sampled) and seconds[str(e)] >= slow),
        key=lambda e: e.num_samples,
        default=equal,
    )
    for layer in args.layers:
        for worse, better in ((SAMPLED, DEFLATED), (longer, DEFLATED), (SAMPLED, LOWER)):
            pairs = zip(found[str(worse), layer], found[str(better), layer], strict=True)
            mean_ratio, median_ratio, of_mean = (one / other for one, other in pairs)
            longer_by = seconds[str(worse)] / seconds[str(better)]
            print(
                f"layer {layer}: {_short(worse)} has {mean_ratio:.3g} times the mean error of {_short(better)}, "
                f"{median_ratio:.3g} times its median and {of_mean:.3g} times that of the mean F, in {longer_by:.2g} times "
                "the time"
            )


def _short(estimator: Estimator) -> str:
    """Without what has its default."""
    return str(estimator).replace(", top_p=1.0, temperature=1.0", "").replace("num_", "").replace("tolerance=", "")


def _documents(model: SplitModel, corpus: str, count: int) -> tuple[Tensor, Tensor]:
    """Documents spread over the corpus, as padded tokens and their mask."""
    longest = min(model.max_positions or 256, 256)
    source = next(find_ranges(find_sources([corpus]), Layout(), 1 << 30))
    texts = [document.content for document in read_documents(source, Layout()) if isinstance(document.content, str)]
    tokenizer = model.tokenizer
    chosen = texts[:: max(1, len(texts) // count)][:count]
    rows = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]][:longest] for text in chosen]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def _at_size(gain: float, repeats: int) -> None:
    torch.manual_seed(0)
    layer, positions, few = 6, 128, 6
    model = GPT2LMHeadModel(GPT2Config(tie_word_embeddings=True)).eval().requires_grad_(False)
    model.transformer.ln_f.weight.mul_(gain)
    split = SplitModel(model, check=False)
    ids = torch.randint(50257, (1, positions))
    at = torch.arange(positions)
    z = split.record(ids, {})[1][0]
    key = torch.tensor([sequence_key(0, 0)]).expand(positions, -1)
    entropy = float(split.head.predict(z).entropy.median())

    def cotangents(estimator: Estimator) -> Callable[[], object]:
        return lambda: estimator.cotangents(split.head.predict(z), Draws(key, at, torch.zeros_like(at), "score"))

    def passes(count: int) -> Callable[[], object]:
        return lambda: score_factors(split, ids, layers=[layer], estimator=Sampled(count))

    given: list[Estimator] = [
        Sampled(1),
        Sampled(64),
        Deflated(4, 0),
        Deflated(24, 8),
        Deflated(48, 16),
        Deflated(64, 0),
    ]
    taken = _in_turn(
        {
            "1": passes(1),
            "9": passes(9),
            **{str(e): cotangents(e) for e in given},
            "logits": lambda: split.head.predict(z),
        },
        repeats,
    )
    one_pass = (taken["9"] - taken["1"]) / 8 / positions
    print(f"\nGPT-2's size, layer {layer}, logits times {gain:g}: median entropy {entropy:.2g} nats")
    print(f"{'one backward pass':40} {1e3 * one_pass:8.2f} ms a position")
    print(f"{'logits and p':40} {1e3 * taken['logits'] / positions:8.2f} ms")
    for estimator in given:
        own = (taken[str(estimator)] - taken["logits"]) / positions
        count = estimator.num_factors(split.head.vocab_size, split.head.d_z)
        print(
            f"cotangents, {_short(estimator):28} {1e3 * own:8.2f} ms, {own / one_pass / count:.0%} of its {count} passes"
        )
    chosen = at[positions // few - 1 :: positions // few].tolist()[:few]
    tolerances = (0.0, 1e-3, 1e-2, 1e-1)
    scores: dict[float, Scores] = {}

    def exact(tolerance: float) -> Callable[[], object]:
        def run() -> None:
            scores[tolerance] = score_factors(
                split, ids, layers=[layer], estimator=Exact(tolerance), positions=chosen, memory_budget=8 << 30
            )

        return run

    taken = _in_turn({str(tolerance): exact(tolerance) for tolerance in tolerances}, 1)
    for tolerance in tolerances:
        ranks = (scores[tolerance].factors[layer] != 0).any(-1).sum(-1)
        print(
            f"exact, tolerance {tolerance:<6g} {few / taken[str(tolerance)]:8.3f} positions/s, "
            f"{taken['0.0'] / taken[str(tolerance)]:5.2f} times as fast as without, ranks {sorted(ranks.tolist())}"
        )


def _in_turn(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in rounds in which every one has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


if __name__ == "__main__":
    main()
