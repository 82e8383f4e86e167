"""Workload: what is trained, apart from the model and the machine."""

from __future__ import annotations

from enum import StrEnum

from planner.codec import noun


class Precision(StrEnum):
    """The number format of matrix products. Masters and optimizer state stay in fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def compute_bytes(self) -> int:
        """Bytes of one activation or one gathered weight."""
        return 4 if self is Precision.FP32 else 2


class Optimizer(StrEnum):
    """The optimizer; `state_bytes` is its fp32 state per parameter (moments)."""

    ADAMW = "adamw"
    SGD = "sgd"

    @property
    def state_bytes(self) -> int:
        return {Optimizer.ADAMW: 8, Optimizer.SGD: 4}[self]


class Method(StrEnum):
    """What is trained: all weights from scratch, or all weights of a given model."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"


@noun
class Workload:
    """A training job. `batch` counts sequences in a global step; `tokens` is the whole run, if known."""

    seq: int
    batch: int
    tokens: int | None = None
    precision: Precision = Precision.BF16
    optimizer: Optimizer = Optimizer.ADAMW
    method: Method = Method.PRETRAIN

    @property
    def tokens_per_step(self) -> int:
        return self.seq * self.batch
