"""Files in and out: strict decoding with every fault at its path, atomic writing.

Inside, all values are plain frozen dataclasses made by `noun`; pydantic is met only here, when a file
that is read may be wrong.

Plain data as nouns where nothing is wrong with it, without pydantic, which takes long to import.

What is read here is exactly what pydantic reads in its strict mode from JSON. Wherever that is not certain
(a fault, a type that is not known here, a number too large) UnsureError is raised, and pydantic decides and
says why.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
import re
import stat
import tomllib
import types
import typing
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from planner.foundation.errors import InputError, Problem

Decoded = TypeVar("Decoded")
Reader = Callable[[Any], Any]

MOST_CHARACTERS = 400_000
"""Longer texts are sooner read by pydantic's parser, its import included."""
EXACT = 2**53
"""Whole numbers up to this are the same as floats."""


class UnsureError(Exception):
    """It is not certain that the data is right."""


def read_plain(cls: type[Decoded], data: object) -> Decoded:
    """`data` as a `cls`. Raises UnsureError."""
    kind: Any = cls
    try:
        value: Decoded = reader(kind)(data)
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


T = TypeVar("T")
MAX_FILE_BYTES = 64 * 1024 * 1024
"""Files larger than this are refused before they are read; the largest of ours are plans of a few MiB."""

MAX_KEY_PARTS = 100
"""Parts of one dotted key in a TOML file; ours have five at most."""


@cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def decode(cls: type[T], data: object, *, source: str) -> T:
    """`data` (parsed JSON or TOML) as a `cls`. Raises InputError with every fault and its path."""
    try:
        return read_plain(cls, data)
    except UnsureError:
        pass
    try:
        text = json.dumps(data, allow_nan=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(Problem(where=source, fault=f"cannot be read as plain data: {error}.")) from None
    return _decoded(cls, text, source)


def decode_json(cls: type[T], text: str | bytes, *, source: str) -> T:
    """JSON text as a `cls`. Raises InputError with every fault and its path."""
    try:
        return read_plain(cls, parse_json(text))
    except UnsureError:
        return _decoded(cls, text, source)


def _decoded(cls: type[T], text: str | bytes, source: str) -> T:
    """The same by pydantic, which knows every fault."""
    from pydantic import ValidationError

    try:
        value: T = _adapter(cls).validate_json(text, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise InputError(*(_problem(fault, faults, source) for fault in faults)) from None
    return value


def _problem(fault: Any, faults: list[Any], source: str) -> Problem:
    import difflib

    path = ".".join(str(part) for part in fault["loc"])
    where = f"{source}: {path}" if path else source
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        missing = [
            str(other["loc"][-1])
            for other in faults
            if other["type"] in ("missing", "missing_argument") and other["loc"][:-1] == fault["loc"][:-1]
        ]
        near = difflib.get_close_matches(str(fault["loc"][-1]), missing, n=1)
        return Problem(where=where, fault="unknown key.", fix=f"did you mean '{near[0]}'" if near else "")
    if fault["type"] in ("missing", "missing_argument"):
        return Problem(where=where, fault="is missing.")
    message = str(fault["msg"]).rstrip(".")
    shown = repr(fault.get("input"))
    return Problem(where=where, fault=f"{message} (found {shown[:60]}).")


def read_text(path: Path, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file. Raises InputError if it is missing, not a plain file or larger than the limit."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a plain file"
            raise InputError(Problem(where=str(path), fault=f"is {kind}, a file was expected."))
        if status.st_size > limit_bytes:
            raise InputError(
                Problem(
                    where=str(path),
                    fault=f"has {status.st_size} bytes.",
                    legal=f"at most {limit_bytes} bytes",
                )
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(Problem(where=str(path), fault="no such file.", fix=_near_file(path))) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        fault = getattr(error, "strerror", None) or str(error)
        raise InputError(Problem(where=str(path), fault=f"cannot be read: {fault}.")) from None


def _near_file(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return "create it or correct the path: its folder cannot be read either"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / near[0]}" if near else ""


def load_json(path: Path, cls: type[T]) -> T:
    """The JSON file at `path` as a `cls`."""
    return decode_json(cls, read_text(path), source=str(path))


def load_json_object(path: Path, limit_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The JSON object in a file, undecoded. For formats that are not ours, such as config.json.

    A key that is given twice is refused: which of the two is meant cannot be known.
    """
    repeated: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return built

    try:
        value = json.loads(read_text(path, limit_bytes), object_pairs_hook=build)
    except RecursionError:
        raise InputError(Problem(where=str(path), fault="is nested too deeply.")) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(Problem(where=str(path), fault=f"is not JSON: {error}.")) from None
    if repeated:
        raise InputError(
            *(Problem(where=f"{path}: {name[:60]}", fault="is given twice.") for name in repeated[:10])
        )
    if not isinstance(value, dict):
        raise InputError(Problem(where=str(path), fault=f"holds a {type(value).__name__}, not an object."))
    return value


def load_toml_object(path: Path, limit_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The table in a TOML file, undecoded."""
    try:
        text = read_text(path, limit_bytes).decode()
        if _has_deep_key(text):
            raise RecursionError
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(Problem(where=str(path), fault="is nested too deeply.")) from None
    except ValueError as error:  # bad TOML, bad UTF-8, a number of thousands of digits
        raise InputError(Problem(where=str(path), fault=f"is not TOML: {error}.")) from None


def _has_deep_key(text: str) -> bool:
    """Whether a TOML text has a dotted key of very many parts: reading one takes time by their square."""
    bare = re.sub(r"\"[^\"\n]*\"|'[^'\n]*'", "", text)
    runs = re.findall(r"[\w.\- \t]+", re.sub(r"#[^\n]*", "", bare))
    return any(run.count(".") > MAX_KEY_PARTS for run in runs)


def load_toml(path: Path, cls: type[T]) -> T:
    """The TOML file at `path` as a `cls`."""
    return decode(cls, load_toml_object(path), source=str(path))


def encode(value: Any) -> Any:
    """A noun as plain data (dicts, lists, numbers, text): dataclasses.asdict, less its copies of values."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return tuple(map(encode, value))
    if isinstance(value, list):
        return list(map(encode, value))
    if isinstance(value, dict):
        return {encode(key): encode(item) for key, item in value.items()}
    return value


def to_json(value: Any) -> str:
    """A noun as JSON text, keys in the order of the fields; equal values give equal bytes."""
    return json.dumps(encode(value), indent=1, allow_nan=False) + "\n"


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a noun, for `inputs.digests` of a plan."""
    text = json.dumps(encode(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the old file or the whole new one, never a part."""
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise InputError(Problem(where=str(path), fault=f"cannot be written: {error.strerror}.")) from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(Problem(where=str(path), fault=f"cannot be written: {error.strerror}.")) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
