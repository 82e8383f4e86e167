"""`plan list networks`, `plan list links` and `plan show network`: nominal rates and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from planner.commands.shared.text import WIDTH, pairs, table

if TYPE_CHECKING:
    from planner.hardware.network import Network

SHOWN_DEVICES = 8
"""Devices of a node in `show network`, whose share of the ports is printed."""

WIDTHS: Mapping[str, int] = MappingProxyType({"link": 22, "system": 15, "op": 14})


def network_rows() -> list[dict[str, Any]]:
    """One row for each common network."""
    from planner.hardware.catalog import networks
    from planner.hardware.network import parse_network

    file = networks()
    return [_row(parse_network(name, file, "networks.toml")) for name in file.common]


def _row(network: Network) -> dict[str, Any]:
    kind = network.kind
    title = kind.title
    if network.domain:
        title = f"{network.domain} devices on their own link, a port each beyond: {title}"
    return {
        "name": network.name,
        "gbit_per_port": network.gbit_per_port or None,
        "ports_per_node": None if network.domain or kind.free else network.ports,
        "domain": network.domain,
        "latency_us": kind.latency_us,
        "share": kind.share,
        "title": title,
        "unverified": list(kind.unverified),
        "sources": list(kind.sources),
    }


def network_list(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people; figures from memory or from another kind carry a question mark."""
    header = ["name", "Gbit/s", "ports", "us", "reached", "what"]
    body = [
        [
            row["name"],
            row["gbit_per_port"],
            row["ports_per_node"],
            _marked(row, "latency_us", f"{row['latency_us']:g}"),
            None if row["share"] is None else _marked(row, "share", f"{row['share']:.0%}"),
            row["title"],
        ]
        for row in rows
    ]
    legend = (
        "Gbit/s a port; ports of a node, shared by its devices; us a step between nodes; reached: the part\n"
        "of the nominal rate by large collectives. ? unverified: from memory, or taken from another.\n"
        "Any rate and number of ports can be named: hdr200x2. Sources: plan show network NAME."
    )
    return f"{table(header, body, numbers=(1, 2, 3, 4))}\n\n{legend}"


def _marked(row: Mapping[str, Any], key: str, text: str) -> str:
    return text + ("?" if key in row["unverified"] else " ")


def link_rows() -> list[dict[str, Any]]:
    """Every figure of links.csv: nominal, measured, or the threshold that a healthy node passes."""
    from planner.foundation.decode import encode
    from planner.hardware import measured_rows
    from planner.hardware import measured_tables as measured

    return [encode(row) for row in measured_rows.load_links(measured.folder() / "links.csv")]


def link_list(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people: what was measured, in GB/s a device and one way."""
    header = ["link", "kind", "system", "nominal", "n", "nodes", "op", "GB/s", "message", "share", "mark"]
    keys = (
        "link", "kind", "system", "nominal_gb_per_s", "ranks", "nodes", "op", "busbw_gb_per_s", "message",
        "share_of_nominal", "mark",
    )  # fmt: skip
    body = [
        [_mark(row) if key == "mark" else _short(row[key], WIDTHS.get(key, 16)) for key in keys]
        for row in rows
    ]
    legend = (
        "GB/s a device of n, one way; bus bandwidth for collectives. threshold: a healthy node passes.\n"
        "Sources and notes: plan list links --json."
    )
    return f"{table(header, body)}\n\n{legend}"


def _mark(row: Mapping[str, Any]) -> str:
    return "rejected" if row["rejected"] else row["mark"].replace("read; latency memory", "read")


def _short(value: Any, width: int) -> Any:
    return (value[:width] or None) if isinstance(value, str) else value


def show_network(name: str) -> tuple[dict[str, Any], str]:
    """One network: the document for programs, and the text for people."""
    from planner.foundation.decode import encode
    from planner.hardware import measured_rows
    from planner.hardware import measured_tables as measured
    from planner.hardware.catalog import load_network

    network = load_network(name, "NAME")
    link = network.link(SHOWN_DEVICES)
    figures = [
        row
        for row in measured_rows.load_links(measured.folder() / "links.csv")
        if row.link.startswith(network.kind.links or ("no figure",))
    ]
    curves = [row for row in measured.internode() if row.network == network.name]
    document = {
        **_row(network),
        "devices_per_node": SHOWN_DEVICES,
        "bytes_per_s_per_device": link.bytes_per_s,
        "share_origin": link.share_origin,
        "link_figures": [encode(row) for row in figures],
        "measured_collectives": [encode(row) for row in curves],
    }
    parts = [pairs(_facts(network), WIDTH)]
    if figures:
        parts.append("What was published of such links:\n" + link_list([encode(row) for row in figures]))
    if curves:
        parts.append(_curves_text(curves))
    return document, "\n\n".join(parts)


def _facts(network: Network) -> list[tuple[str, Any]]:
    kind, link = network.kind, network.link(SHOWN_DEVICES)
    facts: list[tuple[str, Any]] = [("name", network.name), ("what", _row(network)["title"])]
    if link.bytes_per_s is None:
        return [*facts, ("time", "none"), ("sources", "; ".join(kind.sources))]
    ports = "1 for each device beyond the domain" if network.domain else f"{network.ports} a node"
    facts.append(("ports", f"{ports}, {network.gbit_per_port} Gbit/s each, nominal"))
    of = "a device beyond the domain" if network.domain else f"a device of {SHOWN_DEVICES} in a node"
    facts.append(("rate", f"{link.bytes_per_s / 1e9:.4g} GB/s one way for {of}"))
    if kind.share is None:
        facts.append(("reached", "unknown: the nominal rate is used"))
    else:
        reached = f"{kind.share:.0%}, {link.bytes_per_s * kind.share / 1e9:.4g} GB/s, by large collectives"
        facts.append(("reached", reached + _doubt(kind.unverified, "share")))
    facts.append(
        ("latency", f"{kind.latency_us:g} us a step between nodes{_doubt(kind.unverified, 'latency_us')}")
    )
    return facts + [("source" if i == 0 else "", source) for i, source in enumerate(kind.sources)]


def _doubt(unverified: Sequence[str], key: str) -> str:
    return ", unverified" if key in unverified else ""


def _curves_text(rows: Sequence[Any]) -> str:
    header = ["system", "nodes", "devices", "op", "message", "time us", "bus GB/s"]
    body = [
        [row.system, row.nodes, row.ranks, row.op, _size(row.bytes), row.latency_us, row.busbw_gb_per_s]
        for row in rows
    ]
    sources = ", ".join(dict.fromkeys(row.source for row in rows))
    return f"Collectives that were measured over it ({sources}):\n{table(header, body)}"


def _size(size_bytes: int) -> str:
    from planner.foundation.units import format_bytes

    return format_bytes(size_bytes)
