"""The price catalogs that SkyPilot keeps on the user's disk, read where they are present and never shipped.

They lie in `~/.sky/catalogs/vN/CLOUD/vms.csv` (`planner.hardware.prices.skypilot_folder`). What is known to
be wrong in them is left out with a warning: numbers of devices that are not sold (Azure's ND96isr_H100_v5
with 12), prices of 0 and placeholders of 700 dollars, spot prices of 0 or equal to the price on demand,
Google's regional prices that belong to another offer, and memory sizes that fit no device of that name."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from planner.foundation.decode import load_toml
from planner.foundation.frozen import frozen
from planner.foundation.suggest import normalized
from planner.hardware.instance import Instance, doubt_of, fault_of, median_prices
from planner.hardware.skypilot_rows import Known, Left, Offer, SkyPilotNames, UnusableError, read_offers


@frozen
class Warned:
    """A warning about one provider's file."""

    provider: str
    text: str


@frozen
class LiveCatalog:
    """What SkyPilot's catalogs hold: one instance a name, at one region, and what was left out."""

    instances: tuple[Instance, ...]
    warnings: tuple[Warned, ...]


def load_names(path: Path) -> SkyPilotNames:
    """SkyPilot's names of accelerators and hosts."""
    return load_toml(path, SkyPilotNames)


def catalog_files(folder: Path) -> dict[str, Path]:
    """For each cloud: its `vms.csv` in the newest version of the catalog that has one."""
    found: dict[str, tuple[int, Path]] = {}
    try:
        files = sorted(folder.glob("v*/*/vms.csv"))
    except OSError:
        return {}
    for file in files:
        version = file.parent.parent.name.removeprefix("v")
        cloud = file.parent.name
        if version.isascii() and version.isdigit() and len(version) < 9 and cloud.isalnum():
            found[cloud] = max(found.get(cloud, (-1, file)), (int(version), file))
    return {cloud: file for cloud, (_, file) in sorted(found.items())}


def read_live(
    folder: Path, names: SkyPilotNames, memory_mib: Mapping[str, int], shipped: Iterable[Instance]
) -> LiveCatalog:
    """Every instance with accelerators of this catalog. Files that cannot be read become warnings.

    `memory_mib` has the memory of each device of the catalog; `shipped` are its instances, whose networks
    and regions are taken over for those of the same name.
    """
    known = {(instance.provider, normalized(instance.name)): instance for instance in shipped}
    rows: list[Instance] = []
    left: dict[str, Left] = {}
    warnings: list[Warned] = []
    for cloud, file in catalog_files(folder).items():
        left[cloud] = Left()
        try:
            offers = read_offers(
                cloud, file, Known(names=names, memory_mib=memory_mib, instances=known), left[cloud]
            )
            date = datetime.date.fromtimestamp(file.stat().st_mtime).isoformat()
            source = f"SkyPilot catalog {file.parent.parent.name} {cloud}/vms.csv, file of that date"
            rows += [_instance(cloud, offer, known, date, source) for offer in offers]
        except UnusableError as error:
            warnings.append(Warned(provider=cloud, text=f"SkyPilot's {cloud}/vms.csv {error}"))
    instances = _chosen(rows, known, memory_mib, left)
    for cloud, found in left.items():
        warnings += [
            Warned(provider=cloud, text=f"SkyPilot's {cloud}/vms.csv: {text}") for text in found.texts()
        ]
    return LiveCatalog(instances=instances, warnings=tuple(warnings))


def _instance(
    cloud: str, offer: Offer, known: Mapping[tuple[str, str], Instance], date: str, source: str
) -> Instance:
    """An offer as an instance of the catalog, with the network of our own row of that name."""
    own = known.get((cloud, normalized(offer.name)))
    return Instance(
        provider=cloud,
        name=own.name if own else offer.name,
        device=offer.device,
        devices=offer.devices,
        network=own.network if own else "",
        ondemand_usd_per_hour=offer.price,
        spot_usd_per_hour=offer.spot,
        vcpus=offer.vcpus,
        ram_gib=offer.ram_gib,
        intra_node=own.intra_node if own else "",
        inter_node=own.inter_node if own else "",
        region=offer.region,
        as_of=date,
        price_mark="READ",
        network_mark=own.network_mark if own else "",
        reserved_note=own.reserved_note if own else "",
        source=source,
        note="",
    )


def _chosen(
    rows: list[Instance],
    known: Mapping[tuple[str, str], Instance],
    memory_mib: Mapping[str, int],
    left: Mapping[str, Left],
) -> tuple[Instance, ...]:
    """One instance a name: at the region of our own row of that name, else at the cheapest that is sane."""
    medians = median_prices([*known.values(), *_cheapest_rows(rows)])
    groups: defaultdict[str, list[Instance]] = defaultdict(list)
    for row in rows:
        fault = fault_of(row, memory_mib) or doubt_of(row, medians)
        if fault:
            left[row.provider].out(row.name, fault)
        else:
            groups[row.full_name].append(row)
    chosen = []
    for group in groups.values():
        own = known.get((group[0].provider, normalized(group[0].name)))
        local = [row for row in group if own is not None and row.region == own.region]
        chosen.append(_summary(_cheapest(local or group), group))
    return tuple(chosen)


def _cheapest_rows(rows: Iterable[Instance]) -> list[Instance]:
    groups: defaultdict[str, list[Instance]] = defaultdict(list)
    for row in rows:
        groups[row.full_name].append(row)
    return [_cheapest(group) for group in groups.values()]


def _cheapest(rows: Sequence[Instance]) -> Instance:
    """The row that costs least on demand, else as spot; the lowest spot price of its region."""

    def key(row: Instance) -> tuple[float, float, str]:
        price, spot = row.ondemand_usd_per_hour, row.spot_usd_per_hour
        return (math.inf if price is None else price, math.inf if spot is None else spot, row.region)

    return min(rows, key=key)


def _summary(chosen: Instance, group: Sequence[Instance]) -> Instance:
    prices = [row.ondemand_usd_per_hour for row in group if row.ondemand_usd_per_hour is not None]
    regions = len({row.region for row in group})
    if not prices or regions == 1:
        return chosen
    note = f"on demand {min(prices):g} to {max(prices):g} over {regions} regions"
    return dataclasses.replace(chosen, note=note)
