"""Repetition: the runs of equal neighbours in a sequence of keys, such as the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_PERIOD = 512
"""Longest period that is looked for, so that a sequence of tens of thousands of keys takes seconds."""

Usable = Callable[[int, int], bool]
Misfit = Callable[[int, int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`count` repetitions of `period` neighbours, from index `first` on."""

    first: int
    period: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.period * self.count


def _anything(first: int, end: int) -> bool:
    return True


def _nowhere(first: int, period: int) -> float:
    return 0.0


def longest_run(
    keys: Sequence[str],
    first: int,
    end: int,
    *,
    usable: Usable = _anything,
    misfit: Misfit = _nowhere,
) -> Run | None:
    """The repetition within [first, end) that covers most, or None where nothing repeats.

    Of equal coverage, the shortest period counts, then the phase with the least `misfit(first, period)`.
    `usable(first, end)` says whether a period may be repeated at all.
    """
    best: tuple[int, int, float, int] | None = None
    found: Run | None = None
    for period in range(1, min((end - first) // 2, MOST_PERIOD) + 1):
        for start, length in _stretches(keys, first, end, period):
            count = 1 + length // period
            for phase in range(start, start + length % period + 1):
                rank = (-count * period, period, misfit(phase, period), phase)
                if (best is None or rank < best) and usable(phase, phase + period):
                    best, found = rank, Run(first=phase, period=period, count=count)
    return found


def _stretches(keys: Sequence[str], first: int, end: int, period: int) -> list[tuple[int, int]]:
    """(start, length) of the stretches, at least a period long, whose keys recur `period` later."""
    stretches, length = [], 0
    for index in range(first, end - period + 1):
        if index < end - period and keys[index] == keys[index + period]:
            length += 1
            continue
        if length >= period:
            stretches.append((index - length, length))
        length = 0
    return stretches


def runs(
    keys: Sequence[str],
    *,
    usable: Usable = _anything,
    misfit: Misfit = _nowhere,
) -> list[Run]:
    """The sequence as runs in order, each as long as can be; what does not repeat has count 1.

    A period that itself repeats something more often than it is repeated is taken apart: of four times
    (five local layers, one global) come local x 5, global x 1, and so on.
    """

    def split(first: int, end: int) -> list[Run]:
        if first == end:
            return []
        run = longest_run(keys, first, end, usable=usable, misfit=misfit)
        if run is None:
            return [Run(first=index, period=1, count=1) for index in range(first, end)]
        inner = longest_run(keys, run.first, run.first + run.period, usable=usable)
        if inner is not None and inner.count > run.count:
            bounds = range(run.first, run.end, run.period)
            middle = [part for begin in bounds for part in split(begin, begin + run.period)]
        else:
            middle = [run]
        return [*split(first, run.first), *middle, *split(run.end, end)]

    return split(0, len(keys))
