"""Training: the launch of all ranks of a plan.

`run_training` forks the ranks on this machine, or is itself a rank where torchrun started it (RANK and
WORLD_SIZE are in the environment). `python -m runtime.train PLAN ...` takes the arguments of `plan
train`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from planner.strategy.plan import Plan
from planner.strategy.plan_check import check_sound
from runtime.launch.device_check import check_fits_here, check_same_devices, check_world, pick_device
from runtime.launch.local_ranks import RunFailedError, Send, run_local
from runtime.launch.rank import agree, enter_group, started_as_rank
from runtime.launch.timeouts import RollCall, group_timeout_s
from runtime.train.listeners import Audience
from runtime.train.loop import Job, catch_sigterm, train_rank
from runtime.train.options import TrainOptions
from runtime.train.session import Setup, lock_run_dir, prepare_run
from runtime.train.summary import TrainSummary


def run_training(plan: Plan, options: TrainOptions, *, shown: bool = True) -> TrainSummary | None:
    """Trains `plan` on real ranks and returns the summary, which is also in the run's folder.

    Under torchrun this process is one rank, and only rank 0 returns a summary. Otherwise it forks all
    ranks here; no process is left when it returns or raises. Raises InputError for wrong input,
    RunFailedError where a rank died or the loss was not finite.
    """
    started_s = time.monotonic()
    check_sound(plan)
    device = pick_device(plan)
    if not options.any_device:
        check_same_devices(plan, device)
    if started_as_rank():
        return _run_as_rank(plan, options, device, started_s, shown=shown)
    check_fits_here(plan, device)
    lock = lock_run_dir(Path(options.run_dir))
    try:
        job = Job(plan, options, prepare_run(plan, options), started_s)
        return _run_forked(job, device, shown=shown)
    finally:
        os.close(lock)


def _run_forked(job: Job, device: str, *, shown: bool) -> TrainSummary:
    options = job.options

    timeout_s = options.hang_timeout or group_timeout_s(job.plan)

    def body(rank: int, send: Send) -> None:
        stop = catch_sigterm()
        train_rank(job, enter_group(device, timeout_s), send, stop)

    with Audience(job.plan, options, shown=shown) as audience:
        run_local(
            body,
            job.plan.strategy.degrees.world,
            log_dir=Path(options.run_dir) / "logs",
            on_message=lambda _, message: audience.receive(message),
        )
        return audience.summary()


def _run_as_rank(
    plan: Plan, options: TrainOptions, device: str, started_s: float, *, shown: bool
) -> TrainSummary | None:
    """This process as one rank under torchrun; rank 0 sets the run up and shows its progress."""
    check_world(plan, int(os.environ["WORLD_SIZE"]))
    stop = catch_sigterm()
    timeout_s = options.hang_timeout or group_timeout_s(plan)
    place = enter_group(device, timeout_s)
    roll_call = RollCall(timeout_s)
    first = dist.get_rank() == 0
    locks: list[int] = []

    def set_up() -> dict[str, Any]:
        locks.append(lock_run_dir(Path(options.run_dir)))
        return dataclasses.asdict(prepare_run(plan, options))

    facts = agree(set_up, first_only=True)[0]
    job = Job(plan, options, Setup(**{**facts, "remarks": tuple(facts["remarks"])}), started_s)
    try:
        with Audience(plan, options, shown=shown and first) as audience:
            train_rank(job, place, audience.receive, stop)
    except RuntimeError as error:
        meaning = roll_call.explain(str(error))
        if meaning is None:
            raise
        raise RunFailedError(meaning) from error
    dist.destroy_process_group()
    return audience.summary() if first else None
