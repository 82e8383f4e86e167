"""What a block of a class and the ends of a model hold under the degrees of a shape.

Stages of a block or two tell: what a second block adds is what every block of its class holds, and what a
stage of one block holds besides is its ends'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from planner.cost.stage.memory_timeline import least_pass_bytes, reducing_bytes, stage_pass_bytes
from planner.model.sublayer import Recompute
from planner.strategy.strategy import RecomputeCounts, Stage

if TYPE_CHECKING:
    from planner.search.recipes import RecipeBook


class EndBytes(NamedTuple):
    """Of the ends that a stage holds: their states, what they keep of a micro-batch, and what a pass of the
    stage needs beside them."""

    resident: float
    saved: float
    passing: float


class BlockBytes:
    """The bytes of one book's blocks of a class.

    `saved` is what a block keeps of a micro-batch by its option, `waiting` what it holds for its weight
    gradients; `states` are those of a block, `late` the part that a pass back makes. `passing` is what its
    pass back needs by its option; while gradients of a block behind it are reduced, `reducing` more, less
    what that block kept, `behind` at least.
    """

    def __init__(self, book: RecipeBook, key: str) -> None:
        self.book, shape = book, book.shape
        self.saved = {option: shape.block(key, option).saved_bytes for option in book.options}
        self.waiting = {option: shape.waiting_bytes[key, option] for option in book.options}
        self.keeping = sorted(self.saved, key=lambda option: -self.saved[option])
        self.middle = shape.layer_model.keys.index(key, 2)
        """A layer of the class with one before it, neither of which is the model's first."""
        first, counts = self.middle - 1, (RecomputeCounts(none=size) for size in (1, 2))
        one, two = (book.column(Stage(first=first, end=first + c.layers, recompute=c)) for c in counts)
        self.states = two.resident_bytes - one.resident_bytes
        self.late = two.late_bytes - one.late_bytes
        self.passing = {option: least_pass_bytes(shape, [option], key) for option in book.options}
        self.reducing = reducing_bytes(shape)
        self.behind = least_pass_bytes(shape, book.options, behind=True) - min(self.passing.values())
        self._ends: dict[tuple[bool, bool, bool], EndBytes] = {}
        self._passing: dict[tuple[bool, bool], float] = {}

    def by_option(self, name: str) -> list[float]:
        """A figure for each option."""
        figure = getattr(self, name)
        return list(figure.values()) if isinstance(figure, dict) else [figure] * len(self.saved)

    def ends(self, first: bool, last: bool, *, begun: bool) -> EndBytes:
        """Those of a stage that holds the first or the last block, without gradients before a pass back has
        `begun`."""
        key = first, last, begun
        if key not in self._ends:
            least = self.keeping[-1]
            alone = self.book.column(self._stage(first, last, least))
            late = 0.0 if begun else alone.late_bytes - self.late
            self._ends[key] = EndBytes(
                resident=alone.resident_bytes - self.states - late,
                saved=alone.cost.saved_bytes - self.saved[least],
                passing=self._pass_bytes(first, last),
            )
        return self._ends[key]

    def _pass_bytes(self, first: bool, last: bool) -> float:
        """What a pass of a stage with these ends and one block needs at least."""
        if (first, last) not in self._passing:
            shape = self.book.shape
            costs = (shape.stage(self._stage(first, last, option)) for option in self.saved)
            self._passing[first, last] = min(stage_pass_bytes(shape, cost) for cost in costs)
        return self._passing[first, last]

    def _stage(self, first: bool, last: bool, option: Recompute) -> Stage:
        """A stage of one block."""
        start = 0 if first else self.book.layers - 1 if last else self.middle
        counts = RecomputeCounts(
            none=int(option is Recompute.NONE),
            selective=int(option is Recompute.SELECTIVE),
            full=int(option is Recompute.FULL),
        )
        return Stage(first=start, end=start + 1, recompute=counts)
