"""Reader of runs.csv: strict about what a cell holds, forgiving about which columns there are.

A cell that cannot be read is a fault with its file, line and column. Empty cells and `nan` are unknown.
Columns that are not ours (`quality`, a log's own) are left alone; one that looks like ours misspelt is
reported as a warning.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from planner.calibration.run import MemoryKind, Run, RunRecompute, Status
from planner.foundation.decode import read_text
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.model.saved_tensors import AttentionKernel

MAX_PROBLEMS = 50
"""Faults of a table that are listed; a wrong column would otherwise fill the screen."""

MAX_COUNT = 10**9
MAX_LAYERS = 10_000
MAX_DEGREE = 2**20
UNKNOWN = ("", "nan", "n/a")
TRUE, FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")

SIZES = ("hidden", "ffn", "heads", "kv_heads", "vocab", "experts", "topk", "expert_ffn")
JOB_SIZES = ("seq_len", "micro_batch", "global_batch")
DEGREES = ("nodes", "gpus_per_node", "tp", "pp", "chunks", "dp", "dp_replicate", "cp", "ep", "etp")
FLAGS = ("gated_mlp", "tied_embeddings", "embedding", "head", "compile", "sequence_parallel")
AMOUNTS = ("step_time_s", "peak_memory_gib", "peak_reserved_gib", "device_used_gib")
TEXTS = (
    "id",
    "group",
    "source",
    "model",
    "device",
    "network",
    "framework",
    "precision",
    "fused_kernels",
    "notes",
    "schedule",
    "cp_exchange",
)
NEEDED = ("device", "step_time_s", "peak_memory_gib", "status")
"""Of these at least one is a column of every table of runs."""


class _BadCellError(ValueError):
    """A cell that cannot be read: what is wrong, and what would be legal."""

    def __init__(self, fault: str, legal: str) -> None:
        super().__init__(fault)
        self.fault, self.legal = fault, legal


@frozen
class RunTable:
    """The runs of one or more files, and what a reader should hear about the files."""

    runs: tuple[Run, ...]
    warnings: tuple[str, ...] = ()


def read_runs(paths: Iterable[Path]) -> RunTable:
    """The runs of all files in order. Raises InputError with every fault of every file."""
    runs: list[Run] = []
    warnings: list[str] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            table = _read_file(path)
        except InputError as error:
            problems.extend(error.problems)
            continue
        runs.extend(table.runs)
        warnings.extend(table.warnings)
    if problems:
        raise InputError(*_shortened(problems))
    return RunTable(runs=tuple(runs), warnings=tuple(warnings))


def _shortened(problems: Sequence[Problem]) -> list[Problem]:
    if len(problems) <= MAX_PROBLEMS:
        return list(problems)
    rest = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], Problem(where="and", fault=f"{rest} more faults like these.")]


def _read_file(path: Path) -> RunTable:
    lines = _lines(path)
    header = [name.strip() for name in lines[0][1]] if lines else []
    _check_header(path, header)
    runs: list[Run] = []
    problems: list[Problem] = []
    for line, cells in lines[1:]:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}: line {line}"
        if len(cells) > len(header):
            fault = f"has {len(cells)} cells, the header has {len(header)} columns."
            problems.append(Problem(where=where, fault=fault, fix="put texts with commas in quotes"))
            continue
        row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        values, faults = _values(row, where)
        problems.extend(faults)
        if not faults:
            runs.append(Run(**{"id": f"line-{line}", **values}, where=where))
    if problems:
        raise InputError(*problems)
    if not runs:
        raise InputError(Problem(where=str(path), fault="holds no run.", legal="a header and a row a run"))
    return RunTable(runs=tuple(runs), warnings=tuple(_misspelt(path, header)))


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file with the line that each ends on."""
    try:
        text = read_text(path).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [(reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(Problem(where=str(path), fault=f"is not a CSV file: {error}.")) from None


def _check_header(path: Path, header: Sequence[str]) -> None:
    problems = [
        Problem(where=f"{path}: line 1", fault=f"has the column '{name}' twice.")
        for name in dict.fromkeys(header)
        if name and header.count(name) > 1
    ]
    if not set(NEEDED) & set(header):
        shown = ", ".join(name[:20] for name in header[:5]) or "nothing"
        problems.append(
            Problem(
                where=f"{path}: line 1",
                fault=f"is not the header of a table of runs: it begins with {shown}.",
                legal=f"columns separated by commas, of them one of {', '.join(NEEDED)}",
            )
        )
    if problems:
        raise InputError(*problems)


def _misspelt(path: Path, header: Sequence[str]) -> list[str]:
    """Warnings of columns that are not ours but nearly are."""
    found = []
    for name in header:
        absent = [known for known in READERS if known not in header]
        near = difflib.get_close_matches(name.lower(), absent, n=1, cutoff=0.8)
        if name and name not in READERS and near:
            found.append(f"{path}: column '{name}' is not read; did you mean '{near[0]}'?")
    return found


def _values(row: Mapping[str, str], where: str) -> tuple[dict[str, Any], list[Problem]]:
    """The known cells of a row, and the faults of those that cannot be read."""
    values: dict[str, Any] = {}
    faults: list[Problem] = []
    for name, read in READERS.items():
        cell = row.get(name, "")
        if cell.lower() in UNKNOWN:
            continue
        try:
            values[name] = read(cell)
        except _BadCellError as error:
            faults.append(
                Problem(where=f"{where}, column {name}", fault=f"{error.fault}.", legal=error.legal)
            )
    return values, faults


def read_cell(column: str, text: str, where: str) -> Any:
    """The value of one cell of a column of ours, or the Problem that it is."""
    try:
        return READERS[column](text)
    except _BadCellError as error:
        return Problem(where=where, fault=f"{error.fault}.", legal=error.legal)


def _count(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`; `40.0` is 40."""

    def read(cell: str) -> int:
        legal = f"a whole number from {least} to {most}"
        try:
            value = float(cell)
        except ValueError:
            raise _BadCellError(f"'{cell[:40]}' is not a number", legal) from None
        if not math.isfinite(value) or value != int(value) or not least <= value <= most:
            raise _BadCellError(f"is {cell[:40]}", legal)
        return int(value)

    return read


def _amount(cell: str) -> float:
    legal = "a number above 0"
    try:
        value = float(cell)
    except ValueError:
        raise _BadCellError(f"'{cell[:40]}' is not a number", legal) from None
    if not 0 < value <= MAX_COUNT:
        raise _BadCellError(f"is {cell[:40]}", legal)
    return value


def _flag(cell: str) -> bool:
    if cell.lower() in TRUE:
        return True
    if cell.lower() in FALSE:
        return False
    raise _BadCellError(f"'{cell[:40]}' is neither true nor false", "true or false")


def _choice(kind: type[StrEnum]) -> Callable[[str], StrEnum]:
    def read(cell: str) -> StrEnum:
        try:
            return kind(cell.lower())
        except ValueError:
            raise _BadCellError(f"'{cell[:40]}' is not known", ", ".join(kind)) from None

    return read


READERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(SIZES, _count(1, MAX_COUNT)),
    **dict.fromkeys(JOB_SIZES, _count(1, MAX_COUNT)),
    **dict.fromkeys(DEGREES, _count(1, MAX_DEGREE)),
    **dict.fromkeys(FLAGS, _flag),
    **dict.fromkeys(AMOUNTS, _amount),
    "layers": _count(1, MAX_LAYERS),
    "zero": _count(0, 3),
    "attention": _choice(AttentionKernel),
    "recompute": _choice(RunRecompute),
    "status": _choice(Status),
    "memory_kind": _choice(MemoryKind),
}
"""How the cell of each column is read."""
