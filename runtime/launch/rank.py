"""A rank's place: its device, and the group that torchrun or our own launcher tells it of.

Small facts between ranks, as JSON over a tensor collective: nothing is pickled, not even in memory.

What a rank takes for received where nobody else is there: on torch's fake backend it runs alone.

Sizes that other ranks would say are those of balanced experts, and values are this rank's own: finite, of
the right shape, and worth nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.torch_version import TorchVersion

from planner.foundation.decode import encode
from planner.foundation.errors import InputError, Problem
from runtime.launch.local_ranks import join_group

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each rank."""


def started_as_rank() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def enter_group(device: str, timeout_s: float) -> torch.device:
    """Joins the group on this rank's own device: over NCCL on an accelerator, over gloo on the CPU.

    A collective that takes `timeout_s` fails. Raises InputError where the environment describes no group,
    this machine has no device for the rank, or no group can be formed (port taken, a host that is not there).
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        fault = f"{', '.join(missing)} not set: a rank cannot find its place or the others."
        fix = "start it by torchrun --nproc-per-node N, or by plan alone with RANK and WORLD_SIZE unset"
        raise InputError(Problem(where="environment", fault=fault, fix=fix))
    if device == "cuda":
        local = _own_accelerator(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        join_group("nccl", timeout_s)
        return local
    # One thread a rank, as `plan profile` measured.
    torch.set_num_threads(1)
    join_group("gloo", timeout_s)
    return torch.device("cpu")


def _own_accelerator(local_rank: str) -> torch.device:
    count = torch.cuda.device_count()
    if not local_rank.isdecimal() or int(local_rank) >= count:
        fault = f"is {local_rank[:20]}, but this machine has {count} accelerators."
        fix = f"start at most {count} ranks a node: torchrun --nproc-per-node {count}"
        raise InputError(Problem(where="LOCAL_RANK", fault=fault, legal=f"0 to {count - 1}", fix=fix))
    return torch.device("cuda", int(local_rank))


def gather_json(value: Any) -> list[Any]:
    """The value of every rank, in rank order, on every rank. Without a process group: that of this one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [json.loads(json.dumps(value))]
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([payload.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(other) for other in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [
        json.loads(part[: int(other)].cpu().numpy().tobytes())
        for part, other in zip(parts, sizes, strict=True)
    ]


def own_rank() -> int:
    """The global rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def agree(work: Callable[[], Any], *, first_only: bool = False) -> list[Any]:
    """Does `work` on every rank (or the first alone) and gives all of them every rank's result.

    Where it cannot write a file or raises InputError on one rank, all raise InputError: none is left
    waiting for one that gave up.
    """
    faults: list[Problem] = []
    result = None
    if own_rank() == 0 or not first_only:
        try:
            result = work()
        except OSError as error:
            faults = [Problem(where=str(error.filename), fault=f"cannot be written: {error.strerror}.")]
        except InputError as error:
            faults = list(error.problems)
    answers = gather_json({"faults": [encode(fault) for fault in faults], "result": result})
    told = [Problem(**fault) for answer in answers for fault in answer["faults"]]
    if told:
        raise InputError(*told)
    return [answer["result"] for answer in answers]


FILLS = TorchVersion(torch.__version__) >= "2.13"
"""Whether the fake backend itself copies what a rank sends into what it receives, of collectives; earlier
ones leave what is exchanged or reduced as it was allocated, which is filled here, but for DTensor's own. No
version does for messages of a pair."""


def alone(group: dist.ProcessGroup) -> bool:
    """Whether the other ranks of the group exist in name only."""
    return dist.get_backend(group) == "fake"


def balanced_counts(counts: Tensor) -> Tensor:
    """As many rows in all as `counts` [ranks, experts] says, as even as whole rows can be."""
    cells = counts.numel()
    begun = torch.arange(cells - 1, -1, -1, device=counts.device)
    return ((counts.sum() + begun) // cells).view_as(counts)


def row_counts(counts: Tensor, rows: int) -> list[list[int]]:
    """The numbers in `counts` [n, parts]; where tensors have shapes alone, `rows` over the parts of each."""
    if isinstance(counts, FakeTensor):
        parts = counts.shape[1]
        return [[(rows + parts - 1 - part) // parts for part in range(parts)]] * len(counts)
    found: list[list[int]] = counts.tolist()
    return found


def fill(received: Tensor, sent: Tensor) -> None:
    """Writes what was sent into what is received, row by row, again from the start where that is longer.

    Autograd and recomputation, which keep what was received, take it as part of receiving.
    """
    rows = max(len(sent), 1)
    target = received.data
    for first in range(0, len(received) if len(sent) else 0, rows):
        part = target[first : first + rows]
        part.copy_(sent.data[: len(part)])
