"""What a run has stored, read where it lies: no GPU, no cluster, no model. Finished runs and unfinished ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from fisher_ray.architecture import ModelError
from fisher_ray.cost import FAN_IN
from fisher_ray.plan import RunConfig, Task, Tasks, visible
from fisher_ray.reduce import Checkpoint
from fisher_ray.shards import (
    RUN_VERSION,
    Counts,
    Receipt,
    RunStore,
    distinct_workers,
    positions_schema,
    reduced_folder,
    task_name,
)
from fisher_ray.spectrum import covariance
from fisher_ray.statistics import Blocks, Estimate, Spectrum, mean_trace, spectrum
from fisher_ray.storage import DamagedError, StorageError, StoredFile, several
from fisher_ray.sums import LayerSums

T = TypeVar("T")

# Tables of positions that are read at once; with those ahead a few hundred megabytes at most.
_TABLES = 4


def open_run(uri: str | Path, *, trust_remote_code: bool = False) -> Run:
    """Open a run directory, on any fsspec URI.

    Args:
        uri: the directory.
        trust_remote_code: allow what loads the run's model again to run code that comes with it. That the run did is no
            reason: a run directory may be anybody's.

    Raises:
        StorageError: there is no run, or one of a format that this version does not know.
        DamagedError: its description is damaged.
    """
    return Run(RunStore(str(uri)), trust_remote_code)


def read_description(store: RunStore) -> dict[str, Any]:
    """run.json of a directory that has to hold a run; errors as of :func:`open_run`."""
    description = store.read_run()
    if description is None:
        raise StorageError(f"{store.uri} holds no run. Expected the directory given as --output.")
    if description.get("schema") != RUN_VERSION:
        raise StorageError(
            f"{store.uri} is written in format {description.get('schema')!r}, and this version reads {RUN_VERSION!r}. "
            "Read it with the version that wrote it."
        )
    return description


@dataclass(frozen=True)
class Shard:
    """What one task has kept of each position at one layer.

    Attributes:
        table: the positions, one row each.
        array: of the same rows: score factors [n, R, d_model], or matrices [n, d_model, d_model].
    """

    table: pa.Table
    array: np.ndarray


@dataclass
class Reading:
    """Reads what can be read of a run, and remembers what could not, so that damage costs only what was in it.

    Attributes:
        damaged: what was found damaged or gone, a line each.
        last: the line of what was met last.
    """

    damaged: list[str] = field(default_factory=list)
    last: str = ""

    def __call__(self, read: Callable[[], T]) -> T | None:
        """What ``read`` gives; None where a file of it is damaged or gone."""
        try:
            return read()
        except (DamagedError, FileNotFoundError) as error:
            self.last = str(error)
            if self.last not in self.damaged:
                self.damaged.append(self.last)
            return None


class Run:
    """A run. What it holds is found out once, when it is opened; open it again to see what has been done since.

    Attributes:
        description: run.json.
        complete: whether it is reduced, over every task that was not given up or up to where it ended early.
        tasks, done: how many tasks there are, and how many of them are done; of a run that ended early, how many it is over.
        done_tasks: which those are, ascending.
        layers: at which there are matrices.
        d_model: width of the residual stream.
    """

    def __init__(self, store: RunStore, trust_remote_code: bool = False):
        self.store, self._trusted = store, trust_remote_code
        self.description = description = read_description(store)
        self.layers: list[int] = description["layers"]
        self.d_model: int = description["d_model"]
        self.tasks: int = description["tasks"]
        done = sorted(int(name) for name in store.names("done"))
        self._manifest = self._reduced(done)
        self.complete = self._manifest is not None
        self.done_tasks = [task for task in done if task < self._made["last"]] if self.complete else done
        self.done = len(self.done_tasks)
        self._is_done = frozenset(self.done_tasks)
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        return f"Run({self.store.uri!r}: {self.status}; layers {self.layers}, d_model {self.d_model})"

    @cached_property
    def config(self) -> RunConfig:
        """The settings that the run was started with."""
        return RunConfig.from_dict(self.description["config"])

    def config_to_load(self) -> RunConfig:
        """The settings, with the model's commit, for loading its model and corpus again.

        Raises:
            ModelError: the model brings code, which the run was opened without trust in.
        """
        if self.config.trust_remote_code and not self._trusted:
            raise ModelError(
                f"{self.store.uri} was made with code that comes with the model {self.config.model}. If you trust that, let it "
                "run here (--trust-remote-code; open_run(..., trust_remote_code=True))."
            )
        return self.config.pinned(self.description["result_fields"]["weights"])

    @property
    def estimand(self) -> str:
        """What the mean matrices are an estimate of, in words."""
        return str(self.description["estimand"])

    def group_title(self, group: str) -> str:
        """A group's name, one without a letter in quotes; of a token's, which is its id, with the token's text."""
        text = self.description.get("tokens", {}).get(group)
        if text is None:
            return group if group.strip() else f'"{group}"'
        return f"{group} {visible(text)}"

    @property
    def status(self) -> str:
        """How much of it there is, in words."""
        if self.complete:
            given_up = f", {len(self._made['missing'])} given up" if self._made["missing"] else ""
            looked = self.checkpoints
            early = f", ended early: {looked[-1].words}" if looked and looked[-1].tasks < self.tasks else ""
            return f"complete, {self.done} of {self.tasks} tasks{given_up}{early}"
        return f"unfinished: {self.done} of {self.tasks} tasks are done, and everything here is of those"

    @cached_property
    def counts(self) -> Counts:
        """What became of the tokens."""
        if self.complete:
            return Counts(**self._made["counts"])
        return sum((receipt.counts for receipt in self._receipts()), Counts())

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Of a run that may end early: how well the mean F was known on the way."""
        return [Checkpoint(**looked) for looked in self._made["checkpoints"]] if self.complete else []

    @cached_property
    def provenance(self) -> list[dict[str, Any]]:
        """Device, versions and self-check of the workers: one for each device with other versions."""
        return distinct_workers(receipt for block in self._blocks for receipt in block)

    @cached_property
    def groups(self) -> list[str]:
        """Names of the groups that have means of their own."""
        if self.config.group_by is None:
            return []
        if self.complete:
            return sorted({row["group"] for row in self.summary} - {None})
        return sorted({name for block in self._sums(self.layers[0]) for name in block.groups})

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """summary.parquet: a row for each layer and group; empty before the run is complete."""
        if not self.complete:
            return []
        return self._rows("reduced/summary.parquet")

    @cached_property
    def directions(self) -> list[dict[str, Any]]:
        """directions.parquet: each layer's first eigenvectors with the tokens they move; empty before the run is complete."""
        return self._rows("reduced/directions.parquet") if self.complete else []

    def _rows(self, path: str) -> list[dict[str, Any]]:
        return pq.read_table(pa.BufferReader(self.store.load(self._stored(path)))).to_pylist()

    def corpus_tasks(self) -> Iterator[Task]:
        """The tasks that are done, in the order of the plan: the corpus's, but for runs that may end early."""
        tasks = Tasks(self.store.load(StoredFile(**self.description["plan"])))
        return (task for task in tasks if task.id in self._is_done)

    # ---- means -------------------------------------------------------------------------------------------------------

    def count(self, layer: int, group: str | None = None) -> int:
        """Positions that the mean is over."""
        if not self.complete:
            return int(self.blocks(layer, group).total.count)
        return int(self._row(layer, group)["positions"])

    def fisher(self, layer: int, group: str | None = None, normalised: bool = False) -> np.ndarray:
        """The mean of F, or of ``F / tr F``, [d_model, d_model], float64; mapped from disk where it is on one.

        ``F / tr F`` has another mean for each estimator and number of samples: not to be compared across them.

        Raises:
            ValueError: no such layer or group.
            DamagedError: a file holds other bytes than were written.
        """
        if self.config.sketch is not None:
            factors = self.fisher_factors(layer, group, normalised)
            return factors.T @ factors
        if self.complete:
            return self._array(layer, group, "normalised_fisher" if normalised else "fisher")
        return self.blocks(layer, group).total.mean("normalised" if normalised else "fisher")

    def fisher_factors(self, layer: int, group: str | None = None, normalised: bool = False) -> np.ndarray:
        """Rows G of the sketch of a mean, [at most sketch, d_model], float64: ``F = G^T G + E``; of runs with ``sketch``.

        ``0 <= E <= sketch_error I``, see :meth:`sketch_error`.

        Raises:
            ValueError: no such layer or group, or sums are kept in full.
        """
        self._check(layer, group)
        if self.config.sketch is None:
            raise ValueError(
                f"{self.store.uri} keeps its sums in full: read fisher(layer). Sketches are kept by --sketch."
            )
        if self.complete and group is None:
            return self._array(layer, None, "normalised_fisher_factors" if normalised else "fisher_factors")
        if self.complete:
            stored = self._stored(f"{reduced_folder(layer)}/groups.npz")
            sums = LayerSums.from_bytes(self.store.load(stored)).groups[str(group)]
        else:
            sums = self.blocks(layer, group).total
        return sums.mean("normalised" if normalised else "fisher")

    def sketch_error(self, layer: int, group: str | None = None) -> float:
        """The most that a sketch can have lost of any eigenvalue of the mean F; 0 where sums are kept in full."""
        if self.complete:
            return float(self._row(layer, group)["sketch_error"])
        return self.blocks(layer, group).total.sketch_error

    def activation(self, layer: int, group: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d_model] and covariance [d_model, d_model] of the residual stream.

        Of sketches the second moment is a lower bound, and what is left of it need not be positive semi-definite.
        """
        blocks = self.blocks(layer, group)
        mean = blocks.mean("activation")
        return mean.numpy(), covariance(blocks.mean("second_moment"), mean).numpy()

    def blocks(self, layer: int, group: str | None = None) -> Blocks:
        """Sums over blocks of documents, no document in two of them: what standard errors are made of."""
        self._check(layer, group)
        found = [sums.total() if group is None else sums.groups.get(group) for sums in self._sums(layer)]
        if not any(found):
            raise ValueError(f"no position of {self.store.uri} is scored yet at layer {layer}.")
        return Blocks(found)

    @cached_property
    def block_positions(self) -> list[int]:
        """Positions scored in each block, of all groups."""
        one = f"sums_{self.layers[0]}"  # several receipts of a block may be over the same tasks, each of some layers
        return [sum(receipt.counts.scored for receipt in block if one in receipt.files) for block in self._blocks]

    def spectrum(self, layer: int, group: str | None = None, whitened: bool = False) -> Spectrum:
        """Eigenvalues with standard errors, eigenvectors, effective dimensions; see :func:`fisher_ray.statistics.spectrum`."""
        return spectrum(self.blocks(layer, group), whitened)

    # ---- positions ---------------------------------------------------------------------------------------------------

    def positions(self) -> ds.Dataset:
        """The table of positions, one row a (document, position, layer), as a dataset: nothing is read yet.

        Filters and columns are pushed down to the files: ``run.positions().to_table(["trace"], ds.field("layer") == 3)``.
        Only files that receipts name are in it.
        """
        paths = [receipt.files["positions"].path for receipt in self._receipts() if "positions" in receipt.files]
        schema = positions_schema(self.config.kept_columns, {})
        if not paths:
            return ds.dataset(pa.Table.from_pylist([], schema))
        filesystem, root = self.store.arrow()
        return ds.dataset([f"{root}/{path}" for path in paths], schema, format="parquet", filesystem=filesystem)

    def table(self, task: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Positions of one task: every layer's in turn, by document and position; no row where it is not done.

        Raises:
            DamagedError: the file holds other bytes than were written.
        """
        if task in self._is_done:
            receipt = self.store.receipt("done", task_name(task))
            if "positions" in receipt.files:
                return self._table(receipt, columns)
        empty = positions_schema(self.config.kept_columns, {}).empty_table()
        return empty if columns is None else empty.select(columns)

    def tables(self, reading: Reading, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table | None]]:
        """Every task that is done, in order, with its positions as of :meth:`table`; None for what ``reading`` found damaged.

        A few are read at once and ahead, as each takes two requests of the storage.
        """

        def read(task: int) -> Callable[[], pa.Table]:
            try:
                table = self.table(task, columns)
            except (DamagedError, FileNotFoundError) as error:
                return partial(_raised, error)
            return lambda: table

        found = several(read, self.done_tasks, _TABLES)
        return ((task, reading(given)) for task, given in zip(self.done_tasks, found, strict=True))

    def of_layer(self, table: pa.Table, layer: int) -> pa.Table:
        """One layer's rows of a task's table, without copying them."""
        rows = len(table) // len(self.layers)
        return table.slice(self.layers.index(layer) * rows, rows)

    def group_traces(self, layer: int) -> dict[str, tuple[int, Estimate]]:
        """Positions of each group and the trace of its mean F, by name; of an unfinished run, of the tasks done."""
        self._check(layer, None)
        blocks: dict[str, list[tuple[int, float]]] = {}
        for sums in self._sums(layer):
            for name, group in sums.groups.items():
                blocks.setdefault(name, []).append((group.count, group.fisher.trace))
        return {name: (sum(n for n, _ in blocks[name]), mean_trace(blocks[name])) for name in sorted(blocks)}

    def factors(self, layer: int, tasks: Iterable[int] | None = None) -> Iterator[Shard]:
        """Score factors G of every position, ``F = G^T G``, a task at a time; of runs with ``save="factors"``.

        Args:
            tasks: of these only; None: of all that are done.
        """
        return self._kept("factors", layer, tasks)

    def matrices(self, layer: int, tasks: Iterable[int] | None = None) -> Iterator[Shard]:
        """F of every position, a task at a time, as :meth:`factors`; of runs with ``save="matrices"`` or ``"factors"``."""
        if self.config.save != "factors":
            return self._kept("matrices", layer, tasks)
        return (Shard(shard.table, _squared(shard.array)) for shard in self.factors(layer, tasks))

    def matrix(self, layer: int, document: str, position: int, task: int | None = None) -> np.ndarray:
        """F of one position, [d_model, d_model], of runs that keep factors or matrices.

        Args:
            layer: one of the run's.
            document: its id.
            position: of the document.
            task: the one that has scored it; None: it is looked up by the names of documents, as :meth:`task_of` does.

        Raises:
            ValueError: there is no such position, or the run keeps neither.
        """
        self._check_kept(("factors", "matrices"), layer)
        task = self.task_of(document) if task is None else task
        for shard in self._kept(self.config.save, layer, [] if task is None else [task]):
            there = pc.and_(pc.equal(shard.table["document"], document), pc.equal(shard.table["position"], position))
            for row in np.flatnonzero(there):
                found = shard.array[row : row + 1]
                return np.asarray((_squared(found) if self.config.save == "factors" else found)[0])
        raise ValueError(f"{self.store.uri} has no scored position {position} in a document {document!r}.")

    def task_of(self, document: str) -> int | None:
        """The task that has scored positions of a document, if there is one.

        Raises:
            DamagedError: it is in no table that can be read, and there are others.
        """
        try:
            where = self.positions().to_table(["__filename"], filter=pc.field("document") == document)
            return int(Path(where["__filename"][0].as_py()).name[:8]) if len(where) else None
        except (OSError, pa.ArrowException):
            damaged: DamagedError | None = None  # some table is: one after the other, by their checksums
        for receipt in self._receipts():
            try:
                if (
                    "positions" in receipt.files
                    and document in self._table(receipt, ["document"])["document"].to_pylist()
                ):
                    return int(receipt.name)
            except DamagedError as error:
                damaged = error
        if damaged is not None:
            raise damaged
        return None

    def _kept(self, what: str, layer: int, tasks: Iterable[int] | None) -> Iterator[Shard]:
        self._check_kept((what,), layer)
        receipts = self.store.receipts(self.done_tasks if tasks is None else tasks)
        return (self._shard(receipt, what, layer) for receipt in receipts if "positions" in receipt.files)

    def _check_kept(self, whats: tuple[str, ...], layer: int) -> None:
        self._check(layer, None)
        if self.config.save not in whats:
            raise ValueError(
                f"{self.store.uri} keeps no {' and no '.join(whats)} of single positions: it was run with --save "
                f"{self.config.save}. Run it again with --save {whats[0]} in another directory."
            )

    def _shard(self, receipt: Receipt, what: str, layer: int) -> Shard:
        table = self.of_layer(self._table(receipt), layer)
        return Shard(table, np.load(io.BytesIO(self.store.load(receipt.files[f"{what}_{layer}"])), allow_pickle=False))

    def _table(self, receipt: Receipt, columns: Sequence[str] | None = None) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.store.load(receipt.files["positions"])), columns=columns)

    # ---- files -------------------------------------------------------------------------------------------------------

    def _reduced(self, done: list[int]) -> dict[str, Any] | None:
        """The manifest of a reduction over all that is done; without a sound one the sums of the tasks serve."""
        try:
            manifest = self.store.read_sealed("reduced/manifest.json")
        except (FileNotFoundError, DamagedError):
            return None
        same = manifest["fingerprint"] == self.description["fingerprint"]
        return manifest if same and manifest["tasks"] == sum(task < manifest["last"] for task in done) else None

    @property
    def _made(self) -> dict[str, Any]:
        assert self._manifest is not None
        return self._manifest

    def _receipts(self) -> Iterator[Receipt]:
        return self.store.receipts(self.done_tasks)

    @cached_property
    def _blocks(self) -> list[list[Receipt]]:
        """Receipts that together hold each block's sums: of the tree where there is one, else of tasks."""
        if self.complete:
            return [
                [self.store.receipt(*path.split("/")) for path in dict.fromkeys(block["receipts"])]
                for block in self._made["blocks"]
            ]
        parts = np.array_split(np.array(self.done_tasks), min(FAN_IN, max(1, self.done)))
        return [list(self.store.receipts(part.tolist())) for part in parts if len(part)]

    def _sums(self, layer: int) -> Iterator[LayerSums]:
        for block in self._blocks:
            total = LayerSums({})
            for receipt in block:
                if f"sums_{layer}" in receipt.files:
                    total.merge(LayerSums.from_bytes(self.store.load(receipt.files[f"sums_{layer}"])))
            yield total

    def _check(self, layer: int, group: str | None) -> None:
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {self.layers}, got {layer}.")
        if group is not None and group not in self.groups:
            known = ", ".join(self.groups[:20]) or "none: it was run without --group-by"
            raise ValueError(f"no group {group!r} in {self.store.uri}. Known: {known}.")

    def _row(self, layer: int, group: str | None) -> dict[str, Any]:
        """Of the summary."""
        self._check(layer, group)
        return next(row for row in self.summary if (row["layer"], row["group"]) == (layer, group))

    def _array(self, layer: int, group: str | None, name: str) -> np.ndarray:
        """An array of the reduction; one of a local file is checked once and mapped."""
        self._check(layer, group)
        stored = self._stored(f"{reduced_folder(layer, group)}/{name}.npy")
        local = self.store.local_path(stored.path)
        if local is None:
            return np.load(io.BytesIO(self.store.load(stored)), allow_pickle=False)
        if stored.path not in self._checked:
            self.store.load(stored)
            self._checked.add(stored.path)
        return np.load(local, mmap_mode="r", allow_pickle=False)

    def _stored(self, path: str) -> StoredFile:
        return StoredFile(**self._made["files"][path])


def _raised(error: Exception) -> NoReturn:
    raise error


def _squared(factors: np.ndarray) -> np.ndarray:
    """``G^T G`` of each position, float64."""
    wide = factors.astype(np.float64)
    return np.einsum("nri,nrj->nij", wide, wide)
