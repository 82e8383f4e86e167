"""The optimizer of one rank: its shards, the learning-rate schedule, and the global gradient norm.

All optimizers run on each rank's local shards as plain tensors. AdamW and SGD are element-wise: no
collective, and parameters on different meshes (or on none) need no special case. Adafactor and Muon ask
the weight with whom it is shared (runtime.train.optimizer, runtime.train.optimizer).

Adafactor on shards of matrices: a second moment as the product of a row and a column.

For a matrix W of n x m with gradient G, at step t (Shazeer and Stern, arXiv 1804.04235, sections 3 to 7; the
form of torch.optim.Adafactor, with means instead of sums and e1 under the root):

    b = 1 - t^-0.8
    R = b R + (1 - b) mean_columns(G^2)        C = b C + (1 - b) mean_rows(G^2)
    V = R C / mean(R)                          U = G / max(sqrt(V), e1)
    W = W (1 - lr decay) - max(e2, rms(W)) min(lr, 1 / sqrt(t)) U / max(1, rms(U) / d)

Vectors keep all of V. A stack of matrices is one matrix after the other.

A rank that holds part of the rows has that part of R, and all of C; sums over its rows are added up over the
ranks that hold the others. All weights share three rounds of all-reduces: squares, the mean of R, rms(U).

Muon on shards of matrices: momentum whose singular values are all brought near 1.

For a matrix W of n x m with gradient G (Jordan 2024; Liu et al., "Muon is scalable for LLM training", arXiv
2502.16982, algorithm 1 and equation 4):

    M = mu M + (1 - mu) G                  X = G + mu (M - G), Nesterov's look ahead
    O = orthogonalize(X)                   five steps of Newton and Schulz
    W = W (1 - lr decay) - lr 0.2 sqrt(max(n, m)) O

The factor gives an update the root mean square of AdamW's, so learning rates carry over. Embedding, head,
norms and biases are AdamW's.

Momentum is element-wise and stays sharded. Orthogonalizing is not: each rank gathers one matrix at a time,
does all of it, and keeps its own part of the result (the paper's distributed Muon, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec
from planner.model.workload import Optimizer, Precision
from runtime.model.experts import Router
from runtime.model.held_weights import HostWeight, Weight, like, sum_over
from runtime.model.transformer import Transformer
from runtime.parallel.offload import block_of, send_up
from runtime.parallel.recompute import WRAPPER_PREFIX

DECAY = -0.8
LEAST_SCALE = 1e-3
"""e2: the least that a weight's root mean square counts as."""
LIMIT = 1.0
"""d: the largest root mean square of an update."""


class Adafactor(torch.optim.Optimizer):
    """Adafactor without momentum over this rank's shards. Every rank that shares a weight steps with it."""

    def __init__(
        self, weights: Sequence[Weight], *, lr: float, eps: float, groups: list[dict[str, Any]]
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.eps = eps
        self.weights = list(weights)
        for weight in weights:
            self.state[weight.shard].update(_fresh(weight))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        decays = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        lr = self.param_groups[0]["lr"]
        weights = [weight for weight in self.weights if weight.shard.grad is not None]
        scales = self._gather_moments(weights)
        squares = self._squares_of_updates(weights)
        for weight, scale, square in zip(weights, scales, squares, strict=True):
            step = float(self.state[weight.shard]["step"])
            rms = (square / _count(weight)).sqrt_()
            rate = scale.clamp_(min=LEAST_SCALE) * min(lr, step**-0.5) / (rms / LIMIT).clamp_(min=1.0)
            weight.shard.mul_(1 - lr * decays[weight.shard])
            weight.shard.sub_(self._update(weight).mul_(rate))

    def _gather_moments(self, weights: list[Weight]) -> list[Tensor]:
        """Updates R, C and V of every weight; the root mean square of each weight."""
        sums: list[tuple[Tensor, Sequence[Any]]] = []
        means: list[tuple[Weight, str, Tensor, int]] = []
        scales = []
        for weight in weights:
            grad, state = weight.shard.grad, self.state[weight.shard]
            assert grad is not None
            state["step"] += 1
            if weight.matrix:
                for key, dim in (("row_var", -1), ("col_var", -2)):
                    squares = _square_sum(grad, (dim,))
                    sums.append((squares, weight.groups(dim)))
                    means.append((weight, key, squares, weight.parameter.shape[dim]))
            else:
                means.append((weight, "variance", grad.square(), 1))
            scale = _square_sum(weight.shard, _dims(weight))
            sums.append((scale, weight.groups(*_dims(weight))))
            scales.append(scale)
        sum_over(sums)
        for weight, key, squares, count in means:
            state = self.state[weight.shard]
            state[key].lerp_(squares / count, float(state["step"]) ** DECAY)
        self._row_means(weights)
        return [(s / _count(weight)).sqrt_() for weight, s in zip(weights, scales, strict=True)]

    def _row_means(self, weights: list[Weight]) -> None:
        """mean(R) of every matrix, kept until its update is formed."""
        matrices = [weight for weight in weights if weight.matrix]
        sums = [self.state[weight.shard]["row_var"].sum(dim=-2, keepdim=True) for weight in matrices]
        sum_over((s, weight.groups(-2)) for s, weight in zip(sums, matrices, strict=True))
        self._mean_of_rows = {
            weight.shard: s / weight.parameter.shape[-2] for s, weight in zip(sums, matrices, strict=True)
        }

    def _squares_of_updates(self, weights: list[Weight]) -> list[Tensor]:
        """sum(U^2) of every weight. U is formed again for the update, so that only one is alive."""
        squares = [_square_sum(self._update(weight), _dims(weight)) for weight in weights]
        sum_over((s, weight.groups(*_dims(weight))) for s, weight in zip(squares, weights, strict=True))
        return squares

    def _update(self, weight: Weight) -> Tensor:
        state, grad = self.state[weight.shard], weight.shard.grad
        assert grad is not None
        if weight.matrix:
            mean = self._mean_of_rows[weight.shard].clamp(min=self.eps)
            moment = (state["row_var"] / mean) * state["col_var"]
        else:
            moment = state["variance"].clone()
        update: Tensor = moment.clamp_(min=self.eps**2).rsqrt_().mul_(grad)
        return update


def _fresh(weight: Weight) -> dict[str, Tensor]:
    shape = weight.shard.shape
    step = torch.zeros((), dtype=torch.float32)
    if not weight.matrix:
        return {"step": step, "variance": torch.zeros_like(weight.shard.detach())}
    zeros = weight.shard.new_zeros
    return {
        "step": step,
        "row_var": zeros((*shape[:-1], 1)),
        "col_var": zeros((*shape[:-2], 1, shape[-1])),
    }


def _dims(weight: Weight) -> tuple[int, ...]:
    """The dimensions that one matrix or vector spans."""
    return (-2, -1) if weight.matrix else (-1,)


def _count(weight: Weight) -> int:
    """Values of one whole matrix or vector."""
    count = 1
    for dim in _dims(weight):
        count *= weight.parameter.shape[dim]
    return count


def _square_sum(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(value.detach(), dim=dims, keepdim=True)
    return norm.square_()


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x^3 + c x^5, steep at 0 and near 1 around 1 (Jordan 2024)."""
STEPS = 5
LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon over this rank's shards of matrices. Every rank that shares a weight steps with it.

    `product_dtype` is that of the products of Newton and Schulz.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        *,
        lr: float,
        momentum: float,
        product_dtype: torch.dtype,
        groups: list[dict[str, Any]],
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.momentum, self.product_dtype = momentum, product_dtype
        self.weights = list(weights)
        for weight in weights:
            self.state[weight.shard]["momentum_buffer"] = torch.zeros_like(weight.shard.detach())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        decays = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        lr = self.param_groups[0]["lr"]
        for weight in self.weights:
            shard, grad = weight.shard, weight.shard.grad
            if grad is None:
                continue
            buffer = self.state[shard]["momentum_buffer"]
            buffer.lerp_(grad, 1 - self.momentum)
            direction = self._orthogonal(weight, grad.lerp(buffer, self.momentum))
            shard.mul_(1 - lr * decays[shard])
            shard.sub_(direction, alpha=lr * 0.2 * max(weight.parameter.shape[-2:]) ** 0.5)

    def _orthogonal(self, weight: Weight, update: Tensor) -> Tensor:
        """This rank's part of the orthogonalized update, from this rank's part of the update."""
        update = update.to(self.product_dtype)
        if not weight.groups(-2, -1):
            return orthogonalize(update).to(weight.shard.dtype)
        whole = like(weight.parameter, update)
        assert isinstance(whole, DTensor)
        shape, offset = compute_local_shape_and_global_offset(
            whole.shape, whole.device_mesh, whole.placements
        )
        part = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
        return orthogonalize(whole.full_tensor())[part].to(weight.shard.dtype)


def orthogonalize(matrix: Tensor) -> Tensor:
    """U f(S) V^T for a matrix (or each of a stack) with singular values S, f(S) between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


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


class Balance:
    """The corrections of this rank's routers, by their names in the whole model; `frozen` ones never move."""

    def __init__(self, spec: ModelSpec, models: Sequence[Transformer], *, frozen: bool = False) -> None:
        found = ((name, module) for model in models for name, module in model.named_modules())
        routers = {name.replace(WRAPPER_PREFIX, ""): m for name, m in found if isinstance(m, Router)}
        self._routers = {int(name.split(".")[1]): router for name, router in routers.items()}
        self._layers = spec.layers
        self._experts = max((experts.count for experts in spec.experts), default=0)
        self.frozen = frozen
        self._moves = not frozen and any(experts.routing.bias_speed for experts in spec.experts)
        self.corrections: dict[str, Tensor] = {
            f"{name}.correction": router.correction
            for name, router in routers.items()
            if router.routing.corrected
        }

    def set_gradient_scale(self, scale: float) -> None:
        """What the gradients of the routers' own losses are multiplied by, as the head's are."""
        for router in self._routers.values():
            router.gradient_scale = scale

    def update(self) -> None:
        """Moves every correction by the tokens of the whole world, and counts from zero again. Collective.

        b_i += u sign(mean(c) - c_i) with c the tokens of the step (Wang et al. 2024, arXiv 2408.15664). Ranks
        that routed the same tokens all count them, which changes no sign.
        """
        if self._moves:
            device = next(iter(self._routers.values())).counts.device if self._routers else None
            counts = torch.zeros(self._layers, self._experts, device=device)
            for layer, router in self._routers.items():
                counts[layer, : router.experts] = router.counts
            dist.all_reduce(counts)
            for layer, router in self._routers.items():
                own = counts[layer, : router.experts]
                router.correction += router.routing.bias_speed * (own.mean() - own).sign()
        for router in self._routers.values():
            router.counts.zero_()
