"""`plan list` and `plan show`: the catalog."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from planner.commands.options import json_option
from planner.commands.text import pairs, print_json, table

DEFAULT_SEQ = 4096
"""Sequence length of the FLOPs in `show model`, unless the model is shorter or --seq says otherwise."""


def _models() -> list[dict[str, Any]]:
    from planner.catalog import load_model, model_index

    rows = []
    for name, entry in model_index().items():
        model = load_model(name)
        rows.append(
            {
                "name": name,
                "title": entry.title,
                "model_type": model.model_type,
                "params_total": model.params_total,
                "layers": model.layers,
                "hidden": model.hidden,
                "vocab": model.vocab,
                "max_positions": model.max_positions,
                "aliases": list(entry.aliases),
            }
        )
    return rows


def _devices() -> list[dict[str, Any]]:
    from planner.catalog import device_names, load_device

    rows = []
    for name in device_names():
        facts = load_device(name)
        rows.append(
            {
                "name": name,
                "title": facts.title,
                "vendor": facts.vendor,
                "usable_gib": facts.memory.usable_gib,
                "bandwidth_gb_per_s": facts.memory.bandwidth_gb_per_s,
                "bf16_tflops": facts.peak_tflops.bf16,
                "fp32_tflops": facts.peak_tflops.fp32,
                "link": facts.link.name,
                "link_gb_per_s": facts.link.gb_per_s,
                "aliases": list(facts.aliases),
            }
        )
    return rows


def _instances() -> list[dict[str, Any]]:
    from planner.catalog import instances

    return [
        {
            "name": instance.full_name,
            "device": instance.device,
            "devices": instance.devices,
            "network": instance.network,
            "ondemand_usd_per_hour": instance.ondemand_usd_per_hour,
            "spot_usd_per_hour": instance.spot_usd_per_hour,
            "as_of": instance.as_of,
            "price_mark": instance.price_mark,
        }
        for instance in instances()
    ]


def _networks() -> list[dict[str, Any]]:
    from planner.catalog import networks
    from planner.network import parse_network

    file = networks()
    rows = []
    for name in file.common:
        network = parse_network(name, file, "networks.toml")
        title = network.kind.title
        if network.domain:
            title = f"{network.domain} devices joined by their own link; each device beyond: {title}"
        rows.append(
            {
                "name": name,
                "gbit_per_port": network.gbit_per_port or None,
                "ports_per_node": None if network.domain or network.kind.free else network.ports,
                "domain": network.domain,
                "latency_us": network.kind.latency_us,
                "title": title,
            }
        )
    return rows


_SCHEDULES = {
    "gpipe": "all forwards, then all backwards; keeps every micro-batch's activations",
    "1f1b": "one forward, one backward in turn; stage i of p keeps p - i micro-batches",
    "interleaved": "1f1b with several chunks of layers a rank; a smaller bubble for more messages",
}


def _schedules() -> list[dict[str, Any]]:
    from planner.strategy import Schedule

    return [{"name": str(schedule), "meaning": _SCHEDULES[str(schedule)]} for schedule in Schedule]


def _profiles() -> list[dict[str, Any]]:
    from planner.catalog import profile_files
    from planner.profile import load_profile

    rows = []
    for path in profile_files():
        profile = load_profile(path)
        rows.append(
            {
                "name": path.stem,
                "device": profile.device,
                "backend": profile.backend,
                "created": profile.created,
                "layer_samples": len(profile.layers),
                "comm_samples": len(profile.comms),
            }
        )
    return rows


_LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "models": _models,
    "devices": _devices,
    "instances": _instances,
    "networks": _networks,
    "schedules": _schedules,
    "profiles": _profiles,
}


@click.command("list")
@click.argument("what", type=click.Choice(list(_LISTS)))
@json_option
def list_command(what: str, as_json: bool) -> None:
    """List the catalog: models, devices, instances, networks, schedules or profiles."""
    rows = _LISTS[what]()
    if as_json:
        print_json({what: rows})
    elif rows:
        columns = [key for key in rows[0] if key != "aliases"]
        click.echo(table(columns, [[_shown(key, row[key]) for key in columns] for row in rows]))
    else:
        click.echo(f"no {what} are shipped with this version")


def _shown(key: str, value: Any) -> Any:
    from planner.units import format_count

    return format_count(value) if key == "params_total" else value


def _show_model(name: str, seq: int | None) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    from planner.catalog import load_model
    from planner.units import format_count

    model = load_model(name, "NAME")
    length = seq or min(DEFAULT_SEQ, model.max_positions)
    attention = model.segments[0].block.attention
    document: dict[str, Any] = {
        "name": model.name,
        "model_type": model.model_type,
        "params_total": model.params_total,
        "params_active": model.params_active,
        "params_embedding": model.params_embedding,
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "ffn": model.segments[0].block.mlp.width,
        "vocab": model.vocab,
        "max_positions": model.max_positions,
        "tied_embeddings": model.tied_embeddings,
        "flops_per_token_forward": model.flops_per_token_forward(length),
        "flops_seq": length,
        "sources": list(model.sources),
    }
    shown = {
        **document,
        "params_total": f"{format_count(model.params_total)} ({model.params_total:,})",
        "params_active": format_count(model.params_active),
        "params_embedding": format_count(model.params_embedding),
        "flops_per_token_forward": f"{document['flops_per_token_forward']:.4g} at sequence length {length}",
        "flops_seq": None,
    }
    return document, list(shown.items())


def _show_device(name: str, seq: int | None) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    from planner.catalog import load_device
    from planner.codec import encode

    facts = load_device(name, "NAME")
    document = {**encode(facts.device()), "facts": encode(facts)}
    return document, _flatten(encode(facts))


def _show_instance(name: str, seq: int | None) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    from planner.catalog import load_instance
    from planner.codec import encode

    document = encode(load_instance(name, "NAME"))
    return document, list(document.items())


def _show_cluster(name: str, seq: int | None) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    from planner.cluster_grammar import parse_cluster
    from planner.codec import digest, encode
    from planner.units import format_bytes

    cluster = parse_cluster(name, "NAME")
    document = {**encode(cluster), "devices": cluster.devices, "digest": digest(cluster)}
    shown: list[tuple[str, Any]] = [("name", cluster.name), ("devices", cluster.devices)]
    for group in cluster.groups:
        shown.append(("group", f"{group.nodes} x {group.devices_per_node} {group.device.title}"))
        shown.append(("memory a device", format_bytes(group.device.usable_memory_bytes) + " usable"))
    for key, link in (("inside a node", cluster.intra), ("between nodes", cluster.inter)):
        rate = "takes no time" if link.bytes_per_s is None else f"{link.bytes_per_s / 1e9:g} GB/s a device"
        shown.append((key, f"{link.name}, {rate}, {link.latency_s * 1e6:g} us"))
    price = cluster.price_usd_per_hour
    shown.append(("dollars an hour", "unknown" if price is None else f"{price:.2f}"))
    shown += [("price", text) for text in _price_dates(cluster.name)]
    shown.append(("sources", list(dict.fromkeys((*cluster.intra.sources, *cluster.inter.sources)))))
    return document, shown


def _price_dates(name: str) -> list[str]:
    """For each instance in a cluster's name: its price, how it was read, and when."""
    from planner.catalog import load_instance

    found = []
    for part in name.split("+"):
        if "*" in part:
            instance = load_instance(part.split("*")[1].split("@")[0])
            if instance.ondemand_usd_per_hour is not None:
                read = "read" if "READ" in instance.price_mark else "from memory"
                when = instance.as_of or "without a date"
                found.append(
                    f"{instance.full_name} {instance.ondemand_usd_per_hour:g} on demand, {read}, {when}"
                )
    return found


def _flatten(tables: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested tables as dotted names."""
    rows: list[tuple[str, Any]] = []
    for key, value in tables.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value))
    return rows


_SHOWS: dict[str, Callable[[str, int | None], tuple[dict[str, Any], list[tuple[str, Any]]]]] = {
    "model": _show_model,
    "device": _show_device,
    "instance": _show_instance,
    "cluster": _show_cluster,
}


@click.command("show")
@click.argument("kind", type=click.Choice(list(_SHOWS)))
@click.argument("name")
@click.option("--seq", type=click.IntRange(min=1), help="Sequence length of a model's FLOPs a token.")
@json_option
def show_command(kind: str, name: str, seq: int | None, as_json: bool) -> None:
    """Show one entry of the catalog with its sources."""
    if seq is not None and kind != "model":
        raise click.UsageError(f"--seq belongs to `show model`, not to `show {kind}`.")
    document, shown = _SHOWS[kind](name, seq)
    if as_json:
        print_json(document)
    else:
        click.echo(pairs((key, _joined(value)) for key, value in shown))


def _joined(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return "; ".join(str(item) for item in value) or None
    return value
