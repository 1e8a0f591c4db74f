"""Documents from files, and windows from documents.

A corpus is files behind any fsspec URI: text (.txt, .md), JSON lines (.jsonl, .ndjson), each also .gz or .zst, Parquet,
Arrow files of a saved Hugging Face dataset, and token ids (.npy, or a column of integer lists). Files are cut into source
ranges from metadata alone: bytes of text and JSON lines, rows of the others, a compressed file whole. A document belongs
to the range in which it starts, and its id, file and row or byte offset, does not depend on how files are cut.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import posixpath
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate, groupby, islice, pairwise
from typing import Any, BinaryIO, Literal, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import glob_translate

from fisher_ray.storage import absolute, several

Unit = Literal["paragraph", "file"]

_FORMATS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet", ".arrow": "arrow", ".npy": "npy",
}  # fmt: skip
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_CHOOSE = "Choose of those (--column for the text or the token ids, --columns, --group-by, --encoder-column)."

_SNIFFED = 1 << 16
_ARROW_FILE = b"ARROW1"
_FOOTER = 1 << 16  # bytes at a Parquet file's end that hold most footers: one request a file
_SAMPLED = 1 << 20
_BUFFER = 1 << 20  # decoded bytes of Parquet held at a time, about
_MAX_BLOCK = 1 << 23
_MAX_ROWS = 1024

# Rows of a part of a file that is decoded together, and the bytes of the layout's columns in it.
_Group = tuple[int, int]


class CorpusError(ValueError):
    """Input that cannot be read as what it claims to be; the message names file, place and remedy."""


@dataclass(frozen=True)
class Layout:
    """How documents lie in files.

    Attributes:
        column: of Parquet, Arrow and JSON lines; strings, or lists of token ids.
        unit: what a document of a text file is: a paragraph (ended by blank lines) or the whole file.
        encoder_column: text of the encoder, for encoder-decoders.
        carried: columns that go along into the table of positions.
    """

    column: str = "text"
    unit: Unit = "paragraph"
    encoder_column: str | None = None
    carried: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys([self.column, *filter(None, [self.encoder_column]), *self.carried]))


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a corpus.

    Attributes:
        path: URI.
        name: what documents are named by: the path below the corpus's common folder.
        size: bytes.
        version: entity tag, digest or modification time, whatever the storage gives; empty where it gives none.
    """

    path: str
    name: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class SourceRange:
    """Part of one file: bytes [start, stop) or rows [start, stop).

    Attributes:
        path, name, size, version: of the :class:`Source`.
        start, stop: bytes of plain text and JSON lines, else rows; -1 is the end of a compressed file.
        weight: estimated bytes of it unpacked, the unit in which tasks are sized.
        max_docs: documents to take, or -1 for all.
    """

    path: str
    name: str
    start: int
    stop: int
    size: int
    version: str
    weight: int
    max_docs: int = -1


@dataclass(frozen=True)
class Document:
    """One document: text or ready token ids, with the columns carried along."""

    id: str
    content: str | list[int]
    encoder_text: str | None = None
    carried: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a document that go through the model together.

    Attributes:
        document: index of the document within its task.
        start: document position of the first token after the sink.
        ids: tokens, the sink first where there is one.
        sink: 1 with a sink, else 0.
        scored: window positions to score, none of them the sink.
        following: the document's next token, or None at its end.
    """

    document: int
    start: int
    ids: list[int]
    sink: int
    scored: list[int]
    following: int | None

    def position(self, t: int) -> int:
        """Document position of a window position; the sink, of which there may be one, has none."""
        return self.start + t - self.sink


def takes_in(uri: str, path: str) -> bool:
    """Whether a corpus of that URI, glob or folder has the file at ``path``, or would have it if there were one."""
    named = tuple(map(absolute, (uri, path)))
    # As they are named, and without links: a corpus may be a link to the folder that the output is in.
    for spelling in (named, tuple(each if "://" in each else os.path.realpath(each) for each in named)):
        taken, asked = (str(fs.unstrip_protocol(inner)) for fs, inner in map(fsspec.core.url_to_fs, spelling))
        if asked.startswith(f"{taken.rstrip('/')}/") or re.match(glob_translate(taken), asked) is not None:
            return True
    return False


def find_sources(corpus: Sequence[str]) -> list[Source]:
    """The files of a corpus in a fixed order, each once, by listing alone; empty ones are left out.

    Args:
        corpus: URIs, globs or folders.

    Raises:
        CorpusError: nothing found, an unknown ending, a place that cannot be listed, or nothing but empty files.
    """
    found: dict[str, dict[str, Any]] = {}
    for uri in corpus:
        for path, info in _expand(uri).items():
            found.setdefault(path, info)
    if not found:
        raise CorpusError(
            f"no files in {', '.join(corpus)}. Expected {', '.join(_FORMATS)}, text and jsonl also .gz or .zst."
        )
    for path, info in found.items():
        if info["size"] is None:
            raise CorpusError(f"the storage does not tell how large {path} is. Copy the corpus to another place.")
    root = "/".join(posixpath.commonprefix([posixpath.dirname(path).split("/") for path in found]))
    sources = [
        Source(path, path[len(root) :].lstrip("/"), int(info["size"]), _version(info))
        for path, info in found.items()
        if info["size"]
    ]
    if not sources:
        raise CorpusError(
            f"the corpus {', '.join(corpus)} is empty: no byte in {len(found)} file{'s' * (len(found) > 1)}."
        )
    return sources


def find_ranges(sources: Sequence[Source], layout: Layout, target: int) -> Iterator[SourceRange]:
    """All source ranges of a corpus in a fixed order, each of about ``target`` bytes, one at a time.

    The first file of each kind is looked into before anything else. Apart from that, text and JSON lines are not opened;
    of Parquet the footer is read and of .npy the header, some files ahead of the caller. Arrow streams have no footer:
    local ones are mapped and their columns left alone, remote ones are streamed here, and are one range each.

    Args:
        sources: what :func:`find_sources` found.
        layout: how documents lie in the files.
        target: bytes wanted a range; rows are cut to weigh as much, by the uncompressed bytes of the layout's columns.

    Raises:
        CorpusError: a missing column, a file that is not what its ending says, or not a single row.
        Exception: whatever the storage raises where it fails.
    """
    looked: set[tuple[str, str | None]] = set()
    for source in sources:
        if _format(source.path) not in looked:
            looked.add(_format(source.path))
            _look(source, layout)
    empty = True
    found = several(lambda source: _groups(source, layout), sources)
    for source, groups in zip(sources, found, strict=True):
        for part in _cut_bytes(source, layout, target) if groups is None else _cut_rows(source, groups, target):
            empty = False
            yield part
    if empty:
        raise CorpusError(f"the corpus is empty: {len(sources)} files without a single row.")


def take(ranges: Iterable[SourceRange], max_docs: int, layout: Layout) -> Iterator[SourceRange]:
    """The ranges of the first ``max_docs`` documents; one streaming pass over them."""
    left = max_docs
    for source in ranges:
        count = sum(1 for _ in islice(read_documents(source, layout), left))
        if count == left:
            yield replace(source, max_docs=count)
            return
        left -= count
        yield source


def sample_documents(sources: Sequence[Source], layout: Layout, n: int) -> Iterator[Document]:
    """Up to ``n`` different documents, the same ones every time, from places spread evenly over a corpus's bytes.

    For estimates: little is read for each, about its own bytes of text and 1 MiB of Parquet. So compressed files and row
    groups are seen at their beginnings only, and with ``unit="file"`` a paragraph stands for its file.
    """
    layout = replace(layout, unit="paragraph")
    ends = list(accumulate(source.size for source in sources))
    places = [ends[-1] * (2 * i + 1) // (2 * n) for i in range(n)]
    for index, inside in groupby(places, lambda place: bisect_right(ends, place)):
        source = sources[index]
        yield from _sample(source, layout, [place - ends[index] + source.size for place in inside])


def read_documents(source: SourceRange, layout: Layout) -> Iterator[Document]:
    """The documents that start in a range, in order.

    Raises:
        CorpusError: invalid UTF-8, a binary file, a broken line, a missing column, a value of another type, or a file
            that is gone or has changed since planning.
        Exception: whatever the storage raises where it fails, and OSError where it gives less than the whole file. Worth
            another try.
    """
    rows = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow, "npy": _npy}[_format(source.path)[0]]
    # What comes after the last one wanted is not looked at.
    yield from islice(rows(source, layout), None if source.max_docs < 0 else source.max_docs)


def windows(
    document: int, ids: Sequence[int], max_seq_len: int, stride: int, sink: int | None, chosen: Sequence[int]
) -> Iterator[Window]:
    """Windows that score each chosen document position once.

    Every window starts with the sink. It overlaps the one before by ``stride`` tokens, so that every token has at least
    that many before it, or all that the document has.

    Args:
        document: index to name the windows by.
        ids: the document's tokens.
        max_seq_len: tokens a window, sink included.
        stride: tokens of overlap, below the window's own tokens.
        sink: token put first, or None.
        chosen: document positions to score, ascending.
    """
    room = max_seq_len - (sink is not None)
    prefix = [] if sink is None else [sink]
    wanted = set(chosen)
    start = first_new = 0
    while first_new < len(ids):
        stop = min(start + room, len(ids))
        scored = [t - start + len(prefix) for t in range(first_new, stop) if t in wanted]
        if scored:
            following = ids[stop] if stop < len(ids) else None
            yield Window(document, start, [*prefix, *ids[start:stop]], len(prefix), scored, following)
        first_new, start = stop, stop - stride


# ---- files ---------------------------------------------------------------------------------------------------------


def _expand(uri: str) -> dict[str, dict[str, Any]]:
    """What the storage says of each file that a URI means."""
    try:
        fs, path = fsspec.core.url_to_fs(absolute(uri))
        info = fs.info(path) if fs.exists(path) else None
        if info is None and not any(c in path for c in "*?["):
            raise CorpusError(
                f"corpus not found: {uri}. Expected a file, a folder or a glob; quote globs in the shell."
            )
        if info is not None and info["type"] != "directory" and (_known(path) or not fs.isdir(path)):
            _format(path)
            return {_named(fs, path): info}
        listed = fs.glob(path, detail=True) if info is None else fs.find(path, detail=True)
        found = {}
        below = path.rstrip("/") if info is not None else None
        for name, info in sorted(listed.items()):
            if below is not None and info.get("islink") and not _hidden(name, below) and fs.isdir(name):
                raise CorpusError(
                    f"{name} is a link to a folder, and links are followed to files only. Name the folder itself beside "
                    f"{uri}, or take the link away."
                )
            if not _wanted(name, below):
                continue
            if info.get("islink") or info.get("size") is None:  # the listing describes the link, or nothing at all
                info = fs.info(name)
            if info["type"] != "directory":
                found[_named(fs, name)] = info
        fs.invalidate_cache()  # listings are large, and would hide changes from the checks when reading
        return found
    except CorpusError:
        raise
    except Exception as error:  # storage has exceptions of its own: no credentials, no such endpoint
        raise CorpusError(f"cannot open the corpus {uri}: {_one_line(error)}") from error


def _named(fs: Any, path: str) -> str:
    """A file's URI."""
    uri = str(fs.unstrip_protocol(path))
    if "::" in uri:
        raise CorpusError(f"{path} has '::' in its name, which means a chain of file systems. Rename it.")
    try:
        uri.encode()
    except UnicodeEncodeError:
        shown = path.encode(errors="replace").decode()
        raise CorpusError(f"{shown} has bytes in its name that are not UTF-8. Rename it.") from None
    return uri


def _version(info: dict[str, Any]) -> str:
    """What changes when a file does, spelled alike whether it comes from a listing or from the file itself."""
    # Google's "etag" is another one with its metadata too; an object in parts has no MD5 there.
    google = ("md5Hash", "crc32c", "generation")
    for key in ("ETag", *google, "etag", "blob_id", "mtime", "LastModified", "last_modified", "created"):
        if value := info.get(key):
            return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
    return ""


def _known(path: str) -> bool:
    stem, suffix = posixpath.splitext(path.lower())
    if suffix in _CODECS:
        return _FORMATS.get(posixpath.splitext(stem)[1]) in ("text", "jsonl")
    return suffix in _FORMATS


def _wanted(path: str, folder: str | None) -> bool:
    """Whether a file found in a folder, or by a glob, is part of the corpus: hidden ones and datasets' caches are not."""
    name = posixpath.basename(path)
    cached = name.startswith("cache-") and name.endswith(".arrow")
    return _known(path) and not cached and not _hidden(path, folder)


def _hidden(path: str, folder: str | None) -> bool:
    parts = [posixpath.basename(path)] if folder is None else path.removeprefix(folder).split("/")
    return any(part.startswith(".") for part in parts)


def _format(path: str) -> tuple[str, str | None]:
    """(format, codec) by the file's endings."""
    if not _known(path):
        raise CorpusError(
            f"{path} has no known ending. Expected {', '.join(_FORMATS)}; text and jsonl may also end in .gz or .zst."
        )
    stem, suffix = posixpath.splitext(path.lower())
    if suffix in _CODECS:
        return _FORMATS[posixpath.splitext(stem)[1]], _CODECS[suffix]
    return _FORMATS[suffix], None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _File(io.RawIOBase):
    """A file as it was planned: refuses another version, and a read that ends before the file does.

    ``failure`` is what the storage raised. Decoders raise OSError for bad content as well, so this tells one from the other.
    """

    def __init__(self, source: Source | SourceRange) -> None:
        self._source = source
        self._file: Any = None
        self.failure: Exception | None = None
        fs, inner = fsspec.core.url_to_fs(source.path)
        try:
            self._file = fs.open(inner, "rb", cache_type="none")  # read-ahead of 50 MiB is for files read whole
            buffered = isinstance(self._file, AbstractBufferedFile)  # has asked the storage already
            info = self._file.details if buffered else fs.info(inner)
        except FileNotFoundError as error:
            raise _gone(source) from error
        size, version = int(info["size"]), _version(info)
        if (size, version) != (source.size, source.version):
            raise CorpusError(
                f"{source.path} has changed since the run was planned: expected {source.size} bytes of version "
                f"{source.version}, found {size} of {version}. Put the file back, or plan again in a new output directory."
            )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        wanted, done = max(0, min(len(buffer), self._source.size - self.tell())), 0
        try:
            while done < wanted:
                data = self._file.read(wanted - done)
                if not data:
                    raise OSError(f"{self._source.path}: nothing came after byte {self.tell()} of {self._source.size}.")
                buffer[done : done + len(data)] = data
                done += len(data)
        except Exception as error:
            self.failure = error
            raise
        return done

    def close(self) -> None:
        if self._file is not None and not self.closed:
            self._file.close()
        super().close()


def _gone(source: Source | SourceRange) -> CorpusError:
    return CorpusError(
        f"{source.path} is gone since the run was planned. Put it back, or plan again in a new output directory."
    )


@contextmanager
def _decoding(source: Source | SourceRange, file: _File | None = None) -> Iterator[None]:
    """Makes what decoders raise a CorpusError; what the storage raised stays what it is, since it is worth another try."""
    try:
        yield
    except CorpusError:
        raise
    except (OSError, ValueError, OverflowError, EOFError, pa.ArrowException) as error:
        if file is not None and file.failure is not None:
            raise file.failure from None
        raise CorpusError(
            f"{source.path} cannot be read as {_format(source.path)[0]}: {_one_line(error)}. Is the file complete?"
        ) from error


@contextmanager
def _opened(source: Source | SourceRange) -> Iterator[_File]:
    with _File(source) as file, _decoding(source, file):
        yield file


def _bytes(source: Source, start: int, stop: int) -> bytes:
    """A few bytes in one request."""
    fs, inner = fsspec.core.url_to_fs(source.path)
    try:
        data = fs.cat_file(inner, start=start, end=stop)
    except FileNotFoundError as error:
        raise _gone(source) from error
    if len(data) != stop - start:
        raise OSError(f"{source.path}: asked for bytes {start} to {stop}, got {len(data)}; was the connection cut?")
    return bytes(data)


def is_seen(sources: Sequence[Source]) -> bool:
    """Whether any of some files is where it was; of none, True."""
    found = (fs.exists(inner) for fs, inner in (fsspec.core.url_to_fs(source.path) for source in sources))
    return not sources or any(found)


# ---- cutting -----------------------------------------------------------------------------------------------------------


def _look(source: Source, layout: Layout) -> None:
    """Refuse a file whose beginning is not what its ending claims, before anything is computed."""
    kind, codec = _format(source.path)
    if layout.encoder_column is not None and kind in ("text", "npy"):
        raise CorpusError(
            f"{source.path} has no columns, and the encoder's text is to be in {layout.encoder_column!r}. Give JSON lines, "
            "Parquet or a saved dataset."
        )
    _check_carried(source, layout)
    if kind == "arrow":
        with _batches(source) as reader:
            _check_columns(reader.schema, layout, source.path)
    elif kind not in ("text", "jsonl"):
        _groups(source, layout)
    else:
        with _opened(source) as file:
            head = _stream(file, codec, _SNIFFED).read(_SNIFFED)
        text = _decode(head[: head.rfind(b"\n") + 1] if len(head) == _SNIFFED else head, source.path, 0)
        if kind == "jsonl":
            _look_at_rows(text.encode().split(b"\n"), source.path, layout)


def _look_at_rows(lines: Sequence[bytes], path: str, layout: Layout) -> None:
    """Refuse JSON lines of which the first is none, or that all lack a column."""
    offset, row, lacking = 0, None, list(layout.carried)
    for line in lines:
        if line.strip():
            row = _json_row(line, path, offset, layout)
            lacking = [column for column in lacking if column not in row]
            if not lacking:
                return
        offset += len(line) + 1
    if row is not None:
        raise CorpusError(f"{path}: no column {lacking[0]!r}; its last row has {', '.join(row)}. {_CHOOSE}")


def _groups(source: Source, layout: Layout) -> list[_Group] | None:
    """The row groups of a file, or batches; None for text, which is not opened."""
    kind, _ = _format(source.path)
    if kind in ("text", "jsonl"):
        return None
    if kind == "parquet":
        footer = _footer(source)
        with _decoding(source):
            _check_columns(footer.schema.to_arrow_schema(), layout, source.path)
        return _row_groups(footer, layout)
    if kind == "arrow":
        with _batches(source) as reader:
            _check_columns(reader.schema, layout, source.path)
            return [(batch.num_rows, batch.select(layout.columns).nbytes) for batch in reader]
    head = io.BytesIO(_bytes(source, 0, min(source.size, _FOOTER)))
    with _decoding(source):
        rows, columns, dtype = _npy_header(head, source.path)
    if head.tell() + rows * columns * dtype.itemsize > source.size:
        raise CorpusError(
            f"{source.path} must hold {rows} rows of {columns} numbers as its header says, and has {source.size} bytes. Is the "
            "file complete?"
        )
    return [(rows, rows * columns * dtype.itemsize)]


def _footer(source: Source) -> pq.FileMetaData:
    tail = _bytes(source, max(0, source.size - _FOOTER), source.size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < length <= source.size:
        tail = _bytes(source, source.size - length, source.size)
    with _decoding(source):
        return pq.read_metadata(pa.BufferReader(tail))


def _row_groups(footer: pq.FileMetaData, layout: Layout) -> list[_Group]:
    paths = [footer.schema.column(i).path for i in range(footer.num_columns)]
    # A list's values are the column "ids.list.element".
    chosen = [i for i, path in enumerate(paths) if any(f"{path}.".startswith(f"{name}.") for name in layout.columns)]
    groups = []
    for group in map(footer.row_group, range(footer.num_row_groups)):
        size = sum(group.column(i).total_uncompressed_size for i in chosen)
        groups.append((group.num_rows, max(size, group.num_rows)))  # values that repeat take bits each
    return groups


def _cut_bytes(source: Source, layout: Layout, target: int) -> Iterator[SourceRange]:
    path, name, size, version = source.path, source.name, source.size, source.version
    kind, codec = _format(path)
    if codec:
        yield SourceRange(path, name, 0, -1, size, version, 4 * size)  # text shrinks to about a quarter
    elif kind == "text" and layout.unit == "file":
        yield SourceRange(path, name, 0, size, size, version, size)
    else:
        for start in range(0, size, target):
            stop = min(start + target, size)
            yield SourceRange(path, name, start, stop, size, version, stop - start)


def _cut_rows(source: Source, groups: Iterable[_Group], target: int) -> Iterator[SourceRange]:
    """Whole groups together up to the target, a larger one in even parts, so that a range decodes no group in vain.

    Of a remote Arrow file all together: whoever reads rows of it reads those before them too.
    """
    if _format(source.path)[0] == "arrow" and not _is_local(source):
        target = sys.maxsize

    def part(start: int, stop: int, weight: int) -> SourceRange:
        return SourceRange(source.path, source.name, start, stop, source.size, source.version, weight)

    start = stop = weight = 0
    for rows, size in groups:
        if start < stop and weight + size > target:
            yield part(start, stop, weight)
            start, weight = stop, 0
        first, stop, weight = stop, stop + rows, weight + size
        if (parts := min(rows, -(-size // target))) > 1:
            cuts = [first + rows * i // parts for i in range(parts + 1)]
            for low, high in pairwise(cuts):
                yield part(low, high, size * (high - low) // rows)
            start, weight = stop, 0
    if start < stop:
        yield part(start, stop, weight)


def _sample(source: Source, layout: Layout, offsets: list[int]) -> Iterator[Document]:
    """A document for each offset in a file, or fewer where they would be the same."""
    _check_carried(source, layout)
    kind, codec = _format(source.path)
    whole = SourceRange(source.path, source.name, 0, -1, source.size, source.version, source.size)
    if codec:
        yield from islice(read_documents(whole, layout), len(offsets))
    elif kind in ("text", "jsonl"):
        seen = set()
        for offset in offsets:
            for start in (offset, 0):  # where none starts beyond the offset, the file's first
                part = replace(whole, start=start, stop=min(start + _SAMPLED, source.size))
                document = next(read_documents(part, layout), None)
                if document is not None:
                    break
            if document is not None and document.id not in seen:
                seen.add(document.id)
                yield document
    else:
        starts = [0, *accumulate(rows for rows, _ in _groups(source, layout) or ())]
        rows = [starts[-1] * offset // source.size for offset in offsets]
        for group, hits in groupby(bisect_right(starts, row) - 1 for row in rows if row < starts[-1]):
            stop = min(starts[group] + len(list(hits)), starts[group + 1])
            yield from read_documents(replace(whole, start=starts[group], stop=stop), layout)


def _check_carried(source: Source, layout: Layout) -> None:
    if layout.carried and _format(source.path)[0] in ("text", "npy"):
        raise CorpusError(
            f"{source.path} has no columns, and {layout.carried[0]!r} is to be one (--columns, --group-by). Give JSON lines, "
            "Parquet or a saved dataset."
        )


def _check_columns(schema: pa.Schema, layout: Layout, path: str) -> None:
    for column in layout.columns:
        if column not in schema.names:
            raise CorpusError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}. {_CHOOSE}")
        if schema.names.count(column) > 1:
            raise CorpusError(f"{path} has several columns {column!r}; expected one. Rename or drop the others.")
    kind = schema.field(layout.column).type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)
    if not is_text and not (listed and pa.types.is_integer(kind.value_type)):
        raise CorpusError(f"column {layout.column!r} of {path} must hold strings or lists of token ids, got {kind}.")


# ---- rows of each format ---------------------------------------------------------------------------------------------


def _block(source: SourceRange) -> int:
    """Bytes a request: a range is read in one where it is not large, with the end of its last document."""
    span = (source.size if source.stop == -1 else source.stop) - source.start
    return min(span + _SNIFFED, _MAX_BLOCK)


def _stream(file: _File, codec: str | None, block: int) -> BinaryIO:
    plain = io.BufferedReader(file, block)
    if codec is None:
        return plain
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(plain, mode="r"), codec)))


def _lines(source: SourceRange) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from the first line that starts at or after the range's start, without end."""
    _, codec = _format(source.path)
    with _opened(source) as file, _stream(file, codec, _block(source)) as stream:
        offset = 0
        if source.start > 0:
            stream.seek(source.start - 1)
            offset = source.start - 1 + len(stream.readline())
        while line := stream.readline():
            yield offset, line if offset > 0 else line.removeprefix(codecs.BOM_UTF8)
            offset += len(line)


def _ended(source: SourceRange, offset: int) -> bool:
    return source.stop != -1 and offset >= source.stop


def _text(source: SourceRange, layout: Layout) -> Iterator[Document]:
    if layout.unit == "file":
        raw = b"".join(line for _, line in _lines(source))
        yield Document(f"{source.name}:0", _decode(raw, source.path, 0))
        return
    # A paragraph belongs to the range in which the blank line before it starts; the first one to the file's start.
    paragraph: list[bytes] = []
    begun, blank = 0, 0 if source.start == 0 else -1
    for offset, line in _lines(source):
        if line.strip():
            if not paragraph:
                if blank == -1:  # the rest of a paragraph that began in an earlier range
                    if _ended(source, offset):
                        return
                    continue
                begun = offset
            paragraph.append(line)
            continue
        if paragraph:
            yield _paragraph(source, begun, paragraph)
            paragraph = []
        blank = offset
        if _ended(source, blank):
            return
    if paragraph:
        yield _paragraph(source, begun, paragraph)


def _paragraph(source: SourceRange, begun: int, lines: list[bytes]) -> Document:
    text = _decode(b"".join(lines), source.path, begun).rstrip("\r\n")
    return Document(f"{source.name}:{begun}", text)


def _jsonl(source: SourceRange, layout: Layout) -> Iterator[Document]:
    for offset, line in _lines(source):
        if _ended(source, offset):
            return
        if line.strip():
            yield _document(f"{source.name}:{offset}", _json_row(line, source.path, offset, layout), layout)


def _json_row(line: bytes, path: str, offset: int, layout: Layout) -> dict[str, Any]:
    text = _decode(line, path, offset)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise CorpusError(f"{path}, byte {offset}: not a JSON object ({reason}). Expected one a line.") from error
    if not isinstance(row, dict):
        raise CorpusError(f"{path}, byte {offset}: expected a JSON object, got {type(row).__name__}.")
    for column in filter(None, (layout.column, layout.encoder_column)):
        if column not in row:
            raise CorpusError(f"{path}, byte {offset}: no column {column!r}; it has {', '.join(row)}. {_CHOOSE}")
    return row


def _parquet(source: SourceRange, layout: Layout) -> Iterator[Document]:
    with _opened(source) as file:
        # Without these two, whole column chunks are held at a time.
        parquet = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
        groups = _row_groups(parquet.metadata, layout)
        starts = [0, *accumulate(rows for rows, _ in groups)]
        touched = [i for i in range(len(groups)) if starts[i] < source.stop and starts[i + 1] > source.start]
        rows, size = (sum(groups[i][k] for i in touched) for k in (0, 1))
        batch_size = max(1, min(_MAX_ROWS, rows * _BUFFER // max(size, 1)))
        first = starts[touched[0]]
        for batch in parquet.iter_batches(batch_size, touched, layout.columns, use_threads=False):
            yield from _rows(batch, first, source, layout)
            first += batch.num_rows
            if first >= source.stop:
                return


def _is_local(source: Source | SourceRange) -> bool:
    return isinstance(fsspec.core.url_to_fs(source.path)[0], LocalFileSystem)


@contextmanager
def _batches(source: Source | SourceRange) -> Iterator[pa.RecordBatchReader]:
    """The record batches of an Arrow stream or file; a local one is mapped, so that what is not looked at is not read."""
    _, inner = fsspec.core.url_to_fs(source.path)
    with (
        _opened(source) as file,
        pa.memory_map(inner) if _is_local(source) else io.BufferedReader(file, _MAX_BLOCK) as stream,
    ):
        magic = stream.read(len(_ARROW_FILE))
        stream.seek(0)
        if magic == _ARROW_FILE:
            reader = pa.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield pa.RecordBatchReader.from_batches(reader.schema, batches)
        else:
            yield pa.ipc.open_stream(stream)


def _arrow(source: SourceRange, layout: Layout) -> Iterator[Document]:
    with _batches(source) as reader:
        first = 0
        for batch in reader:
            yield from _rows(batch.select(layout.columns), first, source, layout)
            first += batch.num_rows
            if first >= source.stop:
                return


def _rows(batch: pa.RecordBatch, first: int, source: SourceRange, layout: Layout) -> Iterator[Document]:
    """Those of a batch's rows that are in the range; ``first`` is the file's row that the batch starts with."""
    low, high = max(source.start, first), min(source.stop, first + batch.num_rows)
    if low < high:
        for i, row in enumerate(batch.slice(low - first, high - low).to_pylist()):
            yield _document(f"{source.name}:{low + i}", row, layout)


def _npy_header(file: Any, path: str) -> tuple[int, int, np.dtype]:
    """(rows, columns, type) of an array of token ids; the file then stands at its first number."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read_header(file)
    if len(shape) != 2 or min(shape) < 0 or dtype.kind not in "iu":
        raise CorpusError(f"{path} must hold integer token ids [documents, tokens], got {dtype} of shape {shape}.")
    if by_columns:
        raise CorpusError(f"{path} holds its columns one after another. Save it with numpy.ascontiguousarray.")
    return shape[0], shape[1], dtype


def _npy(source: SourceRange, layout: Layout) -> Iterator[Document]:
    with _opened(source) as file, io.BufferedReader(file, _SNIFFED) as stream:
        _, columns, dtype = _npy_header(stream, source.path)
        row_bytes = columns * dtype.itemsize
        stream.seek(source.start * row_bytes, io.SEEK_CUR)
        for row in range(source.start, source.stop):
            raw = stream.read(row_bytes)
            if len(raw) < row_bytes:
                raise CorpusError(f"{source.path} ends within row {row}. Is the file complete?")
            ids = np.frombuffer(raw, dtype).tolist()
            yield Document(f"{source.name}:{row}", ids)


def _document(name: str, row: dict[str, Any], layout: Layout) -> Document:
    content = row[layout.column]
    if content is None:
        content = ""
    kinds = {type(i).__name__ for i in content} - {"int"} if isinstance(content, list) else set()
    if not isinstance(content, str | list) or kinds:
        got = f"a list with {min(kinds)}" if kinds else type(content).__name__
        raise CorpusError(f"{name}: column {layout.column!r} must hold text or a list of token ids, got {got}.")
    # What is carried along need not be known of all.
    carried = [(column, row.get(column)) for column in layout.carried]
    for column, value in ((layout.column, content), *carried):
        if isinstance(value, str):
            _check_unicode(name, column, value)
    for column, value in carried:
        if isinstance(value, str) and "\0" in value:  # NumPy ends a group's name at it
            raise CorpusError(f"{name}: character {value.index(chr(0))} of column {column!r} is a zero byte, not text.")
    encoder_text = None
    if layout.encoder_column is not None:
        encoder_text = row[layout.encoder_column]
        if not isinstance(encoder_text, str):
            raise CorpusError(
                f"{name}: column {layout.encoder_column!r} must hold text, got {type(encoder_text).__name__}."
            )
        _check_unicode(name, layout.encoder_column, encoder_text)
    return Document(name, content, encoder_text, tuple(None if v is None else str(v) for _, v in carried))


def _check_unicode(name: str, column: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{name}: character {error.start} of column {column!r} is half of a surrogate pair, not text."
        ) from error


def _decode(raw: bytes, path: str, offset: int) -> str:
    if offset == 0:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    if b"\0" in raw:
        raise CorpusError(f"{path} is a binary file: a zero byte at {offset + raw.index(0)}. Expected UTF-8 text.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}. Convert the file, e.g. with iconv."
        ) from error
