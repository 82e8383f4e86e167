"""Buying against renting: both cost the same at the break-even, by a ledger of months and by laws."""

from __future__ import annotations

import dataclasses
import random

import pytest

from planner.hardware import catalog
from planner.hardware.on_premises import OnPremises, cost_per_device_hour
from planner.hardware.prices import on_premises_inputs, shipped_market
from planner.sizing.comparison import Offer, Pricing
from planner.sizing.offers import rates_of, rates_of_device
from planner.sizing.sensitivity import (
    COMMITTED,
    Owned,
    break_even_utilisation,
    break_evens,
    months_to_pay_back,
    owned,
)

FACTS = catalog.load_device("h100")
INPUTS = on_premises_inputs()
MARKET = shipped_market()


def at(utilisation: float) -> OnPremises:
    return dataclasses.replace(INPUTS, utilisation=dataclasses.replace(INPUTS.utilisation, value=utilisation))


def h100() -> Owned:
    found = owned(FACTS, INPUTS)
    assert found is not None
    return found


def ledger_usd(utilisation: float, rent_usd: float, months: float) -> tuple[float, float]:
    """Dollars of renting and of owning one device for some months, from the inputs alone."""
    hours = months * 730
    value = {name: getattr(INPUTS, name).value for name in INPUTS.__dataclass_fields__ if name != "devices"}
    capital = 30_000 * value["server_factor"] * (1 + value["network_share"] + value["storage_share"])
    capital *= 1 + value["spare_share"]
    lost = capital * (1 - value["residual_share"])
    energy = 0.7 * value["node_power_over_tdp"] * value["pue"] * value["usd_per_kwh"] * hours * utilisation
    room = 0.7 * value["nameplate_power_over_tdp"] * value["facility_usd_per_kw_month"] * months
    staff = value["staff_per_device"] * value["staff_usd_per_year"] * months / 12
    return rent_usd * hours * utilisation, lost + energy + room + staff


@pytest.mark.parametrize("utilisation", [0.05, 0.3, 0.7, 1.0])
def test_it_is_the_cost_on_premises_at_every_use(utilisation: float) -> None:
    cost = cost_per_device_hour(FACTS, at(utilisation))
    assert cost is not None
    assert h100().usd_per_used_hour(utilisation) == pytest.approx(cost.total_usd)


@pytest.mark.parametrize("rent", [2.7, 3.99, 6.88, 12.29])
def test_at_the_break_even_both_cost_the_same_over_the_years(rent: float) -> None:
    utilisation = break_even_utilisation(h100(), rent, Pricing.ON_DEMAND)
    assert utilisation is not None and 0 < utilisation < 1
    rented, bought = ledger_usd(utilisation, rent, 12 * INPUTS.years.value)
    assert rented == pytest.approx(bought)
    for more in (utilisation * 1.05, utilisation * 0.95):
        rented, bought = ledger_usd(more, rent, 12 * INPUTS.years.value)
        assert (bought < rented) == (more > utilisation)


@pytest.mark.parametrize("rent", [3.99, 6.88, 12.29])
def test_when_it_has_paid_both_have_cost_the_same(rent: float) -> None:
    months = months_to_pay_back(h100(), rent, Pricing.ON_DEMAND, 0.9)
    assert months is not None
    rented, bought = ledger_usd(0.9, rent, months)
    assert rented == pytest.approx(bought)


def test_at_the_break_even_it_has_paid_at_the_end_of_its_years() -> None:
    utilisation = break_even_utilisation(h100(), 5.0, Pricing.ON_DEMAND)
    assert utilisation is not None
    months = months_to_pay_back(h100(), 5.0, Pricing.ON_DEMAND, utilisation)
    assert months == pytest.approx(12 * INPUTS.years.value)
    assert months_to_pay_back(h100(), 5.0, Pricing.ON_DEMAND, utilisation * 0.99) is None


def test_dearer_rent_breaks_even_earlier_and_pays_sooner() -> None:
    rng = random.Random(8)
    rents = sorted(rng.uniform(0, 15) for _ in range(200))
    shares = [break_even_utilisation(h100(), rent, Pricing.ON_DEMAND) for rent in rents]
    months = [months_to_pay_back(h100(), rent, Pricing.ON_DEMAND, 0.7) for rent in rents]
    for found in (shares, months):
        values = [float("inf") if value is None else value for value in found]
        assert values == sorted(values, reverse=True)
        assert None in found and any(value is not None for value in found)


def test_rent_below_its_running_cost_never_breaks_even() -> None:
    for rent in (0.0, 0.05, h100().energy_usd_per_used_hour, h100().usd_per_used_hour(1.0) * 0.999):
        assert break_even_utilisation(h100(), rent, Pricing.ON_DEMAND) is None
    assert break_even_utilisation(h100(), h100().usd_per_used_hour(1.0) * 1.0001, Pricing.SPOT) == (
        pytest.approx(1.0, rel=1e-3)
    )


@pytest.mark.parametrize("pricing", sorted(COMMITTED))
def test_a_reserved_rate_runs_on_through_idle_hours(pricing: Pricing) -> None:
    full = h100().usd_per_used_hour(1.0)
    assert break_even_utilisation(h100(), full * 1.01, pricing) == 0.0
    assert break_even_utilisation(h100(), full * 0.99, pricing) is None
    idle = months_to_pay_back(h100(), 4.0, pricing, 0.2)
    busy = months_to_pay_back(h100(), 4.0, pricing, 1.0)
    assert idle is not None and busy is not None and idle < busy, "only owning saves by idling"


def offers() -> list[Offer]:
    found = []
    for name in ("aws/p5.48xlarge", "lambda/gpu_8x_h100_sxm5", "aws/p4d.24xlarge"):
        row = MARKET.instance(name)
        device = catalog.load_device(row.device).device()
        found.append(
            Offer(
                provider=row.provider,
                instance=row.name,
                device=device,
                devices_per_node=row.devices,
                network=row.network,
                rates=rates_of(row, MARKET),
            )
        )
    own = rates_of_device(FACTS, MARKET, 8)
    found.append(
        Offer(
            provider="", instance="", device=FACTS.device(), devices_per_node=8, network="ndr400x8", rates=own
        )
    )
    return found


def test_each_rented_rate_of_the_device_is_compared_the_cheapest_first() -> None:
    rows = break_evens(FACTS, INPUTS, offers())
    assert [row.rented for row in rows if "on-demand" in row.rented] == [
        "lambda/gpu_8x_h100_sxm5, on-demand",
        "aws/p5.48xlarge, on-demand",
    ]
    assert len(rows) == 5, "p5: on demand, spot, two reserved; another device and one's own left out"
    prices = [row.rented_usd_per_device_hour for row in rows]
    assert prices == sorted(prices)
    listed = next(row for row in rows if row.rented == "aws/p5.48xlarge, on-demand")
    assert listed.rented_usd_per_device_hour == pytest.approx(55.04 / 8)
    assert listed.owned_at_utilisation == INPUTS.utilisation.value
    assert listed.utilisation is not None and listed.months is not None
    assert listed.utilisation < 0.7 and listed.months < 36, "cheaper than on demand at 70 % in use"


def test_without_a_purchase_price_there_is_no_break_even() -> None:
    assert break_evens(catalog.load_device("a10g"), INPUTS, offers()) == ()
    assert owned(catalog.load_device("tpu-v5p"), INPUTS) is None
