"""Bytes on disks, in memory, on S3 and GCS: whole or not at all, created once, tried again, and refused in one line."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from flaky import BUCKET, Flaky, bound, s3, s3_server  # noqa: F401
from fsspec.implementations.memory import MemoryFileSystem
from gcs import gs  # noqa: F401

from fisher_ray import storage
from fisher_ray.shards import RunStore
from fisher_ray.storage import DamagedError, OutageError, Storage, StorageError, absolute, seal, unseal


def place(kind: str, tmp_path: Path) -> str:
    """A new directory of a kind of storage."""
    if kind == "local":
        return str(tmp_path / "run")
    return f"{kind}://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory", "s3", "gs"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param in ("s3", "gs"):
        request.getfixturevalue(request.param)
    return Storage(place(request.param, tmp_path))


@pytest.fixture(params=["local", "s3", "gs"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory that several processes can use."""
    if request.param in ("s3", "gs"):
        request.getfixturevalue(request.param)
    return place(request.param, tmp_path)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that were made, in seconds; none takes any time."""
    made: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", made.append)
    return made


def one_line(error: BaseException) -> str:
    assert type(error) in (StorageError, OutageError)
    assert "\n" not in str(error) and "Traceback" not in str(error)
    return str(error)


# ---- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("a", "here/a"), ("./a/./b", "here/a/b"), ("a//b/", "here/a/b"), ("../a", "a"), ("none/../a", "here/a"),
        ("link/a", "here/link/a"), ("link/../a", "elsewhere/a"), ("link/../deep/link", "elsewhere/deep/link"),
        ("~/a", "home/a"), ("~/*.txt", "home/*.txt"), ("~/../a", "a"), ("*/../a?.txt", "here/a?.txt"),
    ],
)  # fmt: skip
def test_a_path_is_named_as_from_any_directory(
    given: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "home", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here/link").symlink_to(tmp_path / "elsewhere/deep")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute(given) == str(tmp_path / path) == absolute(str(tmp_path / path))
    assert absolute(f"{tmp_path}//here/./{path}") == str(tmp_path / "here" / path)
    assert Storage(given).uri == str(tmp_path / path)


def test_uris_stay_as_they_are_and_chains_are_refused() -> None:
    for uri in ("s3://bucket/a/../b//c", "file:///a/./b", "memory://~/a"):
        assert absolute(uri) == uri
    for uri in ("simplecache::s3://bucket/a", "zip://a.txt::/tmp/a.zip", "a::b"):
        with pytest.raises(ValueError, match=f"^{uri} chains file systems by '::'"):
            absolute(uri)
        with pytest.raises(StorageError, match="chains file systems"):
            Storage(uri)


# ---- other processes ---------------------------------------------------------------------------------------------------


def alone(code: str, *argv: str, unprivileged: bool = False) -> subprocess.Popen[str]:
    """Code in a process that has nothing but the storage module, as ``storage``: quick to start."""
    load = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('storage', sys.argv[1]); "
        "storage = sys.modules['storage'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(storage)\n"
    )
    found = importlib.util.find_spec("fisher_ray.storage")
    assert found is not None and found.origin is not None
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    given = ["-c", load + code, found.origin, *argv]
    return subprocess.Popen([sys.executable, *(bound(*given) if unprivileged else given)], **pipes)


def said(process: subprocess.Popen[str], timeout: float = 60) -> str:
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0
    return out.strip()


# ---- a file system that does as it is told -----------------------------------------------------------------------------


class Stumbling(MemoryFileSystem):
    """Memory, whose next calls fail: before they are carried out, or after."""

    protocol = "stumbling"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[list[tuple[str, Exception] | None]] = []
    calls: ClassVar[list[str]] = []

    def _perhaps(self, name: str, call: Callable[[], Any]) -> Any:
        self.calls.append(name)
        when, error = (self.faults.pop(0) if self.faults else None) or ("never", None)
        if when == "before" and error is not None:
            raise error
        result = call()
        if when == "after" and error is not None:
            raise error
        return result

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> Any:
        return self._perhaps("write", lambda: super(Stumbling, self).pipe_file(path, value, mode=mode, **more))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> Any:
        return self._perhaps("read", lambda: super(Stumbling, self).cat_file(path, start, end, **more))

    def find(self, path: str, **more: Any) -> Any:
        return self._perhaps("list", lambda: super(Stumbling, self).find(path, **more))

    def rm_file(self, path: str) -> Any:
        return self._perhaps("remove", lambda: super(Stumbling, self)._rm(path))

    def isfile(self, path: str) -> Any:
        return self._perhaps("open", lambda: super(Stumbling, self).isfile(path))


fsspec.register_implementation("stumbling", Stumbling, clobber=True)


@pytest.fixture
def stumbling() -> Iterator[Storage]:
    Stumbling.store.clear()
    Stumbling.calls.clear()
    yield Storage("stumbling://run")
    Stumbling.faults.clear()


def fail(*faults: tuple[str, Exception] | None) -> None:
    Stumbling.faults[:] = faults
    Stumbling.calls.clear()


METHODS: dict[str, Callable[[Storage], Any]] = {
    "reading": lambda store: store.read("here"),
    "writing": lambda store: store.write("a/b", b"x"),
    "creating": lambda store: store.create("a/b", b"x"),
    "listing": lambda store: store.list(),
    "removing": lambda store: store.remove("here"),
    "opening": lambda store: store.is_file(),
}

# What the same request may get over: a disk's, a network's and a service's words for it.
TRANSIENT = [
    OSError(errno.EIO, "input/output error"),
    OSError(errno.EBUSY, "SlowDown: reduce your request rate"),
    OSError(errno.EREMOTEIO, "InternalError"),
    OSError(errno.ESTALE, "stale file handle"),
    ConnectionResetError("reset by peer"),
    TimeoutError("timed out"),
    EndpointConnectionError(endpoint_url="http://nowhere"),
    NoCredentialsError(),  # also where a thousand workers ask a machine's metadata service at once
]
LASTING = [
    OSError(errno.ENOSPC, "no space left on device"),
    OSError(errno.EDQUOT, "disk quota exceeded"),
    OSError(errno.EROFS, "read-only file system"),
    OSError(errno.EFBIG, "file too large"),
    PermissionError(errno.EACCES, "permission denied"),
    PermissionError("The AWS Access Key Id you provided does not exist"),
]


def named(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return type(error).__name__ if number is None else errno.errorcode[number]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", TRANSIENT, ids=named)
def test_what_may_pass_is_tried_again(method: str, error: Exception, stumbling: Storage, pauses: list[float]) -> None:
    stumbling.write("here", b"there")
    fail(("before", error), ("before", error))
    METHODS[method](stumbling)
    assert len(pauses) == 2
    assert Stumbling.calls[:3] == [Stumbling.calls[0]] * 3


def test_pauses_grow_and_are_never_the_same_for_all(stumbling: Storage, pauses: list[float]) -> None:
    """A thousand workers must not come back in the same moment."""
    everyone: list[list[float]] = []
    for _ in range(5):
        pauses.clear()
        fail(*[("before", OSError(errno.EIO, "weather"))] * 99)
        with pytest.raises(StorageError):
            stumbling.read("here")
        everyone.append(list(pauses))
    assert len({tuple(each) for each in everyone}) == 5
    for each in everyone:
        assert len(each) == len(storage._DELAYS)
        assert all(0.5 * delay <= pause <= 1.5 * delay for pause, delay in zip(each, storage._DELAYS, strict=True))
    assert 10 < sum(storage._DELAYS) < 60


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_pass_ends_in_one_line(method: str, stumbling: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_DELAYS", (0.001, 0.002))
    fail(*[("before", OSError(errno.EBUSY, "reduce your\nrequest   rate"))] * 3)
    with pytest.raises(StorageError) as raised:
        METHODS[method](stumbling)
    line = one_line(raised.value)
    assert line.startswith(method) and "reduce your request rate" in line and "Tried 3 times" in line
    assert isinstance(raised.value, OutageError)
    assert stumbling.uri in line and "the same command goes on" in line
    assert not Stumbling.faults  # three tries, not four


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", LASTING, ids=named)
def test_what_lasts_is_said_at_once(method: str, error: Exception, stumbling: Storage, pauses: list[float]) -> None:
    fail(("before", error))
    with pytest.raises(StorageError) as raised:
        METHODS[method](stumbling)
    line = one_line(raised.value)
    assert line.startswith(method) and "Tried" not in line
    assert ("Make room" in line) == (named(error) in ("ENOSPC", "EDQUOT")) == isinstance(raised.value, OutageError)
    assert pauses == [] and len(Stumbling.calls) == 1


def test_mistakes_of_the_program_are_not_the_storages(stumbling: Storage, pauses: list[float]) -> None:
    fail(("before", KeyError("no such thing")))
    with pytest.raises(KeyError):
        stumbling.write("a", b"x")
    assert pauses == []


def test_what_is_not_there(anywhere: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", pytest.fail)
    with pytest.raises(FileNotFoundError):
        anywhere.read("a")
    assert anywhere.list() == {} and anywhere.list("done") == {}
    assert not anywhere.is_file()
    anywhere.remove("a")
    with pytest.raises(DamagedError, match=r"a is gone"):
        anywhere.load(storage.StoredFile("a", "0" * 64, 1))


# ---- created once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", TRANSIENT[:3], ids=named)
def test_a_creation_that_was_carried_out_but_answered_with_an_error_has_won(
    error: Exception, stumbling: Storage, pauses: list[float]
) -> None:
    fail(("after", error))
    assert stumbling.create("done/1", b"mine")
    assert stumbling.read("done/1") == b"mine"
    fail(("after", error), ("before", error))
    assert stumbling.create("done/2", b"mine")
    fail(("before", error))
    assert stumbling.create("done/3", b"mine")


def test_a_creation_that_came_second_and_was_answered_with_an_error_has_not(
    stumbling: Storage, pauses: list[float]
) -> None:
    stumbling.write("done/1", b"theirs")
    fail(("before", TRANSIENT[0]))
    assert not stumbling.create("done/1", b"mine")
    assert stumbling.read("done/1") == b"theirs"


def test_a_file_is_created_once(anywhere: Storage) -> None:
    assert anywhere.create("done/1", b"first")
    assert not anywhere.create("done/1", b"second")
    assert not anywhere.create("done/1", b"first")  # the same bytes are no excuse
    assert anywhere.read("done/1") == b"first"
    assert anywhere.list() == {"done/1": 5}


def test_of_eight_threads_one_wins(shared: str) -> None:
    stores = [Storage(shared) for _ in range(8)]
    for trial in range(10):
        gate, won = threading.Barrier(8), list[int]()

        def attempt(i: int, trial: int = trial, gate: threading.Barrier = gate, won: list[int] = won) -> None:
            gate.wait()
            if stores[i].create(f"done/{trial}", bytes([i]) * 10_000):
                won.append(i)

        threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert stores[0].read(f"done/{trial}") == bytes([won[0]]) * 10_000
    assert len(stores[0].list("done")) == 10


RACE = """
import sys, time
_, _, uri, me, trials, pace = sys.argv
store = storage.Storage(uri)
store.list()
print("ready", flush=True)
begin = float(sys.stdin.readline())
won = []
for trial in range(int(trials)):
    time.sleep(max(0, begin + float(pace) * trial - time.time()))
    if store.create(f"done/{trial}", me.encode() * 10_000):
        won.append(trial)
print(*won)
"""


def test_of_eight_processes_one_wins(shared: str) -> None:
    trials, pace = 20, 0.25 if "://" in shared else 0.05  # a request of all takes a while
    racers = [alone(RACE, shared, str(me), str(trials), str(pace)) for me in range(8)]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    begin = time.time() + 0.3
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(f"{begin}\n")
        racer.stdin.flush()
    won = [set(map(int, said(racer).split())) for racer in racers]
    assert sum(map(len, won)) == trials and set.union(*won) == set(range(trials))
    assert sum(map(bool, won)) > 1  # it was a race
    store = Storage(shared)
    for me, trial in ((me, trial) for me, trials_won in enumerate(won) for trial in trials_won):
        assert store.read(f"done/{trial}") == str(me).encode() * 10_000


def test_a_network_file_systems_second_thoughts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may send a request twice and hear of the second that the name is taken."""
    store, link = Storage(str(tmp_path)), os.link

    def twice(*args: Any) -> None:
        link(*args)
        link(*args)

    monkeypatch.setattr(os, "link", twice)
    assert store.create("done/1", b"mine")
    assert not store.create("done/1", b"theirs")
    assert store.read("done/1") == b"mine"
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["1"]


def test_a_disk_that_stumbles_after_linking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    store, link, faults = Storage(str(tmp_path)), os.link, [OSError(errno.EIO, "carried out all the same")]

    def once(*args: Any) -> None:
        link(*args)
        if faults:
            raise faults.pop()

    monkeypatch.setattr(os, "link", once)
    assert store.create("done/1", b"mine")
    assert len(pauses) == 1
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["1"]


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on exFAT, some FUSE file systems and shared folders of virtual machines."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def test_of_many_without_hard_links_one_wins(tmp_path: Path, without_links: None) -> None:
    test_of_eight_threads_one_wins(str(tmp_path))
    assert len(list((tmp_path / "done").iterdir())) == 10


def test_without_hard_links_nothing_is_left_where_it_did_not_fit(
    tmp_path: Path, without_links: None, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    """A half-written receipt would hold its place for ever."""
    store, real = Storage(str(tmp_path)), Path.open

    class Full:
        def __init__(self, path: Path, mode: str):
            self.file = real(path, mode)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def close(self) -> None:
            self.file.close()

        def write(self, raw: bytes) -> None:
            self.file.write(raw[: len(raw) // 2])
            raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "open", lambda self, mode="r", *_, **__: Full(self, mode) if "b" in mode else real(self, mode)
        )
        patch.setattr(Path, "replace", refuse_to_replace)
        with pytest.raises(StorageError, match="Make room"):
            store.create("done/1", b"mine")
    assert list((tmp_path / "done").iterdir()) == []
    assert store.create("done/1", b"mine")


def refuse_to_replace(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


# ---- whole or not at all -----------------------------------------------------------------------------------------------

ALTERNATE = """
import sys
store = storage.Storage(sys.argv[2])
print("ready", flush=True)
values = [letter * 1_000_000 for letter in (b"a", b"b")]
for i in range(1_000_000):
    store.write("sums/x", values[i % 2])
"""


def test_readers_see_all_of_a_file_or_nothing(shared: str) -> None:
    store, writer = Storage(shared), alone(ALTERNATE, shared)
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    seen: set[bytes] = set()
    end, read = time.monotonic() + 20, 0
    try:
        while (read < 60 or len(seen) < 2) and time.monotonic() < end:
            try:
                raw = store.read("sums/x")
            except FileNotFoundError:
                continue
            read += 1
            assert len(raw) == 1_000_000 and len(set(raw)) == 1
            seen.add(raw[:1])
    finally:
        writer.kill()
        writer.wait()
    assert seen == {b"a", b"b"} and read >= 60


def test_files_have_the_permissions_that_are_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage = Storage(str(tmp_path / "run"))
        storage.write("a", b"x")
        storage.create("b", b"x")
    finally:
        os.umask(before)
    assert {(tmp_path / "run" / name).stat().st_mode & 0o777 for name in "ab"} == {0o640}


def test_a_killed_writer_leaves_only_what_nobody_sees(tmp_path: Path) -> None:
    """Killed between writing and naming, for a file that is new, one that exists, and a marker."""
    run = RunStore(str(tmp_path / "run"))
    run.create_run({"fingerprint": "this"}, b"plan")
    run.write("sums/old", b"old")
    for call in ("write('sums/old', raw)", "write('sums/new', raw)", "create('done/00000001.json', raw)"):
        dies = "import os, sys; storage.os.fsync = lambda number: os.kill(os.getpid(), 9); raw = b'x' * 100_000\n"
        process = alone(f"{dies}storage.Storage(sys.argv[2]).{call}", run.uri)
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
    left = sorted(str(path.relative_to(run.uri)) for path in Path(run.uri).rglob(".writing-*"))
    assert [path.split("/")[0] for path in left] == ["done", "sums", "sums"]
    assert set(run.list()) == {"plan.parquet", "run.json", "sums/old"}
    assert run.names("done") == set()
    assert run.read("sums/old") == b"old"
    with pytest.raises(FileNotFoundError):
        run.read("sums/new")
    assert run.orphans() == sorted(["sums/old", *left])
    for path in run.orphans():
        run.remove(path)
    assert run.orphans() == [] and run.unfinished() == []


# ---- listings ----------------------------------------------------------------------------------------------------------

WRITE_ONE = "import sys; storage.Storage(sys.argv[2]).write(sys.argv[3], b'theirs')"
REMOVE_ONE = "import sys; storage.Storage(sys.argv[2]).remove(sys.argv[3])"


def test_listings_show_what_other_processes_did(shared: str) -> None:
    store = Storage(shared)
    store.write("done/1", b"1")
    assert store.list("done") == {"done/1": 1}
    assert store.list() == {"done/1": 1}
    said(alone(WRITE_ONE, shared, "done/2"))
    assert store.list("done") == {"done/1": 1, "done/2": 6}
    said(alone(REMOVE_ONE, shared, "done/1"))
    assert store.list("done") == store.list() == {"done/2": 6}
    with pytest.raises(FileNotFoundError):
        store.read("done/1")
    assert store.read("done/2") == b"theirs"


def test_a_listing_is_of_a_folder_and_below(anywhere: Storage) -> None:
    for path in ("done/1", "done/deep/2", "done2/3", "sums/ä b%20+#?/4", "top"):
        anywhere.write(path, path.encode())
    sizes = {path: len(path.encode()) for path in ("done/1", "done/deep/2", "done2/3", "sums/ä b%20+#?/4", "top")}
    assert anywhere.list() == dict(sorted(sizes.items()))
    assert list(anywhere.list("done")) == ["done/1", "done/deep/2"]
    for path in anywhere.list():
        assert anywhere.read(path) == path.encode()


BUSY = """
import sys
store = storage.Storage(sys.argv[2])
print("ready", flush=True)
for i in range(1_000_000):
    store.write("done/beat", str(i).encode())
"""


def test_a_listing_misses_nothing_while_others_write(tmp_path: Path) -> None:
    """Temporary files come and go in the same folder."""
    store = Storage(str(tmp_path))
    there = {f"done/{i}" for i in range(50)}
    for path in there:
        store.write(path, b"x")
    writers = [alone(BUSY, str(tmp_path)) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        for _ in range(500):
            assert set(store.list("done")) - {"done/beat"} == there
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


UNREADABLE = """
import sys
store = storage.Storage(sys.argv[2])
try:
    print(store.list())
except storage.StorageError as error:
    print("error", error)
"""


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    """Taken for one, it would make everything undone, and every data file an orphan that may be removed."""
    store = Storage(str(tmp_path))
    store.write("done/1", b"1")
    store.write("sums/1", b"1")
    (tmp_path / "done").chmod(0o000)
    try:
        assert said(alone(UNREADABLE, str(tmp_path), unprivileged=True)).startswith("error listing")
    finally:
        (tmp_path / "done").chmod(0o755)


def test_what_a_disk_keeps_at_its_root_is_not_looked_into(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    lost = tmp_path / "lost+found"
    lost.mkdir()
    (lost / "#12").write_bytes(b"found")
    assert store.list() == {} and store.read_run() is None
    store.write("done/1", b"1")
    lost.chmod(0o000)
    try:
        assert said(alone(UNREADABLE, str(tmp_path), unprivileged=True)) == "{'done/1': 1}"
    finally:
        lost.chmod(0o755)


# ---- real refusals -----------------------------------------------------------------------------------------------------

ATTEMPT = """
import sys
storage.time.sleep = lambda seconds: print("waited")
store = storage.Storage(sys.argv[2])
for method in (store.write, store.create):
    try:
        method("done/1", b"x" * 3_000_000)
        print("done")
    except storage.StorageError as error:
        print(error)
"""


def test_permission_denied(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    lines = said(alone(ATTEMPT, str(tmp_path / "run"), unprivileged=True)).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["writing", "creating"]
    assert all(
        "Permission denied" in line and "Choose a directory that can be read and written" in line for line in lines
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_disk_full(small_disk: Path) -> None:
    lines = said(alone(ATTEMPT, str(small_disk))).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["writing", "creating"]
    assert all("No space left" in line and "Make room; the same command goes on." in line for line in lines)
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []


def test_read_only(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    lines = said(alone(ATTEMPT, str(small_disk))).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["writing", "creating"]
    assert all("Read-only file system" in line for line in lines)


# ---- S3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["writing", "creating"])
def test_no_such_bucket(method: str, s3: Flaky, pauses: list[float]) -> None:  # noqa: F811
    with pytest.raises(StorageError) as raised:
        METHODS[method](Storage("s3://no-such-bucket/run"))
    assert "bucket does not exist" in one_line(raised.value)
    assert pauses == []


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "AccessDenied"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "opening"])
def test_wrong_credentials(method: str, code: str, s3: Flaky, pauses: list[float]) -> None:  # noqa: F811
    store = Storage(place("s3", Path()))
    store.write("here", b"x")
    s3.script = [code] * 9
    with pytest.raises(StorageError) as raised:
        METHODS[method](store)
    assert code in one_line(raised.value) or (method == "reading" and "Forbidden" in str(raised.value))
    assert pauses == [] and s3.seen["refused"] == 1


def test_no_credentials(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for again, as a cloud's machines have theirs from a service; and what is to be done is said."""

    def without(*_: Any, **__: Any) -> Any:
        raise NoCredentialsError

    store = Storage("memory://run")
    monkeypatch.setattr(store._fs, "cat_file", without)
    with pytest.raises(StorageError) as raised:
        store.read("here")
    assert "Unable to locate credentials. Set up the storage's credentials" in one_line(raised.value)
    assert len(pauses) == 6


@pytest.mark.parametrize("fault", ["refused", "carried out", "unanswered"])
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("opening",)])
def test_a_service_that_stumbles_a_few_times(
    method: str, fault: str, s3: Flaky, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """More often in a row than the client itself tries again, each time with a request that may have been carried out."""
    monkeypatch.setattr(storage, "_DELAYS", (0.01, 0.01, 0.01))
    store = Storage(place("s3", Path()))
    store.write("here", b"there")
    for _ in range(2):
        s3.script = [fault] * 2
        METHODS[method](store)
        assert s3.script == []
    expected = {} if method == "removing" else {"here": 5}
    assert store.list() == expected | ({"a/b": 1} if method in ("writing", "creating") else {})


def test_answers_cut_short(s3: Flaky) -> None:  # noqa: F811
    store = Storage(place("s3", Path()))
    raw = random.Random(0).randbytes(3_000_000)
    store.write("a", raw)
    s3.script = ["cut", "cut"]
    assert store.read("a") == raw
    s3.script = ["cut"]
    assert store.list() == {"a": len(raw)}
    assert s3.seen["cut"] == 3


def test_a_service_that_does_not_say_which_condition_failed(s3: Flaky) -> None:  # noqa: F811
    """As MinIO and others that speak S3."""
    store = Storage(place("s3", Path()))
    s3.nameless = True
    assert store.create("a", b"mine")
    assert not store.create("a", b"theirs")
    assert store.read("a") == b"mine"


# ---- seals -------------------------------------------------------------------------------------------------------------

VALUES: list[dict[str, Any]] = [
    {}, {"a": 1}, {"sha": None, "ä\n\u2028": ["𝄞", 0.1, 1e300, True, {"b": {}}]}, {str(i): i for i in range(300)},
]  # fmt: skip


@pytest.mark.parametrize("values", VALUES, ids=[0, 1, 2, 3])
def test_seals(values: dict[str, Any]) -> None:
    raw = seal(values)
    assert unseal(raw) == values
    assert json.loads(raw) == {**values, "sha256": json.loads(raw)["sha256"]}
    chosen = random.Random(0)
    for at in [*range(min(len(raw), 200)), *chosen.sample(range(len(raw)), 50)]:
        flipped = bytearray(raw)
        flipped[at] ^= 1 << chosen.randrange(8)
        assert unseal(bytes(flipped)) is None
        assert unseal(raw[:at]) is None
    for more in (b" ", b"\n", b"x", raw):
        assert unseal(raw + more) is None


@pytest.mark.parametrize("raw", [b"", b"[]", b"1", b"null", b'"sha256"', b'{"sha256": 1}', b"\xff\xfe", b"\0" * 64])
def test_what_was_never_sealed(raw: bytes) -> None:
    assert unseal(raw) is None


def test_sealed_files(anywhere: Storage) -> None:
    anywhere.write_sealed("a.json", {"b": [1, 2]})
    assert anywhere.read_sealed("a.json") == {"b": [1, 2]}
    anywhere.write_sealed("a.json", {"b": 3})
    assert anywhere.read_sealed("a.json") == {"b": 3}
    anywhere.write("a.json", anywhere.read("a.json").replace(b"3", b"4"))
    with pytest.raises(DamagedError, match=r"a\.json is damaged") as raised:
        anywhere.read_sealed("a.json")
    assert raised.value.path == "a.json"


@pytest.mark.parametrize("uri", ["reference://x", "dir://x", "nothing://x"])
def test_file_systems_that_cannot_be_opened(uri: str) -> None:
    """Whatever they raise."""
    with pytest.raises(StorageError, match=f"cannot open {uri}: "):
        Storage(uri)
