"""A rank's place: its device, and the group that torchrun or our own launcher tells it of.

Small facts between ranks, as JSON over a tensor collective: nothing is pickled, not even in memory.

What a rank takes for received where nobody else is there: on torch's fake backend it runs alone.

Sizes that other ranks would say are those of balanced experts, and values are this rank's own: finite, of
the right shape, and worth nothing else.

How long a rank waits for another one, and which one it waited for in vain.

A rank that dies is noticed at once: its connections break. One that hangs (stopped, deadlocked, its node
frozen) is noticed when a collective's time is up. Then every rank that still can says so, and those that do
not say anything are the ones that hang.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from planner.foundation.decode import encode
from planner.foundation.errors import InputError, Problem
from planner.strategy.plan import Plan

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


def join_group(backend: str, timeout_s: float) -> None:
    """Joins the process group that the environment of `run_local` or torchrun describes.

    Raises InputError where it cannot be formed: a port that is taken, a host that is not there.
    """
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            Problem(
                where="MASTER_ADDR, MASTER_PORT",
                fault=f"no process group at {address}: {' '.join(str(error).split())[:300]}.",
                fix="choose a free port, and check that all nodes reach that host",
            )
        ) from None


T = TypeVar("T")
FLOOR_S = 120.0
"""The least patience: a first step allocates, and a busy machine pauses for long."""
COMPILE_FLOOR_S = 900.0
"""The least patience on accelerators, where ranks compile their blocks in the first step, not all at once."""
PREDICTED_STEPS = 20
"""A step that takes this many times its predicted upper end is taken for hung."""
SLOW_DISK_BYTES_PER_S = 50e6
"""Ranks wait for the one that writes its share of a checkpoint last, on a disk that may be slow."""
ANSWER_S = 3.0
"""How long ranks under torchrun wait for each other's word on who gave up."""
TIMED_OUT = ("Timed out waiting", "timed out", "Watchdog caught collective operation timeout")
LOST_PEER = ("closed by peer", "reset by peer", "Connection closed", "Broken pipe", "Connection refused")
STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or the network"}
"""States of a process, proc(5), of which people may want to know."""


def group_timeout_s(plan: Plan) -> float:
    """Seconds that a collective may take, from the plan's predictions.

    max(floor, PREDICTED_STEPS x upper end of the step time) + a rank's states / SLOW_DISK_BYTES_PER_S
    """
    on_cpu = all(group.device.name == "cpu" for group in plan.cluster.groups)
    floor_s = FLOOR_S if on_cpu else COMPILE_FLOOR_S
    step_s = max(plan.estimate.step_time_s, *plan.estimate.step_time_interval_s)
    memories = [stage.memory for stage in plan.stage_estimates]
    states = max((memory.weights_bytes + memory.optimizer_bytes for memory in memories), default=0)
    saving_s = states * plan.strategy.degrees.chunks / SLOW_DISK_BYTES_PER_S
    return max(floor_s, PREDICTED_STEPS * step_s) + saving_s


def timed_out(text: str) -> bool:
    """Whether an error says that a rank waited in vain for one that is still there."""
    return any(words in text for words in TIMED_OUT)


def lost_peer(text: str) -> bool:
    """Whether an error only says that another rank is gone."""
    return any(words in text for words in LOST_PEER)


def describe_hang(silent: dict[int, str], waited: list[int], timeout_s: float | None = None) -> str:
    """`silent` ranks, each with its state where known, kept the `waited` ones waiting."""
    who = ", ".join(f"{rank} ({state})" if state else str(rank) for rank, state in silent.items())
    them = f"{'ranks' if len(silent) > 1 else 'rank'} {who}"
    how_long = "" if timeout_s is None else f" for {timeout_s:.0f} s"
    return f"{them} did not answer{how_long}; {_ranks(waited)} gave up waiting."


def _ranks(numbers: Sequence[int]) -> str:
    return f"{'ranks' if len(numbers) > 1 else 'rank'} {', '.join(map(str, numbers))}"


def process_state(pid: int) -> str:
    """What the system says a process is doing, for people; empty where it does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        letter = text.rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return STATES.get(letter, "still running")


class RollCall:
    """The ranks of a torchrun world telling each other, through its store, that they gave up waiting."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
        )
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        self.prefix = "/".join(("gave-up", *(os.environ.get(name, "") for name in names), ""))

    def explain(self, text: str) -> str | None:
        """What a distributed error of this rank means; None where it is another kind of error."""
        if not (timed_out(text) or lost_peer(text)):
            return None
        try:
            self.store.set(f"{self.prefix}{self.rank}", "timed out" if timed_out(text) else "lost a peer")
            said = _wait_for(self._said, lambda said: len(said) == self.world, ANSWER_S)
        except (RuntimeError, OSError):
            return f"rank {self.rank} lost its connection to the others, which have ended."
        silent = [rank for rank in range(self.world) if rank not in said]
        waited = sorted(rank for rank, word in said.items() if word == "timed out")
        if not silent:
            return f"rank {self.rank} lost the others: {text.splitlines()[0][:200]}"
        if waited:
            return describe_hang(dict.fromkeys(silent, ""), waited, self.timeout_s)
        return f"{_ranks(silent)} ended, and with it the run."

    def _said(self) -> dict[int, str]:
        keys = {rank: f"{self.prefix}{rank}" for rank in range(self.world)}
        return {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}


def _wait_for(ask: Callable[[], T], enough: Callable[[T], bool], limit_s: float) -> T:
    deadline_s = time.monotonic() + limit_s
    while not enough(answer := ask()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return answer
