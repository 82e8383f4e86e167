"""A world of ranks of which only this one exists: its hooks and copies are real, its messages are not.

torch's `fake` backend answers every collective at once, with this rank's own data where it can, so what is
timed is a rank's own work: DTensor and FSDP2 at full host cost, and no communication.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from planner.strategy.strategy import Degrees
from runtime.parallel.meshes import Meshes, meshes_of


@contextmanager
def fake_world(degrees: Degrees, device_type: str, copied: Collection[int] = ()) -> Iterator[Meshes]:
    """Rank 0 of a world of these degrees, as meshes (`meshes_of`). One at a time in a process."""
    with fake_group(degrees.world):
        yield meshes_of(degrees, device_type, copied)


@contextmanager
def fake_group(world: int, rank: int = 0) -> Iterator[None]:
    """One rank of a process group of which no other exists. One at a time in a process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Where a torch version leaves received buffers as they are, their garbage may be denormal: slow.
    torch.set_flush_denormal(True)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Empties DTensor's caches: what they answer an equal mesh with holds groups that are gone."""
    from torch.distributed.tensor import debug

    clear = getattr(debug, "_clear_sharding_prop_cache", None)
    if clear is not None:
        clear()
        return
    propagate: Any = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding
    propagate.cache.cache_clear()
