"""Disks that fill up, folders that may not be written, and a directory that is removed under a run: one line that says so, and
once the cause is gone the same command goes on to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flaky import permissions_bind

import jobs
from fisher_ray import cost, dispatch, driver
from fisher_ray.cli import BAD_INPUT, COMPLETE, FAILED, REFUSED, main
from fisher_ray.shards import RefusedError, RunStore
from jobs import Stored

TASK_BYTES = 1_500

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a corpus."""
    folder = tmp_path_factory.mktemp("shared")
    jobs.save_model(folder / "model")
    (folder / "docs.txt").write_text(jobs.some_text(8_000))
    return folder


@pytest.fixture(scope="module")
def truth(shared: Path) -> Stored:
    """Undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)
        assert main(["run", *flags(shared, shared / "truth")]) == COMPLETE
    return Stored(shared / "truth")


def flags(shared: Path, output: Path) -> list[str]:
    given = ["--model", shared / "model", "--corpus", shared / "docs.txt", "--output", output]
    return [*map(str, given), "--executor", "local", "--save", "factors"]


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", TASK_BYTES)


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def goes_on(shared: Path, output: Path, truth: Stored) -> None:
    """The same command, once the cause is gone."""
    assert main(["run", *flags(shared, output)]) == COMPLETE
    assert main(["verify", str(output)]) == COMPLETE
    assert Stored(output).bits() == truth.bits()
    assert Stored(output).table.equals(truth.table)
    assert not list(output.rglob(".writing-*"))


# ---- no room -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``disk(kilobytes)``: a file system of that size, or the same one grown or shrunk to it."""
    place = tmp_path / "disk"
    place.mkdir()

    def sized(kilobytes: int) -> Path:
        how = (
            ["-o", f"remount,size={kilobytes}k"]
            if place.is_mount()
            else ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"]
        )
        subprocess.run(["mount", *how, str(place)], check=True)
        return place

    yield sized
    subprocess.run(["umount", str(place)], check=False)


@as_root
@pytest.mark.parametrize("place", ["first file", "tasks", "reduction"])
def test_a_disk_that_fills_up(
    place: str, shared: Path, truth: Stored, disk: Callable[[int], Path], small_tasks: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip

    def kilobytes(folder: Path) -> int:
        return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())

    used = kilobytes(truth.folder)
    room = {
        "first file": used // 250,
        "tasks": used * 2 // 5,
        "reduction": used - kilobytes(truth.folder / "reduced") // 2,
    }
    output = disk(room[place]) / "run"
    assert main(["run", *flags(shared, output)]) == FAILED  # and the same command goes on
    line = one_line(capsys.readouterr().err)
    assert "No space left on device" in line and "Make room; the same command goes on." in line
    done = len(list(output.glob("done/*.json")))
    assert (done == 0) if place == "first file" else 0 < done < 7
    if place == "reduction":
        assert done == len(truth.receipts) and not (output / "reduced/manifest.json").exists()
    assert not list(output.rglob(".writing-*"))
    disk(4 * used)
    goes_on(shared, output, truth)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
import fisher_ray.cost; fisher_ray.cost.MIN_TASK_BYTES = int(sys.argv.pop(1))
from fisher_ray.cli import main
sys.exit(main())
"""


def test_files_larger_than_allowed(shared: Path, truth: Stored, tmp_path: Path, small_tasks: None) -> None:
    """For those who cannot mount: the kernel refuses the first file of factors."""
    output = tmp_path / "run"
    more = ["-c", LIMITED, str(100_000), str(TASK_BYTES), "run", *flags(shared, output)]
    process = jobs.python(*more)
    _, err = process.communicate(timeout=120)
    assert process.returncode == BAD_INPUT
    assert "File too large" in one_line(err)
    assert not list(output.rglob(".writing-*"))
    goes_on(shared, output, truth)


# ---- not allowed -------------------------------------------------------------------------------------------------------


def bound_by_permissions(shared: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command, where permissions bind."""
    capsys.readouterr()
    with permissions_bind():
        code = main(["run", *flags(shared, output)])
    return code, capsys.readouterr().err


def test_an_output_that_may_not_be_written(
    shared: Path, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    code, err = bound_by_permissions(shared, tmp_path / "closed/run", capsys)
    assert code == BAD_INPUT
    assert "Permission denied" in one_line(err) and "Choose a directory that can be read and written" in err
    assert list((tmp_path / "closed").iterdir()) == []


@pytest.mark.parametrize("folder", ["done", "sums", "tree", "reduced", "lease", "."])
def test_a_folder_of_a_run_that_may_not_be_written(
    folder: str, shared: Path, truth: Stored, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a run by another user."""
    output = tmp_path / "run"
    shutil.copytree(truth.folder, output)
    for name in ("lease", "tree"):
        (output / name).mkdir(exist_ok=True)
    for path in (output, *output.rglob("*")):
        path.chmod(0o777)
    for name in ("00000001", "00000003"):
        (output / f"done/{name}.json").unlink()
    (output / "reduced/manifest.json").unlink()
    (output / folder).chmod(0o555)
    code, err = bound_by_permissions(shared, output, capsys)
    if folder == "tree":  # so few tasks need no inner nodes
        assert code == COMPLETE, err
    else:
        assert code == BAD_INPUT, err
        assert "Permission denied" in one_line(err) and folder in err
    (output / folder).chmod(0o777)
    goes_on(shared, output, truth)


@pytest.mark.parametrize("folder", ["done", "tree"])
def test_a_folder_of_a_run_that_may_not_be_read(
    folder: str, shared: Path, truth: Stored, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not taken for an empty one."""
    output = tmp_path / "run"
    shutil.copytree(truth.folder, output)
    (output / "tree").mkdir(exist_ok=True)
    for path in (output, *output.rglob("*")):
        path.chmod(0o777)
    (output / folder).chmod(0o333)
    code, err = bound_by_permissions(shared, output, capsys)
    assert code == BAD_INPUT, err
    assert "Permission denied" in one_line(err)
    (output / folder).chmod(0o777)
    goes_on(shared, output, truth)
    assert Stored(output).receipts == truth.receipts


@pytest.mark.parametrize("where", ["run", "run/below"])
def test_a_file_in_the_way(where: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    assert main(["run", *flags(shared, tmp_path / where)]) == BAD_INPUT
    one_line(capsys.readouterr().err)
    assert (tmp_path / "run").read_text() == "mine"


# ---- removed meanwhile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [".", "done", "sums"])
def test_a_directory_that_is_removed_while_it_is_written(
    gone: str, shared: Path, truth: Stored, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """After three tasks. Either it is made good within the run, or it ends in one line; never a mean of what is left."""
    output, compute = tmp_path / "run", dispatch.Servant.compute
    left = [3]

    def then_gone(servant: Any, task: Any) -> Any:
        receipt = compute(servant, task)
        left[0] -= 1
        if left[0] == 0:
            shutil.rmtree(output / gone)
        return receipt

    with monkeypatch.context() as patch:
        patch.setattr(dispatch.Servant, "compute", then_gone)
        code = main(["run", *flags(shared, output)])
    assert left[0] <= 0
    err = capsys.readouterr().err
    if code == COMPLETE:
        assert err == "" and Stored(output).bits() == truth.bits()
    else:
        one_line(err)
        assert not (output / "reduced/manifest.json").exists()
    goes_on(shared, output, truth)


# ---- another's run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_new_run_that_another_driver_took_over_is_not_removed(
    when: str, shared: Path, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were given at once; the one that made the directory came second to the lease, or lost it before a task was done."""
    output = tmp_path / "run"
    lease = driver.Lease

    def refuse(store: RunStore) -> Any:
        if when == "before":
            raise RefusedError("another driver works on it")
        held = lease(store)
        held.lost = RefusedError("another driver has taken this run over")
        return held

    monkeypatch.setattr(driver, "Lease", refuse)
    assert main(["run", *flags(shared, output)]) == REFUSED
    assert (output / "run.json").exists() and (output / "plan.parquet").exists()
    # What is said of the run is said by the other one.
    state = "computing" if when == "meanwhile" else None
    shown = output / "progress.json"
    assert (json.loads(shown.read_text())["state"] if shown.exists() else None) == state
