"""What `plan rehearse` and `plan solve --rehearse` have in common: which ranks, on what, and the answer."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.job.problem import PlanningProblem
    from planner.strategy.plan import Plan
    from planner.strategy.rehearsal import RankRehearsal, Rehearsal, RehearsalMode


USABLE_SHARE = 0.9
"""Part of the machine's memory that a rank rehearsed on the CPU may be predicted to take."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which ranks are rehearsed and how. No ranks: one of each kind. `compiled` None: as in training."""

    ranks: tuple[int, ...] = ()
    steps: int = 3
    compiled: bool | None = None
    fake: bool = False
    anyway: bool = False
    whole: bool = False


def check_rehearsable(plan: Plan) -> None:
    """Raises InputError where the runtime does not execute the plan."""
    from planner.strategy.engines.native import (
        check_executed,
        check_executed_offload,
        check_executed_workload,
    )
    from planner.strategy.plan_check import check_schedule_table, check_sound

    check_sound(plan)
    check_executed(plan.model, "rehearse")
    check_schedule_table(plan)
    check_executed_offload(plan.strategy)
    check_executed_workload(plan.model, plan.workload, plan.strategy.degrees)


def rehearse_plan(
    plan: Plan, problem: PlanningProblem, choice: Choice, say: Callable[[str], None]
) -> Rehearsal:
    """Rehearses ranks of a plan that answers `problem`, and refines its prediction.

    Raises InputError where the runtime does not execute the plan, or a rank is not of it.
    """
    import torch

    from planner.advice.apply_rehearsal import refine
    from planner.job.engine_settings import Engine
    from planner.strategy.equivalent_ranks import shortened
    from planner.strategy.rehearsal import Rehearsal, RehearsalMode
    from runtime.parallel.recompute import compiles
    from runtime.rehearse.rehearse import RehearsalOptions, rehearse_ranks

    ranks = _chosen(plan, choice.ranks)
    mode, remarks = _mode(plan, fake=choice.fake)
    if mode is RehearsalMode.DEVICE and not choice.anyway:
        _check_free()
    if mode is RehearsalMode.PROCESSOR:
        compiles(choice.compiled, torch.device("cpu"))  # raises where asked and the machine cannot
    options = RehearsalOptions(
        mode=mode,
        steps=choice.steps,
        compiled=choice.compiled,
        room_bytes=_room_bytes(plan) if mode is RehearsalMode.DEVICE else None,
    )
    short = plan if choice.whole else shortened(plan)
    done = tuple(rehearse_ranks(short, ranks, options, say))
    same = _same_device(plan, mode)
    told = done if same else tuple(map(_without_times, done))
    if plan.engine not in (None, Engine.NATIVE):
        remarks = (*remarks, f"the plan is priced for {plan.engine}; what was run is this program's runtime")
    if not same:
        remarks = (*remarks, "times are of another device than the plan's: the prediction keeps its own")
    covered = {other for rank in done for other in rank.alike}
    return Rehearsal(
        mode=mode,
        device=_device_title(mode),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        compiled=any(rank.compiled for rank in done),
        micro_batches=short.strategy.degrees.num_micro_batches,
        ranks=done,
        complete=len(covered) == plan.strategy.degrees.pp,
        refined=refine(problem, plan, told, mode),
        remarks=remarks,
    )


def _chosen(plan: Plan, ranks: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """The ranks to rehearse, each with the pipeline ranks that it stands for."""
    from planner.foundation.errors import InputError, Problem
    from planner.strategy.equivalent_ranks import alike_ranks

    degrees, kinds = plan.strategy.degrees, alike_ranks(plan)
    if not ranks:
        return [(degrees.ranks_of_pp_rank(kind[0])[0], kind) for kind in kinds]
    wrong = [rank for rank in ranks if rank >= degrees.world]
    if wrong:
        fault = f"{', '.join(map(str, wrong))}: the plan has {degrees.world} ranks."
        raise InputError(Problem(where="--rank", fault=fault, legal=f"0 to {degrees.world - 1}"))
    of_rank = {rank: degrees.pp_rank_of_rank(rank) for rank in dict.fromkeys(ranks)}
    kind_of = {pp_rank: kind for kind in kinds for pp_rank in kind}
    first = {kind_of[pp_rank]: rank for rank, pp_rank in reversed(of_rank.items())}
    return [(rank, kind_of[pp] if first[kind_of[pp]] == rank else (pp,)) for rank, pp in of_rank.items()]


def _mode(plan: Plan, *, fake: bool) -> tuple[RehearsalMode, tuple[str, ...]]:
    """On what to rehearse, and why where it is not what the plan is for."""
    import torch

    from planner.foundation.units import format_bytes
    from planner.hardware.local_machine import physical_memory_bytes
    from planner.strategy.rehearsal import RehearsalMode

    names = sorted({group.device.name for group in plan.cluster.groups})
    if fake:
        return RehearsalMode.FAKE_TENSORS, ()
    if names != ["cpu"]:
        if torch.cuda.device_count():
            return RehearsalMode.DEVICE, ()
        why = f"this machine has no {' or '.join(names)}: memory is traced on shapes alone, nothing is timed"
        return RehearsalMode.FAKE_TENSORS, (why,)
    needed, here = plan.estimate.peak_memory_bytes, physical_memory_bytes()
    if needed > USABLE_SHARE * here:
        why = (
            f"a rank is predicted to take {format_bytes(needed)} and this machine has {format_bytes(here)}: "
            "memory is traced on shapes alone, nothing is timed"
        )
        return RehearsalMode.FAKE_TENSORS, (why,)
    return RehearsalMode.PROCESSOR, ()


def _check_free() -> None:
    """Raises InputError where others use the accelerator: what they take would be counted with the rank's."""
    from planner.foundation.errors import InputError, Problem
    from planner.hardware.local_machine import others_at_work

    found = others_at_work(1)
    if found:
        raise InputError(
            Problem(
                where="accelerator",
                fault=f"in use by others: {'; '.join(found)}. Times and memory would be of both.",
                fix="wait, choose another by CUDA_VISIBLE_DEVICES, or rehearse all the same by --anyway",
            )
        )


def _room_bytes(plan: Plan) -> int:
    """What the limit leaves to the allocator beside communicators, of which a rank alone has none."""
    beside = max(stage.memory.runtime_bytes for stage in plan.stage_estimates)
    return plan.estimate.memory_limit_bytes - beside


def _same_device(plan: Plan, mode: RehearsalMode) -> bool:
    """Whether the ranks ran on the kind of device that the plan is for."""
    from planner.hardware.catalog import device_reported_as
    from planner.hardware.local_machine import accelerators
    from planner.strategy.rehearsal import RehearsalMode

    if mode is not RehearsalMode.DEVICE:
        return True
    names = {group.device.name for group in plan.cluster.groups}
    here = [device_reported_as(reported) for reported, _ in accelerators()[:1]]
    return any(known is not None and names == {known.device().name} for known in here)


def _without_times(rank: RankRehearsal) -> RankRehearsal:
    return dataclasses.replace(
        rank, passes=(), first_extra_s=None, last_extra_s=None, update_s=None, step_s=None, idle_share=None
    )


def _device_title(mode: RehearsalMode) -> str:
    """The device's name, by the driver's own tool: a process that has asked CUDA cannot fork for others."""
    from planner.hardware.local_machine import accelerators, cpu_title
    from planner.strategy.rehearsal import RehearsalMode

    names = [name for name, _ in accelerators()[:1]] if mode is RehearsalMode.DEVICE else []
    return names[0] if names else "accelerator" if mode is RehearsalMode.DEVICE else cpu_title()
