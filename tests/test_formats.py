"""docs/formats.md against the code's schemas and against runs: a page that says something else fails here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import Session, ran

import jobs
from fisher_ray import cost
from fisher_ray.directions import COORDINATES_SCHEMA
from fisher_ray.driver import Progress
from fisher_ray.plan import PLAN_SCHEMA
from fisher_ray.reduce import DIRECTIONS_SCHEMA, SUMMARY_SCHEMA
from fisher_ray.shards import POSITION_FIELDS, POSITIONS_VERSION, RUN_VERSION, Counts
from fisher_ray.storage import StoredFile, seal
from jobs import D_MODEL, gpt2  # noqa: F401

SKETCH = 4
PAGE = Path(__file__).resolve().parent.parent / "docs/formats.md"
TEXT = PAGE.read_text(encoding="utf-8")
TABLES = {
    "positions/*.parquet": (pa.schema(POSITION_FIELDS), POSITIONS_VERSION),
    "plan.parquet": (PLAN_SCHEMA, PLAN_SCHEMA.metadata[b"fisher_ray.schema"].decode()),
    "reduced/directions.parquet": (DIRECTIONS_SCHEMA, DIRECTIONS_SCHEMA.metadata[b"fisher_ray.schema"].decode()),
    "FILE.parquet of fisher-ray project": (
        COORDINATES_SCHEMA,
        COORDINATES_SCHEMA.metadata[b"fisher_ray.schema"].decode(),
    ),
    "reduced/summary.parquet": (SUMMARY_SCHEMA, SUMMARY_SCHEMA.metadata[b"fisher_ray.schema"].decode()),
}


def section(heading: str) -> str:
    """A section of the page, from the heading that starts so to the next one."""
    (found,) = re.findall(rf"^##+ {re.escape(heading)}[^\n]*\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return found


def rows(text: str) -> dict[str, str]:
    """First cell, without its quotes, to second, of the tables of a text."""
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", text, re.MULTILINE))


def named(text: str) -> set[str]:
    """Whatever is quoted in a text."""
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.fixture(scope="module")
def runs(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:  # noqa: F811
    """Runs of more tasks than one node adds up: with groups, factors, matrices, sketches, an early end, a bad document."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "docs").mkdir()
    (folder / "docs/a.txt").write_text(jobs.some_text(9_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", 200)
        patch.setattr(cost, "_BLOCKS", 40)  # as of a large corpus, whose tasks are more than its blocks
        made = []
        for name, settings in {
            "factors": {"group_by": "position", "save": "factors", "estimator": "sampled"},
            "matrices": {"positions": "::4", "save": "matrices"},
            "sketch": {"group_by": "position", "sketch": SKETCH, "layers": "1"},
            "early": {"layers": "0,2", "until_relative_change": 0.9},
        }.items():
            config = jobs.settings(gpt2, folder / "docs", folder / name, num_samples=3, **settings)
            assert jobs.run_here(config)[1].tasks > 32
            made.append(folder / name)
        (folder / "docs/b.txt").write_bytes(b"not \xff\xfe text\n")
        config = jobs.settings(gpt2, folder / "docs", folder / "short", layers="1", token_source="sampled")
        assert len(jobs.run_here(config)[1].quarantined) == 1
    return [*made, folder / "short"]


def kind(type_: pa.DataType) -> str:
    """As the page names types: what Parquet calls the entries of a list is no part of it."""
    return f"list of {type_.value_type}" if pa.types.is_list(type_) else str(type_)


def files(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's own code defines."""
    session = Session()
    assert len(ran(PAGE, session, ["python"])) == 2
    return session.namespace


@pytest.mark.parametrize("heading", TABLES)
def test_columns_are_the_schemas(heading: str) -> None:
    schema, version = TABLES[heading]
    assert list(rows(section(heading)).items()) == [(field.name, kind(field.type)) for field in schema]
    assert f"{heading}: `{version}`" in TEXT
    assert f"`{version}`" in section("Versions")
    assert f"`{RUN_VERSION}`" in section("Versions")


def test_tables_of_a_run_have_them(runs: list[Path]) -> None:
    for run in runs:
        for heading, (schema, version) in TABLES.items():
            for path in run.glob(heading):
                found = pq.read_schema(path)
                assert found.names[: len(schema.names)] == schema.names
                assert [kind(t) for t in found.types] == [kind(t) for t in schema.types]
                assert found.metadata[b"fisher_ray.schema"].decode() == version
        null = {name for path in run.glob("positions/*") for name in pq.read_table(path).column_names
                if pq.read_table(path)[name].null_count}  # fmt: skip
        assert null == {"surprisal"}  # the one column that the page says has nulls


def test_every_file_is_named_and_every_name_is_used(runs: list[Path]) -> None:
    parts = {
        "TASK": r"\d{8}", "ATTEMPT": "[0-9a-f]{8}", "KKK": r"\d{3,}", "NNNNNN": r"\d{6}",
        "NODE": r"\d{8}-\d{8}-\d{3,}-\d{3,}(-without-[0-9a-f]{12})?", "group_NAME": "group_[A-Za-z0-9_.~ %-]+",
        "NAME": "[a-z_]+",
    }  # fmt: skip
    patterns = {}
    for path in rows(section("Files")):
        regex = re.escape(path)
        for part, meaning in parts.items():
            regex = regex.replace(re.escape(part), meaning)
        patterns[path] = regex
    used = set()
    for run in runs:
        for file in files(run):
            matching = [path for path, regex in patterns.items() if re.fullmatch(regex, file)]
            assert len(matching) == 1, f"{file} is described by {matching}"
            used.update(matching)
    assert set(patterns) - used == {"lease/NNNNNN.json"}
    assert any("-without-" in file for file in files(runs[-1]))


def test_sealed_files_have_the_keys_of_the_page(runs: list[Path], page: dict[str, Any]) -> None:
    stored, counts = {field.name for field in fields(StoredFile)}, {field.name for field in fields(Counts)}
    assert "{path, sha256, bytes, rows}" in TEXT and stored == {"path", "sha256", "bytes", "rows"}
    for run in runs:
        assert set(page["unsealed"](run / "run.json")) == set(rows(section("run.json")))
        assert set(page["unsealed"](run / "reduced/manifest.json")) == set(rows(section("reduced/manifest.json")))
        for path in [*run.glob("done/*"), *run.glob("tree/*.json")]:
            receipt = page["unsealed"](path)
            assert set(receipt) == set(rows(section("Receipts")))
            assert set(receipt["counts"]) == counts <= named(section("Receipts"))
            assert {*receipt["seconds"], *(key for worker in receipt["workers"] for key in worker)} <= named(
                section("Receipts")
            )
            kinds = {re.sub(r"_\d+$", "_K", name) for name in receipt["files"]}
            assert kinds <= named(section("Receipts"))
            assert all(set(file) == stored for file in receipt["files"].values())
        looked = page["unsealed"](run / "reduced/manifest.json")["checkpoints"]
        assert bool(looked) == (run.name == "early")
        (keys,) = re.findall(r"`\{(tasks, [^}]*)\}`", section("reduced/manifest.json"))
        assert all(set(checkpoint) == set(keys.split(", ")) for checkpoint in looked)
        progress = page["unsealed"](run / "progress.json")
        assert progress["checkpoint"] == (looked[-1] if looked else None)
        assert set(progress) <= named(section("progress.json"))
        assert {field.name for field in fields(Progress)} <= set(progress)
        for path in run.glob("quarantine/*"):
            note = page["unsealed"](path)
            assert set(note) <= named(section("quarantine/TASK.json")) and note["kind"] in named(
                section("quarantine/TASK.json")
            )
            assert set(note["ranges"][0]) == set(rows(section("plan.parquet"))) - {"task"}
        provenance = json.loads((run / "reduced/provenance.json").read_text())
        assert set(provenance) <= named(section("reduced/provenance.json"))


def test_the_fingerprint_is_that_of_the_result_fields(runs: list[Path]) -> None:
    run = json.loads((runs[0] / "run.json").read_text())
    assert hashlib.sha256(serialised(run["result_fields"]).encode()).hexdigest() == run["fingerprint"]


def serialised(value: Any) -> str:
    """JSON by the page's rules, without the library's serialiser."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{serialised(key)}: {serialised(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(serialised, value)) + "]"
    if isinstance(value, str):
        short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
        units = np.frombuffer(value.encode("utf-16-be"), ">u2").tolist()
        return '"' + "".join(_character(unit, short) for unit in units) + '"'
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )


def _character(unit: int, short: dict[str, str]) -> str:
    character = chr(unit)
    return short.get(character, character if 32 <= unit < 127 else f"\\u{unit:04x}")


def test_a_seal_can_be_computed_by_the_pages_rules() -> None:
    values = {
        "b": [1, -2, 0.1, 12.0, 1e-5, 1e16, 1e22, 123456.789],
        "a": {"é€😀": 'q"\\\n\t\x01', "A": None},
        "c": [True, {}, []],
    }
    sealed = json.loads(seal(values))
    assert sealed["sha256"] == hashlib.sha256(serialised(values).encode()).hexdigest()


def test_damage_is_told_by_the_pages_code(runs: list[Path], page: dict[str, Any], tmp_path: Path) -> None:
    raw = (runs[0] / "run.json").read_bytes()
    copy = tmp_path / "run.json"
    copy.write_bytes(raw.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(ValueError, match="damaged"):
        page["unsealed"](copy)


def test_the_pages_mean_is_the_reduced_one(runs: list[Path], page: dict[str, Any]) -> None:
    for run in runs:
        assert page["means_are_current"](run)
        if run.name == "sketch":
            continue
        last = page["unsealed"](run / "reduced/manifest.json")["last"]
        for folder in run.glob("reduced/layer_*"):
            layer = int(folder.name.removeprefix("layer_"))
            mean = np.load(folder / "fisher.npy")
            assert np.abs(page["mean_fisher"](run, layer, last) - mean).max() <= 1e-12 * mean.max()


def shape(text: str, **sizes: int) -> tuple[int, ...]:
    """``[G, d (d + 1) / 2]`` in numbers."""
    inside = re.match(r"\[([^]]*)\]", text)
    assert inside, text
    parts = inside.group(1).replace("d (d + 1) / 2", "d * (d + 1) // 2").split(",")
    return tuple(eval(part, {}, sizes) for part in parts if part.strip())


def test_arrays_have_the_shapes_of_the_page(runs: list[Path]) -> None:
    plain, _, sketched = section("Sums").partition("With `sketch`")
    full = rows(plain)
    matrices = [name for name, what in full.items() if "(d + 1)" in what]
    assert len(matrices) == 3
    described = {name: what for name, what in full.items() if name not in matrices}
    for name, what in rows(sketched).items():
        described |= {name.replace("X", matrix): what for matrix in matrices}
    seen = set()
    for run in runs:
        wanted = described if run.name == "sketch" else full
        for path in [*run.glob("sums/*/*.npz"), *run.glob("tree/*/*.npz"), *run.glob("reduced/*/groups.npz")]:
            with np.load(path) as arrays:
                groups = len(arrays["groups"])
                seen.add((wanted is described, groups))
                if groups == 0:
                    assert set(arrays) == set(full) and all(arrays[name].shape == (0,) for name in full)
                    continue
                assert set(arrays) == set(wanted)
                assert arrays["groups"].tolist() == sorted(arrays["groups"].tolist())
                for name, what in wanted.items():
                    array = arrays[name]
                    if what.startswith("[rows of all groups"):
                        assert array.shape == (arrays[f"{name}_rows"].sum(), D_MODEL)
                        assert arrays[f"{name}_rows"].max() <= arrays["limit"] == SKETCH
                    else:
                        assert array.shape == shape(what, G=groups, d=D_MODEL)
                    single = name in matrices and path.is_relative_to(run / "sums")
                    said = what.rpartition("]")[2].strip() or ("float32" if single else "float64")
                    assert array.dtype.kind == "U" if said == "Unicode" else array.dtype == said, (path, name)
        reduced = rows(section("reduced/layer_KKK/*.npy"))
        for folder in [*run.glob("reduced/layer_*"), *run.glob("reduced/layer_*/group_*")]:
            found = {path.name: np.load(path) for path in folder.glob("*.npy")}
            assert all(array.dtype == np.float64 for array in found.values())
            if run.name == "sketch":
                instead = {name for name in named(section("reduced/layer_KKK/*.npy")) if name.endswith("_factors.npy")}
                replaced = {name.replace("_factors", "") for name in instead}
                assert set(found) == set(reduced) - replaced | instead
                shapes = {**dict.fromkeys(instead, (SKETCH, D_MODEL)), "eigenvalues.npy": (SKETCH,)}
                shapes["eigenvectors.npy"] = (D_MODEL, SKETCH)
                assert {name: found[name].shape for name in shapes} == shapes
                continue
            assert {name: array.shape for name, array in found.items()} == {
                name: shape(what, d=D_MODEL) for name, what in reduced.items()
            }
        for kept in ("factors", "matrices"):
            for path in run.glob(f"{kept}/*/*.npy"):
                array, layer = np.load(path), int(path.stem.removeprefix("layer_"))
                table = pq.read_table(
                    run / "positions" / f"{path.parent.name}.parquet", filters=[("layer", "=", layer)]
                )
                assert array.dtype == np.float32 and len(array) == len(table)
                assert array.shape[1:] == ((3, D_MODEL) if kept == "factors" else (D_MODEL, D_MODEL))
                square = array.astype(np.float64).transpose(0, 2, 1) @ array if kept == "factors" else array
                np.testing.assert_allclose(square.trace(axis1=1, axis2=2), table["trace"].to_numpy(), rtol=1e-4)
    assert {(False, 0), (False, 1)} < seen and any(sketched and groups > 1 for sketched, groups in seen)


def test_triangles_are_packed_as_the_page_says() -> None:
    assert "`i d - i (i - 1) / 2 + j - i`" in " ".join(TEXT.split())
    for d in (1, 4, D_MODEL):
        at = [i * d - i * (i - 1) // 2 + j - i for i, j in zip(*np.triu_indices(d), strict=True)]
        assert at == list(range(d * (d + 1) // 2)) and len(at) == math.comb(d + 1, 2)


def test_the_drawn_order_is_the_pages(runs: list[Path], page: dict[str, Any]) -> None:
    """Of the run that may end early, by where its tasks begin."""
    early = next(run for run in runs if run.name == "early")
    assert page["unsealed"](early / "run.json")["result_fields"]["shuffled"]
    drawn = pq.read_table(early / "plan.parquet").to_pylist()
    first: dict[int, tuple[str, int]] = {}
    for row in drawn:
        first.setdefault(row["task"], (row["name"], row["start"]))
    in_order = sorted(range(len(first)), key=lambda i: hashlib.sha256(f"0:{i}".encode()).hexdigest())
    assert [first[task] for task in range(len(first))] == [sorted(first.values())[i] for i in in_order]


def test_the_order_of_sums_is_the_pages(runs: list[Path], page: dict[str, Any]) -> None:
    """min(32, tasks) blocks with the bounds that the page gives, of the tasks that were not given up."""
    for run in runs:
        tasks = page["unsealed"](run / "run.json")["tasks"]
        manifest = page["unsealed"](run / "reduced/manifest.json")
        assert (manifest["last"] < tasks) == (run.name == "early")
        tasks = manifest["last"]
        children = min(32, tasks)
        bounds = [tasks * i // children for i in range(children + 1)]
        expected = [pair for pair in pairwise(bounds) if set(range(*pair)) - set(manifest["missing"])]
        assert [(block["first"], block["last"]) for block in manifest["blocks"]] == expected
        for block in manifest["blocks"]:
            receipts = [page["unsealed"](run / f"{path}.json") for path in block["receipts"]]
            held = {name for receipt in receipts for name in receipt["files"] if name.startswith("sums_")}
            assert held == {f"sums_{layer}" for layer in page["unsealed"](run / "run.json")["layers"]}
