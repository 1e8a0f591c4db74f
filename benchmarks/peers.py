"""Other ways to the same matrices beside ours: time, memory, flop and error, on one model, the same tokens, in one run.

    python benchmarks/peers.py                         # GPT2Config(), random weights, 128 and 512 tokens
    python benchmarks/peers.py --model demo/model --seq-len 128

Times are medians of rounds in which everything takes its turn; what takes longer than 100 s runs once. Flop are those of
matrix products, counted as they run, attention over all keys. Memory and error come from one more run of each: by what its
resident memory grew in a process of its own, on a GPU the allocator's peak; and the median relative Frobenius error of F
against the exact one in float64. The peers run at four positions spread over the first sequence, the exact ones at its last,
and at the first length alone; ours at all positions of all sequences, the sums of F, F / tr F and h h^T included, the exact
one on the first sequence.

What a peer needs once a sequence (the keys and values of the context) is ready before it is timed. curvlinops takes part
where it can be imported; benchmarks/README.md says how to install it.

In the costs below N are the model's weights, N_upper those of the blocks above the layer, t a position and T the tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers import logging as transformers_logging

from fisher_ray import Exact, Sampled, Scores, SplitModel, iter_scores, score_factors
from fisher_ray.architecture import on_stream
from fisher_ray.estimators import Estimator
from fisher_ray.sums import Sums

# Cotangents that go back together under torch.func: more are no faster and take more memory.
_CHUNK = 64
# Seconds beyond which a case is run once: warming up is nothing beside them.
_LONG = 100.0


@dataclass
class Problem:
    """What every peer is given. Positions are those of the first sequence.

    Args:
        split: a model whose head is a plain unembedding, on its library's own attention.
        ids: [batch, seq].
        layer: whose stream is nudged.
        num_samples: S, tokens drawn a position by the sampled ones.
    """

    split: SplitModel
    ids: Tensor
    layer: int
    num_samples: int = 8

    def __post_init__(self) -> None:
        with torch.no_grad():
            self._cache = self.split.model(input_ids=self.ids[:1], use_cache=True).past_key_values

    def context(self, t: int, copies: int = 1) -> DynamicCache:
        """Keys and values of the first sequence before ``t``, so many times."""
        own = DynamicCache()
        for i, layer in enumerate(self._cache.layers):
            own.update(*(x[:, :, :t].expand(copies, -1, -1, -1) for x in (layer.keys, layer.values)), i)
        return own

    def at(self, t: int, copies: int = 1) -> dict[str, Any]:
        """Arguments that run the token at ``t`` alone over its context."""
        return {
            "input_ids": self.ids[:1, t : t + 1].expand(copies, -1),
            "position_ids": torch.full((copies, 1), t, device=self.ids.device),
            "past_key_values": self.context(t, copies),
            "use_cache": True,
        }

    def z(self, t: int, h: Tensor) -> Tensor:
        """The final hidden state [d_z] at ``t`` as a function of the stream there [d_model], the context constant."""
        with self.stream(lambda _: h.view(1, 1, -1)):
            return self.split.decoder(**self.at(t)).last_hidden_state[0, -1]

    def h(self, t: int) -> Tensor:
        """The stream at ``t``."""
        with torch.no_grad(), self.leaf() as leaves:
            self.split.decoder(**self.at(t))
        return leaves[0][0, -1].detach()

    @contextmanager
    def stream(self, put: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While in force, ``put`` replaces the stream that enters the layer's block."""
        handle = on_stream(self.split.blocks, self.layer, lambda _, stream: put(stream))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def leaf(self) -> Iterator[list[Tensor]]:
        """While in force, that stream is a leaf of the graph, and is found in the list."""
        leaves: list[Tensor] = []

        def put(stream: Tensor) -> Tensor:
            leaves.append(stream.detach().requires_grad_())
            return leaves[-1]

        with self.stream(put):
            yield leaves

    def drawn(self, log_p: Tensor) -> Tensor:
        """S tokens [..., S] from log p [..., vocab_size]."""
        return torch.multinomial(log_p.detach().exp(), self.num_samples, replacement=True)


# ---- ours ----------------------------------------------------------------------------------------------------------------


def sweep(split: SplitModel, ids: Tensor, layers: Sequence[int], estimator: Estimator) -> None:
    """Score all positions and add them up, as a worker does it: a micro-batch after the other, of which nothing is kept."""
    sums = Sums(layers, split.d_model, device=split.device)
    for scores in iter_scores(split, ids, layers=layers, estimator=estimator):
        _add(sums, scores)


def _add(sums: Sums, scores: Scores) -> None:
    for layer, factors in scores.factors.items():
        sums.add(layer, factors, scores.activations[layer])


def ours_sampled(problem: Problem, positions: Sequence[int]) -> Tensor:
    """One forward pass, and one backward pass a sample for all positions: ``2 (N + S N_upper)`` flop a position."""
    return _ours(problem, positions, problem.ids, Sampled(problem.num_samples))


def ours_exact(problem: Problem, positions: Sequence[int]) -> Tensor:
    """d_z cotangents a position, and ``2 V d_z^2`` flop for their matrix."""
    return _ours(problem, positions, problem.ids[:1], Exact())


def _ours(problem: Problem, positions: Sequence[int], ids: Tensor, estimator: Estimator) -> Tensor:
    scores = score_factors(problem.split, ids, layers=[problem.layer], estimator=estimator)
    _add(Sums([problem.layer], problem.split.d_model, device=ids.device), scores)
    factors = scores.factors[problem.layer]
    return _square(factors[torch.tensor(positions, device=factors.device)])


# ---- sampled -------------------------------------------------------------------------------------------------------------


def recomputed(problem: Problem, positions: Sequence[int]) -> Tensor:
    """One position at a time: a forward pass over its context anew, S backward passes.

    ``2 t (N + S N_upper)`` flop at position t.
    """
    found = []
    for t in positions:
        with problem.leaf() as leaves:
            logits = problem.split.model(input_ids=problem.ids[:1, : t + 1], use_cache=False, logits_to_keep=1).logits
        log_p = logits[0, -1].log_softmax(-1)
        found.append([_gradient(log_p[y], leaves[0])[0, -1] for y in problem.drawn(log_p)])
    return _mean_square(found)


def cached(problem: Problem, positions: Sequence[int]) -> Tensor:
    """One position at a time over cached keys and values, the S cotangents as a batch of copies of its token.

    ``2 S (N + N_upper)`` flop a position.
    """
    found = []
    for t in positions:
        with problem.leaf() as leaves:
            logits = problem.split.model(**problem.at(t, problem.num_samples)).logits[:, -1]
        log_p = logits.log_softmax(-1)
        drawn = problem.drawn(log_p[0])
        found.append(torch.autograd.grad(log_p.gather(1, drawn[:, None]).sum(), leaves[0])[0][:, -1])
    return _mean_square(found)


def one_graph(problem: Problem, positions: Sequence[int]) -> Tensor:
    """One forward pass over the sequence; a backward pass over all of it for each position and sample.

    All streams ``h_1 .. h_T`` at the layer are leaves. The gradient of ``log p(y_t)`` in them, read at ``t``, holds the other
    streams fixed: it is the isolated score. Its entries before ``t`` are computed and thrown away.
    ``2 T S N_upper`` flop a position.
    """
    with problem.leaf() as leaves:
        logits = problem.split.model(input_ids=problem.ids[:1], use_cache=False).logits[0]
    found = []
    for t in positions:
        log_p = logits[t].log_softmax(-1)
        found.append([_gradient(log_p[y], leaves[0])[0, t] for y in problem.drawn(log_p)])
    return _mean_square(found)


def jacrev_positions(problem: Problem, positions: Sequence[int]) -> Tensor:
    """``one_graph`` with the backward passes of all positions and samples as one batch, by ``torch.func.jacrev``.

    The same flop in larger products; memory for the activations of every cotangent. Batched gradients have no rule for
    fused attention: it runs as matrix products.
    """
    where = torch.tensor(positions, device=problem.ids.device)
    with problem.leaf() as leaves, torch.no_grad():
        log_p = problem.split.model(input_ids=problem.ids[:1], use_cache=False).logits[0, where].log_softmax(-1)
    drawn = problem.drawn(log_p)

    def log_probs(h: Tensor) -> Tensor:
        with problem.stream(lambda _: h[None]):
            logits = problem.split.model(input_ids=problem.ids[:1], use_cache=False).logits[0, where]
        return logits.log_softmax(-1).gather(1, drawn)

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(log_probs, chunk_size=_CHUNK)(leaves[0][0].detach())
    found = [jacobian[i, :, t] for i, t in enumerate(positions)]  # [n, S, seq, d_model], read at the own position
    return _mean_square(found)


# ---- exact ---------------------------------------------------------------------------------------------------------------


def reference(problem: Problem, positions: Sequence[int]) -> Tensor:
    """The published toolkit's way, written anew from its description: a forward pass over the context, d_z backward passes,
    the scores of all V tokens through them, their outer product.

    ``2 t (N + d_z N_upper) + 4 V d^2`` flop at position t.
    """
    found = []
    for t in positions:
        with problem.leaf() as leaves:
            z = problem.split.decoder(input_ids=problem.ids[:1, : t + 1], use_cache=False).last_hidden_state[0, -1]
        jacobian = torch.stack([_gradient(z[i], leaves[0])[0, -1] for i in range(len(z))])
        found.append(_chain(problem, z.detach(), jacobian))
    return torch.stack(found)


def jacrev(problem: Problem, positions: Sequence[int]) -> Tensor:
    """The same with the context's keys and values cached, and the d_z backward passes of its one token as batches.

    ``2 d_z N_upper + 4 V d^2`` flop a position.
    """
    found = []
    for t in positions:
        h = problem.h(t)
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.func.jacrev(lambda h, t=t: problem.z(t, h), chunk_size=_CHUNK)(h)
            found.append(_chain(problem, problem.z(t, h), jacobian))
    return torch.stack(found)


def curvlinops(problem: Problem, positions: Sequence[int]) -> Tensor:
    """curvlinops' generalised Gauss-Newton operator of ``h -> logits`` under cross-entropy, which is F, times the identity.

    Over cached keys and values; d_model products, each a forward-mode and a backward pass of one token:
    ``4 d_model (N_upper + V d)`` flop a position.
    """
    from curvlinops import GGNLinearOperator

    found = []
    for t in positions:
        upper = _Upper(problem, t)
        data = [(problem.ids[:1, t : t + 1], torch.zeros(1, dtype=torch.long, device=problem.ids.device))]
        loss = nn.CrossEntropyLoss(reduction="sum")
        with sdpa_kernel(SDPBackend.MATH):
            operator = GGNLinearOperator(upper, loss, [upper.h], data, check_deterministic=False)
            columns = torch.eye(problem.split.d_model, dtype=upper.h.dtype, device=upper.h.device).split(_CHUNK, 1)
            found.append(torch.cat([operator @ some for some in columns], 1).detach())
    return torch.stack(found)


class _Upper(nn.Module):
    """The model at one position as a module whose one parameter is the stream there."""

    def __init__(self, problem: Problem, t: int):
        super().__init__()
        self.h = nn.Parameter(problem.h(t))
        self._logits = lambda h: problem.split.model.get_output_embeddings()(problem.z(t, h))[None]

    def forward(self, _: Tensor) -> Tensor:
        return self._logits(self.h)


def _chain(problem: Problem, z: Tensor, jacobian: Tensor) -> Tensor:
    """F from dz/dh [d_z, d_model]: scores of all tokens [V, d_model], and their weighted outer product."""
    weight = problem.split.model.get_output_embeddings().weight
    p = (weight @ z).softmax(-1)
    rows = weight @ jacobian
    scores = rows - p @ rows
    return scores.T @ (p[:, None] * scores)


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def _square(factors: Tensor) -> Tensor:
    return factors.mT @ factors


def _mean_square(scores: Sequence[Tensor] | Sequence[Sequence[Tensor]]) -> Tensor:
    """Means [n, d_model, d_model] of the outer products of S scores at each of n positions."""
    each = torch.stack([found if isinstance(found, Tensor) else torch.stack(list(found)) for found in scores])
    return _square(each) / each.shape[1]


# ---- the table -----------------------------------------------------------------------------------------------------------

Peer = Callable[[Problem, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Case:
    """A way to F. ``covers`` is what it computes of everything: ``batch``, ``sequence``, or the positions asked for."""

    run: Peer
    exact: bool = False
    covers: str = "positions"

    def positions(self, problem: Problem) -> list[int]:
        """Where its matrices are looked at: four places, or for an exact peer the last alone."""
        spread = torch.linspace(1, problem.ids.shape[1] - 1, 4).long().tolist()
        return spread[-1:] if self.exact and self.covers == "positions" else spread

    def count(self, problem: Problem) -> int:
        """Positions that one run of it computes."""
        batch, seq_len = problem.ids.shape
        return {"batch": batch * seq_len, "sequence": seq_len}.get(self.covers, len(self.positions(problem)))


CASES = {
    "ours, sampled": Case(ours_sampled, covers="batch"),
    "cached keys and values, samples batched": Case(cached),
    "one position, context recomputed": Case(recomputed),
    "one graph, a backward pass each": Case(one_graph),
    "one graph, jacrev over positions": Case(jacrev_positions),
    "ours, exact": Case(ours_exact, exact=True, covers="sequence"),
    "cached, jacrev of z": Case(jacrev, exact=True),
    "cached, curvlinops GGN": Case(curvlinops, exact=True),
    "the reference's way": Case(reference, exact=True),
}


@dataclass(frozen=True)
class Workload:
    """What to build a :class:`Problem` from, in this process or another."""

    model: str | None
    device: str
    batch: int
    seq_len: int
    num_samples: int

    def problem(self, dtype: torch.dtype = torch.float32) -> Problem:
        split = self._split(dtype)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(split.head.vocab_size, (self.batch, self.seq_len), generator=generator)
        if split.max_positions is not None and self.seq_len > split.max_positions:
            raise ValueError(f"--seq-len must be at most {split.max_positions}, got {self.seq_len}.")
        return Problem(split, ids.to(split.device), split.num_layers // 2, self.num_samples)

    def _split(self, dtype: torch.dtype) -> SplitModel:
        if self.model is not None:
            return SplitModel.from_pretrained(self.model, device=self.device, dtype=dtype, check=False)
        return SplitModel(gpt2().to(self.device, dtype), check=False)


def gpt2(**sizes: int) -> GPT2LMHeadModel:
    """A model of GPT-2 small's size unless told otherwise, random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="sdpa")).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a local directory (GPT2Config(), random weights)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = torch.device(args.device)
    print(f"{hardware(device)}; torch {torch.__version__}; {args.model or 'GPT2Config()'}; S = {args.num_samples}")
    for i, seq_len in enumerate(args.seq_len):
        workload = Workload(args.model, args.device, args.batch, seq_len, args.num_samples)
        try:
            rows = table(workload, chosen(exact=i == 0), args.repeats)
        except ValueError as error:  # a ModelError too
            parser.error(str(error))
        report(workload, rows)


def chosen(exact: bool) -> dict[str, Case]:
    """The cases that can be imported, with or without the exact ones."""
    there = importlib.util.find_spec("curvlinops") is not None
    return {
        name: case
        for name, case in CASES.items()
        if (exact or not case.exact) and (there or case.run is not curvlinops)
    }


@dataclass(frozen=True)
class Row:
    """What a case takes a position, the memory of all of it in bytes, and the median error of F."""

    taken: Taken
    memory: int
    error: float
    exact: bool


def table(workload: Workload, cases: Mapping[str, Case], repeats: int = 3) -> dict[str, Row]:
    """Every case measured."""
    device = torch.device(workload.device)
    apart = {name: in_own_process(_memory_and_matrices, device, workload, name) for name in cases}
    problem = workload.problem()
    truth = _truth(workload)
    runs = {name: (lambda case=case: case.run(problem, case.positions(problem))) for name, case in cases.items()}
    taken = interleaved(runs, repeats, device)
    rows = {}
    for name, case in cases.items():
        memory, matrices = apart[name]
        got, expected = matrices.double(), truth[-len(matrices) :]
        errors = (got - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        rows[name] = Row(
            taken[name] * (1 / case.count(problem)), memory, statistics.median(errors.tolist()), case.exact
        )
    return rows


def _truth(workload: Workload) -> Tensor:
    """Exact F at the four positions in float64, by the cached Jacobian, which shares nothing with ours."""
    problem = workload.problem(torch.float64)
    return jacrev(problem, CASES["ours, exact"].positions(problem)).cpu()


def report(workload: Workload, rows: Mapping[str, Row]) -> None:
    print(f"\n{workload.batch} x {workload.seq_len} tokens")
    print(f"{'':40s} {'ms a position':>13s} {'x ours':>8s} {'flop, x ours':>12s} {'MiB':>7s} {'error of F':>10s}")
    for name, row in rows.items():
        a, b = row.taken, rows["ours, exact" if row.exact else "ours, sampled"].taken
        print(
            f"{name:40s} {1e3 * a.seconds:13.1f} {a.seconds / b.seconds:8.1f} {a.flop / b.flop:12.1f} "
            f"{row.memory / 2**20:7.0f} {row.error:10.2g}",
            flush=True,
        )


# ---- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """Seconds and flop of one run of a case, or of a position of it."""

    seconds: float
    flop: float

    @property
    def rate(self) -> float:
        """flop/s."""
        return self.flop / self.seconds

    def __mul__(self, times: float) -> Taken:
        return Taken(self.seconds * times, self.flop * times)

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.seconds + other.seconds, self.flop + other.flop)


def interleaved(cases: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Taken]:
    """Each case over rounds in which they take turns: median seconds, and the flop of a run before.

    Two runs come first, and flop are those of the second, without what is set up once. A long case has one run, in which they
    are counted too; that costs some microseconds an operation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    flop = {}
    for name, case in cases.items():
        took, flop[name] = _counted(case, device)
        if took > _LONG:
            seconds[name].append(took)
        else:
            _, flop[name] = _counted(case, device)
    short = {name: case for name, case in cases.items() if not seconds[name]}
    for _ in range(repeats):
        for name, case in short.items():
            seconds[name].append(timed(case, device))
    return {name: Taken(statistics.median(seconds[name]), flop[name]) for name in cases}


def _counted(case: Callable[[], object], device: torch.device) -> tuple[float, int]:
    with torch.compiler.set_stance("force_eager"), _Counter() as counter:  # compiled, products are called otherwise
        seconds = timed(case, device)
    return seconds, counter.flop


def timed(case: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    _synchronize(device)
    start = time.perf_counter()
    case()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class _Counter(TorchDispatchMode):
    """Flop of matrix products, two a multiply-add, attention over all keys, by torch's own formulas.

    Its FlopCounterMode hooks graphs for a table by module, which some passes refuse.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FLOP.get(func.overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    # The scores again, and a product for the gradient of each of p, v, q and k.
    return _attention(query, key, value) * 5 // 2


# torch itself counts fused attention on GPUs alone, and not in every version where keys have fewer heads than queries.
_FLOP = dict(flop_registry)
for _kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    _FLOP[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}")] = _attention
    _FLOP[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}_backward")] = _attention_backward


def peak_memory(case: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """Bytes that memory grew by during a call, at most, and what it gave.

    On a CPU resident memory, which keeps what was freed: for a process of its own.
    """
    before = torch.cuda.memory_allocated() if device.type == "cuda" else _resident("VmRSS")
    highest, result = highest_memory(case, device)
    return highest - before, result


def highest_memory(case: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """Bytes that this process, or the GPU's allocator, held at most during a call, and what it gave."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = case()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), result
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
    result = case()
    return _resident("VmHWM"), result


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def in_own_process(function: Callable[..., Any], device: torch.device, *args: Any) -> Any:
    """The call's result; on a CPU from a process of its own, where no other case has left memory behind."""
    if device.type == "cuda":
        return function(*args)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _memory_and_matrices(workload: Workload, name: str) -> tuple[int, Tensor]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    problem, case = workload.problem(), CASES[name]
    return peak_memory(lambda: case.run(problem, case.positions(problem)).cpu(), problem.ids.device)


def hardware(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
