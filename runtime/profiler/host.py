"""Constants of a device and its host: rates, wrappers of data parallelism, pipeline actions, optimizer.

Each constant is in SI units and says how it came to be. Wrappers and actions are measured on a fake world,
so they hold the host's work and the copies of a rank, not its messages. Costs that have a part per unit
and a part per byte are the line through a small and a large case.

Constants of host and device, and contention, as families of the profiler.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from planner.foundation.decode import decode, encode
from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec
from planner.model.workload import Optimizer, Precision
from planner.profile.profile import Constant, ContentionSample
from planner.strategy.strategy import Degrees, Schedule, Zero
from runtime.model.held_weights import Weight
from runtime.model.transformer import Transformer, build_transformer, materialize
from runtime.parallel.data import apply_data_parallel, set_unit, units_of
from runtime.parallel.meshes import Meshes, fake_world
from runtime.parallel.pipeline import Pipeline, Record, StageModule
from runtime.parallel.tensor import apply_tensor_parallel
from runtime.profiler.device import (
    OF_CUDA,
    Contended,
    allocator,
    constant,
    llama,
    measure_communicators,
    measure_contention,
    overlap,
    rates,
)
from runtime.profiler.layers import DTYPES, to_precision
from runtime.profiler.profile_cases import Reading, readings
from runtime.profiler.timed_plans import bench_plan
from runtime.profiler.timing import Effort, Emit, Timing, run_children, time_call, time_phases
from runtime.train.optimizer import OptimizerOptions, build_optimizer, clip, weighted_square_sum

_UNITS = 3
_SEQ = 8
_SMALL_HIDDEN = 64
_LARGER_HIDDEN = {"cpu": (512, 1024), "cuda": (2048,)}
"""Units of 3.1 and 12.6, and of 50 million parameters. On a CPU tensors over 32 MiB get fresh pages each time
they are made, which the second shows. On an accelerator copies of smaller units would vanish behind the time
it takes to begin them; three of its unit, with gradients and masters, take 2.4 GB."""
_MICRO_BATCHES = 8


def measure_host(
    groups: Sequence[str], device_type: str, precision: Precision, effort: Effort
) -> Iterator[dict[str, Any]]:
    """Yields `{"constants": [...]}` (encoded) of each of these groups of CONSTANTS."""

    def body(rank: int, emit: Emit) -> None:
        torch.set_num_threads(1)
        device = torch.device(device_type)
        for group in groups:
            found = CONSTANTS[group](device, precision, effort)
            emit({"constants": [encode(constant) for constant in found]})

    yield from run_children(body)


# Host floor of a block
def _launches(device: torch.device, precision: Precision, effort: Effort) -> Iterator[Constant]:
    """The forward pass of a block so small that the host is all of it; and what tp's hooks add to it."""
    seconds = {}
    for tp in (1, 2):
        degrees = Degrees(tp=tp)
        with fake_world(degrees, device.type) as meshes:
            stage = _blocks(_SMALL_HIDDEN, None, precision, device, meshes)
            for name, part in stage.parts():
                apply_tensor_parallel(name, part, degrees, meshes)
            unit = _time_unit(stage, _SMALL_HIDDEN, precision, device, effort, accumulate=True)
            seconds[tp] = unit.forward_s
    yield constant("host_block_forward_s", seconds[1], "a block of hidden size 64 on 8 tokens")
    yield constant(
        "host_tp_forward_s", max(seconds[2] - seconds[1], 0.0), "the same with tensor-parallel hooks"
    )


# Wrappers of data parallelism
def _model(hidden: int, layers: int) -> ModelSpec:
    """A llama of `layers` blocks, for costs that depend on the number and size of tensors only."""
    return llama(hidden, layers, _SEQ, heads=(4, 4), width=8 * hidden // 3 // 8 * 8)


def _blocks(
    hidden: int, degrees: Degrees | None, precision: Precision, device: torch.device, meshes: Meshes
) -> Transformer:
    """A stage of blocks only; wrapped as the runtime does under `degrees`, or bare in compute precision."""
    model = _model(hidden, _UNITS)
    stage = build_transformer(model, 0, _UNITS, False, False, seq=_SEQ)
    for name, part in stage.parts():
        materialize(part, model, prefix=f"{name}.", seed=0, device=device)
        if degrees is None:
            to_precision(part, precision)
        else:
            apply_data_parallel(part, degrees, precision, meshes)
    if degrees is not None:
        apply_data_parallel(stage, degrees, precision, meshes)
    return stage


@dataclass(frozen=True)
class _Unit:
    """Seconds of one unit's forward and backward pass."""

    forward_s: float
    backward_s: float

    def __sub__(self, other: _Unit) -> _Unit:
        return _Unit(self.forward_s - other.forward_s, self.backward_s - other.backward_s)


def _time_unit(
    stage: Transformer,
    hidden: int,
    precision: Precision,
    device: torch.device,
    effort: Effort,
    *,
    accumulate: bool,
) -> _Unit:
    """Times the stage; without `accumulate`, parameters have no gradient when the backward pass begins."""
    x = torch.randn(1, _SEQ, hidden, device=device, dtype=DTYPES[precision]).requires_grad_()
    grad = torch.randn_like(x)
    held: dict[str, torch.Tensor] = {}

    def prepare() -> None:
        x.grad = None
        if not accumulate:
            stage.zero_grad()

    def forward() -> None:
        held["out"] = stage(x)

    def backward() -> None:
        torch.autograd.backward(held.pop("out"), grad)

    _, ahead, back = time_phases([prepare, forward, backward], effort, device)
    return _Unit(ahead.median_s / _UNITS, back.median_s / _UNITS)


@dataclass(frozen=True)
class _WrapperCosts:
    """What wrapping adds to one unit of `params` parameters, and what synchronising adds to that."""

    params: int
    accumulate_s: float
    hooks: _Unit
    sync: _Unit


def _wrapper_costs(
    hidden: int,
    degrees: Degrees,
    precision: Precision,
    device: torch.device,
    meshes: Meshes,
    effort: Effort,
) -> _WrapperCosts:
    """Bare against wrapped, with and without gathering parameters and reducing gradients."""
    times = {}
    for accumulate in (False, True):
        bare = _blocks(hidden, None, precision, device, meshes)
        times[accumulate] = _time_unit(bare, hidden, precision, device, effort, accumulate=accumulate)
    wrapped = _blocks(hidden, degrees, precision, device, meshes)
    for unit in units_of(wrapped):
        set_unit(unit, reduce=False, reshard=False)
    hooks = _time_unit(wrapped, hidden, precision, device, effort, accumulate=True) - times[True]
    wrapped = _blocks(hidden, degrees, precision, device, meshes)
    for unit in units_of(wrapped):
        set_unit(unit, reduce=True, reshard=True)
    synced = _time_unit(wrapped, hidden, precision, device, effort, accumulate=False) - times[False]
    block = _model(hidden, 1).segments[0].block
    return _WrapperCosts(
        params=block.params,
        accumulate_s=times[True].backward_s - times[False].backward_s,
        hooks=hooks,
        sync=synced - hooks,
    )


def _wrappers(device: torch.device, precision: Precision, effort: Effort) -> Iterator[Constant]:
    sharded = Degrees(dp_shard=2, zero=Zero.OPTIMIZER)
    replicated = Degrees(dp_replicate=2, zero=Zero.NONE)
    for name, degrees in (("fsdp", sharded), ("replicate", replicated)):
        with fake_world(degrees, device.type) as meshes:
            units = [
                _wrapper_costs(hidden, degrees, precision, device, meshes, effort)
                for hidden in (_SMALL_HIDDEN, *_LARGER_HIDDEN[device.type])
            ]
            messages = [_fake_message_s(unit.params, degrees, precision, device) for unit in units]
        yield from _wrapper_constants(name, units, messages, precision)
    yield constant(
        "grad_accumulate_s_per_param",
        max(units[1].accumulate_s, 0.0) / units[1].params,
        "backward pass into gradients that exist, against none",
    )


def _fake_message_s(
    params: int, degrees: Degrees, precision: Precision, device: torch.device
) -> tuple[float, float]:
    """Seconds that the fake backend itself takes to gather and to reduce one unit: not a rank's work."""
    few = Effort(warmup=2, least=5, most=20, budget_s=0.05)
    if degrees.dp_shard == 1:
        whole = torch.zeros(params, device=device)
        return 0.0, time_call(lambda: dist.all_reduce(whole), few, device).median_s
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    even = params // degrees.dp_shard * degrees.dp_shard
    weights = torch.zeros(even, device=device, dtype=DTYPES[precision])
    grads = torch.zeros(even, device=device)
    shard = weights[: even // degrees.dp_shard].clone()
    reduced = grads[: even // degrees.dp_shard].clone()
    gathered = time_call(lambda: gather(weights, shard), few, device)
    scattered = time_call(lambda: scatter(reduced, grads), few, device)
    return gathered.median_s, scattered.median_s


def _wrapper_constants(
    name: str, units: list[_WrapperCosts], messages: list[tuple[float, float]], precision: Precision
) -> Iterator[Constant]:
    """Of a small and a large unit, and of one beyond these where memory is not as quick for it."""
    small, each = units[0], list(zip(units, messages, strict=True))
    yield constant(
        f"{name}_unit_forward_s", max(small.hooks.forward_s, 0.0), "hooks of a wrapped block, no messages"
    )
    yield constant(
        f"{name}_unit_backward_s", max(small.hooks.backward_s, 0.0), "hooks of a wrapped block, no messages"
    )
    # Bytes of the whole unit: gathered in the compute precision, reduced in fp32.
    reduced = [(4.0 * unit.params, unit.sync.backward_s - reduce_s) for unit, (_, reduce_s) in each]
    yield from _copies(f"{name}_reduce", "reducing a block's gradients", reduced)
    if name == "fsdp":
        size = float(precision.compute_bytes)
        gathered = [(size * unit.params, unit.sync.forward_s - gather_s) for unit, (gather_s, _) in each]
        yield from _copies(f"{name}_gather", "gathering a block's parameters", gathered)
        slopes = [_line(*points[:2])[1] for points in (gathered, reduced)]
        yield constant("fsdp_copy_s_per_byte", sum(slopes) / 2, "mean of gathering and reducing")


def _copies(name: str, what: str, points: list[tuple[float, float]]) -> Iterator[Constant]:
    """The line through two points (bytes, seconds), and the slope from the second to a third."""
    unit_s, s_per_byte = _line(*points[:2])
    yield constant(f"{name}_unit_s", unit_s, f"{what}, per block")
    yield constant(f"{name}_copy_s_per_byte", s_per_byte, "the same, per byte")
    for beyond in points[2:]:
        bend_bytes, known_s = points[1]
        slope = max((beyond[1] - known_s) / (beyond[0] - bend_bytes), 0.0)
        yield constant(f"{name}_bend_bytes", bend_bytes, f"{what}: what lies beyond has the next slope")
        yield constant(f"{name}_beyond_s_per_byte", slope, "the same, per byte beyond")


def _line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Intercept and slope of the line through two points (size, seconds), neither below zero."""
    slope = max((large[1] - small[1]) / (large[0] - small[0]), 0.0)
    return max(small[1] - slope * small[0], 0.0), slope


# Pipeline actions
def _pipeline_action(device: torch.device, precision: Precision, effort: Effort) -> Iterator[Constant]:
    """Two stages on one rank, so without messages: through the schedule against called directly."""
    degrees = Degrees(chunks=2, schedule=Schedule.INTERLEAVED, num_micro_batches=_MICRO_BATCHES)
    model = _model(_SMALL_HIDDEN, 2)
    plan = bench_plan(model, degrees, _SEQ, precision)
    tokens = torch.zeros(degrees.batch, _SEQ, dtype=torch.int64, device=device)
    with fake_world(degrees, device.type) as meshes:
        stages = [_end_stage(model, index, precision, device) for index in range(2)]
        record = Record()
        modules = [StageModule(stage, index, Zero.NONE, record) for index, stage in enumerate(stages)]
        pipeline = Pipeline(plan, modules, meshes, device)

        def through() -> None:
            pipeline.run(tokens, tokens)

        def direct() -> None:
            for chunk in tokens.chunk(_MICRO_BATCHES):
                hidden = stages[0](chunk)
                received = hidden.detach().requires_grad_()
                torch.autograd.backward(stages[1](received, chunk) / _MICRO_BATCHES)
                torch.autograd.backward(hidden, received.grad)

        scheduled, called = time_phases([through, direct], effort, device)
    seconds = (scheduled.median_s - called.median_s) / (2 * 2 * _MICRO_BATCHES)
    yield constant("pp_action_s", max(seconds, 0.0), "a pass through the schedule against calling it")


def _end_stage(model: ModelSpec, index: int, precision: Precision, device: torch.device) -> Transformer:
    """One of two stages with a block each: the embedding is with the first, the head with the last."""
    stage = build_transformer(model, index, index + 1, index == 0, index == 1, seq=_SEQ)
    for name, part in stage.parts():
        materialize(part, model, prefix=f"{name}.", seed=0, device=device)
        to_precision(part, precision)
    return stage


# Optimizer
def _optimizer(device: torch.device, precision: Precision, effort: Effort) -> Iterator[Constant]:
    """AdamW, norm and clipping over many small tensors and over few large ones; masters are fp32."""
    del precision
    sizes = ((256, 256), (8, 2**20 if device.type == "cpu" else 2**24))
    points = [_optimizer_times(count, size, device, effort) for count, size in sizes]
    for index, name in enumerate(("optimizer", "clip")):
        few, many = sizes[1], sizes[0]
        a = (many[0], many[0] * many[1], points[0][index].median_s)
        b = (few[0], few[0] * few[1], points[1][index].median_s)
        per_tensor, per_param = _two_unknowns(a, b)
        how = "fused AdamW step" if name == "optimizer" else "gradient norm and scaling"
        yield constant(f"{name}_s_per_tensor", per_tensor, how)
        yield constant(f"{name}_s_per_param", per_param, how)


def _optimizer_times(count: int, size: int, device: torch.device, effort: Effort) -> tuple[Timing, Timing]:
    shards = [nn.Parameter(torch.randn(1, size, device=device)) for _ in range(count)]
    grads = [torch.randn_like(shard) for shard in shards]
    for shard, grad in zip(shards, grads, strict=True):
        shard.grad = grad
    weights = [Weight(name="", path="", parameter=shard, shard=shard, share=1.0) for shard in shards]
    optimizer = build_optimizer(Optimizer.ADAMW, weights, OptimizerOptions())

    def norm_and_clip() -> None:
        norm = float(weighted_square_sum(grads, [1.0] * count).sqrt())
        clip(grads, norm, norm / 1.0001)

    step, clipping = time_phases([optimizer.step, norm_and_clip], effort, device)
    return step, clipping


def _two_unknowns(a: tuple[int, int, float], b: tuple[int, int, float]) -> tuple[float, float]:
    """Seconds per tensor and per parameter from two (tensors, parameters, seconds), none below zero."""
    per_param = max((b[2] - a[2] * b[0] / a[0]) / (b[1] - a[1] * b[0] / a[0]), 0.0)
    return max((a[2] - per_param * a[1]) / a[0], 0.0), per_param


CONSTANTS: dict[str, Callable[[torch.device, Precision, Effort], Iterator[Constant]]] = {
    "rates": rates,
    "overlap": overlap,
    "the allocator": allocator,
    "launches": _launches,
    "wrappers": _wrappers,
    "pipeline actions": _pipeline_action,
    "the optimizer": _optimizer,
}
"""What measures each group of constants."""


@frozen
class HostCase:
    """One group of constants that are measured together."""

    group: str

    def label(self) -> str:
        return f"constants of {self.group}"


@dataclass(frozen=True)
class HostFamily:
    """Rates, wrappers, pipeline actions, optimizer."""

    device_type: str
    precision: Precision
    effort: Effort

    @property
    def name(self) -> str:
        return "host"

    def cases(self) -> Sequence[HostCase]:
        groups = [group for group in CONSTANTS if self.device_type == "cuda" or group not in OF_CUDA]
        return [HostCase(group=group) for group in groups]

    def together(self, case: HostCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[HostCase]) -> Iterator[Reading]:
        groups = [case.group for case in cases]
        for message in measure_host(groups, self.device_type, self.precision, self.effort):
            constants = (
                decode(Constant, each, source="a measuring process") for each in message["constants"]
            )
            yield Reading(samples=tuple(constants))


@frozen
class CommunicatorCase:
    """One more process group over `ranks` devices of this node."""

    ranks: int

    def label(self) -> str:
        return f"a communicator of {self.ranks} ranks"


@dataclass(frozen=True)
class CommunicatorFamily:
    """Device memory of communicators; they take none on a CPU, and one device has none."""

    ranks: int
    on_cuda: bool

    @property
    def name(self) -> str:
        return "communicators"

    def cases(self) -> Sequence[CommunicatorCase]:
        return [CommunicatorCase(ranks=self.ranks)] if self.on_cuda and self.ranks > 1 else []

    def together(self, case: CommunicatorCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[CommunicatorCase]) -> Iterator[Reading]:
        for case in cases:
            yield from readings(Constant, measure_communicators(case.ranks))


@frozen
class ContentionCase:
    """Up to `ranks` ranks of a node at work at once."""

    ranks: int

    def label(self) -> str:
        return f"contention of up to {self.ranks} ranks"


@dataclass(frozen=True)
class ContentionFamily:
    """Slowdown of compute by the number of ranks at work on `cores`. Accelerators do not share theirs."""

    model: ModelSpec
    seq: int
    ranks: int
    cores: int
    precision: Precision
    window_s: float
    on_cuda: bool

    @property
    def name(self) -> str:
        return "contention"

    def cases(self) -> Sequence[ContentionCase]:
        return [ContentionCase(ranks=self.ranks)]

    def together(self, case: ContentionCase) -> Hashable:
        return None

    def measure(self, cases: Sequence[ContentionCase]) -> Iterator[Reading]:
        for case in cases:
            yield Reading(samples=tuple(self._free(case) if self.on_cuda else self._measured(case)))

    def _free(self, case: ContentionCase) -> list[ContentionSample]:
        return [ContentionSample(active=n, slowdown=1.0) for n in range(1, case.ranks + 1)]

    def _measured(self, case: ContentionCase) -> list[ContentionSample]:
        taken = measure_contention(
            self.model, self.seq, case.ranks, self.cores, self.precision, self.window_s
        )
        return contention(list(taken), self.cores)


def contention(taken: Sequence[Contended], cores: int) -> list[ContentionSample]:
    """The slowdown with each number of ranks at work: of rounds, each against its block alone, the median."""
    rounds: dict[int, dict[int, list[float]]] = {}
    for each in taken:
        rounds.setdefault(each.active, {}).setdefault(each.turn, []).append(each.seconds)
    alone = {turn: statistics.fmean(seconds) for turn, seconds in rounds.pop(0).items()}
    samples: list[ContentionSample] = []
    most = 1.0
    for active, turns in sorted(rounds.items()):
        ratios = [statistics.fmean(seconds) / alone[turn] for turn, seconds in turns.items()]
        most = max(most, statistics.median(ratios))  # more ranks never slow each other less: that is noise
        samples.append(ContentionSample(active=active, slowdown=max(1.0, active / cores) * most))
    return samples
