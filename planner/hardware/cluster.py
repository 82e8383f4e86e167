"""ClusterSpec: kinds of devices, how many of them a node holds, and the links between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.foundation.frozen import frozen
from planner.model.workload import Precision


@frozen
class Device:
    """An accelerator, or a process on a CPU.

    Peaks are dense; `None` means unknown, and stays unknown. `usable_memory_bytes` is what a program
    can allocate after the driver's context. Links are per device and one direction; `host_link_bytes_per_s`
    is the nominal rate to the memory of its node.
    """

    name: str
    title: str
    vendor: str
    memory_bytes: int
    usable_memory_bytes: int
    memory_bandwidth_bytes_per_s: float | None
    peak_fp32_flops: float | None
    peak_bf16_flops: float | None
    peak_fp16_flops: float | None
    link_bytes_per_s: float | None
    link: str = ""
    sources: tuple[str, ...] = ()
    peak_fp8_flops: float | None = None
    host_link_bytes_per_s: float | None = None

    @property
    def usual_precision(self) -> Precision:
        """The narrowest format that it is made for: fp32 on a CPU, fp16 where it has that and no bf16."""
        if self.name == "cpu":
            return Precision.FP32
        lacking = self.peak_bf16_flops is None and self.peak_fp16_flops is not None
        return Precision.FP16 if lacking else Precision.BF16

    def peak_flops(self, precision: Precision) -> float | None:
        """Dense peak FLOP/s in `precision`, or None where unknown."""
        return {
            Precision.FP32: self.peak_fp32_flops,
            Precision.BF16: self.peak_bf16_flops,
            Precision.FP16: self.peak_fp16_flops,
            Precision.FP8: self.peak_fp8_flops,
        }[precision]


def unknown_device(name: str, title: str) -> Device:
    """A device of which nothing is known but its name."""
    return Device(
        name=name,
        title=title,
        vendor="",
        memory_bytes=0,
        usable_memory_bytes=0,
        memory_bandwidth_bytes_per_s=None,
        peak_fp32_flops=None,
        peak_bf16_flops=None,
        peak_fp16_flops=None,
        link_bytes_per_s=None,
    )


@frozen
class Link:
    """A level of the network. `bytes_per_s` is nominal, per device, one direction; both None and 0 s: free.

    `share` is the part of it that collectives of large messages reach; None: unknown, and the nominal rate
    is taken. `share_origin` is "fitted" where the share was measured on some host, else "datasheet".
    """

    name: str
    latency_s: float
    bytes_per_s: float | None
    sources: tuple[str, ...] = ()
    share: float | None = None
    share_origin: str = "datasheet"


def slowest_link(links: Sequence[Link]) -> Link:
    """The link that a message over all of them waits for: the least rate, the most latency."""
    slowest = min(links, key=lambda link: float("inf") if link.bytes_per_s is None else link.bytes_per_s)
    return dataclasses.replace(slowest, latency_s=max(link.latency_s for link in links))


@frozen
class DeviceGroup:
    """Equal nodes of equal devices.

    `intra` and `inter` are the group's own links, inside its nodes and between them; None: the cluster's.

    `slots_per_node` is the number of devices of a node that can compute at once at full speed: processes
    on a CPU share its cores. None means that every device has its own. `host_memory_bytes` is the memory of
    a node besides its devices'; None: unknown.
    """

    device: Device
    nodes: int
    devices_per_node: int
    slots_per_node: int | None = None
    host_memory_bytes: int | None = None
    intra: Link | None = None
    inter: Link | None = None

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


ONE_NODE = "one node"


@frozen
class ClusterSpec:
    """Device groups, the link inside a node and the link between nodes: of groups that differ, the slowest.

    `price_usd_per_hour` is for the whole cluster; None means unknown. `price_sources` say for each of its
    parts with a price which one it is, as of when and from where.
    """

    name: str
    groups: tuple[DeviceGroup, ...]
    intra: Link
    inter: Link
    price_usd_per_hour: float | None = None
    price_sources: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        return sum(group.devices for group in self.groups)

    @property
    def network(self) -> str:
        """The network between nodes, or ONE_NODE: what tells clusters of one device apart."""
        several = sum(group.nodes for group in self.groups) > 1
        return self.inter.name if several else ONE_NODE

    @property
    def devices_per_node(self) -> int:
        """Devices that share the fast link: the smallest node of the cluster."""
        return min(group.devices_per_node for group in self.groups)

    @property
    def host_memory_bytes_per_device(self) -> float | None:
        """A device's share of the memory of its node, where it has least; None where a node's is unknown."""
        shares = [
            None if group.host_memory_bytes is None else group.host_memory_bytes / group.devices_per_node
            for group in self.groups
        ]
        known = [share for share in shares if share is not None]
        return min(known) if len(known) == len(shares) else None

    @property
    def local(self) -> bool:
        """Whether this is the machine that the program runs on."""
        return self.name.startswith("local")
