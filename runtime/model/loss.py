"""The loss of next-token prediction, over chunks of tokens. Shapes: T tokens, H hidden, V (a shard of) the
vocabulary.

The logits of all tokens never exist together. The forward pass goes over chunks of tokens, and while a
chunk's logits are there it also forms the gradients of the mean loss,

    loss    = sum_t w_t (lse_t - logits[t, target_t]),   lse_t = log sum_v exp(logits[t, v])
    dlogits = w_t (softmax(logits)[t, v] - 1[v = target_t])
    dx      = dlogits W,    dW = dlogits^T x

with w_t one over the number of counted targets. The backward pass only hands them on. Source of the idea:
Liger Kernel, arXiv 2410.10989 (FusedLinearCrossEntropy). Over a sharded vocabulary each rank has lse_t and
the target's logit of its own columns, and one all-gather of these two values a token gives the whole's.

Logits come in the compute precision, as the product gives them; everything else is in fp32. The weight's
gradient is summed over chunks in the compute precision, as a product accumulates into its result.

The output projection with the loss over it. Shapes: B micro-batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from planner.model.spec import vocab_shard
from planner.strategy.engines.native import chunk_tokens

IGNORED = -100
"""A target that does not count, as in torch's cross_entropy."""


class LossAndGradients(NamedTuple):
    """The mean loss, an fp32 scalar, and, if asked for, its gradients of input [T, H], weight [V, H] and
    bias [V]."""

    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None


class Passes(NamedTuple):
    """The two passes over a chunk's logits; `compiled_passes` has them as one kernel each."""

    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    softmax: Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(
    x_th: Tensor,
    weight_vh: Tensor,
    targets_t: Tensor,
    *,
    bias_v: Tensor | None = None,
    cap: float | None = None,
    group: dist.ProcessGroup | None = None,
    vocab: int | None = None,
    passes: Passes | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Mean cross-entropy of the logits x W^T (+ bias) against targets, those of `IGNORED` left out.

    With a cap the logits are cap tanh(logits / cap).
    With `group`, ranks hold shards of the vocabulary in rank order and the same tokens. Shards are equal, or
    those that ranks have of `vocab` columns: as many each, rounded up, and the last what is left. All of them
    return the whole's loss; the gradient of x is then each rank's part, to be summed by the caller.
    Gradients, not the loss, are multiplied by `scale`, so that fp16 can hold them.
    """
    asked = (x_th.requires_grad, weight_vh.requires_grad) if torch.is_grad_enabled() else (False, False)
    with torch.no_grad():
        found = loss_and_gradients(
            x_th,
            weight_vh,
            targets_t,
            of_hidden=asked[0],
            of_weight=asked[1],
            bias_v=bias_v,
            cap=cap,
            group=group,
            vocab=vocab,
            passes=passes,
            scale=scale,
        )
    loss = found.loss
    # Side by side, so that a backward pass split into inputs and weights runs each of them once.
    for tensor, gradient in ((x_th, found.hidden), (weight_vh, found.weight), (bias_v, found.bias)):
        if tensor is not None and gradient is not None:
            loss = loss + _Known.apply(tensor, gradient)  # type: ignore[no-untyped-call]
    return loss


class _Known(Function):
    """A scalar zero whose gradient with respect to `tensor` is known already. For one backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros((), dtype=torch.float32, device=tensor.device)

    @staticmethod
    def backward(ctx: Any, *of_loss: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the loss went backward twice"
        # In place: nobody else has it, and the weight's is as large as the weight.
        return gradient.mul_(of_loss[0]), None


def loss_and_gradients(
    x_th: Tensor,
    weight_vh: Tensor,
    targets_t: Tensor,
    *,
    of_hidden: bool,
    of_weight: bool,
    group: dist.ProcessGroup | None,
    bias_v: Tensor | None = None,
    cap: float | None = None,
    vocab: int | None = None,
    passes: Passes | None = None,
    scale: float = 1.0,
) -> LossAndGradients:
    """The loop over chunks, outside autograd. Chunks are the same on all ranks."""
    tokens, ranks = x_th.shape[0], dist.get_world_size(group) if group is not None else 1
    vocab = vocab or ranks * weight_vh.shape[0]
    counted = targets_t != IGNORED
    share_t = counted.float() / counted.sum().clamp(min=1)
    first = dist.get_rank(group) * math.ceil(vocab / ranks) if group is not None else 0
    loss = torch.zeros((), dtype=torch.float32, device=x_th.device)
    hidden = torch.empty_like(x_th) if of_hidden else None
    weight = torch.empty_like(weight_vh) if of_weight else None
    bias = torch.zeros_like(bias_v) if of_weight and bias_v is not None else None
    size = chunk_tokens(tokens, vocab_shard(vocab, ranks))
    for begin in range(0, tokens, size):
        part = slice(begin, begin + size)
        x, targets, share = x_th[part], targets_t[part] - first, share_t[part]
        logits = x @ weight_vh.T if bias_v is None else torch.addmm(bias_v, x, weight_vh.T)
        logits, slope = (logits, None) if cap is None else _with_slope(logits, cap)
        wanted = of_hidden or of_weight
        part_loss, gradient = _chunk(logits, targets, share, group, passes or EAGER, wanted, scale)
        del logits
        loss += part_loss
        if slope is not None:
            gradient = gradient * slope
        if bias is not None:
            bias += gradient.sum(0)
        if hidden is not None:
            torch.mm(gradient, weight_vh, out=hidden[part])
        if weight is not None and begin == 0:
            torch.mm(gradient.T, x, out=weight)
        elif weight is not None:
            weight.addmm_(gradient.T, x)
        del gradient  # else it lives beside the next chunk's logits
    return LossAndGradients(loss, hidden, weight, bias)


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap tanh(logits / cap), in fp32 inside."""
    return (cap * torch.tanh(logits.float() / cap)).to(logits.dtype)


def _with_slope(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Capped logits, and their slope 1 - (capped / cap)^2."""
    found = capped(logits, cap)
    return found, (1 - (found.float() / cap).square()).to(logits.dtype)


def _chunk(
    logits: Tensor,
    targets: Tensor,
    share: Tensor,
    group: dist.ProcessGroup | None,
    passes: Passes,
    with_gradient: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A chunk's part of the loss and the gradient of its logits, in whose memory it may lie.

    Targets are columns of this rank's shard where they are within it.
    """
    columns = logits.shape[1]
    own = (targets >= 0) & (targets < columns)
    place = torch.where(own, targets, 0)[:, None]
    lse, target = passes.statistics(logits, place)
    target = torch.where(own, target, 0.0)
    if group is not None:
        mine = torch.stack((lse, target))
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        every = torch.stack(parts)
        lse, target = every[:, 0].logsumexp(0), every[:, 1].sum(0)
    loss = torch.where(share > 0, (lse - target) * share, 0.0).sum()
    if not with_gradient:
        return loss, logits
    gradient = passes.softmax(logits, lse, scale * share)
    # Set, not subtracted: the difference of two numbers near each other is formed in fp32.
    at_target = torch.expm1(target - lse) * (scale * share)
    kept = gradient.gather(1, place)[:, 0]
    gradient.scatter_(1, place, torch.where(own, at_target.to(kept.dtype), kept)[:, None])
    return loss, gradient


def _statistics(logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp of each row, and the logit at `place` [T, 1], in fp32. One value in fp32 a logit is formed:
    torch's own logsumexp forms two."""
    top = logits.amax(1, keepdim=True).float()
    shifted = logits.float().sub_(top) if logits.dtype is not torch.float32 else logits - top
    return shifted.exp_().sum(1).log_().add_(top[:, 0]), logits.gather(1, place)[:, 0].float()


def _softmax(logits: Tensor, lse: Tensor, share: Tensor) -> Tensor:
    """share exp(logits - lse), in the precision of the logits; overwrites those of fp32."""
    return logits.float().sub_(lse[:, None]).exp_().mul_(share[:, None]).to(logits.dtype)


EAGER = Passes(_statistics, _softmax)


def compiled_passes(backend: str = "inductor") -> Passes:
    """The passes as one kernel each: a logit is read twice and its gradient written once, in 16 bits."""
    return Passes(
        torch.compile(_statistics, backend=backend, dynamic=False),
        torch.compile(_softmax, backend=backend, dynamic=False),
    )


class Head(nn.Linear):
    """Hidden states [B, S, H] to logits [B, S, V], or with targets [B, S] to their mean loss, a scalar.

    Over a tensor-parallel mesh each rank holds rows of the weight, so a shard of the vocabulary; hidden
    states come whole, or as this rank's slice of the sequence. Logits are then not to be had. With a `cap`
    c logits are c tanh(logits / c) (Gemma 2, arXiv 2408.00118).
    `gradient_scale` multiplies the loss's gradients (runtime.model.precision).
    """

    def __init__(self, hidden: int, vocab: int, *, bias: bool = False, cap: float | None = None) -> None:
        super().__init__(hidden, vocab, bias=bias)
        self.cap = cap
        self.mesh: DeviceMesh | None = None
        self.between: Shard | Replicate = Replicate()
        self.passes: Passes | None = None
        self.gradient_scale = 1.0
        self.counted: float | None = None
        """What the sum of losses is divided by; None: the number of targets that count."""

    def shard(self, mesh: DeviceMesh, between: Shard | Replicate) -> None:
        """Leaves this rank its rows; hidden states are then laid out as `between` says.

        A bias whose rows do not divide stays whole: data ranks could not share out its parts.
        """
        self.mesh, self.between = mesh, between
        # Every rank drew the same whole weight, so each takes its shard from its own copy.
        for name, parameter in list(self.named_parameters()):
            if name == "weight" or self.out_features % mesh.size() == 0:
                rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                self.register_parameter(name, nn.Parameter(rows))

    def whole_biases(self) -> list[nn.Parameter]:
        """The bias, where it is whole on ranks that hold rows of the weight: each has the gradient of its own
        rows."""
        uneven = self.mesh is not None and self.out_features % self.mesh.size() > 0
        return [self.bias] if uneven and self.bias is not None else []

    def forward(self, x_bsh: Tensor, targets_bs: Tensor | None = None) -> Tensor:
        if targets_bs is None:
            assert self.mesh is None, "over tensor-parallel ranks the head gives the loss only"
            logits = super().forward(x_bsh)
            return logits if self.cap is None else capped(logits, self.cap)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        group = None
        if self.mesh is not None:
            assert isinstance(weight, DTensor)
            weight, group = weight.to_local(), self.mesh.get_group()
            bias = self._own_rows(bias, len(weight))
            # Each rank's gradient of the hidden states is a part of a sum.
            sliced = DTensor.from_local(x_bsh, self.mesh, [self.between], run_check=False)
            x_bsh = sliced.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        loss = cross_entropy(
            x_bsh.flatten(0, 1),
            weight,
            targets_bs.flatten(),
            bias_v=bias,
            cap=self.cap,
            group=group,
            vocab=self.out_features,
            passes=self.passes,
            scale=self.gradient_scale,
        )
        return loss if self.counted is None else loss * ((targets_bs != IGNORED).sum() / self.counted)

    def _own_rows(self, bias: Tensor | None, rows: int) -> Tensor | None:
        """This rank's rows of the bias: as many as others have, rounded up; the last has what is left."""
        if isinstance(bias, DTensor):
            return bias.to_local()
        if bias is None or self.mesh is None:
            return None
        first = self.mesh.get_local_rank() * math.ceil(self.out_features / self.mesh.size())
        return bias[first : first + rows]
