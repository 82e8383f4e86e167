"""Profile: what was measured on a device and software stack. Written by machine, read by the cost model.

OperatorSample: one operator at one size, alone on a device. Fits over many of them price unmeasured layers.

How much longer than their price the blocks of measured runs took, by their shape: a part of a profile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from planner.foundation.decode import load_json
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.local_machine import Clocks
from planner.model.attention import CpExchange
from planner.model.spec import Layer, ModelSpec
from planner.model.sublayer import AttentionKernel, Recompute
from planner.model.workload import Precision


class OperatorKind(StrEnum):
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
class OperatorSample:
    """Median seconds of `samples` bursts of one operator, of the device alone where it has a queue.

    `backward_s` None: it has no backward pass. `spread` is the larger interquartile range over its median.
    `reference_s` is what a fixed piece of work took beside this sample, where speeds drift (a CPU). `taken`
    is when, empty where unknown.
    """

    kind: OperatorKind
    dims: tuple[int, ...]
    precision: Precision
    variant: str = ""
    forward_s: float
    backward_s: float | None = None
    spread: float
    samples: int
    reference_s: float | None = None
    taken: str = ""


@frozen
class BlockShape:
    """What the time of a block follows on one device, whatever the number of blocks.

    `tokens` are those of a micro-batch on that device, `width` the hidden size of a GPT block with as many
    parameters for a token: sqrt(parameters / 12).
    """

    device: str
    precision: Precision
    recompute: Recompute
    kernel: AttentionKernel
    compiled: bool
    routed: bool
    tp: int
    cp: int
    tokens: float
    seq: int
    width: float

    @property
    def splits_sequences(self) -> bool:
        """Whether ranks share out the tokens of a sequence."""
        return self.cp > 1


@frozen
class BlockResidual:
    """Runs whose blocks have one shape: ln(time that their steps tell of a block / its price), and how many
    runs' worth speak for it: each by the share of its step that blocks are, and by how far it is off."""

    shape: BlockShape
    log_ratio: float
    weight: float


@frozen
class BlockResiduals:
    """Those of a fit's runs, and the Gaussian process between them: the `spread` of blocks around their price
    and the `noise` of one run, both as shares.

    They hold for what `device`, `network`, `engine` and `framework` say, as a `Constant` does. Where none is
    told, nothing that a wider scope tells holds either.
    """

    spread: float
    noise: float
    told: tuple[BlockResidual, ...]
    device: str = ""
    framework: str = ""
    engine: str = ""
    network: str = ""

    def sizes(self) -> Iterator[tuple[str, float]]:
        """All that has to be above 0, by name."""
        yield from (("spread", self.spread), ("noise", self.noise))
        for each in self.told:
            yield "weight", each.weight
            yield from ((name, getattr(each.shape, name)) for name in ("tp", "cp", "tokens", "seq", "width"))


PROFILE_SCHEMA = 1


class LayerKind(StrEnum):
    """The layer classes of a model: embedding, block, and head (final norm, projection, loss)."""

    EMBEDDING = "embedding"
    BLOCK = "block"
    HEAD = "head"


def shape_key(model: ModelSpec, kind: LayerKind, block: Layer | None = None) -> str:
    """The key under which samples of a layer of `model` are found; of blocks, the first class or `block`."""
    if kind is LayerKind.BLOCK:
        return (block or model.segments[0].block).shape_key
    return f"h{model.hidden}-v{model.vocab}"


class Op(StrEnum):
    """A communication pattern. `bytes` of a sample is the size of the full (gathered) message."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    P2P = "p2p"


@frozen
class LayerSample:
    """One layer class at one shard width and one micro-batch, measured without communication time.

    `shape_key` identifies the class: `Block.shape_key`; for embedding and head `h{hidden}-v{vocab}`, tied
    or not (an own copy of the tied weight costs the same time). Times are medians of `samples` runs and
    the backward pass adds to gradients that exist; `spread` is the larger interquartile range over its
    median.

    Bytes are of tensors, by the allocator, parameters and accumulated gradients not counted:

    - `saved_bytes` is what the layer keeps from forward to backward: its input once, where it needs it,
      and never its output, which is the next layer's input. A stage whose output leaves for another
      stage holds that output besides.
    - `forward_transient_bytes` is the peak of the forward pass above `saved_bytes`, the output included.
    - `backward_transient_bytes` is the peak of the backward pass above `saved_bytes`: gradients of output
      and input, what is recomputed, a parameter's gradient on its way to being added.

    `reference_s` is what a fixed piece of work took beside this sample, where speeds drift (a CPU). `taken`
    is when, empty where unknown.

    Shards are those of `planner.strategy.strategy.Degrees`: `seq` are the tokens of whole sequences, which
    `cp` ranks
    share out; `etp` None is as many as tp. Experts are as busy as balanced routing makes them. `compiled`
    is torch.compile. Where an accelerator was measured, the times are the device's alone and the two host
    times what the host needs to begin each pass; None: they are one, or the host waits meanwhile.
    """

    kind: LayerKind
    shape_key: str
    precision: Precision
    recompute: Recompute
    tp: int
    sequence_parallel: bool
    micro_batch: int
    seq: int
    forward_s: float
    backward_s: float
    saved_bytes: int
    forward_transient_bytes: int
    backward_transient_bytes: int
    spread: float
    samples: int
    reference_s: float | None = None
    cp: int = 1
    cp_exchange: CpExchange | None = None
    ep: int = 1
    etp: int | None = None
    compiled: bool = False
    host_forward_s: float | None = None
    host_backward_s: float | None = None
    taken: str = ""


NOISY_SPREAD = 0.25
"""Spread of a sample's runs, as a share. Beyond it the cost model trusts the trend of a curve more than each
of its samples."""


@frozen
class CommSample:
    """One collective over `ranks` ranks while `groups` such groups ran at once on the same `nodes` nodes.

    The ranks of a group are `stride` apart, nodes being numbered through.

    `bytes` is the full message: the tensor of an all-reduce, the gathered tensor of an all-gather, the
    input of a reduce-scatter or all-to-all, the message of a send. `seconds` is the median over bursts of
    calls, of a burst's time over its calls. `taken` is when, empty where unknown.
    """

    op: Op
    ranks: int
    groups: int
    bytes: int
    seconds: float
    spread: float
    samples: int
    nodes: int = 1
    stride: int = 1
    taken: str = ""


@frozen
class ContentionSample:
    """How much slower compute runs per device while `active` devices of a node compute at once."""

    active: int
    slowdown: float
    taken: str = ""


@frozen
class Constant:
    """A fitted or measured constant: value in SI units, and how it came to be.

    It holds on any device and for any software unless `device`, `network` (`ClusterSpec.network`), `engine`
    (a family of engines), `framework` or `kernels` (a named set of fused kernels) say for which.
    """

    name: str
    value: float
    origin: str
    device: str = ""
    framework: str = ""
    kernels: str = ""
    engine: str = ""
    network: str = ""
    taken: str = ""


@frozen
class FamilyFit:
    """How well a family of cases is known: `taken` of `cases` were measured.

    `error` is the mean relative error with which samples are predicted from the others; None where the
    family does not predict.
    """

    family: str
    cases: int
    taken: int
    error: float | None = None


@frozen
class Profile:
    """All samples of a device and software stack, with versions and date.

    `cores` is the number of CPU cores that the ranks share. `skipped` names what could not be measured,
    and why. `rates` are operators alone, for layers that were not measured.
    """

    schema_version: int
    name: str
    device: str
    device_title: str
    backend: str
    created: str
    versions: dict[str, str]
    devices_per_node: int
    slots_per_node: int | None
    layers: tuple[LayerSample, ...]
    comms: tuple[CommSample, ...]
    contention: tuple[ContentionSample, ...]
    constants: tuple[Constant, ...]
    cores: int | None = None
    skipped: tuple[str, ...] = ()
    precision: Precision | None = None
    fits: tuple[FamilyFit, ...] = ()
    clocks: Clocks | None = None
    rates: tuple[OperatorSample, ...] = ()
    residuals: tuple[BlockResiduals, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices it tells of: the one it was measured on, or those whose runs it was fitted to."""
        return (self.device,) if self.device else tuple(self.device_title.split(", "))

    @property
    def measured(self) -> bool:
        """Whether it was measured on its device; else it was fitted to runs and has constants alone."""
        return bool(self.backend or self.layers or self.comms)

    def constant(self, name: str) -> float | None:
        """The value of a constant that holds for any software, or None where the profile has none."""
        return self.constant_of(name)

    def constant_of(
        self,
        name: str,
        framework: str = "",
        kernels: str = "",
        device: str = "",
        engine: str = "",
        network: str = "",
    ) -> float | None:
        """The constant that speaks most narrowly of software, device and network, in this order."""
        named = (c for c in self.constants if c.name == name and c.kernels in ("", kernels))
        fitting = [c for c in named if _speaks_of(c, device, framework, engine, network)]
        narrowest = max(fitting, key=lambda c: (bool(c.kernels), *_narrowness(c)), default=None)
        return None if narrowest is None else narrowest.value

    def residuals_of(
        self, *, device: str, framework: str, engine: str, network: str
    ) -> BlockResiduals | None:
        """What runs told of blocks, that speaks most narrowly of them."""
        fitting = [told for told in self.residuals if _speaks_of(told, device, framework, engine, network)]
        return max(fitting, key=_narrowness, default=None)


def _speaks_of(
    told: Constant | BlockResiduals, device: str, framework: str, engine: str, network: str
) -> bool:
    return (
        told.device in ("", device)
        and told.framework in ("", framework)
        and told.engine in ("", engine)
        and told.network in ("", network)
    )


def _narrowness(told: Constant | BlockResiduals) -> tuple[bool, ...]:
    """Of software first, then of the device, then of the network."""
    return tuple(map(bool, (told.framework, told.engine, told.device, told.network)))


def load_profile(path: Path) -> Profile:
    """The profile in a file that `plan profile` wrote. Raises InputError for another schema, and for sizes of
    blocks that none has."""
    profile = load_json(path, Profile)
    if profile.schema_version != PROFILE_SCHEMA:
        raise InputError(
            Problem(
                where=f"{path}: schema_version",
                fault=f"is {profile.schema_version}; this version reads {PROFILE_SCHEMA}.",
                fix="measure again with `plan profile`",
            )
        )
    faults = [
        Problem(
            where=f"{path}: residuals[{index}]",
            fault=f"has {name} {value:g}.",
            legal="a number above 0",
            fix="fit again with `plan calibrate`",
        )
        for index, told in enumerate(profile.residuals)
        for name, value in told.sizes()
        if not 0 < value < math.inf
    ]
    if faults:
        raise InputError(*faults)
    return profile
