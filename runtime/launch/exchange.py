"""Small facts between ranks, as JSON over a tensor collective: nothing is pickled, not even in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from planner.foundation.decode import encode
from planner.foundation.errors import InputError, Problem


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
