"""Shapes in order of their bound, each modelled only when none that is left can come before it.

Modelling a shape takes many times as long as its quick bound, which lies below its bound. So a heap holds
those that are modelled, beside the others in order of their quick bound: the least is taken, and where that
is a quick bound its shape is modelled and put on the heap with its bound.

The shapes of a search whose gap stayed open, and the least of their bounds.

What bounds a shape beyond what its search said (ShapeSearch.bound) takes longer than to see that it cannot be
ruled out: it is worked out only for shapes that may have the least bound of all.

Shapes that are looked at before any is searched: of every schedule those that promise most.

Bounds of schedules differ in how close they are, and know memory as a mean over ranks. About how long even
stages take (BaseBound.even_s) tells the best apart: a good plan from the start rules out more.

How far a search has come: the best step time, and how long ago it was found.

What rules out shapes, how many each rule does, and why none may be left.

Shapes as candidates of a search: their costs, what is safe on their devices, and their bound.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from planner.cost.evaluate import CostModel
from planner.cost.stage.peak_memory import MemoryLimits, memory_limits
from planner.cost.stage.stage import LayoutModel
from planner.foundation.frozen import replaced
from planner.foundation.units import format_bytes
from planner.job.problem import PlanningProblem
from planner.search.bounds.layout_bounds import BaseBound, even_factor, least_state_bytes, schedule_factor
from planner.search.layout_search import Found, ShapeSearch
from planner.search.programme.stage_options import RecipeBook
from planner.search.programme.stages import StageSpace
from planner.search.space import Space
from planner.strategy.estimate import Rejected
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.strategy import Degrees, Schedule

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints


DUST = 1e-9
"""Share by which a quick bound may exceed the bound, by adding floats in another order."""


class Candidate(NamedTuple):
    """A shape that may fit, its bound and its place among all shapes."""

    bound_s: float
    order: int
    degrees: Degrees


class Frontier:
    """Candidates by rising bound, ties in order of shapes.

    `quick_s` are the quick bounds of the shapes `numbers`; `model` gives the candidate of a shape by its
    number, or None where it cannot fit. Once time has expired none is modelled, and there is no next one.
    """

    def __init__(
        self,
        quick_s: Floats,
        numbers: Ints,
        model: Callable[[int], Candidate | None],
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        import numpy as np

        order = np.lexsort((numbers, quick_s))
        self._quick_s = quick_s[order] * (1 - DUST)
        self._numbers = numbers[order].tolist()
        self._taken, self._expired = 0, expired
        self._heap: list[Candidate] = []
        self._model, self._known = model, list[Candidate]()

    def __iter__(self) -> Iterator[Candidate]:
        index = 0
        while index < len(self._known) or self._advance():
            yield self._known[index]
            index += 1

    def _advance(self) -> bool:
        """Finds the next candidate; whether there is one."""
        while self._heap or self._taken < len(self._numbers):
            if self._expired():
                return False
            if self._taken < len(self._numbers):
                number, quick_s = self._numbers[self._taken], float(self._quick_s[self._taken])
                if not self._heap or (quick_s, number) < self._heap[0][:2]:
                    self._taken += 1
                    candidate = self._model(number)
                    if candidate is not None:
                        heapq.heappush(self._heap, candidate)
                    continue
            self._known.append(heapq.heappop(self._heap))
            return True
        return False

    @property
    def next_bound_s(self) -> float:
        """What no shape beats that did not come up yet; infinite where all did."""
        left = [float(self._quick_s[self._taken])] if self._taken < len(self._numbers) else []
        return min([*left, *(candidate.bound_s for candidate in self._heap[:1])], default=float("inf"))

    def count_unmodelled(self, least_s: float) -> int:
        """Shapes that were never modelled, of which no strategy is faster than `least_s`."""
        return int((self._quick_s[self._taken :] >= least_s).sum())


BESIDE = 4
"""Shapes whose bounds are worked out beside each other."""


class _Open(NamedTuple):
    bound_s: float
    number: int
    final: bool


class OpenShapes:
    """Shapes by number with their bounds, of which some are known to be all that can be said.

    `bounds_s` works out the bounds of some shapes, up to a step time.
    """

    def __init__(self, bounds_s: Callable[[list[int], float], list[float]]) -> None:
        self._heap: list[_Open] = []
        self._bounds_s, self._least_s = bounds_s, float("inf")

    def add(self, number: int, bound_s: float) -> None:
        """Adds a shape that may have strategies as fast as `bound_s`."""
        heapq.heappush(self._heap, _Open(bound_s, number, final=False))

    def least_s(self, most_s: float, to_beat_s: float) -> float:
        """The least bound, or `most_s` if none is less. Bounds up to `to_beat_s` are worked out.

        No further than the least that is known: others matter only where they are less.
        """
        while self._heap and self._heap[0].bound_s < most_s:
            if self._heap[0].final:
                return self._heap[0].bound_s
            asked: list[_Open] = []
            while self._heap and len(asked) < BESIDE and not self._heap[0].final:
                asked.append(heapq.heappop(self._heap))
            known = self._bounds_s([each.number for each in asked], min(to_beat_s, self._least_s))
            for each, more_s in zip(asked, known, strict=True):
                bound_s = max(each.bound_s, more_s)
                heapq.heappush(self._heap, _Open(bound_s, each.number, final=True))
                self._least_s = min(self._least_s, bound_s)
        return most_s


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


PATIENCE = 250
"""Shapes that are searched without a better plan, once the gap of one stays open below the bound of the next:
more could not close it, only find a better plan."""
WIDE = 0.1
"""Gap from which on more are searched, in proportion: the better plan is likely there."""


class Progress:
    """Of a search that began with a plan of `incumbent_s` (infinite: with none).

    A gap of `tolerance` or less may stay open.
    """

    def __init__(self, incumbent_s: float, tolerance: float) -> None:
        self.incumbent_s, self.tolerance = incumbent_s, tolerance
        self._stale = 0

    @property
    def to_beat_s(self) -> float:
        """The step time that is worth beating."""
        return self.incumbent_s * (1 - self.tolerance)

    @property
    def stale(self) -> bool:
        """Whether many shapes were searched since a better plan was found."""
        return self.incumbent_s < float("inf") and self._stale >= PATIENCE

    def spent(self, least_s: float) -> bool:
        """Whether they are as many as are worth it where no plan is faster than `least_s`."""
        gap = 1 - least_s / self.incumbent_s
        return self.stale and self._stale >= PATIENCE * gap / WIDE

    def add(self, found: Found | None) -> None:
        """Counts the search of a shape."""
        self._stale += 1
        if found is not None and found.step_time_s < self.incumbent_s:
            self.incumbent_s, self._stale = found.step_time_s, 0


class Rejections:
    """Shapes that were ruled out: their number by rule, and of each rule the first in order of shapes."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._nearest: dict[str, tuple[int, Rejected]] = {}

    def add(self, rejected: Rejected, order: int, shapes: int = 1) -> None:
        """Counts shapes that a rule rules out; `order` is the place of the first of them."""
        self.counts[rejected.rule] += shapes
        known = self._nearest.setdefault(rejected.rule, (order, rejected))
        if order < known[0]:
            self._nearest[rejected.rule] = order, rejected

    def add_made(self, rule: str, make: Callable[[], Rejected], order: int, shapes: int = 1) -> None:
        """The same, where the words are only made if they are kept."""
        known = self._nearest.get(rule)
        if known is None or order < known[0]:
            self.add(make(), order, shapes)
        else:
            self.counts[rule] += shapes

    def why_infeasible(self, problem: PlanningProblem, shapes: int) -> str:
        """What stands in the way of every shape, the rule that most break first."""
        model, cluster = problem.model.name, problem.cluster.name
        lines = [f"no feasible plan among {shapes} shapes for {model} on {cluster}."]
        for rule, (_, nearest) in sorted(
            self._nearest.items(), key=lambda item: (-self.counts[item[0]], item[1][0])
        ):
            lines.append(f"  {rule} ({self.counts[rule]}): {nearest.detail}")
            if nearest.legal:
                lines.append(f"    legal here: {nearest.legal}")
        if self.counts["memory"]:
            lines.append(
                "What would help: more devices, a larger --memory-limit, a shorter --seq, or an optimizer "
                "with less state."
            )
        return "\n".join(lines)


MEMORY = "memory"
"""The rule that shapes break which cannot fit."""


class Base(NamedTuple):
    """What the shapes of a base have in common: what is safe, their bound, their recipes."""

    limits_bytes: tuple[float, ...]
    bound: BaseBound
    books: tuple[RecipeBook, ...]


class Modeller:
    """Models shapes of one problem; those that cannot fit are added to `rejections`."""

    def __init__(self, model: CostModel, pins: FixedChoices, rejections: Rejections) -> None:
        self.model, self.pins, self.rejections = model, pins, rejections
        self._least: dict[tuple[object, ...], float] = {}
        self._limits: dict[int, MemoryLimits] = {}

    def least_bytes(self, base: Degrees) -> float:
        """The mean of weights, gradients and state over ranks, which shapes of one sharding share."""
        d = base
        key = d.tp, d.ep, d.etp, d.cp, d.pp, d.zero, d.dp_shard, d.dp_replicate, d.num_micro_batches > 1
        if key not in self._least:
            self._least[key] = least_state_bytes(self.model.layers, base, self.pins.offloaded)
        return self._least[key]

    def base(self, degrees: Degrees) -> Base:
        """What shapes that differ in schedule and chunks alone have in common."""
        shapes, options = self.model.rank_layouts(degrees), self.pins.recomputes
        kinds = {id(shape): shape for shape in shapes}
        limits = {key: self._safe_bytes(shape) for key, shape in kinds.items()}
        books = {key: RecipeBook(shape, options, self.pins.offloaded) for key, shape in kinds.items()}
        each = tuple(limits[id(shape)] for shape in shapes)
        bound = BaseBound(self.model, shapes, options, each, self.pins.offloaded)
        return Base(each, bound, tuple(books[id(shape)] for shape in shapes))

    def _safe_bytes(self, shape: LayoutModel) -> float:
        """The most that a rank's tensors and runtime may take for a peak that is still SAFE."""
        key = id(shape.problem)  # of the cost models, which live as long as this
        if key not in self._limits:
            self._limits[key] = memory_limits(shape.problem)
        return self._limits[key].safe_tensor_bytes(self.model.coverage(shape), shape.runtime_bytes)

    def search(self, degrees: Degrees, base: Base) -> ShapeSearch:
        """The search of a shape of a base. What it works out is remembered in the base's books."""
        return ShapeSearch(StageSpace(self.model, self.model.layout(degrees), base.limits_bytes, base.books))

    def candidate(self, degrees: Degrees, base: Base, number: int) -> Candidate | None:
        """A shape of a base with its bound and its number; None where it cannot fit."""
        least, most = self.least_bytes(degrees), max(base.limits_bytes)
        if least > most:
            self.rejections.add_made(MEMORY, lambda: too_large(degrees, least, most), number)
            return None
        bound_s = base.bound.of(degrees)
        if bound_s == float("inf"):
            self.rejections.add_made(MEMORY, lambda: no_recipe(degrees, base.limits_bytes), number)
            return None
        return Candidate(bound_s, number, degrees)


def too_large(degrees: Degrees, least: float, limit: float) -> Rejected:
    """A shape whose state alone takes more than is safe."""
    return Rejected(
        rule=MEMORY,
        detail=f"{degrees.label()} needs at least {format_bytes(least)} a device for weights, gradients "
        f"and optimizer state; {format_bytes(limit)} is safe.",
    )


def no_recipe(degrees: Degrees, limits_bytes: tuple[float, ...]) -> Rejected:
    """A shape whose activations fit with no recomputation."""
    return Rejected(
        rule=MEMORY,
        detail=f"{degrees.label()}: no mix of recomputation fits into {format_bytes(max(limits_bytes))} a "
        "device.",
    )
