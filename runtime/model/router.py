"""The router of a mixture of experts: which experts a token meets, with what weight, and what balances them.

Shapes: B micro-batch, S sequence (of one rank), H hidden, E experts, K experts a token, G groups of experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from planner.model.feed_forward import Experts
from planner.model.routing import Score

_TINY = 1e-20
"""Added to sums of scores that divide."""


class Router(nn.Module):
    """Chooses `topk` experts for each token and weighs them, in fp32 whatever its weight is in.

    `correction` is the bias of the choice (fp32, not trained). `counts` [E] are the tokens that chose each
    expert, dropped ones included, since they were last zeroed; a pass counts when it goes backward, so once
    however often recomputation runs it. `loss_scale` multiplies the router's own losses, as a step's loss is
    divided by its micro-batches, and `gradient_scale` their gradients, as fp16 has all. `sequence_groups`
    are ranks that hold other tokens of the same sequences, and `positions` [S] those of all their tokens,
    rank after rank; None where they are in order.
    """

    counts: Tensor
    correction: Tensor

    def __init__(self, hidden: int, spec: Experts) -> None:
        super().__init__()
        self.experts, self.topk, self.routing = spec.count, spec.topk, spec.routing
        self.weight = nn.Parameter(torch.empty(spec.count, hidden))
        self.bias = nn.Parameter(torch.empty(spec.count)) if spec.router_bias else None
        self.loss_scale = self.gradient_scale = 1.0
        self.sequence_groups: tuple[dist.ProcessGroup, ...] = ()
        self.positions: Tensor | None = None
        self.register_buffer("counts", torch.zeros(spec.count), persistent=False)
        if spec.routing.corrected:
            self.register_buffer("correction", torch.zeros(spec.count))

    def fill(self) -> None:
        """Writes the first values of what is not trained: no correction yet, nothing counted."""
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, x_bsh: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B, S, K] in fp32 and the experts [B, S, K] that they are of."""
        bias = None if self.bias is None else self.bias.float()
        logits = functional.linear(x_bsh.float(), self.weight.float(), bias)
        scores = logits.sigmoid() if self.routing.score is Score.SIGMOID else logits.softmax(-1)
        chosen = self._choose(scores.detach())
        weights = scores.gather(-1, chosen)
        if self.routing.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        weights = weights * self.routing.scale
        counts = _count(chosen, self.experts)
        loss = self._loss(logits, scores, counts)
        return _Balanced.apply(weights, loss, counts.sum(0), self), chosen  # type: ignore[no-untyped-call]

    def whole_sequences(self, x_bsk: Tensor) -> Tensor:
        """Values of this rank's part of each sequence as those of whole sequences, in order of position."""
        for group in self.sequence_groups:
            parts = [torch.empty_like(x_bsk) for _ in range(group.size())]
            dist.all_gather(parts, x_bsk.contiguous(), group=group)
            x_bsk = torch.cat(parts, dim=1)
        return (
            x_bsk if self.positions is None else torch.empty_like(x_bsk).index_copy_(1, self.positions, x_bsk)
        )

    def own_part(self, x_bsk: Tensor) -> Tensor:
        """The inverse of `whole_sequences`."""
        if self.positions is not None:
            x_bsk = x_bsk.index_select(1, self.positions)
        for group in reversed(self.sequence_groups):
            x_bsk = x_bsk.chunk(group.size(), dim=1)[group.rank()]
        return x_bsk

    def _choose(self, scores_bse: Tensor) -> Tensor:
        """The best experts [B, S, K], of the best groups where experts are in groups."""
        routing = self.routing
        if routing.corrected:
            scores_bse = scores_bse + self.correction
        if routing.groups > 1:
            by_group = scores_bse.view(*scores_bse.shape[:-1], routing.groups, -1)
            group_scores = by_group.topk(routing.group_experts, dim=-1).values.sum(-1)
            best = group_scores.topk(routing.chosen_groups, dim=-1).indices
            others = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
            scores_bse = by_group.masked_fill(others[..., None], -math.inf).flatten(-2)
        return scores_bse.topk(self.topk, dim=-1).indices

    def _loss(self, logits_bse: Tensor, scores_bse: Tensor, counts_be: Tensor) -> Tensor:
        """This rank's part of the balance loss and the z-loss, means over the micro-batch's sequences."""
        routing = self.routing
        loss = logits_bse.new_zeros(())
        if routing.aux_loss == routing.z_loss == 0:
            return loss
        batch, seq = logits_bse.shape[:2]
        seq *= math.prod(group.size() for group in self.sequence_groups)
        if routing.aux_loss:
            counts_be = counts_be.clone()
            for group in self.sequence_groups:
                dist.all_reduce(counts_be, group=group)
            shares = scores_bse / (scores_bse.sum(-1, keepdim=True) + _TINY)
            products = (counts_be * shares.sum(1)).sum() * self.experts / (self.topk * seq * seq)
            loss = loss + routing.aux_loss / batch * products
        if routing.z_loss:
            squares = torch.logsumexp(logits_bse, dim=-1).square().sum()
            loss = loss + routing.z_loss / (batch * seq) * squares
        return loss


def _count(chosen_bsk: Tensor, experts: int) -> Tensor:
    """How many tokens of each sequence chose each expert, [B, E] in fp32."""
    flat = chosen_bsk.flatten(1)
    counts = torch.zeros(flat.shape[0], experts, device=flat.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))


class _Balanced(torch.autograd.Function):
    """Passes weights on; going back it counts the tokens, and gives the loss its gradient without adding it
    to any loss that is reported."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, counts_e: Tensor, router: Router) -> Tensor:
        ctx.router, ctx.counts = router, counts_e
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.router.counts += ctx.counts
        return grad, grad.new_tensor(ctx.router.loss_scale * ctx.router.gradient_scale), None, None
