"""Energy and carbon of a run: what the data centre draws for it, and what its grid emits for that.

With n devices of a thermal design power W in kW, the power of a node over that of its devices f, and the
power of the building over that of its nodes (PUE) p:

    energy = n W f p x hours          kWh
    carbon = energy x g / 1000        kg of CO2 equivalent, g the grams of a kWh of the region's grid

A node is taken to draw the same in all hours of the run, those without a step included. The region decides
the grid; one that no source speaks of has no carbon here, never a guessed one. What making the hardware
emitted, and what a provider buys or offsets, is not in it.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from planner.foundation.decode import load_toml
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.device_file import DeviceFile
from planner.hardware.on_premises import OnPremises, OwnedDevice
from planner.sizing.comparison import Pricing

KG_PER_G = 1e-3
MAX_G_PER_KWH = 2000.0
"""No grid emits more: lignite alone is at 1,200."""


@frozen
class Pue:
    """Power of the building over power of the nodes, and where that is from."""

    value: float
    source: str


@frozen
class Grid:
    """The mean emission of a kWh of one grid in a year, and the regions that draw from it."""

    name: str
    g_per_kwh: float
    year: int
    source: str
    regions: tuple[str, ...]


@frozen
class EnergyFacts:
    """energy.toml: PUE by provider, the industry's for all others, and grids."""

    industry_pue: Pue
    pue: dict[str, Pue] = field(default_factory=dict)
    grids: tuple[Grid, ...] = ()

    def pue_of(self, provider: str) -> Pue:
        """That of a provider; where it publishes none, the mean of the industry."""
        return self.pue.get(provider, self.industry_pue)

    def grid_of(self, provider: str, region: str) -> Grid | None:
        """The grid of a provider's region, or of a region that is a country; None where unknown."""
        names = {f"{provider}/{region}".lower(), region.lower()} if region else set()
        return next((grid for grid in self.grids if names & {name.lower() for name in grid.regions}), None)


@frozen
class RunEnergy:
    """What a run takes from the grid. `carbon_kg` is None where no figure of the region's grid is known."""

    kwh: float
    carbon_kg: float | None
    power_kw: float
    pue: Pue
    grid: Grid | None


def load_energy(path: Path) -> EnergyFacts:
    """The facts that a TOML file holds. Raises InputError with every fault and its path."""
    facts = load_toml(path, EnergyFacts)
    named = [("industry_pue", facts.industry_pue), *((f"pue.{name}", pue) for name, pue in facts.pue.items())]
    problems = [
        Problem(where=f"{path}: {name}.value", fault=f"is {pue.value:g}.", legal="1 to 5")
        for name, pue in named
        if not 1 <= pue.value <= 5
    ]
    problems += [
        Problem(
            where=f"{path}: grids.{grid.name}.g_per_kwh",
            fault=f"is {grid.g_per_kwh:g}.",
            legal=f"0 to {MAX_G_PER_KWH:g}",
        )
        for grid in facts.grids
        if not 0 <= grid.g_per_kwh <= MAX_G_PER_KWH
    ]
    if problems:
        raise InputError(*problems)
    return facts


def energy_facts() -> EnergyFacts:
    """The facts as shipped."""
    from planner.hardware.catalog import data_folder

    return load_energy(data_folder() / "energy.toml")


def energy_kwh(devices: int, hours: float, tdp_w: float, node_power_over_tdp: float, pue: float) -> float:
    """Energy of a run in kWh by the formula above."""
    return devices * tdp_w / 1000 * node_power_over_tdp * pue * hours


def run_energy(
    device: DeviceFile,
    devices: int,
    hours: float,
    *,
    provider: str,
    region: str,
    pricing: Pricing,
    facts: EnergyFacts,
    inputs: OnPremises,
) -> RunEnergy | None:
    """Energy and carbon of so many devices for so many hours; None where the device's power is unknown.

    On premises the PUE is that of `inputs`, and a power of the user's stands for the catalog's; the region
    is not known there.
    """
    own = inputs.devices.get(device.name, OwnedDevice())
    tdp_w = own.tdp_w if own.tdp_w is not None else device.power.tdp_w if device.power is not None else None
    if tdp_w is None:
        return None
    owned = pricing is Pricing.ON_PREMISES or not provider
    pue = Pue(value=inputs.pue.value, source=inputs.pue.source) if owned else facts.pue_of(provider)
    over_tdp = inputs.node_power_over_tdp.value
    kwh = energy_kwh(devices, hours, tdp_w, over_tdp, pue.value)
    grid = facts.grid_of(provider, region)
    return RunEnergy(
        kwh=kwh,
        carbon_kg=None if grid is None else kwh * grid.g_per_kwh * KG_PER_G,
        power_kw=devices * tdp_w / 1000 * over_tdp,
        pue=pue,
        grid=grid,
    )
