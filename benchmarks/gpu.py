"""Everything that has to be seen on a GPU, in one call, as a table.

    python benchmarks/gpu.py --output runs/gpu
    python benchmarks/gpu.py --output runs/gpu --device cpu --quick  # the same code on small shapes, anywhere

Writes ``gpu.md`` and ``gpu.json`` under ``--output``, anew after each section, so that a call that is cut off leaves what it
has measured; ``--sections`` chooses. A section that fails says why, the others go on, and the exit code is 1 at the end.

Nothing here needs Ray but two actors in the section ``bits``, which says so where it is not installed. The tests' section needs
pytest and beartype.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"  # the cluster is this machine's own

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pyarrow as pa
import torch
import transformers
from engine import measure, product
from families import FAMILIES, build
from peers import Workload, chosen, gpt2, hardware, in_own_process, interleaved, peak_memory, sweep, table
from precision import errors, read_sequences, scored
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fisher_ray import Deflated, Exact, ModelError, Sampled, SplitModel, attention, iter_scores, open_run, score_factors
from fisher_ray.dispatch import LocalPool
from fisher_ray.driver import run
from fisher_ray.kernels import flash_attends, on_tensor_cores
from fisher_ray.kernels import product as tensor_core_product
from fisher_ray.plan import RunConfig

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
DEMO = {"model": str(ROOT / "demo/model"), "corpus": (str(ROOT / "demo/corpus.jsonl"),)}

# The shape of Llama 3.2 1B.
_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True,
}  # fmt: skip
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    Attributes:
        gpt2: settings of GPT2Config.
        peers: the model they run on; None: GPT2Config() and random weights.
        engine: (batch, seq_len) of the engine's cases; the first with the exact estimator.
        llama: settings of the LlamaConfig whose share of the peak is measured, and (batch, seq_len).
        lengths: tokens of the sequences whose memory is measured, each twice the one before.
        families: compared with one-position autograd.
        documents: of the demo's corpus, for errors.
        max_docs: of the demo's corpus, for runs.
        tests: files run by pytest.
    """

    gpt2: dict[str, int]
    peers: str | None
    engine: tuple[tuple[int, int], ...]
    llama: dict[str, int]
    llama_tokens: tuple[int, int]
    lengths: tuple[int, ...]
    families: tuple[str, ...]
    documents: int
    max_docs: int
    tests: tuple[str, ...]
    repeats: int


FULL = Scale(
    gpt2={},
    peers=None,
    engine=((4, 128), (4, 512)),
    llama=_1B,
    llama_tokens=(64, 512),
    lengths=(1024, 2048, 4096, 8192),
    families=(
        "gpt2",
        "llama",
        "mistral",
        "qwen3",
        "gemma2",
        "gemma3",
        "gpt_neox",
        "phi",
        "gpt_oss",
        "mixtral",
        "deepseek_v3",
        "t5",
    ),
    documents=8,
    max_docs=30,
    tests=("tests/test_scores.py", "tests/test_devices.py", "tests/test_kernels.py", "tests/test_fused.py"),
    repeats=3,
)
QUICK = Scale(
    gpt2={"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 256},
    peers=DEMO["model"],
    engine=((2, 32),),
    llama=_TINY,
    llama_tokens=(2, 32),
    lengths=(256, 512),
    families=("gpt2", "gemma2"),
    documents=1,
    max_docs=16,
    tests=("tests/test_head.py",),
    repeats=1,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="a directory for gpu.md and gpu.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, not how fast")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)} (all)")
    args = parser.parse_args(argv)
    names = args.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--sections must be some of {', '.join(SECTIONS)}, got {unknown[0]!r}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda finds no GPU: torch.cuda.is_available() is false. Try --device cpu --quick.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device, scale = torch.device(args.device), QUICK if args.quick else FULL
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"device": hardware(device), "quick": args.quick, "versions": _versions(), "sections": {}}
    for name in names:
        results["sections"][name] = _section(SECTIONS[name], device, scale)
        (args.output / "gpu.json").write_text(json.dumps(results, indent=1))
        (args.output / "gpu.md").write_text(_markdown(results))
        print(_markdown_section(name, results["sections"][name]), flush=True)
    failed = [name for name, result in results["sections"].items() if result["error"]]
    print(f"failed: {', '.join(failed)}" if failed else "all sections ended well")
    return bool(failed)


def _section(section: Section, device: torch.device, scale: Scale) -> Row:
    """A section's rows as far as it came, the seconds it took, and why it ended early if it did."""
    rows: list[Row] = []
    error, start = None, time.monotonic()
    try:
        rows.extend(section(device, scale))
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}"
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    what = (section.__doc__ or "").strip()
    return {"what": what, "rows": rows, "seconds": round(time.monotonic() - start, 1), "error": error}


def _versions() -> dict[str, str]:
    cuda = {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        **(cuda if torch.cuda.is_available() else {}),
    }  # fmt: skip


# ---- sections ------------------------------------------------------------------------------------------------------------
#
# Each yields its rows; one that finds something wrong raises after the rows that show it.


def peaks(device: torch.device, scale: Scale) -> Iterator[Row]:
    """Large matrix products and a copy: what the device can do."""
    kinds = {"float32": (torch.float32, "highest"), "bfloat16": (torch.bfloat16, "highest")}
    if device.type == "cuda":
        kinds["TF32"] = (torch.float32, "high")
    for name, (dtype, precision) in kinds.items():
        with _products(precision):
            taken = interleaved({name: product(device, dtype)}, scale.repeats, device)[name]
        yield {"what": f"matrix product, {name}", "rate": f"{taken.flop / taken.seconds / 1e12:.2f} TFLOP/s"}
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = interleaved({"copy": lambda: target.copy_(source)}, scale.repeats, device)["copy"]
    yield {"what": "copy, read and written", "rate": f"{2 * source.nbytes / taken.seconds / 1e9:.0f} GB/s"}


def kernels(device: torch.device, scale: Scale) -> Iterator[Row]:
    """What is run in place of the engine's own way in bfloat16: whether it passed its trial here, its time over that of the
    other, and the relative errors of both against float64.
    """
    sizes, batch, seq_len = scale.llama, 4, scale.llama_tokens[1]
    d, heads, groups = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
    normal = {"device": device, "dtype": torch.bfloat16}

    weight = torch.randn(sizes["vocab_size"], d, **normal)
    states = torch.randn(256, d, **normal)
    prob = torch.rand(256, len(weight), device=device)
    for name, a, b in (("z W", states, weight.T), ("p W", prob, weight)):
        ways: dict[str, Callable[[], Tensor]] = {"converted": lambda a=a, b=b: a.float() @ b.float()}  # type: ignore[misc]
        if taken := on_tensor_cores(a, b):
            ways["tensor cores"] = lambda a=a, b=b: tensor_core_product(a, b)  # type: ignore[misc]
        yield {
            "what": f"{name}, float32 sums",
            "taken": str(taken),
            **_compared(ways, a.double() @ b.double(), scale, device),
        }

    query = torch.randn(batch, heads, seq_len, sizes["head_dim"], **normal).requires_grad_()
    key, value = (torch.randn(batch, groups, seq_len, sizes["head_dim"], **normal) for _ in range(2))

    def gradient(flash: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        q, k, v = (x.detach().to(dtype) for x in (query, key, value))
        seen = attention._Seen(None, (), None, seq_len, seq_len)
        with mock.patch.object(attention, "flash_attends", return_value=flash):
            leaf = q.requires_grad_()
            out = attention._OwnPosition.apply(leaf, k, v, k, v, seen, None, None, sizes["head_dim"] ** -0.5, None)
            return torch.autograd.grad(out, leaf, q.detach())[0]

    taken = flash_attends(query, value)
    attending = {"converted": lambda: gradient(False)} | ({"tensor cores": lambda: gradient(True)} if taken else {})
    found = _compared(attending, gradient(False, torch.float64), scale, device)
    yield {"what": "attention, forward pass and dq: flash against blocks", "taken": str(taken), **found}


def engine(device: torch.device, scale: Scale) -> Iterator[Row]:
    """The cases of benchmarks/engine.py in float32: rate, share of the float32 peak, and times ours, in time and in flop."""
    for i, (batch, seq_len) in enumerate(scale.engine):
        model = gpt2(**scale.gpt2).to(device)
        measured = measure(model, batch, seq_len, scale.repeats, exact=i == 0)
        for name, taken in measured.cases.items():
            yield {
                "tokens": f"{batch} x {seq_len}", "what": name, "positions/s": round(1 / taken.seconds, 2),
                "share of the peak": round(measured.share(name), 3),
            }  # fmt: skip
        for what, times, flop in measured.ratios():
            yield {"tokens": f"{batch} x {seq_len}", "what": what, "times": round(times, 2), "flop": round(flop, 2)}


def peers(device: torch.device, scale: Scale) -> Iterator[Row]:
    """The table of benchmarks/peers.py: times ours, in time and in flop, memory, and the error of F against float64."""
    workload = Workload(scale.peers, device.type, batch=4, seq_len=scale.engine[0][1], num_samples=8)
    rows = table(workload, chosen(exact=True), scale.repeats)
    for name, row in rows.items():
        ours = rows["ours, exact" if row.exact else "ours, sampled"].taken
        yield {
            "what": name, "ms a position": 1e3 * row.taken.seconds, "times": row.taken.seconds / ours.seconds,
            "flop": row.taken.flop / ours.flop, "MiB": row.memory / 2**20, "error of F": row.error,
        }  # fmt: skip


def llama(device: torch.device, scale: Scale) -> Iterator[Row]:
    """bfloat16 weights, all layers, S = 1, against the measured bfloat16 peak: scores alone and with the sums, as they are and
    with norms and MLPs compiled.
    """
    batch, seq_len = scale.llama_tokens
    peak = 0.0
    for compile in (False, True)[: 1 + (device.type == "cuda")]:  # a CPU may have no compiler
        model = _llama(scale.llama, device, torch.bfloat16)
        start = time.monotonic()
        split = SplitModel(model, check=False, compile=compile)  # families are what the section correctness checks
        made = time.monotonic() - start
        ids = torch.randint(split.head.vocab_size, (batch, seq_len), device=device)
        layers = list(range(split.num_layers + 1))
        cases: dict[str, Callable[[], object]] = {
            "matrix product": product(device, torch.bfloat16),
            "forward": torch.no_grad()(lambda: model(input_ids=ids, use_cache=False)),  # noqa: B023
            "scores": lambda: score_factors(split, ids, layers=layers, estimator=Sampled(1)),  # noqa: B023
            "scores and sums": lambda: sweep(split, ids, layers, Sampled(1)),  # noqa: B023
        }
        taken = interleaved(cases, scale.repeats, device)
        multiplied = taken.pop("matrix product")
        peak = peak or multiplied.flop / multiplied.seconds
        for name, each in taken.items():
            yield {
                "what": name, "compiled": f"in {made:.1f} s" if compile else "no",
                "tokens/s": round(ids.numel() / each.seconds),
                "GFLOP a token": each.flop / ids.numel() / 1e9, "share of the peak": round(each.flop / each.seconds / peak, 3),
            }  # fmt: skip


def estimators(device: torch.device, scale: Scale) -> Iterator[Row]:
    """bfloat16 weights, the middle layer, eight backward passes by different estimators, and the leading part alone."""
    batch, seq_len = max(1, scale.llama_tokens[0] // 4), scale.llama_tokens[1]
    split = SplitModel(_llama(scale.llama, device, torch.bfloat16), check=False)
    ids = torch.randint(split.head.vocab_size, (batch, seq_len), device=device)
    asked = (Sampled(8), Deflated(4, 4), Deflated(4, 0))
    cases = {repr(each): lambda each=each: sweep(split, ids, [split.num_layers // 2], each) for each in asked}
    for name, taken in interleaved(cases, scale.repeats, device).items():
        yield {"estimator": name, "tokens/s": round(ids.numel() / taken.seconds), "s": taken.seconds}


def streamed(device: torch.device, scale: Scale) -> Iterator[Row]:
    """The same model with sums, its weights on the device, and read from disk for each pass of a block."""
    ids = torch.randint(scale.llama["vocab_size"], scale.llama_tokens, device=device)
    layers = list(range(scale.llama["num_hidden_layers"] + 1))
    cases: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _llama(scale.llama, device, torch.bfloat16).save_pretrained(folder)
        for name, stream in (("on the device", False), ("on disk", True)):
            split = SplitModel.from_pretrained(
                folder, device=device, dtype="bfloat16", stream_weights=stream, check=False
            )
            cases[name] = lambda split=split: sweep(split, ids, layers, Sampled(1))  # type: ignore[misc]
        for name, taken in interleaved(cases, scale.repeats, device).items():
            yield {"weights": name, "tokens/s": round(ids.numel() / taken.seconds), "s": taken.seconds}


def precision(device: torch.device, scale: Scale) -> Iterator[Row]:
    """Relative Frobenius errors of each position's F, exact estimator, demo model, against float64 on the same device."""
    load = {"device": device}
    reference = SplitModel.from_pretrained(DEMO["model"], dtype="float64", **load)
    sequences = read_sequences(reference, DEMO["corpus"][0])[: scale.documents]
    truth = scored(reference, sequences, Exact())
    for dtype in ("float32", "bfloat16", "float16"):
        got = scored(SplitModel.from_pretrained(DEMO["model"], dtype=dtype, **load), sequences, Exact())
        yield {"weights": dtype, **errors(got, truth)}
    if device.type == "cpu":
        yield {"weights": "float32, TF32: a CPU has none"}
        return
    model = SplitModel.from_pretrained(DEMO["model"], **load)
    # The engine turns TF32 off; here its guards are exchanged.
    with (
        mock.patch.multiple("fisher_ray.scores", full_precision=_tf32),
        mock.patch.multiple("fisher_ray.split", full_precision=_tf32),
    ):
        yield {"weights": "float32, TF32", **errors(scored(model, sequences, Exact()), truth)}


def correctness(device: torch.device, scale: Scale) -> Iterator[Row]:
    """Tiny random models: own-position scores against one-position autograd on this device (the check that loading makes),
    worst relative errors; and exact F of float64 against the CPU's.
    """
    ids = torch.arange(1, 25).view(2, 12)
    wrong = []
    for name in scale.families:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            row: Row = {"family": name, "weights": str(dtype).removeprefix("torch.")}
            try:
                split = SplitModel(build(FAMILIES[name], dtype).to(device))
            except ModelError as error:
                wrong.append(f"{name}: {error}")
                yield {**row, "limit": "refused"}
                continue
            check = split.self_check
            assert check is not None
            row |= {"scores": check.scores, "replayed": check.replayed, "logits": check.logits, "limit": check.limit}
            if dtype == torch.float64 and not split.is_encoder_decoder:
                here, there = (_exact(model, ids) for model in (split, SplitModel(build(FAMILIES[name]), check=False)))
                row["against the CPU"] = float(((here - there).norm(dim=(1, 2)) / there.norm(dim=(1, 2))).max())
            yield row
            if row.get("against the CPU", 0.0) > 1e-6:  # softmaxes in float32 within float64 models
                wrong.append(f"{name} on {device} differs from the CPU by {row['against the CPU']:.2g}.")
    if wrong:
        raise AssertionError(" ".join(wrong))


def tests(device: torch.device, scale: Scale) -> Iterator[Row]:
    """The tests' own oracles with this machine's versions."""
    missing = [name for name in ("pytest", "beartype") if importlib.util.find_spec(name) is None]
    if missing:
        yield {"tests": " ".join(scale.tests), "result": f"not run: {missing[0]} is not installed"}
        return
    argv = [sys.executable, "-m", "pytest", "-x", *scale.tests]
    if importlib.util.find_spec("xdist") is not None:
        argv += ["-n", str(max(1, (os.cpu_count() or 1) // 2))]
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(argv, cwd=ROOT, env={**os.environ, "PYTHONPATH": found}, capture_output=True, text=True)
    yield {"tests": " ".join(scale.tests), "result": (ended.stdout.strip().splitlines() or [""])[-1]}
    if ended.returncode:
        raise AssertionError(ended.stdout[-2000:] + ended.stderr[-500:])


def memory(device: torch.device, scale: Scale) -> Iterator[Row]:
    """What scoring one sequence takes beyond the weights, all layers, S = 1, in one micro-batch: linear in its tokens?"""
    for dtype in (torch.float32, torch.bfloat16):
        before = None
        for seq_len in scale.lengths:
            taken = in_own_process(_scoring_memory, device, scale, device.type, seq_len, dtype)
            row: Row = {"weights": str(dtype).removeprefix("torch."), "tokens": seq_len, "MiB": round(taken / 2**20, 1)}
            row["KiB a token"] = round(taken / 2**10 / seq_len, 1)
            yield row if before is None else {**row, "times the length before": round(taken / before, 2)}
            before = taken


def bits(device: torch.device, scale: Scale) -> Iterator[Row]:
    """Whole runs of the demo in bfloat16, side by side: one killed with SIGKILL and gone on with, and one by two actors of Ray
    with half a GPU each, against the first; and on a GPU a compiled one, killed and gone on with, against another.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        names = ["first", "killed"] + ["compiled", "compiled and killed"] * (device.type == "cuda")
        configs = {
            name: changed(_demo(device, scale, Path(folder) / name), compile="compiled" in name) for name in names
        }
        done = dict(zip(names, pool.map(lambda name: _ended(configs[name], "killed" in name), names), strict=True))
        truth = _fingerprint(configs["first"])
        yield {"run": "the first", "result": f"{len(truth)} arrays and tables"}
        yield from _same(f"killed after {done['killed']} tasks, gone on with", configs["killed"], truth)
        yield from _two_actors(changed(configs["first"], output=f"{folder}/together"), device, truth)
        if "compiled" in names:
            what = f"compiled, killed after {done['compiled and killed']} tasks, gone on with"
            yield from _same(what, configs["compiled and killed"], _fingerprint(configs["compiled"]))


def _ended(config: RunConfig, killed: bool) -> int:
    """A run to its end, killed before if asked for, in processes of its own; the tasks done when it was killed."""
    if not killed:
        _in_process(config)
        return 0
    if _in_process(config, mortal=True) != -signal.SIGKILL:
        raise AssertionError("the run ended before it was killed; it has too few tasks.")
    done = len(list(Path(config.output).glob("done/*.json")))
    _in_process(config)
    return done


def _two_actors(config: RunConfig, device: torch.device, truth: dict[str, str]) -> Iterator[Row]:
    if importlib.util.find_spec("ray") is None:
        yield {"run": "two actors", "result": "not run: ray is not installed"}
        return
    from fisher_ray.cluster import RayPool

    share = 0.5 if device.type == "cuda" else 0.0
    together = changed(config, executor="ray", gpus_per_actor=share, max_actors=2)
    start = time.monotonic()
    outcome = run(together, RayPool)
    seconds = time.monotonic() - start
    yield from _same(
        f"two actors, {outcome.counts.scored / seconds:.0f} positions/s, their start included", together, truth
    )


Section = Callable[[torch.device, Scale], Iterator[Row]]
SECTIONS: dict[str, Section] = {
    section.__name__: section
    for section in (
        peaks,
        kernels,
        llama,
        estimators,
        streamed,
        memory,
        bits,
        engine,
        correctness,
        precision,
        tests,
        peers,
    )
}


# ---- parts of sections ---------------------------------------------------------------------------------------------------


def _compared(ways: dict[str, Callable[[], Tensor]], truth: Tensor, scale: Scale, device: torch.device) -> Row:
    """Of one that is always there, and of another in its place."""
    errors = [float((way().double() - truth).norm() / truth.norm()) for way in ways.values()]
    seconds = [taken.seconds for taken in interleaved(dict(ways), scale.repeats, device).values()]
    row: Row = {"error of the engine's own": errors[0]}
    return row if len(ways) == 1 else {**row, "error": errors[1], "time": seconds[1] / seconds[0]}


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """float32 products in full (``highest``) or through TF32 (``high``)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tf32() -> AbstractContextManager[None]:
    return _products("high")


def _llama(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=8192, attn_implementation="sdpa")
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _exact(split: SplitModel, ids: Tensor) -> Tensor:
    scores = score_factors(split, ids, layers=[0], estimator=Exact())
    return scores.matrices(0).cpu()


def _scoring_memory(scale: Scale, device: str, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes; the second time, after whatever is set up once."""
    sizes = scale.llama | {"num_hidden_layers": 2, "vocab_size": 1024}
    split = SplitModel(_llama(sizes, torch.device(device), dtype), check=False)
    ids = torch.randint(1024, (1, seq_len), device=device)
    layers = [0, 1, 2]

    def score(some: Tensor) -> None:
        for _ in iter_scores(split, some, layers=layers, estimator=Sampled(1), memory_budget=1 << 50):
            pass

    score(ids[:, :8])
    return peak_memory(lambda: score(ids), ids.device)[0]


def _demo(device: torch.device, scale: Scale, output: Path) -> RunConfig:
    return RunConfig(
        **DEMO, output=str(output), executor="local", device=device.type, dtype="bfloat16", max_docs=scale.max_docs,
        task_bytes=4000, cpus_per_actor=1,
    )  # fmt: skip


def _in_process(config: RunConfig, mortal: bool = False) -> int:
    """A run in a process of its own; its exit code, which is 0 unless it is killed."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(config, mortal))
    process.start()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise AssertionError(f"the run in {config.output} ended with exit code {process.exitcode}.")
    return process.exitcode


def _run(config: RunConfig, mortal: bool) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run(config, _Mortal if mortal else LocalPool)


class _Mortal(LocalPool):
    """Its process is killed after two calls."""

    _left = 2

    def wait(self, timeout: float) -> list[tuple[Any, Any]]:
        ended = super().wait(timeout)
        self._left -= len(ended)
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return ended


def _fingerprint(config: RunConfig) -> dict[str, str]:
    """Hashes of all reduced arrays and of each task's table of positions."""
    folder = Path(config.output)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("reduced/**/*.npy"))}
    opened = open_run(folder)
    for task in opened.done_tasks:
        sink = pa.BufferOutputStream()
        table = opened.table(task).replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        found[f"task {task}"] = sink.getvalue().to_pybytes()
    return {name: hashlib.sha256(raw).hexdigest() for name, raw in found.items()}


def _same(what: str, config: RunConfig, truth: dict[str, str]) -> Iterator[Row]:
    found = _fingerprint(config)
    other = sorted(name for name in truth.keys() | found.keys() if truth.get(name) != found.get(name))
    yield {
        "run": what,
        "result": f"{len(other)} of {len(truth)} differ, {other[0]} the first" if other else "the same bits",
    }
    if other:
        raise AssertionError(f"{what}: {len(other)} of {len(truth)} arrays and tables have other bits.")


# ---- the table -----------------------------------------------------------------------------------------------------------


def _markdown(results: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    scale = " Small shapes: figures mean nothing." if results["quick"] else ""
    head = f"# {results['device']}\n\n{versions}.{scale}\n\n"
    return head + "\n".join(_markdown_section(name, result) for name, result in results["sections"].items())


def _markdown_section(name: str, result: Row) -> str:
    lines = [f"## {name}", "", f"{' '.join(result['what'].split())} ({result['seconds']} s)", ""]
    columns = list(dict.fromkeys(column for row in result["rows"] for column in row))
    if columns:
        lines += [_line(columns), _line(["---"] * len(columns))]
        lines += [_line([_shown(row.get(column, "")) for column in columns]) for row in result["rows"]]
    if result["error"]:
        lines += ["", f"**Failed:** {result['error']}"]
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
