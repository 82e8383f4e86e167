"""Sizings and comparisons as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.commands.objective_text import money
from planner.commands.text import WIDTH, pairs, table, wrapped_table

if TYPE_CHECKING:
    from planner.sizing.answer import Answers, Outcome
    from planner.sizing.comparison import Comparison, LeftOut
    from planner.sizing.option import Option

MOST_ROWS = 25
"""Lines of a table of options or offers; --json, --csv and --html have them all."""
FEW_ROWS = 8


def comparison_text(found: Comparison, *, show_all: bool) -> str:
    """The answer of `plan compare`: what nothing beats, the best of each provider, what it rests on."""
    front = [option for option in found.options if option.pareto]
    shown = list(found.options) if show_all else _by_provider(found.options)
    title = "every option" if show_all else "the cheapest of each provider and device" + _that_keep(found)
    sections = [
        run_text(found),
        "no option is both cheaper and sooner than\n" + options_table(front),
        f"{title}\n" + options_table(shown if show_all else shown[:MOST_ROWS]) + _more(shown, show_all),
        _sensitivity(found),
        _break_even(found),
        left_out_text(found.left_out),
        basis_text(found, front),
    ]
    return "\n\n".join(section for section in sections if section)


def size_text(found: Comparison, answers: Answers) -> str:
    """The answer of `plan size`: the smallest, the cheapest and the soonest, then each offer."""
    named = [
        ("smallest", answers.smallest),
        ("cheapest", answers.cheapest),
        ("soonest", answers.soonest),
    ]
    picks = [(name, option) for name, option in named if option is not None]
    sections = [
        run_text(found),
        options_table([option for _, option in picks], [name for name, _ in picks]),
        _offers_text(answers.outcomes, found),
        left_out_text(found.left_out),
        basis_text(found, [option for _, option in picks]),
    ]
    return "\n\n".join(section for section in sections if section)


def run_text(found: Comparison) -> str:
    """What is trained and within which limits."""
    from planner.units import format_count, format_seconds

    workload, goal = found.workload, found.goal
    limits = [] if goal.deadline_s is None else [f"within {format_seconds(goal.deadline_s)}"]
    limits += [] if goal.budget_usd is None else [f"for {money(goal.budget_usd)} at most"]
    tokens = format_count(workload.tokens or 0)
    return (
        f"{found.model} ({format_count(found.params_total)} parameters), {workload.method} on {tokens} tokens"
        + (f" ({found.tokens_note})" if found.tokens_note else "")
        + f"\n  {workload.batch} x {workload.seq} tokens a step"
        + (f"; {' and '.join(limits)}" if limits else "")
        + f"; {len(found.options):,} options"
    )


def options_table(options: Sequence[Option], names: Sequence[str] = ()) -> str:
    """Options in lines: dollars and days first, what they are last."""
    header = ["dollars", "from", "to", "days", "devices", "MFU", "kept", "memory", "plan", "option"]
    rows = [[*_figures(option), option.plan.label, option.name] for option in options]
    if names:
        header, rows = ["", *header], [[name, *row] for name, row in zip(names, rows, strict=True)]
    return table(header, rows, numbers=range(len(names[:1]), len(names[:1]) + 8))


def _figures(option: Option) -> list[str]:
    low, high = option.cost_interval_usd or (None, None)
    plan = option.plan
    return [
        money(option.cost_usd) + ("?" if option.rate.doubtful else ""),
        "" if low is None else money(low),
        "" if high is None else money(high),
        days_text(option.days),
        f"{option.devices:,}",
        "-" if plan.mfu is None else f"{plan.mfu:.0%}",
        f"{option.goodput:.1%}",
        f"{plan.peak_memory_bytes / plan.memory_limit_bytes:.0%}",
    ]


def days_text(days: float) -> str:
    """Days with as many digits as tell them apart."""
    return f"{days:,.0f}" if days >= 100 else f"{days:.1f}" if days >= 1 else f"{days:.3f}"


def _by_provider(options: Sequence[Option]) -> list[Option]:
    """The first option of each provider, device and way to pay; the order is kept."""
    best: dict[tuple[str, str, str], Option] = {}
    for option in options:
        best.setdefault((option.provider, option.device, str(option.rate.pricing)), option)
    return list(best.values())


def _that_keep(found: Comparison) -> str:
    limited = found.goal.deadline_s is not None or found.goal.budget_usd is not None
    return ", those that keep the limits first" if limited else ""


def _more(shown: Sequence[Option], show_all: bool) -> str:
    left = 0 if show_all else len(shown) - MOST_ROWS
    return f"\n  and {left} more: --all, --csv FILE, --html FILE or --json" if left > 0 else ""


def _offers_text(outcomes: Sequence[Outcome], found: Comparison) -> str:
    """Each offer's best option, then by how much others miss."""
    kept = [outcome for outcome in outcomes if outcome.standing == "keeps the goal"]
    missed = [outcome for outcome in outcomes if outcome.standing != "keeps the goal"]
    parts = []
    if kept:
        parts.append(
            "the cheapest of each offer\n" + options_table([o.best for o in kept[:MOST_ROWS]])
            + (f"\n  and {len(kept) - MOST_ROWS} more: --json" if len(kept) > MOST_ROWS else "")
        )  # fmt: skip
    if missed:
        rows = [
            (str(o.standing), days_text(o.best.days), money(o.best.cost_usd), o.best.name, help_for(o, found))
            for o in missed[:FEW_ROWS]
        ]
        header = ("fits in memory, but", "days", "dollars", "nearest", "what would help")
        text = wrapped_table(header, rows, WIDTH + 40)
        parts.append(text + (f"\n  and {len(missed) - FEW_ROWS} more" if len(missed) > FEW_ROWS else ""))
    return "\n\n".join(parts)


def help_for(outcome: Outcome, found: Comparison) -> str:
    """What would let an offer keep the goal."""
    best, goal = outcome.best, found.goal
    late = goal.deadline_s is not None and best.days * 86400 > goal.deadline_s
    dear = best.cost_usd is not None and goal.budget_usd is not None and best.cost_usd > goal.budget_usd
    helps = [f"--deadline {best.days * 1.005:.1f}d"] if late else []
    helps += [f"--budget {best.cost_usd * 1.005:.0f}"] if dear and best.cost_usd else []
    helps += ["a price: --prices FILE"] if best.cost_usd is None else []
    return " and ".join(helps) or "fewer --tokens"


def left_out_text(left_out: Sequence[LeftOut]) -> str:
    """Offers without an option, those with the same reason together."""
    if not left_out:
        return ""
    reasons = Counter(each.reason for each in left_out)
    first = {each.reason: each.offer for each in reversed(left_out)}
    rows = [
        (count, first[reason] + (" and others" if count > 1 else ""), reason)
        for reason, count in reasons.most_common(FEW_ROWS)
    ]
    more = len(reasons) - FEW_ROWS
    text = wrapped_table(("offers", "without a plan", "why"), rows, WIDTH)
    return text + (f"\n  and {more} more reasons: --json" if more > 0 else "")


def _sensitivity(found: Comparison) -> str:
    rows = [
        (each.what, f"{each.low}: {_ends(each.low_cost_usd, each.low_days)}",
         f"{each.high}: {_ends(each.high_cost_usd, each.high_days)}",
         "the same option" if each.best_stays else f"{each.best_at_low}; {each.best_at_high}")
        for each in found.sensitivity
    ]  # fmt: skip
    return (
        "" if not rows else wrapped_table(("if this changes", "low", "high", "best then"), rows, WIDTH + 40)
    )


def _ends(usd: float | None, days: float) -> str:
    return f"{money(usd)}, {days_text(days)} d"


def _break_even(found: Comparison) -> str:
    rows = [
        (
            each.device,
            each.rented,
            f"{each.rented_usd_per_device_hour:.2f}",
            f"{each.owned_usd_per_device_hour:.2f}",
            "never" if each.utilisation is None else f"{each.utilisation:.0%}",
            "-" if each.months is None else f"{each.months:.0f}",
        )
        for each in found.break_even[:FEW_ROWS]
    ]
    if not rows:
        return ""
    header = ("buying", "against renting", "USD/h", "own USD/h", "cheaper above", "months")
    more = len(found.break_even) - FEW_ROWS
    return table(header, rows, numbers=(2, 3, 4, 5)) + (f"\n  and {more} more: --json" if more > 0 else "")


def basis_text(found: Comparison, shown: Sequence[Option]) -> str:
    """What the figures rest on and leave out, short."""
    dates = sorted({option.rate.as_of for option in shown if option.rate.as_of})
    span = "" if not dates else f", as of {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    return pairs(
        [
            (
                "dollars",
                f"of nodes alone{span}; ? doubtful; reserved nodes must be used for all of their term",
            ),
            ("from, to", "step time and price at their low and high ends"),
            (
                "kept",
                "the share of time that goes into kept steps: failures, checkpoints, restarts, preemptions",
            ),
            ("assumed", f"{len(found.assumptions)} figures with their sources: --json or --html"),
            ("not modelled", "; ".join(found.not_modelled)),
        ],
        WIDTH,
    )


def nothing_text(found: Comparison) -> str:
    """Why no option keeps the goal: the soonest, what the budget buys, and what would help."""
    from planner.sizing.answer import answers_of
    from planner.units import format_seconds

    if not found.options:
        reasons = "\n".join(f"  {each.offer}: {each.reason}" for each in found.left_out[:FEW_ROWS])
        helps = "more --max-devices, or larger devices"
        return f"no offer has a plan for {found.model}.\n{reasons}\nWhat would help: {helps}."
    goal = found.goal
    soonest = min(found.options, key=lambda option: option.days)
    priced = [option for option in found.options if option.cost_usd is not None]
    lines = [f"no option keeps what was asked, of {len(found.options):,}."]
    if goal.deadline_s is not None:
        told = f"{days_text(soonest.days)} days for {money(soonest.cost_usd)}"
        lines.append(f"  --deadline {format_seconds(goal.deadline_s)}: the soonest is {soonest.name}, {told}")
    if goal.budget_usd is not None and priced:
        cheapest = min(priced, key=lambda option: option.cost_usd or 0.0)
        bought = goal.budget_usd / (cheapest.cost_usd or 1.0) * (found.workload.tokens or 0)
        lines.append(
            f"  --budget {money(goal.budget_usd)}: the cheapest is {cheapest.name}, "
            f"{money(cheapest.cost_usd)} in {days_text(cheapest.days)} days; "
            f"the budget buys {_count(bought)} tokens of it"
        )
    nearest = answers_of(found).outcomes[0]
    lines.append(f"What would help: {help_for(nearest, found)}, for {nearest.best.name}; fewer --tokens.")
    return "\n".join(lines)


def _count(tokens: float) -> str:
    from planner.units import format_count

    return format_count(round(tokens))
