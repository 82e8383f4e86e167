"""Schedules that fill bubbles with weight gradients: zb-h1, zbv and dualpipev.

Their rows are those of ScheduleInterleavedZeroBubble with one stage a rank, ScheduleZBVZeroBubble and
ScheduleDualPipeV of torch.distributed.pipelining, action by action. Sources: zero bubble
(arXiv 2401.10241: ZB-H1 in section 2, ZB-V in section 6); DualPipe (arXiv 2412.19437) and its V form
(github.com/deepseek-ai/DualPipe).

Under V placement rank r of p holds stage r on the way down and stage 2 p - 1 - r on the way up, so the last
rank holds the two in the middle and rank 0 both ends.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from planner.strategy.schedule.action import ActionKind
from planner.strategy.schedule.table import cell

if TYPE_CHECKING:
    from planner.strategy.schedule.table import Ints

F, B, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT_GRAD
IN = ActionKind.INPUT_GRAD


class _RowWriter:
    """Writes a row in blocks, each stage's actions of a kind in order of micro-batch.

    Micro-batches that a step does not have are left out.
    """

    def __init__(self, num_micro_batches: int) -> None:
        self.blocks: list[Ints] = []
        self.done: Counter[tuple[int, ActionKind]] = Counter()
        self.num_micro_batches = num_micro_batches

    def rounds(self, count: int, *actions: tuple[int, ActionKind], paired: bool = False) -> Ints:
        """Writes `count` times the actions given as (stage, kind). Returns what was written.

        Where `paired`, each forward is paired with what follows. A B is an I and its W in one; no earlier W
        waits when it comes.
        """
        self.blocks.append(self.take(count, *actions, paired=paired))
        return self.blocks[-1]

    def take(self, count: int, *actions: tuple[int, ActionKind], paired: bool = False) -> Ints:
        """The same, not yet written."""
        import numpy as np

        m = self.num_micro_batches
        step = np.arange(count)[:, None]
        next_ = [self.done[stage, IN if kind is B else kind] for stage, kind in actions]
        first = [
            cell(stage, kind, paired=paired and kind is F) * m + micro_batch
            for (stage, kind), micro_batch in zip(actions, next_, strict=True)
        ]
        codes: Ints = (step + first).ravel()
        if max(next_) + count > m:
            codes = codes[(step + next_).ravel() < m]
        for stage, kind in actions:
            for each in (IN, W) if kind is B else (kind,):
                self.done[stage, each] += count
        return codes

    @property
    def codes(self) -> Ints:
        """The row."""
        import numpy as np

        return np.concatenate(self.blocks)


def zb_h1_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Ints:
    """1F1B's order; rank r does weight gradients r late, so that each rank keeps min(m, p) alive."""
    import numpy as np

    m = num_micro_batches
    ahead, late = min(pp - 1 - rank, m), min(rank, m)
    step = np.arange(m)
    micro_batch = np.stack([step + ahead, step, step - late], axis=1)
    first = np.array([cell(rank, kind) * m for kind in (F, IN, W)])
    steady = (first + micro_batch)[(micro_batch >= 0) & (micro_batch < m)]
    return np.concatenate([first[0] + step[:ahead], steady, first[2] + step[m - late :]])


def zbv_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Ints:
    """ZB-V: no bubble where F, I and W take as long. Both stages together keep at most 2 p micro-batches.

    Written for at least 2 p - 1 micro-batches; of fewer, the actions that remain.
    """
    row = _RowWriter(num_micro_batches)
    first, second, most = rank, 2 * pp - 1 - rank, max(2 * pp - 1, num_micro_batches)
    down, up = [(first, kind) for kind in (F, IN, W)], [(second, kind) for kind in (F, IN, W)]
    row.rounds(2 * (pp - rank) - 1, (first, F))
    row.rounds(rank, (second, F), (first, F))
    row.rounds(pp - rank, *up)
    row.rounds(most - row.done[first, F], *down, *up)
    row.rounds(most - row.done[second, F], *down[1:], *up)
    row.rounds(rank, (first, IN), (second, IN))
    row.rounds(pp - rank, *down[1:])
    row.rounds(rank, (second, W))
    row.rounds(rank, (first, W))
    return row.codes


def dualpipev_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Ints:
    """DualPipeV: in the steady state a forward of one stage overlaps a backward of the other."""
    row = _RowWriter(num_micro_batches)
    first, second, after = rank, 2 * pp - 1 - rank, pp - 1 - rank
    row.rounds(2 * after, (first, F))
    row.rounds(rank + 1, (first, F), (second, F))
    row.rounds(after, (second, IN), (second, W), (second, F))
    steady = num_micro_batches - 2 * pp + rank + 1
    if steady and rank == pp - 1:  # the turn of the V: apart, the last rank begins earlier
        row.rounds(1, (first, F), (second, B))
        row.rounds(1, (second, F), (first, B), paired=True)
        steady -= 1
    row.rounds(steady, (first, F), (second, B), (second, F), (first, B), paired=True)
    row.rounds(after, (second, B), (second, F), (first, B), paired=True)
    _drain(row, first, second, rank, after)
    return row.codes


def _drain(row: _RowWriter, first: int, second: int, rank: int, after: int) -> None:
    """Backwards only; from the middle on their weight gradients come later, into the bubble, oldest first."""
    import numpy as np

    half, odd = (rank + 1) // 2, rank % 2 == 1
    row.rounds(half, (second, B), (first, B))
    middle = row.rounds(1, (second, IN if odd else B), (first, IN))[0 if odd else 1 :]
    later = row.rounds(rank - half, (second, IN), (first, IN))
    last = row.take(after, (first, IN))
    kinds = cell(first, W) - cell(first, IN)
    weights = np.concatenate([middle, later, last]) + kinds * row.num_micro_batches
    row.blocks += [np.stack([weights[:after], last], axis=1).ravel(), weights[after:]]
