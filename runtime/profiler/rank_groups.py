"""Groups of ranks as the mesh of a plan makes them: neighbours, ranks some stride apart, over nodes.

Ranks are numbered node by node. Tensor parallelism takes neighbours; what lies outside it on the mesh takes
ranks `stride` apart; stages that follow one another are pairs a stride apart.
"""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.profile.profile import Op


@frozen
class World:
    """All ranks, `per_node` on each node."""

    ranks: int
    per_node: int


@frozen
class Layout:
    """Groups of `ranks` ranks `stride` apart, each on `nodes` nodes, `groups` of them active there at once.

    `whole` is whether all ranks of the world are active, else one group alone.
    """

    ranks: int
    groups: int
    stride: int = 1
    nodes: int = 1
    whole: bool = True

    def members(self, world: World) -> list[list[int]]:
        """The ranks of each active group."""
        block = self.ranks * self.stride
        groups = [
            list(range(first + offset, first + block, self.stride))
            for first in range(0, world.ranks, block)
            for offset in range(self.stride)
        ]
        return groups if self.whole else groups[:1]

    def label(self) -> str:
        """A short name for progress and messages."""
        apart = f" {self.stride} apart" if self.stride > 1 else ""
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.ranks} ranks{apart}{nodes}, {self.groups} at once"


def layouts(world: World, *, strided: bool) -> list[Layout]:
    """For every power of two of ranks that divides the world: one group of neighbours alone, and all of them.

    Groups over nodes are measured all at once only, since they share the nodes' ports in every plan that has
    them. `strided` adds groups whose ranks are a power of two apart.
    """
    found = []
    powers = [1 << step for step in range(1, world.ranks.bit_length()) if world.ranks % (1 << step) == 0]
    for ranks in powers:
        for stride in (1, *(power for power in powers if strided and ranks * power <= world.ranks)):
            if world.ranks % (ranks * stride):
                continue
            whole = _layout(world, ranks, stride)
            if whole.nodes == 1 and stride == 1 and whole.groups > 1:
                found.append(Layout(ranks=ranks, groups=1, whole=False))
            found.append(whole)
    return found


def _layout(world: World, ranks: int, stride: int) -> Layout:
    """All groups of a shape. `groups` are those on the nodes that one of them touches."""
    block = ranks * stride
    inside = block <= world.per_node
    nodes = 1 if inside else min(ranks, -(-block // world.per_node))
    touched = min(world.ranks, nodes * world.per_node)
    return Layout(ranks=ranks, groups=max(1, touched // ranks), stride=stride, nodes=nodes)


def ops(layout: Layout) -> list[Op]:
    """What is measured over a layout; a message between two ranks needs groups of two."""
    return [op for op in Op if op is not Op.P2P or layout.ranks == 2]


def sizes_of(op: Op, layout: Layout, sizes_bytes: tuple[int, ...]) -> tuple[int, ...]:
    """All sizes where every rank is at work, as in a step; every other size for what plans use less."""
    return sizes_bytes if layout.whole and op is not Op.ALL_TO_ALL else sizes_bytes[::2]
