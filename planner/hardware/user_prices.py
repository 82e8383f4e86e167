"""Prices of the user's own, in a TOML file: of instances, of devices, and of hardware on one's premises.

    as_of = 2026-11-01                      # optional, of every entry that has no date of its own
    source = "our contract"                 # optional, likewise

    [instances."aws/p5.48xlarge"]           # any instance that `plan list instances` shows
    usd_per_hour = 31.5                     # of the whole instance
    spot_usd_per_hour = 14.0                # optional

    [devices."h100-sxm-80gb"]               # for clusters that name devices: NODESxGPUS:DEVICE
    usd_per_device_hour = 1.9

    [on_premises]                           # prices devices that have no price above from their purchase
    years = 4
    usd_per_kwh = 0.11

    [on_premises.devices."h20-sxm-96gb"]
    purchase_usd = 11000

These win over every other price. Commitments of clouds are kept apart, in `price_terms.toml`: ranges for a
provider in general, from which planner.sizing.rates makes reserved rates with their interval.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

from planner.foundation.decode import decode, load_toml, load_toml_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.instance import Instance, find_instance
from planner.hardware.on_premises import OnPremisesTable, table_faults

MAX_USD_PER_HOUR = 1e6
"""No instance costs more an hour; a larger number is a typing error."""

YOURS = "yours"
"""The mark of a price that the user gave."""


@frozen
class Price:
    """Dollars an hour of one thing: what it is, as of when, and where the price is from."""

    what: str
    usd_per_hour: float
    as_of: str
    source: str

    def text(self) -> str:
        """The price for people: `aws/p5.48xlarge 55.04 on demand, 2026-09-06 (CPM)`."""
        return f"{self.what} {self.usd_per_hour:g}, {self.as_of or 'without a date'} ({self.source})"


@frozen
class InstancePrice:
    """A price of the user's for a whole instance."""

    usd_per_hour: float | None = None
    spot_usd_per_hour: float | None = None
    as_of: str = ""
    source: str = ""


@frozen
class DevicePrice:
    """A price of the user's for one device."""

    usd_per_device_hour: float
    as_of: str = ""
    source: str = ""


@frozen
class PriceFile:
    """What a prices file holds. After `load_prices` devices have the names of the catalog."""

    as_of: str = ""
    source: str = ""
    instances: dict[str, InstancePrice] = field(default_factory=dict)
    devices: dict[str, DevicePrice] = field(default_factory=dict)
    on_premises: OnPremisesTable | None = None

    def device_price(self, device: str) -> Price | None:
        """The user's price of one device-hour, or None where the file has none."""
        entry = self.devices.get(device)
        if entry is None:
            return None
        return Price(
            what=device,
            usd_per_hour=entry.usd_per_device_hour,
            as_of=entry.as_of or self.as_of,
            source=entry.source or self.source,
        )


@frozen
class PriceTerm:
    """What a provider takes off for a commitment of some years, in general: `low` to `high` shares."""

    provider: str
    years: int
    low: float
    high: float
    as_of: str
    source: str

    def text(self) -> str:
        """The range for people: `1 year: 32 to 36 % off in general, 2026-05 (CPM ri_tiers)`."""
        span = f"{self.low:.0%}" if self.low == self.high else f"{self.low * 100:.0f} to {self.high:.0%}"
        years = "1 year" if self.years == 1 else f"{self.years} years"
        return f"{years}: {span} off in general, {self.as_of} ({self.source})"


@frozen
class PriceTermFile:
    """price_terms.toml."""

    terms: tuple[PriceTerm, ...]


def load_price_terms(path: Path) -> tuple[PriceTerm, ...]:
    """Commitments of all providers."""
    return load_toml(path, PriceTermFile).terms


def load_prices(path: Path, device_name: Callable[[str, str], str]) -> PriceFile:
    """The prices that a file holds. Raises InputError with every fault and its path.

    `device_name(text, where)` gives the catalog's name of a device, or raises InputError.
    """
    try:
        data = _dates_as_text(load_toml_object(path))
    except RecursionError:  # dotted keys nest deeper than the reader of TOML itself goes
        raise InputError(Problem(where=str(path), fault="is nested too deeply.")) from None
    file = decode(PriceFile, data, source=str(path))
    problems = _faults(file, str(path))
    file, unknown = _named(file, str(path), device_name)
    problems += unknown
    if problems:
        raise InputError(*problems)
    return dataclasses.replace(file, source=file.source or str(path))


def with_own_prices(instances: tuple[Instance, ...], file: PriceFile, where: str) -> tuple[Instance, ...]:
    """The instances with the user's prices in place of theirs. Raises InputError for unknown names."""
    changed = {instance.full_name: instance for instance in instances}
    problems: list[Problem] = []
    for name, price in file.instances.items():
        try:
            instance = find_instance(name, instances, f"{where}: instances.{name}")
        except InputError as error:
            problems.extend(error.problems)
            continue
        changed[instance.full_name] = _priced(instance, price, file)
    if problems:
        raise InputError(*problems)
    return tuple(changed[instance.full_name] for instance in instances)


def _priced(instance: Instance, price: InstancePrice, file: PriceFile) -> Instance:
    """An instance at the user's price. A spot price that the user left out is unknown, not the old one."""
    return dataclasses.replace(
        instance,
        ondemand_usd_per_hour=price.usd_per_hour,
        spot_usd_per_hour=price.spot_usd_per_hour,
        as_of=price.as_of or file.as_of,
        price_mark=YOURS,
        source=price.source or file.source,
        note="",
        reserved_note="",
    )


def _dates_as_text(value: Any) -> Any:
    """TOML data with dates as text: `as_of = 2026-11-01` and `as_of = "2026-11-01"` are the same."""
    if isinstance(value, dict):
        return {key: _dates_as_text(item) for key, item in value.items()}
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.isoformat()[:10]
    return value


def _named(
    file: PriceFile, where: str, device_name: Callable[[str, str], str]
) -> tuple[PriceFile, list[Problem]]:
    """The file with its devices named as the catalog does, and a problem for each that it lacks."""
    problems: list[Problem] = []

    def named(entries: dict[str, Any], place: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for text, entry in entries.items():
            key = f"{where}: {place}.{text}"
            try:
                name = device_name(text, key)
            except InputError as error:
                problems.extend(error.problems)
                continue
            if name in found:
                problems.append(Problem(where=key, fault=f"names {name} a second time."))
            found[name] = entry
        return found

    devices = named(file.devices, "devices")
    table = file.on_premises
    if table is not None:
        table = dataclasses.replace(table, devices=named(table.devices, "on_premises.devices"))
    return dataclasses.replace(file, devices=devices, on_premises=table), problems


def _faults(file: PriceFile, where: str) -> list[Problem]:
    """Problems of the numbers of a prices file, and of entries that say nothing."""
    problems: list[Problem] = []
    for name, price in file.instances.items():
        place = f"{where}: instances.{name}"
        if price.usd_per_hour is None and price.spot_usd_per_hour is None:
            problems.append(Problem(where=place, fault="has no price.", fix="write usd_per_hour = 31.5"))
        problems += _price_faults(price.usd_per_hour, f"{place}.usd_per_hour")
        problems += _price_faults(price.spot_usd_per_hour, f"{place}.spot_usd_per_hour")
    for name, device in file.devices.items():
        problems += _price_faults(device.usd_per_device_hour, f"{where}: devices.{name}.usd_per_device_hour")
    if file.on_premises is not None:
        problems += table_faults(file.on_premises, where)
    return problems


def _price_faults(value: float | None, where: str) -> list[Problem]:
    if value is None or 0 <= value <= MAX_USD_PER_HOUR:
        return []
    return [Problem(where=where, fault=f"is {value:g}.", legal=f"0 to {MAX_USD_PER_HOUR:g}")]
