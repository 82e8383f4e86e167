"""How many blocks each stage may hold for a shape to beat a step time, and all ways to deal them.

With t(n) the least passes of a stage of n blocks, W those of the whole model, p ranks and m micro-batches, a
step takes at least

    1F1B, m > p    2 W + (m - p - 1) t(n) + 2 (p - 1) h        for every stage (*)
    all            m t(r)                                      for every rank r

besides what its rank gathers before, reduces after and updates at least (planner.search.stage_space), so
stages that are too large are left out, and those that would leave too much to the others. (*) With i the
stage that takes longest, the path with both detours (planner.strategy.schedule.makespan_paths) has
2 W - sum_{j<i} t_j + (m - w_i - 2) t_i, of which the sum is at most i t_i; any other stage takes no longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TRIES = 20
"""Partial ways that are looked at for each way that is asked for, before there are too many."""


Limits = tuple[tuple[int, int], ...]
"""Least and most of each of some parts."""


class Sizes(NamedTuple):
    """Blocks that each stage, and each rank with all its stages, may hold: least and most."""

    stages: Limits
    ranks: Limits


def narrowed(limits: Sequence[tuple[int, int]], total: int) -> Limits | None:
    """Limits of parts of a total, less what the others' limits rule out. None where there is no way."""
    least, most = sum(low for low, _ in limits), sum(high for _, high in limits)
    if any(low > high for low, high in limits) or not least <= total <= most:
        return None
    return tuple((max(low, total - (most - high)), min(high, total - (least - low))) for low, high in limits)


def whole(parts: Sequence[float], total: int) -> list[int]:
    """Whole numbers near some parts that add up to a total."""
    found = [int(part) for part in parts]
    order = sorted(range(len(found)), key=lambda n: (found[n] - parts[n], n))
    for number in range(total - sum(found)):
        found[order[number % len(order)]] += 1
    for number in range(sum(found) - total):
        found[order[-1 - number % len(order)]] -= 1
    return found


def splits(sizes: Sizes, total: int, rank_of: Sequence[int], most: int) -> list[tuple[int, ...]] | None:
    """Every way to deal `total` blocks to stages within limits; None where there are more than `most`."""
    stages = sizes.stages
    after = [(0, 0)]
    for low, high in reversed(stages):
        after.append((after[-1][0] + low, after[-1][1] + high))
    after.reverse()
    last_of = {rank: stage for stage, rank in enumerate(rank_of)}
    found: list[tuple[int, ...]] = []
    held = [0] * len(sizes.ranks)
    chosen: list[int] = []

    tried = 0

    def extend(stage: int, left: int) -> bool:
        nonlocal tried
        tried += 1
        if stage == len(stages):
            found.append(tuple(chosen))
        if len(found) > most or tried > TRIES * most:
            return False
        if stage == len(stages):
            return True
        rank = rank_of[stage]
        least_after, most_after = after[stage + 1]
        low, high = max(stages[stage][0], left - most_after), min(stages[stage][1], left - least_after)
        rank_low, rank_high = sizes.ranks[rank]
        high = min(high, rank_high - held[rank])
        if last_of[rank] == stage:
            low = max(low, rank_low - held[rank])
        for size in range(low, high + 1):
            chosen.append(size)
            held[rank] += size
            going = extend(stage + 1, left - size)
            held[rank] -= size
            chosen.pop()
            if not going:
                return False
        return True

    return found if extend(0, total) else None
