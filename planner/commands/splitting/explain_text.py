"""The answers of `plan explain` as text of 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.commands.shared.text import pairs, table, wrapped_table

if TYPE_CHECKING:
    from planner.advice.explain import Explanation
    from planner.advice.resolve import Front
    from planner.advice.what_more import More
    from planner.advice.why_not import WhyNot
    from planner.cost.evaluate import Evaluation
    from planner.job.problem import PlanningProblem
    from planner.strategy.plan import Plan
    from planner.strategy.strategy import Strategy

COLUMNS = 100
CHANGED = 1e-3
"""Share by which a step time may differ from the file's before it is said."""


def strategy_label(strategy: Strategy) -> str:
    """The label of a strategy's degrees, with the ranks that share out state where these are not all."""
    degrees = strategy.degrees
    hybrid = 1 < degrees.dp_shard < degrees.dp
    return degrees.label() + (f" shard{degrees.dp_shard}" if hybrid else "")


def heading_text(problem: PlanningProblem, plan: Plan, evaluation: Evaluation, basis: str) -> str:
    """The plan in three lines, and what its rehearsal came to."""
    from planner.commands.shared.rehearsal_text import rehearsed_line
    from planner.foundation.units import format_seconds

    estimate, written_s = evaluation.estimate, plan.estimate.step_time_s
    workload = problem.workload
    differs = abs(estimate.step_time_s - written_s) > CHANGED * estimate.step_time_s
    return pairs(
        [
            (
                "plan",
                f"{problem.model.name} on {problem.cluster.name}, {workload.batch} x {workload.seq} tokens",
            ),
            ("", strategy_label(evaluation.strategy)),
            (
                "step time",
                f"{format_seconds(estimate.step_time_s)}, {estimate.tokens_per_s:,.0f} tokens/s"
                + (f"; {format_seconds(written_s)} in the file" if differs else ""),
            ),
            ("verdict", str(estimate.verdict) if estimate.verdict != "SAFE" else None),
            ("basis", basis),
            ("rehearsed", rehearsed_line(plan)),
        ],
        COLUMNS,
    )


def reasons_text(evaluation: Evaluation, found: Explanation) -> list[str]:
    """The sections of the whole explanation."""
    sections = [_binds(found), _stages(found), _more(evaluation, found), _losers(found)]
    return [section for section in sections if section]


def _binds(found: Explanation) -> str:
    from planner.foundation.units import format_seconds

    rows = [
        (
            bind.resource,
            format_seconds(bind.seconds) if bind.seconds else "-",
            f"{bind.share:.1%}",
            bind.detail,
        )
        for bind in found.binds
    ]
    return wrapped_table(("what binds", "", "share", ""), rows, COLUMNS)


def _stages(found: Explanation) -> str:
    from planner.foundation.units import format_bytes, format_seconds

    rows = []
    for stage in found.stages:
        memory, counts = stage.memory, stage.recompute
        states = memory.weights_bytes + memory.grads_bytes + memory.optimizer_bytes
        rows.append(
            (
                stage.index,
                f"{stage.layers[0]}..{stage.layers[1] - 1}",
                f"{counts.none}/{counts.selective}/{counts.full}",
                format_seconds(stage.time_s),
                format_bytes(states),
                format_bytes(memory.activations_bytes),
                format_bytes(memory.total_bytes),
                format_bytes(stage.headroom_bytes),
            )
        )
    header = ("stage", "layers", "none/sel/full", "time", "states", "activations", "memory", "headroom")
    return table(header, rows)


def _more(evaluation: Evaluation, found: Explanation) -> str:
    from planner.foundation.units import format_seconds

    best = found.best
    if best is None:
        return "No SAFE plan is known of this problem, so nothing is said of what more would buy."
    rows = [_more_row(more) for more in found.more]
    header = ("what more would buy", "tokens/s", "gain", "each", "as is", "gap", "its plan")
    text = wrapped_table(header, rows, COLUMNS)
    text += "\neach: gain of a device; as is: a step of this plan; gap: what the search left open"
    details = [(more.change, more.detail) for more in found.more if more.detail]
    if details:
        text += "\n" + pairs(details, COLUMNS)
    better = 1 - best.step_time_s / evaluation.estimate.step_time_s
    if best.strategy != evaluation.strategy and better > 0:
        text += (
            f"\nSolving again found a plan {better:.1%} faster than this one "
            f"({format_seconds(best.step_time_s)}): {strategy_label(best.strategy)}.\n"
            "Gains are over that plan."
        )
    return text


def _more_row(more: More) -> tuple[str, ...]:
    from planner.foundation.units import format_seconds

    return (
        more.change,
        "-" if more.tokens_per_s is None else f"{more.tokens_per_s:,.0f}",
        "-" if more.gain is None else f"{more.gain:+.1%}",
        "-" if more.gain_a_device is None else f"{more.gain_a_device:+.1%}",
        "-" if more.same_plan_s is None else format_seconds(more.same_plan_s),
        "-" if more.gap is None else f"{more.gap:.0%}",
        "-" if more.strategy is None else strategy_label(more.strategy),
    )


def _losers(found: Explanation) -> str:
    """Causes down, runners-up across; those beyond the width are left to --json."""
    from planner.advice.explain import cause_name, format_difference
    from planner.foundation.units import format_bytes, format_seconds

    if not found.losers:
        return ""
    names = [f"{number}: {strategy_label(loser.strategy)}" for number, loser in enumerate(found.losers, 1)]
    causes = [
        cause for cause in found.losers[0].causes_s if any(each.causes_s[cause] for each in found.losers)
    ]
    rows = [
        ("step time", *(format_seconds(each.step_time_s) for each in found.losers)),
        ("slower by", *(format_difference(each.slower_s) for each in found.losers)),
        *(
            (f"  {cause_name(cause)}", *(format_difference(each.causes_s[cause]) for each in found.losers))
            for cause in causes
        ),
        ("memory", *(format_bytes(each.peak_memory_bytes) for each in found.losers)),
        ("more memory", *(format_bytes(each.more_memory_bytes) for each in found.losers)),
    ]
    columns = range(1, len(names) + 1)
    header = ("why runners-up lost", *(str(number) for number in columns))
    return "\n".join([table(header, rows, numbers=columns), *(f"  {name}" for name in names)])


def why_not_text(evaluation: Evaluation, answer: WhyNot) -> str:
    """One answer in words and numbers."""
    from planner.advice.explain import cause_name, format_difference
    from planner.foundation.units import format_seconds

    if answer.binding is not None:
        bound = answer.binding
        legal = ", ".join(answer.legal) or "no value of this key"
        return pairs(
            [
                (answer.choice, f"breaks {bound.rule}"),
                ("", bound.detail),
                ("feasible", f"{legal} (nearest first)" if answer.legal else legal),
            ],
            COLUMNS,
        )
    if answer.step_time_s is None or answer.slower is None or answer.causes_s is None:
        return f"{answer.choice}  is the plan's own choice"
    assert answer.strategy is not None
    own_s = evaluation.estimate.step_time_s
    verb = "slower" if answer.slower >= 0 else "faster: the plan is not the best that is known"
    open_words = "not searched: best of known plans" if answer.gap is None else f"gap {answer.gap:.1%}"
    causes = ", ".join(
        f"{cause_name(cause)} {format_difference(seconds)}"
        for cause, seconds in sorted(answer.causes_s.items(), key=lambda item: -abs(item[1]))
        if abs(seconds) > CHANGED * own_s
    )
    return pairs(
        [
            (
                answer.choice,
                f"{format_seconds(answer.step_time_s)} at best, {abs(answer.slower):.2%} {verb} "
                f"({format_difference(answer.step_time_s - own_s)}), mostly {answer.mostly}",
            ),
            ("by cause", causes),
            ("its plan", f"{strategy_label(answer.strategy)} ({open_words})"),
        ],
        COLUMNS,
    )


def front_text(found: Front) -> str:
    """The front as a table, the fastest plan first."""
    from planner.foundation.units import format_bytes, format_seconds

    least = f"Below a limit of {format_bytes(found.least_bytes)} no plan is feasible."
    if not found.points:
        return f"No plan is SAFE within the limit. {least}"
    fastest_s = found.points[0].step_time_s
    rows = [
        (
            format_seconds(point.step_time_s),
            f"{point.step_time_s / fastest_s - 1:+.1%}",
            format_bytes(point.peak_memory_bytes),
            format_bytes(point.needed_bytes),
            format_bytes(point.headroom_bytes),
            strategy_label(point.strategy),
        )
        for point in found.points
    ]
    text = table(("step", "slower", "peak", "limit needed", "headroom", "plan"), rows, numbers=range(5))
    text += f"\n\n{least}"
    if found.solved < found.asked:
        text += (
            f"\n{found.solved} of {found.asked} limits were solved for: a longer --time-limit solves more."
        )
    return text
