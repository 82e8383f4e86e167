"""Sizings and comparisons as text for a terminal."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.commands.shared.objective_text import money
from planner.commands.shared.text import WIDTH, pairs, table, wrapped_table

if TYPE_CHECKING:
    from planner.sizing.comparison import Answers, Comparison, LeftOut, Option, Outcome

MOST_ROWS = 25
"""Lines of a table of options or offers; --json, --csv and --html have them all."""
FEW_ROWS = 8
SOONEST = "More nodes may be sooner still: --objective time tries all numbers of them, this the cheapest."
DATE = re.compile(r"[0-9]{4}(-[0-9]{2}){0,2}")
"""Dates of prices that say so; others are words such as "undated"."""


def comparison_text(found: Comparison, *, show_all: bool) -> str:
    """The answer of `plan compare`: what nothing beats, the best of each provider, what it rests on."""
    front = [option for option in found.options if option.pareto]
    shown = list(found.options) if show_all else _by_provider(found.options)
    title = "every option" if show_all else "the cheapest of each provider and device" + _that_keep(found)
    sections = [
        run_text(found),
        "no option is both cheaper and sooner than\n" + options_table(front),
        plans_text(front),
        f"{title}\n" + options_table(shown if show_all else shown[:MOST_ROWS]) + _more(shown, show_all),
        _sensitivity(found),
        _break_even(found),
        left_out_text(found.left_out),
        basis_text(found, front),
    ]
    return "\n\n".join(section for section in sections if section)


def size_text(found: Comparison, answers: Answers) -> str:
    """The answer of `plan size`: the smallest, the cheapest and the soonest, then each offer."""
    from planner.job.objective import Minimise

    named = [
        ("smallest", answers.smallest),
        ("cheapest", answers.cheapest),
        ("soonest", answers.soonest),
    ]
    picks = [(name, option) for name, option in named if option is not None]
    sections = [
        run_text(found),
        options_table([option for _, option in picks], [name for name, _ in picks]),
        plans_text([option for _, option in picks]),
        _offers_text(answers.outcomes, found),
        left_out_text(found.left_out),
        basis_text(found, [option for _, option in picks]),
        "" if found.goal.minimise is Minimise.TIME else SOONEST,
    ]
    return "\n\n".join(section for section in sections if section)


def run_text(found: Comparison) -> str:
    """What is trained and within which limits."""
    from planner.foundation.units import format_count, format_seconds

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
    header = ["dollars", "from", "to", "days", "devices", "MFU", "kept", "memory", "option"]
    rows = [[*_figures(option), option.name] for option in options]
    if names:
        header, rows = ["", *header], [[name, *row] for name, row in zip(names, rows, strict=True)]
    return table(header, rows, numbers=range(len(names[:1]), len(names[:1]) + 8))


def plans_text(options: Sequence[Option]) -> str:
    """The plan of each cluster, once."""
    plans = {option.cluster: option.plan.label for option in options}
    return table(("cluster", "plan"), list(plans.items()), numbers=()) if plans else ""


def _figures(option: Option) -> list[str]:
    low, high = option.cost_interval_usd or (None, None)
    plan = option.plan
    return [
        short_money(option.cost_usd) + ("?" if option.rate.doubtful else ""),
        "" if low is None else short_money(low),
        "" if high is None else short_money(high),
        days_text(option.days),
        f"{option.devices:,}",
        "-" if plan.mfu is None else f"{plan.mfu:.0%}",
        f"{option.goodput:.1%}",
        f"{plan.peak_memory_bytes / plan.memory_limit_bytes:.0%}",
    ]


def short_money(usd: float | None) -> str:
    """Dollars in at most three digits where thousands and millions can be told: `$192K`, `$1.74M`."""
    if usd is None or usd < 9_995:
        return money(usd)
    for unit, size in (("K", 1e3), ("M", 1e6), ("B", 1e9)):
        if usd < 999.5 * size:
            return f"${usd / size:#.3g}".rstrip(".") + unit
    return money(usd)


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
    from planner.sizing.comparison import Standing

    kept = [outcome for outcome in outcomes if outcome.standing is Standing.KEEPS]
    missed = [outcome for outcome in outcomes if outcome.standing is not Standing.KEEPS]
    parts = []
    if kept:
        parts.append(
            "the cheapest of each offer\n" + options_table([o.best for o in kept[:MOST_ROWS]])
            + (f"\n  and {len(kept) - MOST_ROWS} more: --json" if len(kept) > MOST_ROWS else "")
        )  # fmt: skip
    if missed:
        rows = [
            (
                days_text(o.best.days),
                short_money(o.best.cost_usd),
                o.best.name,
                f"{o.standing}: {help_for(o, found)}",
            )
            for o in missed[:FEW_ROWS]
        ]
        header = ("days", "dollars", "the nearest of other offers", "what stands in the way: what would help")
        text = wrapped_table(header, rows, WIDTH)
        parts.append(text + (f"\n  and {len(missed) - FEW_ROWS} more" if len(missed) > FEW_ROWS else ""))
    return "\n\n".join(parts)


def help_for(outcome: Outcome, found: Comparison) -> str:
    """What would let an offer keep the goal."""
    from planner.foundation.units import DAY_S

    best, goal = outcome.best, found.goal
    late = goal.deadline_s is not None and best.days * DAY_S > goal.deadline_s
    dear = best.cost_usd is not None and goal.budget_usd is not None and best.cost_usd > goal.budget_usd
    helps = [f"--deadline {_enough(best.days)}d"] if late else []
    helps += [f"--budget {_enough(best.cost_usd)}"] if dear and best.cost_usd else []
    helps += ["a price: --prices FILE"] if best.cost_usd is None else []
    return " and ".join(helps) or "fewer --tokens"


def _enough(value: float) -> str:
    """A limit of three digits that a value keeps."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit + 1e-6) * unit:.10g}"


def left_out_text(left_out: Sequence[LeftOut]) -> str:
    """Offers without an option, those with the same reason together."""
    if not left_out:
        return ""
    rows = _by_reason(left_out)
    more = len(rows) - FEW_ROWS
    text = wrapped_table(("offers", "without a plan", "why"), rows[:FEW_ROWS], WIDTH)
    return text + (f"\n  and {more} more reasons: --json" if more > 0 else "")


def _by_reason(left_out: Sequence[LeftOut]) -> list[tuple[int, str, str]]:
    """How many offers have the same reason, one of them, and the reason; the most frequent first."""
    reasons = Counter(each.reason for each in left_out)
    first = {each.reason: each.offer for each in reversed(left_out)}
    return [
        (count, first[reason] + (" and others" if count > 1 else ""), reason)
        for reason, count in reasons.most_common()
    ]


def _sensitivity(found: Comparison) -> str:
    rows = [
        (f"{each.low}: {_ends(each.low_cost_usd, each.low_days)}",
         f"{each.high}: {_ends(each.high_cost_usd, each.high_days)}",
         f"{each.what}: " + ("the same" if each.best_stays else f"{each.best_at_low}; {each.best_at_high}"))
        for each in found.sensitivity
    ]  # fmt: skip
    header = ("low", "high", "what changes: the best option then, at the low and at the high end")
    return "" if not rows else wrapped_table(header, rows, WIDTH)


def _ends(usd: float | None, days: float) -> str:
    return f"{short_money(usd)}, {days_text(days)} d"


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
    from planner.sizing.assumptions import PROFILE_OF

    known = [option.rate.as_of for option in shown if option.cost_usd is not None]
    dates = sorted({as_of for as_of in known if DATE.fullmatch(as_of)})
    span = "" if not dates else f", as of {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    undated = sum(not DATE.fullmatch(as_of) for as_of in known)
    span += f"{' and' if span else ','} some of unknown date" if undated else ""
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
            *((a.what, a.source) for a in found.assumptions if a.what.startswith(PROFILE_OF)),
            ("assumed", f"{len(found.assumptions)} figures with their sources: --json or --html"),
            ("not modelled", "; ".join(found.not_modelled)),
        ],
        WIDTH,
    )


def nothing_text(found: Comparison) -> str:
    """Why no option keeps the goal: the soonest, what the budget buys, and what would help."""
    from planner.foundation.units import format_seconds
    from planner.sizing.comparison import answers_of

    if not found.options:
        reasons = [f"  {offer}: {reason}" for _, offer, reason in _by_reason(found.left_out)[:FEW_ROWS]]
        helps = "other --device or --instance, more --nodes or --max-devices, or fewer tokens in --seq"
        helps = helps if found.goal.deadline_s is None else f"a later --deadline, fewer --tokens, {helps}"
        return "\n".join([f"no offer has a plan for {found.model}.", *reasons, f"What would help: {helps}."])
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
    from planner.foundation.units import format_count

    return format_count(round(tokens))
