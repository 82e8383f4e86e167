"""A rank's place: its device, and the group that torchrun or our own launcher tells it of."""

from __future__ import annotations

import os

import torch

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
