"""A finished run in which one file is no longer what it was: ``verify`` names it, and the command that made it mends it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jobs
from fisher_ray import cost, reduce
from fisher_ray.cli import COMPLETE, DAMAGED, FAILED, QUARANTINED, main
from fisher_ray.storage import Storage
from jobs import Stored, gpt2  # noqa: F401

# One file of every kind that a run leaves behind; {} is that of a task's attempt, {node} that of a sum over tasks.
KINDS = {
    "description": "run.json",
    "plan": "plan.parquet",
    "progress": "progress.json",
    "receipt": "done/00000002.json",
    "table": "positions/00000002-*.parquet",
    "sums": "sums/00000002-*/layer_001.npz",
    "factors": "factors/00000002-*/layer_001.npy",
    "receipt of a node": "tree/00000002-*.json",
    "sums of a node": "tree/00000002-*/layer_001.npz",
    "mean": "reduced/layer_001/fisher.npy",
    "eigenvectors": "reduced/layer_002/eigenvectors.npy",
    "mean of a group": "reduced/layer_001/group_2-3/activation_mean.npy",
    "summary": "reduced/summary.parquet",
    "provenance": "reduced/provenance.json",
    "picture": "reduced/spectra.png",
    "manifest": "reduced/manifest.json",
}
# What holds times, and so is not the same twice.
TIMED = ("progress.json", "done/", "tree/", "reduced/provenance.json", "reduced/manifest.json")


def flip(path: Path) -> None:
    """One bit."""
    raw = bytearray(path.read_bytes())
    chosen = random.Random(path.name)
    raw[chosen.randrange(len(raw))] ^= 1 << chosen.randrange(8)
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    """As a machine leaves files that lost power."""
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flip": flip, "truncate": truncate, "empty": empty, "delete": Path.unlink
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of a kilobyte, in a tree of three levels."""
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", 1_500)
    monkeypatch.setattr(reduce, "FAN_IN", 3)


@pytest.fixture(scope="module")
def finished(
    gpt2: str, no_pictures_yet: None, tmp_path_factory: pytest.TempPathFactory  # noqa: F811
) -> tuple[Path, list[str]]:  # fmt: skip
    """A run of everything that can be asked for, and its command; given below where it is to be."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "docs.txt").write_text(jobs.some_text(8_000))
    flags = ["--model", gpt2, "--corpus", str(folder / "docs.txt"), "--output", "run", "--executor", "local"]
    command = ["run", *flags, "--save", "factors", "--group-by", "position"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(cost, "MIN_TASK_BYTES", 1_500)
        patch.setattr(reduce, "FAN_IN", 3)
        assert main(command) == COMPLETE
        assert main(["verify", "run"]) == COMPLETE
    assert len(list((folder / "run").glob("done/*.json"))) == 6
    return folder / "run", command


@pytest.fixture
def copied(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> tuple[Path, list[str]]:
    """A copy of its own for a test, in the current directory, with the command that made it."""
    shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run", finished[1]


def files(run: Path) -> dict[str, Path]:
    return {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}


def test_every_kind_of_file_is_tested(finished: tuple[Path, list[str]]) -> None:
    kinds = {(Path(name).parts[0], Path(name).suffix) for name in files(finished[0])}
    assert kinds == {(Path(pattern).parts[0], Path(pattern).suffix) for pattern in KINDS.values()}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_mended(
    kind: str, damage: str, copied: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if kind == "picture":
        request.getfixturevalue("pictures")
    run, command = copied
    before = {name: path.read_bytes() for name, path in files(run).items()}
    table, bits = Stored(run).table, Stored(run).bits()
    (path,) = run.glob(KINDS[kind])
    name = str(path.relative_to(run))
    DAMAGE[damage](path)

    assert main(["verify", "run"]) == DAMAGED
    said = capsys.readouterr()
    assert said.err == ""
    assert name in said.out.replace("\n", "") and ("missing" in said.out or "gone" in said.out) == (damage == "delete")
    others = {other for other in before if other in said.out.split() and other != name}
    assert others == (
        {"reduced/manifest.json"} if (kind, damage) == ("receipt", "delete") else set()
    )  # one task too many

    assert main(command) == COMPLETE, capsys.readouterr().err
    capsys.readouterr()
    assert main(["verify", "run"]) == COMPLETE, capsys.readouterr().out
    assert Stored(run).bits() == bits
    assert Stored(run).table.equals(table)
    after = {name: path.read_bytes() for name, path in files(run).items()}
    again = kind in ("receipt", "table", "sums", "factors")
    for other, raw in before.items():
        if not other.startswith(TIMED) and not (again and "00000002" in other):
            assert after[other] == raw, other
    receipts = {name for name in after if name.startswith("done/") and after[name] != before[name]}
    assert receipts == ({"done/00000002.json"} if again else set())  # nothing else was computed again


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_anywhere(kind: str, copied: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = copied
    (path,) = run.glob(KINDS[kind])
    raw, chosen = path.read_bytes(), random.Random(0)
    for at in {0, len(raw) - 1, *chosen.sample(range(len(raw)), 10)}:
        flipped = bytearray(raw)
        flipped[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        assert main(["verify", "run"]) == DAMAGED, at
        assert path.name in capsys.readouterr().out.replace("\n", "")
    path.write_bytes(raw)
    assert main(["verify", "run"]) == COMPLETE


def test_everything_at_once(copied: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """One file of each kind but one of the receipts, which tell whose run it is."""
    run, command = copied
    before = Stored(run)
    bits, table = before.bits(), before.table
    for kind, pattern in KINDS.items():
        if kind not in ("description", "manifest"):
            (path,) = run.glob(pattern)
            flip(path)
    assert main(["verify", "run"]) == DAMAGED
    said = capsys.readouterr().out
    for path in ("plan.parquet", "progress.json", "done/00000002.json", "reduced/spectra.png", "summary.parquet"):
        assert path in said
    flip(run / "run.json")
    flip(run / "reduced/manifest.json")
    assert main(["verify", "run"]) == DAMAGED
    assert main(command) == COMPLETE
    assert main(["verify", "run"]) == COMPLETE
    assert Stored(run).bits() == bits and Stored(run).table.equals(table)


def test_only_the_tables_are_left(copied: tuple[Path, list[str]]) -> None:
    """All receipts gone: everything is computed again, and nothing of before is in the way."""
    run, command = copied
    bits, table = Stored(run).bits(), Stored(run).table
    shutil.rmtree(run / "done")
    assert main(["verify", "run"]) == DAMAGED
    assert main(command) == COMPLETE
    assert main(["verify", "run"]) == COMPLETE
    assert Stored(run).bits() == bits and Stored(run).table.equals(table)
    assert main(["clean", "run", "--remove"]) == COMPLETE
    assert len(list(run.glob("positions/*"))) == 6
    assert main(["verify", "run"]) == COMPLETE


@pytest.mark.parametrize("kind", ["table", "sums", "factors", "sums of a node", "mean"])
def test_found_while_reducing(kind: str, copied: tuple[Path, list[str]]) -> None:
    """What was done is trusted, and the reduction has to be made again."""
    run, command = copied
    bits = Stored(run).bits()
    (path,) = run.glob(KINDS[kind])
    flip(path)
    (run / "reduced/manifest.json").unlink()
    for node in run.glob("tree/*.json") if kind == "sums" else ():
        node.unlink()
    assert main([*command, "--no-verify"]) == COMPLETE
    assert Stored(run).bits() == bits
    found = main(["verify", "run"])
    assert found == (DAMAGED if kind in ("table", "factors") else COMPLETE)  # these the reduction has no need of


def test_every_sum_is_damaged(
    copied: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as there are are mended; one that never reads back as it was written ends the run."""
    run, command = copied
    bits = Stored(run).bits()
    for folder in ("reduced", "tree"):
        shutil.rmtree(run / folder)
    for path in run.glob("sums/*/layer_001.npz"):
        flip(path)
    assert main([*command, "--no-verify"]) == COMPLETE
    assert Stored(run).bits() == bits and main(["verify", "run"]) == COMPLETE

    for folder in ("reduced", "tree"):
        shutil.rmtree(run / folder)
    write = Storage.write

    def spoils(self: Storage, path: str, raw: bytes) -> None:
        write(self, path, raw)
        if path.startswith("tree/00000002-") and path.endswith("layer_001.npz"):
            flip(run / path)

    monkeypatch.setattr(Storage, "write", spoils)
    capsys.readouterr()
    assert main(command) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "tree/00000002-" in line and "computed 3 times, and each time read back as something else" in line
    monkeypatch.setattr(Storage, "write", write)
    assert main(command) == COMPLETE and Stored(run).bits() == bits


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_note_about_a_task_that_was_given_up(
    damage: str, gpt2: str, tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    texts = [text for _, text in jobs.paragraphs(jobs.some_text(6_000).encode())]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[len(lines) // 2] = "{"
    (tmp_path / "docs.jsonl").write_text("\n".join(lines) + "\n")
    flags: list[Any] = ["--model", gpt2, "--corpus", tmp_path / "docs.jsonl", "--output", tmp_path / "run"]
    command = ["run", *map(str, flags), "--executor", "local"]
    assert main(command) == QUARANTINED
    assert main(["verify", str(tmp_path / "run")]) == COMPLETE
    bits = Stored(tmp_path / "run").bits()
    (note,) = (tmp_path / "run/quarantine").iterdir()
    raw = note.read_bytes()
    DAMAGE[damage](note)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run")]) == DAMAGED
    assert note.stem in capsys.readouterr().out
    assert main(command) == QUARANTINED
    assert note.read_bytes() == raw
    assert main(["verify", str(tmp_path / "run")]) == COMPLETE
    assert Stored(tmp_path / "run").bits() == bits
