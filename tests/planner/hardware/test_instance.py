"""Instances: what is sane, what is left out, and how a price is put into words."""

from __future__ import annotations

import dataclasses

import pytest

from planner.hardware import catalog
from planner.hardware.instance import (
    Instance,
    doubt_of,
    fault_of,
    instance_price_text,
    load_instances,
    median_prices,
    sane_instances,
)
from planner.hardware.prices import price_terms, shipped_market

ALL = load_instances(catalog.data_folder() / "instances.csv")
DEVICES = catalog.device_names()
MEDIANS = {"h100-sxm-80gb": 4.0}
SOUND = Instance(
    provider="lab",
    name="node",
    device="h100-sxm-80gb",
    devices=8,
    network="ndr400x8",
    ondemand_usd_per_hour=32.0,
    spot_usd_per_hour=16.0,
    vcpus=96,
    ram_gib=1000.0,
    intra_node="",
    inter_node="",
    region="here",
    as_of="2026-11-01",
    price_mark="READ",
    network_mark="READ",
    reserved_note="",
    source="a list",
    note="",
)


def test_every_row_of_the_source_is_there() -> None:
    assert len(ALL) == 182
    assert len({instance.full_name for instance in ALL}) == 182


def test_every_row_passes_the_checks_and_doubtful_prices_are_named() -> None:
    found = shipped_market()
    assert found.rejected == () and len(found.instances) == 182
    assert {doubt.name for doubt in found.doubtful} == {
        "verda/1V100",
        "runpod/1x-v100-32-secure",
        "vast/marketplace-8x-v100-sxm-16gb",
    }
    assert all("median of all clouds" in doubt.reason and doubt.source for doubt in found.doubtful)
    text = found.price_text(found.instance("verda/1V100"))
    assert text.endswith("doubtful, costs 0.138 dollars a device-hour, the median of all clouds is 2.95")
    assert "doubtful" not in found.price_text(found.instance("p5.48xlarge"))


def test_a_read_price_has_a_source_and_a_mark() -> None:
    for instance in ALL:
        if instance.ondemand_usd_per_hour is not None or instance.spot_usd_per_hour is not None:
            assert instance.source and instance.price_mark, instance.full_name
            assert instance.as_of or not instance.price_mark.startswith("READ"), instance.full_name


def test_no_price_is_a_reserved_one() -> None:
    """Reserved prices exist as notes for a provider only, so the CSV has no column for one."""
    header = (catalog.data_folder() / "instances.csv").read_text().splitlines()[0].split(",")
    prices = [column for column in header if "usd" in column]
    assert prices == ["ondemand_usd_per_hour", "spot_usd_per_hour"]
    assert "reserved_note" in header


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"ondemand_usd_per_hour": None, "spot_usd_per_hour": None}, ""),
        ({"device": "h101"}, "'h101' is not in the catalog"),
        ({"devices": 12}, "12 devices"),
        ({"devices": 0}, "0 devices"),
        ({"ondemand_usd_per_hour": 0.0, "spot_usd_per_hour": None}, "not above 0"),
        ({"ondemand_usd_per_hour": -1.0}, "not above 0"),
        ({"spot_usd_per_hour": 0.0}, "not above 0"),
        ({"spot_usd_per_hour": 32.5}, "more as spot"),
        ({"ondemand_usd_per_hour": 161.0}, "20.1 dollars a device-hour"),
        ({"ondemand_usd_per_hour": 160.0}, ""),
        ({"ondemand_usd_per_hour": 6.3, "spot_usd_per_hour": None}, "median of all clouds is 4"),
        ({"ondemand_usd_per_hour": 6.4, "spot_usd_per_hour": None}, ""),
    ],
)
def test_each_check(changes: dict[str, object], reason: str) -> None:
    instance = dataclasses.replace(SOUND, **changes)  # type: ignore[arg-type]  # the fields of the table above
    fault = fault_of(instance, DEVICES) or doubt_of(instance, MEDIANS)
    assert reason in fault and bool(fault) == bool(reason)


def test_the_median_is_of_devices_over_all_clouds() -> None:
    prices = (8.0, 16.0, 800.0)
    rows = [dataclasses.replace(SOUND, ondemand_usd_per_hour=price) for price in prices]
    unknown = dataclasses.replace(SOUND, ondemand_usd_per_hour=None)
    assert median_prices([*rows, unknown]) == {"h100-sxm-80gb": 2.0}
    kept, (spot,), (far,) = sane_instances((*rows, unknown), DEVICES)
    assert [row.ondemand_usd_per_hour for row in kept] == [16.0, 800.0, None]
    assert "more as spot" in spot.reason and "median of all clouds is 2" in far.reason


def test_a_price_in_words_has_date_and_source() -> None:
    assert instance_price_text(SOUND) == "lab/node 32 on demand, read, 2026-11-01 (a list)"
    bare = dataclasses.replace(SOUND, as_of="", price_mark="memory", source="memory")
    assert "from memory, without a date" in instance_price_text(bare)
    assert instance_price_text(dataclasses.replace(SOUND, ondemand_usd_per_hour=None)) == ""


def test_commitments_are_ranges_for_a_provider_with_date_and_source() -> None:
    (one, three) = price_terms("aws")
    assert (one.years, one.low, one.high) == (1, 0.32, 0.36) and (three.low, three.high) == (0.48, 0.6)
    assert one.text() == "1 year: 32 to 36% off in general, 2026-05 (CPM ri_tiers)"
    assert "20% off" in price_terms("coreweave")[0].text()
    assert price_terms("vast") == ()
    for provider in ("aws", "azure", "gcp", "oci", "coreweave"):
        for term in price_terms(provider):
            assert 0 < term.low <= term.high < 1 and term.as_of and term.source
