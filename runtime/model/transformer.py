"""A decoder-only language model, or one stage of it.

Layers are keyed by their global index, so a parameter has the same name in every layout. Names are those of
a Llama model; `runtime.model.huggingface` knows what other families call them.

One layer of the model: attention and feed-forward around the residual stream.

Initial values of parameters: a function of the seed and the name, so the same in every layout.

The borders of documents in packed sequences.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner.model import spec as spec_types
from planner.model.arithmetic import Arithmetic
from planner.model.attention import LatentAttention as LatentAttentionSpec
from planner.model.attention import LatentAttention as LatentSpec
from planner.model.attention import Reach
from planner.model.feed_forward import Mlp as MlpSpec
from planner.model.spec import ModelSpec
from planner.strategy.engines.native import plain_parts
from runtime.model.attention import Attention, LatentAttention
from runtime.model.experts import Experts, MixtureOfExperts, Router
from runtime.model.layers import Mlp, Rotary, make_norm
from runtime.model.loss import Head


class Block(nn.Module):
    """One transformer block, x + attention(norm(x)), then x + mlp(norm(x)), with these variations:

    post_norm       x + norm(attention(x)), then x + norm(mlp(x))
    four norms      x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))
    parallel        x + (attention(norm(x)) + mlp(norm(x))), by one norm or two
    residual_scale  what is added is multiplied by it

    `begins` [B, S] says where the document of each token begins, where attention stays within documents.

    `enter` and `leave` are put around the sublayers of a parallel block by tensor parallelism, whose ranks
    then sum both results at once.
    """

    def __init__(self, spec: spec_types.Layer, arithmetic: Arithmetic, norm_eps: float) -> None:
        super().__init__()
        block, mixer, mlp = plain_parts(spec)
        self.parallel, self.residual_scale = block.parallel, arithmetic.residual_scale
        before = not arithmetic.post_norm or block.norms == 4
        after = arithmetic.post_norm or block.norms == 4

        def norm(held: bool) -> nn.Module:
            if not held:
                return nn.Identity()
            return make_norm(block.norm, block.hidden, norm_eps, unit_offset=arithmetic.unit_offset)

        self.attention_norm = norm(before)
        self.attention: nn.Module = (
            LatentAttention(block.hidden, mixer, arithmetic, norm_eps)
            if isinstance(mixer, LatentSpec)
            else Attention(block.hidden, mixer, arithmetic, norm_eps)
        )
        self.attention_out_norm = norm(after)
        self.mlp_norm = norm(before) if block.norms > 1 else None
        self.mlp: Mlp | MixtureOfExperts = (
            Mlp(block.hidden, mlp) if isinstance(mlp, MlpSpec) else MixtureOfExperts(block.hidden, mlp)
        )
        self.mlp_out_norm = norm(after)
        self.enter: Callable[[Tensor], Tensor] = _unchanged
        self.leave: Callable[[Tensor], Tensor] = _unchanged

    @property
    def joins(self) -> bool:
        """Whether both sublayers' results are summed before anything else is done with them."""
        plain = isinstance(self.attention_out_norm, nn.Identity) and isinstance(self.mlp, Mlp)
        return self.parallel and plain

    def forward(
        self, x_bsh: Tensor, cos: Tensor | None, sin: Tensor | None, begins: Tensor | None = None
    ) -> Tensor:
        normed = self.attention_norm(x_bsh)
        if self.parallel:
            return x_bsh + self._side_by_side(x_bsh, normed, cos, sin, begins)
        mixed = self.attention_out_norm(self.attention(normed, cos, sin, begins=begins))
        middle = x_bsh + self._scaled(mixed)
        if self.mlp_norm is not None:
            normed = self.mlp_norm(middle)
        fed = self.mlp_out_norm(self.mlp(normed))
        out: Tensor = middle + self._scaled(fed)
        return out

    def _side_by_side(
        self, x_bsh: Tensor, normed: Tensor, cos: Tensor | None, sin: Tensor | None, begins: Tensor | None
    ) -> Tensor:
        """What both sublayers of a parallel block add."""
        read = self.enter(normed)
        other = read if self.mlp_norm is None else self.enter(self.mlp_norm(x_bsh))
        mixed = self.attention_out_norm(self.attention(read, cos, sin, begins=begins))
        fed = self.mlp_out_norm(self.mlp(other))
        return self.leave(self._scaled(mixed) + self._scaled(fed))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale


def _unchanged(x: Tensor) -> Tensor:
    return x


RESIDUAL_OUTPUTS = (
    "attention.wo.weight",
    "mlp.down.weight",
    "mlp.shared.down.weight",
    "mlp.experts.down",
)
"""Projections that write into the residual stream; their initial scale shrinks with depth (GPT-2 paper)."""


def materialize(
    module: nn.Module, spec: ModelSpec, *, prefix: str, seed: int, device: torch.device | str
) -> None:
    """Gives the parameters of a module on meta their initial values and moves it to `device`.

    `prefix` is the module's name in the whole model, with its dot. Values are drawn on the CPU from
    (seed, name), so they are the same in every layout and on every device.
    """
    module.to_empty(device="cpu")
    with torch.no_grad():
        for path, part in module.named_modules(prefix=prefix.removesuffix(".")):
            for name, parameter in part.named_parameters(prefix=path, recurse=False):
                if isinstance(part, Experts):
                    fill_experts(parameter, part.first, name, spec, seed)
                else:
                    fill_parameter(parameter, name, spec, seed)
            if isinstance(part, Rotary | Router):
                part.fill()
    if torch.device(device).type != "cpu":
        module.to(device)


def fill_parameter(parameter: Tensor, name: str, spec: ModelSpec, seed: int) -> None:
    """Initial values by name: norms 1 (0 where they add 1), biases 0, the rest normal with the spec's
    initializer_range. Projections into the residual stream are scaled by 1 / sqrt(2 * layers) (Radford et
    al. 2019).
    """
    name = canonical_name(name, spec)
    if name.endswith("bias"):
        parameter.zero_()
    elif "norm." in name:
        parameter.fill_(0.0 if spec.arithmetic.unit_offset else 1.0)
    else:
        _draw(parameter, name, name, spec, seed)


def fill_experts(parameter: Tensor, first: int, name: str, spec: ModelSpec, seed: int) -> None:
    """As `fill_parameter`, for stacked weights: each expert by its number, so that no rank draws others."""
    for index, expert in enumerate(parameter):
        if name.endswith("bias"):
            expert.zero_()
        else:
            _draw(expert, name, f"{name}:{first + index}", spec, seed)


def _draw(values: Tensor, name: str, stream: str, spec: ModelSpec, seed: int) -> None:
    generator = _generator(stream, seed)
    scale = 1 / math.sqrt(2 * spec.layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    values.normal_(0.0, spec.initializer_range * scale, generator=generator)


def canonical_name(name: str, spec: ModelSpec) -> str:
    """The name of a parameter in the whole model. A tied output projection is the token embedding."""
    if spec.tied_embeddings and name == "output.weight":
        return "tok_embeddings.weight"
    return name


def drawn(name: str, shape: tuple[int, ...], *, scale: float, seed: int) -> Tensor:
    """Normal values with standard deviation `scale`, by (seed, name), on the CPU."""
    return torch.empty(shape).normal_(0.0, scale, generator=_generator(name, seed))


def _generator(stream: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True, slots=True, eq=False)
class Borders:
    """Of each token of packed sequences the place in its sequence at which its document begins.

    `begins` [B, S] stays in host memory, where attention reads it without waiting for the device. It is
    handed to a stage in this object, since FSDP moves the tensors that a root is called with.
    """

    begins: Tensor

    def chunk(self, parts: int) -> list[Borders]:
        """Those of each micro-batch."""
        return [Borders(part) for part in self.begins.chunk(parts)]


class Transformer(nn.Module):
    """A decoder-only language model, or the blocks [first, end) of it with the ends that belong to them.

    The input is tokens [B, S] where the embedding is held, else hidden states [B, S, H]; the output is
    hidden states, or where the head is held the mean loss of the targets given, else logits [B, S, V].
    Parts that are not held are None. Where ranks share out the sequence, `position_ids` are those of this
    rank's hidden states; None: all, in order.

    With `borders`, each document is read as if it stood alone: attention stays within it, and learned
    positions begin anew. Rotary tables do not: scores depend on the distance of two tokens alone.
    """

    def __init__(
        self, spec: ModelSpec, first: int, end: int, *, with_embedding: bool, with_head: bool, seq: int
    ) -> None:
        super().__init__()
        self.spec = spec
        hidden, vocab, arithmetic = spec.hidden, spec.vocab, spec.arithmetic
        self.arithmetic = arithmetic
        learned = spec.learned_positions if with_embedding else 0
        self.tied = spec.tied_embeddings and with_embedding and with_head
        self.position_ids: Tensor | None = None
        self.offload: Any = None  # an ActivationOffload (runtime.parallel) where activations are offloaded
        self.tok_embeddings = nn.Embedding(vocab, hidden) if with_embedding else None
        self.positions = nn.Embedding(learned, hidden) if learned else None
        self.rotary = _rotary(spec, seq) if spec.learned_positions == 0 else None
        own = arithmetic.window_rope_theta
        self.window_rotary = Rotary(seq, _rope_dims(spec), own) if own is not None else None
        self.layers = nn.ModuleDict(
            {str(i): Block(spec.block(i), arithmetic, spec.norm_eps) for i in range(first, end)}
        )
        self.tables = {str(i): _table_of(spec, i) for i in range(first, end)}
        offset = arithmetic.unit_offset
        self.norm = make_norm(spec.norm, hidden, spec.norm_eps, unit_offset=offset) if with_head else None
        self.output = (
            Head(hidden, vocab, bias=spec.head_bias, cap=arithmetic.logit_cap) if with_head else None
        )
        self.tie()

    def tie(self) -> None:
        """Makes the output projection share the embedding's weight, where the spec ties them."""
        if self.tied and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight

    tied_name = "tok_embeddings.weight"
    """The global name of the weight that embedding and head share where the model ties them."""

    def global_name(self, name: str) -> str:
        """The name in the whole model of a parameter of this stage."""
        return canonical_name(name, self.spec)

    def materialize(self, name: str, part: nn.Module, *, seed: int, device: torch.device | str) -> None:
        """Gives a part on meta its initial values and moves it to `device`."""
        materialize(part, self.spec, prefix=f"{name}.", seed=seed, device=device)

    def units(self) -> Iterator[list[tuple[str, nn.Module]]]:
        """The embedding, each block, the head: lists of named modules, every parameter in exactly one."""
        blocks = [(f"layers.{index}",) for index in self.layers]
        for names in (
            ("tok_embeddings", "positions", "rotary", "window_rotary"),
            *blocks,
            ("norm", "output"),
        ):
            held = [name for name in names if name in self._modules or name.startswith("layers.")]
            if held:
                yield [(name, self.get_submodule(name)) for name in held]

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The named modules that make up the model, in order."""
        for unit in self.units():
            yield from unit

    def forward(self, x: Tensor, targets_bs: Tensor | None = None, borders: Borders | None = None) -> Tensor:
        scale = self.arithmetic.embedding_scale
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
            x = x if scale == 1.0 else x * scale
            if self.positions is not None:
                x = x + self.positions(self._positions_of(x, borders))
        within = () if borders is None else (borders.begins,)
        for index, layer in self.layers.items():
            x = layer(x, *self._table(index), *within)
        if self.norm is not None and self.output is not None:
            x = self.output(self._scaled(self.norm(x)), targets_bs)
        return x

    def _table(self, index: str) -> tuple[Tensor | None, Tensor | None]:
        """Cosines and sines of a layer; None where it does not turn queries and keys."""
        name = self.tables[index]
        table = getattr(self, name) if name else None
        return (None, None) if table is None else (table.cos, table.sin)

    def _scaled(self, x: Tensor) -> Tensor:
        """What the head reads, times the scale of logits: the same as scaling these."""
        scale = self.arithmetic.logit_scale
        return x if scale == 1.0 else x * scale

    def _positions_of(self, x_bsh: Tensor, borders: Borders | None) -> Tensor:
        """Positions [1 or B, S] of the hidden states that this rank holds; within documents with borders."""
        if self.position_ids is None:
            held = torch.arange(x_bsh.shape[1], device=x_bsh.device)
        else:
            held = self.position_ids
        if borders is not None:
            held = held - borders.begins.to(held.device)[:, held]
        return held.view(-1, x_bsh.shape[1]) + self.arithmetic.position_offset


def _rope_dims(spec: ModelSpec) -> int:
    """Dimensions of a head that rotary positions turn."""
    _, mixer, _ = plain_parts(spec.block(0))
    if isinstance(mixer, LatentAttentionSpec):
        return mixer.rope_dim
    return spec.arithmetic.rope_dims or mixer.head_dim


def _rotary(spec: ModelSpec, seq: int) -> Rotary:
    return Rotary(seq, _rope_dims(spec), spec.rope_theta, spec.arithmetic.rope_scaling)


def _table_of(spec: ModelSpec, layer: int) -> str:
    """The name of the rotary table that a layer turns queries and keys by; empty for none."""
    if spec.learned_positions or layer in spec.arithmetic.unrotated_layers:
        return ""
    _, mixer, _ = plain_parts(spec.block(layer))
    windowed = mixer.span.reach is Reach.WINDOW and spec.arithmetic.window_rope_theta is not None
    return "window_rotary" if windowed else "rotary"


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
