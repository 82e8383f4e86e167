"""Actions of a pipeline schedule and their text, which is also torch.distributed.pipelining's.

`2F0` is the forward of micro-batch 0 on stage 2, `2B0` its whole backward. A schedule that splits the
backward has `2I0`, the gradients of the stage's input, and later `2W0`, those of its weights. A forward and
a backward that run as one slot print as `(0F3;3B1)OVERLAP_F_B`: their messages leave together, at its end.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from planner.foundation.errors import InputError, Problem


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
