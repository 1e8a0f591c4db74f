"""What a step that raises one token's log-probability changes besides, by the metric that chose its direction.

    python benchmarks/steering.py --model demo/model --corpus demo/corpus.jsonl

The target is the second likeliest token, the gain 0.1 nat, found on the model itself, and the positions are of documents that
the mean F has not seen. Compared is the KL over the other tokens, renormalised, of steps by F at each position, by the corpus's
mean F, and along the plain gradient.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from itertools import islice

import torch
from transformers import logging as transformers_logging

from fisher_ray import SplitModel, open_run
from fisher_ray.corpus import Layout, find_ranges, find_sources, read_documents
from fisher_ray.directions import DAMPING, Steering, steer
from fisher_ray.dispatch import LocalPool
from fisher_ray.driver import run as compute
from fisher_ray.plan import RunConfig

FORMS = ("euclidean", "mean", "position")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--corpus", default="demo/corpus.jsonl")
    parser.add_argument("--layers", default="1,3,5")
    parser.add_argument("--documents", type=int, default=40, help="that the mean F is of")
    parser.add_argument("--positions", type=int, default=600, help="that steps are taken at, 30 a document")
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
        compute(config, LocalPool, lambda plan: nullcontext(lambda progress: None))
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
    kl = {key: torch.cat([each.kl_others for each in some]) for key, some in found.items()}
    length = {key: torch.cat([each.steps for each in some]).norm(dim=1) for key, some in found.items()}
    print(f"{args.model}: gain {args.gain} nat, damping {DAMPING:g}, {len(kl[layers[0], 'mean'])} positions a layer\n")
    print("layer  metric       median KL    mean KL  smaller than Euclidean: median  mean  median |v|  not reached")
    for layer in layers:
        both = torch.stack([kl[layer, form] for form in FORMS]).isfinite().all(0)
        plain = kl[layer, "euclidean"][both]
        for form in FORMS:
            each = kl[layer, form]
            mine = each[both]
            ratios = f"{float((plain / mine).median()):22.2f}  {float(plain.mean() / mine.mean()):12.2f}"
            size = float(length[layer, form][both].median())
            print(
                f"{layer:5d}  {form:10s}  {float(mine.median()):10.2e} {float(mine.mean()):10.2e}  {ratios}"
                f"  {size:10.3g}  {int(each.isnan().sum()):11d}"
            )


if __name__ == "__main__":
    main()
