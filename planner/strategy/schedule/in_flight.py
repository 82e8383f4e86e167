"""InFlight: the micro-batches that a stage holds something of at one moment, and what they keep."""

from __future__ import annotations

from typing import NamedTuple


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
