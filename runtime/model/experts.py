"""A mixture of experts: each token meets the few experts that a router chooses, and all shared ones.

Shapes: B micro-batch, S sequence, H hidden, F width of an expert, E experts, K experts a token, T tokens, and
R rows: one for each token and each of its experts, in the order of experts.

The router of a mixture of experts: which experts a token meets, with what weight, and what balances them.

Shapes: B micro-batch, S sequence (of one rank), H hidden, E experts, K experts a token, G groups of experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from planner.model.feed_forward import Experts as ExpertsSpec
from planner.model.feed_forward import Mlp as MlpSpec
from planner.model.feed_forward import Score
from runtime.model.layers import Mlp, activate

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

    def __init__(self, hidden: int, spec: ExpertsSpec) -> None:
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


class Dispatch(Protocol):
    """Takes tokens to where their experts are, and results back."""

    def gather(
        self, tokens_th: Tensor, weights_tk: Tensor, chosen_tk: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that this rank makes rows of, with weights and experts."""

    def send(self, rows_rh: Tensor, counts_e: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The rows that the experts of this rank compute, how many each has, and what `take_back` needs."""

    def take_back(self, rows_rh: Tensor, sent: Any) -> Tensor:
        """The result of each row that this rank had sent, in the order of sending."""

    def scatter(self, out_th: Tensor) -> Tensor:
        """The results of this rank's own tokens, of those that `gather` gave."""


class AllHere:
    """The dispatch of a rank that holds all experts."""

    def gather(
        self, tokens_th: Tensor, weights_tk: Tensor, chosen_tk: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return tokens_th, weights_tk, chosen_tk

    def send(self, rows_rh: Tensor, counts_e: Tensor) -> tuple[Tensor, Tensor, Any]:
        return rows_rh, counts_e, None

    def take_back(self, rows_rh: Tensor, sent: Any) -> Tensor:
        return rows_rh

    def scatter(self, out_th: Tensor) -> Tensor:
        return out_th


class MixtureOfExperts(nn.Module):
    """down(act(gate(x)) * up(x)) of a token's experts, weighed and summed; shared experts beside.

    `enter` and `leave` are put around the tokens by tensor parallelism, `dispatch` by expert parallelism.
    """

    def __init__(self, hidden: int, spec: ExpertsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(hidden, spec)
        self.experts = Experts(hidden, spec.count, spec.expert)
        self.shared = Mlp(hidden, spec.shared) if spec.shared else None
        self.shared_gate = nn.Linear(hidden, 1, bias=False) if spec.shared_gate else None
        self.dispatch: Dispatch = AllHere()
        self.enter: Callable[[Tensor], Tensor] = _unchanged
        self.leave: Callable[[Tensor], Tensor] = _unchanged

    def forward(self, x_bsh: Tensor) -> Tensor:
        tokens_bsh = self.enter(x_bsh)
        out = self._routed(tokens_bsh)
        if self.shared is not None:
            beside = self.shared(x_bsh)
            if self.shared_gate is not None:
                beside = self.shared_gate(tokens_bsh).sigmoid() * beside
            out = out + beside
        return self.leave(out)

    def _routed(self, x_bsh: Tensor) -> Tensor:
        weights, chosen = self.router(x_bsh)
        if self.spec.routing.capacity is not None:
            chosen = self._with_drops(chosen, self.spec.routing.capacity)
        tokens, weights, chosen = self.dispatch.gather(*(t.flatten(0, 1) for t in (x_bsh, weights, chosen)))
        rows, counts, places = _copies_by_expert(tokens, chosen, self.spec)
        rows, counts, sent = self.dispatch.send(rows, counts)
        results = self.dispatch.take_back(self.experts(rows, counts), sent)
        return self.dispatch.scatter(_weighed_sum(results, places, weights)).view_as(x_bsh)

    def _with_drops(self, chosen_bsk: Tensor, capacity: float) -> Tensor:
        """The choices, those beyond an expert's capacity replaced by E."""
        whole = self.router.whole_sequences(chosen_bsk)
        kept = within_capacity(whole, self.spec.count, capacity)
        return self.router.own_part(whole.where(kept, self.spec.count))


def _unchanged(x: Tensor) -> Tensor:
    return x


def within_capacity(chosen_bsk: Tensor, experts: int, factor: float) -> Tensor:
    """Whether a choice is among the first ceil(factor S K / E) of its sequence for its expert, [B, S, K]."""
    batch, seq, topk = chosen_bsk.shape
    picked = chosen_bsk.new_zeros(batch, seq, experts, dtype=torch.int32).scatter_(2, chosen_bsk, 1)
    earlier = picked.cumsum(1) - picked
    return earlier.gather(2, chosen_bsk) < math.ceil(factor * seq * topk / experts)


class Experts(nn.Module):
    """Routed experts as stacked weights, [E, F, H] up and [E, H, F] down: `first` and those after it."""

    def __init__(self, hidden: int, count: int, spec: MlpSpec) -> None:
        super().__init__()
        self.activation, self.width = spec.activation, spec.width
        self.first = 0

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, *shape))

        self.gate = weight(spec.width, hidden) if spec.gated else None
        self.up, self.down = weight(spec.width, hidden), weight(hidden, spec.width)
        self.gate_bias = weight(spec.width) if spec.gated and spec.bias else None
        self.up_bias = weight(spec.width) if spec.bias else None
        self.down_bias = weight(hidden) if spec.bias else None

    def forward(self, rows_rh: Tensor, counts_e: Tensor) -> Tensor:
        """The result of each row by its expert: the first counts[0] rows by the first, and so on."""
        ends = counts_e.cumsum(0).to(torch.int32)
        inner = grouped_products(rows_rh, self.up, self.up_bias, ends)
        if self.gate is None:
            inner = activate(inner, self.activation)
        else:
            inner = (
                activate(grouped_products(rows_rh, self.gate, self.gate_bias, ends), self.activation) * inner
            )
        if self.down_bias is None:
            return grouped_products(inner, self.down, None, ends)
        # Each of the ranks that share out one expert's width adds its part of the bias.
        bias = _divided(_local(self.down_bias), self.width // inner.shape[1])
        return grouped_products(inner, self.down, bias, ends)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _divided(bias: Tensor, parts: int) -> Tensor:
    """bias / parts, with the gradient of bias."""
    return bias if parts == 1 else bias + (1 / parts - 1) * bias.detach()


def grouped_products(rows_rh: Tensor, weight: Tensor, bias: Tensor | None, ends_e: Tensor) -> Tensor:
    """rows @ weight^T (+ bias), each row by the weight of its expert: of e, the rows [ends[e-1], ends[e])."""
    out = _grouped(rows_rh, _local(weight).transpose(1, 2), ends_e)
    if bias is None:
        return out
    counts = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).long()
    return out + _local(bias).repeat_interleave(counts, dim=0, output_size=rows_rh.shape[0])


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """A grouped matrix product, or one for each expert where this build of torch has none."""
    grouped: Callable[..., Tensor] | None = getattr(functional, "grouped_mm", None)
    grouped = grouped or getattr(torch, "_grouped_mm", None)
    if grouped is not None:
        return grouped(rows, weights, offs=ends)
    bounds = [0, *ends.tolist()]
    parts = [rows[bounds[e] : bounds[e + 1]] @ weights[e] for e in range(len(weights))]
    return torch.cat(parts)


def _copies_by_expert(
    tokens_th: Tensor, chosen_tk: Tensor, spec: ExpertsSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """A row for every choice in the order of experts, how many each expert has, and the place of each choice
    [T, K] among the rows. Choices of E, which are dropped, have no row and the place R."""
    keys = chosen_tk.flatten()
    order = keys.argsort(stable=True)
    counts = keys.new_zeros(spec.count + 1).scatter_add_(0, keys, torch.ones_like(keys))[: spec.count]
    rows = len(order) if spec.routing.capacity is None else sum(rows_per_part(counts[None], len(order))[0])
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    places = places.clamp(max=rows).view_as(chosen_tk)
    of_row = order[:rows] // chosen_tk.shape[1]
    copies: Tensor = _Copies.apply(tokens_th, of_row, places)  # type: ignore[no-untyped-call]
    return copies, counts, places


def _weighed_sum(rows_rh: Tensor, places_tk: Tensor, weights_tk: Tensor) -> Tensor:
    """sum_k weight[t, k] row[place[t, k]] for each token, [T, H]; a dropped choice adds nothing."""
    results: Tensor = _Places.apply(rows_rh, places_tk)  # type: ignore[no-untyped-call]
    return torch.bmm(weights_tk.to(results.dtype)[:, None], results)[:, 0]


def _at(rows_rh: Tensor, places_tk: Tensor) -> Tensor:
    """The row at each place, [T, K, H]; zero at place R."""
    dropped = rows_rh.shape[0] < places_tk.numel()
    return (functional.pad(rows_rh, (0, 0, 0, 1)) if dropped else rows_rh)[places_tk]


class _Copies(torch.autograd.Function):
    """The token of each row. Going back, each token sums its rows in the order of its choices: unlike
    index_add, whose order on CUDA changes from run to run."""

    @staticmethod
    def forward(ctx: Any, tokens_th: Tensor, token_of_row: Tensor, places_tk: Tensor) -> Tensor:
        ctx.save_for_backward(places_tk)
        return tokens_th[token_of_row]

    @staticmethod
    def backward(ctx: Any, grad_rh: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _at(grad_rh, places).sum(1), None, None


class _Places(torch.autograd.Function):
    """The row at each place [T, K, H]. Going back, every row has one place, or none."""

    @staticmethod
    def forward(ctx: Any, rows_rh: Tensor, places_tk: Tensor) -> Tensor:
        ctx.save_for_backward(places_tk)
        ctx.rows = rows_rh.shape[0]
        return _at(rows_rh, places_tk)

    @staticmethod
    def backward(ctx: Any, grad_tkh: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        grads = grad_tkh.new_empty(ctx.rows + 1, grad_tkh.shape[-1])
        grads[places.flatten()] = grad_tkh.flatten(0, 1)
        return grads[: ctx.rows], None


def rows_per_part(counts: Tensor, rows: int) -> list[list[int]]:
    """The numbers in `counts` [n, parts]; where tensors have shapes alone, `rows` over the parts of each."""
    if isinstance(counts, FakeTensor):
        parts = counts.shape[1]
        return [[(rows + parts - 1 - part) // parts for part in range(parts)]] * len(counts)
    found: list[list[int]] = counts.tolist()
    return found
