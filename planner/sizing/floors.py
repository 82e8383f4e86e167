"""Floors: which kinds of nodes can be neither the cheapest nor the smallest, before any is planned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from planner.sizing.kinds import Kind, Scouting
from planner.sizing.offer import Offer
from planner.sizing.problems import peak_device_s
from planner.sizing.request import SizingRequest
from planner.sizing.sized import losses_at
from planner.units import DAY_S

LIKELIEST = 4
"""Kinds of nodes that are planned first, by dollars and by devices each: what they reach rules others out."""
RULED_OUT = (
    "neither the cheapest nor the smallest, even at its devices' peak; --device or --instance shows its plan"
)


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

    def _best(self, found: Mapping[tuple[str, int, str], Scouting]) -> tuple[float, tuple[float, float]]:
        """The least dollars, and the least devices with their dollars, of what was found that keeps the
        goal."""
        usd, smallest = math.inf, (math.inf, math.inf)
        goal = self.request.goal
        for key, scouting in found.items():
            for nodes, plan in scouting.plans.items():
                for rate in (rate for offer in self.kinds[key] for rate in offer.rates):
                    figures = losses_at(plan.job, nodes, rate, self.request.upkeep)
                    cost = math.inf if figures.cost_usd is None else figures.cost_usd
                    if figures.days is not None and goal.meets(figures.days * DAY_S, cost):
                        usd, smallest = min(usd, cost), min(smallest, (plan.job.devices, cost))
        return usd, smallest
