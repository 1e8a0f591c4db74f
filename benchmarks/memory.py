"""What scoring takes in memory, against what the plan says it takes, at the shapes of large models with few of their blocks.

    python benchmarks/memory.py
    python benchmarks/memory.py --cases long    # one sequence of 1,024 to 8,192 tokens

Each case is a process of its own that does what a worker does with one micro-batch: scores, sums, statistics. Measured is the
highest resident memory of that process, twice: with the C library told to give back what is freed, and as it is, keeping some
of it. Planned is :meth:`fisher_ray.cost.Cost.memory`, which reads a configuration and computes nothing. Weights are random.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peers import highest_memory, in_own_process
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig
from transformers import logging as transformers_logging
from transformers.initialization import no_init_weights

from fisher_ray import Deflated, Exact, Sampled, SplitModel
from fisher_ray.cost import Cost, outline
from fisher_ray.estimators import Estimator
from fisher_ray.scores import iter_scores
from fisher_ray.sums import MATRICES, Sums
from fisher_ray.worker import statistics

_ONE = Sampled(1)
_BUDGET = 1 << 50  # one micro-batch, the graph of all blocks at once

# Shapes of Llama 3: 8B and 70B; blocks are alike, and a few of them do.
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
# A small model, and long sequences.
_LONG = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}


def _llama(sizes: dict[str, int], blocks: int, vocab_size: int = 128_256) -> PretrainedConfig:
    return LlamaConfig(**sizes, num_hidden_layers=blocks, vocab_size=vocab_size, max_position_embeddings=8192)


@dataclass(frozen=True)
class Case:
    """One micro-batch: ``batch`` windows of ``seq_len`` tokens, the layers from ``lowest`` up."""

    config: PretrainedConfig
    batch: int
    seq_len: int
    estimator: Estimator = _ONE
    lowest: int = 0
    dtype: str = "float32"
    sketch: int | None = None


def cases() -> Iterator[tuple[str, str, Case]]:
    """(group, name, case)."""
    gpt2 = GPT2Config()
    yield "gpt2", "GPT-2 small, S=8", Case(gpt2, 4, 128, Sampled(8))
    yield "gpt2", "GPT-2 small, S=1", Case(gpt2, 8, 256)
    yield "gpt2", "GPT-2 small, layers 6 up, S=8", Case(gpt2, 4, 512, Sampled(8), lowest=6)
    yield "gpt2", "GPT-2 small, deflated 24 + 8", Case(gpt2, 2, 128, Deflated(24, 8), lowest=6)
    yield "gpt2", "GPT-2 small, exact, layers 10 up", Case(gpt2, 1, 64, Exact(), lowest=10)
    for seq_len in (1024, 2048, 4096, 8192):
        yield "long", "512 wide, 4 blocks", Case(_llama(_LONG, 4, 1024), 1, seq_len)
    for seq_len in (2048, 4096, 8192):
        window = MistralConfig(
            **_LONG, num_hidden_layers=4, vocab_size=1024, sliding_window=1024, max_position_embeddings=8192
        )
        yield "long", "the same, windows of 1,024", Case(window, 1, seq_len)
    yield "8b", "8B, 2 of 32 blocks, bfloat16", Case(_llama(_8B, 2), 4, 512, dtype="bfloat16")
    yield "8b", "8B, 4 of 32 blocks, bfloat16, --sketch 256", Case(_llama(_8B, 4), 2, 512, dtype="bfloat16", sketch=256)
    yield (
        "70b",
        "70B, 1 of 80 blocks, bfloat16, --sketch 512",
        Case(_llama(_70B, 1), 2, 256, dtype="bfloat16", sketch=512),
    )
    yield "70b", "70B, 1 of 80 blocks, bfloat16", Case(_llama(_70B, 1), 2, 256, dtype="bfloat16")


def planned(case: Case) -> int:
    """Bytes, from the configuration alone."""
    with tempfile.TemporaryDirectory() as folder:
        case.config.save_pretrained(folder)
        cost = Cost(
            outline(folder, dtype=case.dtype),
            tuple(_layers(case)),
            case.estimator,
            max_seq_len=case.seq_len,
            batch_tokens=case.batch * case.seq_len,
            sketch=case.sketch,
        )
        return cost.memory(case.batch * case.seq_len, _BUDGET)


def measured(case: Case, device: str = "cpu") -> int:
    """Bytes that this process, or the GPU's allocator, held at most."""
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(case.config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    numbers = 0.02 * torch.randn(
        1 << 20, device=device, dtype=dtype
    )  # the same ones over and over: to draw 3e9 takes minutes
    for parameter in model.parameters():
        for some in parameter.data.view(-1).split(len(numbers)):
            some.copy_(numbers[: len(some)])
    split = SplitModel(model, check=False)
    ids = torch.randint(split.head.vocab_size, (case.batch, case.seq_len), device=device)

    sums = Sums(_layers(case), split.d_model, device=device, sketch=case.sketch)

    def score(ids: Any) -> None:
        for scores in iter_scores(split, ids, layers=_layers(case), estimator=case.estimator, memory_budget=_BUDGET):
            for layer in _layers(case):
                sums.add(layer, scores.factors[layer], scores.activations[layer])
                statistics(scores.factors[layer])

    score(ids[:1, :4])  # whatever is set up once
    if (
        case.sketch is None
    ):  # their lower triangles, which nothing writes, and which a CPU holds no memory for until then
        for sums_of in sums._sums.values():
            for name in MATRICES:
                getattr(sums_of, name)._total += 0.0
    return highest_memory(lambda: score(ids), torch.device(device))[0]


def _layers(case: Case) -> list[int]:
    text = case.config.get_text_config(decoder=True)
    return list(range(case.lowest, text.num_hidden_layers + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=("gpt2", "long", "8b", "70b"))
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    print(
        f"MiB; planned over measured in brackets\n{'':46s} {'tokens':>9s} {'planned':>8s} {'measured':>16s} {'as it is':>16s}"
    )
    for group, name, case in cases():
        if args.cases is None or group in args.cases:
            expected = planned(case)
            line = f"{name:46s} {f'{case.batch} x {case.seq_len}':>9s} {expected / 2**20:8.0f}"
            for threshold in ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, {}):  # read when a process starts
                os.environ.update(threshold)
                taken = in_own_process(measured, torch.device("cpu"), case)
                for variable in threshold:
                    del os.environ[variable]
                line += f" {taken / 2**20:9.0f} ({expected / taken:.2f})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
