"""Rows of a `vms.csv` of SkyPilot's as offers: which device, how many, where and for how much.

Columns are found by their header, which differs from cloud to cloud. Google's rows list hosts and
accelerators apart, and are added up here. A row that is known to be wrong is left out with its reason.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from planner.foundation.decode import read_text
from planner.foundation.errors import InputError
from planner.foundation.frozen import frozen
from planner.foundation.suggest import normalized
from planner.hardware.instance import MEDIAN_FACTOR, Instance

COLUMNS = ("InstanceType", "AcceleratorName", "AcceleratorCount", "Price", "SpotPrice", "Region")
"""What every file must have; the rest (vCPUs, MemoryGiB, GpuInfo, AvailabilityZone) may be absent."""

DISAGREEMENT = 0.55
"""A region of Google's below this share of its dearest region is another offer: H100 at 4.20 dollars in
us-central1 and 9.80 in us-east4 (0.43), A100-80GB 0.42, H200 0.49. True regions differ less: L4 0.63."""

MEMORY_TOLERANCE = 0.10
"""Catalogs state nominal and reported memory by turns; the largest difference is that of A10G, 7 %."""

NAMES_SHOWN = 4
_NAME = re.compile(r"^[A-Za-z0-9._$:-]{1,100}$")
_SIZE = re.compile(r"['\"]SizeInMiB['\"]: *([0-9]{1,9})")
_TOTAL = re.compile(r"['\"]TotalGpuMemoryInMiB['\"]: *([0-9]{1,9})")
_GPU_NAME = re.compile(r"['\"]Name['\"]: *['\"]([^'\"]{1,60})")


@frozen
class TpuNames:
    """A kind of TPU: its device, and how many of the units in a slice's name make a chip."""

    device: str
    cores_per_chip: int


@frozen
class SkyPilotNames:
    """skypilot.toml: accelerators and hosts by SkyPilot's names."""

    accelerators: dict[str, tuple[str, ...]]
    tpus: dict[str, TpuNames]
    hosts: dict[str, dict[str, dict[str, str]]]
    whole: dict[str, dict[str, dict[str, str]]]


class Offer(NamedTuple):
    """One row: an instance, or on Google an accelerator alone, in one region. Prices in dollars an hour."""

    name: str
    accelerator: str
    device: str
    devices: int
    region: str
    zone: str
    price: float | None
    spot: float | None
    vcpus: int | None
    ram_gib: float | None


class Host(NamedTuple):
    """A row of a host without its accelerators."""

    price: float
    spot: float | None
    vcpus: int | None
    ram_gib: float | None


class UnusableError(Exception):
    """A row that is left out; the text says why."""


class Left:
    """Counts and names of what is left out of one file while it is read."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.spots: Counter[str] = Counter()

    def out(self, name: str, reason: str) -> None:
        self.rows[name] += 1
        self.reasons.setdefault(name, reason)

    def texts(self) -> Iterator[str]:
        if self.rows:
            names = [f"{name} {self.reasons[name]}" for name, _ in self.rows.most_common(NAMES_SHOWN)]
            yield f"{_counted(self.rows.total(), 'row')} left out: {_listing(names, len(self.rows))}"
        if self.spots:
            names = [name for name, _ in self.spots.most_common(NAMES_SHOWN)]
            yield (
                f"{_counted(self.spots.total(), 'spot price')} left out, 0 or equal to the price on demand: "
                f"{_listing(names, len(self.spots))}"
            )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _listing(names: Sequence[str], total: int) -> str:
    more = f"; and {total - len(names)} more names" if total > len(names) else ""
    return "; ".join(names) + more


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What rows are read against: SkyPilot's names, the memory of our devices, and our own instances."""

    names: SkyPilotNames
    memory_mib: Mapping[str, int]
    instances: Mapping[tuple[str, str], Instance]


def read_offers(cloud: str, file: Path, known: Known, left: Left) -> list[Offer]:
    """The offers of one file. Raises UnusableError where the file as a whole cannot be read."""
    hosts, whole = known.names.hosts.get(cloud, {}), known.names.whole.get(cloud, {})
    host_names = {host for sizes in hosts.values() for host in sizes.values()}
    host_rows: dict[tuple[str, str], Host] = {}
    offers: list[Offer] = []
    devices: dict[tuple[str, ...], str] = {}
    for row in _rows(file, host_names, left):
        if not row["AcceleratorName"]:
            _keep_host(row, host_rows)
            continue
        name = row["InstanceType"] or row["AcceleratorName"]
        try:
            offer = _offer(cloud, row, known, left, devices)
        except UnusableError as error:
            left.out(_shown(name), str(error))
            continue
        if offer is not None:
            offers.append(offer)
    alone = [offer for offer in offers if not offer.name]
    joined = _with_hosts(alone, hosts, whole, host_rows, left)
    return _by_region([*(offer for offer in offers if offer.name), *joined])


def _by_region(offers: Iterable[Offer]) -> list[Offer]:
    """One offer a name and region: the lowest prices of its zones."""
    found: dict[tuple[str, str, str], Offer] = {}
    for offer in offers:
        key = (offer.name, offer.device, offer.region)
        other = found.setdefault(key, offer)
        if other is not offer:
            price, spot = _lower(other.price, offer.price), _lower(other.spot, offer.spot)
            found[key] = other._replace(price=price, spot=spot)
    return list(found.values())


def _lower(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _rows(file: Path, host_names: Collection[str], left: Left) -> Iterator[dict[str, str]]:
    """Rows of accelerators and of the hosts that are asked for, by column.

    Raises UnusableError for what is no such file.
    """
    try:
        text = read_text(file).decode()
    except InputError as error:
        raise UnusableError(error.problems[0].fault) from None
    except UnicodeDecodeError:
        raise UnusableError("is not text") from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        lacking = [column for column in COLUMNS if column not in header]
        if lacking:
            raise UnusableError(f"lacks the columns {', '.join(lacking)}" if header else "is empty")
        accelerator, instance = header.index("AcceleratorName"), header.index("InstanceType")
        for line in lines:
            if len(line) == len(header):
                if line[accelerator] or line[instance] in host_names:
                    yield dict(zip(header, line, strict=True))
            elif line:
                left.out(_shown(line[0]), f"has {len(line)} cells where the header has {len(header)}")
    except csv.Error as error:
        raise UnusableError(f"is not CSV: {error}") from None


def _shown(name: str) -> str:
    """A name as it may be printed."""
    return name if _NAME.match(name) else "(a name that cannot be used)"


def _keep_host(row: Mapping[str, str], hosts: dict[tuple[str, str], Host]) -> None:
    try:
        price = _price(row["Price"])
        spot = _price(row["SpotPrice"])
    except UnusableError:  # a host without a price is missed when an accelerator asks for it
        return
    if price is not None and price > 0:
        zone = row.get("AvailabilityZone") or row["Region"]
        hosts[row["InstanceType"], zone] = Host(price, spot or None, _vcpus(row), _ram_gib(row))


def _offer(
    cloud: str, row: Mapping[str, str], known: Known, left: Left, devices_of: dict[tuple[str, ...], str]
) -> Offer | None:
    """A row as an offer, or None for accelerators that are not in this catalog. Raises UnusableError.

    `devices_of` remembers which device a row means: thousands of rows differ in their region only.
    """
    name, accelerator = row["InstanceType"], row["AcceleratorName"]
    tpu = _tpu(accelerator, known.names)
    if tpu is not None:
        name, device, devices = accelerator, *tpu
        if devices > 8:  # a slice of several hosts is a cluster, not an instance
            return None
    else:
        candidates = known.names.accelerators.get(accelerator, ())
        count = _number(row["AcceleratorCount"])
        if not candidates or count is None or 0 < count < 1:  # a part of a device trains nothing here
            return None
        if count != round(count) or not 1 <= count <= 1000:
            raise UnusableError(f"has {count:g} devices")
        devices = round(count)
        key = (name, accelerator, row["AcceleratorCount"], row.get("GpuInfo", ""))
        device = devices_of.get(key) or _device(cloud, row, candidates, devices, known)
        devices_of[key] = device
    if name and not _NAME.match(name):
        raise UnusableError("is not named in letters and digits")
    price, spot = _price(row["Price"]), _price(row["SpotPrice"])
    if spot is not None and spot in (0, price):
        left.spots[name or accelerator] += 1
        spot = None
    if price is None and spot is None:
        return None
    region = "".join(character for character in row["Region"] if character.isprintable())[:60]
    zone = row.get("AvailabilityZone") or row["Region"]
    return Offer(name, accelerator, device, devices, region, zone, price, spot, _vcpus(row), _ram_gib(row))


def _tpu(accelerator: str, names: SkyPilotNames) -> tuple[str, int] | None:
    """Device and chips of a TPU slice such as `tpu-v5p-8`, or None for anything else."""
    kind, _, size = accelerator.rpartition("-")
    tpu = names.tpus.get(kind)
    if tpu is None or not (size.isascii() and size.isdigit() and len(size) < 7):
        return None
    return tpu.device, max(1, int(size) // tpu.cores_per_chip)


def _device(cloud: str, row: Mapping[str, str], candidates: Sequence[str], devices: int, known: Known) -> str:
    """Which device a row means: that of our own row of the same name, else what form and memory tell.

    Raises UnusableError where the memory that is stated fits none.
    """
    own = known.instances.get((cloud, normalized(row["InstanceType"])))
    if own is not None and own.device in candidates:
        return own.device
    info = row.get("GpuInfo", "")
    sizes = _memory_readings(info, devices)
    fitting = [
        device
        for device in candidates
        if not sizes or any(_close(size, known.memory_mib[device]) for size in sizes)
    ]
    if not fitting:
        raise UnusableError(f"has {sizes[0]:g} MiB a device, which no {row['AcceleratorName']} has")
    gpu = _GPU_NAME.search(info)
    text = f"{row['InstanceType']} {gpu.group(1) if gpu else ''}".lower().replace("nvlink", "")
    for form in ("pcie", "nvl", "sxm"):
        formed = [device for device in fitting if form in device.split("-")]
        if form in text and formed:
            return formed[0]
    if text.startswith("standard_nc"):  # Azure's NC sizes have cards, its ND sizes modules
        return next((device for device in fitting if "sxm" not in device.split("-")), fitting[0])
    return fitting[0]


def _close(size_mib: float, memory_mib: float) -> bool:
    return abs(size_mib - memory_mib) <= MEMORY_TOLERANCE * memory_mib


def _memory_readings(info: str, devices: int) -> list[float]:
    """MiB a device that a GpuInfo may mean: its size is sometimes that of all devices, sometimes in GB."""
    size, total = _SIZE.search(info), _TOTAL.search(info)
    if size is None:
        return []
    one = float(size.group(1))
    one = one * 1024 if one < 1024 else one
    whole = float(total.group(1)) if total else 0.0
    if devices > 1 and whole == one:
        return [one, one / devices]
    return [one]


def _with_hosts(
    alone: list[Offer],
    hosts: Mapping[str, Mapping[str, str]],
    whole: Mapping[str, Mapping[str, str]],
    host_rows: Mapping[tuple[str, str], Host],
    left: Left,
) -> Iterator[Offer]:
    """Accelerators with the hosts that go with them; regions that disagree are left out."""
    highest = _highest(alone)
    for offer in alone:
        size = str(offer.devices)
        price = offer.price
        if price is not None and price < DISAGREEMENT * highest[offer.accelerator, offer.devices]:
            top = highest[offer.accelerator, offer.devices]
            left.out(f"{offer.accelerator} x{size}", f"costs {price:g} in {offer.region}, {top:g} elsewhere")
        elif size in whole.get(offer.accelerator, {}):
            yield offer._replace(name=whole[offer.accelerator][size])
        elif size in hosts.get(offer.accelerator, {}):
            host_name = hosts[offer.accelerator][size]
            host = host_rows.get((host_name, offer.zone))
            if host is None:
                left.out(f"{offer.accelerator} x{size}", f"has no host {host_name} in its zone")
            else:
                free = host_name.startswith("n1-")
                suffix = f"-{size}x{offer.accelerator.lower()}" if free else ""
                yield _added(offer, host, host_name + suffix)
        else:
            left.out(f"{offer.accelerator} x{size}", "goes with no host that is known")


def _highest(offers: Iterable[Offer]) -> dict[tuple[str, int], float]:
    """The dearest price of an accelerator over its regions, placeholders far above the median aside."""
    prices: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for offer in offers:
        if offer.price is not None:
            prices[offer.accelerator, offer.devices].append(offer.price)
    return {
        key: max(price for price in found if price <= MEDIAN_FACTOR * statistics.median(found))
        for key, found in prices.items()
    }


def _added(offer: Offer, host: Host, name: str) -> Offer:
    return offer._replace(
        name=name,
        price=None if offer.price is None else round(offer.price + host.price, 6),
        spot=None if offer.spot is None or host.spot is None else round(offer.spot + host.spot, 6),
        vcpus=host.vcpus,
        ram_gib=host.ram_gib,
    )


def _number(text: str) -> float | None:
    """A finite number, or None for an empty cell. Raises UnusableError."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise UnusableError(f"has '{text[:20]}' for a number") from None
    if not math.isfinite(value):
        raise UnusableError(f"has '{text[:20]}' for a number")
    return value


def _price(text: str) -> float | None:
    price = _number(text)
    if price is not None and price < 0:
        raise UnusableError(f"costs {price:g}")
    return price


def _vcpus(row: Mapping[str, str]) -> int | None:
    number = _optional(row.get("vCPUs", ""))
    return None if number is None else round(number)


def _ram_gib(row: Mapping[str, str]) -> float | None:
    return _optional(row.get("MemoryGiB", ""))


def _optional(text: str) -> float | None:
    try:
        number = _number(text)
    except UnusableError:
        return None
    return number if number is not None and 0 < number < 1e6 else None
