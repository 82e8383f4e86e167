"""What the figures of a comparison rest on, each with its source, its date, and the flag that changes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from planner.foundation.units import format_count
from planner.hardware.catalog import load_device
from planner.hardware.on_premises import BOUNDS, OnPremises
from planner.profile.choose import use_of
from planner.sizing.comparison import Assumption, Option, Pricing, SizingRequest
from planner.sizing.energy import energy_facts
from planner.sizing.sized import profiles_for
from planner.sizing.usual_overheads import overhead_assumptions, usual_overheads

PROFILE_OF = "profile of"
"""How the assumption begins that names the profile of a device."""


def assumptions_of(
    request: SizingRequest, options: Sequence[Option], inputs: OnPremises
) -> tuple[Assumption, ...]:
    """Of the run as a whole, and of the options that nothing beats; equal ones are told once."""
    shown = [option for option in options if option.pareto]
    found = [*_of_run(request), *_of_plans(request, shown), *_of_prices(shown), *_of_upkeep(request, shown)]
    if any(option.rate.pricing is Pricing.ON_PREMISES for option in shown):
        found += _of_premises(inputs)
    found += _of_energy(shown)
    return tuple(dict.fromkeys(found))


def _of_run(request: SizingRequest) -> Iterator[Assumption]:
    workload = request.workload
    if workload.tokens is not None:
        yield Assumption(
            what="tokens of the whole run",
            value=format_count(workload.tokens),
            source=request.tokens_note or "as asked",
            flag="--tokens",
        )
    if request.precision is None:
        yield Assumption(
            what="precision",
            value="bf16, and fp16 on devices without it",
            source="what each device is made for",
            flag="--precision",
        )


def _of_plans(request: SizingRequest, shown: Iterable[Option]) -> Iterator[Assumption]:
    """How much of the step times rests on measurements of the device, and whose."""
    profiles = profiles_for(request)
    for option in shown:
        device = load_device(option.device).device()
        profile = profiles.get(device.name)
        if profile is not None:
            precision = request.precision or device.usual_precision
            use = use_of(profile, device, model=request.model, precision=precision)
            yield Assumption(
                what=f"{PROFILE_OF} {device.title}",
                value=use.name,
                source=use.text(),
                as_of=use.created[:10],
                flag="--profile",
            )
        coverage = option.plan.coverage
        known = {
            "measured or interpolated": coverage.measured + coverage.interpolated,
            "by constants fitted to runs": coverage.fitted,
            "by datasheets": coverage.datasheet,
        }
        yield Assumption(
            what=f"step times of {load_device(option.device).title}",
            value=", ".join(f"{share:.0%} {name}" for name, share in known.items() if share >= 0.005),
            source="the cost model's own account (plan estimate tells more)",
            flag="--profile",
        )


def _of_prices(shown: Iterable[Option]) -> Iterator[Assumption]:
    for option in shown:
        rate = option.rate
        price = rate.usd_per_node_hour
        unit = "unknown" if price is None else f"${price:,.2f} a node-hour"
        yield Assumption(
            what=f"price of {option.name.partition(' x ')[2]}",
            value=f"{unit}; {rate.includes}" if rate.includes else unit,
            source=rate.source + (f"; doubtful: {rate.doubtful}" if rate.doubtful else ""),
            as_of=rate.as_of,
            flag="--prices",
        )


def _of_upkeep(request: SizingRequest, shown: Iterable[Option]) -> Iterator[Assumption]:
    for option in shown:
        spot = option.rate.pricing.interruptible
        overheads = usual_overheads(option.devices, request.overheads, spot=spot)
        yield from overhead_assumptions(overheads, load_device(option.device).device(), request.overheads)


def _of_premises(inputs: OnPremises) -> Iterator[Assumption]:
    for name in BOUNDS:
        entry = getattr(inputs, name)
        span = "" if entry.low is None or entry.high is None else f" ({entry.low:g} to {entry.high:g})"
        yield Assumption(
            what=f"on premises: {entry.unit}",
            value=f"{entry.value:g}{span}",
            source=entry.source + ("; from memory" if entry.unverified and entry.source != "memory" else ""),
            flag="--prices",
        )


def _of_energy(shown: Iterable[Option]) -> Iterator[Assumption]:
    facts = energy_facts()
    for option in shown:
        if option.energy_kwh is None or not option.instance:
            continue
        pue = facts.pue_of(option.provider)
        yield Assumption(what=f"PUE of {option.provider}", value=f"{pue.value:g}", source=pue.source)
        grid = facts.grid_of(option.provider, option.region)
        if grid is not None:
            yield Assumption(
                what=f"grid of {option.provider} {option.region}",
                value=f"{grid.g_per_kwh:g} g CO2 a kWh: {grid.name}",
                source=grid.source,
                as_of=str(grid.year),
            )
