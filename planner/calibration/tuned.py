"""The micro-batch of a run that states none: whoever reports a run has tried some and kept the fastest.

Tables leave it out more often than any other degree (arXiv 2104.04473, table 1: tuned for each row).
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.cost.evaluate import CostModel
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Verdict
from planner.strategy.strategy import Strategy

MOST = 16
"""Sequences of the largest micro-batch that is tried."""


def tried_micro_batches(share: int) -> tuple[int, ...]:
    """What one would try for a data rank's share of the batch: powers of 2 that divide it."""
    powers = (1 << power for power in range(MOST.bit_length()))
    return tuple(size for size in powers if share % size == 0)


def fastest_that_fits(problem: PlanningProblem, strategies: Iterable[Strategy]) -> tuple[Strategy, bool]:
    """The strategy of the least predicted step time, SAFE before RISKY before NO, and whether it fits."""
    model, order = CostModel(problem), list(Verdict)
    estimates = [(strategy, model.evaluate(strategy).estimate) for strategy in strategies]
    best, estimate = min(estimates, key=lambda each: (order.index(each[1].verdict), each[1].step_time_s))
    return best, estimate.verdict is not Verdict.NO
