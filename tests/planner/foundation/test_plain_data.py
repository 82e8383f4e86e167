"""Plain data read without pydantic: what pydantic reads, or no answer at all."""

from __future__ import annotations

import json
from dataclasses import field
from enum import IntEnum, StrEnum
from typing import Any, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from planner.foundation.decode import UnsureError, load_toml_object, parse_json, read_plain
from planner.foundation.frozen import frozen
from planner.hardware.catalog import data_folder, device_names
from planner.hardware.device_file import DeviceFile
from planner.profile.profile import Profile


class Colour(StrEnum):
    """A choice by its text."""

    RED = "red"


class Level(IntEnum):
    """A choice by its number."""

    LOW = 1


@frozen
class Part:
    """A noun in another."""

    size: float
    note: str | None = None


@frozen
class Whole:
    """One of every type that is known."""

    parts: tuple[Part, ...]
    count: int = 0
    flag: bool = False
    colour: Colour = Colour.RED
    level: Level = Level.LOW
    by_name: dict[str, float] = field(default_factory=dict)


@frozen
class Odd:
    """A type that is left to pydantic."""

    every: int | Literal["best"]


NUMBERS = (1, 0, -3, 2**60, 1.5, 2.0, True, float("nan"))
SAMPLES: tuple[Any, ...] = (*NUMBERS, "red", "", "é", "\ud800", None, [], [{}], {}, {"a": 1})
RIGHT = {"parts": [{"size": 1}, {"size": 2.5, "note": "é"}], "count": 3, "by_name": {"a": 2}}


def by_pydantic(data: object) -> Whole | None:
    try:
        whole: Whole = TypeAdapter(Whole).validate_json(json.dumps(data), strict=True)
    except ValidationError:
        return None
    return whole


def test_right_data_is_read_as_pydantic_reads_it() -> None:
    found = read_plain(Whole, RIGHT)
    assert found == by_pydantic(RIGHT)
    assert type(found.parts[0].size) is float and type(found.by_name["a"]) is float


@pytest.mark.parametrize("key", [*Whole.__dataclass_fields__, "size", "note", "unknown"])
def test_whatever_lies_in_a_field_is_read_as_pydantic_reads_it_or_not_at_all(key: str) -> None:
    for sample in SAMPLES:
        inner = {"size": 1.0} | ({key: sample} if key in ("size", "note") else {})
        data = {"parts": [inner]} | ({} if key in ("size", "note") else {key: sample})
        try:
            found = read_plain(Whole, data)
        except UnsureError:
            continue
        expected = by_pydantic(data)
        assert found == expected and repr(found) == repr(expected), (key, sample)


def test_unknown_types_are_left_alone() -> None:
    with pytest.raises(UnsureError):
        read_plain(Odd, {"every": 1})


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', b"\xff", "{", "[" * 100_000, "\ufeff{}", "1" * 500_000])
def test_text_that_may_be_read_otherwise_is_left_alone(text: str | bytes) -> None:
    with pytest.raises(UnsureError):
        parse_json(text)


def test_shipped_files_need_no_pydantic() -> None:
    for name in device_names():
        table = load_toml_object(data_folder() / "devices" / f"{name}.toml")
        assert read_plain(DeviceFile, table) == TypeAdapter(DeviceFile).validate_json(json.dumps(table))
    for path in (data_folder() / "measured").glob("*.json"):
        text = path.read_bytes()
        assert read_plain(Profile, parse_json(text)) == TypeAdapter(Profile).validate_json(text, strict=True)
