"""Where the modules of a plan come from: our own transformer, or Hugging Face Transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from planner.strategy.plan import Plan
    from planner.strategy.strategy import Degrees
    from runtime.parallel.meshes import Meshes

StageModel = Any
"""A stage on meta: a module with the parts, the `units()` and the names of `runtime.model.transformer`."""


@dataclass(frozen=True)
class Backend:
    """How the stage of a plan is made, and how tensor parallelism splits a part of it."""

    stage: Callable[[Plan, int], StageModel]
    tensor_parallel: Callable[[StageModel, str, nn.Module, Degrees, Meshes], None]
