"""A mixture of experts computes what its description says: token by token, expert by expert, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from planner.model.feed_forward import Activation, Experts, Mlp, Routing, Score
from runtime.model import experts as experts_module
from runtime.model.experts import MixtureOfExperts
from runtime.model.transformer import materialize
from tests.plans import tiny_mixtral

HIDDEN, SEQ = 16, 12
SWIGLU = Mlp(width=24, gated=True, activation=Activation.SILU)
PLAIN = Experts(count=8, topk=2, expert=SWIGLU)
CASES = {
    "mixtral": PLAIN,
    "not-normalised": replace(PLAIN, topk=3, routing=Routing(normalised=False, scale=16.0)),
    "shared": replace(PLAIN, shared=replace(SWIGLU, width=8)),
    "shared-gate": replace(PLAIN, shared=SWIGLU, shared_gate=True),
    "biases": replace(PLAIN, router_bias=True, expert=replace(SWIGLU, bias=True)),
    "not-gated": replace(PLAIN, expert=replace(SWIGLU, gated=False, activation=Activation.RELU2)),
    "deepseek-v2": replace(PLAIN, routing=Routing(normalised=False, groups=4, chosen_groups=2)),
    "deepseek-v3": replace(
        PLAIN,
        topk=3,
        shared=SWIGLU,
        routing=Routing(
            score=Score.SIGMOID, scale=2.5, groups=4, chosen_groups=2, group_experts=2, corrected=True
        ),
    ),
    "capacity": replace(PLAIN, routing=Routing(capacity=0.75)),
}


def filled(spec: Experts) -> MixtureOfExperts:
    """The module with weights, biases and correction that are none of them special."""
    with torch.device("meta"):
        module = MixtureOfExperts(HIDDEN, spec)
    materialize(module, replace(tiny_mixtral(), initializer_range=0.4), prefix="", seed=2, device="cpu")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith(("bias", "correction")):
                tensor.normal_(0, 0.3, generator=generator)
    return module


def some_tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, SEQ, HIDDEN, generator=torch.Generator().manual_seed(6))


def choice_by_hand(module: MixtureOfExperts, x: Tensor) -> dict[int, float]:
    """The experts of one token, and their weights."""
    spec, routing = module.spec, module.spec.routing
    logits = module.router.weight @ x + (module.router.bias if spec.router_bias else 0)
    scores = logits.sigmoid() if routing.score is Score.SIGMOID else logits.exp() / logits.exp().sum()
    ranked = scores + module.router.correction if routing.corrected else scores.clone()
    size = spec.count // routing.groups
    groups = [sorted(part, reverse=True) for part in ranked.split(size)]
    best = sorted(range(routing.groups), key=lambda g: -sum(groups[g][: routing.group_experts]))
    legal = [e for e in range(spec.count) if e // size in best[: routing.chosen_groups]]
    chosen = sorted(legal, key=lambda e: -ranked[e])[: spec.topk]
    total = sum(scores[e] for e in chosen) if routing.normalised else 1.0
    return {e: float(scores[e] / total * routing.scale) for e in chosen}


def mlp_by_hand(spec: Mlp, w: dict[str, Tensor], x: Tensor) -> Tensor:
    up = w["up"] @ x + w.get("up_bias", 0)
    if spec.gated:
        gate = w["gate"] @ x + w.get("gate_bias", 0)
        return w["down"] @ (gate * gate.sigmoid() * up) + w.get("down_bias", 0)
    return w["down"] @ up.clamp(min=0) ** 2 + w.get("down_bias", 0)


def by_hand(module: MixtureOfExperts, x_bsh: Tensor) -> Tensor:
    spec, out = module.spec, torch.zeros_like(x_bsh)
    capacity = math.inf
    if spec.routing.capacity is not None:
        capacity = math.ceil(spec.routing.capacity * SEQ * spec.topk / spec.count)
    for b in range(x_bsh.shape[0]):
        taken = dict.fromkeys(range(spec.count), 0)
        for s in range(SEQ):
            x = x_bsh[b, s]
            total = torch.zeros_like(x)
            for e, weight in choice_by_hand(module, x).items():
                taken[e] += 1
                if taken[e] <= capacity:
                    w = {name: p[e] for name, p in module.experts.named_parameters()}
                    total += weight * mlp_by_hand(spec.expert, w, x)
            out[b, s] = total
            if module.shared is not None and spec.shared is not None:
                w = {n.removesuffix(".weight"): p for n, p in module.shared.named_parameters()}
                gate = 1.0 if module.shared_gate is None else (module.shared_gate.weight @ x).sigmoid()
                out[b, s] += gate * mlp_by_hand(spec.shared, w, x)
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_layer_equals_its_formula(name: str) -> None:
    module, x = filled(CASES[name]), some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(module(x), by_hand(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd_over_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The permutation's own backward passes, and products without the grouped operator."""
    found = gradients(filled(CASES[name]))
    for module in (functional, torch):
        for operator in ("grouped_mm", "_grouped_mm"):
            monkeypatch.delattr(module, operator, raising=False)
    monkeypatch.setattr(experts_module, "_Copies", Taped)
    monkeypatch.setattr(experts_module, "_Places", Taped)
    for key, grad in gradients(filled(CASES[name])).items():
        torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-6)


class Taped:
    """Copies and places as plain indexing, which autograd goes back through itself."""

    @staticmethod
    def apply(source: Tensor, index: Tensor, places: Tensor | None = None) -> Tensor:
        padded = functional.pad(source, (0, 0, 0, 1)) if places is None else source
        return padded[index]


def gradients(module: MixtureOfExperts) -> dict[str, Tensor]:
    x = some_tokens().requires_grad_()
    module(x).square().sum().backward()
    assert x.grad is not None
    return {"x": x.grad, **{name: p.grad for name, p in module.named_parameters() if p.grad is not None}}


def test_an_expert_of_a_stack_is_drawn_by_its_own_number() -> None:
    whole = filled(PLAIN)
    part = MixtureOfExperts(HIDDEN, replace(PLAIN, count=2))
    part.experts.first = 3
    materialize(part, replace(tiny_mixtral(), initializer_range=0.4), prefix="", seed=2, device="cpu")
    torch.testing.assert_close(part.experts.up, whole.experts.up[3:5], rtol=0, atol=0)
    assert not torch.equal(whole.experts.up[0], whole.experts.up[1])


def test_the_balance_loss_and_the_z_loss_reach_the_router_alone() -> None:
    """The layer's result is as without them; the router's gradient has that of the written-out loss more."""
    plain = filled(replace(PLAIN, routing=Routing(aux_loss=0.0)))
    balanced = filled(replace(PLAIN, routing=Routing(aux_loss=0.3, z_loss=0.02)))
    balanced.router.loss_scale = 0.25
    x = some_tokens()
    torch.testing.assert_close(plain(x), balanced(x), rtol=0, atol=0)
    before, after = gradients(plain), gradients(balanced)
    weight = plain.router.weight.detach().clone().requires_grad_()
    loss = torch.zeros(())
    for sequence in x:
        logits = sequence @ weight.T
        scores = logits.softmax(-1)
        chosen = scores.topk(2).indices
        shares = torch.stack([(chosen == e).sum() for e in range(8)]) * 8 / (2 * SEQ)
        loss = loss + 0.3 * (shares * scores.mean(0)).sum() / len(x)
        loss = loss + 0.02 * logits.exp().sum(-1).log().square().mean() / len(x)
    (expected,) = torch.autograd.grad(0.25 * loss, weight)
    found = after["router.weight"] - before["router.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after["experts.up"], before["experts.up"], rtol=0, atol=0)


def test_tokens_are_counted_once_a_backward_pass() -> None:
    module, x = filled(PLAIN), some_tokens()
    module(x)
    assert module.router.counts.sum() == 0
    module(x).sum().backward()
    assert module.router.counts.sum() == 2 * SEQ * PLAIN.topk
