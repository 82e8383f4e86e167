"""`plan list` and `plan show`: the catalog."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import (
    arch_option,
    json_option,
    on_premises_option,
    open_market,
    prices_option,
    warn_of,
)
from planner.commands.shared.text import WIDTH, pairs, print_json, table

if TYPE_CHECKING:
    from planner.hardware.cluster import Link
    from planner.hardware.prices import Market


def _models() -> list[dict[str, Any]]:
    from planner.hardware.catalog import model_index

    return [
        {
            "name": name,
            "title": entry.title,
            "model_type": entry.model_type,
            "params_total": entry.params_total,
            "params_active": entry.params_active,
            "layers": entry.layers,
            "hidden": entry.hidden,
            "vocab": entry.vocab,
            "max_positions": entry.max_positions,
            "aliases": list(entry.aliases),
        }
        for name, entry in model_index().items()
    ]


def _devices() -> list[dict[str, Any]]:
    from planner.commands.hardware.show_device import device_rows

    return device_rows()


def _instances(prices: Path | None = None) -> list[dict[str, Any]]:
    """Every instance that is sane; what is left out or doubtful is named on stderr."""
    market = open_market(prices, on_premises=False)
    for rejected in market.rejected:
        click.echo(f"warning: {rejected.name} is left out: {rejected.reason} ({rejected.source})", err=True)
    for doubt in market.doubtful:
        click.echo(f"warning: {doubt.name} is doubtful: {doubt.reason} ({doubt.source})", err=True)
    warn_of(market)
    return [
        {
            "name": instance.full_name,
            "device": instance.device,
            "devices": instance.devices,
            "network": instance.network,
            "ondemand_usd_per_hour": instance.ondemand_usd_per_hour,
            "spot_usd_per_hour": instance.spot_usd_per_hour,
            "region": instance.region,
            "as_of": instance.as_of,
            "price_mark": instance.price_mark,
            "source": instance.source,
        }
        for instance in market.instances
    ]


def _networks() -> list[dict[str, Any]]:
    from planner.commands.hardware.show_network import network_rows

    return network_rows()


def _links() -> list[dict[str, Any]]:
    from planner.commands.hardware.show_network import link_rows

    return link_rows()


_SCHEDULES = {
    "gpipe": "all forwards, then all backwards; keeps every micro-batch's activations",
    "1f1b": "one forward, one backward in turn; stage i of p keeps p - i micro-batches",
    "interleaved": "1f1b with several chunks of layers a rank; a smaller bubble for more messages",
    "zb-h1": "1f1b with weight gradients later, in the bubble; every rank keeps p micro-batches",
    "zbv": "zero bubble over two stages a rank, down and up a V; no bubble where F, I and W take as long",
    "dualpipev": "DualPipe as a V: a forward and a backward of a rank's two stages in one slot",
}


def _schedules() -> list[dict[str, Any]]:
    from planner.strategy.strategy import Schedule

    return [{"name": str(schedule), "meaning": _SCHEDULES[str(schedule)]} for schedule in Schedule]


def _profiles() -> list[dict[str, Any]]:
    from planner.commands.hardware.list_profiles import profile_rows

    return profile_rows(today())


_LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "models": _models,
    "devices": _devices,
    "instances": _instances,
    "networks": _networks,
    "links": _links,
    "schedules": _schedules,
    "profiles": _profiles,
}


@click.command("list")
@click.argument("what", type=click.Choice(list(_LISTS)))
@prices_option
@json_option
def list_command(what: str, prices: Path | None, as_json: bool) -> None:
    """List the catalog: models, devices, instances, networks, links, schedules or profiles."""
    if prices is not None and what != "instances":
        raise click.UsageError(f"--prices belongs to `list instances`, not to `list {what}`.")
    rows = (_LISTS | {"instances": partial(_instances, prices)})[what]()
    if as_json:
        print_json({what: rows})
    elif rows:
        click.echo(_list_text(what, rows))
    else:
        click.echo(f"no {what} are shipped with this version")


def _list_text(what: str, rows: list[dict[str, Any]]) -> str:
    """The table that people read: of devices, instances, networks and links one of their own."""
    from planner.commands.hardware.list_profiles import profile_list
    from planner.commands.hardware.show_device import device_list
    from planner.commands.hardware.show_instance_list import instance_list
    from planner.commands.hardware.show_network import link_list, network_list

    own = {
        "devices": device_list,
        "instances": instance_list,
        "networks": network_list,
        "links": link_list,
        "profiles": profile_list,
    }
    if what in own:
        return own[what](rows)
    columns = [key for key in rows[0] if key not in ("aliases", "source")]
    return table(columns, [[_shown(key, row[key]) for key in columns] for row in rows])


def _shown(key: str, value: Any) -> Any:
    from planner.foundation.units import format_count

    return format_count(value) if key in ("params_total", "params_active") else value


def _show_model(name: str, seq: int | None, arch: str | None) -> tuple[dict[str, Any], str]:
    from planner.commands.hardware.show_model import show_model
    from planner.hardware.catalog import load_model

    return show_model(load_model(name, "NAME", arch), seq)


def _show_device(name: str) -> tuple[dict[str, Any], str]:
    from planner.commands.hardware.show_device import show_device
    from planner.foundation.decode import encode
    from planner.hardware.catalog import load_device
    from planner.hardware.on_premises import cost_per_device_hour, on_premises_rows
    from planner.hardware.prices import on_premises_inputs

    document, text = show_device(name)
    facts, inputs = load_device(str(document["name"])), on_premises_inputs()
    cost = cost_per_device_hour(facts, inputs)
    document["on_premises"] = None if cost is None else {**encode(cost), "total_usd": cost.total_usd}
    return document, f"{text}\n\n{pairs(on_premises_rows(facts, inputs), WIDTH)}".rstrip()


def _show_profile(
    name: str, models: tuple[str, ...], html: Path | None, arch: str | None
) -> tuple[dict[str, Any], str]:
    from planner.commands.hardware.show_profile import show_profile
    from planner.hardware.catalog import load_model

    own = [load_model(model, "--model", arch) for model in models]
    document, text = show_profile(name, own, html, today())
    if html is not None:
        click.echo(f"wrote {html}", err=True)
    return document, text


def today() -> datetime.date:
    """The date, in UTC: ages are told by it."""
    return datetime.datetime.now(datetime.UTC).date()


def _show_network(name: str) -> tuple[dict[str, Any], str]:
    from planner.commands.hardware.show_network import show_network

    return show_network(name)


def _show_instance(name: str, market: Market) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    from planner.foundation.decode import encode
    from planner.hardware.prices import price_terms

    instance = market.instance(name, "NAME")
    document = encode(instance)
    unit = instance.usd_per_device_hour
    terms = [term.text() for term in price_terms(instance.provider)]
    document |= {"usd_per_device_hour": None if unit is None else round(unit, 6), "commitments": terms}
    return document, list(document.items())


def _link_text(link: Link) -> str:
    rate = "takes no time" if link.bytes_per_s is None else f"{link.bytes_per_s / 1e9:g} GB/s a device"
    reached = "" if link.share is None else f", large collectives reach {link.share:.0%}"
    return f"{link.name}, {rate}{reached}, {link.latency_s * 1e6:g} us"


def _show_cluster(name: str, market: Market) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    from planner.foundation.decode import digest, encode
    from planner.foundation.units import format_bytes
    from planner.hardware.cluster_text import parse_cluster
    from planner.hardware.measured_tables import table_of

    cluster = parse_cluster(name, "NAME", market)
    document = {**encode(cluster), "devices": cluster.devices, "digest": digest(cluster)}
    shown: list[tuple[str, Any]] = [("name", cluster.name), ("devices", cluster.devices)]
    for group in cluster.groups:
        shown.append(("group", f"{group.nodes} x {group.devices_per_node} {group.device.title}"))
        shown.append(("memory a device", format_bytes(group.device.usable_memory_bytes) + " usable"))
        for key, own in (("inside its nodes", group.intra), ("between its nodes", group.inter)):
            shown += [(key, _link_text(own))] if own is not None else []
    for key, link in (("inside a node", cluster.intra), ("between nodes", cluster.inter)):
        shown.append((key, _link_text(link)))
    curves = [table_of(group.device.name, "collectives") for group in cluster.groups]
    if cluster.devices_per_node > 1 and all(curves):
        shown.append(
            ("", f"collectives inside a node follow measured curves (AIC, {', '.join(map(str, curves))})")
        )
    price = cluster.price_usd_per_hour
    shown.append(("dollars an hour", "unknown" if price is None else f"{price:.2f}"))
    shown += [("price", text) for text in cluster.price_sources]
    shown.append(("sources", list(dict.fromkeys((*cluster.intra.sources, *cluster.inter.sources)))))
    return document, shown


Shown = tuple[dict[str, Any], str | list[tuple[str, Any]]]
"""What `show` prints: the document for programs, and for people a text or its pairs."""

_SHOWS: dict[str, Callable[[str], Shown]] = {
    "device": _show_device,
    "network": _show_network,
}

_PRICED_SHOWS: dict[str, Callable[[str, Market], Shown]] = {
    "instance": _show_instance,
    "cluster": _show_cluster,
}


@click.command("show")
@click.argument("kind", type=click.Choice(["model", "profile", *_SHOWS, *_PRICED_SHOWS]))
@click.argument("name")
@click.option("--seq", type=click.IntRange(min=1), help="Sequence length of a model's FLOPs a token.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="A model outside the catalog whose layers a profile has; repeat for several.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a profile's page: curves, spread, predicted against measured. It needs no network.",
)
@arch_option
@prices_option
@on_premises_option
@json_option
def show_command(
    kind: str,
    name: str,
    seq: int | None,
    models: tuple[str, ...],
    html: Path | None,
    arch: str | None,
    prices: Path | None,
    on_premises: bool,
    as_json: bool,
) -> None:
    """Show one entry of the catalog with its sources.

    NAME of a profile may be a file that `plan profile` or `plan calibrate` wrote.
    """
    if seq is not None and kind != "model":
        raise click.UsageError(f"--seq belongs to `show model`, not to `show {kind}`.")
    if arch is not None and kind != "model" and not models:
        raise click.UsageError("--arch belongs to `show model`, and to --model of `show profile`.")
    if (models or html) and kind != "profile":
        raise click.UsageError(f"--model and --html belong to `show profile`, not to `show {kind}`.")
    if (prices or on_premises) and kind not in _PRICED_SHOWS:
        raise click.UsageError(f"--prices and --on-premises belong to {' and '.join(_PRICED_SHOWS)}.")
    document: dict[str, Any]
    shown: str | list[tuple[str, Any]]
    if kind in _PRICED_SHOWS:
        market = open_market(prices, on_premises, name if kind == "cluster" else None)
        document, shown = _PRICED_SHOWS[kind](name, market)
        warn_of(market, str(document.get("provider", document["name"])) + "/")
    elif kind == "model":
        document, shown = _show_model(name, seq, arch)
    elif kind == "profile":
        document, shown = _show_profile(name, models, html, arch)
    else:
        document, shown = _SHOWS[kind](name)
    if as_json:
        print_json(document)
    elif isinstance(shown, str):
        click.echo(shown)
    else:
        click.echo(pairs(((key, _joined(value)) for key, value in shown), WIDTH))


def _joined(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return "; ".join(str(item) for item in value) or None
    return value
