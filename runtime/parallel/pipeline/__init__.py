"""Executes a plan's schedule table: the actions of a rank, its messages, and the passes of its stages.

In go the table and the stages of a rank; out come losses and gradients, and a record of every action.
Open `run.py` first.
"""

from runtime.parallel.pipeline.run import Pipeline
from runtime.parallel.pipeline.stage import Record, StageModule, hidden_dtype, hidden_shape

__all__ = ["Pipeline", "Record", "StageModule", "hidden_dtype", "hidden_shape"]
