"""What a run stores, where, and how it is committed: the only module that knows the layout.

    run.json                      configuration, versions, fingerprint, counts
    plan.parquet                  task -> source ranges
    positions/TASK-ATTEMPT.parquet one row per (document, position, layer)
    sums/TASK-ATTEMPT.npz         per-layer sums over the task's positions
    factors|matrices/TASK-ATTEMPT/layer_KKK.npy   where asked for, rows as in the task's table
    done/TASK.json                the receipt: what makes a task done
    reduced/                      means and spectra, one .npy an array, and summary.parquet

Data goes under an attempt-unique name first; then a receipt is created, if there is none yet, that names the data with
its sha256. Readers read only what a receipt names, so a half-written or superseded attempt is never seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

TOP_EIGENVALUES = 4

POSITIONS_VERSION = "positions.1"
POSITION_FIELDS: list[tuple[str, pa.DataType]] = [
    ("document", pa.string()),
    ("position", pa.int32()),
    ("layer", pa.int16()),
    ("token", pa.int32()),
    ("text", pa.string()),
    ("context", pa.int32()),
    ("entropy", pa.float32()),
    ("surprisal", pa.float32()),
    ("kept_mass", pa.float32()),
    ("trace", pa.float32()),
    ("top_eigenvalues", pa.list_(pa.float32())),
    ("participation_ratio", pa.float32()),
    ("entropy_rank", pa.float32()),
    ("trace_rank_99", pa.float32()),
]


def positions_schema(carried: tuple[str, ...], metadata: dict[str, str]) -> pa.Schema:
    """The table of positions: fixed fields, then the corpus columns carried along, as strings."""
    fields = [*POSITION_FIELDS, *((column, pa.string()) for column in carried)]
    return pa.schema(fields, metadata={"fisher_ray.schema": POSITIONS_VERSION, **metadata})


class StorageError(RuntimeError):
    """A run directory that is not what it should be."""


class Sums:
    """Sums over positions, per layer: F, F / tr F, h and h h^T; float64 throughout.

    Attributes:
        layers: ascending.
        count: [L], positions.
        traced: [L], positions with a trace above zero, over which F / tr F is summed.
        fisher, normalised, second_moment: [L, d, d].
        activation: [L, d].
    """

    # float32 products of at most this many rows are added into float64: longer ones lose digits.
    _ROWS = 4096
    _MATRICES = ("fisher", "normalised", "second_moment")

    def __init__(self, layers: list[int], d_model: int, device: torch.device | str = "cpu"):
        self.layers = list(layers)
        n = len(self.layers)
        self.count = torch.zeros(n, dtype=torch.int64)
        self.traced = torch.zeros(n, dtype=torch.int64)
        self.fisher, self.normalised, self.second_moment = (
            torch.zeros(n, d_model, d_model, dtype=torch.float64, device=device) for _ in range(3)
        )
        self.activation = torch.zeros(n, d_model, dtype=torch.float64, device=device)

    def add(self, layer: int, factors: Float[Tensor, "N R d"], activations: Float[Tensor, "N D d"]) -> None:
        """Add N positions of one layer."""
        i = self.layers.index(layer)
        step = max(1, self._ROWS // max(factors.shape[1], activations.shape[1]))
        for start in range(0, len(factors), step):
            g, h = factors[start : start + step], activations[start : start + step]
            trace = g.square().sum((1, 2))
            traced = trace > 0
            unit = (g * trace.rsqrt().where(traced, 0)[:, None, None]).flatten(0, 1)
            g = g.flatten(0, 1)
            self.fisher[i] += g.mT @ g
            self.normalised[i] += unit.mT @ unit
            self.activation[i] += h.mean(1).double().sum(0)
            flat = h.flatten(0, 1)
            self.second_moment[i] += (flat.mT @ flat) / h.shape[1]
            self.count[i] += len(h)
            self.traced[i] += int(traced.sum())

    def merge(self, other: Sums) -> None:
        """Add another's sums to these."""
        if other.layers != self.layers or other.fisher.shape != self.fisher.shape:
            raise StorageError(f"sums over layers {other.layers} cannot be added to sums over {self.layers}.")
        for name in ("count", "traced", "activation", *self._MATRICES):
            getattr(self, name).add_(getattr(other, name))

    def to_bytes(self) -> bytes:
        """An .npz: symmetric matrices as packed upper triangles, rounded once, to float32."""
        d = self.fisher.shape[-1]
        upper = torch.triu_indices(d, d, device=self.fisher.device)
        arrays: dict[str, np.ndarray] = {
            "layers": np.array(self.layers),
            "count": self.count.numpy(),
            "traced": self.traced.numpy(),
            "activation": self.activation.cpu().numpy(),
        }
        for name in self._MATRICES:
            arrays[name] = getattr(self, name)[:, upper[0], upper[1]].float().cpu().numpy()
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Sums:
        """The inverse of :meth:`to_bytes`."""
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            d = arrays["activation"].shape[1]
            sums = cls(arrays["layers"].tolist(), d)
            sums.count, sums.traced = torch.from_numpy(arrays["count"]), torch.from_numpy(arrays["traced"])
            sums.activation = torch.from_numpy(arrays["activation"])
            upper = torch.triu_indices(d, d)
            for name in cls._MATRICES:
                matrix, packed = getattr(sums, name), torch.from_numpy(arrays[name]).double()
                matrix[:, upper[0], upper[1]] = packed
                matrix[:, upper[1], upper[0]] = packed
        return sums


@dataclass(frozen=True)
class StoredFile:
    """One file that a receipt vouches for."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Counts:
    """What became of a task's tokens: ``tokens = scored + skipped + invalid``.

    Attributes:
        documents: read; of them ``empty`` had no tokens.
        tokens: of all documents, sinks not counted.
        scored: positions in the table.
        skipped: positions not asked for, or without a token before them to draw from.
        invalid: positions whose activations or scores were not finite.
    """

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    scored: int = 0
    skipped: int = 0
    invalid: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Receipt:
    """What a worker returns for a task, and what makes the task done.

    Attributes:
        fingerprint: of the plan the task belongs to.
        halvings: how often memory ran out and a micro-batch was halved, which may change rounding.
        seconds: of computing.
    """

    task: int
    fingerprint: str
    files: dict[str, StoredFile]
    counts: Counts
    halvings: int
    seconds: float
    worker: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON."""
        return _json_bytes(asdict(self))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Receipt:
        """The inverse of :meth:`to_bytes`."""
        values = json.loads(raw)
        files = {name: StoredFile(**stored) for name, stored in values.pop("files").items()}
        return cls(files=files, counts=Counts(**values.pop("counts")), **values)


class RunStore:
    """A run directory on any fsspec file system.

    Args:
        uri: the directory.
    """

    def __init__(self, uri: str):
        try:
            self._fs, self._root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot open {uri}: {error}") from error
        self.uri = self._fs.unstrip_protocol(self._root) if "://" in uri else str(Path(self._root))
        self._made: str | None = None
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    # ---- the run itself ----------------------------------------------------------------------------------------------

    def read_run(self) -> dict[str, Any] | None:
        """run.json, or None where there is no run; a directory with something else in it is refused."""
        if self._fs.isfile(self._root):
            raise StorageError(f"output {self.uri} is a file. Choose a directory that is new, empty or a run's own.")
        if self._exists("run.json"):
            try:
                run = json.loads(self.read("run.json"))
            except ValueError:
                run = None
            if isinstance(run, dict) and "fingerprint" in run:
                return run
            raise StorageError(f"run.json in {self.uri} was not written by a run of ours. Choose another directory.")
        if self._fs.isdir(self._root) and self._fs.ls(self._root, detail=False):
            raise StorageError(
                f"output directory {self.uri} is not empty and holds no run of ours. Choose a new or empty one."
            )
        return None

    def create_run(self, description: dict[str, Any], plan: pa.Table) -> None:
        """Write plan and description of a new run; of two at once, one is refused."""
        self._made = self._first_missing() if self._local else self._root
        try:
            self.write("plan.parquet", parquet_bytes(plan))
            created = self.create("run.json", _json_bytes(description))
        except OSError as error:
            raise StorageError(
                f"cannot write to {self.uri}: {error}. Choose a directory that can be written."
            ) from error
        if not created:
            raise StorageError(f"another run was started in {self.uri} just now. Choose another directory.")

    def discard(self) -> None:
        """Remove a run that :meth:`create_run` made and that produced nothing, with the folders made for it."""
        if self._made is not None:
            self._fs.rm(self._made, recursive=True)
            return
        for path in self._fs.ls(self._root, detail=False):
            self._fs.rm(path, recursive=True)

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def commit(self, receipt: Receipt) -> Receipt:
        """Make a task done; where another attempt came first, the receipt is that one's."""
        if self.create(f"done/{receipt.task:08d}.json", receipt.to_bytes()):
            return receipt
        return Receipt.from_bytes(self.read(f"done/{receipt.task:08d}.json"))

    def receipts(self, fingerprint: str) -> dict[int, Receipt]:
        """All done tasks of a plan, by id."""
        with contextlib.suppress(FileNotFoundError):
            found = (Receipt.from_bytes(self.read(path)) for path in sorted(self.list("done")))
            return {receipt.task: receipt for receipt in found if receipt.fingerprint == fingerprint}
        return {}

    def store(self, path: str, raw: bytes) -> StoredFile:
        """Write a data file and say what was written."""
        self.write(path, raw)
        return StoredFile(path, hashlib.sha256(raw).hexdigest(), len(raw))

    def load(self, stored: StoredFile) -> bytes:
        """Read a data file back, refusing any other bytes than those that were written."""
        raw = self.read(stored.path)
        if hashlib.sha256(raw).hexdigest() != stored.sha256:
            raise StorageError(
                f"{self.uri}/{stored.path} is damaged: expected {stored.bytes} bytes with sha256 {stored.sha256[:12]}..., "
                f"got {len(raw)} other ones. Remove its receipt in done/ and run again."
            )
        return raw

    # ---- bytes -------------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """A file's bytes."""
        return bytes(self._fs.cat_file(f"{self._root}/{path}"))

    def list(self, folder: str) -> Iterator[str]:
        """Files of a folder, as paths below the run."""
        for found in self._fs.ls(f"{self._root}/{folder}", detail=False):
            name = found.rsplit("/", 1)[1]
            if not name.startswith("."):
                yield f"{folder}/{name}"

    def write(self, path: str, raw: bytes) -> None:
        """Write a file whole or not at all; the file may exist."""
        if not self._local:
            self._fs.pipe_file(f"{self._root}/{path}", raw)
            return
        with self._temporary(path, raw) as temporary:
            Path(temporary).replace(f"{self._root}/{path}")

    def create(self, path: str, raw: bytes) -> bool:
        """Write a file whole unless there is one; whether it was written. Of several at once exactly one wins."""
        if not self._local:
            try:
                self._fs.pipe_file(f"{self._root}/{path}", raw, mode="create")
            except FileExistsError:
                return False
            return True
        with self._temporary(path, raw) as temporary:
            try:
                os.link(temporary, f"{self._root}/{path}")
            except FileExistsError:
                return False
            return True

    @contextlib.contextmanager
    def _temporary(self, path: str, raw: bytes) -> Iterator[str]:
        folder = Path(f"{self._root}/{path}").parent
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()

    def _first_missing(self) -> str | None:
        """The topmost folder that creating the run directory will create; None where it exists."""
        root = Path(self._root)
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        return str(missing[-1]) if missing else None

    def _exists(self, path: str) -> bool:
        return bool(self._fs.exists(f"{self._root}/{path}"))


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _json_bytes(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
