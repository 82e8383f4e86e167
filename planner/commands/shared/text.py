"""Plain text for people: aligned tables and key-value lists that stay readable in a pipe."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import click

WIDTH = 118
"""Columns that text for people keeps to where it can."""


def print_json(document: Any, rows: str = "") -> None:
    """Writes one JSON document to stdout.

    Items of its first value, a list named `rows`, have a line each: there may be thousands, and lines are
    what the encoder is fast at.
    """
    encode = partial(json.dumps, allow_nan=False, ensure_ascii=False)
    if not rows:
        click.echo(encode(document, indent=1))
        return
    lines = ",\n  ".join(map(encode, document[rows]))
    rest = encode({name: value for name, value in document.items() if name != rows}, indent=1)
    click.echo(f'{{\n "{rows}": [\n  {lines}\n ],{rest[1:]}')


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Collection[int] | None = None
) -> str:
    """Rows under a header, columns aligned: numbers (found, or named by column) right, text left."""
    body = [[_cell(value) for value in row] for row in rows]
    numeric = [
        _numeric(body, column) if numbers is None else column in numbers for column in range(len(header))
    ]
    lines = [list(header), *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def wrapped_table(header: Sequence[str], rows: Sequence[Sequence[Any]], width: int = WIDTH) -> str:
    """Rows under a header, the last column wrapped so that lines stay within `width`."""
    body = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(header), *body]) for column in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for *cells, last in [list(header), *body]:
        pieces = _wrapped(last, width - indent)
        left = "".join(cell.ljust(size + 2) for cell, size in zip(cells, widths, strict=True))
        lines += [(left + pieces[0]).rstrip(), *(" " * indent + piece for piece in pieces[1:])]
    return "\n".join(lines)


def pairs(items: Iterable[tuple[str, Any]], width: int | None = None) -> str:
    """One `name  value` line for each item that has a value; with `width`, long values go on below."""
    shown = [(name, _cell(value)) for name, value in items if value is not None and value != ""]
    indent = max((len(name) for name, _ in shown), default=0) + 2
    lines = []
    for name, value in shown:
        pieces = [value] if width is None else _wrapped(value, width - indent)
        lines += [name.ljust(indent) + pieces[0], *(" " * indent + piece for piece in pieces[1:])]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width`, or 30 where that is too little; words stay whole."""
    return textwrap.wrap(text, max(30, width), break_long_words=False, break_on_hyphens=False) or [""]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _numeric(body: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in body if row[column] != "-"]
    return bool(cells) and all(cell[:1].isdigit() or cell[:1] == "-" for cell in cells)
