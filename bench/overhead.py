"""What the runtime costs besides the operations of a step: the executor against a loop written by hand.

Both train the same modules (the runtime's own model and loss) by the same operators: forward and backward of
every micro-batch, the gradients' global norm, clipping, fused AdamW. The loop by hand is what one would
write for that one layout; everything general (plan, schedule table, record, shards, shares of copies) is the
runtime's. They alternate in one process, step by step, so that a machine whose speed changes slows both;
the overhead is the median of the ratios of neighbours. Processor time of the rank's own thread is
compared, which others on the machine disturb least; wall time is beside it.

    python -m bench.overhead [--pairs N] [--out bench/results/DATE-overhead.json]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.foundation.decode import write_atomic
from planner.model.workload import Precision
from planner.strategy.strategy import Degrees, Zero

if TYPE_CHECKING:
    import torch
    from torch import nn

    from planner.strategy.plan import Plan

MODEL, SEQ = "shardwise-demo", 256
CASES = {
    "one rank": Degrees(micro_batch=2, num_micro_batches=4),
    "one rank, bf16": Degrees(micro_batch=2, num_micro_batches=4),
    "zero 3 over 2": Degrees(micro_batch=2, num_micro_batches=2, dp_shard=2, zero=Zero.PARAMETERS),
    "zero 1 over 2": Degrees(micro_batch=2, num_micro_batches=2, dp_shard=2, zero=Zero.OPTIMIZER),
}


@dataclass(frozen=True)
class Pair:
    """A step of the runtime and one of the loop by hand: seconds of processor and wall."""

    runtime_cpu_s: float
    by_hand_cpu_s: float
    runtime_s: float
    by_hand_s: float


def plan_of(name: str) -> Plan:
    """The plan of a case."""
    from planner.hardware.catalog import load_model
    from runtime.profiler.timed_plans import bench_plan

    precision = Precision.BF16 if "bf16" in name else Precision.FP32
    return bench_plan(load_model(MODEL), CASES[name], SEQ, precision)


def by_hand(plan: Plan) -> Callable[[torch.Tensor], object]:
    """A step in plain PyTorch on the same modules, with FSDP2 where the plan shards (or keeps masters)."""
    import torch

    from runtime.model.transformer import build_transformer, materialize
    from runtime.train.optimizer import OptimizerOptions

    degrees, spec, options = plan.strategy.degrees, plan.model, OptimizerOptions()
    model = build_transformer(spec, 0, spec.layers, True, True, seq=plan.workload.seq)
    materialize(model, spec, prefix="", seed=0, device="cpu")
    model.tie()
    sharded = degrees.dp > 1 or plan.workload.precision is Precision.BF16
    if sharded:
        _shard(model, plan)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    count = degrees.num_micro_batches

    def step(tokens: torch.Tensor) -> object:
        total = torch.zeros(())
        for number, rows in enumerate(tokens.chunk(count)):
            if sharded and degrees.zero is not Zero.PARAMETERS:
                model.set_requires_gradient_sync(number == count - 1)  # type: ignore[operator]
                model.set_reshard_after_backward(number == count - 1)  # type: ignore[operator]
            loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def _shard(model: nn.Module, plan: Plan) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if plan.workload.precision is Precision.BF16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    degrees = plan.strategy.degrees
    mesh = init_device_mesh("cpu", (degrees.world,))
    again = degrees.zero is Zero.PARAMETERS
    for block in model.layers.values():  # type: ignore[union-attr,operator]
        fully_shard(block, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
    fully_shard(model.tok_embeddings, mesh=mesh, reshard_after_forward=again, mp_policy=policy)  # type: ignore[arg-type]
    fully_shard([model.norm, model.output], mesh=mesh, reshard_after_forward=again, mp_policy=policy)  # type: ignore[list-item]
    fully_shard(model, mesh=mesh, reshard_after_forward=again, mp_policy=policy)


def measure(name: str, pairs: int) -> list[Pair]:
    """Pairs of steps of rank 0 of a case."""
    from runtime.launch.local_ranks import Send, run_local
    from runtime.launch.process_group import join_group

    found: list[Pair] = []

    def body(rank: int, send: Send) -> None:
        import torch

        from runtime.train.executor import Executor
        from runtime.train.optimizer import OptimizerOptions

        torch.set_num_threads(1)
        join_group("gloo", timeout_s=120)
        plan = plan_of(name)
        executor = Executor(plan, device="cpu", seed=0, optimizer_options=OptimizerOptions())
        sides = (executor.step, by_hand(plan))
        rows = plan.workload.batch // executor.data_size
        tokens = torch.randint(plan.model.vocab, (rows, plan.workload.seq + 1))
        for number in range(pairs + 1):
            # Whoever is first alternates, too.
            order = sides if number % 2 else sides[::-1]
            times = {side: _times(lambda side=side: side(tokens)) for side in order}
            (runtime_cpu, runtime), (hand_cpu, hand) = (times[side] for side in sides)
            if number:
                send({"pair": [runtime_cpu, hand_cpu, runtime, hand]})

    with tempfile.TemporaryDirectory() as folder:
        run_local(
            body,
            CASES[name].world,
            log_dir=Path(folder),
            on_message=lambda rank, message: found.append(Pair(*message["pair"])) if rank == 0 else None,
        )
    return found


def _times(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of this thread's processor time, and of wall time."""
    cpu, wall = time.thread_time(), time.perf_counter()
    step()
    return time.thread_time() - cpu, time.perf_counter() - wall


def overhead(pairs: list[Pair]) -> tuple[float, float]:
    """What the runtime takes more, as a share: by processor time and by wall time."""
    return (
        statistics.median(p.runtime_cpu_s / p.by_hand_cpu_s for p in pairs) - 1,
        statistics.median(p.runtime_s / p.by_hand_s for p in pairs) - 1,
    )


@click.command()
@click.option("--pairs", default=15, show_default=True)
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Default: all.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
def main(pairs: int, names: tuple[str, ...], out: Path | None) -> None:
    """Measure the overhead and print the table."""
    rows: list[dict[str, Any]] = []
    for name in names or CASES:
        found = measure(name, pairs)
        cpu, wall = overhead(found)
        by_hand_s = statistics.median(p.by_hand_cpu_s for p in found)
        print(
            f"{name:16} {by_hand_s * 1e3:8.1f} ms by hand  overhead {cpu:+.2%} (wall {wall:+.2%})", flush=True
        )
        rows.append({"case": name, "overhead": cpu, "wall_overhead": wall, "pairs": [vars(p) for p in found]})
    if out is not None:
        document = {
            "bench": "overhead",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": rows,
        }
        write_atomic(out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
