"""Number formats of a run."""

from __future__ import annotations

import torch

from planner.workload import Precision


def compute_dtype(precision: Precision) -> torch.dtype:
    """The format of activations and gathered weights. fp8 is that of operands of products alone."""
    return {Precision.FP32: torch.float32, Precision.FP16: torch.float16}.get(precision, torch.bfloat16)
