"""Paths through a schedule's table that bound its makespan from below, linear in the stages' times.

A schedule's makespan is the longest path through its actions, so the length of any path is a lower bound.
With f_i and b_i the passes of stage i, t_i = f_i + b_i, m micro-batches, p ranks, w_i = min(p - 1 - i,
m - 1) forwards ahead, and S_i = sum of t_j over stages after i:

    GPipe        sum f + (m - 1) max f + sum b + (m - 1) max b                              (exact)
    1F1B, all i  sum_{j<i} t_j + (m - w_i) t_i + start + end                                 (exact if even)
                 start one of w_i f_i, S_i; end one of w_i b_i, S_i; both S_i only if m >= w_i + 2
    others       sum_{j<s} f_j + row of rank r from the first forward of its stage s to the last backward
                 of its stage s' + sum_{j<s'} b_j, all s, s' on r        (interleaved: exact if even)

Where the backward is split, I and W together take at least b and I at least b / 2, so of each I whose W is
not on the path half of b counts; a split backward in the last sum counts as b / 2 too. A hop between ranks
adds its message time. A path is written as weights on f and b of every stage plus a constant number of hops;
the ILP takes each as a constraint.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from planner.foundation.arrays import larger
from planner.strategy.schedule.schedules import ActionKind, Row, build_table
from planner.strategy.strategy import Degrees, Schedule

SHORT = 8
"""Stages up to which all bounding paths of 1F1B are written down at first."""


class Path(NamedTuple):
    """Length of a path: sum of forward[i] f_i + backward[i] b_i over stages, plus hops messages."""

    name: str
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    hops: int


@lru_cache(maxsize=512)
def paths(degrees: Degrees) -> tuple[Path, ...]:
    """The bounding paths of a schedule other than GPipe, whose two maxima are modelled as such."""
    if degrees.schedule is not Schedule.ONE_F_ONE_B:
        return tuple(_along_rows(degrees))
    return tuple(_through_stages(degrees))


@lru_cache(maxsize=512)
def first_paths(degrees: Degrees) -> tuple[Path, ...]:
    """The few of them that a programme starts with: each rank's own work between the ranks before it.

    Of 1F1B all in short pipelines, in long ones those with both or no detours through the stages after.
    """
    if degrees.schedule is Schedule.ONE_F_ONE_B:
        each = _through_stages(degrees)
        return tuple(
            path for path in each if degrees.pp <= SHORT or path.name.endswith(("own_own", "_down_up"))
        )
    if degrees.schedule is Schedule.GPIPE:
        return ()
    return tuple(_between_ranks_before(degrees, rank) for rank in range(1, degrees.pp))


def _between_ranks_before(degrees: Degrees, rank: int) -> Path:
    """All actions of a rank after the first forward of the stages before it, and before their last backward.

    Where the backward is split, weight gradients may come last: then nothing has to follow.
    """
    stages, m = degrees.stages, degrees.num_micro_batches
    own = [m * float(degrees.pp_rank_of_stage(s) == rank) for s in range(stages)]
    before = [float(s < rank) for s in range(stages)]
    split = degrees.schedule.splits_backward
    back = own if split else [a + b for a, b in zip(own, before, strict=True)]
    forward = tuple(a + b for a, b in zip(own, before, strict=True))
    return Path(f"rank{rank}", forward, tuple(back), rank if split else 2 * rank)


def _through_stages(degrees: Degrees) -> list[Path]:
    stages, m = degrees.stages, degrees.num_micro_batches
    result = []
    for i in range(stages):
        ahead = min(stages - 1 - i, m - 1)
        result.append(_one_f_one_b(stages, m, i, ahead, down=False, up=False))
        if ahead:
            result.append(_one_f_one_b(stages, m, i, ahead, down=True, up=False))
            result.append(_one_f_one_b(stages, m, i, ahead, down=False, up=True))
            if m >= ahead + 2:
                result.append(_one_f_one_b(stages, m, i, ahead, down=True, up=True))
    return result


def _one_f_one_b(stages: int, m: int, i: int, ahead: int, *, down: bool, up: bool) -> Path:
    """`down`: the start goes through the stages after i and back; `up`: the end does."""
    after = down + up
    forward = [1.0] * i + [float(m - ahead)] + [float(after)] * (stages - 1 - i)
    backward = list(forward)
    forward[i] += 0 if down else ahead
    backward[i] += 0 if up else ahead
    hops = 2 * i + 2 * after * (stages - 1 - i)
    return Path(
        f"stage{i}_{'down' if down else 'own'}_{'up' if up else 'own'}", tuple(forward), tuple(backward), hops
    )


def _along_rows(degrees: Degrees) -> list[Path]:
    """Paths that run along one row, entered through the stages before and left through them again."""
    table = build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)
    rows = list(table)
    returns = [_return_weight(rows[degrees.pp_rank_of_stage(s)], s) for s in range(degrees.stages)]
    result = []
    for rank, row in enumerate(rows):
        held = table.stages_of(rank)
        starts = {s: _places(row, s, (ActionKind.FORWARD,))[0] for s in held}
        ends = {s: _places(row, s, (ActionKind.BACKWARD, ActionKind.INPUT_GRAD))[-1] for s in held}
        for first in held:
            for final in held:
                along = row[starts[first] : ends[final] + 1]
                forward, backward = _weights(along, degrees.stages)
                forward = [weight + (s < first) for s, weight in enumerate(forward)]
                backward = [weight + returns[s] * (s < final) for s, weight in enumerate(backward)]
                hops = _hops(degrees, first) + _hops(degrees, final)
                result.append(Path(f"rank{rank}_{first}_{final}", tuple(forward), tuple(backward), hops))
    return result


def _places(row: Row, stage: int, kinds: tuple[ActionKind, ...]) -> list[int]:
    return [place for place, action in enumerate(row) if action.stage == stage and action.kind in kinds]


def _return_weight(row: Row, stage: int) -> float:
    """What the last micro-batch's gradients take at least through a stage, as a share of its backward."""
    last = row[_places(row, stage, (ActionKind.BACKWARD, ActionKind.INPUT_GRAD))[-1]]
    return 1.0 if last.kind is ActionKind.BACKWARD else 0.5


def _weights(actions: Row, stages: int) -> tuple[list[float], list[float]]:
    """How often the forward and the backward of each stage are done at least in these actions."""
    counts = Counter((action.stage, action.kind) for action in actions)
    forward = [float(counts[s, ActionKind.FORWARD]) for s in range(stages)]
    backward = []
    for s in range(stages):
        inputs, weights = counts[s, ActionKind.INPUT_GRAD], counts[s, ActionKind.WEIGHT_GRAD]
        backward.append(counts[s, ActionKind.BACKWARD] + (inputs + min(inputs, weights)) / 2)
    return forward, backward


def _hops(degrees: Degrees, stage: int) -> int:
    """Messages between stage 0 and a stage: neighbours on one rank need none."""
    ranks = [degrees.pp_rank_of_stage(s) for s in range(stage + 1)]
    return sum(a != b for a, b in pairwise(ranks))


def length(path: Path, forward_s: list[float], backward_s: list[float], hop_s: float) -> float:
    """The length of a path for given passes."""
    total = path.hops * hop_s
    total += sum(weight * seconds for weight, seconds in zip(path.forward, forward_s, strict=True))
    return total + sum(weight * seconds for weight, seconds in zip(path.backward, backward_s, strict=True))


def makespan_bound(degrees: Degrees, forward_s: list[float], backward_s: list[float], hop_s: float) -> float:
    """The longest bounding path, from the first forward to the last backward of stage 0."""
    if degrees.schedule is Schedule.GPIPE:
        m = degrees.num_micro_batches
        slowest = larger(*forward_s) + larger(*backward_s)
        return sum(forward_s) + sum(backward_s) + (m - 1) * slowest + 2 * (degrees.pp - 1) * hop_s
    return larger(*(length(path, forward_s, backward_s, hop_s) for path in paths(degrees)))
