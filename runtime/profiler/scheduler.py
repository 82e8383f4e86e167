"""Which cases a profile takes, in which order, and when it has enough.

First every family's seeds (all cases of one that is not adaptive), in the order of the families. Then, again
and again, the adaptive family that is farthest above the target measures a round of cases, several because a
process costs more than a case on an accelerator: the one that it is least sure of, and others drawn by how
unsure it is of each (the next in rank lie beside the first, and would tell the same again). A family is done
when both its held-out error and its mean uncertainty of the cases left are at the target (samples that lie
close together predict each other well, whatever lies between others), or when none is left. All end with the
time.

What a profile has measured so far, in a file beside the one it will be: FILE.partial, JSON lines.

The first line says of which stack and models (and a later one, where another command went on with others).
Each other line is the reading of one case, written as it comes, so that whatever ends the process costs the
case that it was at. One process writes at a time.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from planner.foundation.decode import decode, encode
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.profile.merge import FIELDS, Platform, Sample
from planner.profile.profile import FamilyFit
from runtime.profiler.profile_cases import Adaptive, Case, Family, Reading
from runtime.profiler.timing import ChildFailed, TimeUp, ended_at

FAILURES = 3
"""Processes that fail one after another at their first case: the rest would fail as they did."""

ROUND_SHARE, ROUND_LEAST, ROUND_MOST = 8, 4, 8
"""An eighth of the cases left, 4 to 8, is measured before certainty is asked again: on a CPU, processes for
one case each made a profile that needed all its 80 cases a fifth dearer."""

UNKNOWN = 10.0
"""The weight in the draw of a case that cannot be predicted: an error of a factor of ten."""


class Watcher(Protocol):
    """Who is told what comes of each case."""

    def settled(self, family: str, case: str, reading: Reading) -> None:
        """A case was measured or skipped."""

    def ahead(self, cases: int, left_s: float | None) -> None:
        """So many cases are left at most, and so many seconds (None: nothing was timed yet)."""


class Course:
    """One family on its way: what it has taken and what is left of it."""

    def __init__(self, family: Family[Any], done: Mapping[str, Reading]) -> None:
        self.family = family
        cases = list(family.cases())
        self.cases = len(cases)
        self.left = [case for case in cases if case.label() not in done]
        earlier = [done[case.label()] for case in cases if case.label() in done]
        self.samples: list[Sample] = [sample for reading in earlier for sample in reading.samples]
        self.taken = sum(not reading.skipped for reading in earlier)
        self.timed, self.spent_s = 0, 0.0
        self._error: tuple[float | None] | None = None  # what was asked since the last case was settled
        self._round: tuple[float, list[Case]] | None = None

    def seeds(self) -> list[Case]:
        """What is measured of it whatever comes."""
        if not isinstance(self.family, Adaptive):
            return list(self.left)
        wanted = set(self.family.seeds())
        return [case for case in self.left if case in wanted]

    def error(self) -> float | None:
        """The held-out error; None where the family does not predict, or cannot yet."""
        if self._error is None:
            family = self.family
            self._error = (family.held_out_error(self.samples) if isinstance(family, Adaptive) else None,)
        return self._error[0]

    def next_round(self, target: float) -> list[Case]:
        """The least certain case and others like it; empty when the family is done."""
        if self._round is None or self._round[0] != target:
            self._round = target, self._next_round(target)
        return self._round[1]

    def _next_round(self, target: float) -> list[Case]:
        if not self.left or not isinstance(self.family, Adaptive):
            return []
        doubts = [self.family.uncertainty(case, self.samples) for case in self.left]
        error = self.error()
        if error is not None and error <= target and statistics.fmean(doubts) <= target:
            return []
        first = self.left[doubts.index(max(doubts))]
        kind = self.family.together(first)
        others = [
            (case, doubt)
            for case, doubt in zip(self.left, doubts, strict=True)
            if case != first and self.family.together(case) == kind
        ]
        count = max(ROUND_LEAST, min(len(self.left) // ROUND_SHARE, ROUND_MOST))
        return [first, *_drawn(others, count - 1, seed=len(self.samples))]

    def settle(self, case: Case, reading: Reading, spent_s: float) -> None:
        """Takes what came of a case."""
        self.left.remove(case)
        self.samples += reading.samples
        self.taken += not reading.skipped
        self.timed, self.spent_s = self.timed + 1, self.spent_s + spent_s
        self._error = self._round = None

    def fit(self) -> FamilyFit:
        """How well it is known."""
        return FamilyFit(family=self.family.name, cases=self.cases, taken=self.taken, error=self.error())


class Scheduler:
    """Measures families until each is known to `target` or `time_limit_s` is over."""

    def __init__(
        self,
        families: Sequence[Family[Any]],
        target: float,
        time_limit_s: float,
        watcher: Watcher,
        done: Mapping[str, Mapping[str, Reading]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`done` are readings of an earlier, interrupted profile, by family and label of the case."""
        self.courses = [Course(family, (done or {}).get(family.name, {})) for family in families]
        self.target, self.watcher, self.clock = target, watcher, clock
        self.ends = clock() + time_limit_s

    def run(self) -> bool:
        """Measures. Whether everything was: False where the time ended it."""
        self._tell()
        with ended_at(self.ends):
            for course in self.courses:
                for _, alike in itertools.groupby(course.seeds(), key=course.family.together):
                    self._measure(course, list(alike))
            while not self.over() and (found := self._farthest()):
                self._measure(*found)
        return not any(course.seeds() for course in self.courses) and self._farthest() is None

    def over(self) -> bool:
        """Whether the time is up."""
        return self.clock() >= self.ends

    def unsettled(self) -> list[str]:
        """Labels of cases that should have been measured, and for which there was no time."""
        return [f"{c.family.name}: {case.label()}" for c in self.courses for case in c.seeds()]

    def _farthest(self) -> tuple[Course, list[Case]] | None:
        """The course with the largest error that is not done, and its next cases."""
        found = [(course, cases) for course in self.courses if (cases := course.next_round(self.target))]
        return max(found, key=lambda each: _or_infinite(each[0].error()), default=None)

    def _measure(self, course: Course, cases: list[Case]) -> None:
        """These cases, in as many processes as die on the way; the one at work when time is up is lost."""
        failures = 0
        while cases and not self.over():
            settled, failed = self._in_one_process(course, cases)
            failures = failures + 1 if failed and settled == 1 else int(failed)
            cases = cases[settled:]
            if cases and failures == FAILURES:
                for case in cases:
                    self._settle(course, case, Reading(skipped=f"not tried: {FAILURES} in a row failed"), 0.0)
                return

    def _in_one_process(self, course: Course, cases: Sequence[Case]) -> tuple[int, bool]:
        """How many cases are settled, measured or skipped, and whether a failure ended it."""
        settled, since = 0, self.clock()
        readings = course.family.measure(cases)
        try:
            for case in cases:
                if self.over():
                    return settled, False
                reading = next(readings, None) or Reading(skipped="its process reported nothing")
                now = self.clock()
                self._settle(course, case, reading, now - since)
                settled, since = settled + 1, now
            next(readings, None)  # lets the processes end by themselves
        except ChildFailed as failure:
            if settled == len(cases):
                return settled, False
            self._settle(course, cases[settled], Reading(skipped=f"the process {failure}"), 0.0)
            return settled + 1, True
        except TimeUp:
            return settled, False
        finally:
            _close(readings)
        return settled, False

    def _settle(self, course: Course, case: Case, reading: Reading, spent_s: float) -> None:
        course.settle(case, reading, spent_s)
        self._tell()
        self.watcher.settled(course.family.name, case.label(), reading)

    def _tell(self) -> None:
        self.watcher.ahead(sum(len(course.left) for course in self.courses), self._left_s())

    def _left_s(self) -> float | None:
        """Seconds that all cases left would take, at most those of the limit."""
        timed = sum(course.timed for course in self.courses)
        if not timed:
            return None
        usual_s = sum(course.spent_s for course in self.courses) / timed
        means = [(len(c.left), c.spent_s / c.timed if c.timed else usual_s) for c in self.courses]
        return max(0.0, min(self.ends - self.clock(), sum(count * mean_s for count, mean_s in means)))


def _drawn(cases: Sequence[tuple[Case, float]], count: int, seed: int) -> list[Case]:
    """`count` different cases, each drawn in proportion to its weight (Efraimidis and Spirakis, 2006)."""
    source = random.Random(seed)
    keyed = [
        (source.random() ** (1 / weight), index)
        for index, (_, doubt) in enumerate(cases)
        if (weight := min(doubt, UNKNOWN)) > 0
    ]
    return [cases[index][0] for _, index in sorted(keyed, reverse=True)[:count]]


def _or_infinite(error: float | None) -> float:
    return math.inf if error is None else error


def _close(readings: Iterator[Reading]) -> None:
    """Ends the processes behind an iterator that is not read to its end."""
    close = getattr(readings, "close", None)
    if close is not None:
        close()


RECORD_SCHEMA = 1
LOCK_TRIES, LOCK_PAUSE_S = 10, 0.1
"""A second in all: children of a profile that was killed end within it."""


@frozen
class Header:
    """Of what the readings are: they are taken again for any other.

    `models` are digests by name, since cases name a model only; `quick` readings are of few runs.
    """

    record_schema: int
    stack: Platform
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
