"""Number formats of a run, and the loss scale that fp16 needs.

fp16 has 5 bits of exponent: gradients below 6e-8 vanish, values above 65,504 are infinite. So the gradient of
the loss is multiplied by a scale, and gradients are divided by it before the update (Micikevicius et al.,
"Mixed precision training", arXiv 1710.03740, section 3.2). The scale is found while training: a step whose
gradients overflow is not taken, on any rank, and halves it; 2,000 good steps in a row double it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planner.model.workload import Precision


def compute_dtype(precision: Precision) -> torch.dtype:
    """The format of activations and gathered weights. fp8 is that of operands of products alone."""
    return {Precision.FP32: torch.float32, Precision.FP16: torch.float16}.get(precision, torch.bfloat16)


class LossScaler:
    """The loss scale of a run, the same on every rank. Constants are those of torch.amp.GradScaler."""

    FIRST, GROWTH, BACKOFF, INTERVAL = 65_536.0, 2.0, 0.5, 2_000
    LEAST = 1.0
    """Gradients that overflow at this scale would overflow without one."""

    def __init__(self) -> None:
        self.scale = self.FIRST
        self.good_steps = 0

    def update(self, *, overflow: bool) -> None:
        """After a step: halves the scale if its gradients were not finite, doubles it from time to time."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale *= self.BACKOFF
        elif self.good_steps == self.INTERVAL:
            self.scale, self.good_steps = self.scale * self.GROWTH, 0

    @property
    def exhausted(self) -> bool:
        """Whether gradients overflow whatever the scale."""
        return self.scale < self.LEAST

    def state_dict(self) -> dict[str, Tensor]:
        """The scale and its good steps, for a checkpoint."""
        return {
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "good_steps": torch.tensor(self.good_steps),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
