"""Trains the demo model: a byte-level BPE tokenizer and a 0.8M-parameter GPT-2 on text from `make_corpus`.

The training text is generated on the fly from a seed of its own, so no training file is kept, and no document of the
evaluation corpus (seed 0, the one `make_corpus.py` writes) is seen in training. `AutoTokenizer` and
`AutoModelForCausalLM` both load the output folder.

Reproducible: all randomness is seeded, the thread count is fixed and deterministic kernels are asked for, so the same
machine type, library versions and `--steps` give the same bits. Another processor or another build of the libraries may
sum in another order; expect the same losses to about two digits there, not the same bits.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from make_corpus import PLACE, THING, corpus, with_s
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EVALUATION_SEED, TRAINING_SEED = 0, 1
EVALUATION_BYTES, TRAINING_BYTES = 255_000, 12_000_000
END = "<|endoftext|>"
VOCABULARY, WINDOW, BATCH = 1024, 256, 8
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 200, 0.05
THREADS = 2

# What the model must work out, as patterns over the evaluation text: group 1 must be its most likely continuation.
CLOZES = {
    "sum or difference": r"“It is (\d+)[.,]",
    "product": r"coins each: \d x \d = (\d+)",
    "balance": r"\d+ - \d+ = (\d+)\n",
    "closing quote": r"[.?,](”)",
    "who did it": r"Question: Who .*\nAnswer: (\w+)",
    "answer recalled": r"\nAnswer: (?:She|He) (.*)\.",
    "last owner": r"In the end, .* and (?:\w+) had (.*?)\.",
}


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level, so any text survives a round trip; digits are kept apart, so that sums can be learned by column."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Rows of `WINDOW` tokens, each opening with a whole document; what overflows a row is dropped.

    The usual seamless packing would start rows in mid-document, and so teach that `END` may be followed by anything.
    """
    rows, row = [], []
    for ids in tokenizer(texts, truncation=True)["input_ids"]:
        row += [tokenizer.bos_token_id, *ids]
        if len(row) >= WINDOW:
            rows.append(row[:WINDOW])
            row = []
    return torch.tensor(rows)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> float:
    """Mean cross-entropy in nats per predicted token."""
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in rows.split(BATCH)]
    return sum(losses) / len(rows)


def train(rows: torch.Tensor, held_out: torch.Tensor, steps: int) -> GPT2LMHeadModel:
    torch.manual_seed(TRAINING_SEED)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=96, n_layer=6, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=True,
            activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's own, in one kernel
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    order = torch.Generator().manual_seed(TRAINING_SEED)
    queue: list[torch.Tensor] = []
    started = time.monotonic()
    for step in range(steps):
        if not queue:
            queue = [b for b in torch.randperm(len(rows), generator=order).split(BATCH) if len(b) == BATCH]
        batch = rows[queue.pop()]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            held = held_out_loss(model, held_out)
            print(f"step {step + 1:5d}  training {loss.item():.3f}  held-out {held:.4f}  {seconds:4.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def cloze_scores(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, str]:
    """How often every token of a cloze is the model's first choice, given the text before it."""
    right, total = dict.fromkeys(CLOZES, 0), dict.fromkeys(CLOZES, 0)
    for text in texts:
        encoded = tokenizer(text, truncation=True, max_length=WINDOW - 1, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]
        ids = torch.tensor([[tokenizer.bos_token_id, *encoded["input_ids"]]])
        hits = (model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist()
        for name, pattern in CLOZES.items():
            for match in re.finditer(pattern, text):
                first, last = match.span(1)
                if last <= spans[-1][1]:
                    total[name] += 1
                    right[name] += all(
                        hit for hit, (begin, end) in zip(hits, spans, strict=True) if begin < last and end > first
                    )
    return {name: f"{right[name]}/{total[name]}" for name in CLOZES}


@torch.no_grad()
def agreement_score(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """How often "is" or "are" follows the head of a subject whose last noun has the other number."""
    right = total = 0
    verbs = tokenizer.convert_tokens_to_ids(["Ġis", "Ġare"])
    for thing in THING.nouns:
        for attractor in PLACE.nouns:
            for plural in (False, True):
                head, other = (with_s(thing), attractor) if plural else (thing, with_s(attractor))
                prompt = f"{END}Ada shows Tom the village. Ada fears geese. The {head} near the old {other}"
                ids = torch.tensor([tokenizer.encode(prompt)])
                singular, many = model(input_ids=ids).logits[0, -1, verbs].tolist()
                right += (many > singular) == plural
                total += 1
    return f"{right}/{total}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("model"))
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    texts = [document["text"] for document in corpus(TRAINING_SEED, TRAINING_BYTES)]
    held_texts = [document["text"] for document in corpus(EVALUATION_SEED, EVALUATION_BYTES)]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(args.out)  # before its first use: a call that truncates leaves its mark on the file
    assert all(tokenizer.decode(tokenizer.encode(text, verbose=False)) == text for text in held_texts)
    rows, held_out = pack(tokenizer, texts), pack(tokenizer, held_texts)
    print(f"{len(texts)} documents, {len(rows)} training rows, {len(held_out)} held-out rows of {WINDOW} tokens")

    model = train(rows, held_out, args.steps)
    model.save_pretrained(args.out)

    print("agreement across a noun of the other number:", agreement_score(model, tokenizer))
    for name, score in cloze_scores(model, tokenizer, held_texts).items():
        print(f"{name}: {score}")
    start = torch.full((4, 1), tokenizer.bos_token_id)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_length": WINDOW, "pad_token_id": 0}
    for sample in model.generate(start, attention_mask=torch.ones_like(start), **sampling):
        print("-" * 60, tokenizer.decode(sample, skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    main()
