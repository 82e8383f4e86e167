"""Plain text for people: aligned tables and key-value lists that stay readable in a pipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click


def print_json(document: Any) -> None:
    """Writes one JSON document to stdout."""
    click.echo(json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows under a header, columns aligned: numbers to the right, text to the left."""
    body = [[_cell(value) for value in row] for row in rows]
    numeric = [_numeric(body, column) for column in range(len(header))]
    lines = [list(header), *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def pairs(items: Iterable[tuple[str, Any]]) -> str:
    """One `name  value` line for each item that has a value."""
    shown = [(name, _cell(value)) for name, value in items if value is not None and value != ""]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in shown)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _numeric(body: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in body if row[column] != "-"]
    return bool(cells) and all(cell[:1].isdigit() or cell[:1] == "-" for cell in cells)
