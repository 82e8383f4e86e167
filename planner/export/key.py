"""Key: one setting of an engine and what of a plan it says. Tables of keys are written and read alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from planner.export.settings import Settings
from planner.foundation.errors import Problem
from planner.foundation.frozen import frozen


@frozen
class Key:
    """A setting by the engine's own name: a flag, or a dotted path in a file.

    `field` is that of Settings. `words` are the engine's value for ours, where these differ: a value without
    one is not written. `write` and `read` convert where words do not do. `source` is the file of the engine
    that reads the setting. A key that only follows from others is not read (`reads` False). What is
    priced as it is written is `strict`: another value is told as not read.
    """

    name: str
    field: str
    source: str
    words: Mapping[Any, Any] | None = None
    write: Callable[[Settings], Any] | None = None
    read: Callable[[Any], Any] | None = None
    reads: bool = True
    strict: bool = False

    def written(self, settings: Settings) -> Any:
        """The engine's value for settings; None: the key is left out."""
        if self.write is not None:
            return self.write(settings)
        value = getattr(settings, self.field)
        return value if self.words is None else self.words.get(value)


def written(keys: Iterable[Key], settings: Settings) -> dict[str, Any]:
    """Every key that settings have a value for, in the table's order."""
    found = {key.name: key.written(settings) for key in keys}
    return {name: value for name, value in found.items() if value is not None}


def read_back(
    keys: Iterable[Key], found: Mapping[str, Any], source: str, problems: list[Problem]
) -> dict[str, Any]:
    """Fields of Settings that a file says; a value that no plan has a word for becomes a problem."""
    fields: dict[str, Any] = {}
    for key in keys:
        if not key.reads or found.get(key.name) is None:
            continue
        value = found[key.name]
        try:
            fields[key.field] = _ours(key, value)
        except (ValueError, TypeError, KeyError, AttributeError):
            problems.append(
                Problem(
                    where=f"{source}: {key.name}",
                    fault=f"is {value!r}, which no plan has a word for.",
                    legal=_legal(key),
                )
            )
    return fields


def _ours(key: Key, value: Any) -> Any:
    if key.read is not None:
        return key.read(value)
    if key.words is not None:
        return {str(word).lower(): ours for ours, word in key.words.items()}[str(value).lower()]
    default = Settings.__dataclass_fields__[key.field].default
    return _flag(value) if isinstance(default, bool) or key.field in _FLAGS else whole(value)


_FLAGS = ("sequence_parallel",)


def whole(value: Any) -> int:
    """A whole number above 0. Raises ValueError."""
    number = int(value)
    if isinstance(value, bool) or number != float(value) or number < 1:
        raise ValueError(value)
    return number


def _flag(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _legal(key: Key) -> str:
    if key.words is not None:
        return ", ".join(str(word) for word in key.words.values())
    return "a whole number above 0" if key.read is None else ""


def unread(
    found: Mapping[str, Any], keys: Iterable[Key], inert: Iterable[str], settings: Settings
) -> tuple[str, ...]:
    """Settings of a file that are neither read nor known to change no time and no memory.

    So are those of strict keys that say otherwise than an export of the same settings.
    """
    known, still = {key.name: key for key in keys}, tuple(inert)
    return tuple(
        name
        for name, value in found.items()
        if (name in known and known[name].strict and not _same(known[name].written(settings), value))
        or (name not in known and not any(_under(name, other) for other in still))
    )


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, int) and isinstance(theirs, float):  # 5e8
        return ours == theirs
    return str(ours).lower() == str(theirs).lower()


def _under(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")
