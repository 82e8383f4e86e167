"""Paths through a schedule's table that bound its makespan from below, linear in the stages' times.

A schedule's makespan is the longest path through its actions, so the length of any path is a lower bound.
With f_i and b_i the passes of stage i, t_i = f_i + b_i, m micro-batches, p ranks, w_i = min(p - 1 - i,
m - 1) forwards ahead, and S_i = sum of t_j over stages after i:

    GPipe        sum f + (m - 1) max f + sum b + (m - 1) max b                              (exact)
    1F1B, all i  sum_{j<i} t_j + (m - w_i) t_i + start + end                                 (exact if even)
                 start one of w_i f_i, S_i; end one of w_i b_i, S_i; both S_i only if m >= w_i + 2
    interleaved  sum_{j<s} f_j + row of rank r from the first forward of its stage s to the last backward
                 of its stage s' + sum_{j<s'} b_j, all s, s' on r                            (exact if even)

A hop between ranks adds its message time. A path is written as weights on f and b of every stage plus a
constant number of hops; the ILP takes each as a constraint.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from planner.cost.schedule import Action, ActionKind, build_table
from planner.strategy import Degrees, Schedule


class Path(NamedTuple):
    """Length of a path: sum of forward[i] f_i + backward[i] b_i over stages, plus hops messages."""

    name: str
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    hops: int


def paths(degrees: Degrees) -> list[Path]:
    """The bounding paths of a schedule other than GPipe, whose two maxima are modelled as such."""
    if degrees.schedule is Schedule.INTERLEAVED:
        return _interleaved(degrees)
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


def _interleaved(degrees: Degrees) -> list[Path]:
    """Paths that run along one row, entered through the stages before and left through them again."""
    last = degrees.num_micro_batches - 1
    table = build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)
    result = []
    for rank, row in enumerate(table):
        held = range(rank, degrees.stages, degrees.pp)
        starts = {s: row.index(Action(s, ActionKind.FORWARD, 0)) for s in held}
        ends = {s: row.index(Action(s, ActionKind.BACKWARD, last)) for s in held}
        for first in held:
            for final in held:
                along = Counter((a.stage, a.kind) for a in row[starts[first] : ends[final] + 1])
                forward = [float(along[(s, ActionKind.FORWARD)] + (s < first)) for s in range(degrees.stages)]
                backward = [
                    float(along[(s, ActionKind.BACKWARD)] + (s < final)) for s in range(degrees.stages)
                ]
                name = f"rank{rank}_{first}_{final}"
                result.append(Path(name, tuple(forward), tuple(backward), first + final))
    return result


def length(path: Path, forward_s: list[float], backward_s: list[float], hop_s: float) -> float:
    """The length of a path for given passes."""
    total = path.hops * hop_s
    total += sum(weight * seconds for weight, seconds in zip(path.forward, forward_s, strict=True))
    return total + sum(weight * seconds for weight, seconds in zip(path.backward, backward_s, strict=True))


def makespan_bound(degrees: Degrees, forward_s: list[float], backward_s: list[float], hop_s: float) -> float:
    """The longest bounding path, from the first forward to the last backward of stage 0."""
    if degrees.schedule is Schedule.GPIPE:
        m = degrees.num_micro_batches
        slowest = max(forward_s) + max(backward_s)
        return sum(forward_s) + sum(backward_s) + (m - 1) * slowest + 2 * (degrees.pp - 1) * hop_s
    return max(length(path, forward_s, backward_s, hop_s) for path in paths(degrees))
