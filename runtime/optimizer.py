"""The optimizer of one rank: its shards, the learning-rate schedule, and the global gradient norm.

AdamW and SGD are element-wise, so they run on each rank's local shards as plain tensors: no collective,
and parameters on different meshes (or on none) need no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from planner.codec import noun
from planner.workload import Optimizer


@noun
class OptimizerOptions:
    """The hyper-parameters of a run. `clip_norm` None leaves gradients as they are.

    The learning rate rises linearly over `warmup_steps`, then falls by a cosine to `min_lr_ratio` of its
    peak at `total_steps`; `total_steps` 0 keeps it at the peak.
    """

    learning_rate: float = 3e-4
    min_lr_ratio: float = 0.1
    warmup_steps: int = 0
    total_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.9
    clip_norm: float | None = 1.0


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.total_steps <= options.warmup_steps:
        return options.learning_rate
    done = min(1.0, (step - options.warmup_steps) / (options.total_steps - options.warmup_steps))
    ratio = options.min_lr_ratio + (1 - options.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    return options.learning_rate * ratio


def build_optimizer(
    kind: Optimizer, shards: Sequence[nn.Parameter], options: OptimizerOptions
) -> torch.optim.Optimizer:
    """The optimizer over local shards, its state allocated at once. Vectors have no weight decay."""
    groups = [
        {"params": [p for p in shards if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in shards if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if kind is Optimizer.ADAMW:
        optimizer = torch.optim.AdamW(
            groups,
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=True,
        )
    else:
        optimizer = torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, fused=True)
    for shard in shards:
        optimizer.state[shard].update(_fresh_state(kind, shard))
    return optimizer


def _fresh_state(kind: Optimizer, shard: Tensor) -> dict[str, Tensor]:
    """What the optimizer would allocate at its first step. Zero momentum gives the same first step."""
    if kind is Optimizer.SGD:
        return {"momentum_buffer": torch.zeros_like(shard)}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=shard.device),
        "exp_avg": torch.zeros_like(shard),
        "exp_avg_sq": torch.zeros_like(shard),
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value


def weighted_square_sum(grads: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weight_i * |grad_i|^2 in fp64: this rank's part of the squared global norm.

    An element of a gradient that lies on c ranks has weight 1/c, so that the sum over all ranks counts
    it once, however the parameters are sharded.
    """
    norms = torch.stack(torch._foreach_norm(list(grads))).double()
    return (norms * norms * torch.tensor(weights, dtype=torch.float64, device=norms.device)).sum()


def clip(grads: Sequence[Tensor], norm: float, limit: float | None) -> None:
    """Scales the gradients in place so that their global norm is at most `limit`."""
    if limit is not None and norm > limit:
        torch._foreach_mul_(list(grads), limit / (norm + 1e-6))
