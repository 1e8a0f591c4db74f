"""What a run is: its configuration, its fingerprint, and its tasks.

A plan is made from metadata and never changed: a list of tasks, each a few source ranges of the corpus. Windows, batches
and token counts follow from range and configuration alone, so any worker gives any task the same result.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import count
from operator import itemgetter
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fisher_ray.architecture import (
    DTYPES,
    ModelError,
    ModelFacts,
    load_tokenizer,
    may_have_tokenizer,
    sink_token,
    tokenizer_digest,
    weights_digest,
)
from fisher_ray.corpus import (
    CorpusError,
    Document,
    Layout,
    Source,
    SourceRange,
    Unit,
    Window,
    find_ranges,
    find_sources,
    read_documents,
    sample_documents,
    take,
    takes_in,
    windows,
)
from fisher_ray.cost import Cost, Save, least_task_bytes, outline
from fisher_ray.estimators import Deflated, Estimator, Exact, Sampled, check_tempering
from fisher_ray.scores import TokenSource
from fisher_ray.shards import POSITION_FIELDS
from fisher_ray.split import Gradients
from fisher_ray.storage import Storage, absolute
from fisher_ray.sums import ALL

# Raised whenever the same configuration would give other numbers.
RESULT_VERSION = 16

Device = Literal["cpu", "cuda"]
Executor = Literal["ray", "local"]
EstimatorName = Literal["sampled", "deflated", "exact"]

# Settings that change how a run is executed and not what it computes.
_EXECUTION = frozenset(
    {
        "output",
        "executor",
        "min_actors",
        "max_actors",
        "gpus_per_actor",
        "max_attempts",
        "task_timeout",
        "retry_quarantined",
        "verify_done",
        "until_relative_error",
        "until_relative_change",
    }
)

# float64 sums that a worker may hold for its groups; beyond, groups or layers have to be fewer.
MAX_SUMS = 16 << 30
# Of the deflated estimator: with 8 samples, three quarters of its cotangents (benchmarks/estimators.py).
_RANK = 24
# Documents looked at for what metadata does not say: how many tokens a byte, which tokens are frequent, how many groups.
_SAMPLE = 64
_SAMPLED_TASKS = 8
# Tokens that go through the model together. Measured on an H200 with a model of Llama's 1B shape, 17 streams and one sample:
# launching a pass takes as long as computing 8,192 tokens does; fewer have the GPU wait.
BATCH_TOKENS: dict[Device, int] = {"cpu": 4096, "cuda": 1 << 15}

PLAN_SCHEMA = pa.schema(
    [
        ("task", pa.int32()),
        ("path", pa.string()),
        ("name", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("weight", pa.int64()),
        ("max_docs", pa.int64()),
    ],
    metadata={"fisher_ray.schema": "plan.1"},
)
_PLAN_ROWS = 1 << 14


class ConfigError(ValueError):
    """A setting that cannot be, or does not fit the model."""


class _Loader(yaml.SafeLoader):
    """Has ``1:20`` as a text, as YAML 1.2 does; to the version before it is 80, in sixties."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_settings(path: Path, what: str) -> Any:
    """What a YAML or JSON file holds; ConfigError, which calls it by ``what``, where it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {what} {path}: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Positions:
    """Which positions of a document are scored: ``all``, ``last``, a slice ``start:stop:step`` or a list ``0,5,-1``."""

    spec: str = "all"

    def __post_init__(self) -> None:
        self.choose(1)

    def choose(self, length: int) -> list[int]:
        """Positions in a document of ``length`` tokens, ascending; listed ones beyond it do not exist."""
        try:
            if self.spec == "all":
                return list(range(length))
            if ":" in self.spec:
                parts = [int(part) if part else None for part in self.spec.split(":")]
                return sorted(range(length)[slice(*parts)])
            listed = [-1] if self.spec == "last" else [int(part) for part in self.spec.split(",")]
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"positions must be all, last, start:stop:step or a list such as 0,5,-1; got {self.spec!r}."
            ) from error
        return sorted({t % length for t in listed if -length <= t < length})


def layer_ranges(spec: str) -> list[range]:
    """The layers that ``0-11`` or ``3,6`` names, in its order."""
    named = []
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            named.append(range(int(first), int(last if dash else first) + 1))
        except ValueError as error:
            raise ConfigError(f"layers must be all, a range 0-11 or a list 3,6; got {spec!r}.") from error
    if not any(named):
        raise ConfigError(f"layers {spec!r} names none; the range runs backwards.")
    return named


def _path(given: Any) -> Any:
    """A path as a text; what is none as it is."""
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _names(given: Any) -> Any:
    """Names or paths, of which one may be given alone."""
    if isinstance(given, str | os.PathLike):
        return (_path(given),)
    return tuple(map(_path, given)) if _is_listing(given) else given


def _listed(given: Any) -> Any:
    """Numbers as the command line has them."""
    if isinstance(given, int):
        return str(given)
    return ",".join(map(str, given)) if _is_listing(given) else given


def _is_listing(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)


# Settings that Python has other forms of, and how each is kept; the others are kept as they are, paths as texts.
_WRITTEN: dict[str, Callable[[Any], Any]] = {
    "corpus": _names,
    "columns": _names,
    "layers": _listed,
    "positions": _listed,
    "dtype": lambda dtype: str(dtype).removeprefix("torch."),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is told. ``fisher-ray run --help`` describes each setting.

    Paths, one name where several may be given, lists of numbers, NumPy's numbers and torch's dtypes are taken as well, and kept
    as written here.

    Attributes:
        layers: ``all``, a range ``0-11`` or a list ``3,6``.
        estimator: ``sampled``, ``deflated`` or ``exact``; None: ``deflated`` where factors or matrices of single positions are
            saved and the draws are not tempered, else ``sampled``; decided when the configuration is made.
        rank: of the part that ``deflated`` takes without drawing; None: 24 there.
        tolerance: share of ``tr M`` that ``exact`` may leave out; None: nothing.
        max_seq_len: tokens a window, the sink included; None: what the model has positions for, at most 512.
        stride: tokens that a window repeats from the one before; None: a quarter of the window.
        batch_tokens: tokens that go through the model together, before the memory budget cuts them further; None:
            ``BATCH_TOKENS`` of the device.
        task_bytes: of the corpus that one task takes; None: :meth:`fisher_ray.cost.Cost.task_bytes`, by nominal speeds.
        group_by: ``position`` (buckets 0, 1, 2-3, 4-7, ...), ``token`` (the most frequent ones of a sample, and the others) or
            a column of the corpus; each group has a mean and a count of its own.
        sketch: rows of the sketch (:mod:`fisher_ray.sketch`) that is kept of every sum of matrices; None: the sums in full.
        stream_weights: read the weights of one block at a time from disk, for models larger than an actor's memory; part of
            the result, since micro-batches are others.
        compile: run the blocks' norms and MLPs through torch.compile; part of the result, since the last bits are others.
        device: None: ``cuda`` where an actor has a GPU, else ``cpu``; decided when the run starts.
        cpus_per_actor: cores and threads of an actor; part of the result, since threads change the order of sums.
        until_relative_error, until_relative_change: end the run at the first checkpoint at which the mean F of every layer is
            known, or changed since the checkpoint before, by no more than this share of its Frobenius norm. Tasks are then
            in an order drawn by the seed, so that those done are a fair sample of the corpus; which checkpoint it is depends on
            no number of workers, and a smaller share goes on from there.
        min_actors, max_actors: the pool; without a maximum all that the cluster has room for at the moment, or the minimum.
        max_attempts: failures of a task before it is given up.
        task_timeout: seconds; None: 30 times what tasks of its size take, at least 10 minutes; an hour while that is not known.
        retry_quarantined: try again what was given up before.
        verify_done: read back everything that was done before, and compute again what is damaged.
    """

    model: str
    corpus: tuple[str, ...]
    output: str
    layers: str = "all"
    estimator: EstimatorName | None = None
    num_samples: int = 8
    rank: int | None = None
    tolerance: float | None = None
    top_p: float = 1.0
    temperature: float = 1.0
    token_source: TokenSource = "observed"
    token_draws: int = 1
    token_top_p: float = 1.0
    token_temperature: float = 1.0
    max_seq_len: int | None = None
    stride: int | None = None
    batch_tokens: int | None = None
    task_bytes: int | None = None
    positions: str = "all"
    max_docs: int | None = None
    column: str = "text"
    unit: Unit = "paragraph"
    encoder_column: str | None = None
    columns: tuple[str, ...] = ()
    group_by: str | None = None
    num_groups: int = 32
    sketch: int | None = None
    save: Save = "summary"
    seed: int = 0
    dtype: str = "float32"
    gradients: Gradients = "own_position"
    revision: str | None = None
    trust_remote_code: bool = False
    stream_weights: bool = False
    compile: bool = False
    memory_budget: int | None = None
    device: Device | None = None
    cpus_per_actor: int = 1
    gpus_per_actor: float | None = None
    executor: Executor = "ray"
    min_actors: int = 1
    max_actors: int | None = None
    max_attempts: int = 3
    task_timeout: float | None = None
    retry_quarantined: bool = False
    verify_done: bool = True
    until_relative_error: float | None = None
    until_relative_change: float | None = None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            given = getattr(self, name)
            value = _WRITTEN.get(name, _path)(given.item() if isinstance(given, np.generic) else given)
            object.__setattr__(self, name, value)
            if not _fits(value, hint):
                raise ConfigError(f"{name} must be {_in_words(hint)}, got {value!r}.")
        if self.estimator is None:
            tempered = self.top_p != 1.0 or self.temperature != 1.0
            object.__setattr__(self, "estimator", "sampled" if self.save == "summary" or tempered else "deflated")
        if self.estimator == "deflated" and self.rank is None:
            object.__setattr__(self, "rank", _RANK)
        self.make_estimator()
        check_tempering(self.token_top_p, self.token_temperature, "token_")
        Positions(self.positions)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed must be at least -2^63 and below 2^63, got {self.seed}.")
        for name in (
            "token_draws",
            "batch_tokens",
            "task_bytes",
            "cpus_per_actor",
            "max_docs",
            "min_actors",
            "max_actors",
            "max_attempts",
            "task_timeout",
            "max_seq_len",
            "memory_budget",
            "num_groups",
            "sketch",
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**63:
                raise ConfigError(f"{name} must be at least 1 and below 2^63, got {value}.")
        for name in ("until_relative_error", "until_relative_change"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"{name} must be a share between 0 and 1, got {value:g}.")
        if self.token_source == "observed" and self.token_draws != 1:
            raise ConfigError(f"token_draws is for token_source sampled, got {self.token_draws} with observed tokens.")
        if self.token_source == "observed" and (self.token_top_p, self.token_temperature) != (1.0, 1.0):
            raise ConfigError(
                "token_top_p and token_temperature are for token_source sampled, got "
                f"{self.token_top_p:g} and {self.token_temperature:g} with observed tokens."
            )
        if self.token_source == "sampled" and self.group_by == "token":
            raise ConfigError(
                "group_by token is for the corpus's tokens, and with token_source sampled others take their place. Leave "
                "one of them out."
            )
        gpus = self.gpus_per_actor or 0.0
        if not 0 <= gpus < math.inf or (gpus > 1 and gpus != int(gpus)):
            raise ConfigError(f"gpus_per_actor must be a fraction of one GPU or a whole number, got {gpus:g}.")
        if self.stream_weights and gpus > 1:
            raise ConfigError(
                f"stream_weights is for one GPU an actor, got gpus_per_actor {gpus:g}. Leave one of them out."
            )
        if self.stream_weights and self.compile:
            raise ConfigError(
                "compile is for weights that stay on the device, got stream_weights. Leave one of them out."
            )
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ConfigError(f"max_actors must be at least min_actors, got {self.max_actors} and {self.min_actors}.")
        if len(set(self.columns)) < len(self.columns):
            raise ConfigError(f"columns must be named once each, got {' '.join(self.columns)}.")
        taken = {name for name, _ in POSITION_FIELDS} & set(self.columns)
        if taken:
            raise ConfigError(
                f"columns must not be named {', '.join(sorted(taken))}: the table of positions has such already."
            )
        if not self.corpus:
            raise ConfigError("corpus must name at least one file, folder or glob.")

    @property
    def together(self) -> int:
        """Tokens that go through the model together, as asked for or by the device."""
        return self.batch_tokens or BATCH_TOKENS[self.device or "cpu"]

    def make_estimator(self) -> Estimator:
        """The estimator that the settings name."""
        for name, owner, given in (
            ("rank", "deflated", self.rank is not None),
            ("tolerance", "exact", self.tolerance is not None),
            ("top_p", "sampled", self.top_p != 1.0),
            ("temperature", "sampled", self.temperature != 1.0),
        ):
            if given and self.estimator != owner:
                raise ConfigError(
                    f"{name} is for estimator {owner}, got {getattr(self, name)} with {self.estimator}. "
                    f"Leave it out, or ask for --estimator {owner}."
                )
        if self.estimator == "exact":
            return Exact(self.tolerance or 0.0)
        if self.estimator == "deflated":
            return Deflated(self.rank or 0, self.num_samples)
        return Sampled(self.num_samples, self.top_p, self.temperature)

    @property
    def estimator_in_words(self) -> str:
        """The estimator with its numbers: what the mean of F / tr F, and matrices of single positions, are of."""
        samples = f"{self.num_samples} sample{'' if self.num_samples == 1 else 's'}"
        if self.estimator == "exact":
            return f"exact to {self.tolerance:g} of tr M" if self.tolerance else "exact"
        return samples if self.estimator == "sampled" else f"deflated, rank {self.rank} and {samples}"

    @property
    def is_lower_bound(self) -> bool:
        """Whether the matrices leave a part of F out, and none is drawn to stand for it."""
        return bool(self.tolerance) or (self.estimator == "deflated" and self.num_samples == 0)

    @property
    def estimated(self) -> Mapping[str, Any]:
        """What decides which quantity a run estimates, by name, however it does so."""
        drawn = self.token_source == "sampled"
        return {
            "top_p": self.top_p,
            "temperature": self.temperature,
            "lower bound": (self.estimator, self.rank, self.tolerance) if self.is_lower_bound else None,
            "token_source": self.token_source,
            "token_top_p": self.token_top_p if drawn else None,
            "token_temperature": self.token_temperature if drawn else None,
            "positions": self.positions,
            "unit": self.unit,
            "max_seq_len": self.max_seq_len,
            "stride": self.stride,
            "sketch": self.sketch,
        }

    @property
    def model_title(self) -> str:
        """The model's name on the hub, or the end of a local path."""
        path = Path(self.model)
        return "/".join(path.parts[-2:]) if path.is_absolute() else self.model

    @property
    def ends_early(self) -> bool:
        """Whether the run may end before the corpus does; its tasks are shuffled then."""
        return self.until_relative_error is not None or self.until_relative_change is not None

    @property
    def group_column(self) -> str | None:
        """The column of the corpus that groups are named by, if they are."""
        return None if self.group_by in (None, "position", "token") else self.group_by

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns of the corpus in the table of positions: those asked for, and that of the groups where its name is free."""
        own = {name for name, _ in POSITION_FIELDS}
        return tuple(name for name in self.layout.carried if name not in own)

    @property
    def layout(self) -> Layout:
        """How documents lie in the corpus's files."""
        carried = dict.fromkeys([*self.columns, *filter(None, [self.group_column])])
        return Layout(self.column, self.unit, self.encoder_column, tuple(carried))

    def scored(self, length: int, sink: int | None) -> list[int]:
        """Positions that are scored in a document of ``length`` tokens, ascending; the first is not drawn from nothing."""
        first = 1 if self.token_source == "sampled" and sink is None else 0
        return [t for t in Positions(self.positions).choose(length) if t >= first]

    def layer_list(self, num_layers: int) -> list[int]:
        """The layers meant, ascending."""
        if self.layers == "all":
            return list(range(num_layers + 1))
        named = layer_ranges(self.layers)
        high = max(each.stop for each in named) - 1
        if high > num_layers:
            raise ConfigError(
                f"layers must be in [0, {num_layers}], got {high}. {self.model} has {num_layers} blocks, and layer "
                f"{num_layers} is what leaves the last one."
            )
        return sorted({layer for each in named for layer in each})

    def window(self, facts: ModelFacts) -> tuple[int, int]:
        """(max_seq_len, stride) for a model."""
        length = self.max_seq_len or min(facts.max_positions or 512, 512)
        if facts.max_positions is not None and length > facts.max_positions:
            raise ConfigError(
                f"max_seq_len must be at most {facts.max_positions}, got {length}: {self.model} has no positions beyond."
            )
        stride = length // 4 if self.stride is None else self.stride
        if length < 2 or not 0 <= stride < length - 1:
            raise ConfigError(
                f"windows need max_seq_len of at least 2 and a stride in [0, max_seq_len - 1), got {length} and {stride}."
            )
        return length, stride

    def pinned(self, weights: str) -> RunConfig:
        """The same at the hub's commit, where weights are told by one: a branch may move."""
        is_commit = not Path(self.model).is_dir() and re.fullmatch("[0-9a-f]{40}", weights)
        return replace(self, revision=weights) if is_commit else self

    def asdict(self) -> dict[str, Any]:
        """Plain values, as written to run.json and read from a config file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of :meth:`asdict`, for what people write too; unknown names are refused, and null is as if left out."""
        values = {str(key).replace("-", "_"): value for key, value in values.items()}
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}. Known: {', '.join(sorted(known))}.")
        values = {name: value for name, value in values.items() if value is not None}
        missing = [name for name in ("model", "corpus", "output") if not values.get(name)]
        if missing:
            raise ConfigError(f"{', '.join(missing)} must be given (--{missing[0]}).")
        return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type."""
    origin = get_origin(hint)
    if origin in (UnionType, Union):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    """What :func:`_fits` takes, as YAML has it."""
    if get_origin(hint) in (UnionType, Union):  # with None, which stands for what is left out
        return _in_words(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "a list of texts")


@dataclass(frozen=True, slots=True)
class Task:
    """The unit of work and of retry."""

    id: int
    ranges: tuple[SourceRange, ...]

    @property
    def weight(self) -> int:
        """Estimated bytes of it unpacked."""
        return sum(source.weight for source in self.ranges)


class Tasks:
    """The tasks of a plan, kept as the bytes of plan.parquet and decoded as they are asked for.

    Args:
        raw: the file.
    """

    def __init__(self, raw: bytes):
        self.raw = raw
        self._file = pq.ParquetFile(io.BytesIO(raw))
        # First task of every row group: a group begins with a new task.
        meta = self._file.metadata
        self._first = [meta.row_group(i).column(0).statistics.min for i in range(meta.num_row_groups)]
        self._count = meta.row_group(meta.num_row_groups - 1).column(0).statistics.max + 1
        self.weight = int((meta.metadata or {})[b"fisher_ray.weight"])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, task: int) -> Task:
        """One task; reads a row group."""
        group = bisect_right(self._first, task) - 1
        return next(found for found in self._group(group) if found.id == task)

    def __iter__(self) -> Iterator[Task]:
        for group in range(len(self._first)):
            yield from self._group(group)

    def _group(self, group: int) -> Iterator[Task]:
        table = self._file.read_row_group(group)
        columns = [table.column(name).to_pylist() for name in PLAN_SCHEMA.names]
        task, ranges = -1, list[SourceRange]()
        for row in zip(*columns, strict=True):
            if row[0] != task and ranges:
                yield Task(task, tuple(ranges))
                ranges = []
            task = row[0]
            ranges.append(SourceRange(*row[1:]))
        yield Task(task, tuple(ranges))

    @classmethod
    def from_ranges(cls, ranges: Iterable[SourceRange], target: int, shuffled: int | None = None) -> Tasks:
        """Neighbouring ranges together up to the target weight, so that many small files do not make many small tasks.

        Args:
            shuffled: seed of a random order, for which all are held in memory; None: the order of the corpus.
        """
        groups: Iterable[list[SourceRange]] = _grouped(ranges, target)
        if shuffled is not None:
            # By hashes, which no version of a generator changes.
            drawn = (hashlib.sha256(f"{shuffled}:{i}".encode()).digest() for i in count())
            groups = [group for _, group in sorted(zip(drawn, groups, strict=False), key=itemgetter(0))]
        return cls._written(groups)

    def below(self, root: str) -> Tasks:
        """The same tasks over a corpus that is now in another folder."""
        return self._written([replace(part, path=root + part.name) for part in task.ranges] for task in self)

    @classmethod
    def _written(cls, groups: Iterable[Sequence[SourceRange]]) -> Tasks:
        buffer, weight = io.BytesIO(), 0
        options: dict[str, Any] = {
            "compression": "zstd",
            "use_dictionary": ["path", "name", "version"],
            "column_encoding": dict.fromkeys(("task", "start", "stop", "size", "weight"), "DELTA_BINARY_PACKED"),
        }
        writer = pq.ParquetWriter(buffer, PLAN_SCHEMA, **options)
        rows: list[tuple[Any, ...]] = []
        for task, group in enumerate(groups):
            for source in group:
                rows.append((task, *(getattr(source, name) for name in PLAN_SCHEMA.names[1:])))
                weight += source.weight
            if len(rows) >= _PLAN_ROWS:
                writer.write_table(_rows_table(rows), row_group_size=len(rows))
                rows = []
        if rows:
            writer.write_table(_rows_table(rows), row_group_size=len(rows))
        writer.add_key_value_metadata({"fisher_ray.weight": str(weight)})
        writer.close()
        return cls(buffer.getvalue())


def _rows_table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = [pa.array(column, kind.type) for column, kind in zip(zip(*rows, strict=True), PLAN_SCHEMA, strict=True)]
    return pa.Table.from_arrays(columns, schema=PLAN_SCHEMA)


def _grouped(ranges: Iterable[SourceRange], target: int) -> Iterator[list[SourceRange]]:
    group: list[SourceRange] = []
    weight = 0
    for source in ranges:
        if group and weight + source.weight > target:
            yield group
            group, weight = [], 0
        group.append(source)
        weight += source.weight
    if group:
        yield group


@dataclass(frozen=True)
class Plan:
    """A run, decided: configuration, what the model's configuration says, and where its tasks come from.

    Attributes:
        sources: the corpus's files; not needed by workers.
        tokens: the frequent tokens that are groups of their own, and their text.
        result_fields: everything that changes results, by name; two runs with the same ones give the same bits on the
            same kind of hardware.
    """

    config: RunConfig
    facts: ModelFacts
    sources: tuple[Source, ...] = ()
    tokens: Mapping[int, str] = field(default_factory=dict)
    result_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return self.config.layer_list(self.facts.num_layers)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what changes results."""
        return hashlib.sha256(json.dumps(self.result_fields, sort_keys=True).encode()).hexdigest()

    @property
    def root(self) -> str:
        """The folder that the corpus's files are in, to the slash before their names."""
        return self.sources[0].path.removesuffix(self.sources[0].name)

    @property
    def total_bytes(self) -> int:
        return sum(source.size for source in self.sources)

    @cached_property
    def cost(self) -> Cost:
        """What the run costs, from the shapes of the model."""
        config = self.config
        shapes = outline(
            config.model,
            dtype=config.dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            gradients=config.gradients,
            stream_weights=config.stream_weights,
        )
        length, _ = config.window(self.facts)
        chosen = len(Positions(config.positions).choose(length))  # perhaps none in a document's first window
        return Cost(
            shapes,
            tuple(self.layers),
            config.make_estimator(),
            max_seq_len=length,
            batch_tokens=config.together,
            token_source=config.token_source,
            token_draws=config.token_draws,
            save=config.save,
            num_groups=self._num_groups(length),
            sketch=config.sketch,
            share=max(1, chosen) / length,
        )

    def group(self, document: Document, window: Window, t: int) -> str:
        """The name of the group that a position of a window of a document belongs to."""
        by = self.config.group_by
        if by is None:
            return ALL
        if by == "position":
            return position_bucket(window.position(t))
        if by == "token":
            return str(window.ids[t]) if window.ids[t] in self.tokens else "other"
        return str(document.carried[self._group_index])

    @cached_property
    def _group_index(self) -> int:
        """Where a document carries the column that groups are named by."""
        return self.config.layout.carried.index(str(self.config.group_column))

    def _num_groups(self, length: int) -> int:
        """Groups that one task may have sums for."""
        if self.config.group_by is None:
            return 1
        if self.config.group_by == "position":
            return 1 + (64 * length).bit_length()  # of documents of up to 64 windows
        return self.config.num_groups

    def on(self, device: Device) -> Plan:
        """The plan of a run on a kind of device, which is part of its fingerprint.

        So is what an actor has of GPUs, where their memory decides how many positions go together.
        """
        config, fields = replace(self.config, device=device), {**self.result_fields, "device": device}
        if device == "cuda" and config.memory_budget is None:
            fields["gpus_per_actor"] = float(config.gpus_per_actor or 1)
        return replace(self, config=config, result_fields=fields)

    def make_tasks(self) -> Tasks:
        """Cut the corpus into tasks, from metadata; where ``max_docs`` is given, by passes over the text that is taken.

        Tasks are sized by what is taken. How much that is shows once it is cut, and where it is little it is cut again.

        Raises:
            CorpusError: a file that cannot be what its ending says, or nothing in any of them.
        """
        target = self._task_bytes(self.total_bytes)
        shuffled = self.config.seed if self.config.ends_early else None
        while True:
            ranges = find_ranges(self.sources, self.config.layout, target)
            if self.config.max_docs is None:
                return Tasks.from_ranges(ranges, target, shuffled)
            taken = take(ranges, self.config.max_docs, self.config.layout)
            tasks = Tasks.from_ranges(taken, target, shuffled)
            smaller = self._task_bytes(tasks.weight)
            if smaller > 0.9 * target:  # the last range counts whole: exactly a 32nd would take many passes more
                return tasks
            target = smaller

    def _task_bytes(self, total_bytes: int) -> int:
        if self.config.task_bytes is not None:
            return self.config.task_bytes
        try:
            return self.cost.task_bytes(self.config.device or "cpu", total_bytes)
        except ModelError:  # some architectures cannot run without values; the run can, with small tasks
            return least_task_bytes(total_bytes)


@dataclass(frozen=True)
class Reckoning:
    """How much there is to compute.

    Attributes:
        documents, tokens, scored: of the corpus.
        window_tokens: that go through the model; windows overlap, and each starts with a sink.
        groups: that the tasks read for it have positions of, together.
        task_groups: that one of them has, on average.
        sampled: tasks that were read for it; all of them make it exact.
    """

    documents: int
    tokens: int
    scored: int
    window_tokens: int
    groups: int
    task_groups: float
    sampled: int


def reckon(plan: Plan, tasks: Tasks) -> Reckoning:
    """Tokenize a few tasks spread evenly over the corpus, and scale by weight; exact where those are all."""
    config, shapes = plan.config, plan.cost.model
    tokenizer = load_tokenizer(config.model, config.revision, config.trust_remote_code)
    sink = sink_token(shapes.model.config, tokenizer, shapes.head.vocab_size)
    chosen = sorted({len(tasks) * i // _SAMPLED_TASKS for i in range(_SAMPLED_TASKS)})
    length, stride = config.window(plan.facts)
    counts = [0, 0, 0, 0]
    weight = 0
    groups: list[set[str]] = []
    for task in map(tasks.__getitem__, chosen):
        weight += task.weight
        groups.append(set())
        for document in (d for source in task.ranges for d in read_documents(source, config.layout)):
            ids = token_ids(document, config.model, tokenizer, plan.facts.vocab_size)
            cut = list(windows(0, ids, length, stride, sink, config.scored(len(ids), sink)))
            scored, through = sum(len(w.scored) for w in cut), sum(len(w.ids) for w in cut)
            counts = [a + b for a, b in zip(counts, (1, len(ids), scored, through), strict=True)]
            groups[-1].update(plan.group(document, w, t) for w in cut for t in w.scored)
    scale = 1.0 if len(chosen) == len(tasks) else tasks.weight / max(weight, 1)
    if config.max_docs is not None:
        scale = min(scale, config.max_docs / max(counts[0], 1))
    documents, tokens, all_scored, all_through = (round(count * scale) for count in counts)
    task_groups = sum(map(len, groups)) / len(groups)
    return Reckoning(documents, tokens, all_scored, all_through, len(set().union(*groups)), task_groups, len(chosen))


def make_plan(config: RunConfig) -> Plan:
    """Decide a run: read the model's configuration, list the corpus, and check all that can be checked before any work.

    Raises:
        ModelError, ConfigError, CorpusError: whatever can be known to be wrong before a worker starts.
    """
    facts = ModelFacts.read(config.model, config.revision, config.trust_remote_code)
    layers = config.layer_list(facts.num_layers)
    config.window(facts)
    if facts.is_encoder_decoder != (config.encoder_column is not None):
        need = "is an encoder-decoder and needs" if facts.is_encoder_decoder else "has no encoder and takes no"
        raise ConfigError(f"{config.model} {need} encoder_column (--encoder-column).")
    if config.save == "matrices" and config.positions == "all" and facts.d_model > 1024:
        raise ConfigError(
            f"save matrices would write {len(layers)} x {facts.d_model}^2 numbers a token. "
            "Choose positions (--positions), or save factors."
        )
    if config.sketch is not None and 2 * config.sketch >= facts.d_model:
        raise ConfigError(
            f"sketch must be below {facts.d_model / 2:g}, half of d_model, got {config.sketch}: a sketch of so many rows is no "
            "smaller than the matrix. Leave it out (--sketch)."
        )
    sources = tuple(find_sources(config.corpus))
    written = f"{Storage(config.output).uri}/plan.parquet"
    for uri in config.corpus:
        if takes_in(uri, written):
            raise ConfigError(
                f"output {config.output} is in {absolute(uri)}, of the corpus, and would be part of it. Choose another place."
            )
    if not may_have_tokenizer(config.model):
        if config.encoder_column is not None:
            raise ConfigError(
                f"{config.model} has no tokenizer, which the encoder's text needs. Put tokenizer files beside the model."
            )
        for document in sample_documents(sources, config.layout, 1):
            token_ids(document, config.model, None, facts.vocab_size)
    sampled = config.group_by not in (None, "position")
    sample = list(sample_documents(sources, config.layout, _SAMPLE)) if sampled else []
    # Whoever reads the run later may be in another directory.
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    config = replace(config, model=model, corpus=tuple(map(absolute, config.corpus)))
    listed = [(source.name, source.size, source.version) for source in sources]
    # What is unset is left out, so that a setting that comes to be later changes no fingerprint of before. So are places
    # and a revision, as digests say what is there.
    settings = {
        k: v for k, v in config.asdict().items() if k not in _EXECUTION | {"corpus", "revision"} and v is not None
    }
    if config.estimator == "exact":
        settings.pop("num_samples", None)  # sweeps may set it for all their points
    if config.group_by in (None, "position"):
        settings.pop("num_groups")
    if Path(config.model).is_dir():
        settings.pop("model")  # its digests say what it is, wherever it is
    fixed = {
        **settings,
        "layers": layers,
        "corpus": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "weights": weights_digest(config.model, config.revision, config.trust_remote_code),
        "tokenizer": tokenizer_digest(config.model, config.revision, config.trust_remote_code),
        "result_version": RESULT_VERSION,
    }
    if config.ends_early:
        fixed["shuffled"] = True
    tokens = _frequent_tokens(config, sample, facts.vocab_size) if config.group_by == "token" else {}
    plan = Plan(config, facts, sources, tokens, fixed)
    _check_sums(plan, sample)
    return plan


def _check_sums(plan: Plan, sample: Sequence[Document]) -> None:
    """Refuse more groups than asked for, and more sums than a worker should hold.

    How many values a column has is known from a sample only; a task with more than were allowed is refused by its worker.
    """
    config, layers, width = plan.config, len(plan.layers), plan.facts.d_model
    if config.group_column is not None:
        index = config.layout.carried.index(config.group_column)
        values = len({document.carried[index] for document in sample})
        if values > config.num_groups:
            raise ConfigError(
                f"group_by {config.group_column}: {len(sample)} documents have {values} values of it, and at most "
                f"{config.num_groups} groups are allowed. Choose a column with fewer values, or allow more (--num-groups)."
            )
    needed = plan.cost.sums_memory
    if needed > MAX_SUMS:
        groups = plan.cost.num_groups
        kept = f"matrices of {width}^2" if config.sketch is None else f"sketches of {config.sketch} rows"
        raise ConfigError(
            f"{groups} groups x {layers} layers x 3 {kept} need {needed / 2**30:.0f} GiB of sums in every "
            f"worker; the limit is {MAX_SUMS >> 30} GiB. Take fewer layers a run (--layers), fewer groups (--num-groups), or "
            f"{'smaller sketches' if config.sketch else 'sketches'} (--sketch)."
        )


def _frequent_tokens(config: RunConfig, sample: Sequence[Document], vocab_size: int) -> dict[int, str]:
    """The most frequent tokens of a sample, with their text; of equally frequent ones the lowest."""
    tokenizer = load_tokenizer(config.model, config.revision, config.trust_remote_code)
    counts: Counter[int] = Counter()
    for document in sample:
        counts.update(token_ids(document, config.model, tokenizer, vocab_size))
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    return {token: token_text(token, tokenizer) for token in sorted(ranked[: config.num_groups - 1])}


def token_ids(document: Document, model: str, tokenizer: Any, vocab_size: int) -> list[int]:
    """A document's tokens, without any that the tokenizer of the model puts around a text."""
    if isinstance(document.content, list):
        strange = next((i for i in document.content if not 0 <= i < vocab_size), None)
        if strange is not None:
            raise CorpusError(
                f"{document.id}: token ids must be in [0, {vocab_size}), got {strange}. Were they made with {model}'s "
                "tokenizer?"
            )
        return document.content
    if tokenizer is None:
        raise CorpusError(
            f"{model} has no tokenizer and {document.id} holds text. Give token ids, or put tokenizer files beside the model."
        )
    return list(tokenizer(document.content, add_special_tokens=False, verbose=False)["input_ids"])


def token_text(token: int, tokenizer: Any) -> str:
    """A token as text, bytes of it that are no letter alone as ``<0xE4>``; its number without a tokenizer."""
    if tokenizer is None:
        return str(token)
    # After another one, as tokenizers drop the space that a text begins with.
    once, twice = (tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    text = str(twice.removeprefix(once))
    if "\ufffd" not in text:
        return text
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # here, as it loads what few need

    piece = str(tokenizer.convert_ids_to_tokens(token))
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    if not all(letter in byte_of for letter in piece):  # no bytes: the letter that stands for what is none
        return text
    decoded = bytes(byte_of[letter] for letter in piece).decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", decoded)


def visible(token: str) -> str:
    """A token's text in a line, its spaces and newlines made visible."""
    return repr(token)[1:-1].replace(" ", "·")


def position_bucket(position: int) -> str:
    """0, 1, 2-3, 4-7, ...: the group of a document position."""
    if position < 2:
        return str(position)
    low = 1 << (position.bit_length() - 1)
    return f"{low}-{2 * low - 1}"
