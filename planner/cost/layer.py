"""What is asked of a layer's cost, and the answer.

Pass and Unit: what a direction of a micro-batch takes, and what data parallelism wraps as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.foundation.frozen import frozen
from planner.model.attention import CpExchange
from planner.model.spec import Block
from planner.model.sublayer import AttentionKernel, Recompute
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


@frozen
class Pass:
    """One direction of one micro-batch through some layers: seconds by cause. Adds up."""

    compute_s: float = 0.0
    recompute_s: float = 0.0
    host_s: float = 0.0
    tp_s: float = 0.0
    dp_s: float = 0.0
    cp_s: float = 0.0
    ep_s: float = 0.0

    @property
    def work_s(self) -> float:
        """Time that slows down where devices share cores."""
        return self.compute_s + self.recompute_s + self.host_s

    @property
    def fixed_s(self) -> float:
        """Communication time, measured with the other ranks at work."""
        return self.tp_s + self.dp_s + self.cp_s + self.ep_s

    @property
    def total_s(self) -> float:
        return self.work_s + self.fixed_s

    def __add__(self, other: Pass) -> Pass:
        return _made(
            self.compute_s + other.compute_s,
            self.recompute_s + other.recompute_s,
            self.host_s + other.host_s,
            self.tp_s + other.tp_s,
            self.dp_s + other.dp_s,
            self.cp_s + other.cp_s,
            self.ep_s + other.ep_s,
        )

    def __mul__(self, factor: float) -> Pass:
        return _made(
            self.compute_s * factor,
            self.recompute_s * factor,
            self.host_s * factor,
            self.tp_s * factor,
            self.dp_s * factor,
            self.cp_s * factor,
            self.ep_s * factor,
        )


_compute, _recompute, _host, _tp, _dp, _cp, _ep = (
    getattr(Pass, field.name).__set__ for field in dataclasses.fields(Pass)
)


def _made(
    compute_s: float, recompute_s: float, host_s: float, tp_s: float, dp_s: float, cp_s: float, ep_s: float
) -> Pass:
    """A pass by its fields in their order, sooner made: a search adds up hundreds of thousands."""
    made = object.__new__(Pass)
    _compute(made, compute_s)
    _recompute(made, recompute_s)
    _host(made, host_s)
    _tp(made, tp_s)
    _dp(made, dp_s)
    _cp(made, cp_s)
    _ep(made, ep_s)
    return made


def stacked(passes: Sequence[Pass]) -> Pass:
    """Many passes as one, whose figures are arrays."""
    import numpy as np

    names = [field.name for field in dataclasses.fields(Pass)]
    return Pass(**{name: np.asarray([getattr(each, name) for each in passes]) for name in names})  # type: ignore[arg-type]


@frozen
class Unit:
    """A layer that data parallelism wraps as one: a block, or the root with the embedding and the head.

    `params` are those of one device's shard; `routed_params` those of experts among them, which are copied
    over fewer ranks. `trained` are the parameters that get gradients, and `tensors` how many tensors they
    are: all of `params`, or adapters beside them. `copied` are those of key-value heads that neighbours have
    copies of, whose gradients are summed over these: (how many copies, parameters) each.
    """

    params: float
    tensors: int
    trained: float
    routed_params: float = 0.0
    copied: tuple[tuple[int, float], ...] = ()

    @property
    def dense_params(self) -> float:
        """Parameters that every data rank holds."""
        return self.params - self.routed_params

    @property
    def routed_trained(self) -> float:
        """Parameters of routed experts that get gradients: all, or beside adapters none."""
        return self.routed_params if self.trained == self.params else 0.0
