"""Documents from files, and windows from documents.

A corpus is files behind any fsspec URI: text (.txt, .md), JSON lines (.jsonl, .ndjson), each also .gz or .zst, Parquet,
Arrow files of a saved Hugging Face dataset, and token ids (.npy, or a column of integer lists). Files are cut into source
ranges from metadata alone: bytes of text and JSON lines, rows of the others, a compressed file whole. A document belongs
to the range in which it starts, and its id, file and row or byte offset, does not depend on how files are cut.
"""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Unit = Literal["paragraph", "file"]

_FORMATS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet", ".arrow": "arrow", ".npy": "npy",
}  # fmt: skip
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_SNIFFED = 1 << 20


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


@dataclass(frozen=True)
class SourceRange:
    """Part of one file: bytes [start, stop) or rows [start, stop).

    Attributes:
        path: URI.
        name: what documents are named by: the path below the corpus's common folder.
        start, stop: bytes of plain text and JSON lines, else rows; -1 is the end of a compressed file.
        size: bytes of the whole file.
        version: etag or modification time, whatever the storage gives.
        weight: bytes that reading and computing are expected to cost by.
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


def find_ranges(corpus: Sequence[str], layout: Layout, target: int) -> list[SourceRange]:
    """All source ranges of a corpus in a fixed order, each of about ``target`` bytes.

    Args:
        corpus: URIs, globs or folders.
        layout: how documents lie in the files.
        target: bytes wanted a range; rows are cut to weigh as much.

    Raises:
        CorpusError: nothing found, an unknown format, a missing column, or text that is not UTF-8.
    """
    paths: list[str] = []
    for uri in corpus:
        paths.extend(_expand(uri))
    if not paths:
        raise CorpusError(
            f"no files in {', '.join(corpus)}. Expected {', '.join(_FORMATS)}, text and jsonl also .gz or .zst."
        )
    folders = [posixpath.dirname(path).split("/") for path in paths]
    root = "/".join(posixpath.commonprefix(folders))
    ranges: list[SourceRange] = []
    for path in dict.fromkeys(paths):
        ranges.extend(_split(path, path[len(root) :].lstrip("/"), layout, target))
    if not ranges:
        raise CorpusError(f"the corpus {', '.join(corpus)} is empty: {len(paths)} files without a single byte or row.")
    return ranges


def take(ranges: Iterable[SourceRange], max_docs: int, layout: Layout) -> list[SourceRange]:
    """The ranges of the first ``max_docs`` documents; one streaming pass over them."""
    taken: list[SourceRange] = []
    left = max_docs
    for source in ranges:
        count = 0
        for _ in read_documents(source, layout):
            count += 1
            if count == left:
                return [*taken, replace(source, max_docs=count)]
        left -= count
        taken.append(source)
    return taken


def read_documents(source: SourceRange, layout: Layout) -> Iterator[Document]:
    """The documents that start in a range, in order.

    Raises:
        CorpusError: invalid UTF-8, a binary file, a broken line, a missing column, or a value of another type.
    """
    kind, codec = _format(source.path)
    rows = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow, "npy": _npy}[kind]
    for count, document in enumerate(rows(source, layout, codec)):
        if count == source.max_docs:
            return
        yield document


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


def _expand(uri: str) -> list[str]:
    try:
        fs, path = fsspec.core.url_to_fs(uri)
        if fs.isdir(path):
            found = sorted(p for p in fs.find(path) if _wanted(p))
        elif fs.isfile(path):
            _format(path)
            found = [path]
        elif any(c in path for c in "*?["):
            found = sorted(p for p in fs.glob(path) if fs.isfile(p) and _wanted(p))
        else:
            raise CorpusError(
                f"corpus not found: {uri}. Expected a file, a folder or a glob; quote globs in the shell."
            )
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"cannot open the corpus {uri}: {error}") from error
    return [fs.unstrip_protocol(p) for p in found]


def _known(path: str) -> bool:
    stem, suffix = posixpath.splitext(path)
    if suffix in _CODECS:
        return _FORMATS.get(posixpath.splitext(stem)[1]) in ("text", "jsonl")
    return suffix in _FORMATS


def _wanted(path: str) -> bool:
    """Whether a file found in a folder is part of the corpus: hidden ones and datasets' caches are not."""
    return _known(path) and not posixpath.basename(path).startswith(("cache-", "."))


def _format(path: str) -> tuple[str, str | None]:
    """(format, codec) by the file's endings."""
    if not _known(path):
        raise CorpusError(
            f"{path} has no known ending. Expected {', '.join(_FORMATS)}; text and jsonl may also end in .gz or .zst."
        )
    stem, suffix = posixpath.splitext(path)
    if suffix in _CODECS:
        return _FORMATS[posixpath.splitext(stem)[1]], _CODECS[suffix]
    return _FORMATS[suffix], None


def _open(path: str) -> BinaryIO:
    fs, inner = fsspec.core.url_to_fs(path)
    return cast(BinaryIO, fs.open(inner, "rb"))


def _split(path: str, name: str, layout: Layout, target: int) -> Iterator[SourceRange]:
    """Ranges of one file, after a look at what metadata and its first bytes say."""
    kind, codec = _format(path)
    fs, inner = fsspec.core.url_to_fs(path)
    info = fs.info(inner)
    size = int(info["size"])
    version = str(
        info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or info.get("created")
    )
    if size == 0:
        return
    whole = SourceRange(path, name, 0, -1, size, version, size)
    if kind in ("text", "jsonl"):
        _sniff(whole, layout, kind, codec)
        if codec:
            yield replace(whole, weight=4 * size)  # text shrinks to about a quarter
        elif kind == "text" and layout.unit == "file":
            yield replace(whole, stop=size)
        else:
            for start in range(0, size, target):
                stop = min(start + target, size)
                yield replace(whole, start=start, stop=stop, weight=stop - start)
        return
    try:
        rows = _count_rows(path, kind, layout)
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{path} cannot be read as {kind}: {error}. Is the file complete?") from error
    step = max(1, rows * target // max(size, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield replace(whole, start=start, stop=stop, weight=size * (stop - start) // rows)


def _sniff(source: SourceRange, layout: Layout, kind: str, codec: str | None) -> None:
    """Refuse a file whose beginning is not what its ending claims, before anything is computed."""
    try:
        head = _stream(source.path, codec).read(_SNIFFED)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorpusError(f"{source.path} cannot be decompressed: {error}") from error
    text = _decode(head[: head.rfind(b"\n") + 1] if len(head) == _SNIFFED else head, source.path, 0)
    if kind == "jsonl" and (first := next((line for line in text.split("\n") if line.strip()), None)):
        _json_row(first.encode(), source.path, 0, layout)


def _count_rows(path: str, kind: str, layout: Layout) -> int:
    with _open(path) as file:
        if kind == "parquet":
            parquet = pq.ParquetFile(file)
            _check_columns(parquet.schema_arrow, layout, path)
            return int(parquet.metadata.num_rows)
        if kind == "arrow":
            reader = pa.ipc.open_stream(file)
            _check_columns(reader.schema, layout, path)
            return sum(batch.num_rows for batch in reader)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if len(shape) != 2 or dtype.kind not in "iu":
            raise CorpusError(f"{path} must hold integer token ids [documents, tokens], got {dtype} of shape {shape}.")
        return int(shape[0])


def _check_columns(schema: pa.Schema, layout: Layout, path: str) -> None:
    for column in layout.columns:
        if column not in schema.names:
            raise CorpusError(
                f"{path} has no column {column!r}; it has {', '.join(schema.names)}. Choose one (--column)."
            )
    kind = schema.field(layout.column).type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)) and not (
        listed and pa.types.is_integer(kind.value_type)
    ):
        raise CorpusError(f"column {layout.column!r} of {path} must hold strings or lists of token ids, got {kind}.")


# ---- rows of each format ---------------------------------------------------------------------------------------------


def _stream(path: str, codec: str | None) -> BinaryIO:
    file = _open(path)
    if codec is None:
        return file
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)))


def _lines(source: SourceRange, codec: str | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) from the first line that starts at or after the range's start, without end."""
    with _stream(source.path, codec) as file:
        offset = 0
        if source.start > 0:
            file.seek(source.start - 1)
            offset = source.start - 1 + len(file.readline())
        try:
            while line := file.readline():
                yield offset, line
                offset += len(line)
        except (OSError, pa.ArrowInvalid) as error:
            raise CorpusError(f"{source.path} cannot be decompressed after byte {offset}: {error}") from error


def _ended(source: SourceRange, offset: int) -> bool:
    return source.stop != -1 and offset >= source.stop


def _text(source: SourceRange, layout: Layout, codec: str | None) -> Iterator[Document]:
    if layout.unit == "file":
        raw = b"".join(line for _, line in _lines(source, codec))
        yield Document(f"{source.name}:0", _decode(raw, source.path, 0), None, (None,) * len(layout.carried))
        return
    # A paragraph belongs to the range in which the blank line before it starts; the first one to the file's start.
    begun, paragraph, blank = 0, b"", 0 if source.start == 0 else -1
    for offset, line in _lines(source, codec):
        if line.strip():
            if not paragraph:
                if blank == -1 and not _ended(source, offset):
                    continue  # the rest of a paragraph that began in an earlier range
                if blank == -1 or _ended(source, blank):
                    return
                begun = offset
            paragraph += line
            continue
        if paragraph:
            yield _paragraph(source, layout, begun, paragraph)
            paragraph = b""
        blank = offset
        if _ended(source, blank):
            return
    if paragraph:
        yield _paragraph(source, layout, begun, paragraph)


def _paragraph(source: SourceRange, layout: Layout, begun: int, raw: bytes) -> Document:
    text = _decode(raw, source.path, begun).rstrip("\r\n")
    return Document(f"{source.name}:{begun}", text, None, (None,) * len(layout.carried))


def _jsonl(source: SourceRange, layout: Layout, codec: str | None) -> Iterator[Document]:
    for offset, line in _lines(source, codec):
        if _ended(source, offset):
            return
        if line.strip():
            yield _document(f"{source.name}:{offset}", _json_row(line, source.path, offset, layout), layout)


def _json_row(line: bytes, path: str, offset: int, layout: Layout) -> dict[str, Any]:
    text = _decode(line, path, offset)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, byte {offset}: not a JSON object ({error.msg}). Expected one a line.") from error
    if not isinstance(row, dict):
        raise CorpusError(f"{path}, byte {offset}: expected a JSON object, got {type(row).__name__}.")
    for column in layout.columns:
        if column not in row:
            raise CorpusError(
                f"{path}, byte {offset}: no column {column!r}; it has {', '.join(row)}. Choose one (--column)."
            )
    return row


def _parquet(source: SourceRange, layout: Layout, codec: str | None) -> Iterator[Document]:
    with _open(source.path) as file:
        parquet = pq.ParquetFile(file)
        first = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            low, high = max(source.start, first), min(source.stop, first + count)
            if low < high:
                table = parquet.read_row_group(group, columns=layout.columns).slice(low - first, high - low)
                yield from _rows(table, low, source, layout)
            first += count


def _arrow(source: SourceRange, layout: Layout, codec: str | None) -> Iterator[Document]:
    with _open(source.path) as file:
        first = 0
        for batch in pa.ipc.open_stream(file):
            low, high = max(source.start, first), min(source.stop, first + batch.num_rows)
            if low < high:
                table = pa.table(batch.select(layout.columns)).slice(low - first, high - low)
                yield from _rows(table, low, source, layout)
            first += batch.num_rows


def _rows(table: pa.Table, first: int, source: SourceRange, layout: Layout) -> Iterator[Document]:
    for i, row in enumerate(table.to_pylist()):
        yield _document(f"{source.name}:{first + i}", row, layout)


def _npy(source: SourceRange, layout: Layout, codec: str | None) -> Iterator[Document]:
    with _open(source.path) as file:
        ids = np.lib.format.read_array(file, allow_pickle=False)
    for row in range(source.start, source.stop):
        yield Document(f"{source.name}:{row}", ids[row].tolist(), None, (None,) * len(layout.carried))


def _document(name: str, row: dict[str, Any], layout: Layout) -> Document:
    content = row[layout.column]
    if content is None:
        content = ""
    listed = isinstance(content, list) and all(type(i) is int for i in content)
    if not isinstance(content, str) and not listed:
        raise CorpusError(
            f"{name}: column {layout.column!r} must hold text or a list of token ids, got {type(content).__name__}."
        )
    if isinstance(content, str):
        _check_unicode(name, content)
    encoder_text = None
    if layout.encoder_column is not None:
        encoder_text = row[layout.encoder_column]
        if not isinstance(encoder_text, str):
            raise CorpusError(
                f"{name}: column {layout.encoder_column!r} must hold text, got {type(encoder_text).__name__}."
            )
        _check_unicode(name, encoder_text)
    carried = tuple(None if row[column] is None else str(row[column]) for column in layout.carried)
    return Document(name, content, encoder_text, carried)


def _check_unicode(name: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{name}: character {error.start} is half of a surrogate pair, not text.") from error


def _decode(raw: bytes, path: str, offset: int) -> str:
    if b"\0" in raw:
        raise CorpusError(f"{path} is a binary file: a zero byte at {offset + raw.index(0)}. Expected UTF-8 text.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}. Convert the file, e.g. with iconv."
        ) from error
