"""Plain data as nouns where nothing is wrong with it, without pydantic, which takes long to import.

What is read here is exactly what pydantic reads in its strict mode from JSON. Wherever that is not certain
(a fault, a type that is not known here, a number too large) UnsureError is raised, and pydantic decides and
says why.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
Reader = Callable[[Any], Any]

MOST_CHARACTERS = 400_000
"""Longer texts are sooner read by pydantic's parser, its import included."""
EXACT = 2**53
"""Whole numbers up to this are the same as floats."""


class UnsureError(Exception):
    """It is not certain that the data is right."""


def read_plain(cls: type[T], data: object) -> T:
    """`data` as a `cls`. Raises UnsureError."""
    kind: Any = cls
    try:
        value: T = reader(kind)(data)
    except (KeyError, TypeError, ValueError, NameError, AttributeError, RecursionError) as error:
        raise UnsureError from error
    return value


def parse_json(text: str | bytes) -> Any:
    """JSON as plain data. Raises UnsureError, also where a key is given twice."""
    if len(text) > MOST_CHARACTERS:
        raise UnsureError
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise UnsureError from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnsureError
    return found


@cache
def reader(kind: Any) -> Reader:
    """What reads values of a type. Raises UnsureError for types that are not known here."""
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        return _list_reader(reader(arguments[0]))
    if origin is dict and arguments[0] is str:
        return _table_reader(reader(arguments[1]))
    if origin in (typing.Union, types.UnionType):
        given = [each for each in arguments if each is not types.NoneType]
        if len(given) == 1 and len(arguments) == 2:
            return _optional_reader(reader(given[0]))
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum | enum.IntEnum):
        return _choice_reader(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and "__pydantic_config__" in kind.__dict__:
        return _noun_reader(kind)
    raise UnsureError


def _exact_reader(kind: type) -> Reader:
    def exact(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise UnsureError

    return exact


def _text(value: Any) -> str:
    if type(value) is not str:
        raise UnsureError
    if not value.isascii():
        value.encode()  # half a pair of surrogates is no text
    return value


def _number(value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and -EXACT <= value <= EXACT:
        return float(value)
    raise UnsureError


_SIMPLE: dict[Any, Reader] = {
    bool: _exact_reader(bool),
    int: _exact_reader(int),
    float: _number,
    str: _text,
}


def _list_reader(each: Reader) -> Reader:
    def read_list(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise UnsureError
        return tuple(map(each, value))

    return read_list


def _table_reader(each: Reader) -> Reader:
    def read_table(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise UnsureError
        return {_text(key): each(item) for key, item in value.items()}

    return read_table


def _optional_reader(given: Reader) -> Reader:
    return lambda value: None if value is None else given(value)


def _choice_reader(kind: type[enum.Enum]) -> Reader:
    known, plain = {member.value: member for member in kind}, str if issubclass(kind, str) else int

    def read_choice(value: Any) -> enum.Enum:
        if type(value) is not plain:
            raise UnsureError
        return known[value]

    return read_choice


def _noun_reader(cls: type[Any]) -> Reader:
    readers = {name: reader(kind) for name, kind in typing.get_type_hints(cls).items()}

    def read_noun(value: Any) -> Any:
        if type(value) is not dict:
            raise UnsureError
        return cls(**{key: readers[key](item) for key, item in value.items()})

    return read_noun
