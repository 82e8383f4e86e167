"""Workload: what is trained, apart from the model and the machine."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen


class Precision(StrEnum):
    """The number format of matrix products. Masters and optimizer state stay in fp32.

    fp8 is mixed: operands of products are cast to fp8 on the way in, with a scale each; activations and
    gathered weights stay in bf16 (Transformer Engine's default, and torchao's without fp8 all-gather).
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"

    @property
    def compute_bytes(self) -> int:
        """Bytes of one activation or one gathered weight."""
        return 4 if self is Precision.FP32 else 2

    @property
    def operand_bytes(self) -> int:
        """Bytes of one operand of a matrix product."""
        return 1 if self is Precision.FP8 else self.compute_bytes


class Optimizer(StrEnum):
    """The optimizer. What it keeps is fp32, in bytes a parameter:

    adamw      8                        two moments
    sgd        4                        momentum
    adafactor  4 (in + out)/(in out)    a second moment as a row and a column of each matrix; 4 for
                                        vectors; no momentum (arXiv 1804.04235)
    muon       4                        momentum of the blocks' matrices; embedding, head and vectors
                                        by AdamW, 8 (Jordan 2024; arXiv 2502.16982)
    """

    ADAMW = "adamw"
    SGD = "sgd"
    ADAFACTOR = "adafactor"
    MUON = "muon"

    @property
    def state_bytes(self) -> int:
        """Bytes of state for one weight of a block's matrix, besides the factors of a whole matrix."""
        return {Optimizer.ADAMW: 8, Optimizer.SGD: 4, Optimizer.ADAFACTOR: 0, Optimizer.MUON: 4}[self]

    @property
    def vector_state_bytes(self) -> int:
        """Bytes of state for one value of a vector: a norm's weight, a bias."""
        return {Optimizer.ADAMW: 8, Optimizer.SGD: 4, Optimizer.ADAFACTOR: 4, Optimizer.MUON: 8}[self]

    def matrix_state_bytes(self, inputs: float, outputs: float, *, ends: bool = False) -> float:
        """Bytes of state for a matrix; `ends` says that it is an embedding or an output projection."""
        if self is Optimizer.ADAFACTOR:
            return 4.0 * (inputs + outputs)
        return (self.vector_state_bytes if ends else self.state_bytes) * inputs * outputs


class Method(StrEnum):
    """What is trained: all weights from scratch, all weights of a given model, or adapters beside them."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"
    LORA = "lora"


class AdapterModules(StrEnum):
    """Which weights adapters stand beside: query, value (and key), all of attention, or the MLP too."""

    QV = "qv"
    QKV = "qkv"
    ATTENTION = "attention"
    ALL = "all"


@frozen
class Adapters:
    """Adapters of one rank beside some weights: a group of them (AdapterModules), or the modules that are
    named, with commas between (planner.model.lora).

    Source: LoRA, arXiv 2106.09685, which adapts query and value; all linear layers: QLoRA, arXiv 2305.14314.
    """

    rank: int
    modules: str


@frozen
class Workload:
    """A training job. `batch` counts sequences in a global step; `tokens` is the whole run, if known.

    `adapters` are what LoRA trains; None for the other methods.
    """

    seq: int
    batch: int
    tokens: int | None = None
    precision: Precision = Precision.BF16
    optimizer: Optimizer = Optimizer.ADAMW
    method: Method = Method.PRETRAIN
    adapters: Adapters | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.seq * self.batch
