"""What `--data` names: files of documents, their formats, and the share of samples that each source gives."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path

from planner.foundation.decode import load_json_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen


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
