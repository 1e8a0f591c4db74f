"""Tiny models on disk, text that nobody wrote for these tests, and runs read back with nothing but Arrow and NumPy."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # the clusters here are this machine's own

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import transformers as tf
from families import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from fisher_ray.driver import Outcome, run
from fisher_ray.plan import RunConfig

ROOT = Path(__file__).resolve().parent.parent
POISON = ROOT / "tests/poison"
VOCAB = 400
D_MODEL = 12
LAYERS = 2
MAX_POSITIONS = 48

# Each family small enough that a run spends its time on what is tested.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=D_MODEL, n_layer=LAYERS, n_head=2, n_positions=MAX_POSITIONS, vocab_size=VOCAB, bos_token_id=0,
            eos_token_id=1,
        )
    ),
    "untied": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=D_MODEL, n_layer=LAYERS, n_head=2, n_positions=MAX_POSITIONS, vocab_size=VOCAB, bos_token_id=0,
            eos_token_id=1, tie_word_embeddings=False,
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCAB, hidden_size=D_MODEL, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=1)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCAB, d_model=D_MODEL, d_kv=4, d_ff=16, num_layers=LAYERS, num_decoder_layers=LAYERS,
            num_heads=2, relative_attention_num_buckets=8, relative_attention_max_distance=12, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0,
        )
    ),
}  # fmt: skip


@cache
def some_text(num_bytes: int) -> str:
    """So many bytes, and the rest of a paragraph, of the standard library's documentation strings in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    size = 0
    for path in [*sorted(library.glob("*.py")), *sorted(library.glob("[a-z]*/[a-z_]*.py"))]:
        if path.parent.name in ("test", "site-packages"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                ascii_only = text.encode("ascii", "ignore").decode()
                size += (len(ascii_only) + 2) * (ascii_only not in found)
                found[ascii_only] = None
        if size > num_bytes + 10_000:
            text = "\n\n".join(found)
            return text[: text.index("\n\n", num_bytes)] + "\n"
    raise AssertionError(f"the standard library documents itself in {size} bytes, fewer than {num_bytes}")


def paragraphs(raw: bytes) -> list[tuple[int, str]]:
    """(offset, text) of each run of lines that are not blank."""
    found = re.finditer(rb"(?:[^\n]*\S[^\n]*\n?)+", raw)
    return [(m.start(), m.group().decode().rstrip("\r\n")) for m in found]


@cache
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text comes back from its tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([some_text(60_000)], trainer)
    assert bpe.get_vocab_size() == VOCAB
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def save_model(
    folder: Path, kind: str = "gpt2", with_tokenizer: bool = True, seed: int = 0, with_sink: bool = True
) -> str:
    """A tiny random model in a folder, as users have them."""
    model = build(MODELS[kind], torch.float32, seed)
    if not with_sink:
        model.config.bos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "gpt2")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray, once a session; more CPUs than any run here asks for, so that one that ends does not hold up the next.

    Its workers fail where a test asks them to: see poison/sitecustomize.py.
    """
    started = not ray.is_initialized()
    if started:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", python_path(POISON))
            ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    if started:
        ray.shutdown()


def address() -> str:
    """Of that cluster, for other processes to join."""
    return str(ray.get_runtime_context().gcs_address)


# ---- runs --------------------------------------------------------------------------------------------------------------


class Stored:
    """A run directory, opened without the package."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.description = json.loads((self.folder / "run.json").read_text())
        self.receipts = [json.loads(path.read_text()) for path in sorted((self.folder / "done").glob("*.json"))]

    @property
    def table(self) -> pa.Table:
        """Positions of all tasks, in the order of tasks."""
        files = [r["files"]["positions"]["path"] for r in self.receipts if "positions" in r["files"]]
        return pa.concat_tables([pq.read_table(self.folder / file) for file in files])

    def rows(self, layer: int) -> list[dict[str, Any]]:
        return [row for row in self.table.to_pylist() if row["layer"] == layer]

    def saved(self, what: str, layer: int) -> np.ndarray:
        """Factors or matrices of all tasks at a layer."""
        files = [r["files"][f"{what}_{layer}"]["path"] for r in self.receipts if f"{what}_{layer}" in r["files"]]
        return np.concatenate([np.load(self.folder / file) for file in files])

    def counts(self) -> dict[str, int]:
        names = self.receipts[0]["counts"]
        return {name: sum(r["counts"][name] for r in self.receipts) for name in names}

    def reduced(self, layer: int, name: str = "fisher") -> np.ndarray:
        return np.load(self.folder / f"reduced/layer_{layer:03d}/{name}.npy")

    def bits(self) -> dict[str, bytes]:
        """The reduced arrays, byte for byte."""
        paths = sorted((self.folder / "reduced").rglob("*.npy"))
        assert paths
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


def settings(model: str, corpus: str | Path, output: str | Path, **changed: Any) -> RunConfig:
    return RunConfig(model=model, corpus=(str(corpus),), output=str(output), **changed)


def run_here(config: RunConfig) -> tuple[Stored, Outcome]:
    """A whole run in this process, without Ray."""
    outcome = run(replace(config, executor="local"))
    return Stored(config.output), outcome


def descendants(pid: int) -> list[int]:
    """Processes below one, on Linux."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def command(*argv: str, task_bytes: int | None = None, **variables: str) -> subprocess.Popen[str]:
    """``fisher-ray argv`` in a process of its own, in a process group of its own as under a shell."""
    small = "" if task_bytes is None else f"import fisher_ray.cost; fisher_ray.cost.MIN_TASK_BYTES = {task_bytes}; "
    # A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    return python(
        "-c", f"{heard}{small}import sys; from fisher_ray.cli import main; sys.exit(main())", *argv, **variables
    )


def python_path(*more: Path) -> str:
    """PYTHONPATH of other processes: where the package is, and more."""
    paths = [*map(str, more), str(Path(inspect.getfile(RunConfig)).parent.parent)]
    return os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def python(*argv: str, **variables: str) -> subprocess.Popen[str]:
    """Python in a process of its own, that imports the package from where this one has it."""
    own = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *argv], env={**os.environ, **own}, start_new_session=True, **pipes)


# ---- what the library itself says --------------------------------------------------------------------------------------


def library_model(folder: str) -> Any:
    """The stored model in float64, by transformers alone."""
    config = tf.AutoConfig.from_pretrained(folder)
    auto = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def log_probs(model: Any, ids: list[int]) -> Tensor:
    """log p of every next token, [len(ids), vocab_size]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def token_windows(length: int, max_seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(first token, first new position, end) of each window behind a sink: the definition, one after the other."""
    room = max_seq_len - 1
    found = [(0, 0, min(room, length))] if length else []
    while found and found[-1][2] < length:
        end = found[-1][2]
        found.append((end - stride, end, min(end - stride + room, length)))
    return found
