"""Rates: what an hour of a node costs under each pricing, from a market.

Of an instance: on demand as listed, spot where it is known, and reserved for some years where the provider
takes something off for that. No reserved price of a single instance was found in a source: with an
on-demand price p and a range of a to b off that holds for a provider in general,

    reserved = p (1 - (a + b) / 2)        low = p (1 - b)        high = p (1 - a)

A price of the user's stands in place of the listed ones, and no general range is taken off it.

Of a device on one's own premises: its cost by planner.hardware.on_premises. Each input moves to either end of
its range alone; the changes in one direction, taken as independent, add up as the root of their squares:

    low = max(0, c - sqrt(sum d_down^2))        high = c + sqrt(sum d_up^2)        dollars a device-hour
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from planner.hardware.user_prices import YOURS
from planner.sizing.offer import Pricing, Rate

if TYPE_CHECKING:
    from planner.hardware.device_file import DeviceFile
    from planner.hardware.instance import Instance
    from planner.hardware.on_premises import OnPremises
    from planner.hardware.prices import Market
    from planner.hardware.user_prices import PriceTerm

RENTED = "the whole instance: devices, CPUs, memory and local disks as listed; not storage, egress or support"
GIVEN = "what your price covers"
OWNED = (
    "purchase written off, electricity at work, room and cooling, staff and spare nodes; "
    "not storage, support contracts, interest or taxes"
)
RESERVED = {1: Pricing.RESERVED_1Y, 3: Pricing.RESERVED_3Y}
"""Commitments by their years; a term of other years is shown beside the price, and no rate is made of it."""

_MARKS = {"READ": "", "memory": "from memory", "READ-low": "read, low confidence", "-": ""}


def rates_of(instance: Instance, market: Market) -> tuple[Rate, ...]:
    """The rates of one instance. The first is on demand, or the user's; without a price it is unknown."""
    if instance.price_mark == YOURS:
        return _own_rates(instance)
    doubts = [doubt.reason for doubt in market.doubtful if doubt.name == instance.full_name]
    listed = Rate(
        pricing=Pricing.ON_DEMAND,
        usd_per_node_hour=instance.ondemand_usd_per_hour,
        as_of=instance.as_of,
        source=_source(instance),
        includes=RENTED,
        doubtful=doubts[0] if doubts else "",
    )
    return (listed, *_spot(instance, RENTED), *_reserved(listed, instance.provider))


def _own_rates(instance: Instance) -> tuple[Rate, ...]:
    """The user's prices of an instance: the one on demand first, even where only that of spot was given."""
    own = Rate(
        pricing=Pricing.YOURS if instance.ondemand_usd_per_hour is not None else Pricing.ON_DEMAND,
        usd_per_node_hour=instance.ondemand_usd_per_hour,
        as_of=instance.as_of,
        source=f"{YOURS}: {instance.source}",
        includes=GIVEN,
    )
    return (own, *_spot(instance, GIVEN))


def _spot(instance: Instance, includes: str) -> tuple[Rate, ...]:
    price = instance.spot_usd_per_hour
    if price is None:
        return ()
    source = f"{YOURS}: {instance.source}" if instance.price_mark == YOURS else _source(instance)
    return (
        Rate(
            pricing=Pricing.SPOT,
            usd_per_node_hour=price,
            as_of=instance.as_of,
            source=source,
            includes=includes,
        ),
    )


def _source(instance: Instance) -> str:
    """Where a listed price is from, and how it was read; notes of the row (spot ranges, older prices) too."""
    mark = _MARKS.get(instance.price_mark, instance.price_mark)
    return "; ".join(dict.fromkeys(part for part in (instance.source, mark, instance.note) if part))


def _reserved(listed: Rate, provider: str) -> tuple[Rate, ...]:
    """The price on demand less what the provider takes off in general, where both are known."""
    from planner.hardware.prices import price_terms

    price = listed.usd_per_node_hour
    if price is None:
        return ()
    return tuple(_committed(listed, price, term) for term in price_terms(provider) if term.years in RESERVED)


def _committed(listed: Rate, price: float, term: PriceTerm) -> Rate:
    return Rate(
        pricing=RESERVED[term.years],
        usd_per_node_hour=price * (1 - (term.low + term.high) / 2),
        low_usd_per_node_hour=price * (1 - term.high),
        high_usd_per_node_hour=price * (1 - term.low),
        as_of=term.as_of,
        source=f"{term.text()}: of {term.provider} in general, not of this instance; the middle of the range",
        includes=f"{listed.includes}; paid for all hours of the term, in use or not",
        doubtful=listed.doubtful,
    )


def rates_of_device(facts: DeviceFile, market: Market, devices_per_node: int) -> tuple[Rate, ...]:
    """The rate of nodes of a device that no instance brings: the user's, else the cost on premises.

    Without a purchase price or a power there is none: the rate is unknown, and its source says what lacks.
    """
    from planner.hardware.on_premises import cost_per_device_hour, missing
    from planner.hardware.prices import on_premises_inputs

    own = None if market.prices is None else market.prices.device_price(facts.name)
    if own is not None:
        return (
            Rate(
                pricing=Pricing.YOURS,
                usd_per_node_hour=own.usd_per_hour * devices_per_node,
                as_of=own.as_of,
                source=f"{YOURS}: {own.source}",
                includes=GIVEN,
            ),
        )
    inputs = market.on_premises or on_premises_inputs()
    cost = cost_per_device_hour(facts, inputs)
    if cost is None:
        lacking = f"no {' and no '.join(missing(facts, inputs))} of {facts.name} is known"
        return (Rate(pricing=Pricing.ON_PREMISES, usd_per_node_hour=None, source=lacking, includes=OWNED),)
    low, high = owned_interval(facts, inputs)
    return (
        Rate(
            pricing=Pricing.ON_PREMISES,
            usd_per_node_hour=cost.total_usd * devices_per_node,
            low_usd_per_node_hour=low * devices_per_node,
            high_usd_per_node_hour=high * devices_per_node,
            as_of=cost.as_of,
            source=(
                f"bought for {cost.purchase_usd:,.0f} dollars a device ({'; '.join(cost.sources)}), "
                f"{inputs.utilisation.value:.0%} of hours in use, {inputs.years.value:g} years"
            ),
            includes=OWNED,
        ),
    )


def owned_interval(facts: DeviceFile, inputs: OnPremises) -> tuple[float, float]:
    """Dollars of a used device-hour at the low and the high end, by the rule above.

    An input without a range, such as the user's own, moves nothing. The device must have a cost.
    """
    from planner.hardware.on_premises import cost_per_device_hour

    def cost_usd(changed: OnPremises) -> float:
        cost = cost_per_device_hour(facts, changed)
        assert cost is not None, facts.name
        return cost.total_usd

    middle = cost_usd(inputs)
    changes = [[cost_usd(end) - middle for end in ends] for ends in _ends(facts, inputs)]
    down = math.hypot(*(min(0.0, *pair) for pair in changes))
    up = math.hypot(*(max(0.0, *pair) for pair in changes))
    return max(0.0, middle - down), middle + up


def _ends(facts: DeviceFile, inputs: OnPremises) -> list[list[OnPremises]]:
    """The inputs with one at either end of its range, for each that has one; the purchase price too."""
    from planner.hardware.on_premises import BOUNDS, OwnedDevice

    found = []
    for name in BOUNDS:
        entry = getattr(inputs, name)
        ends = [value for value in (entry.low, entry.high) if value is not None]
        if ends:
            found.append(
                [
                    dataclasses.replace(inputs, **{name: dataclasses.replace(entry, value=value)})
                    for value in ends
                ]
            )
    own = inputs.devices.get(facts.name, OwnedDevice())
    if own.purchase_usd is None and facts.price is not None:
        ends = [value for value in (facts.price.low_usd, facts.price.high_usd) if value is not None]
        bought = [dataclasses.replace(own, purchase_usd=value) for value in ends]
        found += [
            [dataclasses.replace(inputs, devices={**inputs.devices, facts.name: device}) for device in bought]
        ]
    return [ends for ends in found if ends]
