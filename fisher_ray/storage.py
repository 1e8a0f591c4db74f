"""Bytes on any fsspec file system: whole or not at all, created once, tried again when the storage stumbles.

Local disks and shared folders: a temporary file, flushed, then renamed over or linked into place. Object stores: one
conditional put. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow.fs as pa_fs

S = TypeVar("S")
T = TypeVar("T")

# Files read or checked at once by one process: enough to hide a request's latency, few enough for small machines.
_THREADS = 16
# Seconds before each further try; with the file system's own retries about half a minute of bad weather.
_DELAYS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
# Packages whose errors are a storage service's, whatever they are derived from.
_SERVICES = frozenset(
    {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "requests", "urllib3", "azure", "adlfs"}
)
# What no second try changes.
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_LASTING_CODES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.EINVAL})
# Answers of file systems without hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class StorageError(RuntimeError):
    """Storage that cannot be used, or a directory that is not what it should be; ends the run."""


class OutageError(StorageError):
    """Storage that did not answer, or has no room: the same command goes on once it does, or has."""


class DamagedError(StorageError):
    """A file with other bytes than were written, or none.

    Attributes:
        path: below the run.
    """

    def __init__(self, path: str, message: str):
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedError, (self.path, str(self))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: a storage's or a network's error that names no lasting cause."""
    if isinstance(error, OSError):
        return not isinstance(error, _LASTING) and error.errno not in _LASTING_CODES
    return type(error).__module__.split(".")[0] in _SERVICES


@dataclass(frozen=True)
class StoredFile:
    """One file that a marker vouches for.

    Attributes:
        path: below the run.
        rows: of a table, else None.
    """

    path: str
    sha256: str
    bytes: int
    rows: int | None = None


def absolute(uri: str) -> str:
    """A path as it is named from any directory; URIs stay as they are.

    Raises:
        ValueError: a chain of file systems, or a password.
    """
    if "::" in uri:
        raise ValueError(f"{uri} chains file systems by '::'. Expected one; copy or unpack what is in another.")
    if "://" in uri:
        if re.match(r"[a-z0-9+.-]+://[^/@]*:[^/@]+@", uri, re.IGNORECASE):
            where = uri[: uri.index("://") + 3]
            raise ValueError(
                f"a URI {where}... with a password in it would be written into the run and its reports. Give credentials by "
                "the environment or fsspec's configuration."
            )
        return uri
    parts = Path(os.path.expanduser(uri)).absolute().parts  # noqa: PTH111 - an unknown user is no error
    # What is above a link to a folder is not what its name says.
    above = len(parts) - parts[::-1].index("..") if ".." in parts else 0
    return str(Path(*parts[:above]).resolve().joinpath(*parts[above:]) if above else Path(*parts))


def several(function: Callable[[S], T], items: Iterable[S], at_once: int = _THREADS) -> Iterator[T]:
    """Results in the order of the items, a few at once, as many again ahead of the reader."""
    threads = ThreadPoolExecutor(at_once)
    ahead: deque[Future[T]] = deque()
    try:
        for item in items:
            ahead.append(threads.submit(function, item))
            if len(ahead) == 2 * at_once:
                yield ahead.popleft().result()
        for result in ahead:
            yield result.result()
    finally:
        threads.shutdown(cancel_futures=True)


class Storage:
    """A directory on any fsspec file system.

    Args:
        uri: the directory; need not exist.

    Raises:
        StorageError: of every method, for what cannot be written or read, after all tries.
        FileNotFoundError: of reads.
    """

    def __init__(self, uri: str):
        try:
            # Cached listings would hide what other processes wrote.
            self._fs, self._root = fsspec.core.url_to_fs(absolute(uri), use_listings_cache=False)
        except Exception as error:  # of any file system's own
            raise StorageError(f"cannot open {uri}: {' '.join(str(error).split())}") from error
        self.uri = self._fs.unstrip_protocol(self._root) if "://" in uri else self._root
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    def read(self, path: str) -> bytes:
        """A file's bytes."""
        return self._patiently(f"reading {path}", lambda: bytes(self._fs.cat_file(self._at(path))), reading=True)

    def write(self, path: str, raw: bytes) -> None:
        """Write a file whole or not at all; the file may exist."""
        self._patiently(f"writing {path}", lambda: self._write(path, raw))

    def create(self, path: str, raw: bytes) -> bool:
        """Write a file whole unless there is one; whether it was written. Of several at once exactly one wins."""
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            if self._create(path, raw):
                return True
            # A request that was answered with an error may have been carried out.
            return tries > 1 and bytes(self._fs.cat_file(self._at(path))) == raw

        return self._patiently(f"creating {path}", attempt)

    def store(self, path: str, raw: bytes, rows: int | None = None) -> StoredFile:
        """Write a data file and say what was written."""
        self.write(path, raw)
        return StoredFile(path, hashlib.sha256(raw).hexdigest(), len(raw), rows)

    def load(self, stored: StoredFile) -> bytes:
        """Read a data file back.

        Raises:
            DamagedError: it is gone, or holds other bytes than those that were written.
        """
        try:
            raw = self.read(stored.path)
        except FileNotFoundError as error:
            raise DamagedError(stored.path, f"{self.uri}/{stored.path} is gone.") from error
        if hashlib.sha256(raw).hexdigest() != stored.sha256:
            raise DamagedError(
                stored.path,
                f"{self.uri}/{stored.path} is damaged: expected {stored.bytes} bytes with sha256 {stored.sha256[:12]}..., "
                f"got {len(raw)} other ones.",
            )
        return raw

    def write_sealed(self, path: str, values: dict[str, Any]) -> None:
        """Write JSON with its own checksum; the file may exist."""
        self.write(path, seal(values))

    def read_sealed(self, path: str) -> dict[str, Any]:
        """Read such JSON back; DamagedError where the checksum is another one."""
        values = unseal(self.read(path))
        if values is None:
            raise DamagedError(path, f"{self.uri}/{path} is damaged: its checksum is not that of its content.")
        return values

    def list(self, folder: str = "") -> dict[str, int]:
        """Bytes of all files in a folder and below, by path below the run, without hidden ones.

        Hidden files are writes in progress, or files that NFS keeps because a process still has them open.
        """

        found = self._patiently(f"listing {folder or self.uri}", lambda: self._find(folder))
        return {path: size for path, size in sorted(found.items()) if not path.rsplit("/", 1)[-1].startswith(".")}

    def unfinished(self) -> list[str]:
        """Temporary files of writers that were killed, or that write now."""
        found = self._patiently(f"listing {self.uri}", lambda: self._find("")) if self._local else {}
        return [path for path in found if path.rsplit("/", 1)[-1].startswith(WRITING)]

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""

        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path))

        self._patiently(f"removing {path}", attempt)

    def is_file(self) -> bool:
        return self._patiently(f"opening {self.uri}", lambda: bool(self._fs.isfile(self._root)))

    def missing_folders(self) -> list[Path]:
        """Folders that writing here would create, the directory's own first; none on object stores, which have no folders."""
        if not self._local:
            return []
        root = Path(self._root)
        return [folder for folder in (root, *root.parents) if not folder.exists()]

    def local_path(self, path: str) -> str | None:
        """Where a file is on this machine's file system, if it is on one."""
        return self._at(path) if self._local else None

    def arrow(self) -> tuple[pa_fs.FileSystem, str]:
        """The file system as Arrow knows it, and the directory's name there."""
        return (
            pa_fs.LocalFileSystem() if self._local else pa_fs.PyFileSystem(pa_fs.FSSpecHandler(self._fs))
        ), self._root

    # ---- one try -----------------------------------------------------------------------------------------------------

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _find(self, folder: str) -> dict[str, int]:
        if not self._local:
            try:
                found = self._fs.find(self._at(folder), detail=True)
            except FileNotFoundError:
                return {}
            # Some consoles make an empty object in place of a folder.
            files = {path: info for path, info in found.items() if not path.endswith("/")}
            return {path[len(self._root) + 1 :]: int(info["size"]) for path, info in files.items()}
        # fsspec takes a local folder that cannot be read for an empty one.
        sizes: dict[str, int] = {}
        for parent, folders, names in os.walk(self._at(folder), onerror=_unless_gone):
            if "lost+found" in folders:  # at the root of a disk, and closed to users
                folders.remove("lost+found")
            for path in (Path(parent, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    sizes[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return sizes

    def _write(self, path: str, raw: bytes) -> None:
        if not self._local:
            self._fs.pipe_file(self._at(path), raw)
            return
        with self._temporary(path, raw) as temporary:
            Path(temporary).replace(self._at(path))

    def _create(self, path: str, raw: bytes) -> bool:
        if not self._local:
            try:
                self._fs.pipe_file(self._at(path), raw, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # Some services do not say which condition has failed; there is only one.
                answer = getattr(error.__cause__, "response", None) or {}
                if answer.get("Error", {}).get("Code") == "PreconditionFailed":
                    return False
                raise
            return True
        with self._temporary(path, raw) as temporary:
            try:
                os.link(temporary, self._at(path))
            except FileExistsError:
                # A network file system may answer so to the second sending of a request that it carried out.
                return Path(temporary).stat().st_nlink > 1
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._create_without_links(path, temporary)
            return True

    def _create_without_links(self, path: str, temporary: str) -> bool:
        """Exclusive, though a reader may see an empty file for a moment; sealed markers tell."""
        target = Path(self._at(path))
        try:
            target.open("xb").close()
        except FileExistsError:
            return False
        try:
            Path(temporary).replace(target)
        except OSError:
            target.unlink()
            raise
        return True

    @contextlib.contextmanager
    def _temporary(self, path: str, raw: bytes) -> Iterator[str]:
        folder = Path(self._at(path)).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{WRITING}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:  # with the permissions that the user's files have
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            yield str(temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def _patiently(self, what: str, attempt: Callable[[], T], reading: bool = False) -> T:
        """The result of an attempt that may be made again."""
        for delay in (*_DELAYS, None):
            try:
                return attempt()
            except Exception as error:
                if reading and isinstance(error, FileNotFoundError):
                    raise
                if not is_transient(error) and not isinstance(error, OSError):
                    raise
                if delay is None or not is_transient(error):
                    passes = _is_full(error) or (delay is None and not _lacks_credentials(error))
                    kind = OutageError if passes else StorageError
                    raise kind(_explained(f"{what} in {self.uri}", error, delay is None)) from error
            time.sleep(delay * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")


WRITING = ".writing-"


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _lacks_credentials(error: BaseException) -> bool:
    """Tried all the same: a cloud's machines ask a service for theirs."""
    return "credential" in type(error).__name__.lower()


def _explained(what: str, error: BaseException, tried: bool) -> str:
    advice = "Choose a directory that can be read and written."
    if _is_full(error):
        advice = "Make room; the same command goes on."
    elif _lacks_credentials(error):
        advice = (
            "Set up the storage's credentials, those of S3 by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for example."
        )
    elif tried:
        advice = f"Tried {len(_DELAYS) + 1} times; the same command goes on once the storage answers."
    return f"{what} failed: {' '.join(str(error).split()) or type(error).__name__}. {advice}"


def seal(values: dict[str, Any]) -> bytes:
    """JSON that carries a sha256 of its own content."""
    body = json.dumps(values, sort_keys=True)
    sealed = {**values, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def unseal(raw: bytes) -> dict[str, Any] | None:
    """What was sealed, or None where a byte is another one."""
    try:
        values = json.loads(raw)
        if not isinstance(values, dict) or seal({k: v for k, v in values.items() if k != "sha256"}) != raw:
            return None
    except ValueError:  # not UTF-8, or not JSON
        return None
    del values["sha256"]
    return values
