"""Timelines: what each rank does during one step, predicted and measured, in one form for page and trace.

The Perfetto trace: predicted and measured timelines as two processes, ranks as threads.

Chrome's JSON trace format: complete events (`X`) with `ts` and `dur` in microseconds, metadata events (`M`)
that name processes and threads, and flow events (`s`, `f`) that join a micro-batch's passes from stage to
stage. Source: "Trace Event Format", Google, read by ui.perfetto.dev and chrome://tracing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any

from planner.foundation.frozen import frozen
from planner.report.run_record import MeasuredEvent
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


PREDICTED_PID = 1
MEASURED_PID = 2
Event = dict[str, Any]


def build_trace(predicted: tuple[Slice, ...], measured: tuple[Slice, ...], name: str) -> dict[str, Any]:
    """The trace document. A timeline that is empty has no process."""
    events: list[Event] = []
    if predicted:
        events += _process(PREDICTED_PID, f"predicted: {name}", "pipeline rank", predicted)
    if measured:
        events += _process(MEASURED_PID, f"measured: {name}", "rank", measured)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"plan": name}}


def print_trace(trace: dict[str, Any]) -> str:
    """The trace as JSON text, one event a line."""
    lines = ",\n".join(json.dumps(event, allow_nan=False) for event in trace["traceEvents"])
    rest = {key: value for key, value in trace.items() if key != "traceEvents"}
    return '{"traceEvents": [\n' + lines + "\n],\n" + json.dumps(rest, allow_nan=False)[1:] + "\n"


def _process(pid: int, title: str, thread: str, slices: tuple[Slice, ...]) -> list[Event]:
    rows = sorted({s.row for s in slices})
    names = [_metadata(pid, 0, "process_name", {"name": title})]
    names.append(_metadata(pid, 0, "process_sort_index", {"sort_index": pid}))
    for row in rows:
        names.append(_metadata(pid, row, "thread_name", {"name": f"{thread} {row}"}))
        names.append(_metadata(pid, row, "thread_sort_index", {"sort_index": row}))
    return [*names, *(_complete(pid, s) for s in slices), *_flows(pid, slices)]


def _metadata(pid: int, tid: int, name: str, args: Event) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": name, "args": args}


def _complete(pid: int, s: Slice) -> Event:
    action = s.action
    args: Event = {"stage": action[0], "micro_batch": action[2]} if action else {}
    return {
        "ph": "X",
        "pid": pid,
        "tid": s.row,
        "ts": s.start_s * 1e6,
        "dur": s.duration_s * 1e6,
        "name": s.name,
        "cat": str(s.kind),
        "args": {**args, "what": s.text},
    }


def _flows(pid: int, slices: tuple[Slice, ...]) -> Iterator[Event]:
    """An arrow from each pass to the same micro-batch's pass on the next stage (backward: the previous).

    Where several ranks do the same pass, the first of each stage stands for them.
    """
    passes: dict[tuple[int, str, int], Slice] = {}
    for s in slices:
        if s.action is not None:
            passes.setdefault(s.action, s)
    for number, ((stage, kind, micro_batch), source) in enumerate(sorted(passes.items())):
        step = 1 if kind == "F" else -1
        target = passes.get((stage + step, kind, micro_batch))
        if target is None or kind == "W":
            continue
        shared = {"pid": pid, "cat": "micro-batch", "name": f"micro-batch {micro_batch}"}
        # An arrow leaves and enters in the middle of its slices, where viewers surely bind it to them.
        yield {"ph": "s", "id": pid * 10**9 + number, "tid": source.row, "ts": _middle_us(source), **shared}
        yield {
            "ph": "f", "bp": "e", "id": pid * 10**9 + number, "tid": target.row, "ts": _middle_us(target),
            **shared,
        }  # fmt: skip


def _middle_us(s: Slice) -> float:
    return (s.start_s + s.duration_s / 2) * 1e6
