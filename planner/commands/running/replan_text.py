"""The answer of `plan replan` as text, and as a JSON document."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from planner.commands.shared.text import WIDTH, pairs, table

if TYPE_CHECKING:
    from planner.advice.replanning import Left
    from planner.commands.running.replan_answer import Replanned
    from planner.strategy.plan import Plan


def replan_text(answer: Replanned) -> str:
    """The run, both plans, what is left, and the command that goes on."""
    from planner.commands.running.train_again import as_typed
    from planner.commands.shared.objective_text import objective_text

    sections = [
        pairs(_run_facts(answer), WIDTH),
        _both(answer),
        textwrap.fill(answer.diff.statement, WIDTH),
        objective_text(answer.plan.objective),
        pairs(_rest_facts(answer), WIDTH),
        f"go on with\n  {as_typed(answer.words)}",
    ]
    return "\n\n".join(section for section in sections if section)


def _run_facts(answer: Replanned) -> list[tuple[str, Any]]:
    from planner.commands.shared.objective_text import money
    from planner.foundation.units import format_bytes, format_seconds

    run = answer.run
    checkpoint, workload = run.state.checkpoint, run.plan.workload
    of = "" if run.steps is None else f" of {run.steps:,}"
    where = "none: from step 0"
    if checkpoint is not None:
        where = (
            f"{checkpoint.path.name}, {format_bytes(checkpoint.bytes)}, written by {checkpoint.world} "
            f"rank{'s' if checkpoint.world > 1 else ''}, verified"
        )
    measured = "no step by this plan was timed"
    if run.measured is not None:
        predicted_s = run.plan.estimate.step_time_s
        ratio = "" if run.pace is None else f"; {format_seconds(predicted_s)} predicted, {run.pace - 1:+.1%}"
        measured = f"{format_seconds(run.measured.value)} a step ({run.measured.text}){ratio}"
    return [
        ("run", f"{run.folder}: {run.plan.model.name}, step {run.state.step:,}{of}"),
        ("checkpoint", where),
        ("so far", f"{format_seconds(run.spent_s)}, {money(run.spent_usd)}"),
        ("measured", measured),
        (
            "stays",
            f"{workload.batch} x {workload.seq} tokens a step, {workload.precision}, {workload.optimizer}, "
            "the order of the data and the schedule of the learning rate",
        ),
        *(("mind", remark) for remark in (*answer.remarks, *answer.misses())),
    ]


def _both(answer: Replanned) -> str:
    """The two plans side by side."""
    plans = (answer.run.plan, answer.plan)
    columns = [_column(plan, answer.left(plan), answer) for plan in plans]
    rows = [(name, first, second) for (name, first), (_, second) in zip(*columns, strict=True)]
    return table(("", "old plan", "new plan"), rows, numbers=())


def _column(plan: Plan, left: Left | None, answer: Replanned) -> list[tuple[str, str]]:
    from planner.commands.shared.objective_text import money
    from planner.foundation.units import format_bytes, format_seconds

    def told(value: Left | None) -> str:
        return "unknown" if value is None or value.seconds is None else format_seconds(value.seconds)

    estimate, pace = plan.estimate, answer.pace
    low, high = estimate.step_time_interval_s
    rows = [
        ("cluster", plan.cluster.name),
        ("plan", plan.strategy.degrees.label()),
        (
            "step time",
            f"{format_seconds(estimate.step_time_s)} ({format_seconds(low)} to {format_seconds(high)})",
        ),
        ("tokens/s", f"{estimate.tokens_per_s:,.0f}"),
        (
            "memory",
            f"{format_bytes(estimate.peak_memory_bytes)} of {format_bytes(estimate.memory_limit_bytes)}: "
            f"{estimate.verdict}",
        ),
        (f"{left.steps:,} steps left" if left is not None else "steps left", told(left)),
    ]
    if pace is not None:
        rows.append(("at the run's own pace", told(answer.left(plan, pace))))
    rows.append(("dollars left", money(None if left is None else left.cost_usd)))
    return rows


def _rest_facts(answer: Replanned) -> list[tuple[str, Any]]:
    plan, left, ends_at = answer.plan, answer.left(answer.plan), answer.ends_at
    pace = answer.pace
    basis = answer.asked.basis
    if pace is not None:
        basis += (
            "; the run's own pace is the old plan's measured over its predicted step time, taken for the new "
            "one as well"
        )
    certificate = plan.solver
    assert certificate is not None
    return [
        ("tokens left", None if left is None else f"{left.tokens:,}"),
        (
            "ends",
            None if ends_at is None else f"{ends_at:%Y-%m-%d %H:%M %Z}, where it goes on now, as predicted",
        ),
        ("resharding", _resharding(answer)),
        ("certificate", f"{certificate.status}, gap {certificate.gap:.2%}"),
        ("basis", basis),
    ]


def _resharding(answer: Replanned) -> str | None:
    """Who reads how much of the checkpoint."""
    from planner.foundation.units import format_bytes

    if not answer.read_bytes:
        return None
    each, degrees = answer.read_bytes, answer.plan.strategy.degrees
    sizes = (
        [format_bytes(each[0])]
        if len(set(each)) == 1
        else [f"{format_bytes(size)} (pp {rank})" for rank, size in enumerate(each)]
    )
    total = sum(each) * (degrees.world // degrees.pp)
    return (
        f"every rank reads its part of the new layout, about {', '.join(sizes)}; all {degrees.world} "
        f"together {format_bytes(total)}. The checkpoint stays as it is"
    )


def replan_document(answer: Replanned) -> dict[str, Any]:
    """The answer as one JSON document."""
    from planner.commands.running.train_again import as_typed
    from planner.foundation.decode import encode
    from planner.strategy.plan import encode_plan

    run, ends_at = answer.run, answer.ends_at
    checkpoint, pace = run.state.checkpoint, answer.pace
    return {
        "run": {
            "folder": str(run.folder),
            "plan": run.plan.strategy.degrees.label(),
            "cluster": run.plan.cluster.name,
            "step": run.state.step,
            "logged_steps": run.logged_steps,
            "steps": run.steps,
            "spent_s": run.spent_s,
            "spent_usd": run.spent_usd,
        },
        "checkpoint": None
        if checkpoint is None
        else {
            "path": str(checkpoint.path),
            "step": checkpoint.step,
            "world": checkpoint.world,
            "bytes": checkpoint.bytes,
            "plan": checkpoint.plan_label,
        },
        "passed_over": list(run.state.refused),
        "measured": None
        if run.measured is None
        else {
            **encode(run.measured),
            "predicted_step_time_s": run.plan.estimate.step_time_s,
            "pace": run.pace,
        },
        "left": _left_document(answer.left(answer.plan)),
        "left_at_own_pace": None if pace is None else _left_document(answer.left(answer.plan, pace)),
        "left_by_old_plan": _left_document(answer.left(run.plan)),
        "ends_at": None if ends_at is None else ends_at.isoformat(timespec="seconds"),
        "resharding": {"read_bytes_by_pipeline_rank": list(answer.read_bytes)},
        "basis": answer.asked.basis,
        "remarks": [*answer.remarks, *answer.misses()],
        "diff": encode(answer.diff),
        "plan_file": None if answer.output is None else str(answer.output),
        "command": as_typed(answer.words),
        "arguments": answer.words,
        "plan": encode_plan(answer.plan),
    }


def _left_document(left: Left | None) -> dict[str, Any] | None:
    from planner.foundation.decode import encode

    return None if left is None else {**encode(left), "days": left.days}
