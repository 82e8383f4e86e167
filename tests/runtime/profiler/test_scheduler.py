"""The scheduler of a profile, on families of which the truth is known and nothing is measured."""

from __future__ import annotations

import math
import random
import signal
import statistics
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("torch")

from planner.foundation.decode import encode
from planner.profile.profile import CommSample, Op
from runtime.profiler.profile_cases import Adaptive, Reading, readings
from runtime.profiler.scheduler import FAILURES, Scheduler
from runtime.profiler.timing import ChildFailed, Emit, run_children

LATENCY_S, BYTES_PER_S, KNEE_BYTES = 2e-5, 2e10, 2.0e6


def truth_s(size: float) -> float:
    """Latency, bandwidth, and a bend in the middle: where the curve is hard to tell from its ends."""
    return LATENCY_S + size / BYTES_PER_S * (1 + 2 / (1 + (size / KNEE_BYTES) ** 2))


@dataclass(frozen=True)
class Size:
    bytes: int

    def label(self) -> str:
        return f"{self.bytes} bytes"


@dataclass
class Curve:
    """Samples of `truth_s` with noise, predicted by lines through neighbours in logarithms."""

    noise: float = 0.0
    sizes: tuple[int, ...] = tuple(round(2 ** (10 + step / 4)) for step in range(81))
    name: str = "curve"
    asked: list[list[int]] = field(default_factory=list)

    def cases(self) -> Sequence[Size]:
        return [Size(size) for size in self.sizes]

    def seeds(self) -> Sequence[Size]:
        return [Size(self.sizes[0]), Size(self.sizes[len(self.sizes) // 2]), Size(self.sizes[-1])]

    def together(self, case: Size) -> Hashable:
        return None

    def measure(self, cases: Sequence[Size]) -> Iterator[Reading]:
        self.asked.append([case.bytes for case in cases])
        for case in cases:
            yield Reading(samples=(self.sample(case.bytes),))

    def sample(self, size: int) -> CommSample:
        seconds = truth_s(size) * (1 + random.Random(size).uniform(-self.noise, self.noise))
        return CommSample(
            op=Op.ALL_REDUCE, ranks=2, groups=1, bytes=size, seconds=seconds, spread=0.0, samples=1
        )

    def uncertainty(self, case: Size, samples: Sequence[CommSample]) -> float:
        """How far the prediction moves when either neighbour is left out."""
        near = sorted(samples, key=lambda s: abs(math.log(s.bytes / case.bytes)))[:4]
        if len(near) < 3:
            return math.inf
        whole = predicted_s(samples, case.bytes)
        without = [predicted_s([s for s in samples if s is not one], case.bytes) for one in near]
        return max(abs(seconds / whole - 1) for seconds in without)

    def held_out_error(self, samples: Sequence[CommSample]) -> float | None:
        inner = sorted(samples, key=lambda s: s.bytes)[1:-1]
        errors = [
            abs(predicted_s([o for o in samples if o is not s], s.bytes) / s.seconds - 1) for s in inner
        ]
        return statistics.fmean(errors) if len(errors) > 2 else None


def predicted_s(samples: Sequence[CommSample], size: float) -> float:
    known = sorted(samples, key=lambda s: s.bytes)
    high = next((i for i, s in enumerate(known) if s.bytes >= size), len(known) - 1)
    high = min(max(high, 1), len(known) - 1)
    a, b = known[high - 1], known[high]
    share = math.log(size / a.bytes) / math.log(b.bytes / a.bytes)
    return math.exp((1 - share) * math.log(a.seconds) + share * math.log(b.seconds))


class Notes:
    """What a watcher was told."""

    def __init__(self) -> None:
        self.readings: dict[tuple[str, str], Reading] = {}
        self.left: list[tuple[int, float | None]] = []

    def settled(self, family: str, case: str, reading: Reading) -> None:
        assert (family, case) not in self.readings, "no case is measured twice"
        self.readings[family, case] = reading

    def ahead(self, cases: int, left_s: float | None) -> None:
        self.left.append((cases, left_s))


def taken_error(curve: Curve, samples: Sequence[CommSample]) -> float:
    """The true error of predictions over the whole grid."""
    return statistics.fmean(abs(predicted_s(samples, size) / truth_s(size) - 1) for size in curve.sizes)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("target", [0.2, 0.05, 0.03])
def test_it_stops_at_the_target_with_fewer_cases(noise: float, target: float) -> None:
    curve, notes = Curve(noise=noise), Notes()
    assert isinstance(curve, Adaptive)
    scheduler = Scheduler([curve], target, math.inf, notes)
    assert scheduler.run()
    (course,) = scheduler.courses
    error = course.error()
    assert error is not None and error <= target
    assert len(notes.readings) == course.taken == len(course.samples) < len(curve.sizes) / 2
    # Honest: what is said of held-out samples bounds what is true of the cases that were not measured.
    assert taken_error(curve, [s for s in course.samples if isinstance(s, CommSample)]) <= target + noise


def test_a_lower_target_measures_more() -> None:
    counts = []
    for target in (0.2, 0.05, 0.01):
        scheduler = Scheduler([Curve()], target, math.inf, Notes())
        scheduler.run()
        counts.append(scheduler.courses[0].taken)
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_the_uncertain_is_measured_where_the_curve_bends() -> None:
    """More samples lie in the decade and a half around the bend than in one where the curve is flat."""
    curve = Curve()
    scheduler = Scheduler([curve], 0.02, math.inf, Notes())
    scheduler.run()
    logs = [
        math.log10(s.bytes / KNEE_BYTES) for s in scheduler.courses[0].samples if isinstance(s, CommSample)
    ]
    bend = sum(abs(log) <= 0.75 for log in logs)
    flat = sum(-3 <= log <= -1.5 for log in logs)
    assert bend > flat


def test_noise_above_the_target_measures_everything_and_says_so() -> None:
    scheduler = Scheduler([Curve(noise=0.3)], 0.01, math.inf, Notes())
    assert scheduler.run()  # nothing is left to measure
    (fit,) = [course.fit() for course in scheduler.courses]
    assert fit.taken == fit.cases == 81 and fit.error is not None and fit.error > 0.01


class Clock:
    """Seconds that pass only when somebody asks."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def test_the_time_limit_ends_it_with_what_there_is() -> None:
    notes = Notes()
    scheduler = Scheduler([Curve(), Curve(name="other")], 1e-9, 60.0, notes, clock=Clock(1.0))
    assert not scheduler.run()
    assert 0 < len(notes.readings) < 60
    cases, left_s = zip(*notes.left, strict=True)
    assert list(cases) == sorted(cases, reverse=True) and left_s[0] is None
    assert all(after is not None and after <= 60 for after in left_s[1:])
    assert scheduler.over() and scheduler.courses[0].error() is not None


@dataclass
class Endless:
    """A family whose second case never ends, in a process of its own."""

    name: str = "endless"

    def cases(self) -> Sequence[Size]:
        return [Size(1), Size(2), Size(3)]

    def together(self, case: Size) -> Hashable:
        return None

    def measure(self, cases: Sequence[Size]) -> Iterator[Reading]:
        def body(rank: int, emit: Emit) -> None:
            emit(encode(Curve().sample(1)))
            signal.pause()

        return readings(CommSample, run_children(body))


def own_children() -> set[str]:
    """The processes that this one has started and that still run."""
    tasks = Path("/proc/self/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


def test_a_case_that_is_at_work_when_time_is_up_is_ended() -> None:
    notes, before = Notes(), own_children()
    scheduler = Scheduler([Endless()], 0.05, 2.0, notes)
    assert not scheduler.run() and scheduler.over()
    assert [case for _, case in notes.readings] == ["1 bytes"]
    assert scheduler.unsettled() == ["endless: 2 bytes", "endless: 3 bytes"]
    assert own_children() <= before


def test_families_farthest_from_the_target_come_first() -> None:
    rough, smooth = Curve(noise=0.3, name="rough"), Curve(name="smooth")
    notes = Notes()
    Scheduler([smooth, rough], 0.02, 400.0, notes, clock=Clock(1.0)).run()
    names = [family for family, _ in notes.readings]
    assert names.count("rough") > names.count("smooth")


@dataclass
class Mortal:
    """A family whose processes die at some cases."""

    deadly: frozenset[int]
    name: str = "mortal"
    count: int = 8

    def cases(self) -> Sequence[Size]:
        return [Size(size) for size in range(self.count)]

    def together(self, case: Size) -> Hashable:
        return case.bytes // 4

    def measure(self, cases: Sequence[Size]) -> Iterator[Reading]:
        assert len({self.together(case) for case in cases}) == 1
        for case in cases:
            if case.bytes in self.deadly:
                raise ChildFailed("was killed by SIGKILL")
            yield Reading(samples=(Curve().sample(case.bytes + 1),))


def test_a_death_costs_one_case() -> None:
    notes = Notes()
    assert Scheduler([Mortal(frozenset({1, 2, 7}))], 0.05, math.inf, notes).run()
    skipped = {case for (_, case), reading in notes.readings.items() if reading.skipped}
    assert skipped == {"1 bytes", "2 bytes", "7 bytes"} and len(notes.readings) == 8


def test_deaths_without_end_are_given_up() -> None:
    notes = Notes()
    Scheduler([Mortal(frozenset(range(40)), count=40)], 0.05, math.inf, notes).run()
    reasons = [reading.skipped for reading in notes.readings.values()]
    assert len(reasons) == 40 and reasons.count("the process was killed by SIGKILL") == 10 * FAILURES


def test_what_an_interrupted_profile_has_is_not_taken_again() -> None:
    first, whole = Notes(), Notes()
    Scheduler([Mortal(frozenset({2}))], 0.05, 4.0, first, clock=Clock(1.0)).run()
    assert 0 < len(first.readings) < 8
    done = {"mortal": {case: reading for (_, case), reading in first.readings.items()}}
    scheduler = Scheduler([Mortal(frozenset({2}))], 0.05, math.inf, whole, done)
    assert scheduler.run()
    assert len(whole.readings) == 8 - len(first.readings)
    assert scheduler.courses[0].taken == 7
