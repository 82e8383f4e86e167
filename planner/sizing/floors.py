"""Floors: which kinds of nodes can be neither the cheapest nor the smallest, before any is planned, and which
may be the cheapest at numbers of nodes that were not tried.

Kinds of nodes: what tells offers apart but their price, and what was found on each.

Which numbers of nodes are tried: a ladder of doublings, then what lies between two of its rungs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from planner.foundation.units import DAY_S
from planner.sizing.comparison import Offer, Rate, SizingRequest
from planner.sizing.sized import Sized, losses_at, peak_device_s

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


ODD = 8
"""Of a number of devices, the most that may not divide the batch: the pipeline must take it up."""


def ladder(most: int) -> tuple[int, ...]:
    """Numbers of nodes: 1, 2, 4 and so on, up to `most`."""
    return tuple(2**power for power in range(most.bit_length()))


def between(few: int, many: int, batch: int, devices_per_node: int) -> list[int]:
    """Numbers of nodes strictly between two, ascending: those whose devices share out a batch well.

    Of the devices at most ODD may be left to the pipeline: what does not divide the batch cannot be data
    ranks.
    """
    return [
        nodes
        for nodes in range(few + 1, many)
        if nodes * devices_per_node // math.gcd(nodes * devices_per_node, batch) <= ODD
    ]


LIKELIEST = 4
"""Kinds of nodes that are planned first, by dollars and by devices each: what they reach rules others out."""
CLOSE = 1.05
"""Kinds of nodes whose cheapest plan takes at most so much of the least dollars may be the cheapest at a
number of nodes that was not tried."""
RULED_OUT = (
    "neither the cheapest nor the smallest, even at its devices' peak; --device or --instance shows its plan"
)


class _Kept(NamedTuple):
    """A plan that keeps the goal."""

    usd: float
    devices: int
    nodes: int


class Floors:
    """What each kind of node costs, and how many devices it takes, at the very least: at its devices' peak,
    with nothing but weights, gradients and optimizer state in memory."""

    def __init__(self, request: SizingRequest, kinds: Mapping[tuple[str, int, str], Sequence[Offer]]) -> None:
        self.request, self.kinds = request, kinds

    def usd(self, kind: Kind) -> float:
        """Dollars at the cheapest rate; infinite where no price is known."""
        prices = [price for offer in self.kinds[kind[:3]] for rate in offer.rates
                  if (price := rate.usd_per_node_hour) is not None]  # fmt: skip
        device_hours = peak_device_s(self.request, kind.offer.device) / 3600
        return min(prices, default=math.inf) / kind.devices_per_node * device_hours

    def devices(self, kind: Kind) -> float:
        """Devices that keep the deadline and hold the model."""
        goal, device, workload = self.request.goal, kind.offer.device, self.request.workload
        busy = peak_device_s(self.request, device) / goal.deadline_s if goal.deadline_s else 0.0
        kept = 2.0 if workload.adapters is not None else 8.0 + workload.optimizer.state_bytes
        limit = min(device.usable_memory_bytes, self.request.memory_limit_bytes or math.inf)
        return max(busy, self.request.model.params_total * kept / limit, kind.devices_per_node)

    def likeliest(self, kinds: Sequence[Kind]) -> list[list[Kind]]:
        """The kinds that promise most, and the others."""
        first = sorted(kinds, key=self.usd)[:LIKELIEST] + sorted(kinds, key=self.devices)[:LIKELIEST]
        return [[kind for kind in kinds if kind in first], [kind for kind in kinds if kind not in first]]

    def open(
        self, kinds: Sequence[Kind], found: Mapping[tuple[str, int, str], Scouting]
    ) -> tuple[list[Kind], dict[tuple[str, int, str], Scouting]]:
        """The kinds that may still be the cheapest or the smallest, and why the others are not."""
        usd, smallest = self._best(found)
        left = [k for k in kinds if self.usd(k) < usd or (self.devices(k), self.usd(k)) < smallest]
        ruled_out = {kind[:3]: Scouting({}, {1: RULED_OUT}) for kind in kinds if kind not in left}
        return left, ruled_out

    def beside(
        self, kinds: Sequence[Kind], found: Mapping[tuple[str, int, str], Scouting]
    ) -> list[tuple[Kind, tuple[int, ...]]]:
        """The kinds whose cheapest plan is within CLOSE of the least dollars, each with the numbers of nodes
        that were not tried between that plan's and those tried next to it."""
        each = [(min(self._kept(kind[:3], found[kind[:3]]), default=None), kind) for kind in kinds]
        least = min((best.usd for best, _ in each if best), default=math.inf)
        near = []
        for best, kind in each:
            if best is None or not best.usd <= CLOSE * least < math.inf:
                continue
            scouting, batch = found[kind[:3]], self.request.workload.batch
            tried = sorted({*scouting.plans, *scouting.why_not})
            place = tried.index(best.nodes)
            around = pairwise(tried[max(0, place - 1) : place + 2])
            nodes = [n for few, many in around for n in between(few, many, batch, kind.devices_per_node)]
            if nodes:
                near.append((kind, tuple(nodes)))
        return near

    def _best(self, found: Mapping[tuple[str, int, str], Scouting]) -> tuple[float, tuple[float, float]]:
        """The least dollars, and the least devices with their dollars, of what was found that keeps the
        goal."""
        kept = [each for key, scouting in found.items() for each in self._kept(key, scouting)]
        usd = min((each.usd for each in kept), default=math.inf)
        return usd, min(((each.devices, each.usd) for each in kept), default=(math.inf, math.inf))

    def _kept(self, key: tuple[str, int, str], scouting: Scouting) -> Iterator[_Kept]:
        """What keeps the goal of a kind, at each of its rates; dollars are infinite without a price."""
        for nodes, plan in scouting.plans.items():
            for rate in (rate for offer in self.kinds[key] for rate in offer.rates):
                figures = losses_at(plan.job, nodes, rate, self.request.overheads)
                usd = math.inf if figures.cost_usd is None else figures.cost_usd
                if figures.days is not None and self.request.goal.meets(figures.days * DAY_S, usd):
                    yield _Kept(usd, plan.job.devices, nodes)
