"""What is asked of a layer's cost, and the answer."""

from __future__ import annotations

from planner.codec import noun
from planner.kept import AttentionKernel
from planner.model import Block
from planner.profile import LayerKind
from planner.strategy import Recompute
from planner.workload import Precision


@noun
class LayerShape:
    """Which layer, on how many tokens, in how many shards. `block` is the class of a block, by its key.

    `rotary` is whether queries and keys are turned by their position.
    """

    kind: LayerKind
    tp: int
    sequence_parallel: bool
    micro_batch: int
    seq: int
    precision: Precision
    recompute: Recompute = Recompute.NONE
    block: str = ""
    kernel: AttentionKernel = AttentionKernel.FLASH
    rotary: bool = False

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq


@noun
class LayerCost:
    """Seconds and bytes of one layer for one micro-batch on one device, communication not included.

    `saved_bytes` stays from forward to backward and includes the layer's input, not its output.
    """

    forward_s: float
    backward_s: float
    saved_bytes: float
    forward_transient_bytes: float
    backward_transient_bytes: float
    origin: str


NOTHING = LayerCost(
    forward_s=0.0,
    backward_s=0.0,
    saved_bytes=0.0,
    forward_transient_bytes=0.0,
    backward_transient_bytes=0.0,
    origin="datasheet",
)
"""The ends of a model that has neither embedding nor head of its own."""


def block_saved_bytes(block: Block, shape: LayerShape, recompute: Recompute) -> float:
    """Bytes that a block keeps from forward to backward at a shape, with an option that may be another."""
    return block.saved_bytes(
        shape.tokens,
        shape.seq,
        size=shape.precision.compute_bytes,
        tp=shape.tp,
        sequence_parallel=shape.sequence_parallel,
        recompute=recompute,
        kernel=shape.kernel,
    )
