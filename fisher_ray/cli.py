"""The command line: ``fisher-ray``, and the published toolkit's script on the same engine."""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np
import safetensors.numpy
import transformers
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fisher_ray import __version__, inspection
from fisher_ray.architecture import DTYPES
from fisher_ray.corpus import Unit
from fisher_ray.cost import HARDWARE, Hardware, Save
from fisher_ray.directions import cost, model_of, moved_tokens, project, stored_directions, top_directions, typical_norm
from fisher_ray.dispatch import LocalPool, Pool, RunError, StoppedError
from fisher_ray.driver import Outcome, Progress, run
from fisher_ray.kernels import is_out_of_memory
from fisher_ray.plan import (
    ConfigError,
    Device,
    EstimatorName,
    Executor,
    Plan,
    RunConfig,
    layer_ranges,
    make_plan,
    read_settings,
    reckon,
)
from fisher_ray.report import Printable, direction_table, layer_table, number_table, print_table
from fisher_ray.report_html import html_report
from fisher_ray.run import Reading, open_run, read_description
from fisher_ray.scores import TokenSource
from fisher_ray.shards import Lease, RefusedError, RunStore
from fisher_ray.split import Gradients
from fisher_ray.statistics import Estimate
from fisher_ray.storage import DamagedError, OutageError, Storage, StorageError, absolute, is_transient
from fisher_ray.validate import validate

# What is imported stays, and no collection need look at it: the last one, at the interpreter's end, took a second.
gc.freeze()

# Exit codes. DAMAGED is that of commands that read a run.
COMPLETE, FAILED, BAD_INPUT, REFUSED, QUARANTINED, DAMAGED, STOPPED = 0, 1, 2, 3, 4, 5, 130

# Settings of the pool that the published script's flags are joined by.
_POOL = ("executor", "min_actors", "max_actors", "gpus_per_actor", "cpus_per_actor", "device", "retry_quarantined")

_LOG_EVERY = 15.0
_SILENT = 60.0  # seconds without a word of a driver, which writes one every 15
_FAR = 0.03  # of |h|: steps beyond are not priced by F
_NAMED = 20  # tasks, files or problems that are listed one by one


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other failure does; no flag is taken for another that begins like it."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message}. See {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """``fisher-ray``; returns the exit code."""
    parser = _Parser(prog="fisher-ray", description="Fisher matrices of language-model activations.")
    parser.add_argument("--version", action="version", version=f"fisher-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    running = commands.add_parser("run", help="corpus -> Fisher matrices of every layer, on Ray")
    _add_run(running)
    running.set_defaults(act=lambda given: _run(_config(given)))

    planning = commands.add_parser("plan", help="what a run would cost; takes the flags of run and computes nothing")
    _add_run(planning)
    planning.add_argument("--gpu", default=None, help="hardware to reckon with: h100, h200, a100, a10g, l4, cpu (all)")
    planning.add_argument("--tflops", type=float, help="a measured rate in place of the assumed one, per actor")
    planning.add_argument("--json", action="store_true", help="print JSON")
    planning.set_defaults(act=_plan)

    status = commands.add_parser("status", help="how far a run is, from its directory alone")
    status.add_argument("run", metavar="RUN", help="run directory or URI")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(act=_status)

    verify = commands.add_parser("verify", help="read everything back and name what is not as it was written")
    verify.add_argument("run", metavar="RUN", help="run directory or URI")
    verify.set_defaults(act=_verify)

    reporting = commands.add_parser("report", help="a run as one HTML page that opens offline")
    reporting.add_argument("run", metavar="RUN", help="run directory or URI")
    reporting.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    reporting.add_argument("--validation", type=Path, metavar="LAW.json", help="what validate --json has printed")
    reporting.set_defaults(act=_report)

    validating = commands.add_parser(
        "validate", help="compare KL divergences of the run's own model with v^T F v / 2, at positions of its own"
    )
    validating.add_argument("run", metavar="RUN", help="run directory or URI")
    validating.add_argument("--layers", help="3,6, 0-3 or all, of the run's (first, middle and last)")
    validating.add_argument("--positions", type=int, default=32, help="spread over the run (32)")
    validating.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="to compute in (float64)"
    )
    validating.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="picture of deviation against step")
    validating.add_argument("--json", action="store_true", help="print JSON")
    _add_trust(validating)
    validating.set_defaults(act=_validate)

    projecting = commands.add_parser(
        "project", help="what directions move and cost; with -o where in the corpus they are"
    )
    projecting.add_argument("run", metavar="RUN", help="run directory or URI")
    projecting.add_argument(
        "--directions",
        type=Path,
        metavar="FILE",
        help=".npy, .npz or .safetensors, rows or columns of a matrix (eigenvectors of the mean F)",
    )
    projecting.add_argument("--tensor", metavar="NAME", help="that matrix, where the file holds several of that width")
    projecting.add_argument("--top", type=int, default=4, help="eigenvectors to take, where no file is given (4)")
    projecting.add_argument("--layers", help="3,6 or 0-3 (all of the run's)")
    projecting.add_argument(
        "-o", "--output", type=Path, metavar="FILE.parquet", help="coordinate and v^T F v of every position"
    )
    projecting.add_argument("--max-docs", type=int, help="documents in that table (all)")
    projecting.add_argument("--json", action="store_true", help="print JSON")
    _add_trust(projecting)
    projecting.set_defaults(act=_project)

    clean = commands.add_parser("clean", help="list what killed attempts left behind, or remove it")
    clean.add_argument("run", metavar="RUN", help="run directory or URI")
    clean.add_argument("--remove", action="store_true", help="remove it; without, only list")
    clean.set_defaults(act=_clean)

    inspecting = commands.add_parser("inspect", help="what a run has found: overview, a layer, or a position")
    inspecting.add_argument("run", metavar="RUN", help="run directory or URI")
    inspecting.add_argument("--layer", type=int, help="one layer: eigenvalues, directions, largest traces")
    inspecting.add_argument("--group", help="one group's mean at that layer")
    inspecting.add_argument("--position", metavar="DOCUMENT:POSITION", help="one position at every layer")
    inspecting.add_argument("--json", action="store_true", help="print JSON")
    inspecting.set_defaults(act=_inspect)

    differing = commands.add_parser(
        "diff", help="how two runs of one model differ, or two groups or layers: spectra, overlaps, what moved"
    )
    differing.add_argument("runs", nargs="+", metavar="RUN", help="two, or one to compare groups or layers of")
    differing.add_argument("--layers", help="3: at that layer; 3,6: at one of each (all that both have)")
    differing.add_argument("--group", nargs="+", help="of one group, or of one of each (all positions)")
    differing.add_argument("--json", action="store_true", help="print JSON")
    differing.set_defaults(act=_diff)

    exporting = commands.add_parser("export", help="means and spectra in one file, .safetensors or .npz")
    exporting.add_argument("run", metavar="RUN", help="run directory or URI")
    exporting.add_argument("-o", "--output", type=Path, required=True, help="file to write, .safetensors or .npz")
    exporting.set_defaults(act=_export)

    sending = commands.add_parser(
        "submit", help="send a command to a Ray cluster as a job, follow it, return its exit code"
    )
    sending.add_argument("--address", help="of the job server (RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)")
    sending.add_argument("--working-dir", default=".", help="sent along (.)")
    sending.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="variable of the job; without =, as it is here",
    )
    sending.add_argument("--stop-seconds", type=int, default=60, help="given to the job between stop and kill (60)")
    sending.add_argument(
        "job", nargs=argparse.REMAINDER, help="run, sweep ... with their flags, or a script: jobs/sweep.py"
    )
    sending.set_defaults(act=_submit)

    sweeping = commands.add_parser("sweep", help="many runs from one file, with a table of them all")
    sweeping.add_argument(
        "config", type=Path, metavar="CONFIG.yaml", help="common settings, and a product or a list of points"
    )
    sweeping.set_defaults(act=_sweep)

    known, unknown = parser.parse_known_args(argv)
    if unknown:  # of the command, whose help has its flags
        commands.choices[known.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    given = vars(known)
    given.pop("command")
    return _guarded(lambda: given.pop("act")(given))


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
    add("--token_source", choices=get_args(TokenSource), default="observed", help="token at each position (observed)")
    add("--executor", choices=get_args(Executor), default="ray", help="local: in this process, without Ray (ray)")
    add("--min_actors", type=int, default=1, help="workers to ask for, without a maximum, even where none has room (1)")
    add("--max_actors", type=int, help="workers to ask for at most, also of nodes to come (what has room now)")
    add("--gpus_per_actor", type=float, help="a fraction, one, or several for a large model (1 if there are any)")
    add("--cpus_per_actor", type=int, default=1, help="cores and threads of a worker (1)")
    add("--device", choices=get_args(Device), help="(cuda where a worker has a GPU)")
    add("--retry_quarantined", action="store_true", help="try again the tasks that were given up before")
    given = parser.parse_args(argv)
    return _guarded(lambda: _run(_reference_config(given)))


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
        **{name: getattr(given, name) for name in _POOL},
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
    what.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="settings by name, or the run.json of another run; flags override them",
    )
    how = parser.add_argument_group("estimator")
    how.add_argument(
        "--estimator",
        choices=get_args(EstimatorName),
        help="(sampled; deflated with --save factors or matrices)",
    )
    how.add_argument("--num-samples", type=int, help="scores a position; with deflated 0 gives a lower bound (8)")
    how.add_argument("--rank", type=int, help="of the part of F that deflated takes without drawing (24)")
    how.add_argument("--tolerance", type=float, metavar="EPS", help="share of tr M that exact may drop (0)")
    how.add_argument("--top-p", type=float, help="nucleus of the sampled scores; below 1 is no longer F (1)")
    how.add_argument("--temperature", type=float, help="of the sampled scores; other than 1 is no longer F (1)")
    how.add_argument(
        "--token-source", choices=get_args(TokenSource), help="the corpus's tokens, or drawn ones (observed)"
    )
    how.add_argument("--token-draws", type=int, help="tokens drawn a position, matrices averaged (1)")
    how.add_argument("--token-top-p", type=float, help="nucleus of the token draws (1)")
    how.add_argument("--token-temperature", type=float, help="of the token draws (1)")
    how.add_argument("--seed", type=int, help="of all draws (0)")
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--column", help="text, or lists of token ids, in .jsonl and .parquet (text)")
    corpus.add_argument("--unit", choices=get_args(Unit), help="what a document of a text file is (paragraph)")
    corpus.add_argument(
        "--encoder-column", help="text of the encoder, for encoder-decoders: its first --max-seq-len tokens"
    )
    corpus.add_argument("--columns", nargs="+", help="columns to carry into the table of positions")
    corpus.add_argument(
        "--group-by", help="position, token or a column: a mean for each bucket, frequent token or value as well"
    )
    corpus.add_argument(
        "--num-groups",
        type=int,
        help="most groups: frequent tokens and the others, or values of a column in 64 documents (32)",
    )
    corpus.add_argument(
        "--sketch", type=int, metavar="ROWS", help="keep sketches of so many rows in place of d x d sums (sums in full)"
    )
    corpus.add_argument("--max-docs", type=int, help="documents to take (all)")
    corpus.add_argument("--max-seq-len", type=int, help="tokens a window (the model's positions, at most 512)")
    corpus.add_argument("--stride", type=int, help="tokens that windows overlap by (a quarter of the window)")
    corpus.add_argument(
        "--positions",
        help="of each document: all, last, start:stop:step or 0,5,-1; with a leading minus as --positions=-5: (all)",
    )
    out = parser.add_argument_group("results and resources")
    out.add_argument("--save", choices=get_args(Save), help="what to keep for each position (summary)")
    out.add_argument(
        "--executor", choices=get_args(Executor), help="local: one worker in this process, without Ray (ray)"
    )
    out.add_argument(
        "--min-actors", type=int, help="workers to ask for, without a maximum, even where none has room (1)"
    )
    out.add_argument(
        "--max-actors", type=int, help="workers to ask for at most, also of nodes to come (what has room now)"
    )
    out.add_argument(
        "--gpus-per-actor", type=float, help="a fraction, one, or several for a large model (1 if there are any)"
    )
    out.add_argument("--cpus-per-actor", type=int, help="cores and threads of a worker (1)")
    out.add_argument(
        "--until-relative-error",
        type=float,
        metavar="EPS",
        help="end early, once the relative standard error of the mean F is at most EPS (never)",
    )
    out.add_argument(
        "--until-relative-change",
        type=float,
        metavar="EPS",
        help="end early, once twice the tasks changed the mean F by at most EPS (never)",
    )
    out.add_argument("--device", choices=get_args(Device), help="(cuda where a worker has a GPU)")
    out.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (float32)")
    out.add_argument(
        "--gradients",
        choices=get_args(Gradients),
        help="per_position: also models that own_position refuses, slower (own_position)",
    )
    out.add_argument(
        "--stream-weights",
        action="store_true",
        default=None,
        help="read one block's weights at a time from disk: for models larger than memory",
    )
    out.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="run norms and MLPs through torch.compile (on GPUs: faster)",
    )
    out.add_argument(
        "--batch-tokens", type=int, help="tokens that go through the model together (4096, on a GPU 32768)"
    )
    out.add_argument("--task-bytes", type=int, help="bytes of the corpus a task (planned from nominal speeds)")
    out.add_argument("--memory-budget", type=int, help="bytes of a micro-batch (2 GiB, or half of the GPU)")
    out.add_argument("--revision", help="of the model on the hub")
    again = parser.add_argument_group("failures")
    again.add_argument("--max-attempts", type=int, help="failures of a task before it is given up (3)")
    again.add_argument("--task-timeout", type=float, help="seconds until a task counts as hung (30 times the usual)")
    again.add_argument(
        "--retry-quarantined", action="store_true", default=None, help="try again the tasks that were given up before"
    )
    again.add_argument(
        "--no-verify",
        dest="verify_done",
        action="store_false",
        default=None,
        help="trust what is done without reading it back",
    )
    out.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code that comes with the model"
    )


def _config(given: dict[str, Any]) -> RunConfig:
    """Settings from the config file, or from the run.json of a run, overridden by the flags given."""
    path = given.pop("config")
    values: dict[str, Any] = {}
    if path is not None:
        values = read_settings(path, "the config file")
        if not isinstance(values, dict):
            raise ConfigError(f"config file {path} must hold settings by name, got {type(values).__name__}.")
        if isinstance(values.get("config"), dict):
            values = values["config"]
    flags = {key: value for key, value in given.items() if value is not None}
    if flags.get("estimator", values.get("estimator")) != values.get("estimator"):
        values = {key: value for key, value in values.items() if key not in ("rank", "tolerance")}  # of the other one
    return RunConfig.from_dict({**values, **flags})


# ---- commands ------------------------------------------------------------------------------------------------------------


def _guarded(act: Callable[[], int]) -> int:
    """Turn every failure into one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # what has been computed is not to fail for a letter that cannot be shown
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    errors = _console(stderr=True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for library in ("ray", "huggingface_hub", "gcsfs"):  # their retries and notes would bury the one line that matters
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with _terminable():
            code = act()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read has left; the interpreter is not to say so again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, StoppedError) as stopped:
        errors.print(str(stopped) or "stopped.", style="yellow", soft_wrap=True)
        return STOPPED
    except (StorageError, RunError, MemoryError, ValueError) as error:
        # ValueError: ConfigError, CorpusError, ModelError, and the estimators' own.
        errors.print(f"error: {error}", style="red", soft_wrap=True)
        if isinstance(error, RefusedError):
            return REFUSED
        if isinstance(error, DamagedError):
            return DAMAGED
        return FAILED if isinstance(error, RunError | MemoryError | OutageError) else BAD_INPUT
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if is_transient(error):
            said = f"the storage did not answer: {said} The same command goes on."
        elif is_out_of_memory(error):
            said = f"out of memory: {said} Ask for less at once, or free what others hold."
        elif not isinstance(error, OSError):
            raise
        errors.print(f"error: {said}", style="red", soft_wrap=True)
        return FAILED


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is heard as Ctrl-C is, so that what is half written goes with either."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that came with the run's model, as the run did"
    )


def _console(stderr: bool = False) -> Console:
    width = None if stderr or sys.stdout.isatty() else 120
    console = Console(width=width, stderr=stderr, markup=False)  # paths and text may look like it
    console.push_render_hook(Printable())
    return console


def _lasting(output: str, corpus: Sequence[str] = ()) -> None:
    """Refuse paths in the copy of a working directory that a job runs in."""
    for name, path, why in (
        ("output", output, "goes with the job"),
        *(("corpus", path, "has other times of change on every node") for path in corpus),
    ):
        if "/working_dir_files/" in absolute(path):
            raise ConfigError(
                f"{name} {path} is in the job's copy of its working directory, which {why}. Give a path that begins with / and "
                "that all nodes share, or a URI."
            )


def _run(config: RunConfig) -> int:
    _lasting(config.output, config.corpus)
    console = _console()

    @contextmanager
    def show(_: Plan) -> Iterator[Callable[[Progress], None]]:
        with _progress(console) as tell:
            yield lambda p: tell(p.state, p.weight, p.total_weight, _line(p))

    outcome = run(config, _pool(config), show)
    _show(console, outcome)
    return QUARANTINED if outcome.quarantined else COMPLETE


def _pool(config: RunConfig) -> Callable[[RunConfig], AbstractContextManager[Pool]]:
    if config.executor == "local":
        return LocalPool
    from fisher_ray.cluster import RayPool  # here and below, as most commands start without Ray in half a second less

    return RayPool


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float, float, str], None]]:
    """A bar with ETA on a terminal, a plain line now and then elsewhere: of a state, what is done, of what, and a line."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        more = TextColumn("{task.fields[line]}", markup=False)
        with Bar(*columns, TimeRemainingColumn(), more, console=console) as bar:
            shown = bar.add_task("starting", total=None, line="")
            yield lambda state, done, total, line: bar.update(
                shown, description=state, completed=done, total=total, line=line
            )
        return
    last: tuple[float, str] = (float("-inf"), "")

    def log(state: str, done: float, total: float, line: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last[0] >= _LOG_EVERY or (state != last[1] and state != "computing"):
            last = (now, state)
            console.print(f"{state}: {line}", soft_wrap=True, highlight=False)

    yield log


def _line(p: Progress) -> str:
    left = "" if p.seconds_left is None else f", {_clock(p.seconds_left)} left"
    return (
        f"{p.tasks_done:,}/{p.tasks:,} tasks, {p.tokens_per_second:,.0f} tokens/s{left}, actors {p.actors_alive} alive "
        f"{p.actors_pending} pending, {p.retried} retried, {p.quarantined} quarantined"
        + (f"; {p.checkpoint.words}" if p.checkpoint else "")
        + (f"; {p.actors_wait}" if p.actors_wait else "")
        + (f"; the last one retried: {p.last_failure[:200]}" if p.last_failure and p.state == "computing" else "")
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _show(console: Console, outcome: Outcome) -> None:
    counts, uri = outcome.counts, outcome.store.uri
    console.print(
        f"{counts.documents:,} documents ({counts.empty:,} empty), {counts.tokens:,} tokens = {counts.scored:,} scored "
        f"+ {counts.skipped:,} skipped + {counts.invalid:,} invalid"
    )
    if outcome.resumed:
        repaired = f", {outcome.damaged} of them damaged and computed again" if outcome.damaged else ""
        console.print(f"{outcome.resumed} of {outcome.tasks} tasks were done before{repaired}")
    if outcome.checkpoints:
        console.print(_ended(outcome), soft_wrap=True, highlight=False)
    if counts.halvings:
        console.print(f"memory ran out {counts.halvings} times; micro-batches were halved, which may change rounding")
    rows = [row for row in outcome.rows if row["group"] is None]
    print_table(console, layer_table(rows))
    if outcome.plan.config.sketch is not None:
        console.print(
            f"note: sums are sketches of {outcome.plan.config.sketch} rows: the trace is that of F, eigenvalues and ranks are "
            "of the sketch; fisher-ray inspect says how much an eigenvalue may lack",
            style="yellow",
            soft_wrap=True,
        )
    groups = {row["group"] for row in outcome.rows} - {None}
    if groups:
        files = "group_*/*.npy" if outcome.plan.config.sketch is None else "groups.npz"
        console.print(f"groups:               {len(groups)}, in {uri}/reduced/layer_*/{files}", soft_wrap=True)
    console.print(f"matrices and spectra: {uri}/reduced/layer_*/*.npy", soft_wrap=True)
    console.print(f"positions:            {uri}/positions/*.parquet", soft_wrap=True)
    console.print(f"picture:              {uri}/reduced/spectra.png", soft_wrap=True)
    blocks = min(row["blocks"] for row in rows)
    console.print(f"standard errors:      {'unknown: ' if blocks == 1 else 'from '}{inspection.of_blocks(blocks)}")
    if outcome.quarantined:
        errors = _console(stderr=True)
        for line in list(outcome.quarantined.values())[:_NAMED]:
            errors.print(f"given up: {line}", style="red", soft_wrap=True)
        errors.print(
            f"error: {len(outcome.quarantined)} of {outcome.tasks} tasks were given up, and the means are without them; "
            f"{uri}/quarantine says why. Once the cause is gone, the same command with --retry-quarantined completes the run; "
            "where the corpus has to be corrected, that is another run, with an --output of its own.",
            style="red",
            soft_wrap=True,
        )


def _ended(outcome: Outcome) -> str:
    """Where a run ended that may end early, and why."""
    last, config = outcome.checkpoints[-1], outcome.plan.config
    wanted = {"relative_error": config.until_relative_error, "relative_change": config.until_relative_change}
    asked = " or ".join(
        f"{name.replace('_', ' ')} of {value:.2%}" for name, value in wanted.items() if value is not None
    )
    if last.tasks < outcome.tasks:
        return f"ended early, at a {asked}: {last.words}; {outcome.tasks - last.tasks} tasks are left"
    return f"a {asked} was asked for: {last.words}, which are all there are"


def _opened(uri: str) -> tuple[RunStore, dict[str, Any]]:
    store = RunStore(uri)
    return store, read_description(store)


def _plan(given: dict[str, Any]) -> int:
    names, tflops, as_json = given.pop("gpu"), given.pop("tflops"), given.pop("json")
    plan = make_plan(_config(given))
    plan = plan.on(
        plan.config.device or ("cuda" if plan.config.gpus_per_actor or names not in (None, "cpu") else "cpu")
    )
    tasks = plan.make_tasks()
    amount, cost = reckon(plan, tasks), plan.cost
    on_gpu = replace(cost, batch_tokens=plan.on("cuda").config.together)
    gpus = max(1, int(plan.config.gpus_per_actor or 1))
    hardware = [_hardware(name.strip(), tflops) for name in (names or ",".join(HARDWARE)).split(",")]
    exact = amount.sampled == len(tasks)
    a_task = replace(cost, num_groups=math.ceil(amount.task_groups))
    stored = {
        save: len(tasks) * a_task.sums_bytes + amount.scored * replace(cost, save=save).position_bytes
        for save in get_args(Save)
    }
    machines = [
        {
            "hardware": machine.name,
            "fits": cost.fits(machine, gpus),
            "hours": cost.gpu_hours(amount.window_tokens, machine) * gpus,
            "micro_batch": (cost if machine.name == "cpu" else on_gpu).micro_batch(gpus * machine.memory),
        }
        for machine in hardware
    ]
    facts = {
        "tasks": len(tasks),
        **asdict(amount),
        "exact": exact,
        "flop": amount.window_tokens * cost.flop_per_token,
        "memory": {"weights": cost.weight_bytes, "sums": cost.sums_memory, "smallest": cost.memory(1)},
        "storage": stored | {"reduction": replace(cost, num_groups=amount.groups).reduced_bytes(len(tasks))},
        "hardware": machines,
    }
    if as_json:
        print(_json(facts))
    else:
        _show_plan(_console(), plan, facts)
    refused = [machine["fits"] for machine in machines if machine["fits"]]
    if len(refused) == len(machines):
        raise ConfigError(str(refused[-1]))
    return COMPLETE


def _hardware(name: str, tflops: float | None) -> Hardware:
    if name not in HARDWARE:
        raise ConfigError(f"gpu must be of {', '.join(HARDWARE)}, got {name!r}.")
    if tflops is not None and not 0 < tflops < math.inf:
        raise ConfigError(f"tflops must be a rate above 0, got {tflops:g}.")
    return HARDWARE[name] if tflops is None else HARDWARE[name].measured(tflops)


def _show_plan(console: Console, plan: Plan, facts: dict[str, Any]) -> None:
    what = "exact" if facts["exact"] else f"estimated from {facts['sampled']} tasks"
    memory, storage = facts["memory"], facts["storage"]
    for line in (
        f"tasks:    {facts['tasks']:,}",
        f"tokens:   {facts['tokens']:,} in {facts['documents']:,} documents, {facts['scored']:,} scored, "
        f"{facts['window_tokens']:,} through the model ({what})",
        f"compute:  {facts['flop']:.3g} flop in matrix products, for {len(plan.layers)} streams",
        f"memory:   {_size(memory['weights'])} of weights, {_size(memory['sums'])} of sums; {_size(memory['smallest'])} with "
        "a single position",
        f"storage:  {_size(storage[plan.config.save])} from tasks and {_size(storage['reduction'])} from the reduction; "
        + ", ".join(f"{_size(storage[save])} with --save {save}" for save in get_args(Save)),
    ):
        console.print(line, highlight=False, soft_wrap=True)
    table = number_table("hardware", "device hours", "micro-batch", folded="hardware")
    table.add_column("", overflow="fold")
    for machine in facts["hardware"]:
        hours = "-" if machine["fits"] else f"{machine['hours']:.3g}"
        batch = "-" if machine["fits"] else f"{machine['micro_batch']:,} positions"
        table.add_row(machine["hardware"], hours, batch, machine["fits"] or "fits")
    print_table(console, table)
    console.print(
        "Hours are those of the products at assumed shares of the peak; --tflops takes a measured rate. A model of a few "
        "hundred channels takes several times as long, as what is no product then counts.",
        highlight=False,
        soft_wrap=True,
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.3g} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def _status(given: dict[str, Any]) -> int:
    store, run = _opened(given["run"])
    reading = Reading()
    try:
        progress: dict[str, Any] = store.read_sealed("progress.json")
    except FileNotFoundError:
        progress = {"state": "starting"}
    except DamagedError as error:
        progress = {"state": "unknown"}
        reading.damaged.append(str(error))
    notes = (reading(partial(store.read_sealed, path)) for path in store.notes())
    quarantine = [note["error"] for note in notes if note is not None]
    done = len(store.names("done"))
    heard = max(0.0, round(time.time() - progress["written"], 1)) if "written" in progress else None
    driver, at_work = Lease.holder(store)
    if not at_work and progress["state"] in ("computing", "reducing"):
        progress["state"] = "interrupted"
    facts = {
        **progress,
        "tasks_done": done,
        "tasks": run["tasks"],
        "quarantine": quarantine,
        "driver": driver,
        "seconds_since_written": heard,
    }
    if given["json"]:
        print(_json(facts))
        return _without(reading.damaged)
    console = _console()
    # A driver on another machine may have died: what it last said of its speed holds no longer.
    at_work = at_work and heard is not None and heard < _SILENT
    ago = "" if heard is None else f", {_clock(heard)} ago"
    console.print(f"{store.uri}: {facts['state']}{ago}", soft_wrap=True, highlight=False)
    console.print(f"tasks:  {done:,} of {run['tasks']:,} done, {len(quarantine)} quarantined", highlight=False)
    actors = ""
    if "counts" in facts:
        actors = f", actors {facts['actors_alive']} alive {facts['actors_pending']} pending" if at_work else ""
        speed = f", {facts['tokens_per_second']:,.0f} a second" if at_work else ""
        left = facts["seconds_left"]
        left = f", {_clock(left)} left" if at_work and left is not None else ""
        said = (
            ""
            if facts["state"] in ("complete", "quarantined")
            else " of tasks computed or read back by the last driver"
        )
        console.print(f"tokens: {facts['counts']['tokens']:,}{said}{speed}{left}", highlight=False)
    console.print(f"driver: {facts['driver'] or 'none'}{actors}", highlight=False)
    for line in quarantine[:_NAMED]:
        console.print(f"given up: {line}", highlight=False, soft_wrap=True)
    return _without(reading.damaged)


def _verify(given: dict[str, Any]) -> int:
    console = _console()
    try:
        store, run = _opened(given["run"])
    except DamagedError as error:
        console.print(str(error), highlight=False, soft_wrap=True)
        return DAMAGED
    found = 0
    for problem in store.verify(run):
        found += 1
        console.print(f"{problem.path} {problem.what}", highlight=False, soft_wrap=True)
    if found:
        console.print(
            f"{found} problems. What the run has written is mended when the command that made it is given again."
        )
        return DAMAGED
    done = f"{len(store.names('done')):,} of {run['tasks']:,} tasks"
    console.print(f"{store.uri}: {done}, everything as it was written", soft_wrap=True, highlight=False)
    return COMPLETE


def _report(given: dict[str, Any]) -> int:
    path = _to_write(given["output"])
    report = html_report(open_run(given["run"]), _validation(given["validation"]))
    raw = report.html.encode()
    _write(path, raw)
    _console().print(f"report: {path} ({_size(len(raw))})", soft_wrap=True, highlight=False)
    return _without(report.damaged)


def _to_write(path: Path) -> Path:
    """A file to be written, refused before anything is computed where it cannot be."""
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):  # a device would be replaced
        raise ConfigError(f"-o must name a file in a directory that exists, got {path}.")
    return path


def _write(path: Path, raw: bytes) -> None:
    """Write a file whole or not at all, where a link leads as well."""
    path = path.resolve()
    Storage(str(path.parent)).write(path.name, raw)


def _json(facts: dict[str, Any]) -> str:
    """Facts as JSON, which has no NaN: what is not a number is null."""

    def known(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: known(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [known(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(facts), allow_nan=False)


def _validation(path: Path | None) -> dict[str, Any] | None:
    """What ``validate --json`` has printed into a file."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}: {error} Expected what fisher-ray validate RUN --json prints."
        ) from error
    if not isinstance(found, dict) or not {"fingerprint", "steps", "layers"} <= set(found):
        raise ConfigError(f"{path} is not what fisher-ray validate RUN --json prints.")
    return found


def _without(damaged: Sequence[str]) -> int:
    """Name what had to be left out; the exit code."""
    errors = _console(stderr=True)
    for line in damaged[:_NAMED]:
        errors.print(f"left out: {line}", style="red", soft_wrap=True)
    return DAMAGED if damaged else COMPLETE


def _validate(given: dict[str, Any]) -> int:
    output = None if given["output"] is None else _to_write(given["output"])
    run = open_run(given["run"], trust_remote_code=given["trust_remote_code"])
    result = validate(run, _layers(given["layers"], run.layers), given["positions"], given["dtype"])
    if output is not None:
        result.plot(picture := io.BytesIO())
        _write(output, picture.getvalue())
    if given["json"]:
        print(_json(result.asdict()))
    else:
        console = _console()
        print_table(console, result.table())
        console.print(
            f"KL / (v^T F v / 2) at {len(result.positions)} positions in {result.dtype}, 6 directions each, as |v| falls; "
            f"passes within {min(test.tolerance for test in result.layers.values()):g} of 1",
            highlight=False,
            soft_wrap=True,
        )
    return COMPLETE if result.passed else FAILED


def _layers(spec: str | None, known: list[int]) -> list[int] | None:
    """Those that ``--layers`` names of a run's, in its order; None where it is not given."""
    if spec is None:
        return None
    if spec == "all":
        return known
    named = layer_ranges(spec)
    strange = next((layer for each in named for layer in each if layer not in known), None)
    if strange is not None:
        raise ConfigError(f"layer must be one of {known}, got {strange}.")
    return list(dict.fromkeys(layer for each in named for layer in each))


def _project(given: dict[str, Any]) -> int:
    run = open_run(given["run"], trust_remote_code=given["trust_remote_code"])
    path = given["directions"]
    if given["max_docs"] is not None and given["max_docs"] < 1:
        raise ConfigError(f"max_docs must be at least 1, got {given['max_docs']}.")
    if path is None and given["tensor"] is not None:
        raise ConfigError(f"--tensor {given['tensor']} is of a file. Give that too (--directions FILE).")
    output = None if given["output"] is None else _to_write(given["output"])
    tensor, by, read = (None, None, None) if path is None else stored_directions(path, run.d_model, given["tensor"])
    layers = _layers(given["layers"], run.layers) or run.layers
    model = model_of(run)
    reading = Reading()

    def priced(layer: int) -> tuple[np.ndarray, Estimate]:
        directions = top_directions(run, layer, given["top"]) if read is None else read
        return directions, cost(run, layer, directions)

    found = {layer: pair for layer in layers if (pair := reading(partial(priced, layer))) is not None}
    chosen = {layer: directions for layer, (directions, _) in found.items()}
    rows = []
    for layer, moved in (moved_tokens(run, chosen, model) if chosen else {}).items():
        nats, error = found[layer][1].value.tolist(), found[layer][1].error.tolist()
        norms, typical = np.linalg.norm(found[layer][0], axis=1).tolist(), typical_norm(run, layer)
        for i, (raised, lowered) in enumerate(moved):
            known = {
                "norm": norms[i],
                "share": norms[i] / typical,
                "cost": nats[i],
                "error": None if math.isnan(error[i]) else error[i],
            }
            rows.append({"layer": layer, "direction": i, **known, "raised": raised, "lowered": lowered})

    if not chosen:
        output = None
    if given["json"]:
        count = output and project(run, chosen, output, given["max_docs"], model)
        facts = {"tensor": tensor, "by": by, "directions": rows, "output": output and str(output), "rows": count}
        print(_json(facts))
        return _without(reading.damaged)
    console = _console()
    console.print(f"{run.store.uri}: {run.status}", soft_wrap=True, highlight=False)
    if read is not None:
        console.print(f"directions: {by} of {tensor}", soft_wrap=True, highlight=False)
    print_table(console, direction_table(rows))
    far = [str(k) for k in found if any(row["share"] > _FAR for row in rows if row["layer"] == k)]
    beyond = f" Steps at layer{'s' * (len(far) > 1)} {', '.join(far)} are longer: their costs may be off by ten times."
    console.print(
        f"Costs are of second order, which holds up to a few hundredths of |h| (fisher-ray validate).{beyond if far else ''}",
        soft_wrap=True,
        highlight=False,
    )
    if run.config.sketch is not None:
        lost = ", ".join(f"{run.sketch_error(layer):.3g}" for layer in chosen)
        console.print(
            f"note: sums are sketches of {run.config.sketch} rows, so costs are lower bounds: too small by at most |v|^2 / 2 "
            f"times {lost} (of these layers in turn)",
            style="yellow",
            soft_wrap=True,
            highlight=False,
        )
    if output:  # minutes and more, so that what is known is said before
        documents = run.counts.documents - run.counts.empty
        documents = min(documents, given["max_docs"] or documents)
        with _progress(console) as tell:

            def heard(read: int) -> None:
                tell("coordinates", read, documents, f"{read:,} of {documents:,} documents")

            count = project(run, chosen, output, given["max_docs"], model, heard)
        console.print(f"coordinates: {output}, {count:,} rows", soft_wrap=True, highlight=False)
    return _without(reading.damaged)


def _clean(given: dict[str, Any]) -> int:
    store, _ = _opened(given["run"])
    console = _console()
    with ExitStack() as leaving:
        try:  # nobody may be writing what looks like an orphan
            leaving.callback(Lease(store).release)
        except StorageError as error:
            if given["remove"] or isinstance(error, RefusedError):
                raise  # else nobody can write here
        orphans = store.orphans()
        for path in orphans:
            console.print(path, highlight=False, soft_wrap=True)
            if given["remove"]:
                store.remove(path)
    said = "removed" if given["remove"] else "would be removed; --remove does it"
    console.print(f"{len(orphans)} files that no receipt names {said}")
    return COMPLETE


def _inspect(given: dict[str, Any]) -> int:
    if given["group"] is not None and given["layer"] is None:
        raise ConfigError("--group is of one layer: give --layer as well.")
    run = open_run(given["run"])
    if given["position"] is not None:
        document, colon, position = given["position"].rpartition(":")
        if not colon or not position.isdigit():
            raise ConfigError(
                f"--position must be DOCUMENT:POSITION, as positions/*.parquet name them; got {given['position']!r}."
            )
        return _told(inspection.one_position(run, document, int(position)), inspection.show_position, given["json"])
    if given["layer"] is not None:
        return _told(inspection.one_layer(run, given["layer"], given["group"]), inspection.show_layer, given["json"])
    return _told(inspection.overview(run), inspection.show_overview, given["json"])


def _diff(given: dict[str, Any]) -> int:
    runs, groups = [open_run(uri) for uri in given["runs"]], given["group"] or [None]
    known = sorted({*runs[0].layers, *runs[-1].layers})
    layers = None if given["layers"] == "all" else _layers(given["layers"], known)
    for name, those in (("runs", given["runs"]), ("layers", layers or ()), ("group", groups)):
        if len(those) > 2:
            raise ConfigError(f"diff compares two: at most two of {name}, got {' '.join(map(str, those))}.")
    if all(len(set(those)) < 2 for those in (layers or (), groups)) and len(runs) < 2:
        raise ConfigError("diff needs two runs, or of one run two of --group or two of --layers.")
    pair = None if layers is None else (layers[0], layers[-1])
    facts = inspection.difference(runs[0], runs[-1], pair, (groups[0], groups[-1]))
    return _told(facts, inspection.show_difference, given["json"])


def _told(facts: dict[str, Any], show: Callable[[Console, dict[str, Any]], None], as_json: bool) -> int:
    if as_json:
        print(_json(facts))
    else:
        show(_console(), facts)
    return _without(facts["damaged"])


def _export(given: dict[str, Any]) -> int:
    path = _to_write(given["output"])
    if path.suffix not in (".safetensors", ".npz"):
        raise ConfigError(f"export writes .safetensors or .npz, got {path.name!r}.")
    run = open_run(given["run"])
    reading = Reading()
    arrays = inspection.exported(run, reading)
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(buffer, allow_pickle=False, **arrays)
        raw = buffer.getvalue()
    else:
        about = {"run": run.store.uri, "status": run.status, "estimand": run.estimand, "model": run.config.model}
        raw = safetensors.numpy.save(arrays, metadata=about)
    _write(path, raw)
    _console().print(f"{len(arrays)} arrays, {_size(len(raw))}: {path}", highlight=False, soft_wrap=True)
    return _without(reading.damaged)


def _submit(given: dict[str, Any]) -> int:
    from fisher_ray.cluster import submit

    job = given["job"][1:] if given["job"][:1] == ["--"] else given["job"]
    if not job:
        raise ConfigError("submit needs a command: fisher-ray submit -- run --model ... ")
    entry = ["python", *([] if job[0].endswith(".py") else ["-m", "fisher_ray.cli"]), *job]
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(given["stop_seconds"]), **_variables(given["env"])}

    def say(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    status, code = submit(shlex.join(entry), given["address"], given["working_dir"], env, say)
    if status == "SUCCEEDED":
        return COMPLETE
    Console(stderr=True).print(f"job {status.lower()}", style="yellow")
    return STOPPED if status == "STOPPED" else code or FAILED


def _variables(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as given, and NAME from this process's own."""
    found = {}
    for each in given:
        name, has_value, value = each.partition("=")
        if not name or not (has_value or name in os.environ):
            raise ConfigError(f"--env {each}: expected NAME=VALUE, or the name of a variable that is set here.")
        found[name] = value if has_value else os.environ[name]
    return found


def _sweep(given: dict[str, Any]) -> int:
    from fisher_ray.sweep import read_sweep, run_sweep

    sweep = read_sweep(given["config"])
    for config in sweep.points.values():
        _lasting(sweep.output, config.corpus)
    return run_sweep(sweep, _console())


if __name__ == "__main__":
    sys.exit(main())
