"""Weight gradients for later: a backward pass split into its input gradients (I) and weight gradients (W).

For y = x A^T + b, an I pass computes dx = dy A and db at once and keeps (x, dy); the W pass computes
dA = dy^T x. Everything else is done in I: norms, biases, embedding, head, and whole blocks that recompute,
since keeping what they recomputed until W would give back the memory that recomputing saved. So a block is
recomputed once, and what is kept from I to W is less than what the block kept from its forward, unless
tensor and sequence parallelism share that out and gather these (planner.cost.memory.activations):

    (x, dy) of a llama block    x: 2 H + Q + F     dy: 2 H + Q + 2 KV + 2 F     values a token
    its activations             4 H + 2 Q + 2 KV + 4 F

H hidden, Q query width, KV key-value width, F MLP width. Sources: zero bubble (arXiv 2401.10241),
Megatron-LM's delayed weight gradients, DualPipe's WeightGradStore.

torch.distributed.pipelining splits by walking the autograd graph instead: it recomputes a block once for each
group of weights (pytorch#136766), and its I pass knows nothing of FSDP's hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class _Product:
    """The two factors of a weight's gradient, x [..., in] and dy [..., out]."""

    weight: nn.Parameter
    x: Tensor
    dy: Tensor


class Deferred:
    """A block's weight gradients that wait, by micro-batch. `micro_batch` is that of a running I pass."""

    def __init__(self) -> None:
        self.micro_batch: int | None = None
        self._waiting: dict[int, list[_Product]] = {}

    def put(self, weight: nn.Parameter, x: Tensor, dy: Tensor) -> None:
        assert self.micro_batch is not None
        # Without its history, which would keep the stage's input alive as well.
        self._waiting.setdefault(self.micro_batch, []).append(_Product(weight, x.detach(), dy))

    def add_gradients(self, micro_batch: int) -> None:
        """The W pass: adds the gradients that wait for a micro-batch to their weights'."""
        with torch.no_grad():
            for product in self._waiting.pop(micro_batch, []):
                weight, gradient = product.weight, _weight_gradient(product.x, product.dy)
                if weight.grad is None:
                    weight.grad = gradient
                else:
                    weight.grad.add_(gradient)

    @property
    def waiting(self) -> int:
        """How many micro-batches' gradients wait."""
        return len(self._waiting)


def _weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


class _DeferringProduct(torch.autograd.Function):
    """y = x A^T + b whose backward pass leaves dA for later while `deferred` has a running I pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, deferred: Deferred) -> Tensor:
        ctx.save_for_backward(x)
        # As an attribute: hooks on saved tensors are for activations, and FSDP refills this very parameter.
        ctx.weight, ctx.deferred = weight, deferred
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = functional.linear(dy, ctx.weight.t()) if needs_x else None
        db = dy.flatten(0, -2).sum(0) if needs_bias else None
        if not needs_weight:
            return dx, None, db, None
        if ctx.deferred.micro_batch is None:
            return dx, _weight_gradient(x, dy), db, None
        ctx.deferred.put(ctx.weight, x, dy)
        return dx, None, db, None


class DeferringLinear(nn.Linear):
    """A linear layer whose weight gradient can wait."""

    deferred: Deferred

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        apply: Callable[..., Tensor] = _DeferringProduct.apply
        return apply(input, self.weight, self.bias, self.deferred)


def apply_deferral(part: nn.Module) -> None:
    """Makes the linear layers of a part on meta such whose weight gradients can wait, all in one place."""
    deferred = Deferred()
    for name, module in list(part.named_modules()):
        if type(module) is nn.Linear:
            linear = DeferringLinear(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta"
            )
            linear.deferred = deferred
            part.set_submodule(name, linear)


def deferred_of(part: nn.Module) -> Deferred | None:
    """Where the weight gradients of a part wait; None where they are computed at once."""
    return next((m.deferred for m in part.modules() if isinstance(m, DeferringLinear)), None)
