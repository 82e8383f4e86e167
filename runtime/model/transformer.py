"""A decoder-only language model, or one stage of it.

Layers are keyed by their global index, so a parameter has the same name in every layout. Names are those of
a Llama model; `runtime.model.huggingface` knows what other families call them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from planner.model.attention import LatentAttention, Reach
from planner.model.spec import ModelSpec
from planner.strategy.engines.runtime_support import plain_parts
from runtime.model.block import Block
from runtime.model.borders import Borders
from runtime.model.head import Head
from runtime.model.initial import canonical_name, materialize
from runtime.model.norms import make_norm
from runtime.model.rotary import Rotary


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
    if isinstance(mixer, LatentAttention):
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
