"""How often nodes stop a job, by device, and what that usually costs: profiles/failures.toml.

A rate is of a node of 8 devices. One of n devices counts as n / 8 of it: nine of ten interruptions are of
devices, of their ports and of the software of their ranks, one of ten is of the host alone (the file lists
them). So hosts of fewer devices, alone or in a rack of 72, fail a little more often than that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from planner.foundation.decode import load_toml_object
from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S
from planner.hardware.catalog import data_folder
from planner.hardware.cluster import ClusterSpec


@frozen
class FailureRate:
    """Interruptions in 1000 days of a node, with the range of sources; assumed for the devices `alike`."""

    per_1000_node_days: float
    low: float
    high: float
    as_of: str
    source: str
    devices: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()


@frozen
class SpotTerms:
    """How often a provider takes a node back, after what notice, and how long until there is another."""

    per_1000_node_days: float
    low: float
    high: float
    notice_s: float
    wait_s: float
    as_of: str
    source: str
    notice_source: str
    wait_source: str


@frozen
class RestartTerms:
    """Seconds from an interruption until the job is started again."""

    fixed_s: float
    low_s: float
    high_s: float
    as_of: str
    source: str


@frozen
class RepairTerms:
    """What is assumed of a failed node."""

    as_of: str
    source: str


@frozen
class StorageTerms:
    """What storage takes: so much a device, but of one node not more than that."""

    write_gb_per_s_per_device: float
    write_gb_per_s_of_a_node: float
    low_gb_per_s_per_device: float
    high_gb_per_s_per_device: float
    as_of: str
    source: str


@frozen
class FailureFile:
    """profiles/failures.toml."""

    node_devices: int
    assumed: FailureRate
    rates: tuple[FailureRate, ...]
    spot: SpotTerms
    restart: RestartTerms
    repair: RepairTerms
    storage: StorageTerms

    def of(self, device: str) -> FailureRate:
        """The rate of a device by its name: its own, that of its package, or the one assumed for all."""
        named = (rate for rate in self.rates if device in rate.devices or device in rate.alike)
        return next(named, self.assumed)

    def measured(self, device: str) -> bool:
        """Whether a rate was published for this very device."""
        return device in self.of(device).devices


@cache
def failure_file() -> FailureFile:
    """The file. It is ours and a test decodes it strictly: no need to here."""
    tables = load_toml_object(data_folder() / "failures.toml")
    return FailureFile(
        node_devices=tables["node_devices"],
        assumed=FailureRate(**tables["assumed"]),
        rates=tuple(FailureRate(**_tuples(rate)) for rate in tables["rates"]),
        spot=SpotTerms(**tables["spot"]),
        restart=RestartTerms(**tables["restart"]),
        repair=RepairTerms(**tables["repair"]),
        storage=StorageTerms(**tables["storage"]),
    )


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {**table, "devices": tuple(table["devices"]), "alike": tuple(table["alike"])}


def usual_failures_per_s(cluster: ClusterSpec) -> float:
    """Interruptions a second of a job on the whole cluster, by the rates of its devices."""
    file = failure_file()
    each = (group.devices * file.of(group.device.name).per_1000_node_days for group in cluster.groups)
    return sum(each) / file.node_devices / (1000 * DAY_S)


def rated_nodes(cluster: ClusterSpec) -> float:
    """The nodes of the cluster, each counted by its devices: one of 8 is 1."""
    return cluster.devices / failure_file().node_devices
