"""Documents do not depend on how files are cut, and every chosen position is scored once."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs
from fisher_ray.corpus import CorpusError, Document, Layout, SourceRange, find_ranges, read_documents, take, windows
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
    return documents(find_ranges([str(path)], layout, target), layout)


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


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet", "arrow"])
def test_files_are_cut_into_many_ranges(ending: str, tmp_path: Path) -> None:
    """Otherwise the laws above would hold for nothing."""
    path = tmp_path / "a.txt" if ending == "txt" else write(tmp_path, ending)
    if ending == "txt":
        path.write_bytes(MESSY)
    ranges = find_ranges([str(path)], Layout(), 10)
    assert len(ranges) >= 5
    assert sum(source.weight for source in ranges) == pytest.approx(path.stat().st_size, rel=0.2)


def test_max_docs_takes_the_first_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(MESSY)
    write(tmp_path, "parquet")
    write(tmp_path, "jsonl.gz")
    truth = every(tmp_path)
    assert len(truth) == 5 + 2 * len(TEXTS)
    for target in (1, 7, ALL):
        ranges = find_ranges([str(tmp_path)], Layout(), target)
        for n in range(1, len(truth) + 3):
            assert documents(take(ranges, n, Layout()), Layout()) == truth[:n], (target, n)


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
    return [(d.id, d.content) for d in documents(find_ranges(corpus, Layout(), ALL), Layout())]


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


def test_an_unknown_ending_says_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(CorpusError, match=r"no known ending.*\.parquet"):
        names([str(tmp_path / "a.pdf")])


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
