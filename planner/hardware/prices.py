"""What instances and devices cost: our catalog, SkyPilot's newer rows, and the user's prices above both.

Of two prices of the same instance the user's wins; then SkyPilot's, unless our row has a later date or
SkyPilot's has no price on demand where ours has one. A device that no instance brings has the user's price,
else, where it is asked for, its cost on premises, else none.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # read only where a price asks for them: `plan list` answers at once
    from planner.hardware.device_file import DeviceFile
    from planner.hardware.on_premises import OnPremises
    from planner.hardware.skypilot import LiveCatalog, Warned
    from planner.hardware.user_prices import Price, PriceFile, PriceTerm

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
        from planner.hardware.user_prices import Price

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
        from planner.hardware.user_prices import load_prices, with_own_prices

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
    from planner.hardware.user_prices import load_price_terms

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
