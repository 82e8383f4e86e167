"""Schedules that fill bubbles with weight gradients: zb-h1, zbv and dualpipev.

Their rows are those of ScheduleInterleavedZeroBubble with one stage a rank, ScheduleZBVZeroBubble and
ScheduleDualPipeV of torch.distributed.pipelining, action by action. Sources: zero bubble
(arXiv 2401.10241: ZB-H1 in section 2, ZB-V in section 6); DualPipe (arXiv 2412.19437) and its V form
(github.com/deepseek-ai/DualPipe).

Under V placement rank r of p holds stage r on the way down and stage 2 p - 1 - r on the way up, so the last
rank holds the two in the middle and rank 0 both ends.
"""

from __future__ import annotations

from collections import deque

from planner.cost.action import ActionKind
from planner.cost.table import cell

F, B, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT_GRAD
IN = ActionKind.INPUT_GRAD


class _RowWriter:
    """Writes a row, each stage's actions of a kind in order of micro-batch.

    Input gradients queue their weight gradients, oldest first. Micro-batches that a step does not have
    are left out.
    """

    def __init__(self, num_micro_batches: int) -> None:
        self.codes: list[int] = []
        self.done: dict[tuple[int, ActionKind], int] = {}
        self.pending: deque[tuple[int, int]] = deque()
        self._num_micro_batches = num_micro_batches

    def next(self, stage: int, kind: ActionKind) -> int:
        """The micro-batch that the stage's next action of this kind is for; B counts as an I."""
        return self.done.get((stage, IN if kind is B else kind), 0)

    def add(self, stage: int, *kinds: ActionKind, paired: bool = False) -> None:
        """The stage's next action of each kind."""
        for kind in kinds:
            if kind is W:
                self.add_weight_grad(stage)
                continue
            micro_batch = self.next(stage, kind)
            self.done[stage, IN if kind is B else kind] = micro_batch + 1
            self._write(stage, kind, micro_batch, paired=paired)
            if kind is IN:
                self.pending.append((stage, micro_batch))

    def add_weight_grad(self, stage: int | None = None) -> None:
        """The oldest weight gradient that waits, of any stage or of one; nothing where none waits."""
        item = next((item for item in self.pending if stage is None or item[0] == stage), None)
        if item is not None:
            self.pending.remove(item)
            self._write(item[0], W, item[1])

    def overlap(self, forward: int, backward: int) -> None:
        """A forward of one stage and a backward of another as one slot."""
        self.add(forward, F, paired=True)
        self.add(backward, B)

    def rounds(self, count: int, *actions: tuple[int, ActionKind, bool]) -> None:
        """`count` times the actions given as (stage, kind, paired), none of which is left out.

        A W among them is that of the I before it: no weight gradient waits.
        """
        block = [0] * (len(actions) * count)
        for place, (stage, kind, paired) in enumerate(actions):
            done = self.next(stage, IN if kind is W else kind) - (count if kind is W else 0)
            first = cell(stage, kind, paired=paired) * self._num_micro_batches + done
            block[place :: len(actions)] = range(first, first + count)
            if kind is not W:
                self.done[stage, IN if kind is B else kind] = done + count
        self.codes += block

    def _write(self, stage: int, kind: ActionKind, micro_batch: int, *, paired: bool = False) -> None:
        if micro_batch < self._num_micro_batches:
            number = cell(stage, kind, paired=paired)
            self.codes.append(number * self._num_micro_batches + micro_batch)


def zb_h1_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> list[int]:
    """1F1B's order; rank r does weight gradients r late, so that each rank keeps min(m, p) alive."""
    m = num_micro_batches
    forwards, inputs, weights = (range(cell(rank, kind) * m, cell(rank, kind) * m + m) for kind in (F, IN, W))
    ahead, late = min(pp - 1 - rank, m), min(rank, m)
    row = [*forwards[:ahead]]
    for step in range(m):
        if ahead + step < m:
            row.append(forwards[ahead + step])
        row.append(inputs[step])
        if step >= late:
            row.append(weights[step - late])
    return [*row, *weights[m - late :]]


def zbv_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> list[int]:
    """ZB-V: no bubble where F, I and W take as long. Both stages together keep at most 2 p micro-batches.

    Written for at least 2 p - 1 micro-batches; of fewer, the actions that remain.
    """
    row = _RowWriter(num_micro_batches)
    first, second, least = rank, 2 * pp - 1 - rank, max(2 * pp - 1, num_micro_batches)
    row.add(first, *[F] * (2 * (pp - rank) - 1))
    for _ in range(rank):
        row.add(second, F)
        row.add(first, F)
    for _ in range(pp - rank):
        row.add(second, F, IN, W)
    if least == num_micro_batches:
        split = [(stage, kind, False) for stage in (first, second) for kind in (F, IN, W)]
        row.rounds(least - row.next(first, F), *split)
    while row.next(second, F) < row.next(first, F) or row.next(first, F) < least:
        if row.next(first, F) < least:
            row.add(first, F)
        row.add(first, IN, W)
        row.add(second, F, IN, W)
    for _ in range(rank):
        row.add(first, IN)
        row.add(second, IN)
    for _ in range(pp - rank):
        row.add(first, IN, W)
    row.add(second, *[W] * rank)
    row.add(first, *[W] * rank)
    return row.codes


def dualpipev_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> list[int]:
    """DualPipeV: in the steady state a forward of one stage overlaps a backward of the other."""
    row = _RowWriter(num_micro_batches)
    first, second, after = rank, 2 * pp - 1 - rank, pp - 1 - rank
    row.add(first, *[F] * (2 * after))
    for _ in range(rank + 1):
        row.add(first, F)
        row.add(second, F)
    for _ in range(after):
        row.add(second, IN, W, F)
    steady = num_micro_batches - 2 * pp + rank + 1
    if steady and rank == pp - 1:  # the turn of the V: apart, the last rank begins earlier
        row.add(first, F)
        row.add(second, B)
        row.overlap(second, first)
        steady -= 1
    row.rounds(steady, (first, F, True), (second, B, False), (second, F, True), (first, B, False))
    for _ in range(after):
        row.add(second, B)
        row.overlap(second, first)
    _drain(row, first, second, rank, after)
    return row.codes


def _drain(row: _RowWriter, first: int, second: int, rank: int, after: int) -> None:
    """Backwards only; from the middle on their weight gradients come later, into the bubble."""
    half, odd = (rank + 1) // 2, rank % 2 == 1
    for step in range(rank + 1):
        row.add(second, IN if step > half or (step == half and odd) else B)
        row.add(first, IN if step >= half else B)
    for _ in range(after):
        row.add_weight_grad()
        row.add(first, IN)
    for _ in range(rank + 1):
        row.add_weight_grad()
