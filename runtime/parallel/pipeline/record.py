"""What a rank really did in its last step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from planner.model.attention import CpExchange
from planner.strategy.schedule.schedules import Action


@dataclass
class Record:
    """What a rank did in its last step: its actions, and whether gradients were reduced when complete.

    `exchanges` are the attentions over a sequence that ranks share out: how, and among how many.
    `spans` has the name, begin and end of each action and part of the step, if `clock` is set. It is set
    for one step of a run; on CUDA it waits for the device, so that step is slower than others.
    """

    actions: list[Action] = field(default_factory=list)
    reduced: list[bool] = field(default_factory=list)
    exchanges: list[tuple[CpExchange, int]] = field(default_factory=list)
    clock: Callable[[], float] | None = None
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def span(self, name: str | None = None) -> Iterator[None]:
        """Notes how long the body takes, under `name` or as the last action."""
        if self.clock is None:
            yield
            return
        begin = self.clock()
        yield
        self.spans.append((name or str(self.actions[-1]), begin, self.clock()))

    def clear(self) -> None:
        self.actions.clear()
        self.reduced.clear()
        self.exchanges.clear()
        self.spans.clear()
