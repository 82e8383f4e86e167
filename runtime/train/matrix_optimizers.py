"""Adafactor on shards of matrices: a second moment as the product of a row and a column.

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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from runtime.model.held_weights import Weight, like, sum_over

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
