"""A plan as text for a terminal: the choice, the stages, the figures, the certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.commands.shared.objective_text import objective_text
from planner.commands.shared.text import WIDTH, pairs, table

if TYPE_CHECKING:
    from planner.strategy.estimate import Estimate, JobFigures, StageEstimate
    from planner.strategy.plan import Plan


def plan_text(plan: Plan, basis: str) -> str:
    """The whole answer, in sections."""
    sections = [_headline(plan), _stages(plan), _time(plan), _figures(plan, basis), _job(plan)]
    sections.append(objective_text(plan.objective))
    if plan.solver is not None:
        sections += [_certificate(plan), _alternatives(plan)]
    sections.append(pairs([("not modelled", "; ".join(plan.not_modelled))], WIDTH))
    return "\n\n".join(section for section in sections if section)


def _headline(plan: Plan) -> str:
    from planner.foundation.units import format_count

    degrees, workload = plan.strategy.degrees, plan.workload
    return (
        f"{plan.model.name} ({format_count(plan.model.params_total)} parameters) on {plan.cluster.name}, "
        f"{workload.batch} x {workload.seq} tokens a step, {workload.precision}\n"
        f"  {degrees.label()}   {plan.estimate.verdict}"
    )


def _stages(plan: Plan) -> str:
    from planner.foundation.units import format_bytes, format_seconds
    from planner.strategy.placement import is_mixed

    degrees, offloads = plan.strategy.degrees, bool(plan.strategy.offloads)
    mixed, rows = is_mixed(plan.cluster), []
    for index, (stage, cost) in enumerate(zip(plan.strategy.stages, plan.stage_estimates, strict=True)):
        ranks = degrees.ranks_of_pp_rank(degrees.pp_rank_of_stage(index))
        counts = stage.recompute
        rows.append(
            (
                index,
                f"{stage.first}..{stage.end - 1}",
                f"{ranks[0]}..{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}",
                *((cost.device,) if mixed else ()),
                f"{counts.none}/{counts.selective}/{counts.full}",
                *((f"{stage.offload.optimizer}/{stage.offload.activations}",) if offloads else ()),
                format_seconds(cost.forward_s),
                format_seconds(cost.backward_s),
                format_bytes(cost.memory.total_bytes) + (_of_limit(cost) if mixed else ""),
            )
        )
    where = ("ranks", *(("devices",) if mixed else ()))
    counts_of = ("recompute none/sel/full", *(("offload optimizer/act.",) if offloads else ()))
    return table(("stage", "layers", *where, *counts_of, "forward", "backward", "memory"), rows)


def _of_limit(stage: StageEstimate) -> str:
    from planner.foundation.units import format_bytes

    limit = stage.memory_limit_bytes
    return "" if limit is None else f" of {format_bytes(limit)}"


def _time(plan: Plan) -> str:
    from planner.foundation.units import format_seconds
    from planner.strategy.estimate import TIME_CAUSES

    breakdown, step_s = plan.estimate.breakdown, plan.estimate.step_time_s
    rows = [
        (name.removesuffix("_s").replace("_", " "), format_seconds(value), f"{value / step_s:.1%}")
        for name in TIME_CAUSES
        if (value := getattr(breakdown, name)) > 0
    ]
    return table(("step time by cause", "", "share"), rows)


def _figures(plan: Plan, basis: str) -> str:
    from planner.foundation.units import format_bytes, format_seconds
    from planner.strategy.engines.native import (
        not_executed,
        not_executed_workload,
        offload_not_executed,
    )

    e = plan.estimate
    missing = not_executed(plan.model) + not_executed_workload(plan.model, plan.workload)
    missing += offload_not_executed(plan.strategy)
    low, high = e.step_time_interval_s
    share = {name: getattr(e.coverage, name) for name in type(e.coverage).__dataclass_fields__}
    return pairs(
        [
            (
                "step time",
                f"{format_seconds(e.step_time_s)}  ({format_seconds(low)} to {format_seconds(high)})",
            ),
            ("tokens/s", f"{e.tokens_per_s:,.0f}"),
            ("MFU", "unknown: the device's peak is not known" if e.mfu is None else f"{e.mfu:.1%}"),
            ("days", None if e.days is None else f"{e.days:.4g}"),
            ("cost", _cost(e, plan.cluster.name)),
            ("engine", plan.engine),
            ("price an hour", "; ".join(plan.cluster.price_sources) or None),
            (
                "memory",
                f"{format_bytes(e.peak_memory_bytes)}{_memory_interval(e)} of "
                f"{format_bytes(e.memory_limit_bytes)}: {e.verdict}",
            ),
            *_memory_figures(e),
            ("figures", ", ".join(f"{value:.0%} {name}" for name, value in share.items() if value > 0.004)),
            ("basis", basis),
            ("not yet trained", "; ".join(missing) or None),
        ]
    )


def _cost(figures: Estimate | JobFigures, cluster: str) -> str | None:
    """Dollars of the whole run; unknown where there is no price, nothing where tokens are unknown."""
    if figures.cost_usd is not None:
        return f"${figures.cost_usd:,.0f}"
    return None if figures.days is None else f"unknown: {cluster} has no price (--prices, --on-premises)"


def _memory_interval(e: Estimate) -> str:
    from planner.foundation.units import format_bytes

    if e.peak_memory_interval_bytes is None:
        return ""
    low, high = e.peak_memory_interval_bytes
    return f"  ({format_bytes(low)} to {format_bytes(high)})"


def _job(plan: Plan) -> str:
    """What is lost between steps, where something was said of it."""
    from planner.foundation.units import format_seconds

    job = plan.estimate.job
    if job is None:
        return ""
    causes = [
        (job.data_stall_s, "waiting for data"),
        (job.straggler_s, "for the slowest device"),
        (job.checkpoint_stall_s, "for checkpoints"),
        (job.evaluation_s, "for evaluation"),
    ]
    lost = [f"{format_seconds(seconds)} {cause}" for seconds, cause in causes if seconds > 0]
    return pairs(
        [
            ("between steps", f"{', '.join(lost)}, a step" if lost else "nothing is lost"),
            *_interruptions(job),
            ("failure rate", _rate_source(plan, job) if job.failure_share > 0 else None),
            ("a checkpoint", _checkpoint(job)),
            ("spare nodes", f"{job.spares}, paid like the others" if job.spares else None),
            ("ramp-up", format_seconds(job.ramp_up_s) if job.ramp_up_s else None),
            ("goodput", f"{job.goodput:.1%}"),
            ("days in all", None if job.days is None else f"{job.days:.4g}"),
            ("cost in all", _cost(job, plan.cluster.name)),
        ],
        WIDTH,
    )


def _interruptions(job: JobFigures) -> list[tuple[str, str]]:
    """What is lost to what stops the job, by cause."""
    from planner.foundation.units import format_seconds

    between, taken = job.between_failures_s, job.between_preemptions_s
    restart = f", {format_seconds(job.restart_s)} to restart" if job.restart_s is not None else ""
    causes = (
        ("failures", job.failure_share, f"one in {format_seconds(between)}{restart}" if between else ""),
        ("preemptions", job.preemption_share, f"one in {format_seconds(taken)}" if taken else ""),
        ("without a node", job.waiting_share, "more are out than there are spares"),
    )
    return [
        (name, f"{share:.2%} of all time" + (f" ({why})" if why else ""))
        for name, share, why in causes
        if share > 0
    ]


def _rate_source(plan: Plan, job: JobFigures) -> str | None:
    """Where the rate of failures is from, where it is that of the devices and not one that was stated."""
    from math import isclose

    from planner.hardware.failures import failure_file, usual_failures_per_s

    if not job.between_failures_s or not isclose(
        usual_failures_per_s(plan.cluster) * job.between_failures_s, 1.0, rel_tol=1e-6
    ):
        return None
    file = failure_file()
    names = dict.fromkeys(group.device.name for group in plan.cluster.groups)
    rates = [(name, file.of(name)) for name in names]
    each = (f"{name}: {r.per_1000_node_days:g} ({r.low:g} to {r.high:g}; {r.source})" for name, r in rates)
    return f"in 1000 days of a node of {file.node_devices}, {'; '.join(each)}"


def _checkpoint(job: JobFigures) -> str:
    """Its size and what it costs, the interval that was counted with, and the best."""
    from planner.foundation.units import format_bytes, format_seconds

    wait, every, best = job.checkpoint_wait_s, job.checkpoint_every, job.best_checkpoint_every
    text = format_bytes(job.checkpoint_bytes)
    if wait is not None:
        text += f", {format_seconds(wait)} that steps wait"
    if every is not None and every == best:
        return f"{text}; every {every:,} steps, which loses least"
    if every is not None:
        text += f"; every {every:,} steps"
    return text if best is None else f"{text}; every {best:,} steps loses least"


def _memory_figures(e: Estimate) -> list[tuple[str, str]]:
    """The peak as allocator and driver see it, the moments of a run, and the node's own memory."""
    from planner.foundation.units import format_bytes

    if e.memory is None:
        return []
    m = e.memory
    seen = (
        ("allocated", m.allocated_bytes),
        ("reserved", m.reserved_bytes),
        ("on the device", m.device_bytes),
    )
    moments = sorted(m.moments, key=lambda moment: -moment.device_bytes)
    return [
        ("", ", ".join(f"{format_bytes(size)} {name}" for name, size in seen)),
        (
            "worst moment",
            f"{m.worst.replace('_', ' ')}; then "
            + ", ".join(
                f"{moment.moment.replace('_', ' ')} {format_bytes(moment.device_bytes)}"
                for moment in moments
                if moment.moment != m.worst
            ),
        ),
        (
            "host memory",
            f"{format_bytes(m.host_bytes)} a node"
            + (f", {format_bytes(m.hosted_bytes)} of it offloaded" if m.hosted_bytes else ""),
        ),
    ]


def _certificate(plan: Plan) -> str:
    from planner.foundation.units import format_seconds

    s = plan.solver
    assert s is not None
    words = (
        "no other plan of this space is faster by more than the gap"
        if s.status == "optimal"
        else "no plan of this space is faster by more; time or loose bounds left this open"
    )
    return pairs(
        [
            ("certificate", f"{s.status}, gap {s.gap:.2%}: {words}"),
            ("bound", f"{format_seconds(s.lower_bound_s)} <= {format_seconds(s.objective_s)}"),
            (
                "search",
                f"{s.shapes} shapes, {s.pruned} pruned, {s.milps} ILPs, {s.wall_s:.2f} s, "
                f"{'verified' if s.verified else 'not verified'}",
            ),
            ("pruned by", ", ".join(f"{rule} {count}" for rule, count in plan.rejected.items())),
        ]
    )


def _alternatives(plan: Plan) -> str:
    from planner.foundation.units import format_bytes, format_seconds

    if not plan.alternatives:
        return ""
    rows = [
        (
            other.strategy.degrees.label(),
            format_seconds(other.step_time_s),
            format_bytes(other.peak_memory_bytes),
            str(other.verdict),
            other.reason,
        )
        for other in plan.alternatives
    ]
    return table(("runners-up", "step", "memory", "", "why they lost"), rows)
