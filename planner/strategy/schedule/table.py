"""A schedule's table: for every pipeline rank, its actions in order.

A step of 64 stages and 512 micro-batches has 65,536 actions, so a table keeps each as one number,

    code = ((5 stage + kind) micro_batches + micro_batch),   kinds F B I W and a paired F,

and makes Actions of a row only when the row is asked for. `code // micro_batches` is the action's cell:
what it costs depends on nothing else.

Actions of a pipeline schedule and their text, which is also torch.distributed.pipelining's.

`2F0` is the forward of micro-batch 0 on stage 2, `2B0` its whole backward. A schedule that splits the
backward has `2I0`, the gradients of the stage's input, and later `2W0`, those of its weights. A forward and
a backward that run as one slot print as `(0F3;3B1)OVERLAP_F_B`: their messages leave together, at its end.

InFlight: the micro-batches that a stage holds something of at one moment, and what they keep.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.foundation.errors import InputError, Problem

if TYPE_CHECKING:
    from planner.foundation.arrays import Ints


class ActionKind(StrEnum):
    """What an action does with its micro-batch."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"

    @property
    def alive_change(self) -> int:
        """What it adds to the micro-batches alive on its stage: activations stay until W has used them."""
        return {"F": 1, "I": 0}.get(self.value, -1)


class Action(NamedTuple):
    """One pass of one micro-batch through one stage.

    `paired` is true of a forward that makes one slot with the backward after it in its row.
    """

    stage: int
    kind: ActionKind
    micro_batch: int
    paired: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Row = tuple[Action, ...]

_ACTION = re.compile(r"^(\d{1,6})([FBIW])(\d{1,6})$")
_PAIR = re.compile(r"^\((\d{1,6}F\d{1,6});(\d{1,6}B\d{1,6})\)OVERLAP_F_B$")


def parse_action(text: str) -> Action:
    """The action that prints as `text`. Raises InputError on any other text."""
    match = _ACTION.match(text)
    if match is None:
        raise InputError(
            Problem(
                where=f"schedule action '{text[:40]}'",
                fault="cannot be read.",
                legal="stage, F, B, I or W, micro-batch, such as 2F0; a pair as (0F3;3B1)OVERLAP_F_B",
            )
        )
    return Action(int(match.group(1)), ActionKind(match.group(2)), int(match.group(3)))


def parse_row(texts: tuple[str, ...]) -> Row:
    """The actions of one row; a pair's text makes two."""
    actions: list[Action] = []
    for text in texts:
        pair = _PAIR.match(text)
        if pair is None:
            actions.append(parse_action(text))
        else:
            actions.append(parse_action(pair.group(1))._replace(paired=True))
            actions.append(parse_action(pair.group(2)))
    return tuple(actions)


class InFlight(NamedTuple):
    """Micro-batches of one stage at one moment of its rank's row.

    `alive` are between their forward and their backward, or its input part; they keep all that the forward
    kept. `waiting` are between input part and weight gradients, where what waits is less. `begun` says
    whether gradients of an earlier micro-batch lie beside them, and `messages` how many hidden states, or
    gradients of them, the rank holds for its neighbours then, besides the inputs of what is alive. `only`
    where the rank has no other stage.
    """

    alive: int = 0
    waiting: int = 0
    begun: bool = True
    messages: int = 0
    only: bool = True

    @property
    def micro_batches(self) -> int:
        """Micro-batches that something is held of."""
        return self.alive + self.waiting

    def kept_bytes(self, saved_bytes: float, waiting_bytes: float) -> float:
        """Bytes that they keep, of a stage that saves so much for one of each (or arrays of such stages)."""
        return self.alive * saved_bytes + self.waiting * waiting_bytes


Flights = tuple[dict[int, InFlight], ...]
"""What is in flight by stage of one rank, at its fullest moments."""


def total_count(flight: dict[int, InFlight]) -> int:
    """Micro-batches in flight on all stages of a rank."""
    return sum(each.micro_batches for each in flight.values())


Fullest = tuple[tuple[int, ...], tuple[int, ...]]
"""Of every stage the micro-batches that are alive, and those that wait, when most are on its rank."""

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

    __slots__ = ("_counts", "codes", "known_order", "num_micro_batches", "stages")

    def __init__(self, codes: Iterable[Sequence[int] | Ints], num_micro_batches: int) -> None:
        import numpy as np

        self.codes: tuple[Ints, ...] = tuple(np.asarray(row, dtype=np.int64) for row in codes)
        self.num_micro_batches = num_micro_batches
        last = max((int(row.max()) for row in self.codes if len(row)), default=-1)
        self.stages = last // (num_micro_batches * len(KINDS)) + 1
        self.known_order: Any = None  # the ActionOrder of planner.strategy.schedule.longest_path, once found
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

        number, stages = self.codes[rank] // self.num_micro_batches, self.stages_of(rank)
        own = number // len(KINDS) == np.reshape(stages, (-1, 1))
        return self.flights(stages, row_moments(own, number % len(KINDS)), waits)

    def flights(self, stages: list[int], found: Moments, waits: int) -> Flights:
        """The same from the moments of a rank that holds `stages`."""
        each = _undominated(found.vectors(waits))
        if waits:
            return tuple(self._flights(stages, counts, waits) for counts in each)
        several = self.num_micro_batches > 1
        return tuple(
            {
                stage: InFlight(count, begun=several, only=len(stages) == 1)
                for stage, count in zip(stages, counts, strict=True)
            }
            for counts in each
        )

    def _flights(self, stages: list[int], counts: tuple[int, ...], waits: int) -> dict[int, InFlight]:
        """The counts of a moment (Moments.vectors) with the messages that a rank then holds.

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
            stage: InFlight(count, (weighted - count) // waits, bool(own), messages, each == 1)
            for stage, count, weighted, own in held
        }


class Moments(NamedTuple):
    """What is in flight at moments of a table's rows, by stage of a rank (down) and moment (across).

    `begun` says whether a pass back of the stage is done, `rank` whose row a moment is of.
    """

    alive: Ints
    waiting: Ints
    begun: Ints
    rank: Ints

    def vectors(self, waits: int) -> Ints:
        """By stage a, a + `waits` w and whether gradients are there, with a alive and w waiting; without
        `waits` a + w.

        a s + w d <= a' s + w' d for all 0 <= d <= waits s where a <= a' and a + waits w <= a' + waits w': so
        many of these moments need not be looked at.
        """
        import numpy as np

        if not waits:
            return self.alive + self.waiting
        return np.concatenate([self.alive, self.alive + waits * self.waiting, self.begun])

    def by_rank(self, ranks: int) -> list[Moments]:
        """Each rank's own."""
        import numpy as np

        ends = np.searchsorted(self.rank, range(ranks + 1)).tolist()
        return [Moments(*(part[..., a:b] for part in self)) for a, b in itertools.pairwise(ends)]

    def fullest(self, ranks: int, waits: int) -> Fullest:
        """On each rank what is in flight when most micro-batches are, of the moments at which all stages have
        gradients, or of all where there is none.

        Of several the first in order of `vectors` that no other dominates. None with fewer does, nor one with
        as many unless `waits` is 1: then more may be alive, and fewer wait.
        """
        import numpy as np

        later = self.begun.all(axis=0) if waits else np.ones(1, dtype=bool)
        held = (self.alive + self.waiting).sum(axis=0)
        held = held + later * (held.max() + 1)
        most = np.maximum.reduceat(held, np.searchsorted(self.rank, range(ranks)))
        full = (held == most[self.rank]).nonzero()[0]
        vectors, rank = self.vectors(waits)[:, full], self.rank[full]
        if waits == 1 and self.waiting.any():
            ends = itertools.pairwise([*np.searchsorted(rank, range(ranks)).tolist(), len(rank)])
            vectors = np.array([_undominated(vectors[:, a:b])[0] for a, b in ends]).T
        else:
            order = np.lexsort([*vectors[::-1], rank])
            vectors = vectors[:, order[np.searchsorted(rank[order], range(ranks))]]
        stages = len(self.alive)
        alive, held = vectors[:stages], vectors[stages : 2 * stages] if waits else vectors
        return tuple(alive.ravel().tolist()), tuple(((held - alive) // max(waits, 1)).ravel().tolist())


def row_moments(own: Ints, kind: Ints, starts: Sequence[int] | Ints = (0,)) -> Moments:
    """Of rows one after another, the moments at which a pass back begins or a forward ends.

    Forwards before another forward or a pass back are left out, for the next moment holds as much. `own` says
    by stage of a rank which actions are the stage's, and `starts` where each row begins.
    """
    import numpy as np

    backs, weights = (kind == BACKWARD) | (kind == INPUT_GRAD), kind == WEIGHT_GRAD
    forwards, inputs = ~(backs | weights), kind == INPUT_GRAD
    ends = np.append(weights, True) & np.append(False, forwards)  # and the last action of all may be one
    where = (np.append(backs, False) | ends).nonzero()[0]
    rank = np.searchsorted(starts, where, side="right") - 1
    since = np.asarray(starts)[rank]

    def before(change: Ints) -> Ints:
        sums = np.zeros((len(own), len(kind) + 1), dtype=np.int64)
        np.cumsum(own * change, axis=1, out=sums[:, 1:])
        counts: Ints = sums[:, where] - sums[:, since]
        return counts

    done = before(backs * 1)
    alive, waiting = before(forwards * 1) - done, before(inputs * 1 - weights)
    return Moments(alive, waiting, (done > 0) * 1, rank)


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


PARSED_TABLES = 8
"""Number of parsed tables that are cached: a command reads one or two plans and uses their tables often."""


@lru_cache(maxsize=PARSED_TABLES)
def parse_table(rows: tuple[tuple[str, ...], ...]) -> Table:
    """Return the table whose actions print as `rows`. Raises InputError on text that is no action."""
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
