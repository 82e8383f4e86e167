"""Limits: what a plan is held to by choice, besides what the model, the batch and the cluster allow."""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine


@frozen
class Limits:
    """The engine that must be able to run the plan (None: any), and the largest tensor-parallel degree.

    Without `whole`, the engine's rules hold for degrees alone, not for stages and their options: a search of
    that larger space gives a bound of the smaller one.
    """

    engine: Engine | None = None
    max_tp: int | None = None
    whole: bool = True


NO_LIMITS = Limits()
