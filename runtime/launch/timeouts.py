"""How long a rank waits for another one, and which one it waited for in vain.

A rank that dies is noticed at once: its connections break. One that hangs (stopped, deadlocked, its node
frozen) is noticed when a collective's time is up. Then every rank that still can says so, and those that do
not say anything are the ones that hang.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from planner.strategy.plan import Plan

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
