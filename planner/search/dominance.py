"""Bases that another base beats in everything: it takes no more time and no more memory.

Bases that differ in sequence parallelism or in the exchange of context parallelism alone have the same
weights, the same data parallelism and the same pipeline. Where the passes of every layer with every option,
what they keep, what they hold for a moment, and the message between stages are no larger under one than under
the other, no strategy of the other is better: it is left out, unless it is pinned.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.cost.evaluate import CostModel
from planner.cost.stage.sharded_layers import LayerSharding, layer_sharding
from planner.model.sublayer import Recompute
from planner.profile.profile import LayerKind
from planner.search.quick_bounds import alone
from planner.search.space import Space
from planner.strategy.strategy import Degrees


def without_dominated(
    model: CostModel,
    space: Space,
    options: tuple[Recompute, ...],
    expired: Callable[[], bool] = lambda: False,
) -> tuple[Space, int]:
    """The space without bases that others dominate, and how many shapes those had; all once time expired."""
    siblings: dict[tuple[object, ...], list[int]] = {}
    for number, base in enumerate(space.bases):
        siblings.setdefault(_but_variant(base), []).append(number)
    figures: dict[LayerSharding, tuple[float, ...]] = {}
    better: dict[tuple[LayerSharding, LayerSharding], bool] = {}

    def beats(one: LayerSharding, other: LayerSharding) -> bool:
        if (one, other) not in better and expired():
            return False
        if (one, other) not in better:
            for kind in (one, other):
                if kind not in figures:
                    figures[kind] = _figures(model, kind, options)
            better[one, other] = all(a <= b for a, b in zip(figures[one], figures[other], strict=True))
        return better[one, other]

    kept: list[int] = []
    for numbers in siblings.values():
        kinds = [layer_sharding(space.bases[number]) for number in numbers]
        kept += [
            number
            for place, number in enumerate(numbers)
            if not any(
                beats(kind, kinds[place]) and (rank < place or not beats(kinds[place], kind))
                for rank, kind in enumerate(kinds)
                if rank != place
            )
        ]
    kept.sort()
    left = Space(
        bases=tuple(space.bases[number] for number in kept),
        pipes=tuple(space.pipes[number] for number in kept),
        rejected=space.rejected,
        complete=space.complete,
    )
    return left, sum(map(len, space.pipes)) - sum(map(len, left.pipes))


def _but_variant(d: Degrees) -> tuple[object, ...]:
    return (
        (d.tp, d.pp, d.dp_replicate, d.dp_shard, d.cp, d.ep, d.etp),
        (d.zero, d.micro_batch, d.num_micro_batches, d.device_order),
    )


def _figures(model: CostModel, kind: LayerSharding, options: tuple[Recompute, ...]) -> tuple[float, ...]:
    """Seconds and bytes of every layer, on every kind of device, without data parallelism."""
    found: list[float] = []
    for own in model.kinds:
        shape = own.layout(alone(kind))
        layers = [
            (shape.passes(key, option), shape.block(key, option))
            for key in shape.classes
            for option in options
        ]
        layers.append((shape.embedding_passes, shape.layer(LayerKind.EMBEDDING)))
        layers.append((shape.head_passes, shape.layer(LayerKind.HEAD)))
        for (forward, backward), cost in layers:
            found += [forward.total_s, backward.total_s, backward.recompute_s, cost.saved_bytes]
            found += [cost.forward_transient_bytes, cost.backward_transient_bytes]
        found.append(
            shape.messages.message_bytes() / (shape.degrees.tp if shape.degrees.sequence_parallel else 1)
        )
    return tuple(found)
