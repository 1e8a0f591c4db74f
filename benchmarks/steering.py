"""What a step that raises one token's log-probability changes besides, by the metric that chose its direction.

    python benchmarks/steering.py --model demo/model --corpus demo/corpus.jsonl

The target is the second likeliest token, the gain 0.1 nat, found on the model itself, and the positions are of documents that
the mean F has not seen. Compared is the KL over the other tokens, renormalised, of steps by F at each position, by the corpus's
mean F, and along the plain gradient.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice

import torch
from transformers import logging as transformers_logging

from fisher_ray import SplitModel, open_run
from fisher_ray.corpus import Layout, find_ranges, find_sources, read_documents
from fisher_ray.directions import DAMPING, Steering, steer
from fisher_ray.driver import run as compute
from fisher_ray.plan import RunConfig
from fisher_ray.statistics import jackknife

FORMS = ("euclidean", "mean", "position")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--corpus", default="demo/corpus.jsonl")
    parser.add_argument("--layers", default="1,3,5")
    parser.add_argument("--documents", type=int, default=400, help="that the mean F is of")
    parser.add_argument("--positions", type=int, default=1500, help="that steps are taken at, 30 a document")
    parser.add_argument("--gain", type=float, default=0.1, help="nats")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    model = SplitModel.from_pretrained(args.model)
    source = next(find_ranges(find_sources([args.corpus]), Layout(), 1 << 30))
    unseen = islice(read_documents(source, Layout()), args.documents, None)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model=args.model,
            corpus=(args.corpus,),
            output=f"{folder}/run",
            layers=args.layers,
            estimator="exact",
            max_docs=args.documents,
            executor="local",
        )
        compute(config)
        run = open_run(f"{folder}/run")
        found: dict[tuple[int, str], list[Steering]] = {(layer, form): [] for layer in run.layers for form in FORMS}
        left = args.positions
        for document in unseen:
            if left <= 0:
                break
            ids = torch.tensor([[model.tokenizer.bos_token_id, *model.tokenizer(document.content)["input_ids"]]])
            ids = ids[:, : model.max_positions or 256]
            at = torch.linspace(1, ids.shape[1] - 1, min(30, left)).long().unique()
            left -= len(at)
            targets = model.head.predict(model.states(ids, {})[0, at]).logits.topk(2).indices[:, 1]
            for layer, form in found:
                found[layer, form].append(steer(model, run, layer, ids, at, targets, form, args.gain))
        _show(args, run.layers, found)


def _show(args: argparse.Namespace, layers: list[int], found: dict[tuple[int, str], list[Steering]]) -> None:
    """A line a layer and form; the ratio of the means with its standard error over documents."""
    count = sum(len(each.kl_others) for each in found[layers[0], "mean"])
    print(
        f"{args.model}: mean F of {args.documents} documents, gain {args.gain} nat, damping {DAMPING:g}, {count} positions of "
        f"{len(found[layers[0], 'mean'])} others\n"
    )
    print(
        "layer  metric       median KL    mean KL  smaller than Euclidean: median        mean  median |v|  not reached"
    )
    for layer in layers:
        by_document = [torch.stack(each) for each in zip(*(_kl(found[layer, form]) for form in FORMS), strict=True)]
        some = [kl[:, kl.isfinite().all(0)] for kl in by_document]  # [form, position]
        plain, *_ = together = torch.cat(some, 1)
        sums = torch.stack([kl.sum(1) for kl in some])  # [document, form]
        without = sums.sum(0) - sums
        for i, form in enumerate(FORMS):
            mine = together[i]
            ratio = jackknife(plain.sum() / mine.sum(), without[:, 0] / without[:, i])
            size = torch.cat([each.steps for each in found[layer, form]]).norm(dim=1).median()
            missed = sum(int(each.kl_others.isnan().sum()) for each in found[layer, form])
            print(
                f"{layer:5d}  {form:10s}  {float(mine.median()):10.2e} {float(mine.mean()):10.2e}  "
                f"{float((plain / mine).median()):22.2f}  {float(ratio.value):5.3g} ± {float(ratio.error):.2g}"
                f"  {float(size):10.3g}  {missed:11d}"
            )


def _kl(steerings: list[Steering]) -> list[torch.Tensor]:
    return [each.kl_others for each in steerings]


if __name__ == "__main__":
    main()
