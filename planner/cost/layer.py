"""What is asked of a layer's cost, and the answer."""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.model.attention import CpExchange
from planner.model.saved_tensors import AttentionKernel, Recompute
from planner.model.spec import Block
from planner.model.workload import Precision
from planner.profile.profile import LayerKind


@frozen
class LayerShape:
    """Which layer, on how many tokens, in how many shards. `block` is the class of a block, by its key.

    `rotary` is whether queries and keys are turned by their position. A device holds `tokens` of its
    sequences, which cp ranks share out; `etp` None: as many as tp. Part of a sequence may be asked for:
    `micro_batch` need not be whole.
    """

    kind: LayerKind
    tp: int
    sequence_parallel: bool
    micro_batch: float
    seq: int
    precision: Precision
    recompute: Recompute = Recompute.NONE
    block: str = ""
    kernel: AttentionKernel = AttentionKernel.FLASH
    rotary: bool = False
    cp: int = 1
    cp_exchange: CpExchange = CpExchange.RING
    ep: int = 1
    etp: int | None = None

    @property
    def tokens(self) -> float:
        return self.micro_batch * self.seq / self.cp

    @property
    def expert_tp(self) -> int:
        """Ranks that share out one expert."""
        return self.etp or self.tp

    @property
    def spreads(self) -> bool:
        """Whether more than tensor parallelism splits the layer, which no sample measures."""
        return self.cp > 1 or self.ep > 1 or self.expert_tp != self.tp


@frozen
class LayerCost:
    """Seconds and bytes of one layer for one micro-batch on one device, communication not included.

    `saved_bytes` stays from forward to backward and includes the layer's input, not its output. In the idle
    ones of the seconds, where they are known, the device waits for the host: messages go out meanwhile.
    """

    forward_s: float
    backward_s: float
    saved_bytes: float
    forward_transient_bytes: float
    backward_transient_bytes: float
    origin: str
    forward_idle_s: float = 0.0
    backward_idle_s: float = 0.0


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
        expert_tp=shape.expert_tp,
    )
