"""What the profiler is made of: families of cases, each measured in processes of its own.

A family is a kind of measurement: the layers of one model, collectives, constants of the host. Its cases are
hashable and have a label, unique in the family, by which an interrupted profile knows what it has. The
profiler asks for `cases()` once, hands some of them (of one `together`) to `measure`, and keeps the samples
of each reading, whatever nouns they are (`planner.profile.merge.FIELDS` says where they go in a Profile).

A family that can predict its samples from each other is `Adaptive`: the profiler takes its `seeds` first,
then always cases that it is least sure of, until both `held_out_error` and the mean `uncertainty` of the
cases left are under the target. Any other family is measured whole. To plug one in, add it to
`runtime.profiler.profiler.families_of`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from planner.foundation.decode import decode
from planner.foundation.frozen import frozen
from planner.profile.merge import Sample


class Case(Hashable, Protocol):
    """One thing to measure: a frozen value."""

    def label(self) -> str:
        """A short name for progress, messages and the record; no two cases of a family share one."""


C = TypeVar("C", bound=Case)


@frozen
class Reading:
    """What came of one case: its samples (often one), or why it was skipped."""

    samples: tuple[Sample, ...] = ()
    skipped: str = ""

    def dated(self, now: str) -> Reading:
        """The same, with the time at which the samples were taken, where their nouns have a place for it."""
        dated = (replace(s, taken=now) if hasattr(s, "taken") else s for s in self.samples)
        return Reading(samples=tuple(dated), skipped=self.skipped)


class Family(Protocol[C]):
    """A kind of measurement and its cases."""

    @property
    def name(self) -> str:
        """Unique among the families of a profile, and the same when it is taken again."""

    def cases(self) -> Sequence[C]:
        """Every case that it may measure, the most useful first should time run out."""

    def together(self, case: C) -> Hashable:
        """Cases of one value may share a process (one fake world, say)."""

    def measure(self, cases: Sequence[C]) -> Iterator[Reading]:
        """One reading a case, in this order, in child processes
        (`runtime.profiler.timing.run_children`).

        When a child dies, ChildFailed comes out: it costs the case whose reading is next, and the profiler
        goes on with those after it. Too little memory is a reading that says so (`skipped`).
        """


@runtime_checkable
class Adaptive(Family[C], Protocol[C]):
    """A family that predicts samples from samples. All errors are relative: 0.05 is 5 %.

    `samples` are all that the family has taken so far, in the order in which they came.
    """

    def seeds(self) -> Sequence[C]:
        """The corners: cases between which all others lie. They are always taken."""

    def uncertainty(self, case: C, samples: Sequence[Any]) -> float:
        """How far the prediction of this case's times may be off, `inf` where there is none.

        For example how far predictions of it differ when one sample at a time is left out.
        """

    def held_out_error(self, samples: Sequence[Any]) -> float | None:
        """The mean error with which samples are predicted from the others; None from too few.

        Corners that only extrapolation reaches are left out of the mean.
        """


def readings(kind: type[Any], messages: Iterator[dict[str, Any]]) -> Iterator[Reading]:
    """Readings from messages, one a case: a sample of `kind`, encoded, or `{"skipped": why}`."""
    for message in messages:
        if "skipped" in message:
            yield Reading(skipped=message["skipped"])
        else:
            yield Reading(samples=(decode(kind, message, source="a measuring process"),))
