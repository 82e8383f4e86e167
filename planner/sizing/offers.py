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

from planner.catalog import device_names, load_device
from planner.cluster import Device
from planner.codec import noun
from planner.errors import InputError
from planner.instance import Instance, find_instance
from planner.market.market import Market
from planner.naming import squash, unknown
from planner.sizing.offer import Offer, Pricing
from planner.sizing.rates import rates_of, rates_of_device

T = TypeVar("T")

ON_PREMISES = "on-premises"
"""What hardware of one's own is called where a provider is."""
OWN_NODE = 8
"""Devices of a node of one's own, where no instance tells."""


@noun
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
        raise unknown("--device, --provider, --instance, --pricing", "offer", _asked(wanted), _known(market))
    return kept


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


def _asked(wanted: Wanted) -> str:
    parts = (*wanted.devices, *wanted.providers, *wanted.instances, *wanted.pricings)
    return " with ".join(parts)


def _known(market: Market) -> list[str]:
    return [instance.full_name for instance in market.instances]


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
