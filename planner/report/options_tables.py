"""The tables of the page of hardware choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from planner.foundation.frozen import frozen
from planner.foundation.units import format_count, format_seconds
from planner.report import options_words as words
from planner.report.words import Table, percent
from planner.sizing.comparison import Comparison, Option

LECTURE = ("aws", "azure", "gcp", words.ON_PREMISES)
"""The choices that stand side by side on every page."""


LEAST_TOLD = 0.005
"""Shares below this are not told: they would read 0 %."""


@frozen
class Cell:
    """A cell: its text, a line of detail below, and the number that it sorts by (None: unknown, the last)."""

    text: str
    detail: str = ""
    value: float | None = None
    doubt: str = ""


@frozen
class Row:
    """An option as a line of the table, and what the filters ask of it."""

    index: int
    name: str
    detail: str
    provider: str
    provider_title: str
    device: str
    pricing: str
    devices: int
    pareto: bool
    meets: bool
    memory_share: float
    memory: str
    verdict: str
    region: str
    cells: tuple[Cell, ...]
    goal: str
    cluster: str


COLUMNS = (
    ("Days", "days"), ("Cost", "cost"), ("$ a billion tokens", "token-cost"),
    ("$ a node-hour", "price"), ("Goodput", "goodput"), ("Step", "step"), ("MFU", "mfu"),
)  # fmt: skip
"""Titles and keys of `Row.cells`, between what names an option and its memory."""


def option_rows(comparison: Comparison) -> tuple[Row, ...]:
    """Every option as a line of the table, in the comparison's order."""
    return tuple(_row(index, option, comparison) for index, option in enumerate(comparison.options))


def _row(index: int, option: Option, comparison: Comparison) -> Row:
    plan, rate = option.plan, option.rate
    thing = option.instance or f"{option.devices_per_node} {option.device}"
    share = plan.peak_memory_bytes / plan.memory_limit_bytes if plan.memory_limit_bytes else 0.0
    provider = words.provider_of(option)
    return Row(
        index=index,
        name=f"{option.nodes:,} x {thing}",
        detail=plan.label,
        provider=provider,
        provider_title=words.provider_title(provider),
        device=option.device,
        pricing=str(rate.pricing),
        devices=option.devices,
        pareto=option.pareto,
        meets=option.meets,
        memory_share=share,
        memory=words.memory_short(option),
        verdict=str(plan.verdict),
        region=option.region,
        cells=(
            _range_cell(option.days, option.days_interval, words.short_number),
            Cell(text=words.usd(option.cost_usd), detail=words.usd_range(option), value=option.cost_usd),
            Cell(text=words.usd(option.usd_per_billion_tokens), value=option.usd_per_billion_tokens),
            Cell(
                text=words.usd(rate.usd_per_node_hour),
                detail=rate.as_of.partition(" (")[0],
                value=rate.usd_per_node_hour,
                doubt=rate.doubtful,
            ),
            Cell(text=percent(option.goodput), value=option.goodput),
            Cell(text=format_seconds(option.step_time_s), value=option.step_time_s),
            Cell(text=words.mfu_words(option), value=plan.mfu),
        ),
        goal=words.goal_words(option, comparison.goal),
        cluster=option.cluster,
    )


def _range_cell(value: float, interval: tuple[float, float], text: Callable[[float], str]) -> Cell:
    low, high = interval
    return Cell(text=text(value), detail=f"{text(low)} to {text(high)}", value=value)


def few(comparison: Comparison, picks: words.Picks) -> tuple[tuple[str, Option], ...]:
    """The options that are shown closely, with why: the picks, and the cheapest of each of the lecture's."""
    found: dict[int, tuple[list[str], Option]] = {}
    named = [
        ("best", picks.best),
        ("cheapest", picks.cheapest),
        ("soonest", picks.fastest),
        ("fewest devices", picks.smallest),
    ]
    named += [
        (f"cheapest of {words.provider_title(name)}", cheapest_of(comparison, name)) for name in LECTURE
    ]
    for why, option in named:
        if option is not None:
            found.setdefault(id(option), ([], option))[0].append(why)
    return tuple((", ".join(whys), option) for whys, option in found.values())


def cheapest_of(comparison: Comparison, provider: str) -> Option | None:
    """A provider's cheapest option that meets the goal; else its cheapest, else its soonest."""
    own = [option for option in comparison.options if words.provider_of(option) == provider]
    return min(
        own,
        key=lambda o: (not o.meets, o.cost_usd is None, o.cost_usd or 0.0, o.days),
        default=None,
    )


def side_by_side(comparison: Comparison) -> Table:
    """AWS, Azure, GCP and one's own premises for the same run, against the cheapest of them."""
    found = [(name, cheapest_of(comparison, name)) for name in LECTURE]
    costs = [o.cost_usd for _, o in found if o is not None and o.cost_usd is not None and o.meets]
    costs = costs or [o.cost_usd for _, o in found if o is not None and o.cost_usd is not None]
    least = min(costs, default=None)
    rows = []
    for name, option in found:
        if option is None:
            rows.append((words.provider_title(name), *[""] * 6, "no option: see what is left out"))
            continue
        rows.append(
            (
                words.provider_title(name),
                words.usd(option.cost_usd),
                words.days(option.days),
                difference(option.cost_usd, least),
                words.goal_words(option, comparison.goal),
                f"{option.devices:,}",
                _device_hour(option),
                option.name,
            )
        )
    header = (
        "choice", "cost", "time", "against the cheapest", "goal", "devices", "$ a device-hour",
        "its cheapest option",
    )  # fmt: skip
    return Table(header=header, rows=tuple(rows), numbers=(1, 7))


def difference(cost_usd: float | None, least: float | None) -> str:
    """`+$230,000 (+18 %)`."""
    if cost_usd is None or least is None:
        return words.UNKNOWN
    if cost_usd == least:
        return "the cheapest"
    more = cost_usd - least
    share = f" ({100 * more / least:+.0f} %)" if least > 0 else ""
    return f"{'+' if more > 0 else ''}{words.usd(more)}{share}"


def _device_hour(option: Option) -> str:
    rate = option.rate.usd_per_node_hour
    return words.usd(None if rate is None else rate / option.devices_per_node)


def energy_table(chosen: Sequence[tuple[str, Option]]) -> Table:
    """Energy, carbon and the cost of a billion tokens of the options that are shown closely."""
    rows = tuple(
        (
            option.name,
            words.usd(option.cost_usd),
            words.usd(option.usd_per_billion_tokens),
            _amount(option.energy_kwh, 1000, "MWh"),
            _amount(option.carbon_kg, 1000, "t CO2e"),
        )
        for _, option in chosen
    )
    header = ("option", "cost", "a billion tokens", "energy", "carbon")
    return Table(header=header, rows=rows)


def _amount(value: float | None, divisor: float, unit: str) -> str:
    return words.UNKNOWN if value is None else f"{words.short_number(value / divisor)} {unit}"


def sensitivity_table(comparison: Comparison) -> Table:
    rows = tuple(
        (
            row.what,
            f"{row.low} to {row.high}",
            f"{words.days(row.low_days)} to {words.days(row.high_days)}",
            f"{words.usd(row.low_cost_usd)} to {words.usd(row.high_cost_usd)}",
            "stays the best" if row.best_stays else _other_best(row.best_at_low, row.best_at_high),
        )
        for row in comparison.sensitivity
    )
    header = ("input", "from low to high", "time", "cost", "the best option")
    return Table(header=header, rows=rows, numbers=(2, 4))


def _other_best(low: str, high: str) -> str:
    parts = [f"at the {end} end {name}" for end, name in (("low", low), ("high", high)) if name]
    return "; ".join(parts) if parts else "another is better"


def break_even_table(comparison: Comparison) -> Table:
    rows = tuple(
        (
            row.device,
            row.rented,
            words.usd(row.rented_usd_per_device_hour),
            f"{words.usd(row.owned_usd_per_device_hour)} at {percent(row.owned_at_utilisation, 0)} in use",
            _cheaper_from(row.utilisation),
            "not in its years of use" if row.months is None else f"{words.short_number(row.months)} months",
        )
        for row in comparison.break_even
    )
    header = (
        "device", "rented as", "rented, a device-hour", "owned, a device-hour",
        "buying is cheaper", "pays back after",
    )  # fmt: skip
    return Table(header=header, rows=rows, numbers=(2, 4))


def _cheaper_from(utilisation: float | None) -> str:
    if utilisation is None:
        return "never: renting is cheaper at full use"
    if utilisation == 0:
        return "always: the rent runs on while idle"
    return f"from {percent(utilisation, 0)} in use"


def price_table(options: Iterable[Option]) -> Table:
    """Every price of an option: when it was so, where it is from, what it covers, whether to doubt it."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for option in options:
        rate = option.rate
        thing = option.instance or option.device
        key = (words.provider_of(option), thing, str(rate.pricing), option.region)
        if key in found:
            continue
        between = ""
        if rate.low_usd_per_node_hour is not None and rate.high_usd_per_node_hour is not None:
            between = (
                f" ({words.usd(rate.low_usd_per_node_hour)} to {words.usd(rate.high_usd_per_node_hour)})"
            )
        found[key] = (
            f"{words.provider_title(key[0])} {thing}",
            str(rate.pricing),
            option.region,
            words.usd(rate.usd_per_node_hour) + between,
            rate.as_of or words.UNKNOWN,
            f"doubtful: {rate.doubtful}" if rate.doubtful else "",
            rate.includes,
            rate.source or ("" if rate.usd_per_node_hour is None else words.UNKNOWN),
        )
    header = ("node", "pricing", "region", "$ per node-hour", "as of", "doubt", "covers", "source")
    return Table(header=header, rows=tuple(found[key] for key in sorted(found)), numbers=(3, 4))


def assumption_table(comparison: Comparison) -> Table:
    rows = tuple((a.what, a.value, a.as_of, a.flag, a.source) for a in comparison.assumptions)
    return Table(header=("assumption", "value", "as of", "change with", "source"), rows=rows, numbers=(9, 9))


def left_out_table(comparison: Comparison) -> Table:
    """What has no option, by reason: those of most offers first."""
    reasons: dict[str, list[str]] = {}
    for left in comparison.left_out:
        reasons.setdefault(left.reason, []).append(left.offer)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    rows = tuple((reason, f"{len(offers):,}", ", ".join(offers)) for reason, offers in ordered)
    return Table(header=("why", "offers", "which"), rows=rows, numbers=(1, 2))


def coverage_words(option: Option) -> str:
    """What the best option's times rest on."""
    coverage = option.plan.coverage
    parts = [
        f"{percent(share, 0)} {name}"
        for name, share in (
            ("measured", coverage.measured),
            ("interpolated between measurements", coverage.interpolated),
            ("from fitted constants", coverage.fitted),
            ("from datasheets", coverage.datasheet),
        )
        if share >= LEAST_TOLD
    ]
    gap = option.plan.step_time_s / option.plan.lower_bound_s - 1 if option.plan.lower_bound_s > 0 else None
    more = (
        ""
        if gap is None
        else f" No other plan of usual choices shortens its step by more than {percent(gap / (1 + gap))}."
    )
    speed = f"{format_count(option.plan.tokens_per_s)} tokens/s"
    return f"Times of {option.name} ({speed}): {', '.join(parts)}.{more}"
