"""What a block of a class and the ends of a model hold under the degrees of a shape.

Stages of a block or two tell: what a second block adds is what every block of its class holds, and what a
stage of one block holds besides is its ends'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from planner.cost.moments import least_pass_bytes, reducing_bytes, stage_pass_bytes
from planner.strategy import Recompute, RecomputeCounts, Stage

if TYPE_CHECKING:
    from planner.search.recipes import Column, RecipeBook


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
        self._alone: dict[tuple[bool, bool], dict[Recompute, Column]] = {}

    def ends(self, first: bool, last: bool, *, begun: bool) -> EndBytes:
        """Those of a stage that holds the first or the last block, without gradients before a pass back has
        `begun`."""
        key = first, last, begun
        if key not in self._ends:
            if key[:2] not in self._alone:
                self._alone[key[:2]] = {option: self._stage(first, last, option) for option in self.saved}
            each = self._alone[key[:2]]
            least = self.keeping[-1]
            late = 0.0 if begun else each[least].late_bytes - self.late
            self._ends[key] = EndBytes(
                resident=each[least].resident_bytes - self.states - late,
                saved=each[least].cost.saved_bytes - self.saved[least],
                passing=min(stage_pass_bytes(self.book.shape, column.cost) for column in each.values()),
            )
        return self._ends[key]

    def _stage(self, first: bool, last: bool, option: Recompute) -> Column:
        """The recipe of a stage of one block."""
        start = 0 if first else self.book.layers - 1 if last else self.middle
        counts = RecomputeCounts(
            none=int(option is Recompute.NONE),
            selective=int(option is Recompute.SELECTIVE),
            full=int(option is Recompute.FULL),
        )
        return self.book.column(Stage(first=start, end=start + 1, recompute=counts))
