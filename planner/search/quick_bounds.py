"""Lower bounds of the step time of thousands of shapes at once, before any is modelled for itself.

What the blocks compute and send over tensor-, context- and expert-parallel ranks depends on those degrees
and the micro-batch alone, and data parallelism only adds to it. So with W_k the passes of the whole model for
one micro-batch without data parallelism, of each of the few k = (those degrees, micro-batch),

    step time >= W_k x factor(schedule, p, m)          factor: planner.search.bounds

and where devices share cores, the work of all micro-batches over their throughput. It lies below
`step_bound_s`, which knows the shape's data parallelism, memory and optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.cost.evaluate import CostModel
from planner.cost.passes import Pass
from planner.search.bounds import whole_passes
from planner.strategy import CpExchange, Degrees, Recompute, Schedule

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Ints = np.ndarray[Any, np.dtype[np.int64]]

Kind = tuple[int, bool, int, int, CpExchange, int, int | None, int]
"""tp, sequence parallelism, micro-batch, cp and its exchange, ep, etp, devices."""


def quick_bounds_s(model: CostModel, shapes: Sequence[Degrees], options: tuple[Recompute, ...]) -> Floats:
    """For each shape a time that no strategy of it beats. Shapes are legal, `options` as in recipes."""
    import numpy as np

    if Recompute.NONE in options and not model.layers.samples:
        options = (Recompute.NONE,)  # by the formula, no other takes less time
    kinds: dict[Kind, int] = {}
    which = np.asarray([kinds.setdefault(_kind(degrees), len(kinds)) for degrees in shapes])
    passes = [_passes_alone(model, kind, options) for kind in kinds]
    work_s = np.asarray([each.work_s for each in passes])[which]
    fixed_s = np.asarray([each.fixed_s for each in passes])[which]
    p = np.asarray([d.pp for d in shapes], dtype=np.float64)
    m = np.asarray([d.num_micro_batches for d in shapes], dtype=np.float64)
    codes = {schedule: index for index, schedule in enumerate(Schedule)}
    factor = _factors(np.asarray([codes[d.schedule] for d in shapes]), p, m)
    if model.sharing is None:
        whole: Floats = (work_s + fixed_s) * factor
        return whole
    per_rank = np.asarray([d.world // d.pp for d in shapes])
    slow = np.asarray([model.sharing.slowdown(n) for n in range(int(per_rank.max()) + 1)])[per_rank]
    worlds = np.asarray([d.world for d in shapes])
    rates = {world: model.sharing.best_throughput(world) for world in set(worlds.tolist())}
    throughput = np.asarray([rates[world] for world in worlds.tolist()])
    shared: Floats = np.maximum((work_s * slow + fixed_s) * factor, work_s * m * per_rank / throughput)
    return shared


def _kind(d: Degrees) -> Kind:
    return d.tp, d.sequence_parallel, d.micro_batch, d.cp, d.cp_exchange, d.ep, d.etp, d.world


def _passes_alone(model: CostModel, kind: Kind, options: tuple[Recompute, ...]) -> Pass:
    """Forward and backward of the whole model for one micro-batch, without data parallelism."""
    tp, sequence_parallel, micro_batch, cp, exchange, ep, etp, devices = kind
    alone = Degrees(
        tp=tp,
        pp=devices // (tp * cp),
        sequence_parallel=sequence_parallel,
        micro_batch=micro_batch,
        cp=cp,
        cp_exchange=exchange,
        ep=ep,
        etp=etp,
    )
    forward, backward = whole_passes(model.shape(alone), options)
    return forward + backward


def _factors(schedules: Ints, p: Floats, m: Floats) -> Floats:
    """`bounds.schedule_factor` of each: what a step takes at least, in passes of the whole model."""
    import numpy as np

    one_f_one_b = np.where(m > p, (m + p - 1) / p, 1 + (m - 1) / (2 * p))
    split = np.maximum(m / p, 0.5)
    by_schedule = {
        Schedule.GPIPE: 1 + (m - 1) / p,
        Schedule.ONE_F_ONE_B: one_f_one_b,
        Schedule.INTERLEAVED: np.maximum(m / p, 1.0),
        Schedule.ZB_H1: split,
        Schedule.ZBV: split,
        Schedule.DUALPIPEV: split,
    }
    each = np.choose(schedules, [by_schedule[schedule] for schedule in Schedule])
    factors: Floats = np.where(p == 1, m, each)
    return factors
