"""Rows of the tables in profiles/measured/*.csv: collectives, links and matrix products, read strictly.

A wrong file is answered with every fault by its line and column.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from planner.foundation.decode import read_text
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen

T = TypeVar("T")
MAX_PROBLEMS = 50
"""Faults of one file that are listed; more say nothing new."""


@frozen
class CollectiveRow:
    """One collective over `ranks` devices; `bytes` is the full message, as in `profile.CommSample`.

    `busbw_gb_per_s` is 2 (n - 1) / n * bytes / time for an all-reduce and half of that for the others.
    """

    table: str
    nccl: str
    op: str
    ranks: int
    bytes: int
    latency_us: float
    busbw_gb_per_s: float


@frozen
class InternodeRow:
    """One collective over several nodes. A row with `rejected` is kept with the reason and never used."""

    device: str
    network: str
    nodes: int
    ranks: int
    op: str
    bytes: int
    latency_us: float
    busbw_gb_per_s: float
    system: str
    source: str
    rejected: str


@frozen
class ProductRow:
    """Products (m, k) x (k, n) of one m, with min(n, k) in `min_nk_from`..`min_nk_to` (None: no end)."""

    table: str
    framework: str
    version: str
    precision: str
    m: int
    min_nk_from: int
    min_nk_to: int | None
    samples: int
    median_tflops: float
    max_tflops: float


@frozen
class LinkFigure:
    """What one source says of a link: nominal, measured, or the threshold that a healthy node passes."""

    link: str
    where: str
    kind: str
    system: str
    nominal_gb_per_s: float
    ranks: int | None
    nodes: int | None
    op: str
    busbw_gb_per_s: float | None
    message: str
    busbw_at_64mib_gb_per_s: float | None
    latency_us: float | None
    nic_gb_per_s: float | None
    share_of_nominal: float | None
    mark: str
    source: str
    note: str
    rejected: str


@frozen
class MeasuredTable:
    """tables.toml: where a table was taken, and the catalog's devices that it speaks for."""

    host: str
    why: str
    collectives: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    rejected: str = ""
    bf16_floor: float | None = None


def load_collectives(path: Path) -> tuple[CollectiveRow, ...]:
    """The rows of collectives.csv."""
    return load_rows(path, CollectiveRow, COLLECTIVE_COLUMNS)


def load_internode(path: Path) -> tuple[InternodeRow, ...]:
    """The rows of internode.csv."""
    return load_rows(path, InternodeRow, INTERNODE_COLUMNS)


def load_products(path: Path) -> tuple[ProductRow, ...]:
    """The rows of gemm.csv."""
    return load_rows(path, ProductRow, PRODUCT_COLUMNS)


def load_links(path: Path) -> tuple[LinkFigure, ...]:
    """The rows of links.csv."""
    return load_rows(path, LinkFigure, LINK_COLUMNS)


# Strict reading
def _text(text: str) -> str:
    if not text:
        raise ValueError("is empty.")
    return text


def _any(text: str) -> str:
    return text


def _one_of(*legal: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in legal:
            raise ValueError(f"is '{text[:40]}', not one of {', '.join(legal)}.")
        return text

    return read


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16 and int(text) > 0):
        raise ValueError(f"'{text[:40]}' is no whole number above 0.")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e12:
        raise ValueError(f"'{text[:40]}' is no number above 0.")
    return value


def _or_empty(read: Callable[[str], T]) -> Callable[[str], T | None]:
    return lambda text: read(text) if text else None


_OP = _one_of("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

COLLECTIVE_COLUMNS: Mapping[str, Callable[[str], Any]] = {
    "table": _text,
    "nccl": _text,
    "op": _OP,
    "ranks": _count,
    "bytes": _count,
    "latency_us": _number,
    "busbw_gb_per_s": _number,
}
INTERNODE_COLUMNS: Mapping[str, Callable[[str], Any]] = {
    "device": _text,
    "network": _text,
    "nodes": _count,
    "ranks": _count,
    "op": _OP,
    "bytes": _count,
    "latency_us": _number,
    "busbw_gb_per_s": _number,
    "system": _text,
    "source": _text,
    "rejected": _any,
}
PRODUCT_COLUMNS: Mapping[str, Callable[[str], Any]] = {
    "table": _text,
    "framework": _text,
    "version": _text,
    "precision": _one_of("bf16", "fp8", "fp8_block"),
    "m": _count,
    "min_nk_from": _count,
    "min_nk_to": _or_empty(_count),
    "samples": _count,
    "median_tflops": _number,
    "max_tflops": _number,
}
LINK_COLUMNS: Mapping[str, Callable[[str], Any]] = {
    "link": _text,
    "where": _one_of("inside", "between", "host"),
    "kind": _one_of("nominal", "measured", "threshold"),
    "system": _any,
    "nominal_gb_per_s": _number,
    "ranks": _or_empty(_count),
    "nodes": _or_empty(_count),
    "op": _any,
    "busbw_gb_per_s": _or_empty(_number),
    "message": _any,
    "busbw_at_64mib_gb_per_s": _or_empty(_number),
    "latency_us": _or_empty(_number),
    "nic_gb_per_s": _or_empty(_number),
    "share_of_nominal": _or_empty(_number),
    "mark": _one_of("read", "read; latency memory", "memory"),
    "source": _text,
    "note": _any,
    "rejected": _any,
}


def load_rows(
    path: Path, kind: type[T], columns: Mapping[str, Callable[[str], Any]], only: str | None = None
) -> tuple[T, ...]:
    """The rows as `kind`; with `only`, those whose first cell it is, and no other is read.

    Raises InputError with the line and column of every fault.
    """
    try:
        lines = list(csv.reader(io.StringIO(read_text(path).decode()), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(Problem(where=path.name, fault=f"is not CSV: {error}.")) from None
    header = lines[0] if lines else []
    if header != list(columns):
        raise InputError(
            Problem(where=f"{path.name} line 1", fault="has other columns.", legal=",".join(columns))
        )
    problems: list[Problem] = []
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if only is not None and cells[:1] != [only]:
            continue
        values = _values(cells, columns, f"{path.name} line {number}", problems)
        if values is not None:
            rows.append(kind(**values))
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise InputError(*problems)
    return tuple(rows)


def _values(
    cells: list[str], columns: Mapping[str, Callable[[str], Any]], where: str, problems: list[Problem]
) -> dict[str, Any] | None:
    """The cells of a row by column, or None with its faults added to `problems`."""
    if len(cells) != len(columns):
        fault = f"has {len(cells)} cells, not {len(columns)}."
        problems.append(Problem(where=where, fault=fault))
        return None
    values, before = {}, len(problems)
    for (column, read), cell in zip(columns.items(), cells, strict=True):
        try:
            values[column] = read(cell)
        except ValueError as error:
            problems.append(Problem(where=f"{where}: {column}", fault=str(error)))
    return values if len(problems) == before else None
