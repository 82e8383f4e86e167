"""How much longer a layer takes among others than alone: those of its stage, and ranks on the same cores.

Layers are measured alone, one in a loop (`runtime.profiler.measure_layers`). In training a stage's other
layers and
the ranks of a machine pass through the same caches and memory, and where ranks are more than cores they
take turns. So what is compared is a block in a loop on an idle machine, and several blocks one after
another with 1, 2, ... ranks at work.

Seconds are those that a process had of a core: what others take of the machine is not in them. Where more
ranks work than there are cores, each waits for its turn besides: ranks / cores times as long. By the wall,
4 ranks on 2 cores were slowed 1.5 to 2.4 times in twelve measurements of one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec
from planner.model.workload import Precision
from runtime.model.initial import materialize
from runtime.model.transformer import Transformer, build_transformer
from runtime.profiler.measure_layers import DTYPES, to_precision
from runtime.profiler.subprocesses import Emit, run_children
from runtime.profiler.timing import Reference

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
        alone = _passes(model, seq, precision, 1, shape[1])
        among = _passes(model, seq, precision, *shape)
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
        run = _passes(model, seq, precision, 1, 1)
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


def _passes(
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
