"""What a run costs, known from a model's configuration: no weights are read and nothing is computed.

A model on torch's meta device runs the engine's own passes over shapes alone. The flop of their matrix products and the
bytes that their graphs keep are counted there, not modelled, so they hold for every architecture the engine runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fisher_ray.architecture import ModelError, meta_model
from fisher_ray.draws import Draws
from fisher_ray.estimators import Estimator, Exact
from fisher_ray.footprint import Footprint, LiveBytes
from fisher_ray.scores import Pass, TokenSource
from fisher_ray.sketch import sketch_flop
from fisher_ray.spectrum import factor_eigenvalues
from fisher_ray.split import Gradients, SplitModel
from fisher_ray.sums import square_flop, sums_memory
from fisher_ray.tape import Walk

Save = Literal["summary", "factors", "matrices"]

# The least text of a task: smaller ones cost more in files and reading than they save in lost work. Of a corpus with fewer
# than 32 such tasks, which are the blocks that standard errors come from, the least of a block: it cannot cost much there.
MIN_TASK_BYTES = 1 << 15
MIN_BLOCK_BYTES = 1 << 12
# Factors and matrices of one task are held in memory until it is written.
TASK_ARRAY_BYTES = 1 << 28
# Most of a task's time that writing its sums may take, the longest task in seconds (it is what a killed worker loses),
# and the blocks that a corpus should give for standard errors of the reduced figures.
_WRITING, _LONGEST, _BLOCKS = 0.05, 600.0, 32
_TEXT_BYTES_PER_TOKEN = 4.0
# Tasks are part of what a run is, so their size must not depend on the very machine: nominal flop/s and bytes/s to storage.
# A CPU core with a local disk, or a GPU with an object store.
_NOMINAL = {"cpu": (60e9, 100e6), "cuda": (100e12, 200e6)}

# Measured: a row of the demo's table of positions, compressed; text, document and carried columns repeat from layer to
# layer and compress away.
_ROW_BYTES = 40.0
# Measured: the eigenvalues of a position's matrix take the time of 5 n^3 flop of matrix products (n = 768, one core).
_EIGENVALUE_FLOP = 5.0
# Measured: the interpreter with torch and transformers; a GPU's context takes about as much there.
_PROCESS_BYTES = 450 << 20
# Children of a node of the reduction tree, and so the blocks that standard errors are computed from.
FAN_IN = 32
# Bytes of packed sums that one call adds up a child, and arrays of a mean.
_CALL_BYTES = 1 << 28
_ARRAYS = 7


def least_task_bytes(total_bytes: int) -> int:
    """Bytes of text that a task has at least: ``MIN_TASK_BYTES``, or a 32nd of a small corpus, at least ``MIN_BLOCK_BYTES``."""
    return min(MIN_TASK_BYTES, max(MIN_BLOCK_BYTES, _block(total_bytes)))


def _block(total_bytes: int) -> int:
    return -(-total_bytes // _BLOCKS)  # rounded down, they would leave a remainder that is a task more


@dataclass(frozen=True)
class Hardware:
    """One device: what it holds and how fast the engine's matrix products run on it.

    Attributes:
        memory: bytes that a process can have.
        peak: flop/s of dense products by dtype; float32 without TF32, which the engine turns off.
        share: of those peaks, what is reached.
    """

    name: str
    memory: int
    peak: Mapping[str, float] = field(hash=False)
    share: Mapping[str, float] = field(hash=False)

    def rate(self, dtype: str) -> float:
        """flop/s that products in ``dtype`` reach."""
        kind = "float32" if dtype in ("float32", "float64") else "bfloat16"
        return self.share[kind] * self.peak[kind]

    def measured(self, tflops: float) -> Hardware:
        """The same device at a rate that was measured, in 1e12 flop/s."""
        return replace(self, peak=dict.fromkeys(self.peak, tflops * 1e12), share=dict.fromkeys(self.peak, 1.0))


def _gpu(name: str, gib: int, float32: float, bfloat16: float) -> Hardware:
    return Hardware(name, gib << 30, {"float32": float32 * 1e12, "bfloat16": bfloat16 * 1e12}, _GPU_SHARE)


# Dense peaks and memory from NVIDIA's data sheets (L4; A10G as in AWS's G5; A100 80 GB SXM; H100 SXM; H200 SXM), memory less
# what the driver keeps. The shares are those of an H200 (benchmarks/README.md: GPT-2 in float32 0.47 to 0.49, a 1B shape in
# bfloat16 0.36, with --compile 0.43); that others reach as much is an ASSUMPTION. The CPU is one core of a Zen 4 server, its
# peak and share measured by benchmarks/engine.py, with half precision taken to be no faster.
_GPU_SHARE = {"float32": 0.48, "bfloat16": 0.36}
HARDWARE: dict[str, Hardware] = {
    "cpu": Hardware("cpu", 4 << 30, *(dict.fromkeys(("float32", "bfloat16"), x) for x in (82e9, 0.98))),
    "l4": _gpu("l4", 22, 30.3, 121),
    "a10g": _gpu("a10g", 22, 35, 70),
    "a100": _gpu("a100", 79, 19.5, 312),
    "h100": _gpu("h100", 79, 67, 989),
    "h200": _gpu("h200", 139, 67, 989),
}


class _NoValues(TorchDispatchMode):
    """On the meta device whatever asks for a value is told 1: keys and values count as finite, matrices as definite."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


class _Outline(SplitModel):
    """A split model on the meta device: its passes have shapes, graphs and flop, but no values."""

    @cached_property
    def footprint(self) -> Footprint:
        with _NoValues():
            return super().footprint

    def _live_bytes(self) -> LiveBytes:
        # Batched products gather the weights of each token's experts, which the grouped products of a real run do not.
        experts = {frozenset(p.shape[1:]) for p in self.blocks.parameters() if p.ndim == 3}
        own = (*self.model.parameters(), *self.model.buffers())
        return LiveBytes(own, lambda tensor: tensor.ndim == 3 and frozenset(tensor.shape[1:]) in experts)


def outline(
    name: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    gradients: Gradients = "own_position",
    stream_weights: bool = False,
) -> SplitModel:
    """A model's shapes, read from its configuration: what :class:`Cost` counts on. It cannot compute."""
    model = _Outline(meta_model(name, dtype, revision, trust_remote_code), gradients=gradients, check=False)
    model.streamed = stream_weights
    return model


class Traffic(NamedTuple):
    """Requests to storage, and the bytes that they read and write."""

    gets: int
    puts: int
    read: float
    written: float


class _Work(NamedTuple):
    """Matrix-product flop: in the model, at its dtype's speed; mixed, of logits, mean row and sums; and in float32 always."""

    model: float
    mixed: float
    float32: float


@dataclass(frozen=True)
class Cost:
    """What a run costs: flop, memory and storage.

    Tokens are those that go through the model: windows repeat some of a document's. Full windows are assumed, and for an
    encoder-decoder texts of its encoder that are as long.

    Args:
        model: from :func:`outline`.
        layers: streams, ascending.
        estimator: its R cotangents a position.
        max_seq_len: tokens a window.
        batch_tokens: tokens that go through the model together.
        token_source, token_draws: see :func:`fisher_ray.score_factors`.
        save: arrays of every position that are kept.
        num_groups: groups of positions with sums of their own.
        sketch: rows of the sketches kept of the sums; None: the sums in full.
        share: of the tokens, how many are scored.
    """

    model: SplitModel
    layers: tuple[int, ...]
    estimator: Estimator
    max_seq_len: int = 512
    batch_tokens: int = 4096
    token_source: TokenSource = "observed"
    token_draws: int = 1
    save: Save = "summary"
    num_groups: int = 1
    sketch: int | None = None
    share: float = 1.0

    # ---- computing ---------------------------------------------------------------------------------------------------

    @property
    def flop_per_token(self) -> float:
        """flop of the matrix products: passes, logits and cotangents, the sums of F, F / tr F and h h^T.

        With P flop a token and forward pass, B a token and backward pass from the lowest layer, all positions scored and
        sampled: ``P + R B + 4 V d + L (2 R + 1) d (d + w)`` with strips of w columns, see :func:`fisher_ray.sums.square_flop`.
        """
        return sum(self._work)

    def seconds(self, tokens: float, hardware: Hardware) -> float:
        """Time to compute ``tokens`` on one device: the products at its speed, and the eigenvalues of each position."""
        return tokens * self._seconds_per_token(hardware.rate(self._dtype), hardware.rate("float32"))

    def gpu_hours(self, tokens: float, hardware: Hardware) -> float:
        """The same in hours."""
        return self.seconds(tokens, hardware) / 3600

    # ---- storage -----------------------------------------------------------------------------------------------------

    @property
    def sums_bytes(self) -> int:
        """Written once a task: packed float32 triangles of three matrices, or sketches that are full, and the sum of h in
        float64."""
        d = self.model.d_model
        headers = (2000 if self.sketch is None else 4625) * len(self.layers)  # of an .npz each
        counts = 8 * (4 if self.sketch is None else 13)  # of positions; of a sketch its rows, trace and loss as well
        return self._streams * (4 * self._matrix_numbers + 8 * d + counts) + headers

    @property
    def position_bytes(self) -> float:
        """Written a scored position: a row of the table for each layer, and the factors or matrices asked for."""
        return len(self.layers) * (_ROW_BYTES + 4 * self._saved_rows * self.model.d_model)

    def reduced_bytes(self, num_tasks: int = 1) -> int:
        """Written by the reduction: four float64 matrices and three vectors a layer and group, and the nodes of the tree.

        A node holds the packed float64 sums of up to 32 tasks or nodes; that of all tasks is not stored.
        """
        d = self.model.d_model
        rank = d if self.sketch is None else self.sketch
        arrays = 8 * (4 * rank * d + 2 * rank + d) + _ARRAYS * 128  # an .npy's header
        return self._streams * arrays + _inner_nodes(num_tasks) * self._node_bytes

    @property
    def requests(self) -> int:
        """Files written a task: table and receipt, and for each layer the sums and the arrays asked for."""
        return 2 + len(self.layers) * (1 if self.save == "summary" else 2)

    @property
    def layers_per_call(self) -> int:
        """Layers that one call of the reduction adds up."""
        return max(1, _CALL_BYTES // max(1, self.sums_bytes // len(self.layers)))

    def reduction(self, num_tasks: int) -> Traffic:
        """Of the tree of sums: every task's and every node's are read once, with their receipts, by the node above.

        With n inner nodes, L layers and c calls for them, (tasks + n) (L + c) reads, and n (L + c) writes beside the means;
        bytes are without receipts.
        """
        layers, nodes = len(self.layers), _inner_nodes(num_tasks)
        files = layers - (-layers // self.layers_per_call)  # of a node: sums, and a receipt a call
        read = num_tasks * self.sums_bytes + nodes * self._node_bytes
        means = _ARRAYS * (self._streams if self.sketch is None else layers)
        return Traffic((num_tasks + nodes) * files, nodes * files + means, read, self.reduced_bytes(num_tasks))

    # ---- memory ------------------------------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """The model's parameters and buffers, tied ones once; of streamed blocks the largest."""
        whole = _weights(self.model.model)
        if not self.model.streamed:
            return whole
        blocks = [_weights(block) for block in self.model.blocks]
        return whole - sum(blocks) + max(blocks)

    @property
    def sums_memory(self) -> int:
        """The sums that a worker holds: float64 squares, or sketches that are full."""
        return self._streams * sums_memory(self.model.d_model, self.sketch)

    @property
    def graph_bytes_per_token(self) -> float:
        """What the graph of one token keeps, as the engine reckons it when it cuts micro-batches."""
        return self.model.graph_bytes(self.max_seq_len, self.layers[0])

    @property
    def resident_bytes(self) -> int:
        """What a worker holds beside a micro-batch: libraries, weights, sums."""
        return _PROCESS_BYTES + self.weight_bytes + self.sums_memory

    def memory(self, positions: int, budget: int = 0) -> int:
        """Bytes that a worker takes with micro-batches of so many scored positions.

        Fewer than a window has are a block of one window's; more are whole windows. A ``budget`` for micro-batches that holds
        the graph of a whole model has the engine keep it; by default it keeps one block's at a time, the least there is.
        """
        wanted = self._scored[-positions:]
        windows = max(1, -(-positions // len(self._scored)))
        return self.resident_bytes + int(self._pass(1, budget).memory([0] * windows, [wanted] * windows))

    def micro_batch(self, memory_bytes: int) -> int:
        """Scored positions in one micro-batch of a worker with so much memory; 0 where not even one fits."""
        if self.memory(1) > memory_bytes:
            return 0
        windows = self._windows
        cut = self._pass(windows, memory_bytes - self.resident_bytes).batches([self._scored] * windows)
        return sum(map(len, next(cut).positions))

    def fits(self, hardware: Hardware, gpus: int = 1) -> str | None:
        """None where ``gpus`` devices an actor can score a position, else one line: what is too large and what would do.

        The CPU is one core with 4 GiB; where more is known, pass ``replace(HARDWARE["cpu"], memory=...)``.
        """
        room = gpus * hardware.memory
        if self.memory(1) <= room:
            return None
        graph = self.memory(1) - self.resident_bytes
        parts = {"weights": self.weight_bytes, "sums": self.sums_memory, "the graph of one position": graph}
        named = ", ".join(f"{_gib(size)} for {part}" for part, size in parts.items())
        device = hardware.name if gpus == 1 else f"{gpus} x {hardware.name}"
        return (
            f"{self.model.name} needs {_gib(self.memory(1))} of memory ({named}); {device} has {_gib(room)}. "
            f"What would fit: {'; '.join(self._remedies(hardware, gpus)) or 'none of fewer layers, more or larger GPUs'}."
        )

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def slowest_seconds_per_byte(self, device: Literal["cpu", "cuda"]) -> float:
        """Time for a byte of a task's text on the slowest device of a kind that is known."""
        known = (hardware for name, hardware in HARDWARE.items() if (name == "cpu") == (device == "cpu"))
        return max(self.seconds(1.0, hardware) for hardware in known) / _TEXT_BYTES_PER_TOKEN

    def task_bytes(self, device: Literal["cpu", "cuda"], total_bytes: int) -> int:
        """Bytes of text a task, from nominal speeds.

        Enough that writing the sums takes at most 5 % of computing them, unless that would take more than 10 minutes; at
        most a 32nd of the corpus; at least :func:`least_task_bytes`, or what takes 10 minutes where that is less, as exact
        matrices do; and never more than the memory for a task's arrays holds.
        """
        rate, storage = _NOMINAL[device]
        seconds_per_byte = self._seconds_per_token(rate, rate) / _TEXT_BYTES_PER_TOKEN
        wanted = self.sums_bytes / storage / _WRITING / seconds_per_byte
        longest = _LONGEST / seconds_per_byte
        least = min(least_task_bytes(total_bytes), max(256, longest))
        bounded = max(least, min(wanted, longest, _block(total_bytes)))
        if self._saved_rows:
            token = 4 * self._saved_rows * self.model.d_model * len(self.layers) * self.share
            bounded = min(bounded, TASK_ARRAY_BYTES / token * _TEXT_BYTES_PER_TOKEN)
        return max(1, int(bounded))

    # ---- the engine's own way, over shapes ---------------------------------------------------------------------------

    @property
    def _dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def _streams(self) -> int:
        return self.num_groups * len(self.layers)

    @property
    def _matrix_numbers(self) -> int:
        """Of the three matrices of a layer and group."""
        d = self.model.d_model
        return 3 * d * (d + 1) // 2 if self.sketch is None else 3 * self.sketch * d

    @property
    def _node_bytes(self) -> int:
        """Of an inner node of the tree: packed float64 sums."""
        return self._streams * 8 * (self._matrix_numbers + self.model.d_model)

    @property
    def _windows(self) -> int:
        return max(1, self.batch_tokens // self.max_seq_len)

    @property
    def _scored(self) -> list[int]:
        """Positions of a window, spread evenly up to its last."""
        length = self.max_seq_len
        count = min(length, max(1, round(self.share * length)))
        return [length - 1 - i * length // count for i in reversed(range(count))]

    @property
    def _rows(self) -> int:
        """Rows of a position's factors; the mean over several tokens has at most d_model."""
        stacked = self.token_draws * self.estimator.num_factors(self.model.head.vocab_size, self.model.head.d_z)
        return stacked if self.token_draws == 1 else min(stacked, self.model.d_model)

    @property
    def _saved_rows(self) -> int:
        return {"summary": 0, "factors": self._rows, "matrices": self.model.d_model}[self.save]

    def _pass(self, windows: int, budget: int = 0) -> Pass:
        """The engine's own reckoning for so many full windows."""
        return Pass(
            model=self.model,
            rows=[torch.empty(self.max_seq_len, dtype=torch.int64, device="meta")] * windows,
            following=[-1] * windows,
            layers=list(self.layers),
            estimator=self.estimator,
            draws_tokens=self.token_source == "sampled",
            num_token_draws=self.token_draws,
            token_top_p=1.0,
            token_temperature=1.0,
            keys=torch.empty(windows, 2, dtype=torch.int64, device="meta"),
            encoder=None,
            encoder_mask=None,
            budget=budget,
        )

    @cached_property
    def _work(self) -> _Work:
        """flop a token, in a batch of full windows that memory does not cut."""
        model, seq_len, scored = self.model, self.max_seq_len, self._scored
        pass_ = self._pass(self._windows)
        queries = len(scored) * self.token_draws
        copies = 1
        ids = torch.zeros(1, seq_len, dtype=torch.long, device="meta")
        with _counted(model.name) as forward:
            encoded = model.encode(ids) if model.is_encoder_decoder else {}
            if model.gradients == "own_position" and pass_.whole([*range(self._windows)], [scored] * self._windows):
                tape = model.own_tape(ids, encoded, self.layers, (ids[0], ids[0]))
            else:
                tokens = seq_len if model.gradients == "per_position" else 1  # of a query
                copies = pass_.copies(queries * self._windows * tokens)
                queries *= copies
                zeros = torch.zeros(queries, dtype=torch.long, device="meta")
                if model.gradients == "per_position":
                    if self.token_source == "sampled":
                        model.states(ids, encoded)
                    each = {name: value.expand(queries, *value.shape[1:]) for name, value in encoded.items()}
                    tape = model.alone_tape(ids.expand(queries, -1), each, self.layers, zeros)
                else:
                    context, _ = model.record(ids, encoded)
                    at = torch.tensor(scored).repeat_interleave(queries // len(scored))[None]
                    tape = model.replay_tape(zeros[None], at, context, encoded, self.layers, (zeros, zeros))
        with _counted(model.name) as once:
            list(tape.pull_each([tape.z]))
        first = backward = once.get_total_flops()
        if isinstance(tape, Walk):  # which runs the blocks again, once for all that is pulled
            with _counted(model.name) as twice:
                list(tape.pull_each([tape.z] * 2))
            backward = twice.get_total_flops() - first
        pulls = -(-pass_.num_factors // copies)
        window = forward.get_total_flops() + first + (pulls - 1) * backward
        mixed, float32 = self._outside
        return _Work(window / seq_len, len(scored) / seq_len * mixed, len(scored) / seq_len * float32)

    @cached_property
    def _outside(self) -> tuple[float, float]:
        """flop of one scored position outside the model, mixed and float32."""
        head, d, draws, layers = self.model.head, self.model.d_model, self.token_draws, len(self.layers)
        at = torch.zeros(draws, dtype=torch.int64, device="meta")
        keys = torch.zeros(draws, 2, dtype=torch.int64, device="meta")
        z = torch.empty(draws, head.d_z, device="meta")
        factors = torch.empty(draws, self._pass(1).num_factors, d, device="meta")
        # What a tolerance leaves out is known from values only: this is the most.
        estimator = Exact() if isinstance(self.estimator, Exact) else self.estimator
        with _counted(self.model.name) as once, torch.no_grad():
            estimator.cotangents(head.predict(z), Draws(keys, at, at, "score"))
            if self.token_source == "sampled":
                head.predict(z[:1])
        with _counted(self.model.name) as each_layer, torch.no_grad():
            factor_eigenvalues(self._pass(1).averaged(factors, draws))
        logits_and_mean = 4.0 * draws * head.vocab_size * head.d_z
        row = square_flop(d) if self.sketch is None else sketch_flop(self.sketch, d)
        sums, matrices = (2 * self._rows + draws) * row, 2.0 * self._rows * d * d if self.save == "matrices" else 0.0
        in_float32 = once.get_total_flops() - logits_and_mean + layers * (each_layer.get_total_flops() + matrices)
        if self.sketch is None:
            return logits_and_mean + layers * sums, in_float32
        return logits_and_mean, in_float32 + layers * sums

    def _seconds_per_token(self, model_rate: float, float32_rate: float) -> float:
        eigenvalues = _EIGENVALUE_FLOP * len(self.layers) * self.share * min(self._rows, self.model.d_model) ** 3
        mixed_rate = float32_rate
        if self.model.dtype == torch.bfloat16:  # one or two products in bfloat16, where tensor cores are
            mixed_rate = max(mixed_rate, model_rate / 2)
        work = self._work
        return work.model / model_rate + work.mixed / mixed_rate + (work.float32 + eigenvalues) / float32_rate

    def _remedies(self, hardware: Hardware, gpus: int) -> Iterator[str]:
        """What would fit, from what changes least."""
        room = gpus * hardware.memory
        for count in range(len(self.layers) - 1, 0, -1):
            if replace(self, layers=self.layers[:count]).memory(1) <= room:
                yield f"at most {count} layers (--layers)"
                break
        for count in range(self.num_groups - 1, 0, -1):
            if replace(self, num_groups=count).memory(1) <= room:
                yield f"at most {count} groups"
                break
        rows = self.model.d_model // 16
        if self.sketch is None and rows > 1 and replace(self, sketch=rows).memory(1) <= room:
            yield f"sketches (--sketch {rows})"
        if self.model.dtype == torch.float32 and self.memory(1) - self.weight_bytes // 2 <= room:
            yield "half-precision weights (--dtype bfloat16)"
        if not self.model.streamed and self.model.gradients == "own_position":
            blocks = [_weights(block) for block in self.model.blocks]
            if self.memory(1) - sum(blocks) + max(blocks) <= room:
                yield "weights read block by block (--stream-weights)"
        if hardware.name != "cpu":
            enough = -(-self.memory(1) // hardware.memory)
            yield f"{enough} GPUs an actor (--gpus-per-actor {enough})"
        larger = [name for name, other in HARDWARE.items() if name != "cpu" and gpus * other.memory >= self.memory(1)]
        if larger:
            yield f"the GPU {larger[0]}" if gpus == 1 else f"{gpus} x {larger[0]}"


@contextmanager
def _counted(name: str) -> Iterator[FlopCounterMode]:
    """Count the flop of matrix products on the meta device."""
    try:
        with _NoValues(), FlopCounterMode(display=False) as counter:
            yield counter
    except (RuntimeError, NotImplementedError) as error:
        first = " ".join(str(error).split())
        raise ModelError(f"what {name} costs cannot be counted without its weights: {first}") from error


def _weights(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@cache
def _inner_nodes(num_tasks: int) -> int:
    """Nodes of the reduction tree between its root and the tasks: parts of nearly equal length, as many as fan in."""
    if num_tasks <= FAN_IN:
        return 0
    part, longer = divmod(num_tasks, FAN_IN)
    lengths = ((part, FAN_IN - longer), (part + 1, longer))
    return sum(count * (1 + _inner_nodes(length)) for length, count in lengths if length > 1)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
