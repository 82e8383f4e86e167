"""What a profile has measured so far, in a file beside the one it will be: FILE.partial, JSON lines.

The first line says of which stack and models (and a later one, where another command went on with others).
Each other line is the reading of one case, written as it comes, so that whatever ends the process costs the
case that it was at. One process writes at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.profile.merge import FIELDS, Sample, Stack
from runtime.profiler.profile_cases import Reading

RECORD_SCHEMA = 1
LOCK_TRIES, LOCK_PAUSE_S = 10, 0.1
"""A second in all: children of a profile that was killed end within it."""


@frozen
class Header:
    """Of what the readings are: they are taken again for any other.

    `models` are digests by name, since cases name a model only; `quick` readings are of few runs.
    """

    record_schema: int
    stack: Stack
    quick: bool
    models: dict[str, str]

    def differences(self, other: Header) -> list[str]:
        """In what another differs, both values named. Models that only one has are no difference."""
        found = self.stack.differences(other.stack)
        if self.quick != other.quick:
            usual = {True: "--quick", False: "not --quick"}
            found.append(f"{usual[self.quick]} against {usual[other.quick]}")
        shared = sorted(self.models.keys() & other.models.keys())
        return found + [
            f"model {name}, digest {self.models[name][-8:]} against {other.models[name][-8:]}"
            for name in shared
            if self.models[name] != other.models[name]
        ]


class Record:
    """The open file: the readings that it had, and the place of those that come.

    Use `open_record`; `close` keeps the file, `remove` does not.
    """

    def __init__(self, path: Path, handle: int, readings: dict[str, dict[str, Reading]]) -> None:
        self.path, self.readings = path, readings
        self._handle: int | None = handle
        self.whole = False  # whether all was measured that should be
        self.kept = sum(len(cases) for cases in readings.values())

    def add(self, family: str, case: str, reading: Reading) -> None:
        """Writes a reading."""
        line: dict[str, Any] = {"family": family, "case": case, "skipped": reading.skipped}
        line["samples"] = [[FIELDS[type(sample)], encode(sample)] for sample in reading.samples]
        assert self._handle is not None, "the record is closed"
        _append(self._handle, line)
        self.readings.setdefault(family, {})[case] = reading
        self.kept += 1

    def measured(self) -> list[str]:
        """The cases that have samples, as `family: case`."""
        return [
            f"{family}: {case}"
            for family, cases in self.readings.items()
            for case, reading in cases.items()
            if not reading.skipped
        ]

    def close(self) -> None:
        """Ends writing. An empty record is not kept."""
        if self._handle is None:
            return
        if self.kept == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None

    def remove(self) -> None:
        """The profile is written: the record has done its part."""
        self.path.unlink(missing_ok=True)
        self.close()


def open_record(path: Path, header: Header, *, replace: bool) -> Record:
    """Opens the record at `path`, new or with what an interrupted profile left.

    Raises InputError where it is another's: of another stack, other models of these names, or in use.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        fault = f"cannot be written: {error.strerror}."
        fix = "name a file by -o beside which one can be made"
        raise InputError(Problem(where=str(path), fault=fault, fix=fix)) from None
    if not _locked(handle):
        os.close(handle)
        fix = "wait for it, or name another file by -o"
        raise InputError(Problem(where=str(path), fault="another plan profile is writing it.", fix=fix))
    try:
        return Record(path, handle, _begin(path, handle, header, replace=replace))
    except BaseException:
        os.close(handle)
        raise


def _locked(handle: int) -> bool:
    """Whether the file is this process's alone. Children of one that was killed hold it a moment longer."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        except OSError:  # a file system without locks
            return True
        else:
            return True
    return False


def _begin(path: Path, handle: int, header: Header, *, replace: bool) -> dict[str, dict[str, Reading]]:
    """The readings in the file, which is ready for more after it; a last line that was cut off is dropped."""
    content = os.pread(handle, os.fstat(handle).st_size, 0)
    whole = content[: content.rfind(b"\n") + 1]
    if replace or not whole:
        os.ftruncate(handle, 0)
        _append(handle, encode(header))
        return {}
    os.ftruncate(handle, len(whole))
    readings: dict[str, dict[str, Reading]] = {}
    known: dict[str, str] = {}
    for number, line in enumerate(_lines(path, whole), 1):
        source = f"{path}: line {number}"
        try:
            if number == 1 or "record_schema" in line:
                found = decode(Header, line, source=source)
                _check(path, found, header)
                known |= found.models
            else:
                readings.setdefault(line["family"], {})[line["case"]] = _reading(line, source)
        except (KeyError, TypeError, ValueError):
            raise _unreadable(path, number) from None
    if not header.models.keys() <= known.keys():
        _append(handle, encode(header))
    return readings


def _check(path: Path, found: Header, wanted: Header) -> None:
    differences = found.differences(wanted)
    if differences:
        fault = f"is of an interrupted profile of another kind: {'; '.join(differences)}."
        fix = "finish that one first, name another file by -o, or drop it by --replace"
        raise InputError(Problem(where=str(path), fault=fault, fix=fix))


def _lines(path: Path, content: bytes) -> list[Any]:
    lines = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise _unreadable(path, number) from None
    return lines


def _unreadable(path: Path, number: int) -> InputError:
    fault = f"line {number} is not a reading of a profile."
    return InputError(Problem(where=str(path), fault=fault, fix="drop the file by --replace"))


def _reading(line: dict[str, Any], source: str) -> Reading:
    nouns: dict[str, type[Sample]] = {name: kind for kind, name in FIELDS.items()}
    samples = [decode(nouns[name], data, source=source) for name, data in line["samples"]]
    return Reading(samples=tuple(samples), skipped=str(line["skipped"]))


def _append(handle: int, line: Any) -> None:
    """One write a line: what a killed process leaves is whole lines, but perhaps the last."""
    data = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    end = os.lseek(handle, 0, os.SEEK_END)
    while data:
        written = os.pwrite(handle, data, end)
        data, end = data[written:], end + written
