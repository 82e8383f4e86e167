"""The documents of data files: whole texts, JSON lines, and rows of Parquet and Arrow files.

Nothing in a file is ever executed. What is broken is refused with its file and line or row: a line that is
no JSON, a column that is not there, a value that is no text or no conversation, a shard that was cut short.

What `--data` names: files of documents, their formats, and the share of samples that each source gives.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from planner.foundation.decode import load_json_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from runtime.train.data.chat import ChatTemplate, Trained, TrainOn, read_conversation


class FileFormat(StrEnum):
    """How documents lie in a file: one text, a JSON object a line, or a row of a table."""

    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    ARROW = "arrow"


SUFFIXES = {
    ".txt": FileFormat.TEXT,
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".jsonl.gz": FileFormat.JSONL,
    ".parquet": FileFormat.PARQUET,
    ".arrow": FileFormat.ARROW,
}
REFUSED = {
    ".json": "write one JSON object a line into a .jsonl file",
    ".zst": "decompress it: zstd -d FILE",
    ".jsonl.bz2": "decompress it: bunzip2 FILE",
    ".csv": "convert it to .jsonl or .parquet",
    ".pkl": "convert it to .jsonl or .parquet; pickles are never read, since they run code",
    ".bin": "convert it to .jsonl or .parquet",
}
LEGAL = "text, .jsonl, .jsonl.gz, .parquet or .arrow files, a folder of them, or a `datasets` folder"
TRAIN_SPLIT = "train"


@frozen
class DataFile:
    """One file of a source."""

    path: str
    name: str
    format: FileFormat


@frozen
class DataSource:
    """What one `--data PATH[:WEIGHT]` names."""

    name: str
    weight: float | None
    files: tuple[DataFile, ...]


def shipped_corpus() -> Path:
    """The folder of public-domain text that comes with the package."""
    return Path(__file__).parents[2] / "corpus"


def find_sources(given: tuple[str, ...]) -> tuple[DataSource, ...]:
    """The sources that `--data` names, each `PATH` or `PATH:WEIGHT`; without any, the shipped corpus.

    Raises InputError where a path is missing or holds nothing to read, or where only some have weights.
    """
    if not given:
        return (_source(shipped_corpus(), None),)
    sources = tuple(_source(*split_weight(text)) for text in given)
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        without = ", ".join(source.name for source in sources if source.weight is None)
        raise InputError(
            Problem(
                where="--data",
                fault=f"{without} has no weight, others have one.",
                legal="a weight for every source, or for none (then each counts by its size)",
                fix=f"write --data {without}:WEIGHT",
            )
        )
    return sources


def split_weight(text: str) -> tuple[Path, float | None]:
    """`PATH:WEIGHT` as its parts; a path that exists as it stands has no weight."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), None
    try:
        weight = float(tail)
    except ValueError:
        return Path(text), None
    if not 0 < weight < math.inf:
        raise InputError(Problem(where=f"--data {text}", fault="the weight makes no sense.", legal="above 0"))
    return Path(head), weight


def _source(root: Path, weight: float | None) -> DataSource:
    if not root.exists():
        raise InputError(Problem(where=f"--data {root}", fault="no such file or folder."))
    name = str(root)
    if root.is_file():
        file = DataFile(path=str(root), name=root.name, format=_format(root))
        return DataSource(name=name, weight=weight, files=(file,))
    if (root / "dataset_dict.json").exists():
        root = _train_split(root)
    if (root / "state.json").exists():
        return _saved_dataset(root, name, weight)
    files = tuple(
        DataFile(path=str(file), name=str(file.relative_to(root)), format=_format(file))
        for file in sorted(root.rglob("*"))
        if file.is_file() and _suffix(file) in SUFFIXES
    )
    if not files:
        raise InputError(
            Problem(where=f"--data {root}", fault=f"holds no {', '.join(SUFFIXES)} file.", legal=LEGAL)
        )
    return DataSource(name=name, weight=weight, files=files)


def _suffix(file: Path) -> str:
    """The suffix that says the format: `.jsonl.gz` of `a.b.jsonl.gz`, `.txt` of `a.txt`."""
    two = "".join(file.suffixes[-2:]).lower()
    return two if two in SUFFIXES or two in REFUSED else file.suffix.lower()


def _format(file: Path) -> FileFormat:
    suffix = _suffix(file)
    if suffix in REFUSED:
        raise InputError(
            Problem(
                where=f"--data {file}",
                fault=f"{suffix} files are not read.",
                legal=LEGAL,
                fix=REFUSED[suffix],
            )
        )
    return SUFFIXES.get(suffix, FileFormat.TEXT)


def _train_split(root: Path) -> Path:
    """The folder of the split to train on of a `datasets.DatasetDict`."""
    splits = load_json_object(root / "dataset_dict.json").get("splits", [])
    if TRAIN_SPLIT in splits and (root / TRAIN_SPLIT).is_dir():
        return root / TRAIN_SPLIT
    raise InputError(
        Problem(
            where=f"--data {root}",
            fault=f"holds the splits {', '.join(map(str, splits))}, and none is called {TRAIN_SPLIT}.",
            fix=f"name the folder of one split, such as {root / str(next(iter(splits), 'SPLIT'))}",
        )
    )


def _saved_dataset(root: Path, name: str, weight: float | None) -> DataSource:
    """A folder that `datasets.Dataset.save_to_disk` wrote, in the order of its state.json."""
    state = load_json_object(root / "state.json")
    if state.get("_indices_files"):
        raise InputError(
            Problem(
                where=f"--data {root}",
                fault="is a view of other rows (it has an indices file), which is not followed.",
                fix="save it after dataset.flatten_indices()",
            )
        )
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        names = []
    files = tuple(DataFile(path=str(root / n), name=n, format=FileFormat.ARROW) for n in names)
    missing = [n for n in names if not (root / n).is_file()]
    if missing or not names:
        fault = f"lacks {', '.join(missing)}." if missing else "names no data files in its state.json."
        raise InputError(Problem(where=f"--data {root}", fault=fault, fix="copy the whole folder again"))
    return DataSource(name=name, weight=weight, files=files)


CHUNK_CHARACTERS = 1 << 20
ROWS = 1024
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The end-of-stream marker of the Arrow IPC stream format; a file without it was cut short."""

Piece = tuple[str, Trained]
"""A piece of a document that becomes tokens on its own, and which of it is trained on."""

Record = tuple[str, tuple[Any, ...]]
"""The place of a document in a file, and its values."""


@frozen
class Columns:
    """Which keys of a JSON object, or columns of a table, hold a document.

    Where `messages` is given, it holds a conversation, of which `train_on` is trained on (None: what the
    assistant said). Of `prompt` and `completion`, where given, only the completion is trained on. Else `text`
    is the document.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    train_on: TrainOn | None = None

    @property
    def names(self) -> tuple[str, ...]:
        if self.messages is not None:
            return (self.messages,)
        if self.prompt is not None and self.completion is not None:
            return (self.prompt, self.completion)
        return (self.text,)

    @property
    def masked(self) -> bool:
        """Whether some tokens are read and not trained on."""
        return self.prompt is not None or (self.messages is not None and self.train_on is not TrainOn.ALL)

    @property
    def holds(self) -> str:
        """What a value of a column is."""
        return "text" if self.messages is None else "a list of messages"

    def flag(self, name: str) -> str:
        """The option that names a column."""
        named = {self.messages: "--messages-key", self.prompt: "--prompt-key"}
        return named.get(name) or ("--completion-key" if name == self.completion else "--text-key")

    def check(self) -> None:
        """Raises InputError for options that do not go together."""
        problems = []
        if (self.prompt is None) != (self.completion is None):
            fault = "only one of the two is given."
            problems.append(Problem(where="--prompt-key, --completion-key", fault=fault, fix="give both"))
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            fault = "is given with --prompt-key or --completion-key: a document is one or the other."
            problems.append(Problem(where="--messages-key", fault=fault, fix="leave one of them out"))
        if self.messages is None and self.train_on is not None:
            fault = "is given without --messages-key: only conversations have turns to choose from."
            problems.append(Problem(where="--train-on", fault=fault, fix="add --messages-key KEY"))
        if problems:
            raise InputError(*problems)


def documents(
    file: DataFile, columns: Columns, template: ChatTemplate | None = None
) -> Iterator[Iterator[Piece]]:
    """The documents of a file in order, each as its pieces; conversations are written by `template`.

    Raises InputError where the file is broken.
    """
    path = Path(file.path)
    if path.stat().st_size == 0:
        raise InputError(Problem(where=str(path), fault="is empty.", fix="remove it, or copy it again"))
    if file.format is FileFormat.TEXT:
        yield from _text(path, columns)
        return
    train_on = columns.train_on or TrainOn.ASSISTANT
    for place, values in _READERS[file.format](path, columns):
        if template is not None:
            where = f"{place}: {columns.messages}"
            yield iter([template.render(read_conversation(values[0], where), train_on, where)])
        elif columns.masked:
            yield iter([(values[0], False), (values[1], True)])
        else:
            yield iter([(values[0], True)])


def _text(path: Path, columns: Columns) -> Iterator[Iterator[Piece]]:
    missing = "prompts and completions" if columns.prompt is not None else "conversations"
    if columns.prompt is not None or columns.messages is not None:
        raise InputError(
            Problem(
                where=str(path),
                fault=f"is plain text, which has no {missing}.",
                legal="JSON lines, Parquet or Arrow with what the options name",
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


def _json_lines(path: Path, columns: Columns) -> Iterator[Record]:
    number = 0
    try:
        with path.open("rb") as raw:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _take(_parse(line, where), columns, where)
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


def _take(record: dict[str, Any], columns: Columns, where: str) -> tuple[Any, ...]:
    for key in columns.names:
        if key not in record:
            raise _no_column(where, key, columns, list(record))
        if columns.messages is None and not isinstance(record[key], str):
            kind = type(record[key]).__name__
            raise InputError(Problem(where=f"{where}: {key}", fault=f"is of type {kind}, not text."))
    return tuple(record[key] for key in columns.names)


def _no_column(where: str, key: str, columns: Columns, there: list[str]) -> InputError:
    fix = f"name one of them by {columns.flag(key)}"
    if {"prompt", "completion"} <= set(there):
        fix = "to train on completions only, add --prompt-key prompt --completion-key completion"
    for usual in ("messages", "conversations"):
        if usual in there and columns.messages is None:
            fix = f"to train on conversations, add --messages-key {usual}"
    return InputError(
        Problem(where=where, fault=f"has no {key!r}.", legal=", ".join(map(repr, there[:20])), fix=fix)
    )


def _parquet(path: Path, columns: Columns) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_columns(path, columns, table.schema_arrow)
            yield from _rows(path, columns, table.iter_batches(batch_size=ROWS, columns=list(columns.names)))
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _arrow(path: Path, columns: Columns) -> Iterator[Record]:
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
            _check_columns(path, columns, table.schema)
            yield from _rows(path, columns, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    fault = f"cannot be read as {path.suffix.lstrip('.')}, it may be cut short: {reason}."
    return InputError(Problem(where=str(path), fault=fault, fix="copy it again"))


def _check_columns(path: Path, columns: Columns, schema: Any) -> None:
    from pyarrow import types

    texts, lists = (types.is_string, types.is_large_string), (types.is_list, types.is_large_list)
    good = texts if columns.messages is None else lists
    for key in columns.names:
        if key not in schema.names:
            raise _no_column(str(path), key, columns, schema.names)
        kind = schema.field(key).type
        if not any(is_so(kind) for is_so in good):
            raise InputError(
                Problem(where=f"{path}: {key}", fault=f"is of type {kind}, not {columns.holds}.")
            )


def _rows(path: Path, columns: Columns, batches: Any) -> Iterator[Record]:
    first, keys = 0, columns.names
    for batch in batches:
        lists = [batch.column(key).to_pylist() for key in keys]
        for offset, values in enumerate(zip(*lists, strict=True)):
            where = f"{path}, row {first + offset}"
            if None in values:
                key = keys[values.index(None)]
                raise InputError(Problem(where=f"{where}: {key}", fault=f"is null, not {columns.holds}."))
            yield where, values
        first += batch.num_rows


_READERS: dict[FileFormat, Callable[[Path, Columns], Iterator[Record]]] = {
    FileFormat.JSONL: _json_lines,
    FileFormat.PARQUET: _parquet,
    FileFormat.ARROW: _arrow,
}


def needs_pyarrow(files: Sequence[DataFile]) -> bool:
    """Whether any of the files is a table."""
    return any(file.format in (FileFormat.PARQUET, FileFormat.ARROW) for file in files)
