"""Collectives and point-to-point messages over the real backend, at several sizes.

All groups of one size are measured twice: one group alone (the other ranks wait, idle), and every group
of the world at once, because groups on one machine share its cores, memory and links.

Calls follow one another in bursts, and a sample is a burst's time over its calls, on the first rank: the
collectives synchronise their ranks themselves, and where ranks share cores the slow calls are as much a
part of a step as the quick ones. A message of p2p is half a round trip. Tensors are fp32.

Where ranks share cores (a CPU), each call follows a piece of compute, as it does in training, and the time
of as much compute alone is taken off: waiting for a rank that the others keep from a core is most of what
a small collective costs there. On 2 cores, an all-reduce of 4 KiB over 4 ranks took 5.6 ms on idle ranks and
8 to 10 ms between products.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from planner.codec import encode, noun
from planner.profile import CommSample, Op
from runtime.children import Emit, run_children
from runtime.timing import Effort, summarize, synchronize

SIZES_BYTES = (4096, 65536, 1 << 20, 1 << 22, 1 << 24)
"""4 KiB to 16 MiB."""
QUICK_SIZES_BYTES = (4096, 1 << 20)
_TIMEOUT = timedelta(seconds=60)
_BURST_S = 4e-3
_BURST_CALLS = 16
_WORK_PRODUCTS, _WORK_DIM = 12, 256
"""The compute before a call: about 5 ms of a core, as much as lies between the messages of a block."""


class Layout(NamedTuple):
    """`groups` groups of `ranks` consecutive ranks each, active at once."""

    ranks: int
    groups: int


def layouts(world: int) -> list[Layout]:
    """For every power of two of ranks that divides the world: one group alone, and all of them."""
    found = []
    ranks = 2
    while ranks <= world:
        if world % ranks == 0:
            found.append(Layout(ranks, 1))
            if world // ranks > 1:
                found.append(Layout(ranks, world // ranks))
        ranks *= 2
    return found


def ops(layout: Layout) -> list[Op]:
    """What is measured over a layout; a message between two ranks needs groups of two."""
    return [op for op in Op if op is not Op.P2P or layout.ranks == 2]


def sizes_of(op: Op, layout: Layout, world: int, sizes_bytes: tuple[int, ...]) -> tuple[int, ...]:
    """All sizes where every rank is at work, as in a step; every other size for what plans use less."""
    used = layout.ranks * layout.groups == world and op is not Op.ALL_TO_ALL
    return sizes_bytes if used else sizes_bytes[::2]


@noun
class CommCase:
    """One sample to take: an operation over a layout with a full message of `bytes`."""

    op: Op
    layout: Layout
    bytes: int

    def label(self) -> str:
        """A short name for progress and messages."""
        return f"{self.op} of {self.bytes} bytes over {self.layout.ranks} ranks, {self.layout.groups} at once"


def comm_cases(world: int, sizes_bytes: tuple[int, ...]) -> list[CommCase]:
    """All cases of a world, those of one layout together."""
    return [
        CommCase(op=op, layout=layout, bytes=size_bytes)
        for layout in layouts(world)
        for op in ops(layout)
        for size_bytes in sizes_of(op, layout, world, sizes_bytes)
    ]


def measure_comm(
    cases: Sequence[CommCase], world: int, device_type: str, effort: Effort
) -> Iterator[dict[str, Any]]:
    """Yields the CommSample (encoded) of each case, in a world of processes on this machine."""
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:

        def body(rank: int, emit: Emit) -> None:
            _rank(cases, rank, world, device_type, Path(folder) / "store", effort, emit)

        yield from run_children(body, world)


def _rank(
    cases: Sequence[CommCase],
    rank: int,
    world: int,
    device_type: str,
    store_path: Path,
    effort: Effort,
    emit: Emit,
) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(store_path), world)  # type: ignore[attr-defined]  # public, not in __all__
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    for layout, group in itertools.groupby(cases, key=lambda case: case.layout):
        mine = _own_group(layout, rank)
        for case in group:
            sample = _sample(case.op, layout, case.bytes, mine, control, device, effort)
            if rank == 0:
                emit(encode(sample))
    dist.barrier(control)
    dist.destroy_process_group()


def _own_group(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    """Makes the groups of a layout, as all ranks must; this rank's, None where it is in none."""
    groups = [
        dist.new_group(list(range(first, first + layout.ranks)), timeout=_TIMEOUT)
        for first in range(0, layout.ranks * layout.groups, layout.ranks)
    ]
    return groups[rank // layout.ranks] if rank < layout.ranks * layout.groups else None


def _sample(
    op: Op,
    layout: Layout,
    size_bytes: int,
    group: dist.ProcessGroup | None,
    control: dist.ProcessGroup,
    device: torch.device,
    effort: Effort,
) -> CommSample:
    """One sample; ranks outside the active groups only keep the step with the others."""
    call = None if group is None else _call(op, size_bytes, group, device)
    if device.type == "cpu" and op is not Op.P2P:
        return _sample_between_work(op, layout, size_bytes, call, control, effort)
    dist.barrier(control)
    trial = _run(call, bursts=effort.warmup + 2, calls=1, device=device)
    counts = torch.tensor(_counts(trial[-1] if trial else 0.0, effort))
    dist.broadcast(counts, src=0, group=control)  # every rank must run as often as rank 0
    bursts, calls = (int(count) for count in counts)
    seconds = _run(call, bursts, calls, device)
    dist.barrier(control)
    halves = 2 if op is Op.P2P else 1
    timing = summarize([taken / halves for taken in seconds] or [0.0])
    return CommSample(
        op=op,
        ranks=layout.ranks,
        groups=layout.groups,
        bytes=size_bytes,
        seconds=timing.median_s,
        spread=timing.spread,
        samples=timing.samples,
    )


def _sample_between_work(
    op: Op,
    layout: Layout,
    size_bytes: int,
    call: Callable[[], object] | None,
    control: dist.ProcessGroup,
    effort: Effort,
) -> CommSample:
    """What a call adds to a piece of compute that all active ranks do before it; no less than it takes alone.

    What others do on the machine may make the compute alone seem as slow as with the call.
    """
    factor = torch.randn(_WORK_DIM, _WORK_DIM)
    added: list[float] = []
    dist.barrier(control)
    if call is not None:
        call()
        least_s = min(_run(call, bursts=2, calls=1, device=torch.device("cpu")))
        # Every rank runs as often: the number must not depend on a rank's own clock.
        for _ in range(effort.least * 2):
            work_s = _paired_s(lambda: None, factor)
            added.append(max(_paired_s(call, factor) - work_s, least_s))
    dist.barrier(control)
    timing = summarize(added or [0.0])
    return CommSample(
        op=op,
        ranks=layout.ranks,
        groups=layout.groups,
        bytes=size_bytes,
        seconds=timing.median_s,
        spread=timing.spread,
        samples=timing.samples,
    )


def _paired_s(call: Callable[[], object], factor: torch.Tensor, times: int = 2) -> float:
    """Mean seconds of a piece of compute with a call after it."""
    begun = time.perf_counter()
    for _ in range(times):
        for _ in range(_WORK_PRODUCTS):
            factor @ factor
        call()
    return (time.perf_counter() - begun) / times


def _counts(one_s: float, effort: Effort) -> tuple[int, int]:
    """Bursts, and calls in each."""
    calls = max(1, min(_BURST_CALLS, int(_BURST_S / max(one_s, 1e-9))))
    bursts = int(effort.budget_s / max(one_s * calls, 1e-9))
    return max(effort.least, min(effort.most, bursts)), calls


def _run(call: Callable[[], object] | None, bursts: int, calls: int, device: torch.device) -> list[float]:
    """Seconds of one call, for each burst."""
    if call is None:
        return []
    seconds = []
    before = time.perf_counter()
    for _ in range(bursts):
        for _ in range(calls):
            call()
        synchronize(device)
        now = time.perf_counter()
        seconds.append((now - before) / calls)
        before = now
    return seconds


def _call(op: Op, size_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], object]:
    """The operation over `group` with a full message of `size_bytes`."""
    ranks = dist.get_world_size(group)
    full = torch.zeros(size_bytes // 4, device=device)
    shard = torch.zeros(size_bytes // 4 // ranks, device=device)
    # torch 2.13 renamed these and warns about the old names, which alone exist in 2.11.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    match op:
        case Op.ALL_REDUCE:
            return lambda: dist.all_reduce(full, group=group)
        case Op.ALL_GATHER:
            return lambda: gather(full, shard, group=group)
        case Op.REDUCE_SCATTER:
            return lambda: scatter(shard, full, group=group)
        case Op.ALL_TO_ALL:
            received = torch.zeros_like(full)
            return lambda: dist.all_to_all_single(received, full, group=group)
        case Op.P2P:
            return _ping_pong(full, group)


def _ping_pong(message: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    """Sends the message to the other rank of a pair and gets it back."""
    first = dist.get_rank(group) == 0
    peer = dist.get_global_rank(group, 1 if first else 0)

    def call() -> None:
        if first:
            dist.send(message, peer, group=group)
            dist.recv(message, peer, group=group)
        else:
            dist.recv(message, peer, group=group)
            dist.send(message, peer, group=group)

    return call
