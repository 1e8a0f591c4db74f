"""How often 95 % intervals hold the truth: corpora of 256 documents in 32 blocks, drawn again and again from one population.

    python benchmarks/coverage.py --documents 1000 --layers 3,6 --num-samples 4 --every 4

The population is so many documents of the demo's grammar, with a seed that nothing else uses; sums of exact F over every n-th
position of each are computed once by the demo model, and the truth is what the whole population gives. A corpus is 256 of
them, drawn with replacement, with exact F or with sampled scores. Eigenvalues count where the population's stand apart: more
than three of the mean standard errors from both neighbours. A share of 500 is known to one percent.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import logging as transformers_logging

from fisher_ray import Exact, Sampled, SplitModel, iter_scores
from fisher_ray.estimators import Estimator
from fisher_ray.statistics import Blocks, spectrum
from fisher_ray.sums import ALL, GroupSums, Sums

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))

import make_corpus  # noqa: E402  it is no package

# A document that is drawn twice has other samples, mostly: the same ones would look like no noise.
DRAWS = 8
DRAWN, BLOCKS, TOP = 256, 32, 6
CORRECTED = ("participation_ratio", "entropy_rank")
READ = ("trace", "participation_ratio", "entropy_rank", "anisotropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000)
    parser.add_argument("--num-samples", type=int, help="sampled scores a position (exact F)")
    parser.add_argument("--every", type=int, default=1, help="score every n-th position")
    parser.add_argument("--layers", default="3,6")
    parser.add_argument("--repetitions", type=int, default=500)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    layers = [int(layer) for layer in args.layers.split(",")]
    model = SplitModel.from_pretrained(DEMO / "model")
    population = sums_of_documents(model, args.documents, layers, Exact(), args.every)
    drawn_from, scored = population, "exact F"
    if args.num_samples is not None:
        sampled = Sampled(args.num_samples)
        drawn_from = sums_of_documents(model, args.documents, layers, sampled, args.every, DRAWS)
        scored = f"{args.num_samples} sampled scores"
    print(
        f"{args.documents:,} documents, {sum(s.count for s in population[layers[0]]):,} positions; "
        f"{args.repetitions:,} corpora of {DRAWN} documents in {BLOCKS} blocks, {scored} at each of them"
    )
    for layer in layers:
        for whitened in (False, True):
            report(layer, whitened, *covered(population[layer], drawn_from[layer], args.repetitions, whitened))


def sums_of_documents(
    model: SplitModel, count: int, layers: list[int], estimator: Estimator, every: int, draws: int = 1
) -> dict[int, list[GroupSums]]:
    """Per layer, each document's sums of F and of h, as often as it is drawn anew."""
    found: dict[int, list[GroupSums]] = {layer: [] for layer in layers}
    documents = list(itertools.islice(make_corpus.documents(987_654_321), count))
    for seed, document in itertools.product(range(draws), documents):
        ids = [model.tokenizer.bos_token_id, *model.tokenizer(document["text"])["input_ids"]][: model.max_positions]
        sums = Sums(layers, model.d_model)
        at = list(range(1, len(ids), every))
        for scores in iter_scores(
            model, torch.tensor([ids]), layers=layers, estimator=estimator, positions=at, seed=seed
        ):
            for layer in layers:
                sums.add(layer, scores.factors[layer], scores.activations[layer])
        for layer in layers:
            found[layer].append(sums.packed(layer).groups[ALL])
    return found


def covered(
    population: list[GroupSums], documents: list[GroupSums], repetitions: int, whitened: bool
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The truth of each quantity, whether each corpus's interval held it, and the intervals' half widths."""
    random = np.random.default_rng(0)
    truth = quantities(Blocks([merged(population)]), whitened)
    held: dict[str, list[bool]] = {name: [] for name in truth}
    widths: dict[str, list[float]] = {name: [] for name in truth}
    for _ in range(repetitions):
        drawn = random.integers(len(documents), size=(BLOCKS, DRAWN // BLOCKS))
        got = quantities(Blocks([merged([documents[i] for i in block]) for block in drawn]), whitened)
        for name, (low, high) in got.items():
            middle = truth[name][0]
            held[name].append(bool(low <= middle <= high))
            widths[name].append((high - low) / 2)
    return (
        {name: low for name, (low, _) in truth.items()},
        {name: np.array(each) for name, each in held.items()},
        {name: np.array(each) for name, each in widths.items()},
    )


def merged(documents: list[GroupSums]) -> GroupSums:
    total = GroupSums(**vars(documents[0]))
    for document in documents[1:]:
        total.add(document)
    return total


def quantities(blocks: Blocks, whitened: bool) -> dict[str, tuple[float, float]]:
    """95 % intervals by name; of one block both ends are the value."""
    got = spectrum(blocks, whitened)
    estimates = {name: getattr(got, name) for name in READ}
    found = {}
    for name, estimate in estimates.items():
        low, high = (estimate.value, estimate.value) if len(blocks) < 2 else estimate.interval()
        found[name] = (float(low), float(high))
        if name in CORRECTED:
            found[f"{name}, as it is"] = (float(low + estimate.bias), float(high + estimate.bias))
    values = got.eigenvalues
    low, high = (values.value, values.value) if len(blocks) < 2 else values.interval()
    return found | {f"eigenvalue {i + 1}": (float(low[i]), float(high[i])) for i in range(TOP)}


def report(
    layer: int, whitened: bool, truth: dict[str, float], held: dict[str, np.ndarray], widths: dict[str, np.ndarray]
) -> None:
    print(f"\nlayer {layer}{', whitened' if whitened else ''}")
    values = [truth[f"eigenvalue {i + 1}"] for i in range(TOP)]
    for name, value in truth.items():
        note = ""
        if name.startswith("eigenvalue"):
            i = int(name.split()[1]) - 1
            error = widths[name].mean() / 2.04  # Student's quantile of 31 degrees of freedom
            gaps = [abs(value - values[j]) for j in (i - 1, i + 1) if 0 <= j < TOP]
            apart = i + 1 < TOP and min(gaps) > 3 * error
            note = "" if apart else "   not apart"
        print(
            f"  {name:28s} {value:10.4g}   held in {held[name].mean():6.1%}   ± {widths[name].mean() / value:6.1%}{note}"
        )


if __name__ == "__main__":
    main()
