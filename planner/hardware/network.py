"""Networks between nodes, as text: `hdr200x8`, `ndr400x8`, `eth100`, `efa3200`, `nvl72`, `none`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from planner.foundation.decode import decode, load_toml_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import nearest_names, unknown_name
from planner.hardware.cluster import Link

MAX_GBIT = 100_000
MAX_PORTS = 1024
MAX_LATENCY_US = 1_000_000
GBIT_BYTES_PER_S = 1e9 / 8
NETWORK_GRAMMAR = "KIND, Gbit/s of a port, and x with the ports of a node: hdr200x8"
_NETWORK = re.compile(r"^([a-z]+)(?:([0-9]{1,6})(?:x([0-9]{1,4}))?)?(?:-([a-z]+[0-9]{1,6}))?$")


@frozen
class NetworkKind:
    """A network technology. `rates_gbit` are the port rates that exist; where empty, any is read.

    `share` is the part of the nominal rate that collectives of large messages reach; None: unknown.
    `unverified` names keys that no source was read for. `links` begins the names of its figures in links.csv.
    """

    title: str
    latency_us: float
    sources: tuple[str, ...]
    share: float | None = None
    unverified: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    rates_gbit: tuple[int, ...] = ()
    free: bool = False
    scale_up: bool = False
    beyond: str = ""


@frozen
class NetworkFile:
    """networks.toml: the kinds, and names that are common."""

    common: tuple[str, ...]
    kinds: dict[str, NetworkKind]


@frozen
class Network:
    """A network read from text.

    Ports belong to a node. With a `domain`, that many devices are joined by their own link, and the
    port is that of each device beyond the domain.
    """

    name: str
    kind: NetworkKind
    gbit_per_port: int = 0
    ports: int = 1
    domain: int | None = None

    def link(self, devices_per_node: int) -> Link:
        """The link as one device sees it: the devices of a node share its ports evenly."""
        if self.kind.free:
            return Link(name=self.name, latency_s=0.0, bytes_per_s=None, sources=self.kind.sources)
        node_bytes_per_s = self.gbit_per_port * self.ports * GBIT_BYTES_PER_S
        return Link(
            name=self.name,
            latency_s=self.kind.latency_us / 1e6,
            bytes_per_s=node_bytes_per_s if self.domain else node_bytes_per_s / devices_per_node,
            sources=self.kind.sources,
            share=self.kind.share,
            share_origin=share_origin(self.kind.share, self.kind.unverified),
        )


def share_origin(share: float | None, unverified: tuple[str, ...]) -> str:
    """Where a share comes from: measured on some host, or recalled and so no better than a datasheet."""
    return "datasheet" if share is None or "share" in unverified else "fitted"


def load_networks(path: Path) -> NetworkFile:
    """The kinds of network in networks.toml. Raises InputError with every fault, also of the numbers."""
    file = decode(NetworkFile, load_toml_object(path), source=path.name)
    problems = [
        Problem(where=f"{path.name}: kinds.{name}.{key}", fault=f"is {value}.", legal=legal)
        for name, kind in file.kinds.items()
        for key, value, good, legal in (
            ("latency_us", kind.latency_us, 0 <= kind.latency_us <= MAX_LATENCY_US, f"0 to {MAX_LATENCY_US}"),
            ("share", kind.share, kind.share is None or 0 < kind.share <= 1, "above 0, at most 1"),
        )
        if not good
    ]
    if problems:
        raise InputError(*problems)
    return file


def parse_network(text: str, file: NetworkFile, where: str) -> Network:
    """The network that `text` names. Raises InputError with the nearest legal text."""
    match = _NETWORK.match(text.lower())
    kind = file.kinds.get(match.group(1)) if match else None
    if match is None or kind is None:
        raise unknown_name(where, "network", text, file.common, fix=f"write {NETWORK_GRAMMAR}")
    name, rate, ports, beyond = match.groups()
    if kind.free:
        return _free(text, match, kind, where)
    if rate is None:
        raise _fault(text, where, "names no rate.", nearest_names(text, file.common))
    if kind.scale_up and ports is None:
        return _scale_up(text, int(rate), beyond or kind.beyond, file, where)
    if (
        kind.scale_up
        or beyond is not None
        or not 1 <= int(rate) <= MAX_GBIT
        or not 1 <= int(ports or 1) <= MAX_PORTS
    ):
        raise _fault(text, where, "cannot be read.", nearest_names(text, file.common))
    if kind.rates_gbit and int(rate) not in kind.rates_gbit:
        legal = [f"{name}{known}{f'x{ports}' if ports else ''}" for known in kind.rates_gbit]
        raise _fault(text, where, f"no port of {kind.title} has {rate} Gbit/s.", legal)
    return Network(name=text.lower(), kind=kind, gbit_per_port=int(rate), ports=int(ports or 1))


def _free(text: str, match: re.Match[str], kind: NetworkKind, where: str) -> Network:
    if any(match.groups()[1:]):
        raise _fault(text, where, f"'{match.group(1)}' takes no rate.", [match.group(1)])
    return Network(name=text.lower(), kind=kind)


def _scale_up(text: str, domain: int, beyond: str, file: NetworkFile, where: str) -> Network:
    """A domain of devices that their own link joins; `beyond` gives each device's port past it."""
    if not 2 <= domain <= 100_000:
        raise _fault(text, where, "cannot be read.", nearest_names(text, file.common))
    port = parse_network(beyond, file, where)
    if port.domain is not None or port.kind.free:
        raise _fault(text, where, f"'{beyond}' is no network of ports.", nearest_names(text, file.common))
    return Network(
        name=text.lower(), kind=port.kind, gbit_per_port=port.gbit_per_port, ports=port.ports, domain=domain
    )


def _fault(text: str, where: str, fault: str, legal: Any) -> InputError:
    return InputError(
        Problem(
            where=where,
            fault=f"'{text[:60]}': {fault}",
            legal=" or ".join(legal),
            fix=f"write {NETWORK_GRAMMAR}",
        )
    )
