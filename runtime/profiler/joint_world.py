"""A profile by several processes that a launcher started, one for each rank, over one or several nodes.

The first rank measures what one device can measure, and says what all are to measure together; the others
wait for it. They meet in the launcher's store:

    shardwise/round/1, ...      the cases of a round, as JSON; END after the last
    shardwise/profile/1, ...    the process group of a round
    shardwise/left/1, ...       a rank that needs the store no more

Each round runs in a child of every rank, so that one that fails costs a case, as it does on one machine.

Groups of ranks as the mesh of a plan makes them: neighbours, ranks some stride apart, over nodes.

Ranks are numbered node by node. Tensor parallelism takes neighbours; what lies outside it on the mesh takes
ranks `stride` apart; stages that follow one another are pairs a stride apart.
"""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.profile.profile import Op
from runtime.launch.process_group import RANK_VARIABLES


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


PATIENCE = timedelta(hours=4)
"""How long a rank waits for the next round: the launcher ends it sooner when the first rank dies."""

MEETING, FAREWELL = timedelta(seconds=120), timedelta(seconds=10)
"""How long a rank waits for the store at a round's start, and the first one for the others at the end."""

END = "end"


class JointWorld:
    """This process as one rank of several. Within `with`, the first rank's end is the others' end too."""

    def __init__(
        self,
        rank: int,
        local_rank: int,
        world: World,
        address: tuple[str, int],
        store: Store,
        *,
        hosts: bool = False,
    ) -> None:
        """`hosts`: the store lives in this process, not in a launcher."""
        self.rank, self.local_rank, self.world = rank, local_rank, world
        self._address, self._store, self._hosts = address, store, hosts
        self._rounds = 0

    def __enter__(self) -> JointWorld:
        return self

    def __exit__(self, *error: object) -> None:
        if self.rank == 0:
            self.begin_round(END)
        with contextlib.suppress(RuntimeError):  # one that is gone needs no farewell
            if self._hosts:
                self._store.wait([_left_key(rank) for rank in range(1, self.world.ranks)], FAREWELL)
            elif self.rank > 0:
                self._store.set(_left_key(self.rank), "")

    def begin_round(self, order: str) -> int:
        """The first rank says what is measured next; the number of the round."""
        self._rounds += 1
        self._store.set(_round_key(self._rounds), order)
        return self._rounds

    def await_round(self) -> tuple[int, str]:
        """Another rank waits for that: the number of the round, and what is measured."""
        self._rounds += 1
        self._store.wait([_round_key(self._rounds)], PATIENCE)
        return self._rounds, self._store.get(_round_key(self._rounds)).decode()

    def group_store(self, number: int) -> Store:
        """In a child: where the process group of a round is made."""
        client = TCPStore(*self._address, is_master=False, timeout=MEETING)
        return PrefixStore(f"shardwise/profile/{number}", client)


def joined_world() -> JointWorld | None:
    """The ranks among which this one was started; None where it is alone.

    Raises InputError where nodes have different numbers of ranks, or the store is not there.
    """
    if not all(name in os.environ for name in RANK_VARIABLES) or os.environ["WORLD_SIZE"] == "1":
        return None
    rank, ranks, local_rank = (int(os.environ[name]) for name in RANK_VARIABLES[:3])
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % per_node:
        fault = f"is {ranks}, and this node has {per_node} of them: not as many on every node."
        raise InputError(Problem(where="WORLD_SIZE", fault=fault, legal=f"a multiple of {per_node}"))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(host, port, is_master=hosts, timeout=MEETING, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        fault = f"no store at {host}:{port}: {' '.join(str(error).split())[:300]}"
        fix = "start every rank by torchrun, and check that all nodes reach that host"
        raise InputError(Problem(where="MASTER_ADDR, MASTER_PORT", fault=fault, fix=fix)) from error
    world = World(ranks=ranks, per_node=per_node)
    return JointWorld(rank, local_rank, world, (host, port), store, hosts=hosts)


def _round_key(number: int) -> str:
    return f"shardwise/round/{number}"


def _left_key(rank: int) -> str:
    return f"shardwise/left/{rank}"
