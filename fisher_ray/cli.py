"""The command line: ``fisher-ray run``, and the published toolkit's script on the same engine."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fisher_ray import __version__
from fisher_ray.cluster import Outcome, RunError, run
from fisher_ray.plan import ConfigError, Plan, RunConfig
from fisher_ray.report import layer_table, spectra_png
from fisher_ray.shards import Counts, StorageError

# Exit codes.
COMPLETE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130

_LOG_EVERY = 15.0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other failure does."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}. See {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """``fisher-ray``; returns the exit code."""
    parser = _Parser(prog="fisher-ray", description="Fisher matrices of language-model activations.")
    parser.add_argument("--version", action="version", version=f"fisher-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands.add_parser("run", help="corpus -> Fisher matrices of every layer, on Ray"))
    given = vars(parser.parse_args(argv))
    given.pop("command")
    return _guarded(lambda: _config(given))


def reference_main(argv: Sequence[str] | None = None) -> int:
    """The published toolkit's script: its flags, on this engine; returns the exit code."""
    parser = _Parser(
        description="Fisher matrices of one layer, with the flags of the published toolkit's script. With --token_source "
        "observed, --num_samples scores are sampled at each position; with sampled, --num_samples tokens are drawn from the "
        "model at each position and the exact matrices there averaged, and --temperature and --top_p belong to those draws."
    )
    add = parser.add_argument
    add("--model_name", default="gpt2", help="hub name or path (gpt2)")
    add("--layer_idx", required=True, help="residual stream entering this block; also all, 0-11 or 3,6")
    add("--output_dir", required=True, help="run directory")
    add("--corpus", nargs="+", required=True, help="files, globs or folders: .txt, .jsonl, .parquet, ...")
    add("--batch_size", type=int, default=8, help="sequences that go through the model together (8)")
    add("--num_samples", type=int, default=8, help="scores, or token draws, a position (8)")
    add("--max_seq_len", type=int, default=256, help="tokens a window, longer documents are windowed (256)")
    add("--num_sequences", type=int, help="documents to take (all)")
    add("--max_positions", type=int, help="positions to score a document (all)")
    add("--position_skip", type=int, default=1, help="score every n-th position (1)")
    add("--temperature", type=float, default=1.0, help="of the draws (1)")
    add("--top_p", type=float, default=1.0, help="nucleus of the draws (1)")
    add("--max_ctxt_len", type=int, help="tokens of context at most (max_seq_len - 1)")
    add("--random_seed", type=int, default=0, help="of all draws (0)")
    add("--estimator", choices=("exact", "sampled"), help="sampled, or exact with --token_source sampled")
    add("--token_source", choices=("observed", "sampled"), default="observed", help="token at each position (observed)")
    given = parser.parse_args(argv)
    return _guarded(lambda: _reference_config(given))


def _reference_config(given: argparse.Namespace) -> RunConfig:
    for name in ("batch_size", "position_skip", "max_positions", "max_ctxt_len", "max_seq_len"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    stop = "" if given.max_positions is None else given.max_positions * given.position_skip
    length = given.max_seq_len if given.max_ctxt_len is None else min(given.max_seq_len, given.max_ctxt_len + 1)
    draws = given.token_source == "sampled"
    prefix = "token_" if draws else ""
    values: dict[str, Any] = {
        "model": given.model_name,
        "corpus": tuple(given.corpus),
        "output": given.output_dir,
        "layers": given.layer_idx,
        "estimator": given.estimator or ("exact" if draws else "sampled"),
        "num_samples": 1 if draws else given.num_samples,
        "token_source": given.token_source,
        "token_draws": given.num_samples if draws else 1,
        f"{prefix}top_p": given.top_p,
        f"{prefix}temperature": given.temperature,
        "max_seq_len": length,
        "batch_tokens": given.batch_size * length,
        "positions": f"0:{stop}:{given.position_skip}",
        "max_docs": given.num_sequences,
        "seed": given.random_seed,
    }
    return RunConfig(**values)


def _add_run(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("--model", help="hub name or path")
    what.add_argument(
        "--corpus", nargs="+", help=".txt .md .jsonl (.gz .zst) .parquet, saved dataset, .npy; any fsspec URI"
    )
    what.add_argument("--output", help="run directory, any fsspec URI; new, empty, or a run to go on with")
    what.add_argument("--layers", help="all, 0-11 or 3,6; k is the stream entering block k (all)")
    what.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings by name; flags override them")
    how = parser.add_argument_group("estimator")
    how.add_argument("--estimator", choices=("exact", "sampled"), help="(sampled)")
    how.add_argument("--num-samples", type=int, help="scores a position (8)")
    how.add_argument("--top-p", type=float, help="nucleus of the sampled scores; below 1 is no longer F (1)")
    how.add_argument("--temperature", type=float, help="of the sampled scores; other than 1 is no longer F (1)")
    how.add_argument(
        "--token-source", choices=("observed", "sampled"), help="the corpus's tokens, or drawn ones (observed)"
    )
    how.add_argument("--token-draws", type=int, help="tokens drawn a position, matrices averaged (1)")
    how.add_argument("--token-top-p", type=float, help="nucleus of the token draws (1)")
    how.add_argument("--token-temperature", type=float, help="of the token draws (1)")
    how.add_argument("--seed", type=int, help="of all draws (0)")
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--column", help="text, or lists of token ids, in .jsonl and .parquet (text)")
    corpus.add_argument("--unit", choices=("paragraph", "file"), help="what a document of a text file is (paragraph)")
    corpus.add_argument("--encoder-column", help="text of the encoder, for encoder-decoders")
    corpus.add_argument("--columns", nargs="+", help="columns to carry into the table of positions")
    corpus.add_argument("--max-docs", type=int, help="documents to take (all)")
    corpus.add_argument("--max-seq-len", type=int, help="tokens a window (the model's positions, at most 512)")
    corpus.add_argument("--stride", type=int, help="tokens that windows overlap by (a quarter of the window)")
    corpus.add_argument("--positions", help="all, last, start:stop:step or 0,5,-1, in each document (all)")
    out = parser.add_argument_group("results and resources")
    out.add_argument(
        "--save", choices=("summary", "factors", "matrices"), help="what to keep for each position (summary)"
    )
    out.add_argument("--actors", type=int, help="workers (all the cluster has room for)")
    out.add_argument("--gpus-per-actor", type=float, help="(1 where there are GPUs)")
    out.add_argument("--cpus-per-actor", type=int, help="cores and threads of a worker (1)")
    out.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="of the weights (float32)")
    out.add_argument(
        "--gradients", choices=("own_position", "per_position"), help="per_position: any causal model, slower"
    )
    out.add_argument("--batch-tokens", type=int, help="tokens that go through the model together (4096)")
    out.add_argument("--memory-budget", type=int, help="bytes of a micro-batch (2 GiB, or half of the GPU)")
    out.add_argument("--revision", help="of the model on the hub")
    out.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code that comes with the model"
    )


def _config(given: dict[str, Any]) -> RunConfig:
    """Settings from the config file, overridden by the flags given."""
    path = given.pop("config")
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the config file {path}: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config file {path} must hold settings by name, got {type(values).__name__}.")
        values = {str(key).replace("-", "_"): value for key, value in values.items()}
        if isinstance(values.get("layers"), int):
            values["layers"] = str(values["layers"])
    return RunConfig.from_dict({**values, **{key: value for key, value in given.items() if value is not None}})


def _guarded(make_config: Callable[[], RunConfig]) -> int:
    """Run, print what it gave, and turn every failure into one line and an exit code."""
    console, errors = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for library in ("ray", "huggingface_hub"):  # their retries and notes would bury the one line that matters
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        outcome = run(make_config(), lambda plan: _progress(console, plan))
        _show(console, outcome)
    except KeyboardInterrupt:
        errors.print("stopped; what is done is kept, and the same command goes on.", style="yellow")
        return STOPPED
    except (StorageError, RunError, MemoryError) as error:
        errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return BAD_INPUT if isinstance(error, StorageError) else FAILED
    except ValueError as error:  # ConfigError, CorpusError, ModelError, and the estimators' own
        errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return BAD_INPUT
    return COMPLETE


@contextmanager
def _progress(console: Console, plan: Plan) -> Iterator[Callable[[int, Counts], None]]:
    """A bar with ETA on a terminal, a plain line now and then elsewhere."""
    total = sum(task.weight for task in plan.tasks)
    start = last = time.monotonic()
    if console.is_terminal:
        columns = (TextColumn("scoring"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[scored]:,} positions"), console=console) as bar:
            shown = bar.add_task("", total=total, scored=0)
            yield lambda weight, counts: bar.update(shown, completed=weight, scored=counts.scored)
        return

    def log(weight: int, counts: Counts) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LOG_EVERY or weight >= total:
            last = now
            left = (now - start) * (total - weight) / max(weight, 1)
            console.print(f"{weight / total:.0%} of the corpus, {counts.scored:,} positions, {left:.0f} s left")

    yield log


def _show(console: Console, outcome: Outcome) -> None:
    outcome.store.write("reduced/spectra.png", spectra_png(outcome.plan, outcome.store, outcome.rows))
    counts = outcome.counts
    console.print(
        f"{counts.documents:,} documents ({counts.empty:,} empty), {counts.tokens:,} tokens = {counts.scored:,} scored "
        f"+ {counts.skipped:,} skipped + {counts.invalid:,} invalid"
    )
    if outcome.resumed:
        console.print(f"{outcome.resumed} of {len(outcome.plan.tasks)} tasks were done before")
    if outcome.halvings:
        console.print(f"memory ran out {outcome.halvings} times; micro-batches were halved, which may change rounding")
    console.print(layer_table(outcome.rows))
    console.print(f"matrices and spectra: {outcome.store.uri}/reduced/layer_*/*.npy", soft_wrap=True)
    console.print(f"positions:            {outcome.store.uri}/positions/*.parquet", soft_wrap=True)
    console.print(f"picture:              {outcome.store.uri}/reduced/spectra.png", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
