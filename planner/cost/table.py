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
PAIRED = len(KINDS) - 1


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

    def in_flight(self, rank: int) -> tuple[dict[int, int], ...]:
        """Counts of live micro-batches by stage at each local maximum of a row, dominated ones left out.

        A micro-batch is alive from its forward to its backward, or to its weight gradients where the
        backward is split: W needs the inputs that the forward kept.
        """
        import numpy as np

        number = self.codes[rank] // self.num_micro_batches
        changes = np.asarray([each.alive_change for each in KINDS])[number % len(KINDS)]
        counted = changes != 0
        stage, changes = number[counted] // len(KINDS), changes[counted]
        stages = self.stages_of(rank)
        alive = np.cumsum((stage == np.reshape(stages, (-1, 1))) * changes, axis=1)
        tops = alive[:, (changes > 0) & (np.append(changes[1:], -1) < 0)]
        if len(stages) == 1:
            return ({stages[0]: int(tops.max())},)
        return tuple(dict(zip(stages, counts, strict=True)) for counts in _undominated(tops))


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
