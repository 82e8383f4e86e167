"""The documents of data files: whole texts, JSON lines, and rows of Parquet and Arrow files.

Nothing in a file is ever executed. What is broken is refused with its file and line or row: a line that is
no JSON, a column that is not there, a value that is no text, a shard that was cut short.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from planner.codec import noun
from planner.errors import InputError, Problem
from runtime.data.sources import DataFile, FileFormat

CHUNK_CHARACTERS = 1 << 20
ROWS = 1024
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The end-of-stream marker of the Arrow IPC stream format; a file without it was cut short."""

Piece = tuple[str, bool]
"""A piece of a document that becomes tokens on its own, and whether its tokens are trained on."""


@noun
class Columns:
    """Which keys of a JSON object, or columns of a table, hold a document.

    Of `prompt` and `completion`, where given, only the completion is trained on; else `text` is the document.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        if self.prompt is not None and self.completion is not None:
            return (self.prompt, self.completion)
        return (self.text,)

    @property
    def masked(self) -> bool:
        """Whether some tokens are read and not trained on."""
        return self.prompt is not None


def documents(file: DataFile, columns: Columns) -> Iterator[Iterator[Piece]]:
    """The documents of a file in order, each as its pieces. Raises InputError where the file is broken."""
    path = Path(file.path)
    if path.stat().st_size == 0:
        raise InputError(Problem(where=str(path), fault="is empty.", fix="remove it, or copy it again"))
    if file.format is FileFormat.TEXT:
        yield from _text(path, columns)
        return
    for values in _READERS[file.format](path, columns.names):
        if columns.masked:
            yield iter([(values[0], False), (values[1], True)])
        else:
            yield iter([(values[0], True)])


def _text(path: Path, columns: Columns) -> Iterator[Iterator[Piece]]:
    if columns.masked:
        raise InputError(
            Problem(
                where=str(path),
                fault="is plain text, which has no prompts and completions.",
                legal="JSON lines, Parquet or Arrow with both columns",
            )
        )
    yield ((chunk, True) for chunk in _chunks(path))


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about CHUNK_CHARACTERS that end at line ends."""
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            while lines := handle.readlines(CHUNK_CHARACTERS):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> InputError:
    return InputError(
        Problem(where=where, fault=f"is not UTF-8 text: {error.reason}.", fix="convert it to UTF-8")
    )


def _json_lines(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    number = 0
    try:
        with path.open("rb") as raw:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _take(_parse(line, f"{path}, line {number}"), keys, f"{path}, line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            Problem(
                where=f"{path}, after line {number}",
                fault=f"the compressed file is cut short or damaged: {error}.",
                fix="copy it again",
            )
        ) from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except (ValueError, RecursionError) as error:
        cut = (
            "" if line.endswith(b"\n") else " It is the last line and has no end: the file may be cut short."
        )
        raise InputError(Problem(where=where, fault=f"is not JSON: {error}.{cut}")) from None
    if not isinstance(value, dict):
        raise InputError(Problem(where=where, fault=f"holds a {type(value).__name__}, not an object."))
    return value


def _take(record: dict[str, Any], keys: Sequence[str], where: str) -> tuple[str, ...]:
    values = []
    for key in keys:
        if key not in record:
            raise _no_column(where, key, list(record))
        if not isinstance(record[key], str):
            kind = type(record[key]).__name__
            raise InputError(Problem(where=f"{where}: {key}", fault=f"is of type {kind}, not text."))
        values.append(record[key])
    return tuple(values)


def _no_column(where: str, key: str, there: list[str]) -> InputError:
    flag = {"prompt": "--prompt-key", "completion": "--completion-key"}.get(key, "--text-key")
    fix = f"name one of them by {flag}"
    if {"prompt", "completion"} <= set(there):
        fix = "to train on completions only, add --prompt-key prompt --completion-key completion"
    return InputError(
        Problem(where=where, fault=f"has no {key!r}.", legal=", ".join(map(repr, there[:20])), fix=fix)
    )


def _parquet(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_columns(path, keys, table.schema_arrow)
            yield from _rows(path, keys, table.iter_batches(batch_size=ROWS, columns=list(keys)))
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _arrow(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            if source.read_at(6, 0) == b"ARROW1":
                table = pyarrow.ipc.open_file(source)
                batches: Any = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                if source.read_at(len(ARROW_END), max(0, source.size() - len(ARROW_END))) != ARROW_END:
                    raise OSError("its end marker is missing")
                table = batches = pyarrow.ipc.open_stream(source)
            _check_columns(path, keys, table.schema)
            yield from _rows(path, keys, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    fault = f"cannot be read as {path.suffix.lstrip('.')}, it may be cut short: {reason}."
    return InputError(Problem(where=str(path), fault=fault, fix="copy it again"))


def _check_columns(path: Path, keys: Sequence[str], schema: Any) -> None:
    import pyarrow

    for key in keys:
        if key not in schema.names:
            raise _no_column(str(path), key, schema.names)
        kind = schema.field(key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise InputError(Problem(where=f"{path}: {key}", fault=f"is of type {kind}, not text."))


def _rows(path: Path, keys: Sequence[str], batches: Any) -> Iterator[tuple[str, ...]]:
    first = 0
    for batch in batches:
        columns = [batch.column(key).to_pylist() for key in keys]
        for offset, values in enumerate(zip(*columns, strict=True)):
            if None in values:
                where = f"{path}, row {first + offset}: {keys[values.index(None)]}"
                raise InputError(Problem(where=where, fault="is null, not text."))
            yield values
        first += batch.num_rows


_READERS: dict[FileFormat, Callable[[Path, Sequence[str]], Iterator[tuple[str, ...]]]] = {
    FileFormat.JSONL: _json_lines,
    FileFormat.PARQUET: _parquet,
    FileFormat.ARROW: _arrow,
}


def needs_pyarrow(files: Sequence[DataFile]) -> bool:
    """Whether any of the files is a table."""
    return any(file.format in (FileFormat.PARQUET, FileFormat.ARROW) for file in files)
