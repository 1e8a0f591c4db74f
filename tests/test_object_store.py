"""Whole runs with corpus and output behind the real protocols of object stores: the same bits as on this machine's disk,
whatever the network does on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky import BUCKET, FAULTS, Flaky, s3, s3_server  # noqa: F401
from gcs import gs  # noqa: F401

import jobs
from fisher_ray import cost, reduce
from fisher_ray.cli import COMPLETE, main
from fisher_ray.shards import RunStore
from fisher_ray.storage import Storage
from jobs import Stored, gpt2  # noqa: F401

TASK_BYTES = 1_500
FORMATS = ("jsonl", "parquet")


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as two files of JSON lines and two of Parquet, a folder each."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = [text for _, text in jobs.paragraphs(jobs.some_text(12_000).encode())]
    for kind in FORMATS:
        (folder / kind).mkdir()
    for name, some in (("a", texts[: len(texts) // 3]), ("b", texts[len(texts) // 3 :])):
        (folder / f"jsonl/{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
        pq.write_table(pa.table({"text": some}), folder / f"parquet/{name}.parquet", row_group_size=20)
    return folder


@pytest.fixture(scope="module")
def local(corpora: Path, gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:  # noqa: F811
    """Runs on this machine's disk, by format; with factors."""
    folder, found = tmp_path_factory.mktemp("local"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)
        for kind in FORMATS:
            found[kind], outcome = jobs.run_here(
                jobs.settings(gpt2, corpora / kind, folder / kind, save="factors", layers="0-1")
            )
            assert outcome.tasks >= 8
    return found


CLUSTER = """
import ray, sys
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address(s3_server: Flaky) -> Iterator[str]:  # noqa: F811
    """Of a cluster whose workers know the object store; one that another module started would not."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module")
def remote(corpora: Path, s3_server: Flaky) -> str:  # noqa: F811
    """Where the corpora are on S3."""
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    fs, root = fsspec.core.url_to_fs(uri)
    for path in corpora.rglob("*.*"):
        fs.put_file(str(path), f"{root}/{path.relative_to(corpora)}")
    return uri


def run_on_ray(address: str, *flags: str) -> tuple[int, str, str]:
    """``fisher-ray run`` with two actors on the cluster."""
    more = ("--max-actors", "2", "--save", "factors", "--layers", "0-1")
    process = jobs.command("run", *flags, *more, task_bytes=TASK_BYTES, RAY_ADDRESS=address)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def fetched(uri: str, folder: Path) -> Stored:
    """A run on an object store, copied by nothing but its listing."""
    fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    for path in fs.find(root):
        target = folder / path[len(root) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(fs.cat_file(path))
    return Stored(folder)


def same(uri: str, truth: Stored, folder: Path) -> Stored:
    """Arrays, factors and tables to the last bit; the run read with nothing of the package."""
    stored = fetched(uri, folder)
    assert stored.bits() == truth.bits()
    assert stored.table.equals(truth.table) and stored.counts() == truth.counts()
    for layer in (0, 1):
        assert np.array_equal(stored.saved("factors", layer), truth.saved("factors", layer))
    summary = [pq.read_table(run.folder / "reduced/summary.parquet") for run in (stored, truth)]
    assert summary[0].equals(summary[1])
    assert (
        stored.description["fingerprint"] != truth.description["fingerprint"]
    )  # entity tags are another kind of version
    return stored


@pytest.mark.parametrize("kind", ["parquet"])  # both are read from S3 by those that stumble
def test_a_run_on_s3_from_end_to_end(
    kind: str, remote: str, local: dict[str, Stored], address: str, s3: Flaky, gpt2: str, small_tasks: None,  # noqa: F811
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    flags = ["--model", gpt2, "--corpus", f"{remote}/{kind}", "--output", output]
    code, out, err = run_on_ray(address, *flags)
    assert code == COMPLETE and err == "", err
    assert output in out
    before = same(output, local[kind], tmp_path / "before")

    store = Storage(output)
    missing = ["00000001", "00000004", "00000005"]
    for name in missing:
        store.remove(f"done/{name}.json")
    store.remove("reduced/manifest.json")
    store.write("sums/00000001-dead/layer_000.npz", b"of a killed attempt")
    assert main(["verify", output]) == 5
    said = capsys.readouterr().out
    assert all(f"done/{name}.json is missing" in said for name in missing)
    code, out, err = run_on_ray(address, *flags)
    assert code == COMPLETE and err == "", err
    tasks = len(before.receipts)
    assert f"{tasks - 3} of {tasks} tasks were done before" in out
    after = same(output, local[kind], tmp_path / "after")
    for old, new in zip(before.receipts, after.receipts, strict=True):
        assert (old == new) == (new["name"] not in missing)

    assert main(["verify", output]) == COMPLETE
    assert "everything as it was written" in capsys.readouterr().out
    assert main(["status", output, "--json"]) == COMPLETE
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "complete" and status["tasks_done"] == status["tasks"] == tasks
    assert status["driver"] is None and 0 <= status["seconds_since_written"] < 60
    # What the removed receipts named, and what the killed attempt left behind: 1 table, 2 sums and 2 factors a task.
    assert main(["clean", output]) == COMPLETE
    assert f"{3 * 5 + 1} files" in capsys.readouterr().out
    assert main(["clean", output, "--remove"]) == COMPLETE
    assert "00000001-dead" in capsys.readouterr().out
    assert "sums/00000001-dead/layer_000.npz" not in store.list()
    assert main(["clean", output]) == COMPLETE and "0 files" in capsys.readouterr().out
    assert main(["verify", output]) == COMPLETE


def test_a_folder_that_a_console_has_made_is_empty(
    s3: Flaky, gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """As an object of no bytes whose name ends in a slash; it is none of the run's, and stays."""
    (tmp_path / "docs.txt").write_text("one two\n")
    name = uuid.uuid4().hex
    output = f"s3://{BUCKET}/{name}"
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    markers = [f"{name}/", f"{name}/sub/", f"{name}/done/"]
    for key in markers:
        fs.call_s3("put_object", Bucket=BUCKET, Key=key, Body=b"")
    store = RunStore(output)
    assert store.list() == store.list("done") == {} and store.read_run() is None
    flags = ["--model", gpt2, "--corpus", str(tmp_path / "docs.txt"), "--executor", "local", "--layers", "1"]
    assert main(["run", *flags, "--output", f"{output}/"]) == COMPLETE
    assert main(["verify", output]) == COMPLETE
    capsys.readouterr()
    assert main(["clean", output, "--remove"]) == COMPLETE
    assert capsys.readouterr().out.startswith("0 files")
    found = fs.call_s3("list_objects_v2", Bucket=BUCKET, Prefix=f"{name}/")["Contents"]
    assert {entry["Key"] for entry in found} - {f"{name}/{path}" for path in store.list()} == set(markers)
    fs.call_s3("put_object", Bucket=BUCKET, Key=f"{name}-other/notes.txt", Body=b"mine")
    assert main(["run", *flags, "--output", f"{output}-other"]) == 2
    assert "holds no run of ours" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["sums", "tree", "reduced"])
def test_damage_on_s3_is_found_and_mended(
    what: str, remote: str, local: dict[str, Stored], s3: Flaky, gpt2: str, small_tasks: None, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In this process, and with a tree of several levels."""
    monkeypatch.setattr(reduce, "FAN_IN", 3)
    output = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    flags = ["--model", gpt2, "--corpus", f"{remote}/jsonl", "--output", output, "--executor", "local"]
    assert main(["run", *flags]) == COMPLETE
    bits = fetched(output, tmp_path / "before").bits()
    store = Storage(output)
    damaged = [path for path in store.list(what) if path.endswith((".npz", ".npy"))][1]
    raw = bytearray(store.read(damaged))
    raw[len(raw) // 2] ^= 4
    store.write(damaged, bytes(raw))
    capsys.readouterr()
    assert main(["verify", output]) == 5
    assert damaged in capsys.readouterr().out
    assert main(["run", *flags]) == COMPLETE
    assert main(["verify", output]) == COMPLETE
    assert fetched(output, tmp_path / "after").bits() == bits


@pytest.mark.parametrize(("where", "kind"), [("memory", "jsonl"), ("memory", "parquet"), ("gs", "parquet")])
def test_a_run_in_this_process(
    where: str, kind: str, corpora: Path, local: dict[str, Stored], gpt2: str, small_tasks: None, tmp_path: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str], gs: None,  # noqa: F811
) -> None:  # fmt: skip
    """On a file system that is neither a disk nor S3, as the others that fsspec knows."""
    root = f"{where}://{BUCKET}/{uuid.uuid4().hex}"
    fs, top = fsspec.core.url_to_fs(root)
    for path in (corpora / kind).iterdir():
        fs.pipe_file(f"{top}/corpus/{path.name}", path.read_bytes())
    flags = ["--model", gpt2, "--corpus", f"{root}/corpus", "--output", f"{root}/run", "--executor", "local"]
    flags += ["--save", "factors", "--layers", "0-1"]
    assert main(["run", *flags]) == COMPLETE
    before = same(f"{root}/run", local[kind], tmp_path / "before")
    fs.rm_file(f"{top}/run/done/00000003.json")
    fs.pipe_file(f"{top}/run/{before.receipts[1]['files']['sums_0']['path']}", b"other bytes")
    assert main(["verify", f"{root}/run"]) == 5
    capsys.readouterr()
    assert main(["run", *flags]) == COMPLETE
    assert "1 of them damaged and computed again" in capsys.readouterr().out
    assert main(["verify", f"{root}/run"]) == COMPLETE
    assert main(["clean", f"{root}/run", "--remove"]) == COMPLETE
    same(f"{root}/run", local[kind], tmp_path / "after")


@pytest.mark.faults
@pytest.mark.parametrize(("seed", "kind"), list(enumerate(FORMATS)))
def test_a_run_through_a_network_that_stumbles(
    kind: str, seed: int, remote: str, local: dict[str, Stored], address: str, s3: Flaky, gpt2: str,  # noqa: F811
    small_tasks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One request in twenty is refused, carried out and answered with an error, not answered, or answered by half."""
    output = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    flags = ["--model", gpt2, "--corpus", f"{remote}/{kind}", "--output", output]
    with s3.stumbling(0.05, seed) as seen:
        code, _, err = run_on_ray(address, *flags)
        assert code == COMPLETE, err
        store = Storage(output)
        for name in ("00000001", "00000004"):
            store.remove(f"done/{name}.json")
        store.remove("reduced/manifest.json")
        again = ["run", *flags, "--executor", "local", "--save", "factors", "--layers", "0-1"]
        assert main(again) == COMPLETE, capsys.readouterr().err
        assert main(["verify", output]) == COMPLETE
        assert main(["status", output]) == COMPLETE
        assert main(["clean", output]) == COMPLETE
    print(dict(seen))
    assert seen["requests"] > 200
    assert 0.02 * seen["requests"] < sum(seen[fault] for fault in FAULTS) < 0.1 * seen["requests"]
    assert all(seen[fault] for fault in FAULTS[:3])
    same(output, local[kind], tmp_path / "run")
    capsys.readouterr()


@pytest.mark.faults
def test_a_run_through_a_network_that_hardly_works(
    remote: str, local: dict[str, Stored], s3: Flaky, gpt2: str, small_tasks: None, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """A third of all requests go wrong: more than the client itself gets over."""
    output = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    more = ["--save", "factors", "--layers", "0-1", "--executor", "local"]
    with s3.stumbling(0.35) as seen:
        assert main(["run", "--model", gpt2, "--corpus", f"{remote}/jsonl", "--output", output, *more]) == COMPLETE
    assert all(seen[fault] > 5 for fault in FAULTS)
    same(output, local["jsonl"], tmp_path / "run")
    assert main(["verify", output]) == COMPLETE
