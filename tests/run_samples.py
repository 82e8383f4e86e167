"""A GPT's and a Llama's row of a table of runs, and what becomes of rows."""

from __future__ import annotations

import dataclasses

from planner.calibration.run_setup import RunSetup, run_problem
from planner.calibration.runs import Run, RunRecompute, Status
from planner.strategy.estimate import Rejected

GPT = Run(
    id="gpt",
    where="runs.csv: line 2",
    layers=24,
    hidden=2048,
    ffn=8192,
    heads=16,
    kv_heads=16,
    vocab=51200,
    gated_mlp=False,
    tied_embeddings=True,
    seq_len=1024,
    device="a100-sxm-80gb",
    nodes=1,
    gpus_per_node=8,
    framework="Megatron-LM",
    precision="fp16",
    tp=2,
    pp=2,
    dp=2,
    zero=0,
    recompute=RunRecompute.FULL,
    micro_batch=2,
    global_batch=32,
    status=Status.OK,
    step_time_s=1.0,
)
LLAMA = dataclasses.replace(
    GPT,
    id="llama",
    ffn=5632,
    kv_heads=4,
    gated_mlp=True,
    tied_embeddings=False,
    framework="TorchTitan (FSDP2)",
    precision="bf16",
    zero=3,
    pp=1,
    dp=4,
    recompute=RunRecompute.NONE,
)


def setup(run: Run) -> RunSetup:
    made = run_problem(run, None)
    assert isinstance(made, RunSetup), made
    return made


def reason(run: Run, **changes: object) -> Rejected:
    made = run_problem(dataclasses.replace(run, **changes), None)  # type: ignore[arg-type]
    assert isinstance(made, Rejected), made
    return made
