"""A piece of a search that can be worked out apart from the others."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import NamedTuple

from planner.search.shape_search import Budget


class TaskKind(StrEnum):
    """What is asked of a shape: an even split, something better, the best with a proof, or a bound."""

    GREEDY = "greedy"
    BETTER = "better"
    BEST = "best"
    BOUND = "bound"


class Task(NamedTuple):
    """What is asked of the shape with a number, and what that may use."""

    kind: TaskKind
    number: int
    budget: Budget

    def to_json(self) -> bytes:
        """As text for another process; what is infinite stays so."""
        return json.dumps(self).encode()

    @staticmethod
    def of_json(text: bytes) -> Task:
        """The task of such a text."""
        kind, number, budget = json.loads(text)
        return Task(TaskKind(kind), number, Budget(*budget))
