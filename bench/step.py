"""The runtime's training step on one accelerator, beside plain PyTorch of the same shapes.

Each case is rank 0 of a world whose other ranks do not exist (torch's fake process group), so communication
takes no time and what is timed is a rank's own work. Both sides train in bf16 with fp32 masters and fused
AdamW. The references were measured so on one H100 80GB with torch 2.11 (bench/data/README.md):

    llama-1b       4 x 4096 tokens on one device                          0.311 s, 52,600 tokens/s, MFU 44 %
    llama-8b       8192 tokens, sharded over 64 (ZeRO 3)                  0.774 s, MFU 55 %
    llama-70b-tp8  8192 tokens, 20 layers of 80, tp 8 with its sequence   0.201 s, MFU 57 %

    python -m bench.step [--case NAME ...] [--attention cudnn] [--out bench/results/DATE-step.json]

Every run has a process of its own. Where there is no CUDA device the shapes are tiny: that shows that the
code runs, not how fast it is.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.foundation.decode import write_atomic
from planner.model.attention import Attention
from planner.model.feed_forward import Activation, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.workload import Precision
from planner.strategy.strategy import Degrees, Zero

if TYPE_CHECKING:
    import torch

    from runtime.parallel.meshes import Meshes

WARMUP, STEPS = 3, 8
SIDES = ("runtime", "plain")


@dataclass(frozen=True)
class Case:
    """A rank of a plan. `whole` is False for a middle stage, without embedding and head."""

    name: str
    model: ModelSpec
    degrees: Degrees
    seq: int
    whole: bool
    reference_s: float | None

    @property
    def tokens(self) -> int:
        """Tokens that this rank's tensor-parallel group has in a step."""
        return self.degrees.micro_batch * self.seq

    @property
    def flops(self) -> float:
        """Model FLOPs of this rank's step: 3 times the forward pass's products and causal attention."""
        blocks = sum(
            s.count * (s.block.matmul_flops_forward(1) + s.block.attention_flops_forward(1, self.seq))
            for s in self.model.segments
        )
        head = self.model.head_flops_forward(1) if self.whole else 0.0
        return float(3 * self.tokens * (blocks + head) / self.degrees.tp)


def llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> ModelSpec:
    """A llama of these sizes, its embedding apart from its head."""
    block = Block(
        hidden=hidden,
        norm=Norm.RMSNORM,
        mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads),
        mlp=Mlp(width=ffn, gated=True, activation=Activation.SILU),
    )
    return ModelSpec(
        name="llama",
        model_type="llama",
        hidden=hidden,
        vocab=vocab,
        max_positions=8192,
        learned_positions=0,
        rope_theta=500_000.0,
        norm=Norm.RMSNORM,
        norm_eps=1e-5,
        initializer_range=0.02,
        tied_embeddings=False,
        segments=(Segment(block=block, count=layers),),
    )


CASES = {
    case.name: case
    for case in (
        Case("llama-1b", llama(16, 2048, 8192, 32, 8, 128256), Degrees(micro_batch=4), 4096, True, 0.3114),
        Case(
            "llama-8b",
            llama(32, 4096, 14336, 32, 8, 128256),
            Degrees(dp_shard=64, zero=Zero.PARAMETERS),
            8192,
            True,
            0.774,
        ),
        Case(
            "llama-70b-tp8",
            llama(20, 8192, 28672, 64, 8, 128256),
            Degrees(tp=8, sequence_parallel=True, dp_shard=4, zero=Zero.PARAMETERS),
            8192,
            False,
            0.201,
        ),
    )
}


def tiny(case: Case) -> Case:
    """The case with two small layers and few tokens."""
    model = llama(2, 64, 128, 8, 8, 256)
    degrees = dataclasses.replace(case.degrees, micro_batch=min(case.degrees.micro_batch, 2))
    return dataclasses.replace(case, model=model, degrees=degrees, seq=64, reference_s=None)


# The two sides


def runtime_step(case: Case, device: torch.device, *, compiled: bool) -> Callable[[], object]:
    """A step of the runtime: the executor's own, or of a middle stage its passes and its update."""
    import torch

    from runtime.parallel.meshes import build_meshes
    from runtime.profiler.timed_plans import bench_plan
    from runtime.train.executor import Executor
    from runtime.train.optimizer import OptimizerOptions

    plan = bench_plan(case.model, case.degrees, case.seq, Precision.BF16)
    if not case.whole:
        return _stage_step(case, build_meshes(plan, device.type), device, compiled=compiled)
    executor = Executor(plan, device=device, seed=0, optimizer_options=OptimizerOptions(), compiled=compiled)
    tokens = torch.randint(
        case.model.vocab, (case.degrees.batch // case.degrees.dp, case.seq + 1), device=device
    )
    return lambda: executor.step(tokens)


def _stage_step(case: Case, meshes: Meshes, device: torch.device, *, compiled: bool) -> Callable[[], object]:
    """The blocks of a middle stage as the runtime builds them."""
    import torch
    from torch import nn
    from torch.distributed.tensor import DTensor

    from planner.model.workload import Optimizer
    from runtime.parallel.parallelize import build_stage
    from runtime.profiler.timed_plans import bench_plan
    from runtime.train.optimizer import OptimizerOptions, build_optimizer

    layers, degrees = case.model.layers, case.degrees
    whole = dataclasses.replace(
        case.model, segments=(dataclasses.replace(case.model.segments[0], count=3 * layers),)
    )
    middle = dataclasses.replace(degrees, pp=3)
    plan = bench_plan(whole, middle, case.seq, Precision.BF16)
    assert plan.strategy.stages[1].first == layers and plan.strategy.stages[1].end == 2 * layers
    stage = build_stage(plan, 1, meshes, seed=0, device=device, compiled=compiled)
    parameters = list(stage.parameters())
    shards = [nn.Parameter((p.to_local() if isinstance(p, DTensor) else p).detach()) for p in parameters]
    optimizer = build_optimizer(Optimizer.ADAMW, shards, OptimizerOptions())
    shape = (degrees.micro_batch, case.seq // degrees.tp, case.model.hidden)
    hidden = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    def step() -> None:
        out = stage(hidden)
        torch.autograd.backward(out, torch.full_like(out, 1e-3))
        for parameter, shard in zip(parameters, shards, strict=True):
            grad: Any = parameter.grad
            shard.grad = grad.to_local() if isinstance(grad, DTensor) else grad
        optimizer.step()
        for tensor in (*parameters, *shards):
            tensor.grad = None

    return step


def plain_step_of(case: Case, device: torch.device, *, compiled: bool) -> Callable[[], object]:
    """A step of plain PyTorch."""
    from torch.distributed.device_mesh import init_device_mesh

    from bench.plain_llama import Sizes, plain_step

    block = case.model.segments[0].block
    assert isinstance(block, Block)
    mixer, mlp = block.mixer, block.mlp
    assert isinstance(mixer, Attention) and isinstance(mlp, Mlp)
    sizes = Sizes(
        layers=case.model.layers,
        hidden=case.model.hidden,
        ffn=mlp.width,
        heads=mixer.heads,
        kv_heads=mixer.kv_heads,
        vocab=case.model.vocab if case.whole else 0,
    )
    mesh = init_device_mesh(device.type, (case.degrees.dp, case.degrees.tp), mesh_dim_names=("dp", "tp"))
    return plain_step(sizes, mesh, case.degrees.micro_batch, case.seq, device, compiled=compiled)


# Measuring


def preferred(attention: str) -> AbstractContextManager[Any]:
    """A context in which SDPA takes this kernel first; torch's own order where none is named."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if attention == "torch":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def measure(case: Case, side: str, *, compiled: bool, attention: str, steps: int) -> dict[str, Any]:
    """Median seconds of a step in this process, its first step, and the peak of allocated bytes."""
    import torch

    from runtime.parallel.meshes import fake_group

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    build = {"runtime": runtime_step, "plain": plain_step_of}[side]
    with fake_group(case.degrees.world), preferred(attention):
        step = build(case, device, compiled=compiled)
        first_s = _timed(step, device)
        for _ in range(WARMUP - 1):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [_timed(step, device) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "case": case.name,
        "side": side,
        "compiled": compiled,
        "attention": attention,
        "step_s": statistics.median(seconds),
        "steps_s": seconds,
        "first_step_s": first_s,
        "tokens_per_s": case.tokens / statistics.median(seconds),
        "flops": case.flops,
        "peak_memory_bytes": peak,
        "reference_s": case.reference_s,
        "device": torch.cuda.get_device_name(device) if peak is not None else platform.processor() or "cpu",
        "torch": torch.__version__,
    }


def _timed(step: Callable[[], object], device: torch.device) -> float:
    from runtime.profiler.timing import synchronize

    synchronize(device)
    begun = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - begun


def in_own_process(arguments: list[str]) -> dict[str, Any]:
    """The result of `--here` in a process of its own, so that peaks and compiled code are its own."""
    command = [sys.executable, "-m", "bench.step", "--here", *arguments]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise click.ClickException(f"{' '.join(arguments)} ended with exit code {ran.returncode}")
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


def peak_flops() -> float | None:
    """Dense bf16 FLOPs a second of this machine's device; None where unknown."""
    from planner.hardware.cluster_text import parse_cluster

    return parse_cluster("local:1").groups[0].device.peak_flops(Precision.BF16)


def line(result: dict[str, Any], peak: float | None) -> str:
    """A row of the table."""
    mfu = "MFU unknown" if peak is None else f"MFU {result['flops'] / result['step_s'] / peak:5.1%}"
    held = result["peak_memory_bytes"]
    memory = "" if held is None else f"  {held / 2**30:6.2f} GiB"
    reference = result["reference_s"]
    against = "" if reference is None else f"  {reference / result['step_s']:.3f} x the reference's speed"
    way = "compiled" if result["compiled"] else "eager"
    return (
        f"{result['case']:14} {result['side']:8} {way:9} {result['step_s']:8.4f} s  "
        f"{result['tokens_per_s']:9,.0f} tokens/s  {mfu}{memory}{against}"
    )


@click.command()
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Default: all.")
@click.option("--side", "sides", multiple=True, type=click.Choice(SIDES), help="Default: both.")
@click.option("--compile/--no-compile", "compiled", default=None, help="Default: on CUDA.")
@click.option(
    "--attention", type=click.Choice(["torch", "cudnn"]), default="torch", help="SDPA's first choice."
)
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the results.")
@click.option("--here", is_flag=True, help="Measure one case and side in this process; prints JSON.")
def main(
    names: tuple[str, ...],
    sides: tuple[str, ...],
    compiled: bool | None,
    attention: str,
    steps: int,
    out: Path | None,
    here: bool,
) -> None:
    """Measure training steps and print the table."""
    import torch

    on_cuda = torch.cuda.device_count() > 0
    compiled = on_cuda if compiled is None else compiled
    if here:
        case = CASES[names[0]] if on_cuda else tiny(CASES[names[0]])
        print(json.dumps(measure(case, sides[0], compiled=compiled, attention=attention, steps=steps)))
        return
    if not on_cuda:
        print("No CUDA device: tiny shapes, which show that the code runs and not how fast.", file=sys.stderr)
    results, peak = [], peak_flops()
    for name in names or tuple(CASES):
        for side in sides or SIDES:
            flags = ["--compile" if compiled else "--no-compile", "--attention", attention]
            arguments = ["--case", name, "--side", side, "--steps", str(steps), *flags]
            results.append(in_own_process(arguments))
            print(line(results[-1], peak), flush=True)
    if out is not None:
        document = {"bench": "step", "date": datetime.now(UTC).isoformat(timespec="seconds")}
        write_atomic(out, json.dumps({**document, "peak_flops": peak, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
