"""Shapes that are looked at before any is searched: of every schedule those that promise most.

Bounds of schedules differ in how close they are, and know memory as a mean over ranks. About how long even
stages take (BaseBound.even_s) tells the best apart: a good plan from the start rules out more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from planner.foundation.frozen import replaced
from planner.search.bounds import schedule_factor
from planner.search.even_stages import even_factor
from planner.search.shape_queue import Candidate, Frontier
from planner.search.space import Space
from planner.strategy.strategy import Degrees, Schedule

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints

EACH = 2
"""Shapes of each schedule; without a pipeline all that are looked at, for which one recipe is found."""
LOOKED_AT = 16
"""Of so many that promise most the first of each kind of pipeline: others differ in how messages are sent or
state is shared out, and have nearly its time."""
PROMISING = 1.3
"""Times the least that is promised within which a schedule's first shape is looked at."""


def first_shapes(
    space: Space,
    quick_s: Floats,
    promised: Callable[[int], Candidate | None],
    expired: Callable[[], bool],
    within: float = PROMISING,
) -> list[int]:
    """Numbers of shapes of a space whose quick bounds are `quick_s`, by what they promise.

    `promised` gives a shape, by its number, as the candidate of about its time, or None where it cannot fit.
    Schedules whose first shape promises more than `within` times the least have none.
    """
    import numpy as np

    schedules, ratios = _pipes(space)
    numbers, least_s = np.arange(len(quick_s)), quick_s * ratios
    each: list[list[Candidate]] = []
    for schedule in sorted(set(schedules.tolist())):
        own = schedules == schedule
        promising = Frontier(least_s[own], numbers[own], promised, expired)
        each.append(list(_unlike(promising) if schedule else islice(promising, LOOKED_AT)))
    best_s = min((kind[0].bound_s for kind in each if kind), default=float("inf"))
    found = [candidate for kind in each for candidate in kind if candidate.bound_s <= within * best_s]
    return [candidate.order for candidate in sorted(found)]


def _unlike(promising: Frontier) -> Iterator[Candidate]:
    """The first of each of the first few kinds of pipeline."""
    known: set[tuple[object, ...]] = set()
    for candidate in islice(promising, LOOKED_AT):
        d = candidate.degrees
        key = d.tp, d.cp, d.ep, d.pp, d.chunks, d.micro_batch
        if key not in known:
            known.add(key)
            yield candidate
        if len(known) == EACH:
            return


def _pipes(space: Space) -> tuple[Ints, Floats]:
    """The schedule of each shape as a number, 0 without a pipeline; and what even stages take there over the
    least that any do."""
    import numpy as np

    numbers = {schedule: number for number, schedule in enumerate(Schedule, 1)}
    known: dict[tuple[Schedule, int, int, int], float] = {}

    def ratio(base: Degrees, schedule: Schedule, chunks: int) -> float:
        key = schedule, chunks, base.pp, base.num_micro_batches
        if key not in known:
            degrees = replaced(base, schedule=schedule, chunks=chunks)
            known[key] = even_factor(degrees) / schedule_factor(degrees)
        return known[key]

    pipes = [
        (0 if base.pp == 1 else numbers[schedule], ratio(base, schedule, chunks))
        for base, pipes in zip(space.bases, space.pipes, strict=True)
        for schedule, chunks in pipes
    ]
    schedules, ratios = np.asarray(pipes).reshape(-1, 2).T
    return schedules.astype(np.int64), ratios
