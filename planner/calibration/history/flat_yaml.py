"""Scalars of a YAML file of nested mappings, by their path: what W&B's config.yaml needs, and no more.

W&B writes each setting as a mapping with `value` (and `desc`, and its own under `_wandb`). Lists, flow
collections and texts over several lines are left out: nothing that a plan needs is one.
"""

from __future__ import annotations

import re
from pathlib import Path

from planner.foundation.decode import read_text
from planner.foundation.errors import InputError, Problem

_LINE = re.compile(r"^(?P<indent> *)(?P<key>\"[^\"]*\"|'[^']*'|[^\s:#\-][^:]*?) *:(?: +(?P<value>.*))?$")
WRAPPERS = ("value", "desc")
"""Keys of W&B's own around a setting."""

NOTHING = ("null", "~", "none", "{}", "[]")
LARGER = ("{", "[", "&", "*", "!")
"""How values begin that are no scalars of their own."""


def read_flat_yaml(path: Path) -> dict[str, str]:
    """The scalars of a YAML file by dotted path, W&B's own keys left out. Raises InputError."""
    try:
        text = read_text(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(Problem(where=str(path), fault=f"is not text: {error}.")) from None
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    folded = -1
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        if not line.strip() or (folded >= 0 and indent > folded):
            continue
        folded = -1
        match = _LINE.match(line)
        if match is None:
            continue
        above = [entry for entry in above if entry[0] < indent]
        key, value = match["key"].strip("\"'"), _scalar(match["value"] or "")
        if value[:1] in ("|", ">"):
            folded = indent
            continue
        parts = [part for _, part in above if part not in WRAPPERS]
        above.append((indent, key))
        if value and not value.startswith(LARGER) and key != "desc" and "_wandb" not in parts:
            path_text = ".".join([*parts, *([] if key in WRAPPERS else [key])])
            if value.lower() not in NOTHING:
                found[path_text] = value
    return found


def _scalar(text: str) -> str:
    """A value without its quotes and its comment."""
    text = text.strip()
    if text[:1] in ("'", '"'):
        return text[1:].partition(text[0])[0]
    return re.sub(r"\s+#.*$", "", "" if text.startswith("#") else text)
