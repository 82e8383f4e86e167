"""Offer: nodes that can be had, and at which rates."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.hardware.cluster import Device


class Pricing(StrEnum):
    """How nodes are paid for."""

    ON_DEMAND = "on-demand"
    SPOT = "spot"
    RESERVED_1Y = "reserved-1y"
    RESERVED_3Y = "reserved-3y"
    ON_PREMISES = "on-premises"
    YOURS = "yours"

    @property
    def interruptible(self) -> bool:
        """Whether the provider may take nodes back while they are paid for."""
        return self is Pricing.SPOT


@frozen
class Rate:
    """Dollars an hour of one node under one pricing, with the range that its source gives.

    `usd_per_node_hour` is None where no price is known: it stays unknown, it is never 0. `includes` says what
    the price covers.
    """

    pricing: Pricing
    usd_per_node_hour: float | None
    low_usd_per_node_hour: float | None = None
    high_usd_per_node_hour: float | None = None
    as_of: str = ""
    source: str = ""
    includes: str = ""
    doubtful: str = ""


@frozen
class Offer:
    """Equal nodes of one kind of device from one provider. `network` is as in `--cluster`; empty: one node
    alone, since nothing is known of what connects several.

    `instance` is empty where devices are named without one: then nodes are of `devices_per_node` and stand
    on one's own premises or have a price of the user's. `counts` are the only numbers of nodes to look at,
    where some were named; of an instance, `named_network` says that its network was named too.
    """

    provider: str
    instance: str
    device: Device
    devices_per_node: int
    network: str
    rates: tuple[Rate, ...]
    region: str = ""
    counts: tuple[int, ...] = ()
    named_network: bool = False

    @property
    def name(self) -> str:
        """The offer for people: `aws/p5.48xlarge`, or `8 x h100-sxm-80gb`."""
        if self.instance:
            return f"{self.provider}/{self.instance}"
        return f"{self.devices_per_node} x {self.device.name}"

    def cluster_text(self, nodes: int) -> str:
        """So many nodes of it as `--cluster` takes them."""
        if self.instance:
            named = f"@{self.network}" if self.named_network else ""
            return f"{nodes}*{self.provider}/{self.instance}{named}"
        network = f"@{self.network}" if self.network else ""
        return f"{nodes}x{self.devices_per_node}:{self.device.name}{network}"
