"""The Perfetto trace: predicted and measured timelines as two processes, ranks as threads.

Chrome's JSON trace format: complete events (`X`) with `ts` and `dur` in microseconds, metadata events (`M`)
that name processes and threads, and flow events (`s`, `f`) that join a micro-batch's passes from stage to
stage. Source: "Trace Event Format", Google, read by ui.perfetto.dev and chrome://tracing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from planner.report.timeline import Slice

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
