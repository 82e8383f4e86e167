"""What the layers of a model take at least, whatever recomputes: sums from which a stage's passes follow.

Gradients of inputs and of weights count as planner.cost.replay.split_backward divides a backward
pass, or,
where torch divides that of a whole stage, as no stage takes less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from planner.cost.layer import Pass
from planner.cost.stage.stage import LayoutModel
from planner.model.sublayer import Recompute
from planner.search.bounds import split_again_s

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints


class LeastPasses(NamedTuple):
    """Least seconds by kind of action (planner.strategy.schedule.table.KINDS): `sums` [kind, layers + 1] of
    all layers
    before each, embedding and head with the first and the last; `action` [kind] of what an action takes
    besides."""

    sums: Floats
    action: Floats

    def stage_s(self, firsts: Ints | int, ends: Ints | int) -> Floats:
        """What a stage's actions take at least, or those of many stages, [kind, stage]."""
        each: Floats = (self.sums[:, ends] - self.sums[:, firsts]).T + self.action
        return each.T


def least_passes(shape: LayoutModel, options: tuple[Recompute, ...]) -> LeastPasses:
    """Those of a shape's layers, each pass with the option that takes least."""
    import numpy as np

    known = {key: option_passes(shape, key, options).min(axis=0) for key in shape.classes}
    each = np.asarray([known[key] for key in shape.layer_model.keys]).T
    whole = shape.problem.stack.recomputes_once or shape.problem.workload.adapters is not None
    for place, (forward, backward) in ((0, shape.embedding_passes), (-1, shape.head_passes)):
        left_s = 0.0 if whole else backward.compute_s / 2  # of frozen ends it may be below 0
        each[:, place] += _parts_s(shape, forward, backward, left_s, 0.0)
    sums = np.concatenate([np.zeros((len(each), 1)), np.cumsum(each, axis=1)], axis=1)
    return LeastPasses(sums, np.asarray(_parts_s(shape, shape.action, shape.action, 0.0, 0.0)))


def option_passes(shape: LayoutModel, key: str, options: tuple[Recompute, ...]) -> Floats:
    """What a block of a class adds at least to its stage's actions, with each option [option, kind]."""
    import numpy as np

    unchanged, each = shape.problem.workload.adapters is not None, []
    for option in options:
        forward, backward = shape.passes(key, option)
        if shape.problem.stack.recomputes_once:
            products_s = shape.deferrable_s[key]
            left_s, again_s = products_s * (option is Recompute.NONE), 0.0
        else:
            left_s = 0.0 if unchanged else backward.compute_s / 2
            products_s, again_s = min(left_s, forward.compute_s), split_again_s(shape, key, option)
        each.append(_parts_s(shape, forward, backward, left_s, products_s + again_s))
    return np.asarray(each)


def _parts_s(
    shape: LayoutModel, forward: Pass, backward: Pass, left_s: float, products_s: float
) -> tuple[float, ...]:
    """Seconds by kind where `left_s` of the backward is not in I, and `products_s` are in W."""
    later_s = 0.0 if shape.problem.workload.adapters is not None else backward.host_s / 2
    forward_s, backward_s = forward.total_s, backward.total_s
    return forward_s, backward_s, backward_s - left_s - later_s, products_s + later_s, forward_s
