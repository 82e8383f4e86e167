"""Constants of a device: rates, what overlaps, and memory besides tensors.

Each constant is in SI units and says how it came to be. Overlap and the allocator are CUDA's alone: a CPU has
no second stream, and no allocator that keeps what is freed.

How much longer a layer takes among others than alone: those of its stage, and ranks on the same cores.

Layers are measured alone, one in a loop (`runtime.profiler.layers`). In training a stage's other
layers and
the ranks of a machine pass through the same caches and memory, and where ranks are more than cores they
take turns. So what is compared is a block in a loop on an idle machine, and several blocks one after
another with 1, 2, ... ranks at work.

Seconds are those that a process had of a core: what others take of the machine is not in them. Where more
ranks work than there are cores, each waits for its turn besides: ranks / cores times as long. By the wall,
4 ranks on 2 cores were slowed 1.5 to 2.4 times in twelve measurements of one machine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.foundation.decode import encode
from planner.foundation.frozen import frozen
from planner.model.attention import Attention
from planner.model.feed_forward import Activation, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.workload import Precision
from planner.profile.profile import Constant
from runtime.check.memory import rss_bytes
from runtime.model.transformer import Transformer, build_transformer, materialize
from runtime.profiler.layers import DTYPES, to_precision
from runtime.profiler.timing import Effort, Emit, Reference, run_children, summarize, time_call

PRODUCT_DIM = 8192
"""Of the products beside which copies run: large ones, as in a block of a large model."""

COPY_BYTES = 256 * 2**20
BESIDE_S, FEWEST_CALLS = 0.02, 4
"""A copy's length; how long products and copies run beside each other in one run, and the fewest calls."""


def constant(name: str, value: float, how: str) -> Constant:
    """A measured constant."""
    return Constant(name=name, value=float(value), origin=f"measured: {how}")


def llama(hidden: int, layers: int, seq: int, *, heads: tuple[int, int], width: int) -> ModelSpec:
    """Blocks of a llama for costs that no model in particular has; `heads` are those of queries and keys."""
    queries, keys = heads
    block = Block(
        hidden=hidden,
        norm=Norm.RMSNORM,
        mixer=Attention(heads=queries, kv_heads=keys, head_dim=hidden // queries),
        mlp=Mlp(width=width, gated=True, activation=Activation.SILU),
    )
    return ModelSpec(
        name="blocks",
        model_type="llama",
        hidden=hidden,
        vocab=64,
        max_positions=seq,
        learned_positions=0,
        rope_theta=10_000.0,
        norm=Norm.RMSNORM,
        norm_eps=1e-5,
        initializer_range=0.02,
        tied_embeddings=False,
        segments=(Segment(block=block, count=layers),),
    )


def rates(device: torch.device, precision: Precision, effort: Effort) -> Iterator[Constant]:
    """Rates of a large product and a copy; what a process holds beside tensors."""
    resident_bytes = rss_bytes()
    size = 1024 if device.type == "cpu" else PRODUCT_DIM
    a = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    product = time_call(lambda: a @ a, effort, device)
    yield constant("gemm_flops", 2.0 * size**3 / product.median_s, f"{size}^3 product in {precision}")
    source = torch.ones((64 if device.type == "cpu" else 1024) * 2**18, device=device)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), effort, device)
    moved = 2.0 * source.numel() * source.element_size()
    yield constant("memory_bytes_per_s", moved / copy.median_s, "copy, reads and writes counted")
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        context = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
        yield constant("context_bytes", context, "in use on the device beyond the allocator's memory")
    yield constant("runtime_bytes", resident_bytes, "resident bytes of a process that imported torch")


OF_CUDA = ("overlap", "the allocator")
"""Groups of constants that only CUDA has."""


# Overlap
def overlap(device: torch.device, precision: Precision, effort: Effort) -> Iterator[Constant]:
    """How a loop of products and a running copy slow each other.

    The copy goes on in a stream of its own, from device memory to device memory as a collective's kernels
    read and write it. Either is timed while the other outlasts it.
    """
    a = torch.randn(PRODUCT_DIM, PRODUCT_DIM, device=device, dtype=DTYPES[precision])
    product = torch.empty_like(a)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    pair = Beside(device, lambda: torch.mm(a, a, out=product), lambda: target.copy_(source))
    work, message = pair.slowdowns(effort)
    yield constant(
        "overlap_slowdown", max(work - 1, 0.0), f"{PRODUCT_DIM}^3 products in {precision} beside a copy"
    )
    yield constant(
        "overlap_message_slowdown", max(message - 1, 0.0), f"a copy beside {PRODUCT_DIM}^3 products"
    )


class Beside:
    """Two loops of kernels on one device, in streams of their own."""

    def __init__(
        self, device: torch.device, work: Callable[[], object], message: Callable[[], object]
    ) -> None:
        self.device, self.calls = device, (work, message)
        self.streams = [torch.cuda.Stream(device) for _ in self.calls]  # type: ignore[no-untyped-call]
        self.counts = [FEWEST_CALLS, FEWEST_CALLS]
        for index in range(2):
            self._alone_s(index)  # libraries load their kernels at the first call
        self.counts = [max(FEWEST_CALLS, round(BESIDE_S / self._alone_s(index))) for index in range(2)]

    def slowdowns(self, effort: Effort) -> tuple[float, float]:
        """Time of work, and of the message, over that alone."""
        found = []
        for index in range(2):
            runs = max(effort.least, min(effort.most, round(effort.budget_s / BESIDE_S)))
            alone = summarize([self._alone_s(index) for _ in range(runs)])
            both = summarize([self._beside_s(index) for _ in range(runs)])
            found.append(both.median_s / alone.median_s)
        return found[0], found[1]

    def _alone_s(self, index: int) -> float:
        torch.cuda.synchronize(self.device)
        return self._timed(index, self.counts[index])()

    def _beside_s(self, index: int) -> float:
        """One call's time while the other loop, begun before, runs twice as long."""
        other = 1 - index
        torch.cuda.synchronize(self.device)
        self._timed(other, 2 * self.counts[other])
        return self._timed(index, self.counts[index])()

    def _timed(self, index: int, count: int) -> Callable[[], float]:
        """Starts a loop; what is returned waits for it and tells the seconds of one call."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.streams[index]):
            first.record()
            for _ in range(count):
                self.calls[index]()
            last.record()

        def seconds() -> float:
            last.synchronize()
            return float(first.elapsed_time(last)) * 1e-3 / count

        return seconds


# Memory besides tensors
SLACK_HIDDEN, SLACK_BLOCKS, SLACK_SEQ = 2048, 4, 2048
"""Blocks whose passes leave holes in the allocator's memory: of some 50 million parameters each."""


def allocator(device: torch.device, precision: Precision, effort: Effort) -> Iterator[Constant]:
    """What the allocator reserves over what is allocated at the peak, after passes of some blocks."""
    run = _passes(device, precision)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(effort.least):
        run()
    torch.cuda.synchronize(device)
    reserved, allocated = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
    yield constant(
        "allocator_slack",
        max(reserved / allocated, 1.0),
        f"reserved over allocated, {SLACK_BLOCKS} blocks of hidden size {SLACK_HIDDEN}",
    )


def _passes(device: torch.device, precision: Precision) -> Callable[[], None]:
    """Forward and backward of blocks, micro-batches of one and two sequences by turns."""
    hidden = SLACK_HIDDEN
    model = llama(hidden, SLACK_BLOCKS, SLACK_SEQ, heads=(16, 4), width=11 * hidden // 4)
    stage = build_transformer(model, 0, SLACK_BLOCKS, False, False, seq=SLACK_SEQ)
    for name, part in stage.parts():
        materialize(part, model, prefix=f"{name}.", seed=0, device=device)
        to_precision(part, precision)
    sizes = ((1, SLACK_SEQ), (2, SLACK_SEQ))

    def run() -> None:
        for batch, seq in sizes:
            x = torch.randn(batch, seq, SLACK_HIDDEN, device=device, dtype=DTYPES[precision])
            out = stage(x.requires_grad_())
            torch.autograd.backward(out, torch.ones_like(out))

    return run


def measure_communicators(ranks: int) -> Iterator[dict[str, Any]]:
    """Yields the constant (encoded) of a communicator's device memory, over all of `ranks` GPUs of this node.

    Beside the first group, which brings what all share, one more is made, used once, and looked at.
    """
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:

        def body(rank: int, emit: Emit) -> None:
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
            store = dist.FileStore(str(Path(folder) / "store"), ranks)  # type: ignore[attr-defined]
            wait = timedelta(seconds=60)
            dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, timeout=wait)
            message = torch.ones(2**20, device=device)
            dist.all_reduce(message)
            torch.cuda.synchronize(device)
            before, _ = torch.cuda.mem_get_info(device)
            group = dist.new_group(list(range(ranks)), timeout=wait)
            dist.all_reduce(message, group=group)
            torch.cuda.synchronize(device)
            after, _ = torch.cuda.mem_get_info(device)
            if rank == 0:
                how = f"device memory that one more group of {ranks} takes"
                emit(encode(constant("communicator_bytes", max(before - after, 0), how)))
            dist.destroy_process_group()

        yield from run_children(body, ranks)


ROUNDS = 5
BLOCKS = (4, 2, 1)
MICRO_BATCHES = (2, 1)
"""The most blocks and sequences that a rank goes through, as far as one pass fits into a window: their
weights and activations compete for caches as those of a stage do."""

ROOM = 1.5
"""Times a pass alone that one among others has at least."""


@frozen
class Contended:
    """Seconds that a rank had of a core for one block's passes, with `active` ranks at work in this round.

    0 active: a block in a loop, on the first rank alone.
    """

    active: int
    turn: int
    seconds: float


def measure_contention(
    model: ModelSpec, seq: int, ranks: int, cores: int, precision: Precision, window_s: float
) -> Iterator[Contended]:
    """Yields what each rank at work took, in ROUNDS rounds of `ranks` + 1 windows.

    In a window for k ranks the first k processes compute and the others sleep, all by one clock.
    """
    (block_s,) = (message["seconds"] for message in run_children(_one_block(model, seq, precision)))
    shape = _shape(model, block_s, window_s)
    pass_s = block_s * shape[0] * shape[1]
    windows_s = [max(window_s, ROOM * pass_s) * max(1.0, k / cores) for k in range(ranks + 1)]
    begin = time.monotonic() + 1.5 + 0.1 * ranks + 2 * ROOM * pass_s * max(1.0, ranks / cores)

    def body(rank: int, emit: Emit) -> None:
        torch.set_num_threads(1)
        alone = _contended_passes(model, seq, precision, 1, shape[1])
        among = _contended_passes(model, seq, precision, *shape)
        among()
        if time.monotonic() > begin:
            raise RuntimeError("this machine is too busy to start the ranks within the time given")
        opens = begin
        for turn in range(ROUNDS):
            for active, window in enumerate(windows_s):
                time.sleep(max(0.0, opens - time.monotonic()))
                opens += window
                if rank < max(active, 1):
                    seconds = _mean_s(among if active else alone, opens) / (shape[0] if active else 1)
                    emit({"active": active, "turn": turn, "seconds": seconds})

    for message in run_children(body, ranks):
        yield Contended(**message)


def _one_block(model: ModelSpec, seq: int, precision: Precision) -> Callable[[int, Emit], None]:
    """The body of a process that tells how long one sequence takes in one block."""

    def body(rank: int, emit: Emit) -> None:
        torch.set_num_threads(1)
        run = _contended_passes(model, seq, precision, 1, 1)
        run()
        emit({"seconds": _mean_s(run, 0.0)})

    return body


def _shape(model: ModelSpec, block_s: float, window_s: float) -> tuple[int, int]:
    """The most (blocks, sequences) whose passes take half of a window; one of each if none do."""
    shapes = [(min(blocks, model.layers), each) for each in MICRO_BATCHES for blocks in BLOCKS]
    fitting = [shape for shape in shapes if block_s * shape[0] * shape[1] <= window_s / 2]
    return max(fitting, key=lambda shape: shape[0] * shape[1], default=(1, 1))


def _mean_s(run: Callable[[], float], ends: float) -> float:
    """Mean seconds of as many runs as are likely to end in time, and one at least."""
    seconds: list[float] = []
    longest_s = 0.0
    while not seconds or time.monotonic() + longest_s < ends:
        begun = time.monotonic()
        seconds.append(run())
        longest_s = max(longest_s, time.monotonic() - begun)
    return sum(seconds) / len(seconds)


def _contended_passes(
    model: ModelSpec, seq: int, precision: Precision, blocks: int, sequences: int
) -> Callable[[], float]:
    """Forward and backward of the model's first blocks, and what this process had of a core for them."""
    stage = build_transformer(model, 0, blocks, False, False, seq=seq)
    for name, part in stage.parts():
        materialize(part, model, prefix=f"{name}.", seed=0, device="cpu")
        to_precision(part, precision)
    for parameter in stage.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return _Pass(stage, torch.randn(sequences, seq, model.hidden, dtype=DTYPES[precision]))


class _Pass:
    """A pass over a stage as `LayerBench` times one: after the reference, with a fresh input."""

    def __init__(self, stage: Transformer, x: torch.Tensor) -> None:
        self.stage, self.reference = stage, Reference()
        self.source, self.grad = x.requires_grad_(), torch.randn_like(x)

    def __call__(self) -> float:
        self.source.grad = None
        given = self.source.clone()
        self.reference()
        begun = time.process_time()
        torch.autograd.backward(self.stage(given), self.grad)
        return time.process_time() - begun
