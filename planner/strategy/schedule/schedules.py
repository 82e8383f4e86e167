"""Pipeline schedules: for each, the row of actions that every pipeline rank runs.

The same table is simulated, written into plan.json and executed. With p ranks, m micro-batches, v stages a
rank, and even stages of which each takes f, b = i + w for a micro-batch (i input, w weight gradients), a
step takes its work, m v (f + b), and this bubble:

    schedule      v             bubble                            alive at most
    gpipe         1             (p - 1)(f + b)                    m
    1f1b          1             (p - 1)(f + b)                    min(m, p - r) on rank r
    interleaved   any           (p - 1)(f + b)                    by Table.in_flight
    zb-h1         1             (p - 1)(f + i - w)                min(m, p)
    zbv           2, as a V     (p - 1) f                         2 p - r and r + 1, together 2 p
    dualpipev     2, as a V     (p - 1)(f + 2 b - 3 w)            2 p - r and r + 1, together 2 p + 1

That of zb-h1 needs m >= p; those of the Vs f = i = w, and zbv's m >= 2 p - 1.

Sources: GPipe (arXiv 1811.06965); 1F1B (PipeDream-flush, arXiv 2006.09503); interleaved 1F1B (Megatron-LM,
arXiv 2104.04473); zero bubble (arXiv 2401.10241); DualPipe (arXiv 2412.19437).

Schedules that fill bubbles with weight gradients: zb-h1, zbv and dualpipev.

Their rows are those of ScheduleInterleavedZeroBubble with one stage a rank, ScheduleZBVZeroBubble and
ScheduleDualPipeV of torch.distributed.pipelining, action by action. Sources: zero bubble
(arXiv 2401.10241: ZB-H1 in section 2, ZB-V in section 6); DualPipe (arXiv 2412.19437) and its V form
(github.com/deepseek-ai/DualPipe).

Under V placement rank r of p holds stage r on the way down and stage 2 p - 1 - r on the way up, so the last
rank holds the two in the middle and rank 0 both ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from planner.strategy.schedule.table import (
    KINDS,
    Action,
    ActionKind,
    Flights,
    Fullest,
    Moments,
    Row,
    Table,
    cell,
    parse_action,
    parse_table,
    print_table,
    row_moments,
)
from planner.strategy.strategy import Schedule

if TYPE_CHECKING:
    from planner.foundation.arrays import Ints


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


__all__ = [
    "Action",
    "ActionKind",
    "Row",
    "Table",
    "build_table",
    "fullest",
    "in_flight",
    "parse_action",
    "parse_table",
    "peak_in_flight",
    "print_table",
    "table_faults",
]


TABLES = 32
"""Tables that are remembered: with its order, one of 64 stages x 512 micro-batches has 6 MB."""
COUNTED = 4096
"""Of so many tables it is remembered what is in flight: a few numbers a rank."""


@lru_cache(maxsize=TABLES)
def build_table(schedule: Schedule, pp: int, chunks: int, num_micro_batches: int) -> Table:
    """The table of `schedule` for `pp` pipeline ranks with `chunks` stages each.

    Stage s lives on pipeline rank s mod pp, or under V placement on s and 2 pp - 1 - s. Interleaved needs
    num_micro_batches to be a multiple of pp, dualpipev at least 2 pp of them.
    """
    if pp < 1 or chunks < 1 or num_micro_batches < 1:
        raise ValueError(f"pp={pp}, chunks={chunks} and micro-batches={num_micro_batches} must be positive")
    if schedule is not Schedule.INTERLEAVED and chunks != schedule.least_chunks:
        raise ValueError(f"{schedule} holds {schedule.least_chunks} stages a rank, not {chunks}")
    if schedule is Schedule.INTERLEAVED and num_micro_batches % pp:
        raise ValueError(f"interleaved needs a multiple of {pp} micro-batches, not {num_micro_batches}")
    if schedule is Schedule.DUALPIPEV and num_micro_batches < 2 * pp:
        raise ValueError(f"dualpipev needs {2 * pp} micro-batches or more, not {num_micro_batches}")
    row = _ROWS[schedule]
    return Table([row(rank, pp, chunks, num_micro_batches) for rank in range(pp)], num_micro_batches)


def in_flight(
    schedule: Schedule, pp: int, chunks: int, num_micro_batches: int, waits: int
) -> tuple[Flights, ...]:
    """What Table.in_flight counts on every rank of the table of `schedule`."""
    return _in_flight(*_short_table(schedule, pp, chunks, num_micro_batches, waits))


@lru_cache(maxsize=COUNTED)
def _in_flight(
    schedule: Schedule, pp: int, chunks: int, micro_batches: int, more: int, waits: int
) -> tuple[Flights, ...]:
    table, found = _moments(schedule, pp, chunks, micro_batches, more)
    return tuple(
        table.flights(table.stages_of(rank), each, waits) for rank, each in enumerate(found.by_rank(pp))
    )


def fullest(schedule: Schedule, pp: int, chunks: int, num_micro_batches: int, waits: int) -> Fullest:
    """What in_flight has on every rank when most are in flight and gradients are there: the first such."""
    return _fullest(*_short_table(schedule, pp, chunks, num_micro_batches, waits))


@lru_cache(maxsize=COUNTED)
def _fullest(schedule: Schedule, pp: int, chunks: int, micro_batches: int, more: int, waits: int) -> Fullest:
    _, found = _moments(schedule, pp, chunks, micro_batches, more)
    return found.fullest(pp, waits)


def _short_table(
    schedule: Schedule, pp: int, chunks: int, num_micro_batches: int, waits: int
) -> tuple[Schedule, int, int, int, int, int]:
    """What to ask of the shortest table that tells as much: its micro-batches, how many more are alive at
    every moment than it says, and `waits`.

    A row runs forwards ahead, then rounds that take in as many micro-batches of each stage as they finish,
    then what is left. Once all stages have had a pass back, each further round repeats the moments of the one
    before, and moves what is left without changing it.

    Interleaved, a round has p micro-batches, v p forwards each with a backward after it, and fewer than
    (v + 1) p forwards run ahead. So with 4 p micro-batches at least 4 v p - (v + 1) p >= 2 v p such pairs are
    in rounds: the first passes back of all stages, and one round more. Elsewhere a round has one micro-batch;
    forwards ahead and weight gradients late are p - 1 on a rank of 1F1B and zb-h1, and fewer than 2 p on one
    of a V. So p v + 1 micro-batches have one round after the first passes back; one more is a margin.

    GPipe has no rounds: all are alive at its first pass back, and one fewer at its second. Where no backward
    is split, nothing waits.
    """
    short, more = num_micro_batches, 0
    if schedule is Schedule.GPIPE:
        short = min(2, short)
        more = num_micro_batches - short
    else:
        steady = 4 * pp + short % pp if schedule is Schedule.INTERLEAVED else pp * chunks + 2
        short = min(steady, short)  # with what interleaved refuses to split into rounds, still refused
    return schedule, pp, chunks, short, more, waits if schedule.splits_backward else min(waits, 1)


@lru_cache(maxsize=TABLES)
def _moments(
    schedule: Schedule, pp: int, chunks: int, micro_batches: int, more: int
) -> tuple[Table, Moments]:
    """A table and the moments of its rows, `more` micro-batches alive at each."""
    import numpy as np

    table = build_table(schedule, pp, chunks, micro_batches)
    stage, kind = np.divmod(np.concatenate(table.codes) // micro_batches, len(KINDS))
    own = stage // pp == np.arange(chunks)[:, None]  # so under both placements, in layer order
    found = row_moments(own, kind, np.cumsum([0, *map(len, table.codes[:-1])]))
    return table, found._replace(alive=found.alive + more)


def _run(stage: int, kind: ActionKind, num_micro_batches: int) -> Ints:
    """A stage's actions of one kind, as codes in order of micro-batch."""
    import numpy as np

    first = cell(stage, kind) * num_micro_batches
    return np.arange(first, first + num_micro_batches)


def _gpipe_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Ints:
    import numpy as np

    forwards = _run(rank, ActionKind.FORWARD, num_micro_batches)
    return np.concatenate([forwards, _run(rank, ActionKind.BACKWARD, num_micro_batches)])


def _one_f_one_b_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Ints:
    """Rank i of p runs p - 1 - i forwards ahead, then alternates, so it keeps min(m, p - i) alive."""
    forwards = _run(rank, ActionKind.FORWARD, num_micro_batches)
    backwards = _run(rank, ActionKind.BACKWARD, num_micro_batches)
    return _alternate(forwards, backwards, warmup=pp - 1 - rank)


def _interleaved_row(rank: int, pp: int, chunks: int, num_micro_batches: int) -> Ints:
    """Micro-batches go through the chunks in rounds of p; (p - 1 - i) * 2 + (v - 1) * p run ahead."""
    import numpy as np

    each = range(chunks)
    down = [_run(chunk * pp + rank, ActionKind.FORWARD, num_micro_batches) for chunk in each]
    up = [_run(chunk * pp + rank, ActionKind.BACKWARD, num_micro_batches) for chunk in reversed(each)]
    forwards, backwards = (
        np.stack(runs).reshape(chunks, -1, pp).swapaxes(0, 1).ravel() for runs in (down, up)
    )
    return _alternate(forwards, backwards, warmup=(pp - 1 - rank) * 2 + (chunks - 1) * pp)


def _alternate(forwards: Ints, backwards: Ints, *, warmup: int) -> Ints:
    import numpy as np

    ahead = min(warmup, len(forwards))
    steady = np.stack([forwards[ahead:], backwards[: len(forwards) - ahead]], axis=1).ravel()
    return np.concatenate([forwards[:ahead], steady, backwards[len(forwards) - ahead :]])


_ROWS: dict[Schedule, Callable[[int, int, int, int], Ints]] = {
    Schedule.GPIPE: _gpipe_row,
    Schedule.ONE_F_ONE_B: _one_f_one_b_row,
    Schedule.INTERLEAVED: _interleaved_row,
    Schedule.ZB_H1: zb_h1_row,
    Schedule.ZBV: zbv_row,
    Schedule.DUALPIPEV: dualpipev_row,
}


def peak_in_flight(row: Row) -> dict[int, int]:
    """For every stage of a row, the most micro-batches that it keeps: from F to B, or to W where split."""
    alive: dict[int, int] = {}
    peak: dict[int, int] = {}
    for action in row:
        alive[action.stage] = alive.get(action.stage, 0) + action.kind.alive_change
        peak[action.stage] = max(peak.get(action.stage, 0), alive[action.stage])
    return peak


_NEXT = {
    "": (ActionKind.FORWARD,),
    "F": (ActionKind.BACKWARD, ActionKind.INPUT_GRAD),
    "FI": (ActionKind.WEIGHT_GRAD,),
}
"""What may follow on a (stage, micro-batch) after the actions given."""


def table_faults(
    table: Table, stages: int, num_micro_batches: int, rank_of: Callable[[int], int] | None = None
) -> list[str]:
    """What is wrong with a table: every (stage, micro-batch) needs F then B, or F then I then W.

    `rank_of` is the row that holds a stage; without it any row may, but only one.
    """
    faults: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    homes: dict[int, int] = {}
    for rank, row in enumerate(table):
        for index, action in enumerate(row):
            home = homes.setdefault(action.stage, rank) if rank_of is None else rank_of(action.stage)
            if home != rank or action.stage >= stages:
                faults.append(f"{action} stands in row {rank}, which does not hold that stage")
            if action.micro_batch >= num_micro_batches:
                faults.append(f"{action} in row {rank} is of no micro-batch: there are {num_micro_batches}")
            key = (action.stage, action.micro_batch)
            before = seen.get(key, "")
            if action.kind not in _NEXT.get(before, ()):
                faults.append(f"{action} in row {rank} is out of order or repeated")
            seen[key] = before + action.kind
            if action.paired and not _pairs(row, index):
                faults.append(f"{action} in row {rank} is paired with no backward")
    wanted = [(stage, mb) for stage in range(stages) for mb in range(num_micro_batches)]
    missing = [f"{stage}/{mb}" for stage, mb in wanted if seen.get((stage, mb)) not in ("FB", "FIW")]
    if missing:
        faults.append(f"stage/micro-batch without forward and backward: {', '.join(missing[:5])}")
    return faults


def _pairs(row: Row, index: int) -> bool:
    """Whether a backward follows the forward at `index`, as a pair needs."""
    return index + 1 < len(row) and row[index + 1].kind is ActionKind.BACKWARD
