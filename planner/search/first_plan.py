"""Scout: a good plan in milliseconds for any number of one offer's nodes.

A search with a certificate takes seconds; a comparison asks of hundreds of clusters. The scout tries usual
choices alone (planner.search.space), an even split of the blocks, and few recomputation mixes:

1. Every usual shape gets its outlook, all at once (planner.search.shape_estimates); passes are shared
between numbers
   of nodes.
2. Each outlook times the ratio that replays of the same choices (all but data parallelism) had to theirs says
   what to replay next. Choices never replayed count by the least ratio seen.
3. Shapes are replayed in that order, until none left promises less than the best.

What replays teach counts for one cluster alone: its plan does not depend on what was asked of others before.
Ratios of other numbers of nodes or other networks misled it: steps took up to twice as long.

Its plan is an estimate of the same cost model as every other; only the choice may be worse than a search's.
`bench/sizing.py` measures by how much.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

from planner.cost.evaluate import CostModel, Evaluation
from planner.cost.goodput import Job
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.stage.peak_memory import safe_tensor_bytes
from planner.cost.time_constants import Physics, usual_physics
from planner.foundation.units import format_bytes
from planner.hardware.cluster import ClusterSpec
from planner.job.problem import PlanningProblem
from planner.search.bounds import least_state_bytes
from planner.search.recipes import RecipeBook
from planner.search.shape_estimates import Outlook, Shapes
from planner.search.shape_search import Found, ShapeSearch
from planner.search.space import Space, space_of
from planner.search.stage_space import StageSpace
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.strategy import Degrees

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats

REPLAYED = 4
"""Shapes that are replayed for one cluster at most, of those that fit."""
PROMISE, HOPE = 0.995, 0.95
"""A shape is replayed where it promises less than PROMISE of the best step time. One of a cell that was never
replayed is taken for HOPE times the least ratio of others."""
MIX_PARTS = 8
"""Parts of a stage's blocks that may have options of their own."""

Cell = tuple[object, ...]
"""All choices of a shape but its data parallelism."""


class Scouted(NamedTuple):
    """The best plan found on some nodes, its job, and a time that no usual choice beats."""

    evaluation: Evaluation
    job: Job
    bound_s: float


class Shared:
    """What clusters of one device share in planning one run: networks have the same costs of layers unless
    runs told them apart, and clusters of equal nodes the same shapes, which hold as much state."""

    def __init__(self, pins: FixedChoices, *known: LayerModel) -> None:
        self.pins = pins
        self._layers: dict[Physics, LayerModel] = {layers.physics: layers for layers in known}
        self._spaces: dict[tuple[int, int], Space] = {}
        self._states: dict[Cell, float] = {}

    def space(self, problem: PlanningProblem) -> Space:
        """The usual bases on a cluster. Those without any are made anew: their reasons name the cluster."""
        key = problem.cluster.devices, problem.cluster.devices_per_node
        space = self._spaces.get(key) or space_of(problem, self.pins, usual=True)
        if space.bases:
            self._spaces[key] = space
        return space

    def states_bytes(self, layers: LayerModel, space: Space) -> list[float]:
        """What a device holds of weights, gradients and optimizer state under each base; many share it."""
        found = []
        for d in space.bases:
            key = d.tp, d.ep, d.etp, d.cp, d.pp, d.zero, d.dp_shard, d.num_micro_batches > 1
            if key not in self._states:
                self._states[key] = least_state_bytes(layers, d, self.pins.offloaded)
            found.append(self._states[key])
        return found

    def layers(self, problem: PlanningProblem) -> LayerModel:
        """The costs of layers on a cluster."""
        physics = usual_physics(problem)
        if physics not in self._layers:
            self._layers[physics] = LayerModel(problem, physics)
        return self._layers[physics]


class Learned:
    """What replays teach of the other shapes of a cluster."""

    def __init__(self) -> None:
        self._ratios: dict[Cell, float] = {}
        self._fullest: dict[Cell, float] = {}

    def promised_s(self, shapes: Shapes) -> Floats:
        """The step times that replays lead to expect; infinite where one as full did not fit."""
        import numpy as np

        unseen = HOPE * min(self._ratios.values(), default=1.0)
        ratios = np.asarray([self._ratios.get(_cell(d), unseen) for d in shapes.degrees])
        fullest = np.asarray([self._fullest.get(_family(d), math.inf) for d in shapes.degrees])
        return np.where(shapes.fullness < fullest, shapes.seconds * ratios, math.inf)

    def took(self, shapes: Shapes, number: int, step_time_s: float) -> None:
        """Remembers a shape's step time."""
        self._ratios[_cell(shapes.degrees[number])] = step_time_s / float(shapes.seconds[number])

    def full(self, shapes: Shapes, number: int) -> None:
        """Remembers that a shape did not fit: of its family, none that is as full does."""
        family = _family(shapes.degrees[number])
        self._fullest[family] = min(self._fullest.get(family, math.inf), float(shapes.fullness[number]))


class Scout:
    """Plans on clusters of one kind of node, which differ in the number of their nodes alone.

    `problem` is on any of them. `why_not` says of each cluster without a plan, by its name, what stands in
    the way.
    """

    def __init__(self, problem: PlanningProblem, shared: Shared) -> None:
        self.problem, self.shared = problem, shared
        self.why_not: dict[str, str] = {}
        self._outlook = Outlook(shared.pins)

    def plan(self, cluster: ClusterSpec) -> Scouted | None:
        """A plan on a cluster; None where no usual choice keeps the rules and fits."""
        problem = dataclasses.replace(self.problem, cluster=cluster)
        model = CostModel(problem, self.shared.layers(problem))
        space = self.shared.space(problem)
        states = self.shared.states_bytes(model.layers, space)
        kept = [number for number, size in enumerate(states) if size <= problem.memory_limit_bytes]
        if not kept:
            self.why_not[cluster.name] = _why_not(space, states, problem.memory_limit_bytes)
            return None
        fitting = dataclasses.replace(
            space,
            bases=tuple(space.bases[number] for number in kept),
            pipes=tuple(space.pipes[number] for number in kept),
        )
        shapes = self._outlook.of(model, fitting, [states[number] for number in kept])
        best = self._best(model, shapes)
        if best is None:
            self.why_not[cluster.name] = "no usual choice fits into memory with its activations"
            return None
        return Scouted(best, model.job(best), shapes.bound_s)

    def _best(self, model: CostModel, shapes: Shapes) -> Evaluation | None:
        """The best of the shapes that promise most."""
        import numpy as np

        best: Found | None = None
        open_, learned, replayed = np.isfinite(shapes.seconds), Learned(), 0
        while replayed < REPLAYED and open_.any():
            promised_s = np.where(open_, learned.promised_s(shapes), math.inf)
            number = int(promised_s.argmin())
            to_beat_s = math.inf if best is None else best.step_time_s * PROMISE
            if not promised_s[number] < to_beat_s:
                break
            open_[number] = False
            found = self._replayed(model, shapes.degrees[number])
            if found is None:
                learned.full(shapes, number)
                continue
            replayed += 1
            learned.took(shapes, number, found.step_time_s)
            if best is None or found.step_time_s < best.step_time_s:
                best = found
        evaluation = None if best is None else model.evaluate(best.strategy)
        return evaluation if evaluation and evaluation.estimate.verdict is Verdict.SAFE else None

    def _replayed(self, model: CostModel, degrees: Degrees) -> Found | None:
        """An even split of a shape with recipes that are SAFE; None where none is."""
        shape = model.layout(degrees)
        limit = safe_tensor_bytes(model.problem, model.coverage(shape), shape.runtime_bytes)
        pins = self.shared.pins
        book = RecipeBook(shape, pins.recomputes, pins.offloaded, MIX_PARTS)
        space = StageSpace(model, shape, (limit,) * degrees.pp, (book,) * degrees.pp)
        return ShapeSearch(space).even()


def _why_not(space: Space, states_bytes: list[float], limit_bytes: int) -> str:
    """Why no base is left: what they hold at least, or the last rule that cut them off."""
    if states_bytes:
        return (
            f"weights, gradients and optimizer state take at least {format_bytes(min(states_bytes))} "
            f"of {format_bytes(limit_bytes)} a device"
        )
    return space.rejected[-1].detail if space.rejected else "no strategy keeps the rules"


def _cell(d: Degrees) -> Cell:
    spread = d.dp_shard < d.dp
    return d.tp, d.cp, d.ep, d.pp, d.micro_batch, d.zero, spread, d.schedule, d.chunks


def _family(d: Degrees) -> Cell:
    """Choices on which it depends how much more a device holds than its outlook says."""
    return d.tp, d.cp, d.ep, d.micro_batch, d.zero, d.pp > 1, d.schedule, d.chunks
