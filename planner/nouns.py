"""`noun`: the decorator that makes all values of the planner plain frozen dataclasses.

A command has some hundred and fifty kinds of them, of which it makes few, and compares or hashes fewer. What
`dataclasses` would compile for each when its module is imported is compiled here at its first use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def noun(cls: type[T]) -> type[T]:
    """A frozen, slotted, keyword-only dataclass that refuses unknown keys, NaN and infinity in files."""
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    own = set(cls.__dict__)
    made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True, kw_only=True)(cls)
    for name, method in _SHARED.items():
        if name not in own:
            setattr(made, name, method)
    for name, write in _WRITTEN.items():
        if name not in own:
            setattr(made, name, _at_first_use(made, name, write))
    return made  # type: ignore[no-any-return]


def replaced(value: T, **changes: Any) -> T:
    """dataclasses.replace() of a noun, in a quarter of the time."""
    cls: Any = type(value)
    names, values = _fields(cls)
    return cls(**{**dict(zip(names, values(value), strict=True)), **changes})  # type: ignore[no-any-return]


@cache
def _fields(cls: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """The names of a noun's fields, of which it has two or more, and what gets their values."""
    names = tuple(field.name for field in dataclasses.fields(cls))
    return names, attrgetter(*names)


def _at_first_use(cls: type[Any], name: str, write: Callable[[type[Any]], Any]) -> Callable[..., Any]:
    """A method that puts the one that is written for its class in its own place."""

    def first(self: Any, *values: Any, **named: Any) -> Any:
        method = write(cls)
        setattr(cls, name, method)
        return method(self, *values, **named)

    return first


def _compiled(name: str, text: str, known: dict[str, Any]) -> Any:
    exec(text, known)
    return known[name]


def _init(cls: type[Any]) -> Any:
    """Sets each slot by its own descriptor, which is sooner done than asking for it by name."""
    known: dict[str, Any] = {"_missing": dataclasses.MISSING}
    taken, lines = [], []
    for field in dataclasses.fields(cls):
        name = field.name
        known[f"_set_{name}"] = getattr(cls, name).__set__
        value = name
        if field.default is not dataclasses.MISSING:
            known[f"_default_{name}"] = field.default
            taken.append(f"{name}=_default_{name}")
        elif field.default_factory is not dataclasses.MISSING:
            known[f"_make_{name}"] = field.default_factory
            taken.append(f"{name}=_missing")
            value = f"_make_{name}() if {name} is _missing else {name}"
        else:
            taken.append(name)
        lines.append(f" _set_{name}(self, {value})")
    head = f"def __init__(self, *, {', '.join(taken)}):" if taken else "def __init__(self):"
    return _compiled("__init__", "\n".join([head, *lines, " return"]), known)


def _eq(cls: type[Any]) -> Any:
    text = (
        "def __eq__(self, other):\n"
        " if other.__class__ is self.__class__:\n"
        f"  return {_values(cls, 'self')} == {_values(cls, 'other')}\n"
        " return NotImplemented"
    )
    return _compiled("__eq__", text, {})


def _hash(cls: type[Any]) -> Any:
    return _compiled("__hash__", f"def __hash__(self):\n return hash({_values(cls, 'self')})", {})


def _values(cls: type[Any], instance: str) -> str:
    return f"({''.join(f'{instance}.{field.name},' for field in dataclasses.fields(cls))})"


def _repr(self: Any) -> str:
    values = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
    return f"{type(self).__qualname__}({values})"


def _setattr(self: Any, name: str, value: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _getstate(self: Any) -> list[Any]:
    return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _setstate(self: Any, state: list[Any]) -> None:
    for field, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, field.name, value)


_SHARED: dict[str, Callable[..., Any]] = {
    "__repr__": _repr,
    "__setattr__": _setattr,
    "__delattr__": _delattr,
    "__getstate__": _getstate,
    "__setstate__": _setstate,
}
_WRITTEN: dict[str, Callable[[type[Any]], Any]] = {"__init__": _init, "__eq__": _eq, "__hash__": _hash}
