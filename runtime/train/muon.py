"""Muon on shards of matrices: momentum whose singular values are all brought near 1.

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

from runtime.model.held_weights import Weight, like

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
