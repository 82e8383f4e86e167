"""Runs a function on real ranks and collects what each returns; and the run that every layout must equal."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from planner.model.spec import ModelSpec
from planner.strategy.plan import Plan
from runtime.check.memory import live_bytes, measure_peak
from runtime.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from runtime.checkpoint.store import committed_folders, load_index
from runtime.launch.local_ranks import run_local
from runtime.launch.process_group import join_group
from runtime.model.experts import Router
from runtime.model.transformer import Borders, build_transformer, materialize
from runtime.profiler.timing import ChildFailed, Emit, run_children
from runtime.train.executor import Executor
from runtime.train.optimizer import OptimizerOptions

SEED = 7
OPTIONS = OptimizerOptions(
    learning_rate=1e-2, eps=1e-3, warmup_steps=2, total_steps=8, weight_decay=0.1, clip_norm=0.5
)
"""eps is large, so that AdamW does not blow up gradient differences of rounding size."""

Trajectory = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def on_ranks(body: Callable[[int], Any], world: int) -> list[Any]:
    """What `body(rank)` returned on each rank of a gloo group, in rank order."""
    results: dict[int, Any] = {}

    def run(rank: int, send: Callable[[dict[str, Any]], None]) -> None:
        torch.set_num_threads(1)
        join_group("gloo", timeout_s=60)
        send({"result": body(rank)})
        dist.barrier()

    with tempfile.TemporaryDirectory() as folder:
        run_local(run, world, log_dir=Path(folder), on_message=lambda r, m: results.update({r: m["result"]}))
    return [results[rank] for rank in range(world)]


def in_a_process(test: Callable[..., None]) -> Callable[..., None]:
    """Has a test run in a forked process. torch 2.11 starts autograd's threads where a pass back goes through
    experts, and no process that has them may fork ranks for later tests."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        def body(_rank: int, _emit: Emit) -> None:
            torch.set_num_threads(1)  # threads that the parent had are not there
            test(*args, **kwargs)

        try:
            for _ in run_children(body):
                pass
        except ChildFailed as failure:
            pytest.fail(str(failure))

    return run


def real_peaks(plan: Plan) -> list[int]:
    """Peak bytes of every rank of a real group, in a step that finds the optimizer's state there."""
    cpu = torch.device("cpu")

    def body(rank: int) -> int:
        inherited = live_bytes(cpu)  # what this process held before
        executor = make_executor(plan)
        tokens = slice_of(executor, batch_of(plan, 0))
        executor.step(tokens)
        return measure_peak(lambda: executor.step(tokens), cpu).allocated_bytes - inherited

    return list(on_ranks(body, plan.strategy.degrees.world))


def batch_of(plan: Plan, step: int) -> torch.Tensor:
    """The tokens of a step, [batch, seq + 1]; the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(plan.model.vocab, (plan.workload.batch, plan.workload.seq + 1), generator=generator)


def slice_of(executor: Executor, tokens: torch.Tensor) -> torch.Tensor:
    """The part of a global batch that this rank reads."""
    return tokens.chunk(executor.data_size)[executor.data_rank]


def make_executor(plan: Plan) -> Executor:
    return Executor(plan, device="cpu", seed=SEED, optimizer_options=OPTIONS)


def begins_of(plan: Plan, step: int) -> torch.Tensor:
    """Where each token's document begins in its sequence, [batch, seq]; documents of 1 to 12 tokens."""
    draw = random.Random(step)
    rows = []
    for _ in range(plan.workload.batch):
        row: list[int] = []
        while len(row) < plan.workload.seq:
            row += [len(row)] * draw.randint(1, 12)
        rows.append(row[: plan.workload.seq])
    return torch.tensor(rows)


def train(executor: Executor, first: int, steps: int, *, documents: bool = False) -> Trajectory:
    """Steps [first, first + steps) of the sharded run; with `documents`, attention stays within them."""
    plan, results = executor.plan, []
    for step in range(first, first + steps):
        begins = slice_of(executor, begins_of(plan, step)) if documents else None
        results.append(executor.step(slice_of(executor, batch_of(plan, step)), begins=begins))
    return [(result.loss, result.grad_norm) for result in results]


MakeOptimizers = Callable[[nn.Module], list[torch.optim.Optimizer]]
"""The optimizers of a whole model in one process."""


def by_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(_groups(model), betas=(0.9, 0.95), eps=1e-3, foreach=False)]


def by_sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(_groups(model), momentum=0.9, foreach=False)]


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def interrupted(before: Plan, after: Plan) -> tuple[list[Trajectory], list[Trajectory]]:
    """Three steps under one plan, a checkpoint, two steps under another: what each rank saw of either."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)

        def start(rank: int) -> Trajectory:
            executor = make_executor(before)
            found = train(executor, 0, 3)
            save_checkpoint(folder, executor.state_dict(), step=3, run={})
            return found

        def go_on(rank: int) -> Trajectory:
            executor = make_executor(after)
            path = committed_folders(folder)[0]
            executor.load_state_dict(load_checkpoint(path, load_index(path), executor.state_dict()))
            assert executor.steps_done == 3
            return train(executor, 3, 2)

        first = on_ranks(start, before.strategy.degrees.world)
        return first, on_ranks(go_on, after.strategy.degrees.world)


def single_process(
    plan: Plan, steps: int, make: MakeOptimizers = by_adamw, *, documents: bool = False
) -> Trajectory:
    """The same training in one process: whole model, whole batch, torch's own loss and optimizers."""
    spec: ModelSpec = plan.model
    model = build_transformer(spec, 0, spec.layers, True, True, seq=plan.workload.seq)
    materialize(model, spec, prefix="", seed=SEED, device="cpu")
    model.tie()
    optimizers = make(model)
    # The warm-up of 2 steps to 0.01, then a cosine over 6 steps to a tenth of it, written out.
    rates = (0.005, 0.01, 0.01, 0.009397114317029974, 0.00775, 0.0055)
    trajectory: Trajectory = []
    chosen: dict[Router, list[torch.Tensor]] = {m: [] for m in model.modules() if isinstance(m, Router)}
    for router, choices in chosen.items():
        router.register_forward_hook(lambda _m, _in, out, choices=choices: choices.append(out[1]))
    for step in range(steps):
        tokens = batch_of(plan, step)
        logits = model(tokens[:, :-1], borders=Borders(begins_of(plan, step)) if documents else None)
        loss = functional.cross_entropy(logits.reshape(-1, spec.vocab), tokens[:, 1:].reshape(-1))
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.step()
        for router, choices in chosen.items():
            balance(router, choices.pop())
        trajectory.append((loss.item(), norm.item()))
    return trajectory


def balance(router: Router, chosen: torch.Tensor) -> None:
    """What a step does to the correction of the choice: up where an expert had few tokens, else down."""
    counts = [int((chosen == expert).sum()) for expert in range(router.experts)]
    mean = sum(counts) / len(counts)
    for expert, count in enumerate(counts if router.routing.corrected else ()):
        step = router.routing.bias_speed
        router.correction[expert] += step if count < mean else -step if count > mean else 0.0
