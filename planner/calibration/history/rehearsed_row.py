"""A rehearsed plan as a row of runs.csv: the peak of its fullest rank, or that memory ran out."""

from __future__ import annotations

from typing import Any

from planner.calibration.history.plan_row import plan_columns
from planner.calibration.run import MemoryKind, Run, Status
from planner.foundation.decode import digest
from planner.foundation.errors import InputError, Problem
from planner.foundation.units import GIB
from planner.strategy.plan import Plan


def rehearsed_run(plan: Plan) -> Run:
    """The row. It has no step time: a rank alone does not wait for others.

    Raises InputError where ranks of some kinds were not rehearsed, so that the plan's peak is not known.
    """
    done = plan.rehearsal
    assert done is not None, "the plan was rehearsed"
    if not done.complete and not done.ran_out:
        raise InputError(
            Problem(
                where="--runs",
                fault="is for a whole plan, and only some kinds of its ranks were rehearsed.",
                fix="leave out --rank and --stages",
            )
        )
    columns, remarks = plan_columns(plan)
    peaks = [rank.allocated_bytes for rank in done.ranks if rank.allocated_bytes is not None]
    reserved = [rank.reserved_bytes for rank in done.ranks if rank.reserved_bytes is not None]
    oom = done.ran_out
    notes = [columns.pop("notes"), f"rehearsed on {done.mode}, torch {done.versions['torch']}", *remarks]
    known = not oom and bool(peaks)
    return Run(
        **{**columns, "compile": done.compiled},
        id=f"rehearsed-{_digest(plan.workload, 6)}-{_digest(plan.strategy, 12)}",
        where="plan rehearse",
        group=f"rehearsed-{plan.model.name}",
        source="plan rehearse",
        status=Status.OOM if oom else Status.OK,
        peak_memory_gib=max(peaks) / GIB if known else None,
        memory_kind=MemoryKind.ALLOCATED if known else None,
        peak_reserved_gib=max(reserved) / GIB if known and reserved else None,
        notes="; ".join(note for note in notes if note),
    )


def _digest(value: Any, places: int) -> str:
    return digest(value).removeprefix("sha256:")[:places]
