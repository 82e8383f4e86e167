"""`plan profile` as one rank of several, under torchrun."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from planner.commands.running.profile_session import INTERRUPTED, TERMINATED, Terminated, terminable

if TYPE_CHECKING:
    from runtime.profiler.joint_world import JointWorld


def join_ranks() -> JointWorld | None:
    """The ranks among which this one was started, or None. torch is met only where there are some."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    from planner.commands.shared.with_torch import require_torch

    require_torch("profile")
    from runtime.profiler.joint_world import joined_world

    return joined_world()


def attend_ranks(joint: JointWorld) -> int | None:
    """Measures with the first rank until that is done; the exit code."""
    from runtime.profiler.collectives import attend

    try:
        with terminable():
            for failure in attend(joint):
                if failure:
                    click.echo(failure, err=True)
    except (KeyboardInterrupt, Terminated) as ending:
        return TERMINATED if isinstance(ending, Terminated) else INTERRUPTED
    return None
