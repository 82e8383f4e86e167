"""The optimizer of one rank: its shards, the learning-rate schedule, and the global gradient norm.

All optimizers run on each rank's local shards as plain tensors. AdamW and SGD are element-wise: no
collective, and parameters on different meshes (or on none) need no special case. Adafactor and Muon ask
the weight with whom it is shared (runtime.train.matrix_optimizers, runtime.train.matrix_optimizers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from planner.foundation.frozen import frozen
from planner.model.workload import Optimizer, Precision
from runtime.model.held_weights import HostWeight, Weight
from runtime.parallel.offload import block_of, send_up
from runtime.train.matrix_optimizers import Adafactor, Muon


@frozen
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


class ShardOptimizer:
    """The optimizers that together update this rank's shards, each its own kind of them.

    `rounds` are done one after the other: those of shards on the device, then block by block those in host
    memory, whose weights go up when their block is done.
    """

    def __init__(self, rounds: Sequence[tuple[list[torch.optim.Optimizer], list[HostWeight]]]) -> None:
        self.rounds = list(rounds)

    @property
    def parts(self) -> list[torch.optim.Optimizer]:
        """All optimizers, in the order in which they step."""
        return [part for parts, _ in self.rounds for part in parts]

    def state_of(self, shard: nn.Parameter) -> dict[str, Tensor]:
        """The state that belongs to a shard."""
        for part in self.parts:
            if shard in part.state:
                state: dict[str, Tensor] = part.state[shard]
                return state
        return {}

    def set_learning_rate(self, value: float) -> None:
        """The learning rate of the next step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = value

    def step(self) -> None:
        """One update of every shard that has a gradient."""
        for parts, hosts in self.rounds:
            for part in parts:
                part.step()
            send_up(hosts)


def build_optimizer(
    kind: Optimizer,
    weights: Sequence[Weight],
    options: OptimizerOptions,
    precision: Precision = Precision.FP32,
) -> ShardOptimizer:
    """The optimizer over local shards, its state allocated at once beside them, on the device or not.

    Muon is for the blocks' matrices; embedding, head, norms and biases are AdamW's then. `precision` is
    that of the workload: where it is not fp32, Muon multiplies in bf16.
    """
    blocks: dict[str | None, list[Weight]] = {None: []}
    for weight in weights:
        blocks.setdefault(None if weight.host is None else block_of(weight.path), []).append(weight)
    return ShardOptimizer(
        [
            (_parts(kind, block, options, precision), [w.host for w in block if w.host is not None])
            for block in blocks.values()
            if block
        ]
    )


def _parts(
    kind: Optimizer, weights: Sequence[Weight], options: OptimizerOptions, precision: Precision
) -> list[torch.optim.Optimizer]:
    match kind:
        case Optimizer.ADAMW:
            return [_adamw(weights, options)]
        case Optimizer.SGD:
            return [_sgd(weights, options)]
        case Optimizer.ADAFACTOR:
            groups = _groups(weights, options)
            return [Adafactor(weights, lr=options.learning_rate, eps=options.eps, groups=groups)]
        case Optimizer.MUON:
            inner = [weight for weight in weights if weight.inner]
            rest = [weight for weight in weights if not weight.inner]
            blocks: list[torch.optim.Optimizer] = [_muon(inner, options, precision)] if inner else []
            return blocks + ([_adamw(rest, options)] if rest else [])


def _groups(weights: Sequence[Weight], options: OptimizerOptions) -> list[dict[str, Any]]:
    """Vectors have no weight decay."""
    shards = [weight.shard for weight in weights]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in shards if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in shards if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(weights: Sequence[Weight], options: OptimizerOptions) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(
        _groups(weights, options),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )
    for shard in (weight.shard for weight in weights):
        # What the optimizer would allocate at its first step.
        optimizer.state[shard] |= {
            "step": torch.zeros((), dtype=torch.float32, device=shard.device),
            "exp_avg": torch.zeros_like(shard),
            "exp_avg_sq": torch.zeros_like(shard),
        }
    return optimizer


def _sgd(weights: Sequence[Weight], options: OptimizerOptions) -> torch.optim.Optimizer:
    groups = _groups(weights, options)
    optimizer = torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, fused=True)
    for shard in (weight.shard for weight in weights):
        # Zero momentum gives the same first step as none.
        optimizer.state[shard]["momentum_buffer"] = torch.zeros_like(shard)
    return optimizer


def _muon(weights: Sequence[Weight], options: OptimizerOptions, precision: Precision) -> Muon:
    return Muon(
        weights,
        lr=options.learning_rate,
        momentum=options.momentum,
        product_dtype=torch.float32 if precision is Precision.FP32 else torch.bfloat16,
        groups=_groups(weights, options),
    )


def weighted_square_sum(grads: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weight_i * |grad_i|^2 in fp64: this rank's part of the squared global norm.

    An element of a gradient that lies on c ranks has weight 1/c, so that the sum over all ranks counts
    it once, however the parameters are sharded.
    """
    total = torch.zeros((), dtype=torch.float64)
    for device in sorted({grad.device.type for grad in grads}):
        here = [(g, w) for g, w in zip(grads, weights, strict=True) if g.device.type == device]
        norms = torch.stack(torch._foreach_norm([grad for grad, _ in here])).double()
        shares = torch.tensor([share for _, share in here], dtype=torch.float64, device=norms.device)
        total = total.to(norms.device) + (norms * norms * shares).sum()
    return total


def clip(grads: Sequence[Tensor], norm: float, limit: float | None, loss_scale: float = 1.0) -> None:
    """Scales the gradients in place so that their global norm is at most `limit`.

    They have been multiplied by `loss_scale`; `norm` is without it, and so are they afterwards.
    """
    factor = 1 / loss_scale
    if limit is not None and norm > limit:
        factor *= limit / (norm + 1e-6)
    if factor == 1.0:
        return
    for device in {grad.device.type for grad in grads}:
        torch._foreach_mul_([grad for grad in grads if grad.device.type == device], factor)
