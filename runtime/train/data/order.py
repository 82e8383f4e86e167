"""The order in which data is read: a pure function of (seed, global sample index).

Neither the number of ranks nor the layout enters, so a run can go on under any other plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from planner.foundation.errors import InputError, Problem
from runtime.train.data.prepare import TokenData

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MASK = (1 << 64) - 1
MIXING_BLOCK = 1000
"""Of so many samples in a row each source has its exact share, rounded to whole samples."""


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every input bit reaches every output bit.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def permute(offset: int, size: int, key: int, rounds: int = 6) -> int:
    """Where `offset` goes in the permutation of range(size) that `key` names.

    A Feistel network over the next even number of bits, walked until it lands below `size` (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): no table, so the size of the data does not
    matter, and no library's random stream, which may change between its versions.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = offset >> half, offset & mask
        for number in range(rounds):
            left, right = right, left ^ (_mix(right ^ _mix(key + number)) & mask)
        offset = left << half | right
        if offset < size:
            return offset


def shares(weights: Sequence[float], size: int = MIXING_BLOCK) -> tuple[int, ...]:
    """`size` dealt out by weight in whole numbers, largest remainders first."""
    total = sum(weights)
    exact = [size * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    left = size - sum(counts)
    for place in sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))[:left]:
        counts[place] += 1
    return tuple(counts)


@cache
def turns(counts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Who has each turn of a block, and which of its own it is: turn k of n is due at (k + 1/2) / n."""
    due = sorted(((k + 0.5) / n, part, k) for part, n in enumerate(counts) for k in range(n))
    return tuple((part, k) for _, part, k in due)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReader:
    """The global batches of a run. Sample k of step s is global sample s * batch + k of the order.

    `weights` has one weight for each part of the data, or none where there is one part.
    """

    data: TokenData
    seed: int
    seq: int
    batch: int
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.weights) == (len(self.data.index.parts) if self.weights else 0)
        problems = [
            Problem(
                where="--data" if len(self.data.index.parts) == 1 else f"--data {part.name}",
                fault=f"holds {part.tokens} tokens; one sample needs {self.seq + 1}.",
                fix="give more text, or plan with a shorter --seq",
            )
            for part, samples in zip(self.data.index.parts, self.data.samples(self.seq), strict=True)
            if samples == 0
        ]
        if self.weights and 0 in shares(self.weights):
            problems.append(
                Problem(
                    where="--data",
                    fault=f"a weight is below 1/{MIXING_BLOCK} of the sum of all: its source is never read.",
                    fix="raise it, or leave the source out",
                )
            )
        if problems:
            raise InputError(*problems)

    def sample(self, position: int) -> tuple[int, int]:
        """Part and sample in it at a global position: a new permutation of each part in its every epoch.

        Parts take turns by weight: in each block of MIXING_BLOCK positions, every part has its share of
        them, evenly spread.
        """
        part, seed = 0, _mix(self.seed & MASK)
        if len(self.data.index.parts) > 1:
            counts = shares(self.weights)
            block, offset = divmod(position, MIXING_BLOCK)
            part, turn = turns(counts)[offset]
            position = block * counts[part] + turn
            seed = _mix(seed ^ _mix(part))
        samples = self.data.samples(self.seq)[part]
        epoch, offset = divmod(position, samples)
        return part, permute(offset, samples, _mix(seed ^ epoch))

    def start(self, position: int) -> int:
        """Where the sample at a global position begins in the tokens."""
        part, sample = self.sample(position)
        return sum(other.tokens for other in self.data.index.parts[:part]) + sample * self.seq

    def positions(self, step: int, *, data_rank: int, data_size: int) -> range:
        """The global positions of one data rank's share of the batch of step `step` (0 is the first)."""
        local = self.batch // data_size
        first = step * self.batch + data_rank * local
        return range(first, first + local)

    def rows(self, step: int, *, data_rank: int, data_size: int) -> NDArray[np.int64]:
        """Token ids [batch / data_size, seq + 1] of one data rank at step `step`."""
        return self._cut(self.data.tokens, step, data_rank, data_size).astype("int64")

    def trained(self, step: int, *, data_rank: int, data_size: int) -> NDArray[np.bool_] | None:
        """Which of the tokens of `rows` are trained on, as targets; None where all are."""
        if self.data.mask is None:
            return None
        return self._cut(self.data.mask, step, data_rank, data_size).astype("bool")

    def begins(self, step: int, *, data_rank: int, data_size: int) -> NDArray[np.int64]:
        """Of each position [batch / data_size, seq] of `rows` but the last, where its document begins there.

        A document that began before its sample begins with it.
        """
        import numpy as np

        assert self.data.documents is not None
        positions = self.positions(step, data_rank=data_rank, data_size=data_size)
        begins = np.zeros((len(positions), self.seq), dtype="int64")
        for row, position in zip(begins, positions, strict=True):
            start = self.start(position)
            first, end = np.searchsorted(self.data.documents, [start + 1, start + self.seq])
            inside = self.data.documents[first:end].astype("int64") - start
            row[inside] = inside
        return np.maximum.accumulate(begins, axis=1)

    def _cut(self, whole: NDArray[Any], step: int, data_rank: int, data_size: int) -> NDArray[Any]:
        import numpy as np

        positions = self.positions(step, data_rank=data_rank, data_size=data_size)
        starts = (self.start(position) for position in positions)
        return np.stack([whole[start : start + self.seq + 1] for start in starts])
