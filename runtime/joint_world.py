"""A profile by several processes that a launcher started, one for each rank, over one or several nodes.

The first rank measures what one device can measure, and says what all are to measure together; the others
wait for it. They meet in the launcher's store:

    round/1, round/2, ...     the cases of a round, as JSON; END after the last
    profile/1, ...            the process group of a round

Each round runs in a child of every rank, so that one that fails costs a case, as it does on one machine.
"""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public

from planner.errors import InputError, Problem
from runtime.layouts import World

PATIENCE = timedelta(hours=4)
"""How long a rank waits for the next round: the launcher ends it sooner when the first rank dies."""

MEETING = timedelta(seconds=120)
END = "end"


@dataclasses.dataclass(frozen=True)
class JointWorld:
    """This process as one rank of several."""

    rank: int
    local_rank: int
    world: World
    host: str
    port: int
    store: TCPStore

    def begin_round(self, number: int, cases: str) -> None:
        """The first rank says what is measured next."""
        self.store.set(_round_key(number), cases)

    def await_round(self, number: int) -> str:
        """Another rank waits for that."""
        self.store.wait([_round_key(number)], PATIENCE)
        return self.store.get(_round_key(number)).decode()

    def group_store(self, number: int) -> Store:
        """In a child: where the process group of a round is made."""
        client = TCPStore(self.host, self.port, is_master=False, timeout=MEETING)
        return PrefixStore(f"shardwise/profile/{number}", client)


def joined_world() -> JointWorld | None:
    """The ranks among which this one was started; None where it is alone.

    Raises InputError where nodes have different numbers of ranks, or the store is not there.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        return None
    rank, ranks, local_rank = (int(os.environ[name]) for name in names[:3])
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
    return JointWorld(rank=rank, local_rank=local_rank, world=world, host=host, port=port, store=store)


def _round_key(number: int) -> str:
    return f"shardwise/round/{number}"
