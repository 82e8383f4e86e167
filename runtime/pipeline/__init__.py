"""The pipeline: a schedule table lowered to the steps of a rank, its messages, and the passes of stages."""

from runtime.pipeline.record import Record
from runtime.pipeline.run import Pipeline
from runtime.pipeline.stage import StageModule, hidden_dtype, hidden_shape

__all__ = ["Pipeline", "Record", "StageModule", "hidden_dtype", "hidden_shape"]
