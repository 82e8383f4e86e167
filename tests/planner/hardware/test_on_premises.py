"""The cost of a device-hour on hardware of one's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from planner.foundation.decode import encode
from planner.foundation.errors import InputError
from planner.hardware import catalog
from planner.hardware.on_premises import (
    BOUNDS,
    OnPremises,
    OnPremisesTable,
    OwnedDevice,
    cost_per_device_hour,
    load_on_premises,
    missing,
    on_premises_rows,
    with_own,
)
from planner.hardware.prices import on_premises_inputs

DEFAULTS = on_premises_inputs()


def inputs(**values: float) -> OnPremises:
    return with_own(DEFAULTS, OnPremisesTable(**values), "test")


def cost(device: str, **values: float) -> float:
    found = cost_per_device_hour(catalog.load_device(device), inputs(**values))
    assert found is not None
    return found.total_usd


def test_the_formula_by_hand() -> None:
    found = cost_per_device_hour(
        catalog.load_device("h100"),
        inputs(
            years=4,
            utilisation=0.5,
            residual_share=0.25,
            server_factor=1.5,
            network_share=0.1,
            storage_share=0.1,
            spare_share=0.0,
            node_power_over_tdp=1.5,
            nameplate_power_over_tdp=2,
            pue=1.2,
            usd_per_kwh=0.1,
            facility_usd_per_kw_month=146,
            staff_per_device=0.01,
            staff_usd_per_year=87_600,
        ),
    )
    assert found is not None
    assert found.written_off_usd == pytest.approx(30_000 * 1.5 * 1.2 * 0.75 / (4 * 8760 * 0.5))
    assert found.energy_usd == pytest.approx(0.7 * 1.5 * 1.2 * 0.1)
    assert found.facility_usd == pytest.approx(0.7 * 2 * 146 * 12 / 4380)
    assert found.staff_usd == pytest.approx(0.01 * 87_600 / 4380)
    parts = (found.written_off_usd, found.energy_usd, found.facility_usd, found.staff_usd)
    assert found.total_usd == pytest.approx(sum(parts))


def test_an_h100_node_costs_what_is_published() -> None:
    """Total cost of a node over 3 years: 450,000 to 650,000 dollars, 2.1 to 3.1 a device-hour at full use."""
    hour = cost("h100", years=3, utilisation=1.0, residual_share=0.0)
    assert 2.1 <= hour <= 3.1
    assert 450e3 <= hour * 8 * 3 * 8760 <= 650e3


def test_the_capital_of_an_h100_is_the_published_all_in_price() -> None:
    """45,800 to 51,600 dollars a device, with its share of server, network and cables."""
    bought = inputs(utilisation=1, residual_share=0, years=1)
    found = cost_per_device_hour(catalog.load_device("h100"), bought)
    assert found is not None
    assert 45.8e3 <= found.written_off_usd * 8760 <= 51.6e3


@pytest.mark.parametrize(
    ("name", "more_is_dearer"),
    [(name, name not in ("years", "utilisation", "residual_share")) for name in BOUNDS],
)
def test_every_input_counts_in_its_direction(name: str, more_is_dearer: bool) -> None:
    value = getattr(DEFAULTS, name).value
    low, high = BOUNDS[name]
    less, more = max(low, value * 0.8), min(high, value * 1.2 + (0.1 if value == 0 else 0))
    assert (cost("h100", **{name: less}) < cost("h100", **{name: more})) == more_is_dearer


def test_every_default_has_a_source_and_is_in_its_range() -> None:
    for name in BOUNDS:
        entry = getattr(DEFAULTS, name)
        assert entry.source and entry.unit
        assert entry.low is None or entry.low <= entry.value
        assert entry.high is None or entry.value <= entry.high
        assert ("memory" in entry.source) == entry.unverified


@pytest.mark.parametrize(("device", "lacks"), [("a10g", "purchase price"), ("tpu-v5p", "power")])
def test_what_is_not_known_is_unknown(device: str, lacks: str) -> None:
    facts = catalog.load_device(device)
    assert cost_per_device_hour(facts, DEFAULTS) is None
    assert lacks in missing(facts, DEFAULTS)
    ((key, text),) = on_premises_rows(facts, DEFAULTS)
    assert key == "on premises" and text.startswith("unknown") and lacks in text


def test_a_price_of_ones_own_makes_it_known() -> None:
    own = OwnedDevice(purchase_usd=5000.0, tdp_w=300.0, source="invoice", as_of="2026-10-01")
    table = OnPremisesTable(devices={"tpu-v5p": own})
    found = cost_per_device_hour(catalog.load_device("tpu-v5p"), with_own(DEFAULTS, table, "test"))
    assert found is not None
    assert (found.purchase_usd, found.as_of, found.sources) == (5000.0, "2026-10-01", ("invoice",))


def test_a_rack_price_holds_its_servers_also_with_a_price_of_ones_own() -> None:
    table = OnPremisesTable(devices={"gb200": OwnedDevice(purchase_usd=43_000.0)})
    assert with_own(DEFAULTS, table, "test").devices["gb200"].server_factor == 1.0
    as_module = OnPremisesTable(devices={"gb200": OwnedDevice(server_factor=1.29)})
    facts = catalog.load_device("gb200")
    rack, module = (
        cost_per_device_hour(facts, with_own(DEFAULTS, changed, "test")) for changed in (table, as_module)
    )
    assert rack is not None and module is not None
    assert module.written_off_usd == pytest.approx(1.29 * rack.written_off_usd)


def test_recalled_purchase_prices_say_so() -> None:
    found = cost_per_device_hour(catalog.load_device("h20"), DEFAULTS)
    assert found is not None and "the purchase price is from memory" in found.sources
    read = cost_per_device_hour(catalog.load_device("h100"), DEFAULTS)
    assert read is not None and not any("memory" in source for source in read.sources)


def test_a_wrong_file_is_refused_with_every_fault(tmp_path: Path) -> None:
    text = (catalog.data_folder() / "on_premises.toml").read_text()
    file = tmp_path / "inputs.toml"
    file.write_text(text.replace("value = 0.7", "value = 0.0", 1).replace("value = 1.54", "value = 0.5"))
    with pytest.raises(InputError) as caught:
        load_on_premises(file)
    assert [problem.where.rpartition(".")[2] for problem in caught.value.problems] == ["utilisation", "pue"]
    file.write_text(text.replace("[pue]", "[puee]"))
    with pytest.raises(InputError, match=r"(?s)puee.*pue"):
        load_on_premises(file)


def test_all_devices_have_a_cost_or_a_reason() -> None:
    for name in catalog.device_names():
        facts = catalog.load_device(name)
        found = cost_per_device_hour(facts, DEFAULTS)
        assert (found is None) == bool(missing(facts, DEFAULTS))
        if found is not None:
            assert 0.02 < found.total_usd < 10, name
            assert all(value is not None for value in dataclasses.asdict(found).values())
            assert encode(found)["as_of"] == "2026-11-23"
