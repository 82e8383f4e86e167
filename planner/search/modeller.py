"""Shapes as candidates of a search: their costs, what is safe on their devices, and their bound."""

from __future__ import annotations

from typing import NamedTuple

from planner.cost.evaluate import CostModel
from planner.cost.stage.peak_memory import MemoryLimits, memory_limits
from planner.cost.stage.stage import LayoutModel
from planner.foundation.units import format_bytes
from planner.search.bounds import BaseBound, least_state_bytes
from planner.search.recipes import RecipeBook
from planner.search.rejections import Rejections
from planner.search.shape_queue import Candidate
from planner.search.shape_search import ShapeSearch
from planner.search.stage_space import StageSpace
from planner.strategy.estimate import Rejected
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.strategy import Degrees

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
