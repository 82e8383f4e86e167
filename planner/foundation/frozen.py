"""`frozen`: the decorator that makes all values of the planner plain frozen dataclasses.

A command has some hundred and fifty kinds of them, of which it makes few. What `dataclasses` would compile
for each when its module is imported are closures here, which are made in no time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")
Method = Callable[..., Any]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def frozen(cls: type[T]) -> type[T]:
    """A frozen, slotted, keyword-only dataclass that refuses unknown keys, NaN and infinity in files."""
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    own = set(cls.__dict__)
    made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True, kw_only=True)(cls)
    equal, hashed = _compared(made)
    methods = _SHARED | {"__init__": _init(made), "__eq__": equal, "__hash__": hashed}
    for name, method in methods.items():
        if name not in own:
            setattr(made, name, method)
    return made  # type: ignore[no-any-return]


def replaced(value: T, **changes: Any) -> T:
    """dataclasses.replace() of a noun, sooner done."""
    cls: Any = type(value)
    slots, copied = _slots(cls), cls.__new__(cls)
    for get, put in slots.values():
        put(copied, get(value))
    for name, change in changes.items():
        if name not in slots:
            raise TypeError(f"{cls.__name__}() has no field {name!r}")
        slots[name][1](copied, change)
    return copied  # type: ignore[no-any-return]


@cache
def _slots(cls: Any) -> dict[str, tuple[Method, Method]]:
    """What gets and sets each of a noun's fields."""
    each = ((field.name, getattr(cls, field.name)) for field in dataclasses.fields(cls))
    return {name: (slot.__get__, slot.__set__) for name, slot in each}


@cache
def _fields(cls: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """The names of a noun's fields, and what gets their values."""
    names = tuple(field.name for field in dataclasses.fields(cls))
    if len(names) > 1:
        return names, attrgetter(*names)
    return names, lambda value: tuple(getattr(value, name) for name in names)


def _init(cls: Any) -> Method:
    """Sets each slot by its own descriptor, which is sooner done than asking for it by name."""
    missing: Any = dataclasses.MISSING
    slots: list[tuple[str, Method, Any, Any]] = [
        (field.name, getattr(cls, field.name).__set__, field.default, field.default_factory)
        for field in dataclasses.fields(cls)
    ]

    def init(self: Any, /, **given: Any) -> None:
        for name, put, default, make in slots:
            value = given.pop(name, missing)
            if value is missing:
                value = make() if make is not missing else default
                if value is missing:
                    raise TypeError(f"{cls.__name__}() lacks a value for {name!r}")
            put(self, value)
        if given:
            raise TypeError(f"{cls.__name__}() has no field {next(iter(given))!r}")

    return init


def _compared(cls: Any) -> tuple[Method, Method]:
    """Whether two of a kind have the same values, and the hash of these."""
    _, values = _fields(cls)

    def equal(self: Any, other: Any) -> Any:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def hashed(self: Any) -> int:
        return hash(values(self))

    return equal, hashed


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


_SHARED: dict[str, Method] = {
    "__repr__": _repr,
    "__setattr__": _setattr,
    "__delattr__": _delattr,
    "__getstate__": _getstate,
    "__setstate__": _setstate,
}
