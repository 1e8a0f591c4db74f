"""One task, from source ranges to a committed shard, with a model held from task to task. No Ray here."""

from __future__ import annotations

import platform
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import torch
import transformers
from torch import Tensor

import fisher_ray
from fisher_ray.architecture import sink_token
from fisher_ray.corpus import CorpusError, Document, Window, read_documents, windows
from fisher_ray.kernels import is_out_of_memory
from fisher_ray.numerics import deterministic_kernels, full_precision
from fisher_ray.plan import MAX_SUMS, ConfigError, Plan, RunConfig, Task, token_ids, token_text
from fisher_ray.scores import Scores, default_memory_budget, iter_scores
from fisher_ray.shards import (
    TOP_EIGENVALUES,
    Counts,
    Receipt,
    RunStore,
    npy_bytes,
    parquet_bytes,
    places,
    positions_schema,
    task_name,
)
from fisher_ray.spectrum import entropy_rank, factor_eigenvalues, participation_ratio, trace_rank
from fisher_ray.split import SplitModel
from fisher_ray.storage import StoredFile
from fisher_ray.sums import LayerSums, Sums, sums_memory

# Calls a function with its arguments when it is its turn, and gives its result.
InTurn = Callable[..., Any]

# Padding that a batch may hold, in tokens, or an eighth of the batch where that is more. Measured: windows of a small task,
# which differ, cost a quarter more where they all go together (the demo's, 2,400 tokens a task).
_PADDING = 128

# Windows that tokens which a direction moves are looked for in, positions of each, and numbers of rates that are held.
WINDOWS, _SPREAD = 32, 4
_RATES = 1 << 26
# Standard errors that a mean rate has to be from zero. Two halves of 64 windows of the demo agree on 4.5 to 10 of the ten
# tokens that are moved most in log p, whose means are 2 to 46 errors from zero; in p, on 1 to 5, at 0.5 to 8 errors.
_CONSISTENT = 4.0
# Fewer windows do not tell a standard error.
_FEWEST_WINDOWS = 8


def at_once(function: Callable[..., Any], *args: Any) -> Any:
    """The turn of a process that does one thing at a time."""
    return function(*args)


def load_model(config: RunConfig) -> SplitModel:
    """The model of a run."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "this run computes on GPUs and a worker found none: torch.cuda.is_available() is false. Check the driver and "
            "the image of that node, or run on CPUs (--device cpu)."
        )
    here = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    several = (config.gpus_per_actor or 0) > 1 and here == "cuda"
    return SplitModel.from_pretrained(
        config.model,
        device=None if several else config.device,
        device_map="auto" if several else None,
        stream_weights=config.stream_weights,
        dtype=config.dtype,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        gradients=config.gradients,
        compile=config.compile,
    )


@dataclass
class _Tokenized:
    """A task's documents as tokens, and the windows that score them."""

    documents: list[Document]
    tokens: list[list[int]]
    encoder_tokens: list[list[int]]
    windows: list[Window]


@dataclass
class _Scored:
    """A task's results in memory, in the order in which they were computed.

    Attributes:
        where: window and window position of each row, [2, n] a micro-batch.
        columns: statistics of each row, per layer.
        arrays: factors or matrices of each row, per layer, where they are kept.
    """

    sums: dict[int, LayerSums]
    where: list[np.ndarray]
    columns: dict[int, list[dict[str, Any]]]
    arrays: dict[int, list[np.ndarray]]
    scored: int = 0
    invalid: int = 0
    halvings: int = 0


class Worker:
    """Holds one split model and turns tasks into shards.

    A worker that loads its model makes its process one that gives the same bits each time. Reading and writing of one task may
    go on while another is computed; computing is for one thread at a time.

    Args:
        plan: what is run; its sources are not needed here.
        store: where shards go.
        model: the plan's model, where it is loaded already.
    """

    def __init__(self, plan: Plan, store: RunStore, model: SplitModel | None = None):
        self.plan, self.config, self.store = plan, plan.config, store
        if model is None:
            deterministic_kernels()  # before the model comes
            torch.set_num_threads(self.config.cpus_per_actor)
        self.model = load_model(self.config) if model is None else model
        self.layers = plan.layers
        self.max_seq_len, self.stride = self.config.window(plan.facts)
        self.sink = sink_token(self.model.model.config, self.model.tokenizer, self.model.head.vocab_size)
        if self.config.token_source == "sampled" and self.sink is None and self.stride == 0:
            raise ConfigError(
                f"token_source sampled draws each token from those before it, and {self.config.model} has none to begin a "
                "window with, so windows must overlap: expected a stride of at least 1, got 0."
            )
        self.provenance = {
            "device": torch.cuda.get_device_name(self.model.device) if self.model.device.type == "cuda" else "cpu",
            "self_check": self.model.self_check.asdict() if self.model.self_check else None,
            "versions": {
                "fisher_ray": fisher_ray.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
                "pyarrow": pa.__version__,
                "numpy": np.__version__,
            },
        }

    def compute(self, task: Task, in_turn: InTurn = at_once) -> Receipt:
        """Score a task's positions, write its shard and commit it.

        Args:
            in_turn: calls what computes; everything else is done here.

        Returns:
            the receipt: this attempt's, or that of the one that came first.

        Raises:
            CorpusError: a document that cannot be read or tokenized.
            StorageError: the shard cannot be written.
        """
        start = time.perf_counter()
        work = self._tokenize(task)
        read = time.perf_counter()
        result, took = in_turn(self._score_all, work)
        computed = time.perf_counter()
        files = self._write(f"{task_name(task.id)}-{uuid.uuid4().hex[:8]}", work, result)
        tokens = sum(map(len, work.tokens))
        counts = Counts(
            documents=len(work.documents),
            empty=sum(not ids for ids in work.tokens),
            tokens=tokens,
            scored=result.scored,
            skipped=tokens - result.scored - result.invalid,
            invalid=result.invalid,
            halvings=result.halvings,
        )
        seconds = {"read": read - start, "compute": took, "write": time.perf_counter() - computed}
        receipt = Receipt(task_name(task.id), self.plan.fingerprint, files, counts, seconds, [self.provenance])
        return self.store.commit("done", receipt)

    @full_precision()
    def _score_all(self, work: _Tokenized) -> tuple[_Scored, float]:
        """A task's results, and the seconds it took."""
        start = time.perf_counter()
        # A new thread starts with the environment's number, and the number changes the order of sums.
        torch.set_num_threads(self.config.cpus_per_actor)
        groups = self._groups(work)
        sums = Sums(self.layers, self.model.d_model, groups, self.model.device, self.config.sketch)
        index = {name: i for i, name in enumerate(groups)}
        result = _Scored({}, [], {layer: [] for layer in self.layers}, {layer: [] for layer in self.layers})
        for batch in self._batches(work.windows):
            for scores in self._scores(batch, work):
                window = np.array(batch, dtype=np.int64)[scores.sequence.cpu().numpy()]
                where = np.stack([window, scores.position.cpu().numpy()])
                group = None
                if self.config.group_by is not None:
                    members = [index[self._group(work, work.windows[w], t)] for w, t in where.T.tolist()]
                    group = torch.tensor(members, device=self.model.device)
                result.where.append(where)
                result.scored += len(scores)
                result.invalid += len(scores.invalid)
                result.halvings += scores.halvings
                for layer in self.layers:
                    factors = scores.factors[layer]
                    sums.add(layer, factors, scores.activations[layer], group, scores.captured_share)
                    found, halvings = _fitting(factors)
                    result.columns[layer].append(found)
                    result.halvings += halvings
                    if self.config.save != "summary":
                        kept = factors if self.config.save == "factors" else scores.matrices(layer)
                        result.arrays[layer].append(kept.float().cpu().numpy())
                result.columns[self.layers[0]][-1].update(_per_position(scores))
                del scores, factors  # before the next micro-batch takes its own
        result.sums = {layer: sums.packed(layer) for layer in self.layers}
        return result, time.perf_counter() - start

    def _group(self, work: _Tokenized, window: Window, t: int) -> str:
        return self.plan.group(work.documents[window.document], window, t)

    def _groups(self, work: _Tokenized) -> list[str]:
        """Names of a task's groups, sorted."""
        config, column = self.config, self.config.group_column
        names = sorted({self._group(work, window, t) for window in work.windows for t in window.scored})
        held = len(names) * len(self.layers) * sums_memory(self.model.d_model, config.sketch)
        if column is not None and held > MAX_SUMS:  # of others the plan knows
            raise CorpusError(
                f"{column!r} has {len(names)} values in one task, whose sums need {held / 2**30:.1f} GiB; the limit is "
                f"{MAX_SUMS >> 30} GiB. Make tasks smaller (--task-bytes), take fewer layers a run (--layers), group by a "
                "column with fewer values, or keep sketches (--sketch)."
            )
        return names

    def _write(self, attempt: str, work: _Tokenized, result: _Scored) -> dict[str, StoredFile]:
        """Write a shard's files, several at once."""
        writes: dict[str, tuple[str, bytes, int | None]] = {}
        if result.scored:
            where = np.concatenate(result.where, 1)
            ranked = np.lexsort((where[1], where[0]))
            table = self._table(work, where[:, ranked], result.columns, ranked)
            writes["positions"] = (f"positions/{attempt}.parquet", parquet_bytes(table), len(table))
            for layer, parts in result.arrays.items():
                if parts:
                    raw = npy_bytes(np.concatenate(parts)[ranked])
                    writes[f"{self.config.save}_{layer}"] = (
                        f"{self.config.save}/{attempt}/layer_{layer:03d}.npy",
                        raw,
                        None,
                    )
        for layer in self.layers:
            raw = result.sums[layer].to_bytes(np.float32)
            writes[f"sums_{layer}"] = (f"sums/{attempt}/layer_{layer:03d}.npz", raw, None)
        with ThreadPoolExecutor(8) as threads:
            stored = threads.map(lambda item: self.store.store(*item), writes.values())
            return dict(zip(writes, stored, strict=True))

    def moved_tokens(
        self, tasks: Sequence[Task], directions: Mapping[int, np.ndarray]
    ) -> dict[int, list[tuple[list[str], list[str]]]]:
        """Tokens that a step along each of a layer's directions raises and lowers, through the model's own upper layers.

        Ranked by the mean over windows of ``dlog p(y)/de`` at ``h + e v``, of those tokens whose mean is at least four standard
        errors from zero: a token may go up at one position and down at another. Of fewer than eight windows none is, as they
        are too few to tell an error.

        Args:
            tasks: up to 32 windows are spread over them, and over each up to 4 scored positions.
            directions: per layer [k, d_model].

        Returns:
            per layer and direction: up to five tokens raised and up to five lowered, most first.
        """
        windows = []
        for i, task in enumerate(tasks):
            there = list(self.windows(task))
            windows += [there[j] for j in places(len(there), WINDOWS, i, len(tasks))]

        def means(pieces: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
            """Of some layers' directions, [k, vocab_size] each; 0 where windows differ in sign. Without what is not finite."""
            totals: list[Any] = [0.0] * len(pieces)
            squares, counts = totals.copy(), totals.copy()
            layers = sorted({layer for layer, _ in pieces})
            for _, window, arguments in windows:
                encoder = [value.to(self.model.device) for value in arguments.values()]
                ids = torch.tensor([window.ids], device=self.model.device)
                at = torch.tensor(window.scored[:: -(-len(window.scored) // _SPREAD)], device=self.model.device)
                tape = self.model.tape(ids, self.model.encode(*encoder) if encoder else {}, layers, at)
                for i, (layer, rows) in enumerate(pieces):
                    rates = self.model.log_probability_rates(tape, layer, rows)
                    mean = torch.cat([_mean_of_finite(some) for some in rates]).double()
                    known = mean.isfinite().all(-1, keepdim=True)
                    totals[i] += mean.where(known, 0)
                    squares[i] += mean.where(known, 0).square()
                    counts[i] += known
            found = []
            for total, square, count in zip(totals, squares, counts, strict=True):
                mean = total / count.clamp_min(1)
                error = ((square / count.clamp_min(1) - mean.square()).clamp_min(0) / (count - 1).clamp_min(1)).sqrt()
                found.append(mean.where((count >= _FEWEST_WINDOWS) & (mean.abs() > _CONSISTENT * error), 0))
            return found

        def extremes(mean: Tensor) -> tuple[list[str], list[str]]:
            found = (each.topk(min(5, len(each))) for each in (mean, -mean))
            raised, lowered = ([self.text(t) for t in top.indices[top.values > 0].tolist()] for top in found)
            return raised, lowered

        together = max(1, _RATES // self.model.head.vocab_size)
        pieces = deque(
            (layer, some)
            for layer, rows in directions.items()
            for some in torch.tensor(rows, device=self.model.device).split(together)
        )
        moved: dict[int, list[tuple[list[str], list[str]]]] = {layer: [] for layer in directions}
        while pieces:
            chosen, left = [pieces.popleft()], together
            while pieces and (left := left - len(chosen[-1][1])) >= len(pieces[0][1]):
                chosen.append(pieces.popleft())
            for (layer, _), mean in zip(chosen, means(chosen), strict=True):
                moved[layer] += map(extremes, mean)
        return moved

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def windows(self, task: Task) -> Iterator[tuple[str, Window, dict[str, Tensor]]]:
        """A task's windows as they are scored: id of the document, window, and the encoder's tokens if there is one.

        Raises:
            CorpusError: a document that cannot be read or tokenized.
        """
        work = self._tokenize(task)
        for i, window in enumerate(work.windows):
            yield work.documents[window.document].id, window, self._encoded([i], work)

    def _tokenize(self, task: Task) -> _Tokenized:
        """A task's documents as tokens, and their windows."""
        work = _Tokenized([], [], [], [])
        for document in self._documents(task):
            ids = token_ids(document, self.config.model, self.model.tokenizer, self.plan.facts.vocab_size)
            chosen = self.config.scored(len(ids), self.sink)
            index = len(work.documents)
            work.windows.extend(windows(index, ids, self.max_seq_len, self.stride, self.sink, chosen))
            work.documents.append(document)
            work.tokens.append(ids)
            if document.encoder_text is not None:
                encoder_ids = self.model.tokenizer(document.encoder_text, truncation=False)["input_ids"]
                work.encoder_tokens.append(encoder_ids[: self.max_seq_len])
        return work

    def _documents(self, task: Task) -> Iterator[Document]:
        """A task's documents; where some of its files cannot be read, all that cannot are named."""
        wrong = []
        for source in task.ranges:
            try:
                yield from read_documents(source, self.config.layout)
            except CorpusError as error:
                wrong.append(str(error))
        if wrong:
            raise CorpusError(" ".join(wrong))

    @cached_property
    def text(self) -> Callable[[int], str]:
        """A token as text, decoded once; its number where the model has no tokenizer."""
        return cache(partial(token_text, tokenizer=self.model.tokenizer))

    # ---- scores ------------------------------------------------------------------------------------------------------

    def _batches(self, all_windows: list[Window]) -> Iterator[list[int]]:
        """Windows of similar length together: at most as many tokens as are asked for, and little of them padding."""
        ranked = sorted(range(len(all_windows)), key=lambda i: (len(all_windows[i].ids), i))
        batch: list[int] = []
        held = 0
        for i in ranked:
            length = len(all_windows[i].ids)
            padded = (len(batch) + 1) * length
            padding = padded - held - length
            if batch and (padded > self.config.together or padding > max(_PADDING, padded // 8)):
                yield batch
                batch, held = [], 0
            batch.append(i)
            held += length
        if batch:
            yield batch

    def _scores(self, batch: list[int], work: _Tokenized) -> Iterator[Scores]:
        some = [work.windows[i] for i in batch]
        longest = max(len(window.ids) for window in some)
        ids = torch.zeros(len(some), longest, dtype=torch.int64)
        mask = torch.zeros(len(some), longest, dtype=torch.bool)
        for row, window in enumerate(some):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
            mask[row, : len(window.ids)] = True
        config = self.config
        return iter_scores(
            self.model,
            ids,
            layers=self.layers,
            estimator=config.make_estimator(),
            attention_mask=mask,
            positions=[window.scored for window in some],
            token_source=config.token_source,
            num_token_draws=config.token_draws,
            token_top_p=config.token_top_p,
            token_temperature=config.token_temperature,
            keys=[f"{work.documents[window.document].id}@{window.start}" for window in some],
            following=[window.following for window in some],
            seed=config.seed,
            memory_budget=config.memory_budget
            or default_memory_budget(self.model, min(1.0, config.gpus_per_actor or 1.0)),
            **self._encoded(batch, work),
        )

    def _encoded(self, batch: list[int], work: _Tokenized) -> dict[str, Tensor]:
        """The encoder's tokens of a batch of windows, padded."""
        if not work.encoder_tokens:
            return {}
        rows = [work.encoder_tokens[work.windows[i].document] for i in batch]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        return {"encoder_input_ids": ids, "encoder_attention_mask": mask}

    # ---- the table ---------------------------------------------------------------------------------------------------

    def _table(
        self, work: _Tokenized, where: np.ndarray, columns: dict[int, list[dict[str, Any]]], ranked: np.ndarray
    ) -> pa.Table:
        """One row per (layer, document, position); ``where [2, N]`` holds window and window position of each row."""
        chosen = [work.windows[i] for i in where[0]]
        documents = [work.documents[window.document] for window in chosen]
        tokens = [window.ids[t] for window, t in zip(chosen, where[1].tolist(), strict=True)]
        shared: dict[str, Any] = {
            "document": [document.id for document in documents],
            "position": [w.position(t) for w, t in zip(chosen, where[1].tolist(), strict=True)],
            "token": tokens,
            "text": [self.text(token) for token in tokens],
            "context": where[1].astype(np.int32),
        }
        for i, column in enumerate(self.config.kept_columns):
            shared[column] = [document.carried[i] for document in documents]

        def joined(layer: int, name: str) -> Any:
            values = np.concatenate([part[name] for part in columns[layer]])[ranked]
            return values if values.ndim == 1 else list(values)

        for name in _PER_POSITION:
            shared[name] = pa.array(joined(self.layers[0], name), pa.float32(), from_pandas=True)  # NaN becomes null
        schema = positions_schema(
            self.config.kept_columns,
            {"fisher_ray.fingerprint": self.plan.fingerprint, "fisher_ray.model": self.config.model},
        )
        tables = []
        for layer in self.layers:
            own = {name: joined(layer, name) for name in _STATISTICS}
            rows = {**shared, **own, "layer": np.full(len(tokens), layer, np.int16)}
            tables.append(pa.Table.from_pydict({name: rows[name] for name in schema.names}, schema=schema))
        return pa.concat_tables(tables)


_PER_POSITION = ("entropy", "surprisal", "kept_mass", "captured_share")
_STATISTICS = ("trace", "top_eigenvalues", "participation_ratio", "entropy_rank", "trace_rank_99")


def statistics(factors: Tensor) -> dict[str, np.ndarray]:
    """Trace, top eigenvalues and effective ranks of each position's F."""
    eigenvalues = factor_eigenvalues(factors)
    values = {
        "trace": factors.square().sum((1, 2)),
        "top_eigenvalues": eigenvalues[:, :TOP_EIGENVALUES],
        "participation_ratio": participation_ratio(eigenvalues),
        "entropy_rank": entropy_rank(eigenvalues),
        "trace_rank_99": trace_rank(eigenvalues),
    }
    return {name: value.float().cpu().numpy() for name, value in values.items()}


def _fitting(factors: Tensor) -> tuple[dict[str, np.ndarray], int]:
    """Statistics, of half the positions at a time where memory runs out, and how often it did."""
    try:
        return statistics(factors), 0
    except (RuntimeError, MemoryError) as error:
        if len(factors) < 2 or not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    parts, halvings = zip(*map(_fitting, factors.chunk(2)), strict=True)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, 1 + sum(halvings)


def _per_position(scores: Scores) -> dict[str, np.ndarray]:
    return {name: getattr(scores, name).float().cpu().numpy() for name in _PER_POSITION}


def _mean_of_finite(rates: Tensor) -> Tensor:
    """Over the positions, in the middle of three axes, at which all rates are finite; NaN where there is none."""
    there = rates.isfinite().all(-1, keepdim=True)
    return rates.where(there, 0).sum(1) / there.sum(1)
