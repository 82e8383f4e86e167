"""Run: one measured run, as a row of runs.csv states it. None, or an empty text, is unknown.

Reader of runs.csv: strict about what a cell holds, forgiving about which columns there are.

A cell that cannot be read is a fault with its file, line and column. Empty cells and `nan` are unknown.
Columns that are not ours (`quality`, a log's own) are left alone; one that looks like ours misspelt is
reported as a warning.

Writer of runs.csv: the columns of the contract, then ours; what is unknown stays empty.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from planner.foundation.decode import read_text
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.model.sublayer import AttentionKernel


class Status(StrEnum):
    """How a run ended. `error` is a fault that says nothing about its plan."""

    OK = "ok"
    OOM = "oom"
    ERROR = "error"


class MemoryKind(StrEnum):
    """Whose figure a peak is: the allocator's tensors, its reserved blocks, or the driver's."""

    ALLOCATED = "allocated"
    RESERVED = "reserved"
    DEVICE = "device"


class RunRecompute(StrEnum):
    """What a run recomputes; `mlp` is the MLP of every block and nothing else."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"
    MLP = "mlp"


@frozen
class Run:
    """One measured run.

    `dp` is the whole data-parallel degree. `embedding` and `head` are false where a pipeline stage was run
    without them. `memory_kind` says what `peak_memory_gib` is. `schedule`, `etp` (shards of one expert) and
    `cp_exchange` are columns of our own. `where` is the file and line.
    """

    id: str
    where: str
    group: str = ""
    source: str = ""
    model: str = ""
    layers: int | None = None
    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocab: int | None = None
    experts: int | None = None
    topk: int | None = None
    expert_ffn: int | None = None
    gated_mlp: bool | None = None
    tied_embeddings: bool | None = None
    embedding: bool | None = None
    head: bool | None = None
    seq_len: int | None = None
    device: str = ""
    nodes: int | None = None
    gpus_per_node: int | None = None
    network: str = ""
    framework: str = ""
    precision: str = ""
    attention: AttentionKernel | None = None
    fused_kernels: str = ""
    compile: bool | None = None
    tp: int | None = None
    pp: int | None = None
    chunks: int | None = None
    dp: int | None = None
    dp_replicate: int | None = None
    cp: int | None = None
    ep: int | None = None
    zero: int | None = None
    sequence_parallel: bool | None = None
    recompute: RunRecompute | None = None
    micro_batch: int | None = None
    global_batch: int | None = None
    status: Status | None = None
    step_time_s: float | None = None
    peak_memory_gib: float | None = None
    memory_kind: MemoryKind | None = None
    peak_reserved_gib: float | None = None
    device_used_gib: float | None = None
    notes: str = ""
    schedule: str = ""
    etp: int | None = None
    cp_exchange: str = ""

    @property
    def devices(self) -> int | None:
        """Devices of the cluster, where both factors are known."""
        if self.nodes is None or self.gpus_per_node is None:
            return None
        return self.nodes * self.gpus_per_node

    @property
    def words(self) -> str:
        """Framework, model and notes in small letters, in which details hide that no column holds."""
        return f"{self.framework} | {self.model} | {self.fused_kernels} | {self.notes}".lower()

    @property
    def group_name(self) -> str:
        """The group as stated; otherwise what makes runs comparable: model, workload, cluster, software."""
        if self.group:
            return self.group
        dims = (self.layers, self.hidden, self.ffn, self.heads, self.kv_heads, self.vocab)
        parts = (
            self.model or "-".join("?" if dim is None else str(dim) for dim in dims),
            f"{self.nodes or '?'}x{self.gpus_per_node or '?'}:{self.device or '?'}",
            f"s{self.seq_len or '?'}",
            f"b{self.global_batch or '?'}",
            self.precision,
            self.framework,
            self.fused_kernels,
        )
        return "|".join(part for part in parts if part)


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


COLUMNS = tuple(field.name for field in fields(Run) if field.name != "where")


def runs_csv(runs: Iterable[Run]) -> str:
    """Runs as the text of a table that `read_runs` reads back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(getattr(run, name)) for name in COLUMNS] for run in runs)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.9g}" if isinstance(value, float) else str(value)
