"""Kinds of nodes: what tells offers apart but their price, and what was found on each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from planner.sizing.offer import Offer, Rate
from planner.sizing.sized import Sized

MOST_NODES = 2048
"""Nodes of the largest published runs, such as Llama 3's (arXiv 2407.21783): ladders end there."""
NO_DEARER = 1.02
"""Nodes whose devices cost up to this much of another's cost no more."""


class Kind(NamedTuple):
    """What tells offers apart but their price; `offer` stands for all of them, of `most` nodes at most, or of
    `counts` alone, where some were named."""

    device: str
    devices_per_node: int
    network: str
    offer: Offer
    most: int
    counts: tuple[int, ...] = ()


class Scouting(NamedTuple):
    """The plans of a kind by number of nodes, and why others have none."""

    plans: dict[int, Sized]
    why_not: dict[int, str]

    def of(self, offer: Offer, most: int) -> Scouting:
        """The part that an offer of the kind has: at the numbers of nodes that it names, or up to a most."""
        if not offer.counts:
            return self.up_to(most)
        plans = {nodes: self.plans[nodes] for nodes in offer.counts if nodes in self.plans}
        return Scouting(plans, {nodes: why for nodes, why in self.why_not.items() if nodes in offer.counts})

    def up_to(self, nodes: int) -> Scouting:
        """The part on at most so many nodes, and one reason beyond where there is no plan."""
        plans = {count: sized for count, sized in self.plans.items() if count <= nodes}
        why_not = {count: why for count, why in self.why_not.items() if count <= nodes}
        return Scouting(plans, why_not or {nodes: "more are no better than larger nodes of the provider"})

    def joined(self, more: Scouting) -> Scouting:
        """These and others of the same kind."""
        return Scouting({**self.plans, **more.plans}, {**self.why_not, **more.why_not})

    def for_tokens(self, tokens: int | None) -> Scouting:
        """The same plans for a run of so many tokens."""
        plans = {
            nodes: each._replace(job=dataclasses.replace(each.job, tokens=tokens))
            for nodes, each in self.plans.items()
        }
        return Scouting(plans, self.why_not)


def most_nodes(offers: Sequence[Offer], most_devices: int) -> dict[str, int]:
    """How many nodes of each offer are tried at most, by its name.

    Where the provider has larger nodes of the device that cost no more a device under any pricing, as many
    devices in smaller nodes are no better: only numbers below one larger node are tried.
    """
    most = {}
    for offer in offers:
        if offer.counts:
            most[offer.name] = max(offer.counts)
            continue
        larger = [
            other.devices_per_node
            for other in offers
            if (other.provider, other.device) == (offer.provider, offer.device)
            and other.devices_per_node > offer.devices_per_node
            and (other.network or not offer.network)
            and _no_dearer(other, offer)
        ]
        devices = min([most_devices, *(size - 1 for size in larger)])
        most[offer.name] = max(1, min(MOST_NODES, devices // offer.devices_per_node))
    return most


def _no_dearer(larger: Offer, smaller: Offer) -> bool:
    """Whether a device costs no more in a larger node, under each pricing of a smaller one."""
    theirs = {rate.pricing: _dollars(rate, larger.devices_per_node) for rate in larger.rates}
    return all(
        theirs.get(rate.pricing, math.inf) <= _dollars(rate, smaller.devices_per_node) * NO_DEARER
        for rate in smaller.rates
    )


def _dollars(rate: Rate, devices_per_node: int) -> float:
    """Dollars of a device-hour; unknown ones are the dearest."""
    price = rate.usd_per_node_hour
    return math.inf if price is None else price / devices_per_node
