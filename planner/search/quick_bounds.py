"""Lower bounds of the step time of thousands of shapes at once, before any is modelled for itself.

What the blocks compute and send over tensor-, context- and expert-parallel ranks depends on those degrees
and the micro-batch alone, and data parallelism only adds to it. So with W_k the passes of the whole model for
one micro-batch without data parallelism, of each of the few k = (those degrees, micro-batch),

    step time >= W_k x factor(schedule, p, m)          factor: planner.search.bounds

and where devices share cores, the work of all micro-batches over their throughput. It lies below
`step_bound_s`, which knows the shape's data parallelism, memory and optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from planner.cost.evaluate import CostModel
from planner.cost.passes import Pass
from planner.search.bounds import schedule_factor, whole_units
from planner.search.space import Pipe, Space
from planner.strategy import CpExchange, Degrees, Recompute

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Ints = np.ndarray[Any, np.dtype[np.int64]]

Kind = tuple[int, bool, int, int, CpExchange, int, int | None, int]
"""tp, sequence parallelism, micro-batch, cp and its exchange, ep, etp, devices."""


def space_bounds_s(
    model: CostModel,
    space: Space,
    options: tuple[Recompute, ...],
    expired: Callable[[], bool] = lambda: False,
) -> tuple[Floats, Ints, Ints]:
    """For every shape of a space a time that no strategy of it beats, the number of its base, and of its
    schedule there. `options` are as in recipes.

    What is not worked out when time has expired has a bound of 0.
    """
    import numpy as np

    if not space.bases:
        return np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    counts = np.asarray([len(pipes) for pipes in space.pipes])
    rows = np.repeat(np.arange(len(space.bases)), counts)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    known: dict[tuple[tuple[Pipe, ...], int, int], list[float]] = {}
    factors: list[float] = []
    for base, pipes in zip(space.bases, space.pipes, strict=True):
        key = pipes, base.pp, base.num_micro_batches
        if key not in known:
            each = (dataclasses.replace(base, schedule=schedule, chunks=chunks) for schedule, chunks in pipes)
            known[key] = [schedule_factor(degrees) for degrees in each]
        factors += known[key]
    return _times(model, space.bases, rows, np.asarray(factors), options, expired), rows, places


def _times(
    model: CostModel,
    bases: Sequence[Degrees],
    rows: Ints,
    factor: Floats,
    options: tuple[Recompute, ...],
    expired: Callable[[], bool],
) -> Floats:
    """The bound of each of some shapes, of which row n is one of base rows[n]."""
    import numpy as np

    if not bases:
        return np.zeros(0)
    if Recompute.NONE in options and not model.layers.samples:
        options = (Recompute.NONE,)  # by the formula, no other takes less time
    kinds: dict[Kind, int] = {}
    which = np.asarray([kinds.setdefault(kind_of(degrees), len(kinds)) for degrees in bases])
    passes = [Pass() if expired() else _passes_alone(model, kind, options) for kind in kinds]
    work_s = np.asarray([each.work_s for each in passes])[which]
    fixed_s = np.asarray([each.fixed_s for each in passes])[which]
    if model.sharing is None:
        whole: Floats = (work_s + fixed_s)[rows] * factor
        return whole
    m = np.asarray([d.num_micro_batches for d in bases], dtype=np.float64)
    per_rank = np.asarray([d.world // d.pp for d in bases])
    slow = np.asarray([model.sharing.slowdown(n) for n in range(int(per_rank.max()) + 1)])[per_rank]
    worlds = np.asarray([d.world for d in bases])
    rates = {world: model.sharing.best_throughput(world) for world in set(worlds.tolist())}
    throughput = np.asarray([rates[world] for world in worlds.tolist()])
    spread_s = work_s * m * per_rank / throughput
    shared: Floats = np.maximum((work_s * slow + fixed_s)[rows] * factor, spread_s[rows])
    return shared


def kind_of(d: Degrees) -> Kind:
    """What a shape's passes depend on besides data parallelism."""
    return d.tp, d.sequence_parallel, d.micro_batch, d.cp, d.cp_exchange, d.ep, d.etp, d.world


def alone(kind: Kind) -> Degrees:
    """Degrees of a kind without data parallelism."""
    tp, sequence_parallel, micro_batch, cp, exchange, ep, etp, devices = kind
    return Degrees(
        tp=tp,
        pp=devices // (tp * cp),
        sequence_parallel=sequence_parallel,
        micro_batch=micro_batch,
        cp=cp,
        cp_exchange=exchange,
        ep=ep,
        etp=etp,
    )


def _passes_alone(model: CostModel, kind: Kind, options: tuple[Recompute, ...]) -> Pass:
    """Both passes of the whole model for one micro-batch, without data parallelism, on the fastest kind."""
    each = [sum(whole_units(own.shape(alone(kind)), options), Pass()) for own in model.kinds]
    return min(each, key=lambda passes: passes.total_s)
