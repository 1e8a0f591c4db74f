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
    longest = min(reference.max_positions or 256, 256)
    source = next(find_ranges(find_sources([args.corpus]), Layout(), 1 << 30))
    texts = [document.content for document in read_documents(source, Layout()) if isinstance(document.content, str)]
    sequences = [
        [reference.tokenizer.bos_token_id, *reference.tokenizer(text)["input_ids"]][:longest] for text in texts
    ]
    ids, mask = _padded(sequences[: args.documents])
    everything = list(range(reference.num_layers + 1))

    def scored(model: SplitModel, estimator: Exact | Sampled) -> Scores:
        return score_factors(model, ids, layers=everything, estimator=estimator, attention_mask=mask)

    truth = {layer: scored(reference, Exact()).matrices(layer) for layer in everything}
    print(f"{args.model}: {len(truth[0])} positions, {len(everything)} layers\n")
    print("relative error of F        median      99 %       worst     of the mean F (worst layer)")
    cases = {f"exact, {dtype}": (dtype, Exact()) for dtype in ("float32", "bfloat16", "float16")}
    cases |= {f"sampled({n}), float32": ("float32", Sampled(n)) for n in (1, 8, 64)}
    for name, (dtype, estimator) in cases.items():
        got = scored(SplitModel.from_pretrained(args.model, dtype=dtype), estimator)
        errors, of_mean = [], []
        for layer in everything:
            matrices = got.matrices(layer).double()
            errors.append((matrices - truth[layer]).norm(dim=(1, 2)) / truth[layer].norm(dim=(1, 2)))
            mean = truth[layer].mean(0)
            of_mean.append(float((matrices.mean(0) - mean).norm() / mean.norm()))
        each = torch.cat(errors)
        quantiles = (float(each.quantile(q)) for q in (0.5, 0.99, 1.0))
        print(f"{name:22s} " + "  ".join(f"{q:10.2g}" for q in quantiles) + f"  {max(of_mean):10.2g}")

    model = SplitModel.from_pretrained(args.model)
    flips = total = 0
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
