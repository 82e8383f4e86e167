"""RateSample: one operator at one size, alone on a device. Fits over many of them price unmeasured layers."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.model.workload import Precision


class RateKind(StrEnum):
    """What was timed, and by which dims its samples are told apart.

    GEMM           (m, n, k): x [m, k] times w [n, k]; backward both gradients, w's added to one that exists
    GROUPED        (experts, rows of each, n, k): the same for experts
    ROUTING        (tokens, experts, experts of a token, hidden): what a mixture does beside its experts
    ATTENTION      (sequences times heads, tokens of a sequence, head_dim): causal, between the projections
    ADD            (values): a sum of two tensors
    ACTIVATION     (values): variant silu, gelu, ..., and `-gated` with its product with a gate
    NORM           (rows, width): variant rmsnorm or layernorm
    ROTARY         (tokens, width): queries or keys turned by their position, heads of 128 or fewer dims
    CROSS_ENTROPY  (tokens, vocabulary, hidden): output projection and loss as the runtime chunks them
    EMBEDDING      (tokens, vocabulary, hidden)
    OPTIMIZER      (tensors, values of each): variant adamw, the update; or clip, the norm and scaling
    COPY           (bytes): from device memory to device memory
    TO_DEVICE      (bytes): from host memory, variant pinned or pageable
    TO_HOST        (bytes): to host memory, likewise
    """

    GEMM = "gemm"
    GROUPED = "grouped"
    ROUTING = "routing"
    ATTENTION = "attention"
    ADD = "add"
    ACTIVATION = "activation"
    NORM = "norm"
    ROTARY = "rotary"
    CROSS_ENTROPY = "cross_entropy"
    EMBEDDING = "embedding"
    OPTIMIZER = "optimizer"
    COPY = "copy"
    TO_DEVICE = "to_device"
    TO_HOST = "to_host"


@frozen
class RateSample:
    """Median seconds of `samples` bursts of one operator, of the device alone where it has a queue.

    `backward_s` None: it has no backward pass. `spread` is the larger interquartile range over its median.
    `reference_s` is what a fixed piece of work took beside this sample, where speeds drift (a CPU). `taken`
    is when, empty where unknown.
    """

    kind: RateKind
    dims: tuple[int, ...]
    precision: Precision
    variant: str = ""
    forward_s: float
    backward_s: float | None = None
    spread: float
    samples: int
    reference_s: float | None = None
    taken: str = ""
