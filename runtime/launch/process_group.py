"""The process group of a rank: how it joins, how long collectives may take, and who is named when one hangs.

A launcher (torchrun, or `local_ranks` of this folder) describes the group in environment variables. A rank
that dies breaks its connections and is noticed at once. A rank that hangs (stopped, deadlocked, frozen node)
is noticed when a collective reaches its timeout: every rank that still runs then reports the timeout, and
the ranks that report nothing are the ones that hang.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from planner.foundation.decode import encode
from planner.foundation.errors import InputError, Problem
from planner.strategy.plan import Plan

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets for each rank."""
MIN_TIMEOUT_S = 120.0
"""Shortest collective timeout: a first step allocates memory, and a busy machine pauses for long."""
MIN_COMPILE_TIMEOUT_S = 900.0
"""Shortest timeout on accelerators, where each rank compiles its blocks in the first step at its own pace."""
TIMEOUT_STEPS = 20
"""A step that takes this many times the upper end of its predicted time counts as hung."""
SLOW_DISK_BYTES_PER_S = 50e6
"""Assumed speed of a slow disk, on which ranks wait for the last one to write its share of a checkpoint."""
REPORT_WAIT_S = 3.0
"""Time that a rank under torchrun waits for the other ranks to report that they gave up too."""
TIMEOUT_TEXTS = ("Timed out waiting", "timed out", "Watchdog caught collective operation timeout")
LOST_PEER_TEXTS = (
    "closed by peer",
    "reset by peer",
    "Connection closed",
    "Broken pipe",
    "Connection refused",
)
PROCESS_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or the network"}
"""States of a process, proc(5), that explain a hang."""


def started_as_rank() -> bool:
    """True if a launcher started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def enter_group(device: str, timeout_s: float) -> torch.device:
    """Join the process group and return this rank's device: NCCL on accelerators, gloo on CPUs.

    A collective that takes longer than `timeout_s` fails. Raises InputError if the environment describes no
    group, this machine has no device for the rank, or no group can be formed (port taken, host unreachable).
    """
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing:
        raise InputError.at(
            "environment",
            f"{', '.join(missing)} not set: the rank cannot know its number or reach the other ranks.",
            fix="start it with torchrun --nproc-per-node N, or use plan without RANK and WORLD_SIZE set",
        )
    if device == "cuda":
        own_device = _own_accelerator(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(own_device)
        join_group("nccl", timeout_s)
        return own_device
    # One thread a rank, as `plan profile` measures.
    torch.set_num_threads(1)
    join_group("gloo", timeout_s)
    return torch.device("cpu")


def _own_accelerator(local_rank: str) -> torch.device:
    count = torch.cuda.device_count()
    if not local_rank.isdecimal() or int(local_rank) >= count:
        raise InputError.at(
            "LOCAL_RANK",
            f"is {local_rank[:20]}, but this machine has {count} accelerators.",
            legal=f"0 to {count - 1}",
            fix=f"start at most {count} ranks a node: torchrun --nproc-per-node {count}",
        )
    return torch.device("cuda", int(local_rank))


def join_group(backend: str, timeout_s: float) -> None:
    """Join the process group that the environment variables of the launcher describe.

    Raises InputError if the group cannot be formed: the port is taken or the host cannot be reached.
    """
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError.at(
            "MASTER_ADDR, MASTER_PORT",
            f"no process group at {address}: {' '.join(str(error).split())[:300]}.",
            fix="choose a free port, and check that all nodes can reach that host",
        ) from None


def own_rank() -> int:
    """The global rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_json(value: Any) -> list[Any]:
    """Gather a small JSON value of every rank, in rank order, on every rank.

    The values travel as bytes in a tensor collective: nothing is pickled. Without a process group the result
    holds this process's value alone.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [json.loads(json.dumps(value))]
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([payload.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    padded = torch.zeros(max(int(other) for other in sizes), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [
        json.loads(part[: int(other)].cpu().numpy().tobytes())
        for part, other in zip(parts, sizes, strict=True)
    ]


def run_collectively(work: Callable[[], Any], *, first_only: bool = False) -> list[Any]:
    """Run `work` on every rank, or on rank 0 only, and return every rank's JSON result on all ranks.

    If `work` raises InputError or cannot write a file on one rank, all ranks raise InputError, so that no
    rank waits for one that gave up.
    """
    problems: list[Problem] = []
    result = None
    if own_rank() == 0 or not first_only:
        try:
            result = work()
        except OSError as error:
            problems = [Problem(where=str(error.filename), fault=f"cannot be written: {error.strerror}.")]
        except InputError as error:
            problems = list(error.problems)
    answers = gather_json({"problems": [encode(problem) for problem in problems], "result": result})
    all_problems = [Problem(**problem) for answer in answers for problem in answer["problems"]]
    if all_problems:
        raise InputError(*all_problems)
    return [answer["result"] for answer in answers]


def group_timeout_s(plan: Plan) -> float:
    """Timeout of a plan's collectives, in seconds.

    max(MIN_TIMEOUT_S, TIMEOUT_STEPS x upper end of the step time) + bytes of a rank's state / slow disk
    """
    on_cpu = all(group.device.name == "cpu" for group in plan.cluster.groups)
    step_s = max(plan.estimate.step_time_s, *plan.estimate.step_time_interval_s)
    memories = [stage.memory for stage in plan.stage_estimates]
    state_bytes = max((memory.weights_bytes + memory.optimizer_bytes for memory in memories), default=0)
    saving_s = state_bytes * plan.strategy.degrees.chunks / SLOW_DISK_BYTES_PER_S
    return max(MIN_TIMEOUT_S if on_cpu else MIN_COMPILE_TIMEOUT_S, TIMEOUT_STEPS * step_s) + saving_s


def is_timeout(text: str) -> bool:
    """True if an error says that a collective timed out on a rank that is still connected."""
    return any(words in text for words in TIMEOUT_TEXTS)


def is_lost_peer(text: str) -> bool:
    """True if an error only says that the connection to another rank broke."""
    return any(words in text for words in LOST_PEER_TEXTS)


def describe_hang(silent: dict[int, str], timed_out: list[int], timeout_s: float | None = None) -> str:
    """Name the `silent` ranks, each with its process state if known, and the ranks that timed out on them."""
    names = ", ".join(f"{rank} ({state})" if state else str(rank) for rank, state in silent.items())
    subject = f"{'ranks' if len(silent) > 1 else 'rank'} {names}"
    duration = "" if timeout_s is None else f" for {timeout_s:.0f} s"
    return f"{subject} did not answer{duration}; {_name_ranks(timed_out)} gave up waiting."


def _name_ranks(ranks: Sequence[int]) -> str:
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))}"


def process_state(pid: int) -> str:
    """State of a process in words, from proc(5); empty if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        letter = text.rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return PROCESS_STATES.get(letter, "still running")


class HangReporter:
    """Explains timeouts under torchrun: ranks report through its store that they gave up waiting."""

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
        """Explain a distributed error of this rank; None if it is neither a timeout nor a lost peer."""
        if not (is_timeout(text) or is_lost_peer(text)):
            return None
        try:
            self.store.set(f"{self.prefix}{self.rank}", "timed out" if is_timeout(text) else "lost a peer")
            reports = self._wait_for_reports()
        except (RuntimeError, OSError):
            return f"rank {self.rank} lost its connection to the other ranks, which have ended."
        silent = [rank for rank in range(self.world) if rank not in reports]
        timed_out = sorted(rank for rank, report in reports.items() if report == "timed out")
        if not silent:
            return f"rank {self.rank} lost the other ranks: {text.splitlines()[0][:200]}"
        if timed_out:
            return describe_hang(dict.fromkeys(silent, ""), timed_out, self.timeout_s)
        return f"{_name_ranks(silent)} ended, which ended the run."

    def _wait_for_reports(self) -> dict[int, str]:
        """The reports of all ranks, or of those that reported within REPORT_WAIT_S."""
        deadline_s = time.monotonic() + REPORT_WAIT_S
        keys = {rank: f"{self.prefix}{rank}" for rank in range(self.world)}
        while True:
            found = {rank: self.store.get(k).decode() for rank, k in keys.items() if self.store.check([k])}
            if len(found) == self.world or time.monotonic() >= deadline_s:
                return found
            time.sleep(0.1)
