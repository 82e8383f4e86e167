"""Cloud instances: the rows of instances.csv, what is sane among them, and finding one by its name."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from planner.foundation.decode import decode, read_text
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import normalized, unknown_name


@frozen
class Instance:
    """One kind of virtual machine or server. Prices are dollars an hour for the whole instance.

    None means unknown. `network` is in the grammar of `planner.hardware.network`, empty where unknown. The
    marks
    say whether a price or network was READ in the named source or is from memory.
    """

    provider: str
    name: str
    device: str
    devices: int
    network: str
    ondemand_usd_per_hour: float | None
    spot_usd_per_hour: float | None
    vcpus: int | None
    ram_gib: float | None
    intra_node: str
    inter_node: str
    region: str
    as_of: str
    price_mark: str
    network_mark: str
    reserved_note: str
    source: str
    note: str

    @property
    def full_name(self) -> str:
        return f"{self.provider}/{self.name}"

    @property
    def usd_per_device_hour(self) -> float | None:
        """The on-demand price of one of its devices, or None where unknown."""
        price = self.ondemand_usd_per_hour
        return None if price is None else price / self.devices


@frozen
class InstanceFault:
    """What is wrong with an instance, or doubtful about its price."""

    name: str
    reason: str
    source: str


class Sane(NamedTuple):
    """Instances that pass every check, those that do not, and those whose price is doubtful."""

    instances: tuple[Instance, ...]
    rejected: tuple[InstanceFault, ...]
    doubtful: tuple[InstanceFault, ...]


DEVICE_COUNTS = (1, 2, 4, 8, 16)
"""Whole devices that an instance is sold with. 12 of them, as one catalog has it, is a typing error."""

MEDIAN_FACTOR = 5.0
"""A price of a device-hour this many times above or below the median over all clouds is doubtful: another
unit, another offer, or a market of its own. In a list that nobody has read through, it is a wrong row."""

_NUMBERS = {
    "devices": int,
    "ondemand_usd_per_hour": float,
    "spot_usd_per_hour": float,
    "vcpus": int,
    "ram_gib": float,
}


def load_instances(path: Path) -> tuple[Instance, ...]:
    """All rows of the CSV. Raises InputError with the line and column of every fault."""
    reader = csv.DictReader(io.StringIO(read_text(path).decode()))
    rows = {f"{path.name} line {line}": row for line, row in enumerate(reader, start=2)}
    values = {source: _values(row, source) for source, row in rows.items()}
    try:
        return decode(tuple[Instance, ...], list(values.values()), source=path.name)  # all at once: soon done
    except InputError:
        return tuple(decode(Instance, each, source=source) for source, each in values.items())


def _values(row: dict[str, str], source: str) -> dict[str, object]:
    values: dict[str, object] = dict(row)
    for column, kind in _NUMBERS.items():
        text = row.get(column, "")
        try:
            values[column] = kind(text) if text else None
        except ValueError:
            raise InputError(Problem(where=f"{source}: {column}", fault=f"'{text}' is no number.")) from None
    return values


def median_prices(instances: Iterable[Instance]) -> dict[str, float]:
    """For each device: the median over all clouds of its on-demand price in dollars a device-hour."""
    import statistics

    prices: defaultdict[str, list[float]] = defaultdict(list)
    for instance in instances:
        price = instance.usd_per_device_hour
        if price is not None and price > 0:
            prices[instance.device].append(price)
    return {device: statistics.median(found) for device, found in prices.items()}


def sane_instances(instances: tuple[Instance, ...], devices: Collection[str]) -> Sane:
    """Splits instances by `fault_of`, and names those that `doubt_of` doubts. `devices` are the catalog's."""
    medians = median_prices(instances)
    kept: list[Instance] = []
    rejected: list[InstanceFault] = []
    doubtful: list[InstanceFault] = []
    for instance in instances:
        fault, doubt = fault_of(instance, devices), doubt_of(instance, medians)
        if fault:
            rejected.append(_fault(instance, fault))
        else:
            kept.append(instance)
            doubtful += [_fault(instance, doubt)] if doubt else []
    return Sane(tuple(kept), tuple(rejected), tuple(doubtful))


def _fault(instance: Instance, reason: str) -> InstanceFault:
    return InstanceFault(name=instance.full_name, reason=reason, source=instance.source)


def fault_of(instance: Instance, devices: Collection[str]) -> str:
    """Why an instance cannot be used, in words; empty where it can.

    Its device is in the catalog, in a number that is sold; prices are above 0, spot is at most on demand.
    """
    price, spot = instance.ondemand_usd_per_hour, instance.spot_usd_per_hour
    if instance.device not in devices:
        return f"its device '{instance.device}' is not in the catalog"
    if instance.devices not in DEVICE_COUNTS:
        return f"has {instance.devices} devices, which is no size that is sold"
    if any(value is not None and not value > 0 for value in (price, spot)):
        return "has a price that is not above 0"
    if price is not None and spot is not None and spot > price:
        return f"costs more as spot ({spot:g}) than on demand ({price:g})"
    return ""


def doubt_of(instance: Instance, medians: Mapping[str, float]) -> str:
    """Why a price is doubtful: it is not within a factor of 5 of the median of its device over all clouds."""
    unit, median = instance.usd_per_device_hour, medians.get(instance.device)
    if unit is None or median is None or median / MEDIAN_FACTOR <= unit <= median * MEDIAN_FACTOR:
        return ""
    return f"costs {unit:.3g} dollars a device-hour, the median of all clouds is {median:.3g}"


def instance_price_text(instance: Instance) -> str:
    """The on-demand price of an instance for people, its date and source; empty where it is unknown."""
    if instance.ondemand_usd_per_hour is None:
        return ""
    read = {"yours": "your price", "memory": "from memory"}.get(instance.price_mark, instance.price_mark)
    return (
        f"{instance.full_name} {instance.ondemand_usd_per_hour:g} on demand, "
        f"{read.lower() if read else 'unmarked'}, {instance.as_of or 'without a date'} ({instance.source})"
    )


def find_instance(text: str, instances: tuple[Instance, ...], where: str) -> Instance:
    """The instance named `INSTANCE` or `PROVIDER/INSTANCE`; case, dashes and underscores do not matter."""
    provider, _, name = text.rpartition("/")
    found = [
        instance
        for instance in instances
        if normalized(instance.name) == normalized(name)
        and normalized(provider) in ("", normalized(instance.provider))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            Problem(
                where=where,
                fault=f"'{text}' is sold by {len(found)} providers.",
                legal=", ".join(instance.full_name for instance in found),
            )
        )
    names = [instance.full_name for instance in instances]
    if not provider:
        names = list(dict.fromkeys(instance.name for instance in instances))
    raise unknown_name(where, "instance", text, names)
