"""The cost of a device-hour on hardware of one's own, from its purchase price. Every input has a source.

With P the purchase price of a device and W its thermal design power in kW:

    capital   = P * server_factor * (1 + network_share + storage_share) * (1 + spare_share)
    written   = capital * (1 - residual_share) / (years * 8760 h * utilisation)
    energy    = W * node_power_over_tdp * pue * usd_per_kwh
    facility  = W * nameplate_power_over_tdp * facility_usd_per_kw_month * 12 / (8760 h * utilisation)
    staff     = staff_per_device * staff_usd_per_year / (8760 h * utilisation)
    cost      = written + energy + facility + staff              dollars for each hour that is used

What runs on through idle hours (capital, room, people) is divided by the utilisation; electricity is
counted for the hours in use only. A device without a purchase price or power in the catalog has no cost
here, never a guessed one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Any

from planner.foundation.decode import encode, load_toml
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.device_file import DeviceFile

HOURS_PER_YEAR = 8760.0
MAX_USD = 1e8
"""No device costs more; a larger number is a typing error."""

BOUNDS: dict[str, tuple[float, float]] = {
    "years": (0.1, 30),
    "utilisation": (0.01, 1),
    "residual_share": (0, 0.99),
    "server_factor": (1, 20),
    "network_share": (0, 10),
    "storage_share": (0, 10),
    "spare_share": (0, 1),
    "node_power_over_tdp": (1, 5),
    "nameplate_power_over_tdp": (1, 5),
    "pue": (1, 5),
    "usd_per_kwh": (0, 10),
    "facility_usd_per_kw_month": (0, 10_000),
    "staff_per_device": (0, 1),
    "staff_usd_per_year": (0, 1e7),
}


@frozen
class CostInput:
    """One input: its value, the range that sources give, and where it is from."""

    value: float
    unit: str
    source: str
    low: float | None = None
    high: float | None = None
    unverified: bool = False


@frozen
class OwnedDevice:
    """What is known of one device beyond its file: None means that the device file and the inputs hold."""

    purchase_usd: float | None = None
    server_factor: float | None = None
    tdp_w: float | None = None
    as_of: str = ""
    source: str = ""


@frozen
class OnPremises:
    """The inputs of the formula above, and devices that differ."""

    years: CostInput
    utilisation: CostInput
    residual_share: CostInput
    server_factor: CostInput
    network_share: CostInput
    storage_share: CostInput
    spare_share: CostInput
    node_power_over_tdp: CostInput
    nameplate_power_over_tdp: CostInput
    pue: CostInput
    usd_per_kwh: CostInput
    facility_usd_per_kw_month: CostInput
    staff_per_device: CostInput
    staff_usd_per_year: CostInput
    devices: dict[str, OwnedDevice] = field(default_factory=dict)


@frozen
class OnPremisesTable:
    """The table `[on_premises]` of a prices file: what is left out keeps its default."""

    years: float | None = None
    utilisation: float | None = None
    residual_share: float | None = None
    server_factor: float | None = None
    network_share: float | None = None
    storage_share: float | None = None
    spare_share: float | None = None
    node_power_over_tdp: float | None = None
    nameplate_power_over_tdp: float | None = None
    pue: float | None = None
    usd_per_kwh: float | None = None
    facility_usd_per_kw_month: float | None = None
    staff_per_device: float | None = None
    staff_usd_per_year: float | None = None
    devices: dict[str, OwnedDevice] = field(default_factory=dict)


@frozen
class DeviceHourCost:
    """Dollars for one used hour of one device, by cause, and the purchase price they rest on."""

    device: str
    written_off_usd: float
    energy_usd: float
    facility_usd: float
    staff_usd: float
    purchase_usd: float
    as_of: str
    sources: tuple[str, ...]

    @property
    def total_usd(self) -> float:
        return self.written_off_usd + self.energy_usd + self.facility_usd + self.staff_usd


def load_on_premises(path: Path) -> OnPremises:
    """The inputs that a TOML file holds. Raises InputError with every fault and its path."""
    inputs = load_toml(path, OnPremises)
    faults = range_faults({name: getattr(inputs, name).value for name in BOUNDS}, str(path))
    if faults:
        raise InputError(*faults)
    return inputs


def with_own(inputs: OnPremises, table: OnPremisesTable, source: str) -> OnPremises:
    """The inputs with the user's values in place of the defaults. Devices are named as the catalog does."""
    changes: dict[str, Any] = {}
    for name in BOUNDS:
        value = getattr(table, name)
        if value is not None:
            unit = getattr(inputs, name).unit
            changes[name] = CostInput(value=value, unit=unit, source=source)
    devices = dict(inputs.devices)
    for name, own in table.devices.items():
        devices[name] = _merged(inputs.devices.get(name, OwnedDevice()), own)
    return dataclasses.replace(inputs, **changes, devices=devices)


def _merged(known: OwnedDevice, own: OwnedDevice) -> OwnedDevice:
    """What is known of a device with the user's values on top."""
    given = {key: value for key, value in encode(own).items() if value is not None and value != ""}
    return dataclasses.replace(known, **given)


def table_faults(table: OnPremisesTable, where: str) -> list[Problem]:
    """Problems of the numbers of an `[on_premises]` table."""
    values = {name: getattr(table, name) for name in BOUNDS if getattr(table, name) is not None}
    problems = range_faults(values, f"{where}: on_premises")
    for name, device in table.devices.items():
        place = f"{where}: on_premises.devices.{name}"
        for key, low, high in (
            ("purchase_usd", 0.0, MAX_USD),
            ("server_factor", *BOUNDS["server_factor"]),
            ("tdp_w", 1.0, 1e5),
        ):
            value = getattr(device, key)
            if value is not None and not low <= value <= high:
                problems.append(
                    Problem(where=f"{place}.{key}", fault=f"is {value:g}.", legal=f"{low:g} to {high:g}")
                )
    return problems


def range_faults(values: dict[str, float], where: str) -> list[Problem]:
    """A problem for each value outside its bounds."""
    return [
        Problem(where=f"{where}.{name}", fault=f"is {value:g}.", legal=f"{low:g} to {high:g}")
        for name, value in values.items()
        for low, high in (BOUNDS[name],)
        if not low <= value <= high
    ]


def missing(facts: DeviceFile, inputs: OnPremises) -> tuple[str, ...]:
    """What must be known of a device before it has a cost, and is not."""
    found = []
    if _purchase_usd(facts, inputs) is None:
        found.append("purchase price")
    if _tdp_w(facts, inputs) is None:
        found.append("power")
    return tuple(found)


def cost_per_device_hour(facts: DeviceFile, inputs: OnPremises) -> DeviceHourCost | None:
    """Dollars for one used device-hour by the formula above, or None where `missing` names something."""
    purchase_usd, tdp_w = _purchase_usd(facts, inputs), _tdp_w(facts, inputs)
    if purchase_usd is None or tdp_w is None:
        return None
    own = inputs.devices.get(facts.name, OwnedDevice())
    factor = inputs.server_factor.value if own.server_factor is None else own.server_factor
    shares = 1 + inputs.network_share.value + inputs.storage_share.value
    capital_usd = purchase_usd * factor * shares * (1 + inputs.spare_share.value)
    used_hours_per_year = HOURS_PER_YEAR * inputs.utilisation.value
    power_kw = tdp_w / 1000
    return DeviceHourCost(
        device=facts.name,
        written_off_usd=capital_usd
        * (1 - inputs.residual_share.value)
        / (inputs.years.value * used_hours_per_year),
        energy_usd=power_kw * inputs.node_power_over_tdp.value * inputs.pue.value * inputs.usd_per_kwh.value,
        facility_usd=power_kw
        * inputs.nameplate_power_over_tdp.value
        * inputs.facility_usd_per_kw_month.value
        * 12
        / used_hours_per_year,
        staff_usd=inputs.staff_per_device.value * inputs.staff_usd_per_year.value / used_hours_per_year,
        purchase_usd=purchase_usd,
        as_of=_as_of(facts, own),
        sources=_sources(facts, own),
    )


def on_premises_rows(facts: DeviceFile, inputs: OnPremises) -> list[tuple[str, str]]:
    """The cost and its causes as lines of a table for people."""
    cost = cost_per_device_hour(facts, inputs)
    if cost is None:
        return [("on premises", f"unknown: no {' and no '.join(missing(facts, inputs))} in the catalog")]
    causes = (
        ("written off", cost.written_off_usd),
        ("energy", cost.energy_usd),
        ("facility", cost.facility_usd),
        ("staff", cost.staff_usd),
    )
    shown = ", ".join(f"{name} {usd:.2f}" for name, usd in causes)
    bought = f"{cost.purchase_usd:,.0f} dollars, {cost.as_of or 'without a date'}: {'; '.join(cost.sources)}"
    return [
        ("on premises", f"{cost.total_usd:.2f} dollars a device-hour in use ({shown})"),
        ("purchase price", bought),
    ]


def _purchase_usd(facts: DeviceFile, inputs: OnPremises) -> float | None:
    own = inputs.devices.get(facts.name)
    if own is not None and own.purchase_usd is not None:
        return own.purchase_usd
    return None if facts.price is None else facts.price.typical_usd


def _tdp_w(facts: DeviceFile, inputs: OnPremises) -> float | None:
    own = inputs.devices.get(facts.name)
    if own is not None and own.tdp_w is not None:
        return own.tdp_w
    return None if facts.power is None else facts.power.tdp_w


def _as_of(facts: DeviceFile, own: OwnedDevice) -> str:
    if own.purchase_usd is not None or facts.price is None:
        return own.as_of
    return facts.price.as_of


def _sources(facts: DeviceFile, own: OwnedDevice) -> tuple[str, ...]:
    if own.purchase_usd is not None or facts.price is None:
        return (own.source or "your own price",)
    recalled = "typical_usd" in facts.price.unverified
    note = ("the purchase price is from memory",) if recalled else ()
    return (*facts.price.sources, *note, *((own.source,) if own.source else ()))
