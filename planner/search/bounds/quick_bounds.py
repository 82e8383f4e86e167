"""Lower bounds of the step time of thousands of shapes at once, before any is modelled for itself.

What the blocks compute and send over tensor-, context- and expert-parallel ranks depends on those degrees
and the micro-batch alone, and data parallelism only adds to it: under ZeRO 2 and 3 messages of every unit in
every pass, which depend on how state is shared out alone. So with W the passes of the whole model for one
micro-batch, put together from those of few kinds and those of few ways to share out state,

    step time >= W x factor(schedule, p, m)          factor: planner.search.bounds.layout_bounds

and where devices share cores, the work of all micro-batches over their throughput. It lies below
`step_bound_s`, which knows the shape's memory and optimizer. Where ranks lie on different devices the factor
is that of planner.search.bounds.layout_bounds.BaseBound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from planner.cost.communication.collectives import overlap_of
from planner.cost.communication.messages import Messages
from planner.cost.evaluate import CostModel
from planner.cost.layer import Pass, stacked
from planner.cost.stage.sharded_layers import LayerSharding, layer_sharding
from planner.foundation.frozen import replaced
from planner.model.sublayer import Recompute
from planner.search.bounds.layout_bounds import schedule_factor
from planner.search.space import Pipe, Space, alone
from planner.strategy.placement import is_mixed, rank_groups
from planner.strategy.strategy import Degrees, Zero

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints


TINY_S = 1e-12
"""What a unit takes at least where it is divided by."""
MOST_SLOWER = 1e6
"""How many times as long a rank takes at most: units that take no time say nothing."""


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
            each = (replaced(base, schedule=schedule, chunks=chunks) for schedule, chunks in pipes)
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
    kinds: dict[LayerSharding, int] = {}
    which = np.asarray([kinds.setdefault(layer_sharding(degrees), len(kinds)) for degrees in bases])
    m = np.asarray([d.num_micro_batches for d in bases], dtype=np.float64)
    if model.sharing is None:
        ranks = _ranks_on(model, bases)
        each = [_unit_passes(own, kinds, options, expired) for own in ranks]
        sent = zip(ranks, each, strict=True)
        units_s = np.stack([_with_messages(own, bases, units, which, expired) for own, units in sent])
        return _placed_s(units_s, np.stack(list(ranks.values())), m, rows, factor)
    units = _unit_passes(model, kinds, options, expired)
    work_s = np.sum([unit.many * (unit.forward.work_s + unit.backward.work_s) for unit in units], axis=0)
    fixed_s = np.sum([unit.many * (unit.forward.fixed_s + unit.backward.fixed_s) for unit in units], axis=0)
    work_s, fixed_s = work_s[which], fixed_s[which]
    per_rank = np.asarray([d.world // d.pp for d in bases])
    slow = np.asarray([model.sharing.slowdown(n) for n in range(int(per_rank.max()) + 1)])[per_rank]
    worlds = np.asarray([d.world for d in bases])
    rates = {world: model.sharing.best_throughput(world) for world in set(worlds.tolist())}
    throughput = np.asarray([rates[world] for world in worlds.tolist()])
    spread_s = work_s * m * per_rank / throughput
    shared: Floats = np.maximum((work_s * slow + fixed_s)[rows] * factor, spread_s[rows])
    return shared


def _ranks_on(model: CostModel, bases: Sequence[Degrees]) -> dict[CostModel, Ints]:
    """Pipeline ranks of each base by the model of the devices on which they lie [base]."""
    import numpy as np

    if not is_mixed(model.problem.cluster):
        return {model: np.asarray([d.pp for d in bases])}
    known: dict[tuple[int, tuple[int, ...]], Counter[CostModel]] = {}
    for d in bases:
        if (d.pp, d.device_order) not in known:
            groups = rank_groups(model.problem.cluster, d)
            known[d.pp, d.device_order] = Counter(map(model.seen_from, groups))
    each = [known[d.pp, d.device_order] for d in bases]
    return {own: np.asarray([count[own] for count in each]) for own in {o: None for c in each for o in c}}


def _placed_s(units_s: Floats, ranks: Ints, m: Floats, rows: Ints, factor: Floats) -> Floats:
    """The bounds of shapes from the seconds of units [devices, unit, base] and how many ranks lie on which
    devices [devices, base] (planner.search.bounds.layout_bounds.BaseBound)."""
    import numpy as np

    there = ranks > 0
    fastest_s = np.where(there[:, None], units_s, np.inf).min(axis=0)
    whole_s = fastest_s.sum(axis=0)[rows]
    if len(ranks) == 1:
        return np.asarray(whole_s * factor)
    slower = np.where(fastest_s > 0, units_s, np.inf) / np.maximum(fastest_s, TINY_S)
    slower = np.where(there, np.minimum(slower.min(axis=1), MOST_SLOWER), 1.0)
    slowest = slower.max(axis=0)
    beyond = slowest * (ranks / slower).sum(axis=0) - ranks.sum(axis=0)
    apart = slowest[rows] / (1 + factor * (beyond / m)[rows])
    placed: Floats = whole_s * factor * np.maximum(apart, 1.0)
    return placed


class _UnitPasses(NamedTuple):
    """A unit of the model under each of some kinds: how many there are, and their passes without data
    parallelism [kind], of the option that takes least."""

    many: int
    forward: Pass
    backward: Pass


def _unit_passes(
    model: CostModel,
    kinds: Iterable[LayerSharding],
    options: tuple[Recompute, ...],
    expired: Callable[[], bool],
) -> list[_UnitPasses]:
    """The units of a model, in the order of Units.all(); passes take no time once time has expired."""
    classes, layers = model.layers.classes, model.problem.model.layers
    counts = [*(model.layers.count(key, 0, layers) for key in classes), 1, 1]
    found: list[list[tuple[Pass, Pass]]] = [[] for _ in counts]
    for kind in kinds:
        if expired():
            each = [(Pass(), Pass())] * len(counts)
        else:
            shape = model.layout(alone(kind))
            each = [
                min((shape.passes(key, option) for option in options), key=lambda passes: passes[1].total_s)
                for key in classes
            ]
            each += [shape.embedding_passes, shape.head_passes]
        for own, passes in zip(found, each, strict=True):
            own.append(passes)
    return [
        _UnitPasses(count, *(stacked(direction) for direction in zip(*own, strict=True)))
        for count, own in zip(counts, found, strict=True)
    ]


def _with_messages(
    model: CostModel,
    bases: Sequence[Degrees],
    units: Sequence[_UnitPasses],
    which: Ints,
    expired: Callable[[], bool],
) -> Floats:
    """Both passes of all layers of each unit under each base [unit, base], of kind which[n], with what ZeRO 2
    and 3 send in every micro-batch beside them (planner.cost.stage.stage)."""
    import numpy as np

    known: dict[tuple[object, ...], int] = {}
    numbers: list[int] = []
    sent: list[list[tuple[float, float]]] = []
    for d in bases:
        key = d.tp, d.ep, d.etp, d.cp, d.pp, d.dp_shard, d.dp_replicate, d.zero
        if key not in known:
            known[key] = len(sent)
            sent.append([(0.0, 0.0)] * len(units) if expired() else _sent_s(model, d))
        numbers.append(known[key])
    messages_s = np.asarray(sent)[numbers]  # [base, unit, gathered or reduced]
    overlap, total_s = overlap_of(model.problem.profile), np.zeros((len(units), len(bases)))
    for number, unit in enumerate(units):
        gather_s, reduce_s = messages_s[:, number].T
        for passes, message_s in ((unit.forward, gather_s), (unit.backward, gather_s + reduce_s)):
            pass_s = np.asarray(passes.total_s)[which]
            total_s[number] += unit.many * (pass_s + overlap.shown_s(message_s, pass_s))
    return total_s


def _sent_s(model: CostModel, base: Degrees) -> list[tuple[float, float]]:
    """What each unit gathers and reduces in a micro-batch; nothing where that is done once a step."""
    units, layers = model.layers.units(base).all(), model.layers
    if base.zero < Zero.GRADIENTS or base.replicas == 1:
        return [(0.0, 0.0)] * len(units)
    messages = Messages(model.problem, base, model.comms, layers.constants, layers.stream_width)
    sent, gathers = model.shared.sent(messages, layers.units(base)), base.zero is Zero.PARAMETERS
    return [(sent.gathers[unit].total_s if gathers else 0.0, sent.reduces[unit].total_s) for unit in units]
