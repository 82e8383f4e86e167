"""The loss of next-token prediction. Shapes: B micro-batch, S sequence, V vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits_bsv: Tensor, targets_bs: Tensor) -> Tensor:
    """Mean cross-entropy of next-token prediction, computed in fp32."""
    return functional.cross_entropy(logits_bsv.flatten(0, 1).float(), targets_bs.flatten())
