"""What the choice of precision and estimator costs in error, and how often rounding flips a drawn token.

    python benchmarks/precision.py --model demo/model --corpus demo/corpus.jsonl

Errors are relative Frobenius errors of each position's F against float64 and the exact estimator, over all layers.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import logging as transformers_logging

from fisher_ray import Exact, Sampled, Scores, SplitModel, score_factors
from fisher_ray.corpus import Layout, find_ranges, find_sources, read_documents
from fisher_ray.draws import Draws, sequence_key
from fisher_ray.estimators import tempered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--corpus", default="demo/corpus.jsonl")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--draws", type=int, default=10_000_000)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    reference = SplitModel.from_pretrained(args.model, dtype="float64")
    sequences = read_sequences(reference, args.corpus)
    truth = scored(reference, sequences[: args.documents], Exact())
    print(f"{args.model}: {len(truth)} positions, {len(truth.factors)} layers\n")
    print("relative error of F        median      99 %       worst     of the mean F (worst layer)")
    cases = {f"exact, {dtype}": (dtype, Exact()) for dtype in ("float32", "bfloat16", "float16")}
    cases |= {f"sampled({n}), float32": ("float32", Sampled(n)) for n in (1, 8, 64)}
    for name, (dtype, estimator) in cases.items():
        model = SplitModel.from_pretrained(args.model, dtype=dtype)
        found = errors(scored(model, sequences[: args.documents], estimator), truth)
        print(f"{name:22s} " + "  ".join(f"{value:10.2g}" for value in found.values()))

    model = SplitModel.from_pretrained(args.model)
    flips = total = 0
    longest = max(map(len, sequences))
    for sequence in sequences:
        if total >= args.draws:
            break
        alone, padded = _final_states(model, sequence, 0), _final_states(model, sequence, longest - len(sequence))
        n = len(sequence)
        key = torch.tensor([sequence_key(0, "rounding")]).expand(n, -1)
        draws = Draws(key, torch.arange(n), torch.zeros(n, dtype=torch.long), "score")
        tokens = [draws.tokens(tempered(model.head.predict(z), 1.0, 1.0)[0], 1000) for z in (alone, padded)]
        flips += int((tokens[0] != tokens[1]).sum())
        total += tokens[0].numel()
    print(f"\ndrawn tokens that another batch and its padding changed: {flips} of {total:,}")


def read_sequences(model: SplitModel, corpus: str) -> list[list[int]]:
    """Token ids of a corpus's first documents, each with a BOS token before it and cut at 256."""
    source = next(find_ranges(find_sources([corpus]), Layout(), 1 << 30))
    texts = [document.content for document in read_documents(source, Layout()) if isinstance(document.content, str)]
    longest = min(model.max_positions or 256, 256)
    return [[model.tokenizer.bos_token_id, *model.tokenizer(text)["input_ids"]][:longest] for text in texts]


def scored(model: SplitModel, sequences: list[list[int]], estimator: Exact | Sampled) -> Scores:
    """Every position at every layer."""
    ids, mask = _padded(sequences)
    layers = list(range(model.num_layers + 1))
    return score_factors(model, ids, layers=layers, estimator=estimator, attention_mask=mask)


def errors(got: Scores, truth: Scores) -> dict[str, float]:
    """Relative Frobenius errors of each position's F over all layers, and of the mean F at the worst layer."""
    each, of_mean = [], []
    for layer in truth.factors:
        matrices, expected = got.matrices(layer).to("cpu", torch.float64), truth.matrices(layer).cpu()
        each.append((matrices - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2)))
        mean = expected.mean(0)
        of_mean.append(float((matrices.mean(0) - mean).norm() / mean.norm()))
    all_layers = torch.cat(each)
    quantiles = {"median": 0.5, "99 %": 0.99, "worst": 1.0}
    return {name: float(all_layers.quantile(q)) for name, q in quantiles.items()} | {"of the mean F": max(of_mean)}


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])


def _final_states(model: SplitModel, sequence: list[int], padding: int) -> Tensor:
    """Final hidden states of a sequence, alone or padded in a batch of three."""
    row = torch.tensor([sequence + [0] * padding])
    if padding:
        row = torch.cat([row, row.flip(1), row.roll(7, 1)])
    return model.record(row, {})[1][0, : len(sequence)]


if __name__ == "__main__":
    main()
