"""Time and memory of each layer class: embedding, blocks of every kind, head, by shape, shards and recompute.

A layer is measured as the runtime runs it: as a stage that holds nothing else, with the hooks of tensor,
context and expert parallelism of a real plan on a fake world. Their host time is part of the truth; messages
are answered at once (`runtime.launch.process_group`), with experts as busy as balanced routers make them.

Memory, all relative to just before the layer's input exists, by the real allocator:

- `saved_bytes`: what is alive after the forward pass when the caller has let go of the input, without the
  output. So a layer owns its input (the residual stream, counted once, where the layer needs it later) and
  never its output, which is the next layer's input: sums over consecutive layers neither lose nor repeat
  the boundary. Parameters were there before and are not counted.
- `forward_transient_bytes`: the peak of the forward pass, above `saved_bytes`. It includes the output.
- `backward_transient_bytes`: the peak of the backward pass, above `saved_bytes`. It includes the gradients
  of the output and of the input, what is recomputed, and a parameter's gradient on its way to being
  added; the accumulated gradients themselves were there before and are not counted.

The backward pass adds to gradients that exist, as all micro-batches of a step but the first do.

Which cases of a model's layers there are: every class at several lengths, micro-batches and ways to shard.

Embedding and head do not see context and expert parallelism, whose ranks are measured of blocks alone: those
with attention by every exchange, those with experts as whole experts and, under sequence parallelism, in no
shards besides. Blocks that recompute, that share out a sequence or experts, or that are compiled are measured
at two micro-batches, the first and (of more than two) the last but one: their times and bytes are lines, like
those of the plain ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planner.foundation.decode import encode
from planner.foundation.frozen import frozen
from planner.model.attention import CpExchange
from planner.model.feed_forward import Experts
from planner.model.spec import Block, ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, LayerSample, shape_key
from planner.strategy.engines.native import context_not_executed, vocabulary_not_executed
from planner.strategy.parallel_rules import SPREAD_RULES
from planner.strategy.strategy import Degrees
from runtime.check.memory import storage_bytes, trace_phases
from runtime.model.fp8 import apply_fp8
from runtime.model.precision import compute_dtype
from runtime.model.transformer import Transformer, build_transformer, materialize
from runtime.parallel.context import apply_context_parallel, hidden_positions
from runtime.parallel.expert import apply_expert_parallel, keep_own_experts
from runtime.parallel.meshes import Meshes, fake_world
from runtime.parallel.parallelize import apply_recompute
from runtime.parallel.recompute import apply_compile
from runtime.parallel.tensor import apply_tensor_parallel
from runtime.profiler.timed_plans import bench_plan
from runtime.profiler.timing import (
    Effort,
    Emit,
    Reference,
    Timing,
    run_children,
    run_phases,
    summarize,
    time_apart,
)

DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}

STEADY_SPREAD = 0.25
ATTEMPTS = 2
"""A sample whose interquartile range is more than this share of its median is taken again."""


@frozen
class LayerCase:
    """One sample to take. `block` is the class of a block, by its key; empty: the model's first.

    `seq` are the tokens of whole sequences, which cp ranks share out; `etp` None: as many as tp.
    """

    kind: LayerKind
    recompute: Recompute
    tp: int
    sequence_parallel: bool
    micro_batch: int
    seq: int
    block: str = ""
    cp: int = 1
    cp_exchange: CpExchange = CpExchange.RING
    ep: int = 1
    etp: int | None = None
    compiled: bool = False

    def label(self) -> str:
        """A short name for progress and messages; the whole key where the class is not the first."""
        parts = [str(self.kind), f"tp{self.tp}" + ("+sp" if self.sequence_parallel else "")]
        parts += [f"cp{self.cp}-{self.cp_exchange}"] if self.cp > 1 else []
        parts += [f"ep{self.ep}"] if self.ep > 1 else []
        parts += [f"etp{self.etp}"] if self.etp is not None else []
        parts.append(f"micro-batch {self.micro_batch} of {self.seq} tokens")
        parts += [] if self.recompute is Recompute.NONE else [f"recompute {self.recompute}"]
        parts += ["compiled"] if self.compiled else []
        return " ".join([*parts, *([f"({self.block})"] if self.block else [])])

    def degrees(self) -> Degrees:
        """The smallest world in which a rank runs this: enough replicas to share out the experts."""
        ranks = self.ep * (self.etp or self.tp)
        return Degrees(
            tp=self.tp,
            sequence_parallel=self.sequence_parallel,
            cp=self.cp,
            cp_exchange=self.cp_exchange,
            ep=self.ep,
            etp=self.etp,
            dp_replicate=ranks // math.gcd(ranks, self.cp * self.tp),
            micro_batch=self.micro_batch,
        )


def divides(model: ModelSpec, tp: int) -> bool:
    """Whether every size that tensor parallelism splits is a multiple of `tp`."""
    heads = all(heads.split_over(tp) for heads in model.heads_split)
    widths = all(size % tp == 0 for size, _ in model.widths_split)
    return heads and widths and not vocabulary_not_executed(model, Degrees(tp=tp))


def measure_layers(
    cases: Sequence[LayerCase], model: ModelSpec, precision: Precision, device_type: str, effort: Effort
) -> Iterator[dict[str, Any]]:
    """Yields the sample of each case (encoded), or `{"skipped": why}`, all from one process."""

    def body(rank: int, emit: Emit) -> None:
        torch.set_num_threads(1)
        for case in cases:
            with fake_world(case.degrees(), device_type, model.heads_copied(case.tp)) as meshes:
                try:
                    emit(encode(_sample(case, model, precision, meshes, effort)))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    emit({"skipped": f"{case.label()}: not enough memory"})
                    _free(device_type)

    yield from run_children(body)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that the device or the host has no memory left."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text


def _free(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.empty_cache()


def _sample(
    case: LayerCase, model: ModelSpec, precision: Precision, meshes: Meshes, effort: Effort
) -> LayerSample:
    bench = LayerBench(case, build_layer(case, model, precision, meshes), model, precision)
    times = bench.times(effort)
    saved, forward_peak, backward_peak = bench.memory()
    block = model.classes()[case.block] if case.block else None
    return LayerSample(
        kind=case.kind,
        shape_key=shape_key(model, case.kind, block),
        precision=precision,
        recompute=case.recompute,
        tp=case.tp,
        sequence_parallel=case.sequence_parallel,
        micro_batch=case.micro_batch,
        seq=case.seq,
        forward_s=times.forward.median_s,
        backward_s=times.backward.median_s,
        saved_bytes=saved,
        forward_transient_bytes=max(forward_peak - saved, 0),
        backward_transient_bytes=max(backward_peak - saved, 0),
        spread=times.spread,
        samples=times.forward.samples,
        reference_s=times.reference_s,
        cp=case.cp,
        cp_exchange=case.cp_exchange if case.cp > 1 else None,
        ep=case.ep,
        etp=case.etp,
        compiled=case.compiled,
        host_forward_s=times.host_forward_s,
        host_backward_s=times.host_backward_s,
    )


def build_layer(case: LayerCase, model: ModelSpec, precision: Precision, meshes: Meshes) -> Transformer:
    """A stage with one layer in it, sharded as the case says, in the compute precision, with gradients.

    Steps and their order are those of `runtime.parallel.parallelize.build_stage`, data parallelism left out.
    """
    first, end = _layers_of(case, model)
    ends = (case.kind is LayerKind.EMBEDDING, case.kind is LayerKind.HEAD)
    layer, degrees = build_transformer(model, first, end, *ends, seq=case.seq), case.degrees()
    if case.compiled:
        torch._dynamo.reset()  # it keeps few compilations of one function, and runs the next ones eagerly
    for name, part in layer.parts():
        block = name.startswith("layers.")
        keep_own_experts(part, meshes)
        materialize(part, model, prefix=f"{name}.", seed=0, device=meshes.world.device_type)
        to_precision(part, precision)
        apply_tensor_parallel(name, part, degrees, meshes)
        apply_context_parallel(part, case.seq, degrees, meshes)
        apply_expert_parallel(part, case.seq, degrees, meshes)
        apply_fp8(part, precision)
        wrapped = apply_recompute(layer, name, part, case.recompute if block else Recompute.NONE)
        if case.compiled:
            apply_compile(wrapped, block=block)
    if degrees.sequence_parallel or degrees.cp > 1:
        layer.position_ids = hidden_positions(case.seq, degrees, meshes).to(meshes.world.device_type)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return layer


def _layers_of(case: LayerCase, model: ModelSpec) -> tuple[int, int]:
    """The first layer of the class, as a range; none for embedding and head."""
    if case.kind is not LayerKind.BLOCK:
        return 0, 0
    keys = [segment.block.shape_key for segment in model.segments]
    segment = keys.index(case.block) if case.block else 0
    first = sum(before.count for before in model.segments[:segment])
    return first, first + 1


def to_precision(module: nn.Module, precision: Precision) -> None:
    """Parameters in the compute precision. Buffers stay: the rotary tables are fp32 in every precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(compute_dtype(precision))


class Times(NamedTuple):
    """Passes of a layer.

    Beside them, on a CPU, the seconds of the reference; on an accelerator those that the host takes to begin
    each pass, None where it waits for the device meanwhile.
    """

    forward: Timing
    backward: Timing
    reference_s: float | None = None
    host_forward_s: float | None = None
    host_backward_s: float | None = None

    @property
    def spread(self) -> float:
        return max(self.forward.spread, self.backward.spread)


class LayerBench:
    """One micro-batch of one layer, pass by pass; holds what a pipeline stage would hold."""

    def __init__(self, case: LayerCase, layer: Transformer, model: ModelSpec, precision: Precision) -> None:
        self.case, self.layer = case, layer
        self.device = next(layer.parameters()).device
        self.reference = Reference()
        tokens = case.seq // case.cp
        shape = (case.micro_batch, tokens)
        hidden = (case.micro_batch, tokens // case.tp if case.sequence_parallel else tokens, model.hidden)
        dtype = compute_dtype(precision)
        self.source = (
            torch.randint(0, model.vocab, shape, device=self.device)
            if case.kind is LayerKind.EMBEDDING
            else torch.randn(hidden, device=self.device, dtype=dtype).requires_grad_()
        )
        self.targets = torch.randint(0, model.vocab, shape, device=self.device)
        # The next layer's gradient; its bytes are counted with the backward pass.
        self.output_grad = (
            None if case.kind is LayerKind.HEAD else torch.full(hidden, 1e-3, device=self.device, dtype=dtype)
        )
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def prepare(self) -> None:
        """A fresh input, such as the layer before would hand over: not a leaf, held by nobody else."""
        self.source.grad = None
        self.input = self.source.clone()

    def forward(self) -> None:
        assert self.input is not None
        targets = self.targets if self.case.kind is LayerKind.HEAD else None
        self.output = self.layer(self.input, targets)

    def backward(self) -> None:
        assert self.output is not None
        torch.autograd.backward(self.output, self.output_grad)
        self.input = self.output = None

    def times(self, effort: Effort) -> Times:
        """Forward and backward; what was disturbed is taken again, and the steadiest is kept.

        On a CPU the reference runs before each forward pass, and each run is expressed at the median
        speed of the sample's runs.
        """
        attempts = []
        for _ in range(ATTEMPTS):
            attempt = self._times(effort)
            attempts.append(attempt)
            if attempt.spread <= STEADY_SPREAD:
                break
        return min(attempts, key=lambda attempt: attempt.spread)

    def _times(self, effort: Effort) -> Times:
        if self.device.type != "cpu":
            _, ahead, back = time_apart([self.prepare, self.forward, self.backward], effort, self.device)
            return Times(ahead.device, back.device, None, ahead.host_s, back.host_s)
        _, beside, forward, backward = run_phases(
            [self.prepare, self.reference, self.forward, self.backward], effort, self.device
        )
        usual_s = statistics.median(beside)
        return Times(
            summarize([taken * usual_s / now for taken, now in zip(forward, beside, strict=True)]),
            summarize([taken * usual_s / now for taken, now in zip(backward, beside, strict=True)]),
            usual_s,
        )

    def memory(self) -> tuple[int, int, int]:
        """Saved bytes, and the peaks of forward and backward, as the module's docstring defines them."""
        output_bytes = 0
        self.source.grad = None  # an earlier run's, which the trace would see released

        def note_output() -> None:
            nonlocal output_bytes
            assert self.output is not None
            self.input = None
            output_bytes = storage_bytes([self.output])

        phases: list[Callable[[], object]] = [self.prepare, self.forward, note_output, self.backward]
        _, forward, kept, backward = trace_phases(phases, self.device)
        saved = kept.end_bytes - output_bytes
        grad_bytes = storage_bytes([self.output_grad]) if self.output_grad is not None else 0
        return saved, forward.peak_bytes, backward.peak_bytes - output_bytes + grad_bytes


def layer_cases(
    model: ModelSpec,
    seqs: Sequence[int],
    widths: Sequence[int],
    micro_batches: Sequence[int],
    cps: Sequence[int] = (1,),
    eps: Sequence[int] = (1,),
    compiled: Sequence[bool] = (False,),
) -> list[LayerCase]:
    """All cases whose sizes the shards divide; those that plans need most come first, compiled ones, which
    take longest to begin, last."""
    fewer = [micro_batches[0], *micro_batches[1:][-2:][:1]]
    found = []
    for seq in seqs:
        plain = list(_plain(model, seq, widths))
        found += [
            dataclasses.replace(case, micro_batch=micro_batch)
            for case in plain
            for micro_batch in (micro_batches if case.recompute is Recompute.NONE else fewer)
        ]
        special = [*_spread(plain, model, cps, eps), *(_compiled(plain) if True in compiled else [])]
        found += [
            dataclasses.replace(case, micro_batch=micro_batch) for case in special for micro_batch in fewer
        ]
    if False not in compiled:
        found = [case for case in found if case.compiled]
    legal = [case for case in found if _legal(case, model)]
    return sorted(legal, key=lambda case: (case.compiled, case.cp > 1 or case.ep > 1))


def _plain(model: ModelSpec, seq: int, widths: Sequence[int]) -> Iterator[LayerCase]:
    """One micro-batch of each layer class, with each width and recompute."""
    first = next(iter(model.classes()))
    blocks = ["" if key == first else key for key in model.classes()]
    kinds = [(LayerKind.EMBEDDING, ""), *((LayerKind.BLOCK, key) for key in blocks), (LayerKind.HEAD, "")]
    for tp, parallel, (kind, block) in itertools.product(widths, (False, True), kinds):
        if not divides(model, tp) or (parallel and (tp == 1 or seq % tp)):
            continue
        for recompute in Recompute if kind is LayerKind.BLOCK else [Recompute.NONE]:
            yield LayerCase(
                kind=kind,
                recompute=recompute,
                tp=tp,
                sequence_parallel=parallel,
                micro_batch=1,
                seq=seq,
                block=block,
            )


def _spread(
    plain: Sequence[LayerCase], model: ModelSpec, cps: Sequence[int], eps: Sequence[int]
) -> Iterator[LayerCase]:
    """The blocks of ranks that share out sequences, or experts."""
    blocks = [c for c in plain if c.kind is LayerKind.BLOCK and c.recompute is Recompute.NONE]
    for case, cp, exchange in itertools.product(blocks, (cp for cp in cps if cp > 1), CpExchange):
        yield dataclasses.replace(case, cp=cp, cp_exchange=exchange)
    routed = [case for case in blocks if isinstance(_mlp(case, model), Experts)]
    for case, ep in itertools.product(routed, (ep for ep in eps if ep > 1)):
        yield dataclasses.replace(case, ep=ep)
        if case.tp > 1:
            yield dataclasses.replace(case, ep=ep, etp=1)


def _compiled(plain: Sequence[LayerCase]) -> Iterator[LayerCase]:
    """The layers that torch.compile changes: blocks, and the passes of the head's loss."""
    for case in plain:
        if case.kind is not LayerKind.EMBEDDING:
            yield dataclasses.replace(case, compiled=True)


def _mlp(case: LayerCase, model: ModelSpec) -> object:
    block = model.classes()[case.block] if case.block else model.segments[0].block
    return block.mlp if isinstance(block, Block) else None


def _legal(case: LayerCase, model: ModelSpec) -> bool:
    """Whether a plan with these shards could be trained."""
    degrees = case.degrees()
    if case.sequence_parallel and case.seq // case.cp % case.tp:
        return False
    problem = bench_plan(model, degrees, case.seq, Precision.FP32).problem
    broken = any(rule(problem, degrees) for rule in SPREAD_RULES)
    return not broken and not context_not_executed(model, degrees)


def corners(cases: Sequence[LayerCase]) -> list[LayerCase]:
    """Of each layer class the cases between which all others lie.

    Unsplit (or of the smallest width) and keeping everything: its shortest and longest sequences in the
    smallest and largest micro-batch. Of every other way to run it that differs in one thing alone, the most
    of it: the smallest shape, where its host's part shows, and the largest.
    """
    by_class: dict[tuple[LayerKind, str], list[LayerCase]] = {}
    for case in cases:
        by_class.setdefault((case.kind, case.block), []).append(case)
    found: list[LayerCase] = []
    for own in by_class.values():
        plain = min(own, key=_ways)
        alike = [case for case in own if _ways(case) == _ways(plain)]
        ends = [max(case.seq for case in alike), min(case.seq for case in alike)]
        for seq in dict.fromkeys(ends):
            batches = [case.micro_batch for case in alike if case.seq == seq]
            found += [c for c in alike if c.seq == seq and c.micro_batch in (min(batches), max(batches))]
        found += _farthest(own, plain)
    return found


def _ways(case: LayerCase) -> tuple[bool, int, int, int, bool, int, str]:
    """How a case is run besides its tokens, the plainest first."""
    recompute = list(Recompute).index(case.recompute)
    exchange = str(case.cp_exchange) if case.cp > 1 else ""
    shards = case.ep * 1000 + (case.etp or 0)
    return case.compiled, case.cp, shards, recompute, case.sequence_parallel, case.tp, exchange


def _farthest(own: Sequence[LayerCase], plain: LayerCase) -> list[LayerCase]:
    """The smallest and the largest shape of each way to run a class that changes one thing, of widths and
    ranks with the most."""
    ways: dict[object, list[LayerCase]] = {}
    for case in own:
        changed = {
            "recompute": case.recompute if case.recompute is not plain.recompute else None,
            "tp": case.sequence_parallel if case.tp != plain.tp else None,
            "cp": case.cp_exchange if case.cp != plain.cp else None,
            "ep": case.etp is None if case.ep != plain.ep else None,
            "compiled": True if case.compiled is not plain.compiled else None,
        }
        what = {name: value for name, value in changed.items() if value is not None}
        # Experts in no shards besides need a width to be split by.
        if len(what) == 1 or (what.keys() == {"tp", "ep"} and case.etp is not None):
            ways.setdefault(tuple(what.items()), []).append(case)
    found: list[LayerCase] = []
    for cases in ways.values():
        most = max((case.tp, case.cp, case.ep) for case in cases)
        ranked = sorted(
            (case for case in cases if (case.tp, case.cp, case.ep) == most),
            key=lambda case: (case.micro_batch * case.seq, case.seq),
        )
        found += dict.fromkeys((ranked[-1], ranked[0]))
    return found
