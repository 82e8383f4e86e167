"""Time and memory of each layer class: embedding, block, head, by micro-batch, shard width and recompute.

A layer is measured as the runtime runs it: as a stage that holds nothing else, with the tensor-parallel
hooks of a real plan on a fake world (their host time is part of the truth, communication is not).

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
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planner.codec import encode, noun
from planner.execution import executed_widths
from planner.model import ModelSpec
from planner.profile import LayerKind, LayerSample, shape_key
from planner.strategy import Degrees, Recompute
from planner.workload import Precision
from runtime.children import Emit, run_children
from runtime.fake_world import fake_world
from runtime.memory import storage_bytes, trace_phases
from runtime.parallel.meshes import Meshes
from runtime.parallel.tensor import apply_tensor_parallel
from runtime.parallelize import apply_recompute
from runtime.timing import Effort, Reference, Timing, run_phases, summarize, time_phases
from runtime.transformer.initial import materialize
from runtime.transformer.model import Transformer, build_transformer

DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}

STEADY_SPREAD = 0.25
ATTEMPTS = 2
"""A sample whose interquartile range is more than this share of its median is taken again."""


@noun
class LayerCase:
    """One sample to take."""

    kind: LayerKind
    recompute: Recompute
    tp: int
    sequence_parallel: bool
    micro_batch: int

    def label(self) -> str:
        """A short name for progress and messages."""
        width = f"tp{self.tp}" + ("+sp" if self.sequence_parallel else "")
        again = "" if self.recompute is Recompute.NONE else f" recompute {self.recompute}"
        return f"{self.kind} {width} micro-batch {self.micro_batch}{again}"


def layer_cases(
    model: ModelSpec, seq: int, widths: Sequence[int], micro_batches: Sequence[int]
) -> list[LayerCase]:
    """All cases of a model whose sizes the widths divide, those of one width together.

    Recomputing blocks are measured at two micro-batches only, the first and (of more than two) the last
    but one: their time and bytes are lines, like those of blocks that keep everything.
    """
    fewer = [micro_batches[0], *micro_batches[1:][-2:][:1]]
    return [
        LayerCase(kind=kind, recompute=recompute, tp=tp, sequence_parallel=parallel, micro_batch=micro_batch)
        for tp in widths
        if divides(model, tp)
        for parallel in (False, True)
        if not parallel or (tp > 1 and seq % tp == 0)
        for kind in LayerKind
        for recompute in (Recompute if kind is LayerKind.BLOCK else [Recompute.NONE])
        for micro_batch in (micro_batches if recompute is Recompute.NONE else fewer)
    ]


def divides(model: ModelSpec, tp: int) -> bool:
    """Whether every size that tensor parallelism splits is a multiple of `tp`."""
    return all(size % tp == 0 for size, _ in (*model.heads_split, *executed_widths(model)))


def measure_layers(
    cases: Sequence[LayerCase],
    model: ModelSpec,
    seq: int,
    precision: Precision,
    device_type: str,
    effort: Effort,
) -> Iterator[dict[str, Any]]:
    """Yields the sample of each case (encoded), or `{"skipped": why}`. All cases have one width."""

    def body(rank: int, emit: Emit) -> None:
        torch.set_num_threads(1)
        for case in cases:
            with fake_world(_degrees(case), device_type) as meshes:
                try:
                    emit(encode(_sample(case, model, seq, precision, meshes, effort)))
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


def _degrees(case: LayerCase) -> Degrees:
    return Degrees(tp=case.tp, sequence_parallel=case.sequence_parallel)


def _sample(
    case: LayerCase, model: ModelSpec, seq: int, precision: Precision, meshes: Meshes, effort: Effort
) -> LayerSample:
    device = torch.device(meshes.world.device_type)
    layer = build_layer(case.kind, case.recompute, model, seq, precision, _degrees(case), meshes)
    bench = LayerBench(case, layer, model, seq, precision, device)
    times = bench.times(effort)
    saved, forward_peak, backward_peak = bench.memory()
    return LayerSample(
        kind=case.kind,
        shape_key=shape_key(model, case.kind),
        precision=precision,
        recompute=case.recompute,
        tp=case.tp,
        sequence_parallel=case.sequence_parallel,
        micro_batch=case.micro_batch,
        seq=seq,
        forward_s=times.forward.median_s,
        backward_s=times.backward.median_s,
        saved_bytes=saved,
        forward_transient_bytes=max(forward_peak - saved, 0),
        backward_transient_bytes=max(backward_peak - saved, 0),
        spread=times.spread,
        samples=times.forward.samples,
        reference_s=times.reference_s,
    )


def build_layer(
    kind: LayerKind,
    recompute: Recompute,
    model: ModelSpec,
    seq: int,
    precision: Precision,
    degrees: Degrees,
    meshes: Meshes,
) -> Transformer:
    """A stage with one layer class in it, sharded over tp, in the compute precision, with gradients."""
    first, end = (0, 1) if kind is LayerKind.BLOCK else (0, 0)
    layer = build_transformer(model, first, end, kind is LayerKind.EMBEDDING, kind is LayerKind.HEAD, seq=seq)
    for name, part in layer.parts():
        materialize(part, model, prefix=f"{name}.", seed=0, device=meshes.world.device_type)
        to_precision(part, precision)
        apply_tensor_parallel(name, part, degrees, meshes)
        apply_recompute(layer, name, part, recompute if name.startswith("layers.") else Recompute.NONE)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return layer


def to_precision(module: nn.Module, precision: Precision) -> None:
    """Parameters in the compute precision. Buffers stay: the rotary tables are fp32 in every precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])


class Times(NamedTuple):
    """Passes of a layer, and the seconds of the reference beside them (None on an accelerator)."""

    forward: Timing
    backward: Timing
    reference_s: float | None

    @property
    def spread(self) -> float:
        return max(self.forward.spread, self.backward.spread)


class LayerBench:
    """One micro-batch of one layer, pass by pass; holds what a pipeline stage would hold."""

    def __init__(
        self,
        case: LayerCase,
        layer: Transformer,
        model: ModelSpec,
        seq: int,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.case, self.layer, self.device = case, layer, device
        self.reference = Reference()
        shape = (case.micro_batch, seq)
        local_seq = seq // case.tp if case.sequence_parallel else seq
        hidden = (case.micro_batch, local_seq, model.hidden)
        dtype = DTYPES[precision]
        self.source = (
            torch.randint(0, model.vocab, shape, device=device)
            if case.kind is LayerKind.EMBEDDING
            else torch.randn(hidden, device=device, dtype=dtype).requires_grad_()
        )
        self.targets = torch.randint(0, model.vocab, shape, device=device)
        # The next layer's gradient; its bytes are counted with the backward pass.
        self.output_grad = (
            None if case.kind is LayerKind.HEAD else torch.full(hidden, 1e-3, device=device, dtype=dtype)
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
            _, *passes = time_phases([self.prepare, self.forward, self.backward], effort, self.device)
            return Times(passes[0], passes[1], None)
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
