"""Cloud instances: the rows of instances.csv, and `COUNT*INSTANCE` names with or without a provider."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from planner.codec import decode, noun, read_text
from planner.errors import InputError, Problem
from planner.naming import squash, unknown


@noun
class Instance:
    """One kind of virtual machine or server. Prices are dollars an hour for the whole instance.

    None means unknown. `network` is in the grammar of `planner.network`, empty where unknown. The marks
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
    return tuple(_instance(row, f"{path.name} line {line}") for line, row in enumerate(reader, start=2))


def _instance(row: dict[str, str], source: str) -> Instance:
    values: dict[str, object] = dict(row)
    for column, kind in _NUMBERS.items():
        text = row.get(column, "")
        try:
            values[column] = kind(text) if text else None
        except ValueError:
            raise InputError(Problem(where=f"{source}: {column}", fault=f"'{text}' is no number.")) from None
    return decode(Instance, values, source=source)


def find_instance(text: str, instances: tuple[Instance, ...], where: str) -> Instance:
    """The instance named `INSTANCE` or `PROVIDER/INSTANCE`; case, dashes and underscores do not matter."""
    provider, _, name = text.rpartition("/")
    found = [
        instance
        for instance in instances
        if squash(instance.name) == squash(name) and squash(provider) in ("", squash(instance.provider))
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
    raise unknown(where, "instance", text, names)
