"""Documents do not depend on how files are cut, and every chosen position is scored once."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

import jobs
from fisher_ray.corpus import (
    CorpusError,
    Document,
    Layout,
    SourceRange,
    _version,
    find_ranges,
    find_sources,
    read_documents,
    sample_documents,
    take,
    windows,
)
from fisher_ray.plan import ConfigError, Positions

ALL = 1 << 40

# CRLF, blank lines with spaces and tabs, several in a row, at the start too, letters of 2 to 4 bytes, no final newline.
MESSY = (
    "\r\n  \n first  line \r\nsecond ä\r\n\r\n \t \r\n\nthird 🦊 part\ngoes on   \n\n\n\nfour\u2028€\n \nfive\n\n"
    "six ends without a newline"
).encode()

# Characters that str.splitlines would break at are no line ends in JSON lines.
TEXTS = ["first", "ä " * 9, "", "third\u2028\x85 🦊", "x" * 40, "y\u2029", "seven"]


def documents(ranges: Iterable[SourceRange], layout: Layout) -> list[Document]:
    return [document for source in ranges for document in read_documents(source, layout)]


def every(path: str | Path, layout: Layout | None = None, target: int = ALL) -> list[Document]:
    layout = layout or Layout()
    return documents(find_ranges(find_sources([str(path)]), layout, target), layout)


def paragraphs(raw: bytes, name: str) -> list[Document]:
    return [Document(f"{name}:{offset}", text) for offset, text in jobs.paragraphs(raw)]


def compressed(raw: bytes, ending: str) -> bytes:
    return gzip.compress(raw) if ending == "gz" else pa.compress(raw, codec="zstd", asbytes=True)


def json_lines(texts: list[str], ending: str = "\n") -> bytes:
    rows = [json.dumps({"n": i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    return ending.join(rows).encode()


def write_arrow(path: Path, table: pa.Table, chunk: int) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)


def write(folder: Path, ending: str) -> Path:
    """TEXTS in a file of a format."""
    path = folder / f"corpus.{ending}"
    table = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif ending == "arrow":
        write_arrow(path, table, 3)
    else:
        kind, _, codec = ending.partition(".")
        raw = json_lines(TEXTS, "\r\n\n" if kind == "ndjson" else "\n")
        path.write_bytes(compressed(raw, codec) if codec else raw)
    return path


# ---- cutting -----------------------------------------------------------------------------------------------------------


def test_paragraphs_do_not_depend_on_cuts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(MESSY)
    truth = paragraphs(MESSY, "a.txt")
    assert [d.content for d in truth][1:3] == ["third 🦊 part\ngoes on   ", "four\u2028€"] and len(truth) == 5
    for target in range(1, len(MESSY) + 2):
        assert every(path, target=target) == truth, target


def test_random_paragraphs_do_not_depend_on_cuts() -> None:
    rng = random.Random(0)
    fs = fsspec.filesystem("memory")
    for _ in range(400):
        raw = "".join(rng.choice(["\n", "\n", "\r\n", " ", "\t", "a", "ä"]) for _ in range(rng.randint(1, 30))).encode()
        fs.pipe_file("/cuts/a.txt", raw)
        for target in (1, rng.randint(2, 8), ALL):
            assert every("memory://cuts/a.txt", target=target) == paragraphs(raw, "a.txt"), (raw, target)


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "parquet", "arrow", "jsonl.gz", "jsonl.zst"])
def test_rows_do_not_depend_on_cuts(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path, ending)
    truth = every(path)
    assert [d.content for d in truth] == TEXTS
    assert len({d.id for d in truth}) == len(TEXTS)
    size = path.stat().st_size
    for target in (*range(1, 40), size // 3, size - 1, size, size + 1):
        assert every(path, target=target) == truth, target


@pytest.mark.parametrize("place", ["", "odd://"])
def test_arrow_files_are_read_as_streams_are(place: str, tmp_path: Path) -> None:
    """The other of the two formats with this ending, as pandas and polars write it."""
    stream = write(tmp_path, "arrow")
    for folder in ("streams", "files"):
        (tmp_path / folder).mkdir()
    table = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
    file = tmp_path / "files/corpus.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    stream = stream.rename(tmp_path / "streams/corpus.arrow")
    assert file.read_bytes()[:6] == b"ARROW1" != stream.read_bytes()[:6]
    for target in (*range(1, 40), ALL):
        truth, ranges = plan(f"{place}{stream}", target=target), plan(f"{place}{file}", target=target)
        cuts = [[(r.start, r.stop, r.weight) for r in some] for some in (truth, ranges)]
        assert cuts[0] == cuts[1] and (len(ranges) == 1 if place else len(ranges) > 3 or target > 30), target
        assert documents(ranges, Layout()) == documents(truth, Layout()), target
    assert [document.content for document in documents(ranges, Layout())] == TEXTS


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet", "arrow"])
def test_files_are_cut_into_many_ranges(ending: str, tmp_path: Path) -> None:
    """Otherwise the laws above would hold for nothing."""
    path = tmp_path / "a.txt" if ending == "txt" else write(tmp_path, ending)
    if ending == "txt":
        path.write_bytes(MESSY)
    ranges = list(find_ranges(find_sources([str(path)]), Layout(), 10))
    assert len(ranges) >= 5
    size = path.stat().st_size
    if ending == "arrow":  # texts and where they start
        size = sum(len(text.encode()) + 4 for text in TEXTS)
    if ending == "parquet":
        footer = pq.read_metadata(path)
        size = sum(footer.row_group(i).column(1).total_uncompressed_size for i in range(footer.num_row_groups))
    assert sum(source.weight for source in ranges) == pytest.approx(size, rel=0.2)


def test_what_comes_after_the_documents_wanted_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nno JSON\n')
    ranges = list(find_ranges(find_sources([str(tmp_path / "a.jsonl")]), Layout(), 1 << 20))
    (taken,) = take(ranges, 2, Layout())
    assert [document.content for document in read_documents(taken, Layout())] == ["one", "two"]
    with pytest.raises(CorpusError, match="not a JSON object"):
        list(read_documents(ranges[0], Layout()))


def test_max_docs_takes_the_first_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(MESSY)
    write(tmp_path, "parquet")
    write(tmp_path, "jsonl.gz")
    truth = every(tmp_path)
    assert len(truth) == 5 + 2 * len(TEXTS)
    for target in (1, 7, ALL):
        ranges = list(find_ranges(find_sources([str(tmp_path)]), Layout(), target))
        for n in range(1, len(truth) + 3):
            assert documents(take(ranges, n, Layout()), Layout()) == truth[:n], (target, n)


def test_parquet_of_uneven_row_groups(tmp_path: Path) -> None:
    """Against a plain reading, for every target: lists of ids, beside a column of which nothing is read or weighed."""
    rng = random.Random(0)
    path = tmp_path / "a.parquet"
    rows = [
        {"ids": [rng.randrange(99) for _ in range(rng.choice([0, 1, 3, 200]))], "ids2": "x" * 500} for _ in range(90)
    ]
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(path, table.schema) as writer:
        first = 0
        for length in (1, 40, 2, 0, 30, 1, 1, 15):
            writer.write_table(table.slice(first, length), row_group_size=max(length, 1))
            first += length
    truth = [(f"a.parquet:{i}", row["ids"]) for i, row in enumerate(pq.read_table(path).to_pylist())]
    assert len(truth) == 90
    footer = pq.read_metadata(path)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    size = sum(group.column(0).total_uncompressed_size for group in groups)
    assert len(groups) >= 7 and groups[0].column(0).path_in_schema.startswith("ids.")
    counts = set()
    for target in (1, 2, 30, 50, 100, 333, 1_000, 5_000, ALL):
        ranges = list(find_ranges(find_sources([str(path)]), Layout("ids"), target))
        assert [(d.id, d.content) for d in documents(ranges, Layout("ids"))] == truth, target
        assert [r.start for r in ranges] == [0, *(r.stop for r in ranges[:-1])] and ranges[-1].stop == 90
        assert sum(r.weight for r in ranges) == pytest.approx(size, abs=len(ranges))
        counts.add(len(ranges))
    assert counts >= {1, 90} and len(counts) > 4


def test_what_compresses_well_is_no_huge_range(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.table({"text": [f"{i} " + "all work and no play " * 500 for i in range(1_000)]})
    pq.write_table(texts, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    ranges = list(find_ranges(find_sources([str(path)]), Layout(), 1 << 16))
    assert len(ranges) >= 160 and max(r.weight for r in ranges) <= (1 << 16) + 10_600  # one text


# ---- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["txt", "md", "txt.gz", "txt.zst", "md.gz"])
@pytest.mark.parametrize("unit", ["paragraph", "file"])
def test_text_files(ending: str, unit: Any, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    codec = ending.partition(".")[2]
    path.write_bytes(compressed(MESSY, codec) if codec else MESSY)
    whole = [Document(f"{path.name}:0", MESSY.decode())]
    truth = whole if unit == "file" else paragraphs(MESSY, path.name)
    for target in (1, 20, ALL):
        assert every(path, Layout(unit=unit), target) == truth


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_files_compressed_in_several_parts(codec: str, tmp_path: Path) -> None:
    """As parallel compressors and log rotation leave them."""
    path = tmp_path / f"a.txt.{codec}"
    path.write_bytes(compressed(MESSY[:50], codec) + compressed(MESSY[50:], codec))
    assert every(path) == paragraphs(MESSY, path.name)


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_half_a_compressed_file_is_refused(codec: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    raw = "\n\n".join(str(rng.random()) for _ in range(200_000)).encode()  # beyond what is looked at first
    path = tmp_path / f"a.txt.{codec}"
    path.write_bytes(compressed(raw, codec)[:-200_000])
    with pytest.raises(CorpusError, match=r"a\.txt"):
        every(path)


def test_a_saved_dataset_folder(tmp_path: Path) -> None:
    """The layout that ``datasets`` writes: Arrow streams, two JSON files, and caches that are not data."""
    table = pa.table({"text": TEXTS})
    (tmp_path / "train").mkdir()
    write_arrow(tmp_path / "train/data-00000-of-00002.arrow", table.slice(0, 4), 2)
    write_arrow(tmp_path / "train/data-00001-of-00002.arrow", table.slice(4), 2)
    write_arrow(tmp_path / "train/cache-0123456789abcdef.arrow", table, 2)
    (tmp_path / "train/state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00002.arrow"}]}))
    (tmp_path / "train/dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    for folder in (tmp_path, tmp_path / "train"):
        for target in (1, ALL):
            assert [d.content for d in every(folder, target=target)] == TEXTS


def test_token_ids(tmp_path: Path) -> None:
    ids = [[3, 1], [4, 1], [5, 9]]
    np.save(tmp_path / "a.npy", np.array(ids, np.uint16))
    lists = pa.array(ids, pa.list_(pa.int32()))
    pq.write_table(pa.table({"ids": lists}), tmp_path / "a.parquet", row_group_size=1)
    pq.write_table(pa.table({"ids": lists.cast(pa.large_list(pa.int64()))}), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"ids": row}) for row in ids))
    for name in ("a.npy", "a.parquet", "b.parquet", "a.jsonl"):
        for target in (1, 8, ALL):
            assert [d.content for d in every(tmp_path / name, Layout("ids"), target)] == ids, name


def test_token_ids_saved_by_columns_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(np.arange(6).reshape(3, 2)))
    with pytest.raises(CorpusError, match="ascontiguousarray"):
        every(tmp_path)


def test_carried_columns_and_encoder_text(tmp_path: Path) -> None:
    rows = [{"n": 7, "who": None, "said": "a", "heard": "b"}, {"n": 8, "who": "é", "said": "c", "heard": "d"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    layout = Layout("heard", encoder_column="said", carried=("who", "n"))
    for name in ("a.jsonl", "a.parquet"):
        got = [(d.content, d.encoder_text, d.carried) for d in every(tmp_path / name, layout)]
        assert got == [("b", "a", (None, "7")), ("d", "c", ("é", "8"))]


def test_a_first_line_with_unicode_line_separators(tmp_path: Path) -> None:
    """JSON may hold them as they are; only a newline ends a line."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a\u2028b\x85c"]))
    assert [d.content for d in every(tmp_path / "a.jsonl")] == ["a\u2028b\x85c"]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_columns_of_other_kinds_of_strings(kind: pa.DataType, ending: str, tmp_path: Path) -> None:
    """As polars and pandas write them: views, and categories."""
    texts, who = ["one ä", "two", None, "one ä"], ["x", None, "y", "x"]
    table = pa.table({name: pa.array(values).cast(kind) for name, values in (("text", texts), ("who", who))})
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=3)
        assert pq.read_schema(path).field("text").type == kind
    else:
        write_arrow(path, table, 3)
    for target in (1, ALL):
        got = [(d.content, d.carried) for d in every(path, Layout(carried=("who",)), target)]
        assert got == [(text or "", (name,)) for text, name in zip(texts, who, strict=True)]


def test_null_text_is_an_empty_document(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}')
    for name in ("a.parquet", "a.jsonl"):
        assert [d.content for d in every(tmp_path / name)] == ["a", ""]


# ---- places ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with four files of one document each, and others that are no corpus."""
    root = f"memory://{tmp_path.name}" if request.param == "memory://" else str(tmp_path)
    fs, inner = fsspec.core.url_to_fs(root)
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/d.jsonl", "notes.pdf", "deep/.hidden.txt"):
        fs.makedirs(f"{inner}/deep", exist_ok=True)
        fs.pipe_file(f"{inner}/{name}", json.dumps({"text": name}).encode() if name.endswith("l") else name.encode())
    return f"file://{root}" if request.param == "file://" else root


def names(corpus: list[str]) -> list[tuple[str, Any]]:
    return [(d.id, d.content) for d in documents(find_ranges(find_sources(corpus), Layout(), ALL), Layout())]


def test_folders_globs_and_lists_of_them(folder: str) -> None:
    a, b, c, d = (f"{name}:0" for name in ("a.txt", "b.txt", "deep/c.txt", "deep/d.jsonl"))
    assert [i for i, _ in names([folder])] == [a, b, c, d]
    assert [i for i, _ in names([f"{folder}/*.txt"])] == [a, b]
    assert [i for i, _ in names([f"{folder}/**/*.txt"])] == [a, b, c]
    assert [i for i, _ in names([f"{folder}/b.txt", f"{folder}/deep", f"{folder}/a.txt"])] == [b, c, d, a]
    assert [i for i, _ in names([f"{folder}/a.txt", folder])] == [a, b, c, d]  # a file named twice is read once
    assert names([f"{folder}/deep/c.txt"]) == [("c.txt:0", "deep/c.txt")]


def test_a_name_with_glob_characters(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names([str(tmp_path / "a[1].txt")]) == [("a[1].txt:0", "x")]


def test_what_of_a_folder_is_read(tmp_path: Path) -> None:
    """Endings in any case, names that begin like datasets' caches; nothing that is hidden, nor in what is."""
    for name in (
        "cache-control.md",
        "D.TXT",
        "sub/e.txt",
        ".hidden.txt",
        ".git/f.txt",
        "sub/.g/h.txt",
        "cache-0.arrow",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text\n")
    sources = [Path(source.path.removeprefix("file://")) for source in find_sources([str(tmp_path)])]
    assert sorted(str(path.relative_to(tmp_path)) for path in sources) == ["D.TXT", "cache-control.md", "sub/e.txt"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    text = '{"text": "one"}\n{"text": "two"}\n' if name.endswith("jsonl") else "one\n\ntwo\n"
    for before in ("", "\n", "\r\n \n"):  # a blank line after it is one
        (tmp_path / name).write_text(before + text, encoding="utf-8-sig")
        for target in (1, 4, ALL):
            assert [document.content for document in every(tmp_path / name, target=target)] == ["one", "two"]


def test_columns_are_of_files_that_have_some(tmp_path: Path) -> None:
    """Where there are none an encoder's text would be that of other documents, and a misspelt group all of them."""
    (tmp_path / "a.txt").write_text("one")
    np.save(tmp_path / "b.npy", np.ones((1, 3), np.int64))
    for name in ("a.txt", "b.npy"):
        with pytest.raises(CorpusError, match=f"{name} has no columns, and 'kind' is to be one"):
            every(tmp_path / name, Layout(carried=("kind",)))
        with pytest.raises(CorpusError, match=f"{name} has no columns, and 'kind' is to be one"):
            list(sample_documents(find_sources([str(tmp_path / name)]), Layout(carried=("kind",)), 3))
        with pytest.raises(CorpusError, match=f"{name} has no columns, and the encoder's text is to be in 'said'"):
            every(tmp_path / name, Layout(encoder_column="said"))


def test_an_unknown_ending_says_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(CorpusError, match=r"no known ending.*\.parquet"):
        names([str(tmp_path / "a.pdf")])


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_what_python_has_no_date_for_is_named_by_its_file(ending: str, tmp_path: Path) -> None:
    """Other systems count on beyond the year 9999."""
    path = tmp_path / f"a.{ending}"
    days = pa.array([0, 3_000_000], pa.int32()).cast(pa.date32())
    table = pa.table({"text": ["one", "two"], "day": days, "fine": [date(2030, 1, 2)] * 2})
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        write_arrow(path, table, 2)
    assert [d.carried for d in every(path, Layout(carried=("fine",)))] == [("2030-01-02",)] * 2
    with pytest.raises(CorpusError, match=rf"/a\.{ending} cannot be read as {ending}: date.*out of range") as caught:
        every(path, Layout(carried=("day",)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": [3, None]}, "column 'text' must hold text or a list of token ids, got a list with NoneType"),
        ({"text": [3, True]}, "column 'text' must hold text or a list of token ids, got a list with bool"),
        ({"text": [3, "b"]}, "column 'text' must hold text or a list of token ids, got a list with str"),
        ({"text": {"a": 3}}, "column 'text' must hold text or a list of token ids, got dict"),
        ({"text": "a", "kind": "b\0c"}, "character 1 of column 'kind' is a zero byte, not text"),
    ],
)
def test_values_that_cannot_be(row: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    rows = [{"text": "fine \0", "kind": "fine"}, {"kind": None, **row}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = read_documents(plan(tmp_path)[0], Layout(carried=("kind",)))
    assert next(pieces).content == "fine \0"
    with pytest.raises(CorpusError) as caught:
        next(pieces)
    assert str(caught.value) == f"a.jsonl:40: {complaint}."


def test_a_file_named_in_several_ways_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("d/a.txt", "d/b.txt", "x/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = [
        "d/a.txt",
        "x/../d/a.txt",
        "d//a.txt",
        "./d/a.txt",
        f"{tmp_path}/d/a.txt",
        "~/d/a.txt",
        f"file://{tmp_path}/d/a.txt",
    ]
    for more in ([], ["d/../d"], ["~/d/*.txt"]):
        found = names([*ways, *more])
        assert [content for _, content in found] == ["d/a.txt", *(["d/b.txt"] if more else [])]
    assert [content for _, content in names(["x/../d", "d/"])] == ["d/a.txt", "d/b.txt"]
    assert len({path.path for path in find_sources([*ways, "x/../d"])}) == 2


@pytest.mark.parametrize("name", [b"a::b.txt", b"caf\xe9.txt"])
def test_names_that_cannot_be_written_down(name: bytes, tmp_path: Path) -> None:
    """One that would be read as a chain of file systems, and one that JSON and Parquet have no letters for."""
    (tmp_path / "fine.txt").write_text("one")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_text("two")
    for corpus in (tmp_path, tmp_path / "*.txt", path):
        with pytest.raises(CorpusError, match=r"Rename it\.$|chains file systems by '::'") as caught:
            names([str(corpus)])
        assert "\n" not in str(caught.value) and str(caught.value).encode()
    path.rename(tmp_path / "café.txt")
    assert [content for _, content in names([str(tmp_path)])] == ["two", "one"]


# ---- storage -----------------------------------------------------------------------------------------------------------


class Storage(AbstractFileSystem):
    """Local files behind storage that misbehaves, and that counts what it is asked."""

    protocol = "odd"
    root_marker = "/"
    cachable = False
    local = LocalFileSystem()
    asked: ClassVar[list[tuple[str, str]]] = []
    reads: ClassVar[list[int]] = []
    most: ClassVar[int] = ALL  # bytes a read gives
    lost: ClassVar[range] = range(0)  # bytes that do not come
    error: ClassVar[Exception | None] = None  # what comes in their place, else nothing

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self.local.ls(path, detail)

    def info(self, path: str, **kwargs: Any) -> Any:
        self.asked.append(("info", Path(path).name))
        return self.local.info(path)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.asked.append(("open", Path(path).name))
        return OddFile(path)


class OddFile(io.FileIO):
    def read(self, size: int | None = -1, /) -> bytes:
        at = self.tell()
        Storage.reads.append(ALL if size is None or size < 0 else size)
        if at in Storage.lost:
            if Storage.error is not None:
                raise Storage.error
            return b""
        size = min(Storage.reads[-1], Storage.most)
        return super().read(min(size, Storage.lost.start - at) if at < Storage.lost.start else size) or b""

    def readall(self) -> bytes:
        return self.read()


fsspec.register_implementation("odd", Storage, clobber=True)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in (("asked", []), ("reads", []), ("most", ALL), ("lost", range(0)), ("error", None)):
        monkeypatch.setattr(Storage, name, value)
    return f"odd://{tmp_path}"


class ConnectionCutError(Exception):
    """Libraries of object stores have their own, not all of them OSErrors."""


ENDINGS = ["txt", "txt.gz", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "npy"]


def some_file(folder: Path, ending: str) -> tuple[Path, Layout]:
    if ending == "npy":
        np.save(folder / "corpus.npy", np.arange(900).reshape(30, 30))
        return folder / "corpus.npy", Layout()
    if ending.startswith("txt"):
        raw = "\n\n".join(str(random.Random(i).random()) for i in range(99)).encode()
        (folder / f"corpus.{ending}").write_bytes(compressed(raw, "gz") if ending.endswith("gz") else raw)
        return folder / f"corpus.{ending}", Layout()
    return write(folder, ending), Layout()


def plan(place: str | Path, layout: Layout | None = None, target: int = ALL) -> list[SourceRange]:
    return list(find_ranges(find_sources([str(place)]), layout or Layout(), target))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("error", [None, TimeoutError("too slow"), ConnectionCutError("reset by peer")], ids=repr)
def test_a_failing_storage_is_not_a_bad_file(
    ending: str, error: Any, odd: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Anything but a CorpusError, which would end the run; no document is lost in silence."""
    path, layout = some_file(tmp_path, ending)
    truth = every(path, layout)
    ranges = plan(odd, layout)
    assert documents(ranges, layout) == truth
    size = path.stat().st_size
    monkeypatch.setattr(Storage, "error", error)
    ends_in_marks = ending in ("arrow", "parquet")  # which need not be read when the footer or the rows have been
    for lost in (range(size), range(20, size - 1), *([] if ends_in_marks else [range(size - 1, size)])):
        monkeypatch.setattr(Storage, "lost", lost)
        with pytest.raises(type(error or OSError())) as caught:
            documents(ranges, layout)
        assert not isinstance(caught.value, CorpusError) and (error is None or caught.value is error)
    monkeypatch.setattr(Storage, "lost", range(0))
    assert documents(ranges, layout) == truth


@pytest.mark.parametrize("ending", ["parquet", "npy", "arrow"])
def test_a_storage_that_fails_when_planning(ending: str, odd: str, tmp_path: Path, monkeypatch: Any) -> None:
    path, layout = some_file(tmp_path, ending)
    monkeypatch.setattr(Storage, "lost", range(path.stat().st_size))
    for error in (None, ConnectionCutError("reset by peer")):
        monkeypatch.setattr(Storage, "error", error)
        with pytest.raises(type(error or OSError())) as caught:
            plan(odd, layout)
        assert not isinstance(caught.value, CorpusError)


def test_a_huge_row_group_is_read_in_parts(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = [random.Random(i).randbytes(8_000).hex() for i in range(4_000)]
    pq.write_table(pa.table({"text": text}), path, compression="none", use_dictionary=False, write_batch_size=16)
    assert pq.read_metadata(path).num_row_groups == 1 and path.stat().st_size > 60e6
    (source,) = find_ranges(find_sources([odd]), Layout(), ALL)
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        assert all(d.content == text[i] for i, d in enumerate(read_documents(source, Layout())))
        assert pool.max_memory() < 10e6 and max(Storage.reads) < 5e6
    finally:
        pa.set_memory_pool(usual)


def test_a_remote_arrow_file_is_read_once_in_all(odd: str, tmp_path: Path) -> None:
    """Batches have no index: a range of it would be read from the file's beginning, 40 of them 20 times the file."""
    path = tmp_path / "corpus.arrow"
    batch = pa.record_batch({"text": [random.Random(0).randbytes(5_000).hex() for _ in range(10)]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
        for _ in range(40):
            stream.write_batch(batch)
    assert len(plan(path, target=100_100)) == 40
    ranges = plan(odd, target=100_000)
    del Storage.reads[:]
    assert documents(ranges, Layout()) == every(path)
    assert sum(Storage.reads) < 1.5 * path.stat().st_size


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_storage_that_gives_little_at_a_time(ending: str, odd: str, tmp_path: Path, monkeypatch: Any) -> None:
    path, layout = some_file(tmp_path, ending)
    ranges = plan(odd, layout, 50)
    monkeypatch.setattr(Storage, "most", 7)
    assert documents(ranges, layout) == every(path, layout)


@pytest.mark.parametrize("place", ["", "odd://"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_changed_since_planning(ending: str, place: str, tmp_path: Path) -> None:
    path, layout = some_file(tmp_path, ending)
    ranges = plan(f"{place}{path}", layout)
    raw, then = path.read_bytes(), path.stat()
    same = (then.st_atime_ns, then.st_mtime_ns)
    path.write_bytes(raw + raw)
    os.utime(path, ns=same)
    with pytest.raises(CorpusError, match=rf"changed since.*expected {len(raw)} .*found {2 * len(raw)} .*new output"):
        documents(ranges, layout)
    path.write_bytes(raw)
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns + 1_000))
    with pytest.raises(CorpusError, match="changed since"):
        documents(ranges, layout)
    path.unlink()
    with pytest.raises(CorpusError, match="gone since"):
        documents(ranges, layout)
    path.write_bytes(raw)
    os.utime(path, ns=same)
    assert documents(ranges, layout) == every(path, layout)


def test_planning_asks_the_storage_little(odd: str, tmp_path: Path) -> None:
    """Of each Parquet file the footer, of one text and one JSON file the first bytes, and of no file its properties."""
    for i in range(50):
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / f"{i:02}.parquet")
        (tmp_path / f"{i:02}.txt").write_text("a\n\nb")
        (tmp_path / f"{i:02}.jsonl").write_bytes(json_lines(TEXTS))
    sources = find_sources([odd, f"{odd}/*.txt"])
    assert len(sources) == 150 and len(Storage.asked) < 10 and ("open", "00.txt") not in Storage.asked
    Storage.asked.clear()
    ranges = list(find_ranges(sources, Layout(), ALL))
    opened = Counter(name for what, name in Storage.asked if what == "open")
    files = [f"{i:02}.parquet" for i in range(50)]
    assert opened == Counter([*files, "00.parquet", "00.txt", "00.jsonl"])
    assert [name for what, name in Storage.asked if what == "info"] == ["00.jsonl", "00.txt"]
    assert [r.name for r in ranges] == sorted(path.name for path in tmp_path.iterdir())
    Storage.asked.clear()
    assert len(list(read_documents(ranges[0], Layout()))) == len(TEXTS)
    assert Storage.asked == [("open", "00.jsonl"), ("info", "00.jsonl")]


def test_ranges_come_one_at_a_time(odd: str, tmp_path: Path) -> None:
    for i in range(100):
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / f"{i:02}.parquet")
    ranges = find_ranges(find_sources([odd]), Layout(), ALL)
    Storage.asked.clear()
    assert next(ranges).name == "00.parquet"
    assert len(Storage.asked) < 40
    ranges.close()
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.write(b"a\n\n" * 30_000)
        file.truncate(1 << 40)
    first = list(take(find_ranges(find_sources([str(tmp_path / "*.txt")]), Layout(), 30), 25, Layout()))
    assert [r.max_docs for r in first] == [-1, -1, 4] and sum(r.weight for r in first) == 90


def test_only_the_first_file_of_a_kind_is_looked_into(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"good"), ("b.txt", b"caf\xe9"), ("c.jsonl", b'{"text": ""}'), ("d.jsonl", b"[]")):
        (tmp_path / name).write_bytes(content)
    ranges = plan(tmp_path)
    assert len(ranges) == 4
    for source, message in ((ranges[1], "not UTF-8"), (ranges[3], "expected a JSON object")):
        with pytest.raises(CorpusError, match=message):
            list(read_documents(source, Layout()))
    (tmp_path / "a.txt.gz").write_bytes(b"not compressed")  # another kind
    with pytest.raises(CorpusError, match=r"a\.txt\.gz"):
        plan(tmp_path)


def test_links_are_files(tmp_path: Path) -> None:
    """As the hub's cache holds them: what counts is the file, whose date is not the link's."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs/0").write_text("one\n\ntwo")
    os.utime(tmp_path / "blobs/0", (1, 1))
    (tmp_path / "snapshot/a.txt").symlink_to(tmp_path / "blobs/0")
    for place in ("snapshot", "snapshot/a.txt", "snapshot/*"):
        assert [d.content for d in every(tmp_path / place)] == ["one", "two"]
    (tmp_path / "blobs/0").unlink()
    with pytest.raises(CorpusError, match="cannot open the corpus"):
        every(tmp_path / "snapshot")


def test_a_linked_folder_is_no_file_and_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").write_text("one")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/b.txt").write_text("two")
    (tmp_path / "corpus/.hidden").symlink_to(tmp_path / "elsewhere")
    assert [d.content for d in every(tmp_path / "corpus")] == ["two"]
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match=r"corpus/linked is a link to a folder.* Name the folder itself"):
        every(tmp_path / "corpus")
    assert [d.content for d in every(tmp_path / "corpus/linked")] == ["one"]


def test_listings_and_files_may_spell_versions_differently() -> None:
    """Azure quotes the tag of a file and not of a listing; memory gives a number in one and a date in the other."""
    assert _version({"etag": "0x8D"}) == _version({"etag": '"0x8D"'}) == "0x8D"
    date = datetime(2030, 1, 2, tzinfo=UTC)
    assert _version({"created": date}) == _version({"created": date.timestamp()})
    assert _version({"ETag": "", "size": 3}) == ""


def test_a_version_on_google_is_that_of_the_content() -> None:
    """Its tag changes with permissions and labels, too; of S3's there is no other."""
    google = {"generation": "1700", "metageneration": "1", "crc32c": "R4JtVQ==", "md5Hash": "PC39GQ==", "etag": "CIGB="}
    for left_out in ((), ("md5Hash",), ("md5Hash", "crc32c")):
        info = {key: value for key, value in google.items() if key not in left_out}
        relabelled = info | {"metageneration": "2", "etag": "CIGC=", "mtime": datetime(2030, 1, 2, tzinfo=UTC)}
        written = info | {"generation": "1701", "crc32c": "x", "md5Hash": "y", "etag": "CIGD="}
        assert _version(info) == _version(relabelled) != _version(written)
    assert _version({"ETag": '"9b2c"', "LastModified": datetime(2030, 1, 2, tzinfo=UTC)}) == "9b2c"


# ---- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz", "parquet", "arrow"])
def test_samples_are_spread_over_the_corpus(ending: str, tmp_path: Path) -> None:
    texts = [f"document {i} " + "x" * random.Random(i).randrange(200) for i in range(2_000)]
    for name, part in (("a", texts[:500]), ("b", texts[500:])):
        path = tmp_path / f"{name}.{ending}"
        table = pa.table({"text": part})
        if ending == "parquet":
            pq.write_table(table, path, row_group_size=10)
        elif ending == "arrow":
            write_arrow(path, table, 10)
        elif ending == "txt":
            path.write_text("\n\n".join(part))
        else:
            path.write_bytes(compressed(json_lines(part), "gz") if ending.endswith("gz") else json_lines(part))
    sources, truth = find_sources([str(tmp_path)]), {d.id: d for d in every(tmp_path)}
    sample = list(sample_documents(sources, Layout(), 40))
    assert sample == list(sample_documents(sources, Layout(), 40))
    assert len({d.id for d in sample}) == len(sample) == 40 and all(truth[d.id] == d for d in sample)
    places = [list(truth).index(d.id) for d in sample]
    assert places == sorted(places) and sum(place < 500 for place in places) == pytest.approx(10, abs=1)
    if not ending.endswith("gz"):
        assert max(b - a for a, b in pairwise([0, *places, 2_000])) < 90


def test_samples_of_a_small_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(MESSY)
    (tmp_path / "b.txt").write_text("alone")
    np.save(tmp_path / "c.npy", np.arange(6).reshape(3, 2))
    truth = every(tmp_path)
    sample = list(sample_documents(find_sources([str(tmp_path)]), Layout(), 500))
    assert sample == truth
    assert {d.id for d in sample_documents(find_sources([str(tmp_path)]), Layout(unit="file"), 500)} >= {"b.txt:0"}
    many = tmp_path / "many"
    many.mkdir()
    for i in range(10):
        (many / f"{i}.txt").write_text("one document each, in whose middle none begins")
    assert len(list(sample_documents(find_sources([str(many)]), Layout(), 10))) == 10


# ---- windows and positions ---------------------------------------------------------------------------------------------


def test_windows_score_each_chosen_position_once() -> None:
    """2,000 random documents; ids are positions, so that a window shows what it holds."""
    rng = random.Random(0)
    sink = 10_000
    for _ in range(2_000):
        length, with_sink = rng.randint(0, 60), rng.random() < 0.7
        max_seq_len = rng.randint(2, 24)
        stride = rng.randint(0, max_seq_len - 2)
        chosen = sorted(rng.sample(range(length), rng.randint(0, length)))
        case = (length, max_seq_len, stride, with_sink, chosen)
        scored: list[int] = []
        for window in windows(5, list(range(length)), max_seq_len, stride, sink if with_sink else None, chosen):
            own = window.ids[window.sink :]
            assert window.document == 5 and 1 <= len(window.ids) <= max_seq_len, case
            assert window.ids[: window.sink] == [sink] * with_sink and sink not in own, case
            assert own == list(range(window.start, window.start + len(own))), case
            assert window.scored and min(window.scored) >= window.sink, case  # not the sink, and no window in vain
            for t in window.scored:
                position = window.ids[t]
                assert t - window.sink >= min(stride, position), case
                scored.append(position)
        assert scored == chosen, case


@pytest.mark.parametrize(
    ("spec", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4, 5]), ("last", [5]), ("0,5,-1", [0, 5]), ("9,2,-9,-2", [2, 4]), ("3", [3]),
        ("1:5:2", [1, 3]), ("::4", [0, 4]), ("-2:", [4, 5]), ("::-2", [1, 3, 5]), ("4:2", []), (" 1, 2", [1, 2]),
    ],
)  # fmt: skip
def test_positions(spec: str, chosen: list[int]) -> None:
    assert Positions(spec).choose(6) == chosen
    assert Positions(spec).choose(0) == []


@pytest.mark.parametrize("spec", ["", "first", "1.5", "1;2", "1:2:3:4", "::0", "a:b", "1,,2"])
def test_positions_that_are_none(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"positions must be all, last"):
        Positions(spec)
