"""Groups of ranks of a world: who is in them, and how many share a node."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("torch")

from planner.profile.profile import Op
from runtime.profiler.collectives import comm_cases
from runtime.profiler.joint_world import Layout, World, layouts, ops, sizes_of

WORLDS = [World(ranks=nodes * size, per_node=size) for nodes in (1, 2, 3, 4) for size in (1, 2, 4, 6, 8)]


def test_layouts_on_one_node() -> None:
    def plain(ranks: int) -> list[tuple[int, int]]:
        found = layouts(World(ranks=ranks, per_node=ranks), strided=False)
        assert all(layout.stride == layout.nodes == 1 for layout in found)
        return [(layout.ranks, layout.groups) for layout in found]

    assert plain(1) == []
    assert plain(2) == [(2, 1)]
    assert plain(4) == [(2, 1), (2, 2), (4, 1)]
    assert plain(6) == [(2, 1), (2, 3)]


def test_layouts_over_nodes() -> None:
    """On two nodes of two: neighbours share a node, ranks two apart do not, and four span both."""
    found = layouts(World(ranks=4, per_node=2), strided=True)
    assert found == [
        Layout(ranks=2, groups=1),
        Layout(ranks=2, groups=2, stride=2, nodes=2),
        Layout(ranks=4, groups=1, nodes=2),
    ]


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world.ranks}-{world.per_node}")
def test_members(world: World) -> None:
    for layout in layouts(world, strided=True):
        groups = layout.members(world)
        everyone = list(itertools.chain(*groups))
        assert len(set(everyone)) == len(everyone)
        assert not layout.whole or sorted(everyone) == list(range(world.ranks))
        for group in groups:
            assert len(group) == layout.ranks
            assert {b - a for a, b in itertools.pairwise(group)} == {layout.stride}
        if world.per_node & (world.per_node - 1) == 0:  # else groups lie unevenly on the nodes
            touched = [{rank // world.per_node for rank in group} for group in groups]
            assert {len(nodes) for nodes in touched} == {layout.nodes}
            sharing = [group for group in touched if group & touched[0]]
            assert not layout.whole or len(sharing) == layout.groups


def test_cases_are_unique_and_smaller_where_plans_use_them_less() -> None:
    sizes = (1, 2, 3, 4, 5)
    cases = comm_cases(World(ranks=8, per_node=4), sizes, strided=True)
    assert len({case.label() for case in cases}) == len(cases)
    assert all(case.layout.ranks == 2 for case in cases if case.op is Op.P2P)
    whole, alone = Layout(ranks=2, groups=2), Layout(ranks=2, groups=1, whole=False)
    assert sizes_of(Op.ALL_REDUCE, whole, sizes) == sizes
    assert sizes_of(Op.ALL_TO_ALL, whole, sizes) == sizes_of(Op.ALL_REDUCE, alone, sizes) == (1, 3, 5)
    assert Op.P2P in ops(whole) and Op.P2P not in ops(Layout(ranks=4, groups=1))
