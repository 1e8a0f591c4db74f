"""The script that is run where there is a GPU, on small shapes on the CPU: every section that needs no other package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

pytestmark = pytest.mark.usefixtures("unchecked_shapes")  # as it is run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


def written(gpu: Any, folder: Path, sections: str) -> tuple[int, dict[str, Any], str]:
    """The exit code and the two files."""
    code = gpu.main(["--device", "cpu", "--quick", "--output", str(folder), "--sections", sections])
    return code, json.loads((folder / "gpu.json").read_text())["sections"], (folder / "gpu.md").read_text()


def test_sections_end_well_and_tell_what_they_found(gpu: Any, tmp_path: Path) -> None:
    code, sections, text = written(gpu, tmp_path, "peaks,kernels,correctness,memory,llama,engine,bits")
    assert code == 0, text
    assert not any(section["error"] for section in sections.values())
    rows = {name: section["rows"] for name, section in sections.items()}

    checked = {(row["family"], row["weights"]): row for row in rows["correctness"]}
    assert checked["gpt2", "float64"]["scores"] < 1e-12 < checked["gpt2", "bfloat16"]["scores"] < 5e-2
    assert [row["run"].split()[0] for row in rows["bits"]] == ["the", "killed", "two"]
    assert [row["result"] for row in rows["bits"][1:]] == ["the same bits"] * 2

    for row in rows["kernels"]:  # a CPU takes none of them; tests/test_kernels.py has stand-ins
        assert row["taken"] == "False" and row["error of the engine's own"] < 2e-2
    assert len(rows["kernels"]) == 3

    # Two layers: a run from the first block and one from the second, against one pass over both.
    engine = {row["what"]: row for row in rows["engine"]}
    assert engine["one layer, S=8: recomputed"]["flop"] > 5
    assert 1.5 < engine["all layers, S=1, in plain forward passes"]["flop"] < 4
    assert "| one layer, exact: the reference's way |" in text


def test_one_that_fails_stops_no_other(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device, scale: Any) -> Iterator[dict[str, Any]]:
        yield {"found": 1.5}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.SECTIONS, "fails", fails)
    code, sections, text = written(gpu, tmp_path, "fails,peaks")
    assert code == 1
    assert sections["fails"]["rows"] == [{"found": 1.5}]
    assert sections["fails"]["error"] == "RuntimeError: no such kernel"
    assert sections["peaks"]["error"] is None and len(sections["peaks"]["rows"]) == 3
    assert "**Failed:** RuntimeError: no such kernel" in text


def test_other_bits_fail(gpu: Any, tmp_path: Path) -> None:
    config = gpu._demo(torch.device("cpu"), gpu.changed(gpu.QUICK, max_docs=2), tmp_path)
    gpu._run(config, mortal=False)
    truth = gpu._fingerprint(config)
    assert list(gpu._same("itself", config, truth)) == [{"run": "itself", "result": "the same bits"}]
    array = tmp_path / "reduced/layer_003/fisher.npy"
    raw = bytearray(array.read_bytes())
    raw[-8] ^= 1  # the last bit of the last number
    array.write_bytes(raw)
    with pytest.raises(AssertionError, match=rf"other: 1 of {len(truth)} arrays and tables have other bits"):
        list(gpu._same("other", config, truth))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "cpu", "--sections", "peeks"], "--sections must be some of peaks, "),
        ([], "--device cuda finds no GPU"),
    ],
)
def test_what_cannot_be_is_one_line(
    gpu: Any, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path), *flags])
    assert said in capsys.readouterr().err.splitlines()[-1]
