"""Timelines: what each rank does during one step, predicted and measured, in one form for page and trace."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.report.record import MeasuredEvent
from planner.strategy.estimate import TimelineEvent
from planner.strategy.strategy import Degrees


class SliceKind(StrEnum):
    """What a slice of a timeline is; the value is also its colour's name in the palette."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT_GRAD = "weight_grad"
    RECOMPUTE = "recompute"
    TP_COMM = "tp_comm"
    PP_COMM = "pp_comm"
    DP_COMM = "dp_comm"
    OPTIMIZER = "optimizer"
    OTHER = "host"

    @property
    def words(self) -> str:
        return _WORDS_OF[self]


_WORDS_OF = {
    SliceKind.FORWARD: "forward",
    SliceKind.BACKWARD: "backward",
    SliceKind.WEIGHT_GRAD: "weight gradients",
    SliceKind.RECOMPUTE: "recompute",
    SliceKind.TP_COMM: "tensor-parallel communication",
    SliceKind.PP_COMM: "pipeline transfer",
    SliceKind.DP_COMM: "data-parallel communication",
    SliceKind.OPTIMIZER: "optimizer",
    SliceKind.OTHER: "other",
}
_ACTION = re.compile(r"^(\d+)([FBIW])(\d+)$")
_ACTION_KINDS = {
    "F": SliceKind.FORWARD,
    "B": SliceKind.BACKWARD,
    "I": SliceKind.BACKWARD,
    "W": SliceKind.WEIGHT_GRAD,
}
_NAME_PARTS = (
    ("optim", SliceKind.OPTIMIZER),
    ("recompute", SliceKind.RECOMPUTE),
    ("tp_", SliceKind.TP_COMM),
    ("send", SliceKind.PP_COMM),
    ("recv", SliceKind.PP_COMM),
    ("pp_", SliceKind.PP_COMM),
    ("p2p", SliceKind.PP_COMM),
    ("dp_", SliceKind.DP_COMM),
    ("unshard", SliceKind.DP_COMM),
    ("reduce", SliceKind.DP_COMM),
    ("gather", SliceKind.DP_COMM),
    ("grad", SliceKind.DP_COMM),
    ("clip", SliceKind.OPTIMIZER),
)


@frozen
class Slice:
    """One thing that one row of a timeline does. `row` is a pipeline rank or a global rank."""

    row: int
    name: str
    kind: SliceKind
    start_s: float
    duration_s: float

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s

    @property
    def action(self) -> tuple[int, str, int] | None:
        """(stage, F/B/I/W, micro-batch) where the name is an action of the schedule, else None."""
        match = _ACTION.match(self.name)
        return (int(match[1]), match[2], int(match[3])) if match else None

    @property
    def text(self) -> str:
        """What the slice is, in words."""
        action = self.action
        if action is None:
            return self.name
        return f"{self.kind.words} of micro-batch {action[2]} on stage {action[0]}"


def classify(name: str) -> SliceKind:
    """The kind of an event by its name: an action such as `2F0`, or a word such as `optimizer`."""
    match = _ACTION.match(name)
    if match:
        return _ACTION_KINDS[match[2]]
    return next((kind for word, kind in _NAME_PARTS if word in name.lower()), SliceKind.OTHER)


def slices_of(events: Iterable[TimelineEvent | MeasuredEvent]) -> tuple[Slice, ...]:
    """Events as slices, in order of row and start."""
    slices = (
        Slice(
            row=event.rank,
            name=event.name,
            kind=classify(event.name),
            start_s=event.start_s,
            duration_s=event.duration_s,
        )
        for event in events
    )
    return tuple(sorted(slices, key=lambda s: (s.row, s.start_s, -s.duration_s)))


def first_rank_of_each(slices: tuple[Slice, ...], degrees: Degrees) -> tuple[Slice, ...]:
    """The slices of one global rank for each pipeline rank, its first, with the pipeline rank as row."""
    rows = {degrees.ranks_of_pp_rank(pp_rank)[0]: pp_rank for pp_rank in range(degrees.pp)}
    return tuple(
        Slice(row=rows[s.row], name=s.name, kind=s.kind, start_s=s.start_s, duration_s=s.duration_s)
        for s in slices
        if s.row in rows
    )


def idle_share(slices: tuple[Slice, ...], rows: int) -> float:
    """The share of rows x span in which a row does nothing. Overlapping slices count once."""
    span_s = max((s.end_s for s in slices), default=0.0)
    if span_s <= 0:
        return 0.0
    busy_s = 0.0
    for row in range(rows):
        reached_s = 0.0
        for s in sorted((s for s in slices if s.row == row), key=lambda s: s.start_s):
            busy_s += max(0.0, s.end_s - max(s.start_s, reached_s))
            reached_s = max(reached_s, s.end_s)
    return 1 - busy_s / (rows * span_s)
