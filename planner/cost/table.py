"""A schedule's table: for every pipeline rank, its actions in order.

A step of 64 stages and 512 micro-batches has 65,536 actions, so a table keeps each as one number,

    code = ((5 stage + kind) micro_batches + micro_batch),   kinds F B I W and a paired F,

and makes Actions of a row only when the row is asked for. `code // micro_batches` is the action's cell:
what it costs depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from planner.cost.action import Action, ActionKind, Row, parse_row
from planner.cost.flight import Flights, InFlight

if TYPE_CHECKING:
    import numpy as np

    from planner.cost.longest_path import ActionOrder

    Ints = np.ndarray[Any, np.dtype[np.int64]]

KINDS = (
    ActionKind.FORWARD,
    ActionKind.BACKWARD,
    ActionKind.INPUT_GRAD,
    ActionKind.WEIGHT_GRAD,
    ActionKind.FORWARD,
)
"""The kinds by number; the last is a forward that is paired with the backward after it."""
FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD, PAIRED = range(len(KINDS))


def cell(stage: int, kind: ActionKind, *, paired: bool = False) -> int:
    """The number of a stage's actions of one kind."""
    return len(KINDS) * stage + (PAIRED if paired else KINDS.index(kind))


class Table:
    """Rows of actions, one a pipeline rank. Equal where all actions are; never changed once made.

    The order and the counts are made when they are first asked for.
    """

    __slots__ = ("_counts", "_order", "codes", "num_micro_batches", "stages")

    def __init__(self, codes: Iterable[Sequence[int] | Ints], num_micro_batches: int) -> None:
        import numpy as np

        self.codes: tuple[Ints, ...] = tuple(np.asarray(row, dtype=np.int64) for row in codes)
        self.num_micro_batches = num_micro_batches
        last = max((int(row.max()) for row in self.codes if len(row)), default=-1)
        self.stages = last // (num_micro_batches * len(KINDS)) + 1
        self._order: ActionOrder | None = None
        self._counts: tuple[dict[tuple[int, ActionKind], int], ...] | None = None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Table:
        """The table of given rows."""
        m = 1 + max((action.micro_batch for row in rows for action in row), default=0)
        return cls(
            [[cell(a.stage, a.kind, paired=a.paired) * m + a.micro_batch for a in row] for row in rows], m
        )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rank: int) -> Row:
        m, kinds = self.num_micro_batches, len(KINDS)
        return tuple(
            Action(code // m // kinds, KINDS[code // m % kinds], code % m, code // m % kinds == PAIRED)
            for code in self.codes[rank].tolist()
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[rank] for rank in range(len(self)))

    def __eq__(self, other: object) -> bool:
        import numpy as np

        return (
            isinstance(other, Table)
            and (len(self), self.num_micro_batches) == (len(other), other.num_micro_batches)
            and all(np.array_equal(a, b) for a, b in zip(self.codes, other.codes, strict=True))
        )

    def __hash__(self) -> int:
        return hash((len(self), self.stages, self.num_micro_batches))

    @property
    def order(self) -> ActionOrder:
        """The order in which its actions can run. Raises ValueError where the table waits for itself."""
        if self._order is None:
            from planner.cost.longest_path import order_actions

            self._order = order_actions(self)
        return self._order

    @property
    def actions(self) -> int:
        """How many actions there are."""
        return sum(len(row) for row in self.codes)

    def counts(self, rank: int) -> dict[tuple[int, ActionKind], int]:
        """How many actions of each stage and kind a rank runs."""
        if self._counts is None:
            self._counts = tuple(self._counted(row) for row in self.codes)
        return self._counts[rank]

    def _counted(self, row: Ints) -> dict[tuple[int, ActionKind], int]:
        import numpy as np

        found: dict[tuple[int, ActionKind], int] = {}
        counts = np.bincount(row // self.num_micro_batches)
        for number in counts.nonzero()[0].tolist():
            key = number // len(KINDS), KINDS[number % len(KINDS)]
            found[key] = found.get(key, 0) + int(counts[number])
        return found

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank holds, in layer order."""
        return sorted({stage for stage, _ in self.counts(rank)})

    def in_flight(self, rank: int, waits: int) -> Flights:
        """What is in flight by stage at each local maximum of a row, dominated ones left out.

        A micro-batch is alive from its forward to its backward. Where the backward is split, it is so to its
        weight gradients, for W needs what the forward kept; or only to its input gradients, where what waits
        from there on takes at most `waits` times as much (0: it is alive). Then it is told as well whether
        gradients are there yet, and messages are counted.
        """
        import numpy as np

        number = self.codes[rank] // self.num_micro_batches
        stages, kind = self.stages_of(rank), number % len(KINDS)
        own = number // len(KINDS) == np.reshape(stages, (-1, 1))
        if waits:
            vectors = _undominated(_apart(own, kind, waits))
            return tuple(self._flights(stages, each, waits) for each in vectors)
        changes = np.asarray([each.alive_change for each in KINDS])[kind]
        counted = changes != 0
        changes = changes[counted]
        alive = np.cumsum(own[:, counted] * changes, axis=1)
        tops = alive[:, (changes > 0) & (np.append(changes[1:], -1) < 0)]
        if len(stages) == 1:
            tops = tops.max(axis=1, keepdims=True)
        several = self.num_micro_batches > 1
        return tuple(
            {stage: InFlight(count, begun=several) for stage, count in zip(stages, each, strict=True)}
            for each in _undominated(tops)
        )

    def _flights(self, stages: list[int], counts: tuple[int, ...], waits: int) -> dict[int, InFlight]:
        """The counts of a moment (see _apart) with the messages that a rank then holds.

        What it sent stays until an answer shows that it arrived: of the forwards, all until the first
        gradient comes, then one of each stage; of the gradients one. One more is the gradient that a pass
        back begins with. Between two stages of a rank nothing is sent.
        """
        each = len(stages)
        alive, both, begun = counts[:each], counts[each : 2 * each], counts[2 * each :]
        later, near = any(begun), {-1, self.stages, *stages}
        messages = sum(
            (stage + 1 not in near) * (1 if later else count) + (stage - 1 not in near) * later
            for stage, count in zip(stages, alive, strict=True)
        )
        messages += later and stages != [self.stages - 1]
        held = zip(stages, alive, both, begun, strict=True)
        return {
            stage: InFlight(count, (weighted - count) // waits, bool(own), messages)
            for stage, count, weighted, own in held
        }


def _apart(own: Ints, kind: Ints, waits: int) -> Ints:
    """By stage, during each forward and as each pass back begins: micro-batches alive a, a + `waits` w with
    w that wait, and whether a pass back is done; `own` says which actions are the stage's.

    a s + w d <= a' s + w' d for all 0 <= d <= waits s where a <= a' and a + waits w <= a' + waits w': so
    many of these moments need not be looked at.
    """
    import numpy as np

    back, weights = np.isin(kind, (BACKWARD, INPUT_GRAD)), kind == WEIGHT_GRAD
    done = np.cumsum(own * back, axis=1) - own * back  # the pass that runs has not freed anything yet
    alive = np.cumsum(own * ~(back | weights), axis=1) - done
    inputs = kind == INPUT_GRAD
    waiting = np.cumsum(own * (inputs * 1 - weights), axis=1) - own * inputs
    return np.concatenate([alive, alive + waits * waiting, done > 0])[:, ~weights]


def _undominated(vectors: Ints) -> list[tuple[int, ...]]:
    """The distinct columns that no other reaches everywhere and exceeds somewhere, in ascending order.

    Again and again one with the greatest sum, which nothing that is left can exceed.
    """
    import numpy as np

    kept: list[tuple[int, ...]] = []
    vectors = np.asarray(list(set(zip(*vectors.tolist(), strict=True)))).T  # a steady state repeats a few
    while vectors.size:
        greatest = vectors[:, vectors.sum(axis=0).argmax()]
        kept.append(tuple(greatest.tolist()))
        vectors = vectors[:, (vectors > greatest[:, None]).any(axis=0)]
    return sorted(kept)


def parse_table(rows: tuple[tuple[str, ...], ...]) -> Table:
    """The table whose actions print as `rows`. Raises InputError on text that is no action."""
    return Table.of([parse_row(row) for row in rows])


def print_table(table: Table) -> tuple[tuple[str, ...], ...]:
    """The table as text, one tuple a pipeline rank."""
    return tuple(_print_row(row, table.num_micro_batches) for row in table.codes)


def _print_row(codes: Ints, num_micro_batches: int) -> tuple[str, ...]:
    texts: list[str] = []
    first = ""
    for code in codes.tolist():
        number, micro_batch = divmod(code, num_micro_batches)
        stage, kind = divmod(number, len(KINDS))
        text = f"{stage}{KINDS[kind].value}{micro_batch}"
        if kind == PAIRED:
            first = text
            continue
        texts.append(f"({first};{text})OVERLAP_F_B" if first else text)
        first = ""
    return tuple(texts)
