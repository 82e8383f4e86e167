"""The model computes what its description says: checked against formulas written out by hand."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from planner.model.feed_forward import Activation
from planner.model.spec import ModelSpec
from runtime.model.transformer import Transformer, build_transformer, materialize
from tests.plans import tiny_gpt2, tiny_llama

SEQ = 8


def whole(spec: ModelSpec, seed: int = 0) -> Transformer:
    model = build_transformer(spec, 0, spec.layers, True, True, seq=SEQ)
    materialize(model, spec, prefix="", seed=seed, device="cpu")
    model.tie()
    return model


def tokens(spec: ModelSpec) -> Tensor:
    return torch.randint(spec.vocab, (2, SEQ), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("spec", [tiny_llama(), tiny_llama(tied=True), tiny_gpt2()])
def test_parameters_are_as_many_as_the_spec_says(spec: ModelSpec) -> None:
    model = whole(spec)
    assert sum(p.numel() for p in model.parameters()) == spec.params_total
    assert sum(p.numel() for p in model.layers.parameters()) == spec.params_blocks


def rotate_by_complex_numbers(x: Tensor, theta: float) -> Tensor:
    """Position s turns the pair (x_i, x_{i+D/2}) by s * theta^(-2i/D), as a product of complex numbers."""
    out = x.clone()
    half = x.shape[-1] // 2
    for s in range(x.shape[0]):
        for i in range(half):
            turned = complex(x[s, i], x[s, i + half]) * cmath.exp(1j * s * theta ** (-i / half))
            out[s, i], out[s, i + half] = turned.real, turned.imag
    return out


def attention_by_hand(part: dict[str, Tensor], x: Tensor, spec: ModelSpec) -> Tensor:
    """Causal attention of one sequence [S, H], head by head."""
    a = spec.segments[0].block.mixer
    bias = {name: part.get(f"attention.{name}.bias", torch.zeros(())) for name in ("wq", "wk", "wv", "wo")}
    q, k, v = (x @ part[f"attention.{name}.weight"].T + bias[name] for name in ("wq", "wk", "wv"))
    heads = []
    for head in range(a.heads):
        shared = head // (a.heads // a.kv_heads)
        mine = slice(head * a.head_dim, (head + 1) * a.head_dim)
        theirs = slice(shared * a.head_dim, (shared + 1) * a.head_dim)
        q_h, k_h = q[:, mine], k[:, theirs]
        if not spec.learned_positions:
            q_h = rotate_by_complex_numbers(q_h, spec.rope_theta)
            k_h = rotate_by_complex_numbers(k_h, spec.rope_theta)
        scores = q_h @ k_h.T / math.sqrt(a.head_dim)
        future = torch.ones_like(scores).triu(1).bool()
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, theirs])
    return torch.cat(heads, -1) @ part["attention.wo.weight"].T + bias["wo"]


def norm_by_hand(part: dict[str, Tensor], name: str, x: Tensor, spec: ModelSpec) -> Tensor:
    if f"{name}.bias" in part:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()
        return scaled * part[f"{name}.weight"] + part[f"{name}.bias"]
    return x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * part[f"{name}.weight"]


def mlp_by_hand(part: dict[str, Tensor], x: Tensor, spec: ModelSpec) -> Tensor:
    if spec.segments[0].block.mlp.activation is Activation.SILU:
        gate = x @ part["mlp.gate.weight"].T
        return (gate * gate.sigmoid() * (x @ part["mlp.up.weight"].T)) @ part["mlp.down.weight"].T
    up = x @ part["mlp.up.weight"].T + part["mlp.up.bias"]
    gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return gelu @ part["mlp.down.weight"].T + part["mlp.down.bias"]


def logits_by_hand(model: Transformer, sequence: Tensor, spec: ModelSpec) -> Tensor:
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    x = weights["tok_embeddings.weight"][sequence]
    if spec.learned_positions:
        x = x + weights["positions.weight"][: len(sequence)]
    for layer in range(spec.layers):
        prefix = f"layers.{layer}."
        part = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = x + attention_by_hand(part, norm_by_hand(part, "attention_norm", x, spec), spec)
        x = x + mlp_by_hand(part, norm_by_hand(part, "mlp_norm", x, spec), spec)
    head = "tok_embeddings.weight" if spec.tied_embeddings else "output.weight"
    return norm_by_hand(weights, "norm", x, spec) @ weights[head].T


@pytest.mark.parametrize("spec", [tiny_llama(layers=2), tiny_gpt2(layers=2)], ids=["llama", "gpt2"])
def test_logits_equal_the_formulas(spec: ModelSpec) -> None:
    model = whole(spec)
    with torch.no_grad():
        for parameter in model.parameters():  # so that norms and biases are not 1 and 0
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    found = model(tokens(spec))
    for row, sequence in zip(found, tokens(spec), strict=True):
        torch.testing.assert_close(row.double(), logits_by_hand(model, sequence, spec), rtol=1e-4, atol=1e-5)


def test_a_chain_of_stages_is_the_whole_model() -> None:
    spec = tiny_llama()
    x = tokens(spec)
    for first, end in ((0, 1), (1, 3), (3, 4)):
        stage = build_transformer(spec, first, end, first == 0, end == spec.layers, seq=SEQ)
        materialize(stage, spec, prefix="", seed=0, device="cpu")
        assert list(stage.layers) == [str(layer) for layer in range(first, end)]
        x = stage(x)
    torch.testing.assert_close(x, whole(spec)(tokens(spec)), rtol=0, atol=0)


def test_initial_values_are_of_seed_and_name() -> None:
    """Normal with the spec's range, less into the residual stream; tied output is the embedding."""
    spec = tiny_gpt2(layers=8, hidden=64)
    model, other = whole(spec, seed=1), whole(spec, seed=2)
    block, second = model.layers["3"], model.layers["4"]
    assert not torch.equal(block.mlp.up.weight, second.mlp.up.weight)
    assert not torch.equal(block.mlp.up.weight, other.layers["3"].mlp.up.weight)
    assert block.mlp.up.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.1 / 4, rel=0.05)
    assert block.attention.wo.weight.std().item() == pytest.approx(0.1 / 4, rel=0.05)
    assert block.mlp_norm.weight.eq(1).all()
    assert block.mlp_norm.bias.eq(0).all()
    last = build_transformer(spec, 7, 8, False, True, seq=SEQ)
    materialize(last, spec, prefix="", seed=1, device="cpu")
    assert last.output is not None and model.tok_embeddings is not None
    assert torch.equal(last.output.weight, model.tok_embeddings.weight)
