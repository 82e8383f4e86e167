"""A mixture of experts: each token meets the few experts that a router chooses, and all shared ones.

Shapes: B micro-batch, S sequence, H hidden, F width of an expert, E experts, K experts a token, T tokens, and
R rows: one for each token and each of its experts, in the order of experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from planner.model.feed_forward import Experts as ExpertsSpec
from planner.model.feed_forward import Mlp as MlpSpec
from runtime.launch.fake_answers import row_counts
from runtime.model.mlp import Mlp, activate
from runtime.model.router import Router


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
    rows = len(order) if spec.routing.capacity is None else sum(row_counts(counts[None], len(order))[0])
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
