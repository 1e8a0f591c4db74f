"""What a run is: its configuration, its fingerprint, and its tasks.

A plan is made from metadata and never changed: a list of tasks, each a few source ranges of the corpus. Windows, batches
and token counts follow from range and configuration alone, so any worker gives any task the same result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pyarrow as pa

from fisher_ray.architecture import DTYPES, ModelFacts, tokenizer_digest, weights_digest
from fisher_ray.corpus import Layout, SourceRange, Unit, find_ranges, take
from fisher_ray.estimators import Estimator, Exact, Sampled, check_tempering
from fisher_ray.scores import TokenSource
from fisher_ray.shards import POSITION_FIELDS
from fisher_ray.split import Gradients

# Raised whenever the same configuration would give other numbers.
RESULT_VERSION = 1

Save = Literal["summary", "factors", "matrices"]

# Settings that change how a run is executed and not what it computes.
_EXECUTION = frozenset({"output", "actors", "gpus_per_actor"})

# A task's text: a few minutes of work for a small model on a CPU, so that a lost task costs little, and its sums, written
# once a task, weigh nothing beside its computation. Factors and matrices of one task are held in memory: this bounds them.
_TASK_BYTES = 1 << 15
_TASK_ARRAYS = 1 << 28

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


class ConfigError(ValueError):
    """A setting that cannot be, or does not fit the model."""


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


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is told. ``fisher-ray run --help`` describes each setting.

    Attributes:
        layers: ``all``, a range ``0-11`` or a list ``3,6``.
        max_seq_len: tokens a window, the sink included; None: what the model has positions for, at most 512.
        stride: tokens that a window repeats from the one before; None: a quarter of the window.
        batch_tokens: tokens that go through the model together, before the memory budget cuts them further.
        threads: CPU threads an actor; part of the result, since they change the order of sums.
    """

    model: str
    corpus: tuple[str, ...]
    output: str
    layers: str = "all"
    estimator: str = "sampled"
    num_samples: int = 8
    top_p: float = 1.0
    temperature: float = 1.0
    token_source: TokenSource = "observed"
    token_draws: int = 1
    token_top_p: float = 1.0
    token_temperature: float = 1.0
    max_seq_len: int | None = None
    stride: int | None = None
    batch_tokens: int = 4096
    positions: str = "all"
    max_docs: int | None = None
    column: str = "text"
    unit: Unit = "paragraph"
    encoder_column: str | None = None
    columns: tuple[str, ...] = ()
    save: Save = "summary"
    seed: int = 0
    dtype: str = "float32"
    gradients: Gradients = "own_position"
    revision: str | None = None
    trust_remote_code: bool = False
    memory_budget: int | None = None
    actors: int | None = None
    gpus_per_actor: float | None = None
    cpus_per_actor: int = 1

    def __post_init__(self) -> None:
        self.make_estimator()
        check_tempering(self.token_top_p, self.token_temperature, "token_")
        Positions(self.positions)
        for name, options in (
            ("token_source", ("observed", "sampled")),
            ("save", ("summary", "factors", "matrices")),
            ("unit", ("paragraph", "file")),
            ("gradients", ("own_position", "per_position")),
            ("dtype", tuple(DTYPES)),
        ):
            if getattr(self, name) not in options:
                raise ConfigError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}.")
        for name in (
            "token_draws",
            "batch_tokens",
            "cpus_per_actor",
            "max_docs",
            "actors",
            "max_seq_len",
            "memory_budget",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if self.token_source == "observed" and self.token_draws != 1:
            raise ConfigError(f"token_draws is for token_source sampled, got {self.token_draws} with observed tokens.")
        if self.gpus_per_actor is not None and self.gpus_per_actor < 0:
            raise ConfigError(f"gpus_per_actor must not be negative, got {self.gpus_per_actor}.")
        taken = {name for name, _ in POSITION_FIELDS} & set(self.columns)
        if taken:
            raise ConfigError(
                f"columns must not be named {', '.join(sorted(taken))}: the table of positions has such already."
            )
        if not self.corpus:
            raise ConfigError("corpus must name at least one file, folder or glob.")

    def make_estimator(self) -> Estimator:
        """The estimator that the settings name."""
        if self.estimator == "exact":
            return Exact()
        if self.estimator == "sampled":
            return Sampled(self.num_samples, self.top_p, self.temperature)
        raise ConfigError(f"estimator must be exact or sampled, got {self.estimator!r}.")

    @property
    def layout(self) -> Layout:
        """How documents lie in the corpus's files."""
        return Layout(self.column, self.unit, self.encoder_column, tuple(self.columns))

    def layer_list(self, num_layers: int) -> list[int]:
        """The layers meant, ascending."""
        if self.layers == "all":
            return list(range(num_layers + 1))
        chosen: set[int] = set()
        for part in str(self.layers).split(","):
            first, dash, last = part.strip().partition("-")
            try:
                chosen.update(range(int(first), int(last if dash else first) + 1))
            except ValueError as error:
                raise ConfigError(f"layers must be all, a range 0-11 or a list 3,6; got {self.layers!r}.") from error
        if not chosen:
            raise ConfigError(f"layers {self.layers!r} names none; the range runs backwards.")
        if max(chosen) > num_layers:
            raise ConfigError(
                f"layer_idx must be in [0, {num_layers}], got {max(chosen)}. {self.model} has {num_layers} blocks."
            )
        return sorted(chosen)

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

    def asdict(self) -> dict[str, Any]:
        """Plain values, as written to run.json and read from a config file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of :meth:`asdict`; unknown names are refused."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}. Known: {', '.join(sorted(known))}.")
        for name in ("corpus", "columns"):
            if isinstance(values.get(name), str):
                values = {**values, name: [values[name]]}
        missing = [name for name in ("model", "corpus", "output") if not values.get(name)]
        if missing:
            raise ConfigError(f"{', '.join(missing)} must be given (--{missing[0]}).")
        for name, hint in get_type_hints(cls).items():
            if name in values and not _fits(values[name], hint):
                expected = getattr(hint, "__name__", str(hint).replace("typing.", ""))
                raise ConfigError(f"{name} must be {expected}, got {values[name]!r}.")
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settings)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from a file is of the annotated type."""
    origin = get_origin(hint)
    if origin is UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return isinstance(value, str)  # which of them is checked with the others' options
    if origin is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


@dataclass(frozen=True)
class Task:
    """The unit of work and of retry."""

    id: int
    ranges: tuple[SourceRange, ...]

    @property
    def weight(self) -> int:
        """Bytes that reading and computing are expected to cost by."""
        return sum(source.weight for source in self.ranges)


@dataclass(frozen=True)
class Plan:
    """A run, decided: configuration, what the model's configuration says, and tasks.

    Attributes:
        result_fields: everything that changes results, by name; two runs with the same ones give the same bits on the
            same kind of hardware.
    """

    config: RunConfig
    facts: ModelFacts
    tasks: tuple[Task, ...]
    result_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return self.config.layer_list(self.facts.num_layers)

    @property
    def fingerprint(self) -> str:
        """sha256 over what changes results."""
        return hashlib.sha256(json.dumps(self.result_fields, sort_keys=True).encode()).hexdigest()

    def table(self) -> pa.Table:
        """One row a source range."""
        rows = [{"task": task.id, **asdict(source)} for task in self.tasks for source in task.ranges]
        return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


def make_plan(config: RunConfig) -> Plan:
    """Decide a run: read the model's configuration and the corpus's metadata, and cut the corpus into tasks.

    Raises:
        ModelError, ConfigError, CorpusError: whatever can be known to be wrong before a worker starts.
    """
    facts = ModelFacts.read(config.model, config.revision, config.trust_remote_code)
    layers = config.layer_list(facts.num_layers)
    config.window(facts)
    if facts.is_encoder_decoder != (config.encoder_column is not None):
        need = "is an encoder-decoder and needs" if facts.is_encoder_decoder else "has no encoder and takes no"
        raise ConfigError(f"{config.model} {need} encoder_column (--encoder-column).")
    if config.save != "summary" and config.positions == "all" and config.save == "matrices" and facts.d_model > 1024:
        raise ConfigError(
            f"save matrices would write {len(layers)} x {facts.d_model}^2 numbers a token. "
            "Choose positions (--positions), or save factors."
        )
    target = _task_bytes(config, facts, len(layers))
    ranges = find_ranges(config.corpus, config.layout, target)
    if config.max_docs is not None:
        ranges = take(ranges, config.max_docs, config.layout)
    tasks = tuple(Task(i, tuple(group)) for i, group in enumerate(_grouped(ranges, target)))
    plan = Plan(config, facts, tasks)
    settings = {key: value for key, value in config.asdict().items() if key not in _EXECUTION | {"corpus"}}
    sources = hashlib.sha256(json.dumps(plan.table().drop_columns("path").to_pylist()).encode()).hexdigest()
    fixed = {
        **settings,
        "layers": layers,
        "corpus": sources,
        "weights": weights_digest(config.model, config.revision),
        "tokenizer": tokenizer_digest(config.model, config.revision),
        "result_version": RESULT_VERSION,
    }
    return Plan(config, facts, tasks, fixed)


def _task_bytes(config: RunConfig, facts: ModelFacts, num_layers: int) -> int:
    """Text a task: fixed, unless the factors or matrices asked for would not fit in memory."""
    if config.save == "summary":
        return _TASK_BYTES
    rows = facts.d_model
    if config.save == "factors":
        rows = min(rows, config.token_draws * config.make_estimator().num_factors(facts.vocab_size, facts.d_model))
    tokens = _TASK_ARRAYS // (4 * num_layers * rows * facts.d_model)
    return max(256, min(_TASK_BYTES, 3 * tokens))


def _grouped(ranges: Sequence[SourceRange], target: int) -> Iterator[list[SourceRange]]:
    """Neighbouring ranges together up to the target weight, so that many small files do not make many small tasks."""
    group: list[SourceRange] = []
    for source in ranges:
        if group and sum(s.weight for s in group) + source.weight > target:
            yield group
            group = []
        group.append(source)
    if group:
        yield group
