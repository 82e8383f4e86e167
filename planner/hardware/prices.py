"""What instances and devices cost: our catalog, SkyPilot's newer rows, and the user's prices above both.

Of two prices of the same instance the user's wins; then SkyPilot's, unless our row has a later date or
SkyPilot's has no price on demand where ours has one. A device that no instance brings has the user's price,
else, where it is asked for, its cost on premises, else none.

Prices of the user's own, in a TOML file: of instances, of devices, and of hardware on one's premises.

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
provider in general, from which planner.sizing.offers makes reserved rates with their interval.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.foundation.decode import decode, load_toml, load_toml_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.catalog import data_folder, device_names, load_device
from planner.hardware.instance import (
    Instance,
    InstanceFault,
    find_instance,
    instance_price_text,
    load_instances,
    sane_instances,
)
from planner.hardware.on_premises import OnPremisesTable, table_faults

if TYPE_CHECKING:
    from planner.hardware.device_file import DeviceFile
    from planner.hardware.on_premises import OnPremises
    from planner.hardware.skypilot import LiveCatalog, Warned


PRICES_VARIABLE = "SHARDWISE_PRICES"
"""Environment variable that names a prices file where `--prices` does not."""

SKYPILOT_VARIABLE = "SHARDWISE_SKYPILOT"
"""Environment variable: the folder of the catalogs in place of SkyPilot's own; empty: read none."""

_DATE = re.compile(r"^[0-9]{4}-[0-9]{2}(-[0-9]{2})?$")


@frozen
class Market:
    """Instances with their prices, and how devices are priced. `on_premises` is None unless asked for."""

    instances: tuple[Instance, ...]
    rejected: tuple[InstanceFault, ...] = ()
    doubtful: tuple[InstanceFault, ...] = ()
    warnings: tuple[Warned, ...] = ()
    prices: PriceFile | None = None
    on_premises: OnPremises | None = None

    def instance(self, text: str, where: str = "--cluster") -> Instance:
        """The instance that `text` names, with or without its provider. Raises InputError."""
        return find_instance(text, self.instances, where)

    def price_text(self, instance: Instance) -> str:
        """The price of an instance for people, with date, source and doubts; empty where it is unknown."""
        doubts = [doubt.reason for doubt in self.doubtful if doubt.name == instance.full_name]
        text = instance_price_text(instance)
        return f"{text}: doubtful, {doubts[0]}" if text and doubts else text

    def device_price(self, facts: DeviceFile) -> Price | None:
        """Dollars for an hour of one device that no instance brings, or None where unknown."""
        own = None if self.prices is None else self.prices.device_price(facts.name)
        if own is not None or self.on_premises is None:
            return own
        from planner.hardware.on_premises import cost_per_device_hour

        cost = cost_per_device_hour(facts, self.on_premises)
        if cost is None:
            return None
        source = f"on premises, {self.on_premises.utilisation.value:.0%} in use: {'; '.join(cost.sources)}"
        return Price(what=facts.name, usd_per_hour=cost.total_usd, as_of=cost.as_of, source=source)

    def lacking(self, facts: DeviceFile) -> str:
        """Why a device has no price, in words; empty where it has one, or where none was asked for."""
        if self.on_premises is None or self.device_price(facts) is not None:
            return ""
        from planner.hardware.on_premises import missing

        return (
            f"{facts.name} has no cost on premises: no {' and no '.join(missing(facts, self.on_premises))} "
            f"is known; give it in the table [on_premises.devices.{facts.name!r}] of a prices file"
        )


def shipped_market() -> Market:
    """Our own catalog alone, on-demand prices as listed."""
    found = sane_instances(load_instances(data_folder() / "instances.csv"), device_names())
    return Market(instances=found.instances, rejected=found.rejected, doubtful=found.doubtful)


def read_market(prices: Path | None = None, on_premises: bool = False, live: bool = True) -> Market:
    """The market as the user sees it. Raises InputError with every fault of the prices file.

    `prices` names a prices file; without it the variable SHARDWISE_PRICES may. `live` reads instances, those
    of SkyPilot's catalogs among them where there are any; a caller that names no instance can spare the time.
    A prices file may name one, so with one they are read anyway.
    """
    path = prices or _prices_of_environment()
    if not live and path is None:
        return Market(instances=(), on_premises=_on_premises(None, None, on_premises))
    shipped = shipped_market()
    found = _live(shipped)
    instances = shipped.instances if found is None else joined(shipped.instances, found.instances)
    file = None
    if path is not None:
        file = load_prices(path, lambda text, where: load_device(text, where).name)
        instances = with_own_prices(instances, file, str(path))
    return Market(
        instances=instances,
        rejected=shipped.rejected,
        doubtful=tuple(doubt for doubt in shipped.doubtful if _still(doubt, instances)),
        warnings=() if found is None else found.warnings,
        prices=file,
        on_premises=_on_premises(file, path, on_premises),
    )


def _still(doubt: InstanceFault, instances: tuple[Instance, ...]) -> bool:
    """Whether a price that was doubted is still the one that is listed."""
    return any(row.full_name == doubt.name and row.source == doubt.source for row in instances)


def _live(shipped: Market) -> LiveCatalog | None:
    """What SkyPilot's catalogs hold, or None where there are none."""
    folder = skypilot_folder()
    if folder is None:
        return None
    from planner.hardware.skypilot import load_names, read_live

    names = load_names(data_folder() / "skypilot.toml")
    return read_live(folder, names, device_memory_mib(), shipped.instances)


def skypilot_folder() -> Path | None:
    """The folder of SkyPilot's catalogs, or None where there is none.

    `~/.sky/catalogs`, where SKY_RUNTIME_DIR stands for `~` if it is set; SHARDWISE_SKYPILOT names another.
    """
    given = os.environ.get(SKYPILOT_VARIABLE)
    if given is not None:
        return Path(given) if given else None
    home = Path(os.environ.get("SKY_RUNTIME_DIR") or "~")
    try:
        folder = home.expanduser() / ".sky" / "catalogs"
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # no home, no right to look, a null character
        return None


def _prices_of_environment() -> Path | None:
    text = os.environ.get(PRICES_VARIABLE)
    return Path(text) if text else None


def _on_premises(file: PriceFile | None, path: Path | None, asked: bool) -> OnPremises | None:
    table = None if file is None else file.on_premises
    if table is None and not asked:
        return None
    from planner.hardware.on_premises import with_own

    inputs = on_premises_inputs()
    return inputs if table is None else with_own(inputs, table, f"your own, {path}")


def on_premises_inputs() -> OnPremises:
    """The inputs of the cost on premises as shipped, each with its source."""
    from planner.hardware.on_premises import load_on_premises

    return load_on_premises(data_folder() / "on_premises.toml")


def price_terms(provider: str) -> tuple[PriceTerm, ...]:
    """What a provider takes off for a commitment, in general."""
    return tuple(term for term in _price_terms() if term.provider == provider)


@functools.cache
def _price_terms() -> tuple[PriceTerm, ...]:

    return load_price_terms(data_folder() / "price_terms.toml")


def device_memory_mib() -> dict[str, int]:
    """The memory that the driver reports for each device of the catalog."""
    folder = data_folder() / "devices"
    tables = {name: tomllib.loads((folder / f"{name}.toml").read_text("utf-8")) for name in device_names()}
    return {name: int(table["memory"]["reported_mib"]) for name, table in tables.items()}


def joined(shipped: tuple[Instance, ...], live: tuple[Instance, ...]) -> tuple[Instance, ...]:
    """Our rows, replaced by SkyPilot's of the same name where those are newer, and then SkyPilot's others."""
    newer = {instance.full_name: instance for instance in live}
    rows = []
    for own in shipped:
        other = newer.pop(own.full_name, None)
        rows.append(own if other is None or _stays(own, other) else other)
    return (*rows, *newer.values())


def _stays(own: Instance, other: Instance) -> bool:
    """Whether our row of an instance stays: it is of a later date, or alone has a price on demand."""
    if own.ondemand_usd_per_hour is not None and other.ondemand_usd_per_hour is None:
        return True
    dated = _DATE.match(own.as_of)
    return dated is not None and own.as_of > other.as_of[: len(own.as_of)]


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
