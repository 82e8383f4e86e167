"""Words of the page of hardware choices: names, amounts, the answer in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S, GIB, format_bytes, format_count, format_seconds
from planner.job.objective import Goal, Minimise
from planner.model.workload import Method
from planner.report.words import Tile, percent
from planner.sizing.comparison import Comparison, Option, Pricing, extremes
from planner.sizing.sensitivity import best_of

UNKNOWN = "unknown"
ON_PREMISES = "on-premises"
TITLES = {
    "aws": "AWS", "azure": "Azure", "gcp": "GCP", "oci": "OCI", "coreweave": "CoreWeave", "lambda": "Lambda",
    "nebius": "Nebius", "runpod": "RunPod", "vast": "Vast", "verda": "Verda", "vultr": "Vultr",
    ON_PREMISES: "On-premises", "yours": "Yours",
}  # fmt: skip


METHOD_WORDS = {
    Method.PRETRAIN: "Pretraining of",
    Method.FINETUNE: "Fine-tuning of",
    Method.LORA: "LoRA adapters beside",
}


@frozen
class Picks:
    """Options that a reader asks for first. `best` is what the page recommends; None: nothing meets the goal.

    The others are the least of their kind among those that meet the goal, or among all where none does.
    """

    best: Option | None
    cheapest: Option | None
    fastest: Option | None
    smallest: Option | None


def provider_of(option: Option) -> str:
    """Whose nodes they are: a provider, `on-premises`, or `yours`."""
    if option.rate.pricing is Pricing.ON_PREMISES:
        return ON_PREMISES
    return option.provider or "yours"


def provider_title(name: str) -> str:
    return TITLES.get(name, name)


def usd(value: float | None) -> str:
    """`$12.34`, `$123,456`, `$1.235M`; `unknown` where it is."""
    if value is None:
        return UNKNOWN
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{'-' if value < 0 else ''}${abs(value) / size:,.4g}{unit}"
    digits = 2 if abs(value) < 100 else 0
    return f"{'-' if value < 0 else ''}${abs(value):,.{digits}f}"


def usd_short(value: float) -> str:
    """Three significant digits: `$1.24M`, `$123K`, `$9.50`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"${short_number(value / (1e3 if unit == 'K' else size))}{unit}"
    return usd(value)


def short_number(value: float) -> str:
    """Three significant digits, without an exponent: `0.0123`, `28.1`, `1,240`."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def days(value: float) -> str:
    """`28.1 days`, and hours or less below two days."""
    return f"{short_number(value)} days" if value >= 2 else format_seconds(value * DAY_S)


def limit_days(deadline_s: float) -> str:
    """A deadline as it was asked for: `30 days`."""
    value = deadline_s / DAY_S
    return f"{value:,.10g} days" if value >= 2 and round(value, 1) == value else days(value)


def days_range(option: Option) -> str:
    low, high = option.days_interval
    return f"{days(low)} to {days(high)}"


def usd_range(option: Option) -> str:
    if option.cost_interval_usd is None:
        return ""
    low, high = option.cost_interval_usd
    return f"{usd_short(low)} to {usd_short(high)}"


def cost_words(option: Option) -> str:
    """Dollars with their interval, or that they are unknown."""
    if option.cost_usd is None:
        return "an unknown price"
    between = usd_range(option)
    return f"{usd(option.cost_usd)} ({between})" if between else usd(option.cost_usd)


def goal_words(option: Option, goal: Goal) -> str:
    """Whether the goal is kept, and by what it is missed."""
    missed = []
    if goal.deadline_s is not None and option.days * DAY_S > goal.deadline_s:
        missed.append("late")
    if goal.budget_usd is not None and option.cost_usd is None:
        missed.append("price unknown")
    elif goal.budget_usd is not None and (option.cost_usd or 0.0) > goal.budget_usd:
        missed.append("over budget")
    if missed:
        return ", ".join(missed)
    return "met" if option.meets else "missed"


def asked_for(goal: Goal) -> str:
    """The limits in words; empty where there are none."""
    limits = []
    if goal.deadline_s is not None:
        limits.append(f"a deadline of {limit_days(goal.deadline_s)}")
    if goal.budget_usd is not None:
        limits.append(f"a budget of {usd(goal.budget_usd)}")
    return " and ".join(limits)


def pick(comparison: Comparison) -> Picks:
    """The best, the cheapest, the soonest and the smallest."""
    met = [option for option in comparison.options if option.meets]
    pool = met or list(comparison.options)
    found = extremes(pool)
    best = best_of(met, comparison.goal) if met else None
    return Picks(best=best, cheapest=found.cheapest, fastest=found.soonest, smallest=found.smallest)


def headline(comparison: Comparison, picks: Picks) -> str:
    """The answer in one sentence, or why there is none."""
    asked = asked_for(comparison.goal)
    if not comparison.options:
        return "None of the offers has a plan that fits: what stands in the way of each is listed below."
    best = picks.best
    if best is None:
        return _nothing_meets(asked, picks)
    which = "soonest" if comparison.goal.minimise is Minimise.TIME else "cheapest"
    if best.cost_usd is None and which == "cheapest":
        which = "soonest (no price is known)"
    where = f" that keeps {asked}" if asked else ""
    return (
        f"The {which} way{where} is {best.name}: {days(best.days)} ({days_range(best)}) and "
        f"{cost_words(best)} on {best.devices:,} {best.device}, and its plan "
        f"{'fits in memory' if best.plan.verdict == 'SAFE' else 'may not fit in memory'}."
    )


def _nothing_meets(asked: str, picks: Picks) -> str:
    text = f"No option keeps {asked}." if asked else "No option meets the goal."
    if picks.fastest is not None:
        text += f" The soonest is {picks.fastest.name}: {days(picks.fastest.days)} and "
        text += f"{cost_words(picks.fastest)}."
    if picks.cheapest is not None and picks.cheapest is not picks.fastest:
        text += f" The cheapest is {picks.cheapest.name}: {days(picks.cheapest.days)} and "
        text += f"{cost_words(picks.cheapest)}."
    return text


def run_sentence(comparison: Comparison) -> str:
    """What is trained, on how much, within which limits."""
    work = comparison.workload
    size = f"{format_count(comparison.params_total)} parameters"
    if comparison.params_active != comparison.params_total:
        size += f", {format_count(comparison.params_active)} of them active for a token"
    tokens = f"{format_count(work.tokens)} tokens" if work.tokens is not None else "open-ended tokens"
    note = f" ({comparison.tokens_note})" if comparison.tokens_note else ""
    asked = asked_for(comparison.goal)
    return (
        f"{METHOD_WORDS[work.method]} {size} on {tokens}{note}, {work.batch:,} sequences of {work.seq:,} "
        f"tokens a step, in {work.precision} with {work.optimizer}" + (f"; {asked}." if asked else ".")
    )


def pick_tiles(comparison: Comparison, picks: Picks) -> tuple[Tile, ...]:
    """The cheapest, the soonest and the smallest as tiles."""
    among = "that meets the goal" if picks.best is not None and asked_for(comparison.goal) else "of all"
    tiles = []
    for title, option in (
        ("Cheapest", picks.cheapest),
        ("Soonest", picks.fastest),
        ("Fewest devices", picks.smallest),
    ):
        if option is None:
            tiles.append(Tile(title=f"{title} {among}", value=UNKNOWN, detail="no price is known"))
            continue
        cost = "price unknown" if option.cost_usd is None else usd(option.cost_usd)
        value, rest = {
            "Cheapest": (cost, days(option.days)),
            "Soonest": (days(option.days), cost),
            "Fewest devices": (f"{option.devices:,} devices", f"{days(option.days)}, {cost}"),
        }[title]
        tiles.append(Tile(title=f"{title} {among}", value=value, detail=f"{option.name}: {rest}"))
    return tuple(tiles)


def warnings(comparison: Comparison, picks: Picks) -> tuple[str, ...]:
    """What a reader must know before believing the answer."""
    found = []
    best = picks.best
    if best is not None and best.rate.doubtful:
        found.append(f"The price of {best.name} is doubtful: {best.rate.doubtful}.")
    if best is not None and best.plan.verdict != "SAFE":
        found.append(f"Memory of {best.name} is {best.plan.verdict}: {memory_words(best)}.")
    if best is not None and best.rate.pricing.interruptible:
        found.append(
            f"{best.name} can be taken back at any time; what that costs is in its goodput of "
            f"{percent(best.goodput)}."
        )
    unpriced = sum(option.cost_usd is None for option in comparison.options)
    if unpriced:
        verb = "option has" if unpriced == 1 else "options have"
        found.append(f"{unpriced:,} {verb} no known price: their cost is unknown, not zero.")
    return tuple(found)


def memory_words(option: Option) -> str:
    """`61.2 GiB of 79.1 GiB`."""
    plan = option.plan
    return f"{format_bytes(plan.peak_memory_bytes)} of {format_bytes(plan.memory_limit_bytes)}"


def memory_short(option: Option) -> str:
    """`61.2 of 79.1 GiB`."""
    plan = option.plan
    peak, limit = plan.peak_memory_bytes / GIB, plan.memory_limit_bytes / GIB
    return f"{short_number(peak)} of {short_number(limit)} GiB"


def mfu_words(option: Option) -> str:
    return UNKNOWN if option.plan.mfu is None else percent(option.plan.mfu)


def tip(option: Option) -> str:
    """All that a point of the plot stands for, a line each."""
    lines = [
        option.name,
        f"{cost_words(option)}, {days(option.days)} ({days_range(option)})",
        f"{option.devices:,} x {option.device}{f' in {option.region}' if option.region else ''}",
        f"plan {option.plan.label}",
        f"step {format_seconds(option.step_time_s)}, MFU {mfu_words(option)}, "
        f"goodput {percent(option.goodput)}",
        f"memory {memory_words(option)}: {option.plan.verdict}",
    ]
    if option.rate.doubtful:
        lines.append(f"doubtful price: {option.rate.doubtful}")
    if option.pareto:
        lines.append("Pareto: none is both cheaper and sooner")
    return "\n".join(lines)


def solve_command(comparison: Comparison, option: Option) -> str:
    """The command that makes the whole plan of an option."""
    work = comparison.workload
    words = [
        "plan", "solve", "--model", comparison.model, "--cluster", option.cluster, "--seq", str(work.seq),
        "--batch", str(work.batch),
    ]  # fmt: skip
    if work.tokens is not None:
        words += ["--tokens", str(work.tokens)]
    words += ["--precision", str(work.precision), "--optimizer", str(work.optimizer)]
    words += ["--method", str(work.method), "-o", "plan.json"]
    return _quoted(words)


def _quoted(words: Sequence[str]) -> str:
    import shlex

    return shlex.join(words)
