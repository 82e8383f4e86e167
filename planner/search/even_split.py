"""What the even split of a shape takes at least: the one that is looked at where layers are of several
classes and ranks hold several stages."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from planner.strategy.schedule.longest_path import action_order
from planner.strategy.schedule.table import BACKWARD, FORWARD

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats
    from planner.search.stage_space import StageSpace


def floor_s(space: StageSpace, enough_s: float = float("inf")) -> float:
    """What the even split does not beat with the cheapest options of all layers, or a bound of at least
    `enough_s` where that is no more: of few paths, or of all."""
    import numpy as np

    each = zip(space.rank_of, pairwise(space.even), strict=True)
    stages = np.stack([space.books[rank].least_passes.stage_s(*span) for rank, span in each])
    once_s = space.once_s + space.optimizer_s
    found_s = _few_paths_s(space, stages) + once_s
    if found_s >= enough_s:
        return found_s
    begin_s = [0.0] * space.degrees.pp
    _, ends_s = action_order(space.table).durations(stages.ravel().tolist()).ends_s(begin_s, space.hop_s)
    return max(ends_s) + once_s


def _few_paths_s(space: StageSpace, stages: Floats) -> float:
    """The longest of few paths that every table has, by what actions of stages take [stage, kind].

    A rank begins with its first stage, behind a forward of all before it, and runs all its actions. All
    forwards and passes back of a stage lie between its first, before which a forward runs through all
    stages before it, and its last, behind which a pass back does. In a V so do those of the rank's other
    stage, whose forwards come later and whose passes back come before.
    """
    import numpy as np

    forward, whole, inputs, weights, _ = stages.T
    parts, schedule, m = inputs + weights, space.degrees.schedule, space.degrees.num_micro_batches
    if not schedule.splits_backward:
        back, all_back = whole, whole
    elif schedule.splits_every_backward:
        back, all_back = inputs, parts
    else:
        back, all_back = np.minimum(whole, inputs), np.minimum(whole, parts)
    both, ranks = forward + back, np.asarray(space.rank_of)
    begin_s, around_s = (np.cumsum(each) - each for each in (forward, both))
    firsts = [own[0] for own in space.stages_of]
    longest_s = max(
        (begin_s[firsts] + m * np.bincount(ranks, forward + all_back)).max(), (around_s + m * both).max()
    )
    if schedule.v_shaped:
        longest_s = max(longest_s, (around_s[firsts] + m * np.bincount(ranks, both)).max())
    return float(longest_s)


def bound_s(space: StageSpace, enough_s: float = float("inf")) -> float:
    """What no recipes of the even split beat, or a bound of at least `enough_s` where that is no more;
    infinite where none fit."""
    spans, hop_s = list(pairwise(space.even)), space.hop_s
    through = [FORWARD] if space.degrees.schedule.splits_backward else [FORWARD, BACKWARD]
    worst_s = entered_s = 0.0
    once_s = space.once_s + space.optimizer_s
    for rank, stages in enumerate(space.stages_of):
        worst_s = max(worst_s, entered_s + space.ranks.even_own_s(rank, spans))
        if worst_s + once_s >= enough_s:
            break
        own_s = space.books[rank].least_passes.stage_s(*spans[stages[0]])
        entered_s += sum(hop_s + float(own_s[kind]) for kind in through)
    return worst_s + once_s
