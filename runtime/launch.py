"""Joining the process group that torchrun, or our own launcher, describes in the environment."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from planner.errors import InputError, Problem

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started_as_rank() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return all(name in os.environ for name in _NEEDED)


def init_from_env(*, timeout_s: float = 600.0) -> torch.device:
    """Joins the group and returns this rank's device: its own accelerator, else the CPU.

    NCCL on accelerators, gloo on the CPU. Raises InputError where the environment describes no group, a
    rank has no device, or the group cannot be formed (port taken, a host that is not there).
    """
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        fault = f"{', '.join(missing)} not set: this process was not started as a rank."
        raise InputError(
            Problem(where="environment", fault=fault, fix="start it by torchrun --nproc-per-node N")
        )
    device = _own_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        fault = f"no process group at {address}: {' '.join(str(error).split())[:300]}"
        fix = "choose a free --master-port, and check that all nodes reach that host"
        raise InputError(Problem(where="MASTER_ADDR, MASTER_PORT", fault=fault, fix=fix)) from error
    return device


def _own_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        fault = f"is {local_rank}, but this machine has {count} accelerators."
        raise InputError(Problem(where="LOCAL_RANK", fault=fault, legal=f"0 to {count - 1}"))
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
