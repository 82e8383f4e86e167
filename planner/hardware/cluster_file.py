"""A cluster in a TOML file: groups by device or instance, and links of its own where they are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from planner.foundation.decode import load_toml
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec, Link
from planner.hardware.cluster_grammar import Part, instance_part, join, shaped_part
from planner.hardware.prices import Market, shipped_market

MAX_GB_PER_S = 1e6
MAX_LATENCY_US = 1e6


@frozen
class LinkTable:
    """A link by its numbers: nominal, one direction, per device."""

    gb_per_s: float
    latency_us: float
    name: str = "link"
    sources: tuple[str, ...] = ()


@frozen
class GroupTable:
    """Equal nodes: `device` with `devices_per_node`, or `instance`. A device may be a path to its file.

    `intra` and `inter` are its links, inside and between its nodes, where they are known by numbers.
    """

    nodes: int
    device: str | None = None
    devices_per_node: int | None = None
    instance: str | None = None
    network: str | None = None
    intra: LinkTable | None = None
    inter: LinkTable | None = None


@frozen
class ClusterFile:
    """The tables of a cluster file. `intra` and `inter` are the links of all groups."""

    groups: tuple[GroupTable, ...]
    name: str | None = None
    intra: LinkTable | None = None
    inter: LinkTable | None = None
    price_usd_per_hour: float | None = None


def read_cluster_file(path: Path, market: Market | None = None) -> ClusterSpec:
    """The cluster that a TOML file describes. Raises InputError with every fault and its path.

    A price in the file is that of the whole cluster and wins over those of `market`.
    """
    market = market or shipped_market()
    table = load_toml(path, ClusterFile)
    problems = _faults(table, str(path))
    parts: list[Part] = []
    for index, group in enumerate(table.groups):
        try:
            parts.append(_part(group, path, f"{path}: groups.{index}", market))
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    cluster = join(table.name or path.stem, parts, str(path))
    groups = tuple(
        dataclasses.replace(
            group,
            intra=None if table.intra else group.intra,
            inter=None if table.inter else group.inter,
        )
        for group in cluster.groups
    )
    changes = {
        key: value
        for key, value in (
            ("groups", groups),
            ("intra", _link(table.intra)),
            ("inter", _link(table.inter)),
            ("price_usd_per_hour", table.price_usd_per_hour),
            ("price_sources", None if table.price_usd_per_hour is None else (f"of the whole, {path}",)),
        )
        if value is not None
    }
    return dataclasses.replace(cluster, **changes)  # type: ignore[arg-type]  # keys and types are those above


def _part(group: GroupTable, path: Path, where: str, market: Market) -> Part:
    part, intra, inter = _unlinked(group, path, where, market), _link(group.intra), _link(group.inter)
    stated = {} if inter is None else {"inter": inter, "beyond": inter, "assumed": ""}
    return dataclasses.replace(part, intra=intra or part.intra, **stated)  # type: ignore[arg-type]  # as above


def _unlinked(group: GroupTable, path: Path, where: str, market: Market) -> Part:
    if (group.device is None) == (group.instance is None):
        raise InputError(Problem(where=where, fault="needs either `device` or `instance`."))
    if group.instance is not None:
        if group.devices_per_node is not None:
            raise InputError(
                Problem(
                    where=f"{where}.devices_per_node", fault="is known from the instance.", fix="remove it"
                )
            )
        return instance_part(group.nodes, group.instance, group.network, where, market)
    if group.devices_per_node is None:
        raise InputError(Problem(where=f"{where}.devices_per_node", fault="is missing."))
    device = str(group.device)
    if device.endswith(".toml"):
        device = str(path.parent / device)
    return shaped_part(group.nodes, group.devices_per_node, device, group.network, where, market)


def _link(table: LinkTable | None) -> Link | None:
    if table is None:
        return None
    return Link(
        name=table.name,
        latency_s=table.latency_us / 1e6,
        bytes_per_s=table.gb_per_s * 1e9,
        sources=table.sources,
    )


def _faults(table: ClusterFile, source: str) -> list[Problem]:
    """Problems of the numbers and names of a cluster file."""
    problems = []
    if not table.groups:
        problems.append(Problem(where=f"{source}: groups", fault="is empty: a cluster has devices."))
    if table.name is not None and (not 0 < len(table.name) <= 100 or table.name.startswith("local")):
        legal = "1 to 100 characters that do not begin with 'local', which is this machine"
        problems.append(Problem(where=f"{source}: name", fault="cannot be used.", legal=legal))
    links = [("intra", table.intra), ("inter", table.inter)]
    for index, group in enumerate(table.groups):
        links += [(f"groups.{index}.intra", group.intra), (f"groups.{index}.inter", group.inter)]
    for key, link in links:
        if link is not None and not 0 < link.gb_per_s <= MAX_GB_PER_S:
            legal = f"above 0, at most {MAX_GB_PER_S:g}"
            problems.append(
                Problem(where=f"{source}: {key}.gb_per_s", fault=f"is {link.gb_per_s}.", legal=legal)
            )
        if link is not None and not 0 <= link.latency_us <= MAX_LATENCY_US:
            legal = f"0 to {MAX_LATENCY_US:g}"
            problems.append(
                Problem(where=f"{source}: {key}.latency_us", fault=f"is {link.latency_us}.", legal=legal)
            )
    if table.price_usd_per_hour is not None and not table.price_usd_per_hour >= 0:
        fault = f"is {table.price_usd_per_hour}."
        problems.append(Problem(where=f"{source}: price_usd_per_hour", fault=fault, legal="0 or more"))
    return problems
