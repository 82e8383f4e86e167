"""Offers: which nodes can be had for a run, from the market and from the devices of the catalog.

Every instance of the market is one, and every device of the catalog on one's own premises, in nodes of the
size that instances of it mostly have, or OWN_NODE where none brings it.

Rates: what an hour of a node costs under each pricing, from a market.

Of an instance: on demand as listed, spot where it is known, and reserved for some years where the provider
takes something off for that. No reserved price of a single instance was found in a source: with an
on-demand price p and a range of a to b off that holds for a provider in general,

    reserved = p (1 - (a + b) / 2)        low = p (1 - b)        high = p (1 - a)

A price of the user's stands in place of the listed ones, and no general range is taken off it.

Of a device on one's own premises: its cost by planner.hardware.on_premises. Each input moves to either end of
its range alone; the changes in one direction, taken as independent, add up as the root of their squares:

    low = max(0, c - sqrt(sum d_down^2))        high = c + sqrt(sum d_up^2)        dollars a device-hour
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.suggest import normalized, unknown_name
from planner.hardware.catalog import device_names, load_device
from planner.hardware.cluster import Device
from planner.hardware.cluster_text import parse_cluster, read_equal_nodes
from planner.hardware.instance import Instance, find_instance
from planner.hardware.prices import YOURS, Market
from planner.sizing.comparison import Offer, Pricing, Rate

if TYPE_CHECKING:
    from planner.hardware.device_file import DeviceFile
    from planner.hardware.instance import Instance
    from planner.hardware.on_premises import OnPremises
    from planner.hardware.prices import PriceTerm


RENTED = "the whole instance: devices, CPUs, memory and local disks as listed; not storage, egress or support"
GIVEN = "what your price covers"
OWNED = (
    "purchase written off, electricity at work, room and cooling, staff and spare nodes; "
    "not storage, support contracts, interest or taxes"
)
RESERVED = {1: Pricing.RESERVED_1Y, 3: Pricing.RESERVED_3Y}
"""Commitments by their years; a term of other years is shown beside the price, and no rate is made of it."""

_MARKS = {"READ": "", "memory": "from memory", "READ-low": "read, low confidence", "-": ""}


def rates_of(instance: Instance, market: Market) -> tuple[Rate, ...]:
    """The rates of one instance. The first is on demand, or the user's; without a price it is unknown."""
    if instance.price_mark == YOURS:
        return _own_rates(instance)
    doubts = [doubt.reason for doubt in market.doubtful if doubt.name == instance.full_name]
    listed = Rate(
        pricing=Pricing.ON_DEMAND,
        usd_per_node_hour=instance.ondemand_usd_per_hour,
        as_of=instance.as_of,
        source=_source(instance),
        includes=RENTED,
        doubtful=doubts[0] if doubts else "",
    )
    return (listed, *_spot(instance, RENTED), *_reserved(listed, instance.provider))


def _own_rates(instance: Instance) -> tuple[Rate, ...]:
    """The user's prices of an instance: the one on demand first, even where only that of spot was given."""
    own = Rate(
        pricing=Pricing.YOURS if instance.ondemand_usd_per_hour is not None else Pricing.ON_DEMAND,
        usd_per_node_hour=instance.ondemand_usd_per_hour,
        as_of=instance.as_of,
        source=f"{YOURS}: {instance.source}",
        includes=GIVEN,
    )
    return (own, *_spot(instance, GIVEN))


def _spot(instance: Instance, includes: str) -> tuple[Rate, ...]:
    price = instance.spot_usd_per_hour
    if price is None:
        return ()
    source = f"{YOURS}: {instance.source}" if instance.price_mark == YOURS else _source(instance)
    return (
        Rate(
            pricing=Pricing.SPOT,
            usd_per_node_hour=price,
            as_of=instance.as_of,
            source=source,
            includes=includes,
        ),
    )


def _source(instance: Instance) -> str:
    """Where a listed price is from, and how it was read; notes of the row (spot ranges, older prices) too."""
    mark = _MARKS.get(instance.price_mark, instance.price_mark)
    return "; ".join(dict.fromkeys(part for part in (instance.source, mark, instance.note) if part))


def _reserved(listed: Rate, provider: str) -> tuple[Rate, ...]:
    """The price on demand less what the provider takes off in general, where both are known."""
    from planner.hardware.prices import price_terms

    price = listed.usd_per_node_hour
    if price is None:
        return ()
    return tuple(_committed(listed, price, term) for term in price_terms(provider) if term.years in RESERVED)


def _committed(listed: Rate, price: float, term: PriceTerm) -> Rate:
    return Rate(
        pricing=RESERVED[term.years],
        usd_per_node_hour=price * (1 - (term.low + term.high) / 2),
        low_usd_per_node_hour=price * (1 - term.high),
        high_usd_per_node_hour=price * (1 - term.low),
        as_of=term.as_of,
        source=f"{term.text()}: of {term.provider} in general, not of this instance; the middle of the range",
        includes=f"{listed.includes}; paid for all hours of the term, in use or not",
        doubtful=listed.doubtful,
    )


def rates_of_device(facts: DeviceFile, market: Market, devices_per_node: int) -> tuple[Rate, ...]:
    """The rate of nodes of a device that no instance brings: the user's, else the cost on premises.

    Without a purchase price or a power there is none: the rate is unknown, and its source says what lacks.
    """
    from planner.hardware.on_premises import cost_per_device_hour, missing
    from planner.hardware.prices import on_premises_inputs

    own = None if market.prices is None else market.prices.device_price(facts.name)
    if own is not None:
        return (
            Rate(
                pricing=Pricing.YOURS,
                usd_per_node_hour=own.usd_per_hour * devices_per_node,
                as_of=own.as_of,
                source=f"{YOURS}: {own.source}",
                includes=GIVEN,
            ),
        )
    inputs = market.on_premises or on_premises_inputs()
    cost = cost_per_device_hour(facts, inputs)
    if cost is None:
        lacking = f"no {' and no '.join(missing(facts, inputs))} of {facts.name} is known"
        return (Rate(pricing=Pricing.ON_PREMISES, usd_per_node_hour=None, source=lacking, includes=OWNED),)
    low, high = owned_interval(facts, inputs)
    return (
        Rate(
            pricing=Pricing.ON_PREMISES,
            usd_per_node_hour=cost.total_usd * devices_per_node,
            low_usd_per_node_hour=low * devices_per_node,
            high_usd_per_node_hour=high * devices_per_node,
            as_of=cost.as_of,
            source=(
                f"bought for {cost.purchase_usd:,.0f} dollars a device ({'; '.join(cost.sources)}), "
                f"{inputs.utilisation.value:.0%} of hours in use, {inputs.years.value:g} years"
            ),
            includes=OWNED,
        ),
    )


def owned_interval(facts: DeviceFile, inputs: OnPremises) -> tuple[float, float]:
    """Dollars of a used device-hour at the low and the high end, by the rule above.

    An input without a range, such as the user's own, moves nothing. The device must have a cost.
    """
    from planner.hardware.on_premises import cost_per_device_hour

    def cost_usd(changed: OnPremises) -> float:
        cost = cost_per_device_hour(facts, changed)
        assert cost is not None, facts.name
        return cost.total_usd

    middle = cost_usd(inputs)
    changes = [[cost_usd(end) - middle for end in ends] for ends in _ends(facts, inputs)]
    down = math.hypot(*(min(0.0, *pair) for pair in changes))
    up = math.hypot(*(max(0.0, *pair) for pair in changes))
    return max(0.0, middle - down), middle + up


def _ends(facts: DeviceFile, inputs: OnPremises) -> list[list[OnPremises]]:
    """The inputs with one at either end of its range, for each that has one; the purchase price too."""
    from planner.hardware.on_premises import BOUNDS, OwnedDevice

    found = []
    for name in BOUNDS:
        entry = getattr(inputs, name)
        ends = [value for value in (entry.low, entry.high) if value is not None]
        if ends:
            found.append(
                [
                    dataclasses.replace(inputs, **{name: dataclasses.replace(entry, value=value)})
                    for value in ends
                ]
            )
    own = inputs.devices.get(facts.name, OwnedDevice())
    if own.purchase_usd is None and facts.price is not None:
        ends = [value for value in (facts.price.low_usd, facts.price.high_usd) if value is not None]
        bought = [dataclasses.replace(own, purchase_usd=value) for value in ends]
        found += [
            [dataclasses.replace(inputs, devices={**inputs.devices, facts.name: device}) for device in bought]
        ]
    return [ends for ends in found if ends]


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
        if normalized(name) == normalized(text):
            return name
    raise unknown_name("--provider", "provider", text, names, fix=f"one of {', '.join(names)}")


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
