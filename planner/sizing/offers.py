"""Offers: which nodes can be had for a run, from the market and from the devices of the catalog.

Every instance of the market is one, and every device of the catalog on one's own premises, in nodes of the
size that instances of it mostly have, or OWN_NODE where none brings it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeVar

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import squash, unknown
from planner.hardware.catalog import device_names, load_device
from planner.hardware.cluster import Device
from planner.hardware.cluster_grammar import parse_cluster, read_equal_nodes
from planner.hardware.instance import Instance, find_instance
from planner.hardware.prices import Market
from planner.sizing.offer import Offer, Pricing
from planner.sizing.rates import rates_of, rates_of_device

T = TypeVar("T")

ON_PREMISES = "on-premises"
"""What hardware of one's own is called where a provider is."""
OWN_NODE = 8
"""Devices of a node of one's own, where no instance tells."""
FEW = 6
"""Names that an error lists."""


@frozen
class Wanted:
    """Which offers are asked for; an empty tuple: all. Names as the user wrote them."""

    devices: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    pricings: tuple[Pricing, ...] = ()


def find_offers(market: Market, wanted: Wanted) -> tuple[Offer, ...]:
    """The offers that are asked for. Raises InputError with every fault."""
    problems: list[InputError] = []
    devices = _each(wanted.devices, lambda text: load_device(text, "--device").name, problems)
    providers = _each(wanted.providers, lambda text: _provider(text, market), problems)
    named = _each(
        wanted.instances, lambda text: find_instance(text, market.instances, "--instance"), problems
    )
    if problems:
        raise InputError(*(fault for error in problems for fault in error.problems))
    rented = [
        instance
        for instance in (named or market.instances)
        if (not devices or instance.device in devices) and (not providers or instance.provider in providers)
    ]
    offers = [_rented(instance, market) for instance in rented]
    if not named and (not providers or ON_PREMISES in providers):
        offers += [_owned(name, market) for name in devices or device_names()]
    offers = [_priced(offer, wanted.pricings) for offer in offers]
    kept = tuple(offer for offer in offers if offer.rates)
    if not kept:
        raise _none(wanted, market)
    return kept


def offers_of_clusters(
    market: Market, texts: Sequence[str], pricings: tuple[Pricing, ...] = ()
) -> tuple[Offer, ...]:
    """The offers of which clusters are made, each at the numbers of nodes that were named.

    Raises InputError with every fault.
    """
    problems: list[InputError] = []
    named: dict[Offer, list[int]] = {}
    for offer, nodes in _each(texts, lambda text: _of_cluster(text, market), problems):
        named.setdefault(offer, []).append(nodes)
    if problems:
        raise InputError(*(fault for error in problems for fault in error.problems))
    offers = (
        _priced(dataclasses.replace(offer, counts=tuple(sorted(set(counts)))), pricings)
        for offer, counts in named.items()
    )
    kept = tuple(offer for offer in offers if offer.rates)
    if not kept:
        fault = f"none of {', '.join(texts)} is sold {' or '.join(pricings)}."
        raise InputError(Problem(where="--pricing", fault=fault, fix="leave it out"))
    return kept


def _of_cluster(text: str, market: Market) -> tuple[Offer, int]:
    parsed = parse_cluster(text, market=market)  # every fault of the text is told by its own reader
    nodes = read_equal_nodes(text)
    if nodes is None:
        fault = f"'{text[:80]}' is not of one kind of node, and options are compared by their number."
        fix = "`plan size --cluster` or `plan solve` plan any cluster"
        legal = "NODESxGPUS:DEVICE[@NETWORK], COUNT*INSTANCE[@NETWORK]"
        raise InputError(Problem(where="--cluster", fault=fault, legal=legal, fix=fix))
    if nodes.instance:
        offer = _rented(market.instance(nodes.instance), market)
        if nodes.network:
            offer = dataclasses.replace(offer, network=nodes.network, named_network=True)
        return offer, nodes.nodes
    facts, per_node = load_device(parsed.groups[0].device.name), nodes.devices_per_node
    offer = Offer(
        provider=ON_PREMISES,
        instance="",
        device=facts.device(),
        devices_per_node=per_node,
        network=nodes.network or facts.network,
        rates=rates_of_device(facts, market, per_node),
    )
    return offer, nodes.nodes


def _each(texts: Sequence[str], read: Callable[[str], T], problems: list[InputError]) -> list[T]:
    found = []
    for text in texts:
        try:
            found.append(read(text))
        except InputError as error:
            problems.append(error)
    return found


def _provider(text: str, market: Market) -> str:
    names = sorted({instance.provider for instance in market.instances} | {ON_PREMISES})
    for name in names:
        if squash(name) == squash(text):
            return name
    raise unknown("--provider", "provider", text, names, fix=f"one of {', '.join(names)}")


def _none(wanted: Wanted, market: Market) -> InputError:
    """The error where names that are known alone have no offer together: which flag to leave out."""
    given = {
        "devices": "--device",
        "providers": "--provider",
        "instances": "--instance",
        "pricings": "--pricing",
    }
    given = {name: flag for name, flag in given.items() if getattr(wanted, name)}
    fixes = []
    for name, flag in given.items():
        try:
            offers = find_offers(market, dataclasses.replace(wanted, **{name: ()}))
        except InputError:
            continue
        values = ", ".join(_values(offers, name))
        fixes.append(f"{flag} ({values})" if values else flag)
    asked = " with ".join("/".join(getattr(wanted, name)) for name in given)
    return InputError(
        Problem(
            where=", ".join(given.values()),
            fault=f"there is no offer of {asked}.",
            fix=f"leave out or change {' or '.join(fixes)}" if fixes else "name fewer of them",
        )
    )


def _values(offers: Iterable[Offer], name: str) -> list[str]:
    """What offers have of what was asked for, the first few."""
    by_name: dict[str, Callable[[Offer], list[str]]] = {
        "devices": lambda offer: [offer.device.name],
        "providers": lambda offer: [offer.provider],
        "instances": lambda offer: [offer.name] if offer.instance else [],
        "pricings": lambda offer: [str(rate.pricing) for rate in offer.rates],
    }
    found = list(dict.fromkeys(value for offer in offers for value in by_name[name](offer)))
    return found[:FEW] + (["..."] if len(found) > FEW else [])


@cache
def _device(name: str) -> Device:
    return load_device(name).device()


def _rented(instance: Instance, market: Market) -> Offer:
    return Offer(
        provider=instance.provider,
        instance=instance.name,
        device=_device(instance.device),
        devices_per_node=instance.devices,
        network=instance.network,
        rates=rates_of(instance, market),
        region=instance.region,
    )


def _owned(name: str, market: Market) -> Offer:
    facts, per_node = load_device(name), usual_node(name, market.instances)
    return Offer(
        provider=ON_PREMISES,
        instance="",
        device=facts.device(),
        devices_per_node=per_node,
        network=facts.network,
        rates=rates_of_device(facts, market, per_node),
    )


def usual_node(device: str, instances: Iterable[Instance]) -> int:
    """Devices of a node: what most instances with several of the device have; of equally many, the larger."""
    sizes = Counter(i.devices for i in instances if i.device == device and i.devices > 1)
    return max(sizes, key=lambda size: (sizes[size], size), default=OWN_NODE)


def _priced(offer: Offer, pricings: tuple[Pricing, ...]) -> Offer:
    """The offer with the rates that are asked for."""
    if not pricings:
        return offer
    return dataclasses.replace(offer, rates=tuple(rate for rate in offer.rates if rate.pricing in pricings))
