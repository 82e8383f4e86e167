"""Rates of instances and devices: what an hour of a node costs under each pricing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from planner.hardware import catalog
from planner.hardware.instance import Instance
from planner.hardware.on_premises import BOUNDS, cost_per_device_hour
from planner.hardware.prices import YOURS, Market, price_terms, read_market, shipped_market
from planner.sizing.comparison import Pricing, Rate
from planner.sizing.offers import owned_interval, rates_of, rates_of_device

MARKET = shipped_market()


def by_pricing(rates: tuple[Rate, ...]) -> dict[Pricing, Rate]:
    found = {rate.pricing: rate for rate in rates}
    assert len(found) == len(rates)
    return found


def priced(folder: Path, text: str) -> Market:
    file = folder / "prices.toml"
    file.write_text(text)
    return read_market(file)


def test_an_instance_of_a_large_cloud_has_four_rates() -> None:
    instance = MARKET.instance("aws/p5.48xlarge")
    rates = by_pricing(rates_of(instance, MARKET))
    assert set(rates) == {
        Pricing.ON_DEMAND,
        Pricing.SPOT,
        Pricing.RESERVED_1Y,
        Pricing.RESERVED_3Y,
    }
    assert rates[Pricing.ON_DEMAND].usd_per_node_hour == 55.04
    one = rates[Pricing.RESERVED_1Y]
    assert one.usd_per_node_hour == pytest.approx(55.04 * 0.66)
    assert one.low_usd_per_node_hour == pytest.approx(55.04 * 0.64)
    assert one.high_usd_per_node_hour == pytest.approx(55.04 * 0.68)
    assert "in general" in one.source and one.as_of == "2026-05"


def test_every_rate_is_above_0_or_unknown_and_says_what_it_is() -> None:
    for instance in MARKET.instances:
        check_rates(instance)


def check_rates(instance: Instance) -> None:
    rates = by_pricing(rates_of(instance, MARKET))
    listed = rates[Pricing.ON_DEMAND]
    assert listed.usd_per_node_hour == instance.ondemand_usd_per_hour
    known = listed.usd_per_node_hour is not None
    terms = {term.years for term in price_terms(instance.provider)} if known else set()
    assert (Pricing.RESERVED_1Y in rates, Pricing.RESERVED_3Y in rates) == (1 in terms, 3 in terms)
    assert (Pricing.SPOT in rates) == (instance.spot_usd_per_hour is not None)
    for rate in rates.values():
        assert rate.usd_per_node_hour is None or rate.usd_per_node_hour > 0
        assert rate.source and rate.includes
        if rate.low_usd_per_node_hour is not None:
            assert rate.usd_per_node_hour is not None and rate.high_usd_per_node_hour is not None
            assert rate.low_usd_per_node_hour <= rate.usd_per_node_hour <= rate.high_usd_per_node_hour
    if "memory" in instance.price_mark:
        assert "memory" in listed.source


def test_an_unknown_price_stays_unknown() -> None:
    unknown = MARKET.instance("aws/p6e-gb200.36xlarge")
    (rate,) = rates_of(unknown, MARKET)
    assert rate.usd_per_node_hour is None and rate.pricing is Pricing.ON_DEMAND


def test_a_doubtful_price_says_why() -> None:
    (rate,) = rates_of(MARKET.instance("verda/1V100"), MARKET)
    assert "median of all clouds" in rate.doubtful
    assert all(not rate.doubtful for rate in rates_of(MARKET.instance("aws/p5.48xlarge"), MARKET))


def test_a_price_of_ones_own_stands_alone(tmp_path: Path) -> None:
    text = "source = 'our contract'\n[instances.'aws/p5.48xlarge']\nusd_per_hour = 31.5\n"
    market = priced(tmp_path, text)
    (rate,) = rates_of(market.instance("aws/p5.48xlarge"), market)
    assert (rate.pricing, rate.usd_per_node_hour) == (Pricing.YOURS, 31.5)
    assert rate.source == f"{YOURS}: our contract"
    spot = priced(tmp_path, "[instances.'aws/p5.48xlarge']\nspot_usd_per_hour = 9.0\n")
    rates = by_pricing(rates_of(spot.instance("aws/p5.48xlarge"), spot))
    assert rates[Pricing.ON_DEMAND].usd_per_node_hour is None, "the listed price is not the user's"
    assert rates[Pricing.SPOT].usd_per_node_hour == 9.0 and YOURS in rates[Pricing.SPOT].source


def test_a_cheaper_price_never_has_a_dearer_rate(tmp_path: Path) -> None:
    def first(usd: float) -> float:
        market = priced(tmp_path, f"[instances.'aws/p5.48xlarge']\nusd_per_hour = {usd}\n")
        price = rates_of(market.instance("aws/p5.48xlarge"), market)[0].usd_per_node_hour
        assert price is not None
        return price

    prices = [first(usd) for usd in (0.0, 1.0, 31.5, 98.0)]
    assert prices == sorted(prices) and prices[0] == 0.0, "a price of 0 that was said is kept"


def test_a_device_has_its_cost_on_premises_with_an_interval() -> None:
    facts = catalog.load_device("h100")
    (rate,) = rates_of_device(facts, MARKET, 8)
    cost = cost_per_device_hour(facts, read_market(on_premises=True, live=False).on_premises or pytest.fail())
    assert cost is not None and rate.pricing is Pricing.ON_PREMISES
    assert rate.usd_per_node_hour == pytest.approx(8 * cost.total_usd)
    assert rate.low_usd_per_node_hour is not None and rate.high_usd_per_node_hour is not None
    assert 0 < rate.low_usd_per_node_hour < rate.usd_per_node_hour < rate.high_usd_per_node_hour
    assert "70% of hours in use" in rate.source and rate.as_of == "2026-11-23"
    (one,) = rates_of_device(facts, MARKET, 1)
    assert one.usd_per_node_hour == pytest.approx(cost.total_usd)


def test_the_interval_lies_within_the_corners_and_holds_every_single_change() -> None:
    """All inputs at their cheap ends at once cost less than the low end; at their dear ends more."""
    import dataclasses

    facts = catalog.load_device("h100")
    inputs = read_market(on_premises=True, live=False).on_premises
    assert inputs is not None
    low, high = owned_interval(facts, inputs)
    falls = {"years", "utilisation", "residual_share"}
    corners = []
    for cheap in (True, False):
        values = {}
        for name in BOUNDS:
            entry = getattr(inputs, name)
            end = entry.low if (name in falls) != cheap else entry.high
            values[name] = dataclasses.replace(entry, value=entry.value if end is None else end)
        corner = cost_per_device_hour(facts, dataclasses.replace(inputs, **values))
        assert corner is not None
        corners.append(corner.total_usd)
    assert corners[0] < low < high < corners[1] * 40_000 / 30_000
    for name, end in itertools.product(BOUNDS, ("low", "high")):
        entry = getattr(inputs, name)
        if getattr(entry, end) is None:
            continue
        moved = dataclasses.replace(inputs, **{name: dataclasses.replace(entry, value=getattr(entry, end))})
        cost = cost_per_device_hour(facts, moved)
        assert cost is not None and low <= cost.total_usd <= high


def test_inputs_of_ones_own_have_no_range(tmp_path: Path) -> None:
    lines = [f"{name} = {getattr(read_inputs(), name).value}" for name in BOUNDS]
    own = "\n".join(["[on_premises]", *lines, "[on_premises.devices.h100]", "purchase_usd = 30000"])
    market = priced(tmp_path, own)
    (rate,) = rates_of_device(catalog.load_device("h100"), market, 8)
    assert rate.usd_per_node_hour == pytest.approx(rate.low_usd_per_node_hour)
    assert rate.usd_per_node_hour == pytest.approx(rate.high_usd_per_node_hour)
    (listed,) = rates_of_device(catalog.load_device("h100"), MARKET, 8)
    assert rate.usd_per_node_hour == pytest.approx(listed.usd_per_node_hour)


def read_inputs() -> object:
    from planner.hardware.prices import on_premises_inputs

    return on_premises_inputs()


def test_a_device_price_of_ones_own_wins(tmp_path: Path) -> None:
    market = priced(tmp_path, "[devices.h100]\nusd_per_device_hour = 1.9\n[on_premises]\nyears = 4\n")
    (rate,) = rates_of_device(catalog.load_device("h100"), market, 8)
    assert (rate.pricing, rate.usd_per_node_hour) == (Pricing.YOURS, pytest.approx(15.2))


@pytest.mark.parametrize(("device", "lacks"), [("a10g", "purchase price"), ("tpu-v5p", "power")])
def test_a_device_without_facts_has_no_rate(device: str, lacks: str) -> None:
    (rate,) = rates_of_device(catalog.load_device(device), MARKET, 8)
    assert rate.usd_per_node_hour is None and lacks in rate.source
