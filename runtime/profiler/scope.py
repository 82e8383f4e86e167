"""How much a profile measures: the dimensions of its cases, how often each, and when it is enough."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec
from runtime.profiler.collectives import CPU_LARGEST_BYTES, SIZES_BYTES
from runtime.profiler.layers import divides, layer_cases
from runtime.profiler.timing import Effort

MOST_RANKS = 64
"""Up to as many ranks are named where an axis cannot have what was asked for."""

TARGET = 0.05
"""Held-out error at which a family of cases is known well enough: the spread of one sample on a quiet
machine, below which more samples tell of noise."""

TIME_LIMIT_S, QUICK_TIME_LIMIT_S = 900.0, 120.0
"""The most a profile takes: what people wait for, once for a device and once in between."""


SWEEP_EFFORT = Effort(warmup=1, least=3, most=20, budget_s=0.1)
"""Runs of an operator: the spread of a sample of this many is a twentieth, on a CPU that others use too."""


class Sweeps(StrEnum):
    """Which operators are timed alone, over their sizes: none, the few that span them, or more between."""

    NONE = "none"
    FEW = "few"
    ALL = "all"


@frozen
class Scope:
    """What is measured of layers (lengths, widths, micro-batches, how they are compiled) and collectives.

    `widths`, `cps` and `eps` are ranks of tensor, context and expert parallelism: on one device, the shapes
    of one rank's shard. Families that predict their samples stop at `target`, a relative held-out error; all
    stop when `time_limit_s` is over.
    """

    seqs: tuple[int, ...]
    widths: tuple[int, ...]
    micro_batches: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    layer_effort: Effort
    comm_effort: Effort
    host_effort: Effort
    contention_window_s: float
    cps: tuple[int, ...] = (1,)
    eps: tuple[int, ...] = (1,)
    compiled: tuple[bool, ...] = (False,)
    target: float = TARGET
    time_limit_s: float = TIME_LIMIT_S
    sweeps: Sweeps = Sweeps.NONE
    sweep_effort: Effort = SWEEP_EFFORT


def default_scope(
    devices: int,
    seqs: Sequence[int],
    *,
    quick: bool,
    widths: Sequence[int] = (),
    micro_batches: Sequence[int] = (),
    largest_bytes: int = CPU_LARGEST_BYTES,
) -> Scope:
    """The usual scope for a world of `devices`: widths are powers of two within it, messages up to a size."""
    powers = tuple(1 << step for step in range(devices.bit_length()) if 1 << step <= devices)
    once = Effort(warmup=1, least=2, most=4, budget_s=0.01)
    return Scope(
        seqs=tuple(sorted(set(seqs))),
        widths=tuple(sorted(set(widths))) or powers,
        micro_batches=tuple(sorted(set(micro_batches))) or ((1, 2) if quick else (1, 2, 4, 8)),
        sizes_bytes=tuple(size for size in SIZES_BYTES[:: 2 if quick else 1] if size <= largest_bytes),
        layer_effort=once if quick else Effort(warmup=1, least=3, most=30, budget_s=0.10),
        comm_effort=once if quick else Effort(warmup=2, least=3, most=40, budget_s=0.08),
        host_effort=once if quick else Effort(warmup=2, least=7, most=40, budget_s=0.15),
        contention_window_s=0.1 if quick else 0.3,
        time_limit_s=QUICK_TIME_LIMIT_S if quick else TIME_LIMIT_S,
        sweeps=Sweeps.FEW if quick else Sweeps.ALL,
        sweep_effort=once if quick else SWEEP_EFFORT,
    )


def check_shards(models: Sequence[ModelSpec], scope: Scope, *, widths: Sequence[int]) -> None:
    """Raises InputError with everything asked for into which no layer of any model can be shared out.

    `widths` are those that a user named: of the usual ones, those that do not divide a model are left out.
    """
    problems = _width_problems(models, widths)
    if not problems:
        problems = [
            *_spread_problems(models, scope, "cp", scope.cps),
            *_spread_problems(models, scope, "ep", scope.eps),
        ]
    if problems:
        raise InputError(*problems)


def _width_problems(models: Sequence[ModelSpec], widths: Sequence[int]) -> list[Problem]:
    able = [tp for tp in range(1, MOST_RANKS + 1) if any(divides(model, tp) for model in models)]
    return [
        Problem(
            where="--tp",
            fault=f"{tp} does not divide {_either(models)} into equal shards.",
            legal=", ".join(map(str, able)),
        )
        for tp in widths
        if not any(divides(model, tp) for model in models)
    ]


def _spread_problems(
    models: Sequence[ModelSpec], scope: Scope, axis: str, asked: Sequence[int]
) -> list[Problem]:
    """Of context (cp) or expert (ep) parallelism."""
    wrong = [ranks for ranks in asked if ranks > 1 and ranks not in _measured(models, scope, axis, (ranks,))]
    if not wrong:
        return []
    powers = tuple(1 << step for step in range(1, MOST_RANKS.bit_length()))
    legal = ", ".join(map(str, (1, *sorted(_measured(models, scope, axis, powers)))))
    what = "sequences" if axis == "cp" else "experts"
    fault = f"no block of {_either(models)} has {what} that {{}} ranks could share out at these lengths."
    return [Problem(where=f"--{axis}", fault=fault.format(ranks), legal=legal) for ranks in wrong]


def _measured(models: Sequence[ModelSpec], scope: Scope, axis: str, ranks: Sequence[int]) -> set[int]:
    """Those ranks of an axis for which some case is measured."""
    cps, eps = (ranks, (1,)) if axis == "cp" else ((1,), ranks)
    each = (layer_cases(m, scope.seqs, scope.widths, scope.micro_batches, cps, eps) for m in models)
    return {getattr(case, axis) for cases in each for case in cases} - {1}


def _either(models: Sequence[ModelSpec]) -> str:
    return " or ".join(model.name for model in models)
