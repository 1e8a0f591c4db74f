"""What a run stores and where, what makes it done, and who may work on it: the only module that knows the layout.

    run.json                        configuration, versions, fingerprint
    plan.parquet                    task -> source ranges
    lease/NNNNNN.json               the driver at work; gone when it has left
    progress.json                   how far it is
    positions/TASK-ATTEMPT.parquet  one row per (document, position, layer)
    sums/TASK-ATTEMPT/layer_KKK.npz sums over the task's positions, by group
    factors|matrices/TASK-ATTEMPT/layer_KKK.npy   where asked for, rows as in the task's table
    done/TASK.json                  the receipt: what makes a task done
    quarantine/TASK.json            why a task was given up
    tree/NODE.json                  the receipt of a sum over tasks, with its tree/NODE-ATTEMPT/layer_KKK.npz
    reduced/                        means and spectra, one .npy an array, summary.parquet; named by manifest.json

Data goes under an attempt-unique name first; then a receipt is created, if there is none yet, that names the data with
its sha256. Readers read only what a receipt names, so a half-written or superseded attempt is never seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisher_ray.storage import (
    WRITING,
    DamagedError,
    OutageError,
    Storage,
    StorageError,
    StoredFile,
    seal,
    several,
    unseal,
)

T = TypeVar("T")

TOP_EIGENVALUES = 4

# All that a run writes; anything else in its directory is somebody's own.
# Numbers of tasks; of sums, spans of them and what each is without.
_RECEIPT, _SUM = re.compile(r"([0-9]+)\.json"), re.compile(r"([0-9]+-[0-9][0-9a-z-]*)\.json")
_FILES = ("run.json", "plan.parquet", "progress.json")
_FOLDERS = ("lease", "positions", "sums", "factors", "matrices", "done", "quarantine", "tree", "reduced")

# File systems take 255 bytes a name.
_LONGEST_NAME = 200

RUN_VERSION = "run.5"
POSITIONS_VERSION = "positions.2"
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
    ("captured_share", pa.float32()),
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


class RefusedError(StorageError):
    """A directory that holds another run, or that another driver works on."""


@dataclass(frozen=True)
class Counts:
    """What became of a task's tokens: ``tokens = scored + skipped + invalid``.

    Attributes:
        documents: read; of them ``empty`` had no tokens.
        tokens: of all documents, sinks not counted.
        scored: positions in the table.
        skipped: positions not asked for, or without a token before them to draw from.
        invalid: positions whose activations or scores were not finite.
        halvings: how often memory ran out and a micro-batch was halved, which may change rounding.
    """

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    scored: int = 0
    skipped: int = 0
    invalid: int = 0
    halvings: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Receipt:
    """What vouches for a task's shard, or for a sum over tasks.

    Attributes:
        name: of the task or node.
        fingerprint: of the plan it belongs to.
        files: by what they hold.
        seconds: spent, by stage.
        workers: device, versions and self-check of whoever computed it; of a sum one for each device with other versions.
    """

    name: str
    fingerprint: str
    files: dict[str, StoredFile]
    counts: Counts
    seconds: dict[str, float] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Receipt:
        """The inverse of ``asdict``."""
        files = {name: StoredFile(**stored) for name, stored in values.pop("files").items()}
        return cls(files=files, counts=Counts(**values.pop("counts")), **values)


def distinct_workers(receipts: Iterable[Receipt]) -> list[dict[str, Any]]:
    """Who computed what receipts vouch for: one worker for each device with other versions, the first of its kind."""
    found: dict[str, dict[str, Any]] = {}
    for worker in (worker for receipt in receipts for worker in receipt.workers):
        found.setdefault(json.dumps([worker["device"], worker["versions"]], sort_keys=True), worker)
    return list(found.values())


def reduced_folder(layer: int, group: str | None = None) -> str:
    """Of a layer's means, or of one of its groups'; of a name too long for file systems, its beginning and its sha256."""
    folder = f"reduced/layer_{layer:03d}"
    if group is None:
        return folder
    name = quote(group, safe=" ")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(group.encode()).hexdigest()[:16]}"
    return f"{folder}/group_{name}"


def receipt_of(path: str) -> tuple[str, str] | None:
    """Folder and name of the receipt that a file of an attempt at a task or node belongs to, or is; None of other files."""
    folder, _, below = path.partition("/")
    if folder not in ("done", "tree", "positions", "sums", "factors", "matrices"):
        return None
    name = below.removesuffix(".json") if below.endswith(".json") else below.split("/")[0].rsplit("-", 1)[0]
    return ("tree" if folder == "tree" else "done", name)


def _of_a_run(path: str) -> bool:
    """Whether a file in a run's directory is one of the kinds that runs write."""
    folder, _, below = path.partition("/")
    return folder in (_FOLDERS if below else _FILES) or folder.startswith(WRITING)


def task_name(task: int) -> str:
    """Of a task's receipt and files."""
    return f"{task:08d}"


def places(length: int, count: int, part: int, parts: int) -> list[int]:
    """Of ``count`` places spread evenly over so many parts those in one of them, spread evenly over its length."""
    wanted = min(length, count * (part + 1) // parts - count * part // parts)
    return [length * (2 * i + 1) // (2 * wanted) for i in range(wanted)]


@dataclass(frozen=True)
class Problem:
    """Something in a run that is not as it was written."""

    path: str
    what: str


class RunStore(Storage):
    """A run directory on any fsspec file system."""

    # ---- the run itself ----------------------------------------------------------------------------------------------

    def read_run(self) -> dict[str, Any] | None:
        """run.json, or None where there is no run; a directory with something else in it is refused.

        Raises:
            StorageError: no directory of ours.
            DamagedError: run.json is damaged, or gone from a run that has tasks done.
        """
        if self.is_file():
            raise StorageError(f"output {self.uri} is a file. Choose a directory that is new, empty or a run's own.")
        try:
            raw = self.read("run.json")
        except FileNotFoundError:
            found = [
                path for path in self.list() if not path.startswith("lease/")
            ]  # a driver may have removed the rest
            if any(path.startswith("done/") for path in found):
                raise DamagedError("run.json", f"{self.uri}/run.json is gone.") from None
            if found:
                raise StorageError(
                    f"{self.uri} is not empty and holds no run of ours. Expected the directory of a run, or for a new one an "
                    "empty directory."
                ) from None
            return None
        run = unseal(raw)
        if run is not None:
            return run
        if b"fingerprint" not in raw and not self.list("done"):
            raise StorageError(f"run.json in {self.uri} was not written by a run of ours. Choose another directory.")
        raise DamagedError("run.json", f"{self.uri}/run.json is damaged: its checksum is not that of its content.")

    def create_run(self, description: dict[str, Any], plan: bytes) -> bool:
        """Write plan and description of a new run; whether this call did, and not another driver at the same time."""
        # In this order: of two drivers with different settings one is refused, and has written nothing.
        if not self.create("run.json", seal(description)):
            return False
        self.write("plan.parquet", plan)
        return True

    def remove_run(self, made: Sequence[Path]) -> None:
        """Remove what a run has written, and the folders that were made for it; those that others use by now stay.

        Args:
            made: what :meth:`missing_folders` gave before anything was written.
        """
        for path in [*self.list(), *self.unfinished()]:
            if _of_a_run(path):
                self.remove(path)
        local = self.local_path("")
        if local is None:
            return
        below = [Path(folder) for name in _FOLDERS for folder, *_ in os.walk(Path(local) / name, topdown=False)]
        for folder in [*below, *made]:
            with contextlib.suppress(OSError):  # it is not empty, or gone
                folder.rmdir()

    # ---- tasks and nodes ---------------------------------------------------------------------------------------------

    def commit(self, folder: str, receipt: Receipt) -> Receipt:
        """Make a task (``done``) or node (``tree``) done; where another attempt came first, the receipt is that one's."""
        path = f"{folder}/{receipt.name}.json"
        if self.create(path, seal(asdict(receipt))):
            return receipt
        return Receipt.of(self.read_sealed(path))

    def receipt(self, folder: str, name: str) -> Receipt:
        """Of a task or node; DamagedError where it cannot be trusted, FileNotFoundError where there is none."""
        path = f"{folder}/{name}.json"
        receipt = Receipt.of(self.read_sealed(path))
        if receipt.name != name:
            raise DamagedError(path, f"{self.uri}/{path} is the receipt of {receipt.name}.")
        return receipt

    def examples(self, done: Sequence[int], count: int) -> list[int]:
        """Tasks with scored positions, spread evenly over those done: of each of ``count`` parts the first that has any."""
        number = min(count, len(done))
        parts = (done[len(done) * i // number : len(done) * (i + 1) // number] for i in range(number))
        return [task for part in parts for task in islice(filter(self._has_positions, part), 1)]

    def _has_positions(self, task: int) -> bool:
        return self.receipt("done", task_name(task)).counts.scored > 0

    def names(self, folder: str) -> set[str]:
        """Names of all receipts in a folder, from one listing; copies that other tools have made have other names."""
        return self._receipts(folder)[0]

    def _receipts(self, folder: str) -> tuple[set[str], list[str]]:
        """Names of the receipts in a folder, and paths of what only looks like one."""
        paths = [path for path in self.list(folder) if path.endswith(".json")]
        name = _SUM if folder == "tree" else _RECEIPT
        found = {path: name.fullmatch(path, len(folder) + 1) for path in paths}
        return {match[1] for match in found.values() if match}, [path for path, match in found.items() if not match]

    def notes(self) -> list[str]:
        """Paths of the notes of tasks that were given up."""
        return [f"quarantine/{name}.json" for name in sorted(self.names("quarantine"))]

    def receipts(self, tasks: Iterable[int]) -> Iterator[Receipt]:
        """Receipts of tasks, in the order asked for, read several at once."""
        return several(lambda task: self.receipt("done", task_name(task)), tasks)

    def undo(self, tasks: Sequence[int]) -> None:
        """Make tasks undone, and the sums that they went into; their files stay behind as orphans."""
        gone = []
        for name in self.names("tree") if tasks else ():
            first, last = (int(part) for part in name.split("-")[:2])
            if any(first <= task < last for task in tasks):
                gone.append(f"tree/{name}.json")
        if tasks:
            self.remove("reduced/manifest.json")
        for _ in several(self.remove, [*gone, *(f"done/{task_name(task)}.json" for task in tasks)]):
            pass

    # ---- checking ----------------------------------------------------------------------------------------------------

    def check(self, folder: str, name: str, fingerprint: str) -> tuple[Receipt | None, list[Problem]]:
        """Read back all that a receipt vouches for."""
        path = f"{folder}/{name}.json"
        try:
            receipt = self.receipt(folder, name)
        except FileNotFoundError:
            return None, [Problem(path, "is missing")]
        except DamagedError:
            return None, [Problem(path, "is damaged: its checksum is not that of its content")]
        if receipt.fingerprint != fingerprint:
            return None, [Problem(path, f"belongs to another plan ({receipt.fingerprint[:12]}...)")]
        problems = [p for stored in receipt.files.values() if (p := self.problem(stored)) is not None]
        return (None if problems else receipt), problems

    def problem(self, stored: StoredFile) -> Problem | None:
        """What is wrong with a file, if anything is."""
        try:
            raw = self.load(stored)
        except DamagedError as error:
            gone = isinstance(error.__cause__, FileNotFoundError)
            return Problem(stored.path, "is missing" if gone else "is damaged: its sha256 is another one")
        if stored.rows is not None and pq.read_metadata(io.BytesIO(raw)).num_rows != stored.rows:
            return Problem(stored.path, f"has not the {stored.rows} rows of its receipt")
        return None

    def verify(self, run: Mapping[str, Any]) -> Iterator[Problem]:
        """Read everything back and yield what is not as it was written.

        Args:
            run: what :meth:`read_run` gave.
        """
        plan = self.problem(StoredFile(**run["plan"]))
        if plan is not None:
            yield plan
        fingerprint, planned = run["fingerprint"], [task_name(i) for i in range(run["tasks"])]
        receipts = [self._receipts(folder) for folder in ("done", "tree", "quarantine")]
        done, nodes, quarantined = (names for names, _ in receipts)
        for name in sorted(done - set(planned)):
            yield Problem(f"done/{name}.json", "is of no task of the plan")
        done &= set(planned)
        for path in (path for _, others in receipts for path in others):
            yield Problem(path, "is no file of a run. Remove it")
        expected = planned[: self._last(len(planned))]
        unfinished = [name for name in expected if name not in done and name not in quarantined]
        if len(unfinished) > len(done):
            yield Problem("done", f"holds {len(done)} receipts of {len(expected)} tasks: the run is not complete")
            unfinished = []
        tasks = (("done", name) for name in sorted([*done, *unfinished]))
        checks = chain(tasks, (("tree", name) for name in sorted(nodes)))
        for _, problems in several(lambda item: self.check(item[0], item[1], fingerprint), checks):
            yield from problems
        yield from self.verify_reduced(fingerprint, done, nodes)
        for path in (*self.notes(), "progress.json"):
            try:
                self.read_sealed(path)
            except FileNotFoundError:
                yield Problem(path, "is missing")
            except DamagedError:
                yield Problem(path, "is damaged: its checksum is not that of its content")

    def verify_reduced(self, fingerprint: str, done: set[str], nodes: set[str]) -> Iterator[Problem]:
        """Problems of what the reduction wrote, the run being complete."""
        path = "reduced/manifest.json"
        try:
            manifest = self.read_sealed(path)
        except FileNotFoundError:
            yield Problem(path, "is missing: the run is not reduced")
            return
        except DamagedError:
            yield Problem(path, "is damaged: its checksum is not that of its content")
            return
        if manifest["fingerprint"] != fingerprint:
            yield Problem(path, "belongs to another plan")
        of_them = sum(int(name) < manifest["last"] for name in done)
        if manifest["tasks"] != of_them:
            yield Problem(path, f"is a reduction of {manifest['tasks']} tasks, and {of_them} are done")
        for name in sorted(set(manifest["nodes"]) - nodes):
            yield Problem(f"tree/{name}.json", "is missing")
        files = (StoredFile(**stored) for stored in manifest["files"].values())
        yield from filter(None, several(self.problem, files, 2))  # whole matrices

    def _last(self, planned: int) -> int:
        """How many tasks, the first of the plan, have to be done: fewer than planned where the run ended early."""
        try:
            return int(self.read_sealed("reduced/manifest.json")["last"])
        except (FileNotFoundError, DamagedError):
            return planned

    def orphans(self) -> list[str]:
        """Files that no receipt names: of attempts that were killed, came second, or turned out damaged.

        Files that a damaged receipt may name are left out. Only for runs that no driver works on: files of attempts that are
        still running would be among them.
        """
        named = {"run.json", "plan.parquet", "progress.json", "reduced/manifest.json"}
        unknown: set[tuple[str, str] | None] = set()
        found = self.list()
        paths = [(folder, name) for folder in ("done", "tree") for name in self.names(folder)]
        for (folder, name), receipt in zip(paths, several(self._sound_receipt, paths), strict=True):
            if receipt is None:  # what is damaged is for verify; what it named cannot be known
                unknown.add((folder, name))
            else:
                named |= {f"{folder}/{name}.json", *(stored.path for stored in receipt.files.values())}
        if "reduced/manifest.json" in found:
            named |= {stored["path"] for stored in self.read_sealed("reduced/manifest.json")["files"].values()}
        kept = ("quarantine/", "lease/")
        left = [
            path
            for path in found
            if path not in named and _of_a_run(path) and not path.startswith(kept) and receipt_of(path) not in unknown
        ]
        return sorted(left + self.unfinished())

    def _sound_receipt(self, where: tuple[str, str]) -> Receipt | None:
        try:
            return self.receipt(*where)
        except DamagedError:
            return None


class Lease:
    """The right to drive a run, held by one driver at a time.

    Files ``lease/NNNNNN.json`` are created once and counted up. The holder of the highest rewrites it every few seconds and
    looks for higher ones; whoever wants the lease watches the highest, and creates the next one when it has stood still.
    A holder that was cut off finds itself superseded and stops. What it still commits does no harm: results are the same.

    Args:
        store: the run.
        patience: seconds without a heartbeat after which a holder counts as dead.

    Raises:
        RefusedError: another driver is at work.
    """

    def __init__(self, store: RunStore, patience: float = 15.0):
        self._store, self._patience = store, patience
        self._me, self._beats = _process(), 0
        self._left = threading.Event()
        self.lost: RefusedError | StorageError | None = None
        self._number = self._acquire()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def rest(self) -> None:
        """Stop the heartbeat: for as long as others are patient the run is still this driver's."""
        self._left.set()
        self._thread.join()

    def release(self) -> None:
        """Leave the run to others."""
        self.rest()
        if self.lost is None:
            self._store.remove(self._path(self._number))

    @staticmethod
    def holder(store: RunStore) -> tuple[str | None, bool]:
        """Who holds the lease of a run, in words, and whether it may be at work: not where it has died on this machine."""
        try:
            held = store.read_sealed(Lease._path(Lease._highest(store)))
        except FileNotFoundError:  # there is none, or it has left meanwhile
            return None, False
        except DamagedError:  # it may be being written
            return "a driver that cannot be told", True
        who = f"process {held['pid']} on {held['host']}"
        if held["machine"] == _machine() and not _alive(held):
            return f"{who}, which has died: the same command goes on", False
        return who, True

    @staticmethod
    def _path(number: int) -> str:
        return f"lease/{number:06d}.json"

    def _content(self) -> bytes:
        return seal({**self._me, "beat": self._beats})

    def _holds(self) -> bool:
        """Whether nobody has taken the lease; a heartbeat that was reported as failed may have been written."""
        if self._highest(self._store) > self._number:
            return False
        held = unseal(self._store.read(self._path(self._number))) or {}
        return {**held, "beat": 0} == {**self._me, "beat": 0}

    @staticmethod
    def _highest(store: RunStore) -> int:
        return max(map(int, store.names("lease")), default=0)

    def _acquire(self) -> int:
        while True:
            highest = self._highest(self._store)
            if highest == 0 or self._dead(highest):
                if self._store.create(self._path(highest + 1), self._content()):
                    for number in range(max(1, highest - 8), highest + 1):
                        self._store.remove(self._path(number))
                    return highest + 1
                time.sleep(0.1)  # someone else was quicker; see who

    def _dead(self, number: int) -> bool:
        """Whether a holder has left, has died on this machine, or has not been heard of for long enough."""
        try:
            first = self._store.read(self._path(number))
            holder = unseal(first) or {}
            if holder.get("machine") == self._me["machine"] and not _alive(holder):
                return True
            deadline = time.monotonic() + self._patience
            while time.monotonic() < deadline:
                time.sleep(min(0.5, self._patience / 10))
                if self._store.read(self._path(number)) != first:
                    raise RefusedError(
                        f"another driver works on {self._store.uri}: process {holder.get('pid')} on {holder.get('host')}, "
                        f"since {holder.get('since')}. Wait for it or stop it; the same command then goes on."
                    )
        except FileNotFoundError:  # it has left meanwhile
            return self._highest(self._store) <= number
        return True

    def _beat(self) -> None:
        path = self._path(self._number)
        while not self._left.wait(self._patience / 5):
            try:
                if not self._holds():
                    raise FileNotFoundError(path)
                self._beats += 1
                self._store.write(path, self._content())
            except OutageError:  # whoever else has come meanwhile is seen the next time
                pass
            except FileNotFoundError:
                self.lost = RefusedError(
                    f"{self._store.uri}: another driver has taken this run over; it had not heard from this one for too long."
                )
                return
            except Exception as error:  # a thread that ended without a word would look alive
                self.lost = (
                    error if isinstance(error, StorageError) else StorageError(f"the lease cannot be kept: {error}")
                )
                return


_SINCE = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _process() -> dict[str, Any]:
    """Who this is: enough for others on the same machine to see whether it is alive."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid), "since": _SINCE}


def _machine() -> str | None:
    """One boot of one machine, as seen from one container; None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _alive(holder: dict[str, Any]) -> bool:
    return holder.get("machine") is None or _started(holder["pid"]) == holder.get("started")


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


def json_bytes(values: dict[str, Any]) -> bytes:
    """Readable JSON, for files that a manifest vouches for."""
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
