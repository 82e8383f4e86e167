"""Files in and out: every fault at its path, plain files only, whole files or none."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from planner.commands.shared.text import print_json
from planner.foundation.decode import (
    MAX_FILE_BYTES,
    decode,
    decode_json,
    digest,
    encode,
    load_json,
    load_json_object,
    load_toml,
    load_toml_object,
    read_text,
    to_json,
    write_atomic,
)
from planner.foundation.errors import InputError
from planner.foundation.frozen import frozen


@frozen
class Point:
    """A noun for tests."""

    x: int
    y: float
    label: str = ""


@frozen
class Line:
    """A noun of nouns."""

    points: tuple[Point, ...]
    closed: bool = False


LINE = Line(points=(Point(x=1, y=0.5), Point(x=2, y=1e-300, label="é")), closed=True)


def faults_of(data: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        decode(Line, data, source="line.json")
    return [str(problem) for problem in caught.value.problems]


def test_decode_of_encode_is_the_value() -> None:
    assert decode(Line, encode(LINE), source="test") == LINE
    assert decode_json(Line, to_json(LINE), source="test") == LINE


def test_encoding_is_what_asdict_says() -> None:
    value = Line(points=LINE.points, closed=True)
    assert encode(value) == dataclasses.asdict(value)
    assert encode({"lines": [value]}) == {"lines": [dataclasses.asdict(value)]}


def test_rows_of_a_document_have_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"options": [{"name": "é", "days": 1.5}, {"name": "b", "days": None}], "model": {"layers": 2}}
    print_json(document, rows="options")
    written = capsys.readouterr().out
    assert json.loads(written) == document and list(json.loads(written)) == ["options", "model"]
    assert '{"name": "é", "days": 1.5},' in written.splitlines()[2]


def test_equal_values_give_equal_bytes_and_digests() -> None:
    again = decode_json(Line, to_json(LINE), source="test")
    assert to_json(again) == to_json(LINE)
    assert digest(again) == digest(LINE)
    assert digest(Point(x=1, y=2.0)) != digest(Point(x=1, y=2.5))


def test_every_fault_is_reported_at_its_path() -> None:
    faults = faults_of({"points": [{"x": "1", "y": 2.0}, {"x": 2}], "closed": 1})
    assert len(faults) == 3
    assert any("points.0.x" in fault for fault in faults)
    assert any("points.1.y" in fault for fault in faults)
    assert any("closed" in fault for fault in faults)


def test_an_unknown_key_is_refused_and_its_likely_spelling_offered() -> None:
    (unknown, missing) = sorted(faults_of({"pionts": []}), key=lambda fault: "unknown" not in fault)
    assert "did you mean 'points'" in unknown
    assert "points" in missing


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value: float) -> None:
    assert "points.0.y" in faults_of({"points": [{"x": 1, "y": value}]})[0]


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_a_whole_number_is_only_a_whole_number(value: object) -> None:
    assert "points.0.x" in faults_of({"points": [{"x": value, "y": 1.0}]})[0]


def test_bad_json_and_toml_are_told_apart_from_bad_content(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"points": [')
    with pytest.raises(InputError, match=r"bad\.json"):
        load_json(bad, Line)
    with pytest.raises(InputError, match="is not JSON"):
        load_json_object(bad)
    with pytest.raises(InputError, match="is not TOML"):
        load_toml(bad, Line)


def test_text_that_is_not_utf8_is_an_input_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_bytes(b'{"x": "\xff\xfe\xff"}')
    with pytest.raises(InputError):
        load_json_object(bad)
    with pytest.raises(InputError):
        load_toml_object(bad)


@pytest.mark.parametrize("text", ["[1]", "3", '"text"', "null"])
def test_a_json_object_is_an_object(tmp_path: Path, text: str) -> None:
    file = tmp_path / "value.json"
    file.write_text(text)
    with pytest.raises(InputError, match="not an object"):
        load_json_object(file)


def test_a_repeated_key_is_refused_at_any_depth(tmp_path: Path) -> None:
    file = tmp_path / "twice.json"
    file.write_text('{"a": {"b": 1, "b": 2}, "c": 1}')
    with pytest.raises(InputError, match="b: is given twice"):
        load_json_object(file)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_an_input_error(tmp_path: Path, opening: str) -> None:
    file = tmp_path / "deep.json"
    file.write_text(f'{{"a": {opening * 100_000}')
    with pytest.raises(InputError):
        load_json_object(file)
    toml = tmp_path / "deep.toml"
    toml.write_text("a = " + "[" * 100_000)
    with pytest.raises(InputError):
        load_toml_object(toml)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match=r"did you mean .*plan\.json"):
        read_text(tmp_path / "plans.json")
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path / "absent" / "plan.json")


def test_only_plain_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, Path("/dev/zero")):
        with pytest.raises(InputError, match="a file was expected"):
            read_text(path)
    with pytest.raises(InputError):
        read_text(Path("a\0b"))
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(InputError, match="at most"):
        read_text(huge)


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder" / "plan.json"
    write_atomic(target, "first\n")
    assert target.read_text() == "first\n"

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="No space left"):
        write_atomic(target, "second\n")
    assert target.read_text() == "first\n"
    assert [path.name for path in target.parent.iterdir()] == ["plan.json"]


def test_writing_where_a_file_is_the_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "plan.json", "text")


def test_data_that_json_cannot_hold_is_an_input_error() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for data in ({"points": {1, 2}}, {"points": deep}):
        with pytest.raises(InputError):
            decode(Line, data, source="test")
    assert json.loads(to_json(LINE))["closed"] is True
