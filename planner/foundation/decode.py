"""Files in and out: strict decoding with every fault at its path, atomic writing.

Inside, all values are plain frozen dataclasses made by `noun`; pydantic is met only here, when a file
that is read may be wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from planner.foundation.decode_plain import UnsureError, parse_json, read_plain
from planner.foundation.errors import InputError, Problem

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
