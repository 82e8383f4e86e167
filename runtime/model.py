"""The transformer that is trained: readable modules, built from a ModelSpec, whole or one stage of it.

Shape legend: B micro-batch, S sequence, H hidden, N heads, D head_dim, V vocabulary. Layers are keyed by
their global index, so a parameter has the same name in every layout. Names are those of a Llama model;
a GPT-2 differs by LayerNorm, biases, a learned position table and tied embeddings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from planner import attention as attention_types
from planner import feed_forward
from planner import model as spec_types
from planner.execution import plain_parts
from planner.feed_forward import Activation
from planner.model import ModelSpec, Norm

RESIDUAL_OUTPUTS = ("attention.wo.weight", "mlp.down.weight")
"""Projections that write into the residual stream; their initial scale shrinks with depth (GPT-2 paper)."""


class Rotary(nn.Module):
    """Rotary position tables cos and sin [S, D/2] in fp32 (Su et al. 2021, arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, seq: int, head_dim: int, theta: float) -> None:
        super().__init__()
        self.seq, self.head_dim, self.theta = seq, head_dim, theta
        self.register_buffer("cos", torch.empty(seq, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(seq, head_dim // 2), persistent=False)

    def fill(self) -> None:
        """Writes the tables: angle[s, i] = s * theta^(-2i/D)."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = torch.outer(torch.arange(self.seq, dtype=torch.float64), self.theta**-exponents)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())


def rotate(x_bsnd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with each pair (i, i + D/2) of a head turned by its position's angle; fp32 inside."""
    seq = x_bsnd.shape[1]
    c, s = cos[:seq, None, :], sin[:seq, None, :]
    low, high = x_bsnd.float().chunk(2, dim=-1)
    return torch.cat((low * c - high * s, high * c + low * s), dim=-1).type_as(x_bsnd)


class Attention(nn.Module):
    """Causal self-attention; key and value heads may be fewer than query heads (GQA)."""

    def __init__(self, hidden: int, spec: attention_types.Attention) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.wq = nn.Linear(hidden, spec.query_width, bias=spec.qkv_bias)
        self.wk = nn.Linear(hidden, spec.kv_width, bias=spec.qkv_bias)
        self.wv = nn.Linear(hidden, spec.kv_width, bias=spec.qkv_bias)
        self.wo = nn.Linear(spec.query_width, hidden, bias=spec.out_bias)
        self.grouped = spec.kv_heads != spec.heads

    def forward(self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        # The head count is left to `view`: under tensor parallelism a rank holds only some heads.
        q, k, v = (self._heads(w(x_bsh)) for w in (self.wq, self.wk, self.wv))
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        mixed: Tensor = self.wo(out.transpose(1, 2).flatten(2))
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)


class Mlp(nn.Module):
    """The feed-forward layer: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, hidden: int, spec: feed_forward.Mlp) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate = nn.Linear(hidden, spec.width, bias=spec.bias) if spec.gated else None
        self.up = nn.Linear(hidden, spec.width, bias=spec.bias)
        self.down = nn.Linear(spec.width, hidden, bias=spec.bias)

    def forward(self, x_bsh: Tensor) -> Tensor:
        if self.gate is None:
            inner = _activate(self.up(x_bsh), self.activation)
        else:
            inner = _activate(self.gate(x_bsh), self.activation) * self.up(x_bsh)
        out: Tensor = self.down(inner)
        return out


def _activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case Activation.SILU:
            return functional.silu(x)
        case Activation.GELU:
            return functional.gelu(x)
        case Activation.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case Activation.RELU:
            return functional.relu(x)
        case Activation.RELU2:
            return functional.relu(x).square()


def _norm(kind: Norm, width: int, eps: float) -> nn.Module:
    return nn.RMSNorm(width, eps=eps) if kind is Norm.RMSNORM else nn.LayerNorm(width, eps=eps)


class Block(nn.Module):
    """One pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: spec_types.Layer, norm_eps: float) -> None:
        super().__init__()
        block, attention, mlp = plain_parts(spec)
        self.attention_norm = _norm(block.norm, block.hidden, norm_eps)
        self.attention = Attention(block.hidden, attention)
        self.mlp_norm = _norm(block.norm, block.hidden, norm_eps)
        self.mlp = Mlp(block.hidden, mlp)

    def forward(self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        middle: Tensor = x_bsh + self.attention(self.attention_norm(x_bsh), cos, sin)
        out: Tensor = middle + self.mlp(self.mlp_norm(middle))
        return out


class Transformer(nn.Module):
    """A decoder-only language model, or the blocks [first, end) of it with the ends that belong to them.

    The input is tokens [B, S] where the embedding is held, else hidden states [B, S, H]; the output is
    logits [B, S, V] where the head is held, else hidden states. Parts that are not held are None. Under
    sequence parallelism, `sequence_rank` is the slice of the sequence that this rank's hidden states are.
    """

    def __init__(
        self, spec: ModelSpec, first: int, end: int, *, with_embedding: bool, with_head: bool, seq: int
    ) -> None:
        super().__init__()
        hidden, vocab = spec.hidden, spec.vocab
        learned = spec.learned_positions if with_embedding else 0
        self.tied = spec.tied_embeddings and with_embedding and with_head
        self.sequence_rank = 0
        self.tok_embeddings = nn.Embedding(vocab, hidden) if with_embedding else None
        self.positions = nn.Embedding(learned, hidden) if learned else None
        self.rotary = (
            None
            if spec.learned_positions
            else Rotary(seq, plain_parts(spec.block(0))[1].head_dim, spec.rope_theta)
        )
        self.layers = nn.ModuleDict({str(i): Block(spec.block(i), spec.norm_eps) for i in range(first, end)})
        self.norm = _norm(spec.norm, hidden, spec.norm_eps) if with_head else None
        self.output = nn.Linear(hidden, vocab, bias=False) if with_head else None
        self.tie()

    def tie(self) -> None:
        """Makes the output projection share the embedding's weight, where the spec ties them."""
        if self.tied and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight

    def units(self) -> Iterator[list[tuple[str, nn.Module]]]:
        """The embedding, each block, the head: lists of named modules, every parameter in exactly one."""
        blocks = [(f"layers.{index}",) for index in self.layers]
        for names in (("tok_embeddings", "positions", "rotary"), *blocks, ("norm", "output")):
            held = [name for name in names if name in self._modules or name.startswith("layers.")]
            if held:
                yield [(name, self.get_submodule(name)) for name in held]

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The named modules that make up the model, in order."""
        for unit in self.units():
            yield from unit

    def forward(self, x: Tensor) -> Tensor:
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
            if self.positions is not None:
                x = x + self.positions(self._positions_of(x))
        cos, sin = (self.rotary.cos, self.rotary.sin) if self.rotary is not None else (None, None)
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        if self.norm is not None and self.output is not None:
            x = self.output(self.norm(x))
        return x

    def _positions_of(self, x_bsh: Tensor) -> Tensor:
        """Positions [1, S] of the hidden states that this rank holds, the `sequence_rank`th slice."""
        local_seq = x_bsh.shape[1]
        first = self.sequence_rank * local_seq
        return torch.arange(first, first + local_seq, device=x_bsh.device)[None]


def cross_entropy(logits_bsv: Tensor, targets_bs: Tensor) -> Tensor:
    """Mean cross-entropy of next-token prediction, computed in fp32."""
    return functional.cross_entropy(logits_bsv.flatten(0, 1).float(), targets_bs.flatten())


def build_transformer(
    spec: ModelSpec,
    first: int,
    end: int,
    with_embedding: bool,
    with_head: bool,
    *,
    seq: int | None = None,
) -> Transformer:
    """The blocks [first, end) without storage (device meta); `materialize` gives them their values."""
    with torch.device("meta"):
        return Transformer(
            spec,
            first,
            end,
            with_embedding=with_embedding,
            with_head=with_head,
            seq=seq or spec.max_positions,
        )


def materialize(
    module: nn.Module, spec: ModelSpec, *, prefix: str, seed: int, device: torch.device | str
) -> None:
    """Gives the parameters of a module on meta their initial values and moves it to `device`.

    `prefix` is the module's name in the whole model, with its dot. Values are drawn on the CPU from
    (seed, name), so they are the same in every layout and on every device.
    """
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fill_parameter(parameter, prefix + name, spec, seed)
        for part in module.modules():
            if isinstance(part, Rotary):
                part.fill()
    module.to(device)


def fill_parameter(parameter: Tensor, name: str, spec: ModelSpec, seed: int) -> None:
    """Initial values by name: norms 1, biases 0, the rest normal with the spec's initializer_range.

    Projections into the residual stream are scaled by 1 / sqrt(2 * layers) (Radford et al. 2019).
    """
    name = canonical_name(name, spec)
    if name.endswith(".bias"):
        parameter.zero_()
    elif "norm." in name:
        parameter.fill_(1.0)
    else:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        scale = 1 / math.sqrt(2 * spec.layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
        parameter.normal_(0.0, spec.initializer_range * scale, generator=generator)


def canonical_name(name: str, spec: ModelSpec) -> str:
    """The name of a parameter in the whole model. A tied output projection is the token embedding."""
    if spec.tied_embeddings and name == "output.weight":
        return "tok_embeddings.weight"
    return name
