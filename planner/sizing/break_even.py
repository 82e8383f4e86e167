"""Buying against renting a device: above which use owning is cheaper, and when it has paid for itself.

The cost on premises (planner.hardware.on_premises) is of an hour in use. What goes on through idle hours is
divided by the utilisation u, the share of hours in use; electricity is not:

    owned(u) = (running + written off) / u + energy                             dollars a device-hour in use
    owned(u*) = rent  =>  u* = (running + written off) / (rent - energy)

with running: room and staff, written off: capital less its residual over the years of use, both of every
hour. Renting is cheaper even at full use, and u* is None, where it would be above 1. At utilisation u owning
spends less than renting by `saved` dollars an hour, capital aside, and has paid for itself when that has
grown to all that is written off over the years; at u* this is at their end, below it never:

    saved  = u (rent - energy) - running
    months = written off x years / (saved x 730 h)          730 h = 8760 h / 12

Rent on demand, as spot or at a price of the user's is of hours in use. A reserved rate runs on through idle
hours: it costs rent / u an hour in use, so owning is cheaper at every use (u* = 0) where it is at full use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from planner.foundation.frozen import frozen
from planner.hardware.device_file import DeviceFile
from planner.hardware.on_premises import OnPremises, cost_per_device_hour
from planner.sizing.comparison import BreakEven
from planner.sizing.offer import Offer, Pricing, Rate

COMMITTED = frozenset({Pricing.RESERVED_1Y, Pricing.RESERVED_3Y})
"""Pricings that are paid for in idle hours too."""


@frozen
class Owned:
    """One device of one's own, in dollars of every hour, in use or not, and of an hour in use besides."""

    device: str
    running_usd_per_hour: float
    written_off_usd_per_hour: float
    energy_usd_per_used_hour: float
    years: float

    @property
    def fixed_usd_per_hour(self) -> float:
        return self.running_usd_per_hour + self.written_off_usd_per_hour

    def usd_per_used_hour(self, utilisation: float) -> float:
        """What an hour in use costs where this share of hours is in use."""
        return self.fixed_usd_per_hour / utilisation + self.energy_usd_per_used_hour


def owned(facts: DeviceFile, inputs: OnPremises) -> Owned | None:
    """What owning a device costs; None where its purchase price or its power is unknown."""
    full = dataclasses.replace(inputs, utilisation=dataclasses.replace(inputs.utilisation, value=1.0))
    cost = cost_per_device_hour(facts, full)
    if cost is None:
        return None
    return Owned(
        device=facts.name,
        running_usd_per_hour=cost.facility_usd + cost.staff_usd,
        written_off_usd_per_hour=cost.written_off_usd,
        energy_usd_per_used_hour=cost.energy_usd,
        years=inputs.years.value,
    )


def break_even_utilisation(device: Owned, rent_usd: float, pricing: Pricing) -> float | None:
    """u* for a rent of `rent_usd` a device-hour, or None where renting is cheaper even at full use."""
    margin = rent_usd - device.energy_usd_per_used_hour
    if margin <= 0 or margin < device.fixed_usd_per_hour:
        return None
    return 0.0 if pricing in COMMITTED else device.fixed_usd_per_hour / margin


def months_to_pay_back(device: Owned, rent_usd: float, pricing: Pricing, utilisation: float) -> float | None:
    """Months until owning has paid for itself at a utilisation; None where that is after its years of use."""
    rent_usd_per_hour = rent_usd if pricing in COMMITTED else rent_usd * utilisation
    saved = rent_usd_per_hour - utilisation * device.energy_usd_per_used_hour - device.running_usd_per_hour
    life_months = 12 * device.years
    if saved <= 0:
        return None
    months = life_months * device.written_off_usd_per_hour / saved
    return months if months <= life_months * (1 + 1e-9) else None


def break_evens(facts: DeviceFile, inputs: OnPremises, offers: Iterable[Offer]) -> tuple[BreakEven, ...]:
    """Owning a device against each priced rate of the offers of it, the cheapest rent first.

    Empty where owning it has no known cost. The utilisation for the months is that of `inputs`.
    """
    device = owned(facts, inputs)
    if device is None:
        return ()
    used = inputs.utilisation.value
    rates = [(offer, rate) for offer in offers if offer.device.name == facts.name for rate in offer.rates]
    found = [
        _against(device, used, offer, rate, rate.usd_per_node_hour / offer.devices_per_node)
        for offer, rate in rates
        if rate.usd_per_node_hour is not None and rate.pricing is not Pricing.ON_PREMISES
    ]
    return tuple(sorted(found, key=lambda row: (row.rented_usd_per_device_hour, row.rented)))


def _against(device: Owned, used: float, offer: Offer, rate: Rate, rent_usd: float) -> BreakEven:
    doubt = ", a doubtful price" if rate.doubtful else ""
    return BreakEven(
        device=device.device,
        rented=f"{offer.name}, {rate.pricing}{doubt}",
        rented_usd_per_device_hour=rent_usd,
        owned_usd_per_device_hour=device.usd_per_used_hour(used),
        owned_at_utilisation=used,
        utilisation=break_even_utilisation(device, rent_usd, rate.pricing),
        months=months_to_pay_back(device, rent_usd, rate.pricing, used),
    )
