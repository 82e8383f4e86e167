"""The text of `--cluster`: `NODESxGPUS:DEVICE[@NETWORK]`, `COUNT*INSTANCE[@NETWORK]`, `+`, `local[:N]`, TOML.

A mixed cluster's one link inside nodes, and one between them, is the slowest of its parts: a collective
over all of them waits for that one. Each group keeps its own beside it, where it is another.

A cluster in a TOML file: groups by device or instance, and links of its own where they are known.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from planner.foundation.decode import load_toml
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.units import GIB
from planner.hardware.catalog import load_device, load_network
from planner.hardware.cluster import ClusterSpec, DeviceGroup, Link, slowest_link
from planner.hardware.device_file import DeviceFile
from planner.hardware.network import Network
from planner.hardware.prices import Market, shipped_market

GRAMMAR = (
    "NODESxGPUS:DEVICE[@NETWORK] such as 4x8:h100-sxm-80gb@ndr400x8, COUNT*INSTANCE such as 16*p5.48xlarge, "
    "several of these joined with +, local, local:N, or a TOML file"
)
MAX_NODES = 1_000_000
MAX_DEVICES_PER_NODE = 1024
MAX_DEVICES = 2**20
MAX_TEXT = 1000
_SHAPE = re.compile(r"^([0-9]{1,12})\s*x\s*([0-9]{1,12})\s*:\s*([^@\s]+)(?:@([^@\s]+))?$")
_INSTANCES = re.compile(r"^([0-9]{1,12})\s*\*\s*([^@\s]+)(?:@([^@\s]+))?$")
_LOCAL = re.compile(r"^local(?::([0-9]{1,12}))?$")


@frozen
class Part:
    """One part of a cluster text: equal nodes, their links, and their price and its source where known.

    `beyond` is the link to other parts; None where it is not known. `assumed` says why links between nodes
    are taken to be these, where no network was named.
    """

    name: str
    group: DeviceGroup
    intra: Link
    inter: Link
    beyond: Link | None
    price_usd_per_hour: float | None
    price_source: str = ""
    assumed: str = ""

    def told(self, link: Link) -> Link:
        """A link between nodes, with what was assumed of it among its sources."""
        return dataclasses.replace(link, sources=(self.assumed, *link.sources)) if self.assumed else link


def parse_cluster(text: str, where: str = "--cluster", market: Market | None = None) -> ClusterSpec:
    """The cluster that `text` names. Raises InputError with every fault and the grammar.

    `market` has the instances and prices; without it the shipped catalog does.
    """
    text = text.strip()
    if len(text) > MAX_TEXT:
        raise _fault(where, f"has {len(text)} characters.")
    local = _LOCAL.match(text)
    if local:
        from planner.hardware.local_machine import local_cluster

        return local_cluster(None if local.group(1) is None else int(local.group(1)))
    if text.endswith(".toml") and ":" not in text and "*" not in text:
        return read_cluster_file(Path(text), market)
    market = market or (shipped_market() if "*" in text else Market(instances=()))
    parts: list[Part] = []
    problems: list[Problem] = []
    for piece in text.split("+"):
        try:
            parts.append(_parse_part(piece.strip(), where, market))
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    return join("+".join(part.name for part in parts), parts, where)


def _parse_part(text: str, where: str, market: Market) -> Part:
    shape = _SHAPE.match(text)
    if shape:
        nodes, per_node, device, network = shape.groups()
        return shaped_part(int(nodes), int(per_node), device, network, where, market)
    instances = _INSTANCES.match(text)
    if instances:
        count, name, network = instances.groups()
        return instance_part(int(count), name, network, where, market)
    if _LOCAL.match(text):
        raise _fault(where, "'local' cannot be part of a mixed cluster.")
    raise _fault(where, f"'{text[:80]}' cannot be read.")


@frozen
class EqualNodes:
    """A cluster text of equal nodes as it stands: of an instance, or of so many devices each."""

    nodes: int
    instance: str = ""
    devices_per_node: int = 0
    device: str = ""
    network: str = ""


def read_equal_nodes(text: str) -> EqualNodes | None:
    """The parts of a text of one kind of node; None for any other: mixed, local, a file, or none at all."""
    instances, shape = _INSTANCES.match(text.strip()), _SHAPE.match(text.strip())
    if "+" in text:
        return None
    if instances:
        count, name, network = instances.groups()
        return EqualNodes(nodes=int(count), instance=name, network=network or "")
    if shape:
        nodes, per_node, device, network = shape.groups()
        return EqualNodes(
            nodes=int(nodes), devices_per_node=int(per_node), device=device, network=network or ""
        )
    return None


def shaped_part(
    nodes: int, per_node: int, device: str, network: str | None, where: str, market: Market
) -> Part:
    """`nodes` nodes of `per_node` devices each. Without a network: the device's usual one."""
    _check_counts(nodes, per_node, where)
    facts = load_device(device, where)
    chosen = load_network(network or facts.network, where)
    group, intra, inter = _links(facts, nodes, per_node, chosen, where)
    name = f"{nodes}x{per_node}:{facts.name}"
    if network is not None or nodes > 1:
        name += f"@{chosen.name}"
    price = market.device_price(facts)
    return Part(
        name=name,
        group=group,
        intra=intra,
        inter=inter,
        beyond=chosen.link(group.devices_per_node),
        assumed="" if network else f"assumed: no network was named for {facts.name}",
        price_usd_per_hour=None if price is None else nodes * per_node * price.usd_per_hour,
        price_source=market.lacking(facts) if price is None else price.text(),
    )


def instance_part(count: int, name: str, network: str | None, where: str, market: Market) -> Part:
    """`count` instances of the catalog, with their network and on-demand price."""
    instance = market.instance(name, where)
    _check_counts(count, instance.devices, where)
    facts = load_device(instance.device, where)
    text, beyond = network or instance.network, None
    if text:
        chosen = load_network(text, where)
        group, intra, inter = _links(facts, count, instance.devices, chosen, where)
        beyond = chosen.link(group.devices_per_node)
    elif count == 1:
        group = DeviceGroup(device=facts.device(), nodes=1, devices_per_node=instance.devices)
        intra = inter = facts.link_of(instance.devices)
    else:
        raise InputError(_unknown_network(f"{count}*{instance.full_name}", where))
    if instance.ram_gib is not None:
        nodes = group.devices_per_node / instance.devices  # a domain may join several instances
        group = dataclasses.replace(group, host_memory_bytes=round(nodes * instance.ram_gib * GIB))
    price = instance.ondemand_usd_per_hour
    return Part(
        name=f"{count}*{instance.full_name}" + (f"@{network.lower()}" if network else ""),
        group=group,
        intra=intra,
        inter=inter,
        beyond=beyond,
        price_usd_per_hour=None if price is None else count * price,
        price_source=market.price_text(instance),
    )


def _unknown_network(name: str, where: str) -> Problem:
    return Problem(
        where=where,
        fault=f"the network between instances of {name.partition('*')[2]} is not known.",
        fix=f"name it, as in {name}@eth25",
    )


def _links(
    facts: DeviceFile, nodes: int, per_node: int, network: Network, where: str
) -> tuple[DeviceGroup, Link, Link]:
    """The group, the link inside its nodes and the link between them.

    Where the devices' own link joins several nodes (NVL72, a TPU pod), all devices of such a domain count
    as one node as soon as there are more of them than one domain holds.
    """
    device = facts.device()
    if network.kind.free:
        link = network.link(per_node)
        return DeviceGroup(device=device, nodes=nodes, devices_per_node=per_node), link, link
    if network.domain is None:
        group = DeviceGroup(device=device, nodes=nodes, devices_per_node=per_node)
        return group, facts.link_of(per_node), network.link(per_node)
    if per_node > network.domain:
        raise _fault(where, f"a node of {per_node} devices is larger than {network.name} joins.")
    own = facts.link_of(2)
    total = nodes * per_node
    if total <= network.domain:
        return DeviceGroup(device=device, nodes=nodes, devices_per_node=per_node), own, own
    sizes = range(network.domain - network.domain % per_node, 0, -per_node)
    size = next(size for size in sizes if total % size == 0)
    group = DeviceGroup(device=device, nodes=total // size, devices_per_node=size)
    return group, own, network.link(size)


def join(name: str, parts: list[Part], where: str) -> ClusterSpec:
    """One cluster of all parts."""
    devices = sum(part.group.devices for part in parts)
    if devices > MAX_DEVICES:
        raise _fault(where, f"has {devices} devices.", f"at most {MAX_DEVICES}")
    free = {part.inter.bytes_per_s is None for part in parts}
    if len(free) > 1:
        raise _fault(where, "one part has communication that takes no time (@none) and another has not.")
    prices = [part.price_usd_per_hour for part in parts]
    known = [price for price in prices if price is not None]
    intra = slowest_link(
        [part.intra for part in parts if part.group.devices_per_node > 1] or [parts[0].intra]
    )
    inter = _joined(parts, where)
    return ClusterSpec(
        name=name,
        groups=tuple(_with_links(part, intra, inter) for part in parts),
        intra=intra,
        inter=inter,
        price_usd_per_hour=sum(known) if len(known) == len(prices) else None,
        price_sources=tuple(dict.fromkeys(part.price_source for part in parts if part.price_source)),
    )


def _joined(parts: list[Part], where: str) -> Link:
    """The link between nodes: of several parts the slowest within and between them."""
    within = [part.told(part.inter) for part in parts if part.group.nodes > 1]
    if len(parts) == 1:
        return within[0] if within else parts[0].inter
    unknown = [part for part in parts if part.beyond is None]
    if unknown:
        raise InputError(*(_unknown_network(part.name, where) for part in unknown))
    beyond = [part.told(part.beyond) for part in parts if part.beyond is not None]
    return slowest_link([*within, *beyond])


def _with_links(part: Part, intra: Link, inter: Link) -> DeviceGroup:
    """The group of a part with its own links, where it has them and they are not the cluster's."""
    group = part.group
    return dataclasses.replace(
        group,
        intra=None if group.devices_per_node == 1 or _alike(part.intra, intra) else part.intra,
        inter=None if group.nodes == 1 or _alike(part.inter, inter) else part.inter,
    )


def _alike(one: Link, other: Link) -> bool:
    return dataclasses.replace(one, sources=()) == dataclasses.replace(other, sources=())


def _check_counts(nodes: int, per_node: int, where: str) -> None:
    problems = [
        Problem(where=where, fault=f"{value} {what}.", legal=f"1 to {most}")
        for value, what, most in (
            (nodes, "nodes", MAX_NODES),
            (per_node, "devices a node", MAX_DEVICES_PER_NODE),
        )
        if not 1 <= value <= most
    ]
    if problems:
        raise InputError(*problems)


def _fault(where: str, fault: str, legal: str = "") -> InputError:
    return InputError(Problem(where=where, fault=fault, legal=legal or GRAMMAR))


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
