"""A decoder-only language model, or one stage of it.

Layers are keyed by their global index, so a parameter has the same name in every layout. Names are those of
a Llama model; a GPT-2 differs by LayerNorm, biases, a learned position table and tied embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from planner.execution import plain_parts
from planner.model import ModelSpec
from runtime.transformer.block import Block, norm
from runtime.transformer.head import Head
from runtime.transformer.rotary import Rotary

if TYPE_CHECKING:
    from runtime.offload.activations import ActivationOffload


class Transformer(nn.Module):
    """A decoder-only language model, or the blocks [first, end) of it with the ends that belong to them.

    The input is tokens [B, S] where the embedding is held, else hidden states [B, S, H]; the output is
    hidden states, or where the head is held the mean loss of the targets given, else logits [B, S, V].
    Parts that are not held are None. Where ranks share out the sequence, `position_ids` are those of this
    rank's hidden states; None: all, in order.
    """

    def __init__(
        self, spec: ModelSpec, first: int, end: int, *, with_embedding: bool, with_head: bool, seq: int
    ) -> None:
        super().__init__()
        hidden, vocab = spec.hidden, spec.vocab
        learned = spec.learned_positions if with_embedding else 0
        self.tied = spec.tied_embeddings and with_embedding and with_head
        self.position_ids: Tensor | None = None
        self.offload: ActivationOffload | None = None
        self.tok_embeddings = nn.Embedding(vocab, hidden) if with_embedding else None
        self.positions = nn.Embedding(learned, hidden) if learned else None
        self.rotary = (
            None
            if spec.learned_positions
            else Rotary(seq, plain_parts(spec.block(0))[1].head_dim, spec.rope_theta)
        )
        self.layers = nn.ModuleDict({str(i): Block(spec.block(i), spec.norm_eps) for i in range(first, end)})
        self.norm = norm(spec.norm, hidden, spec.norm_eps) if with_head else None
        self.output = Head(hidden, vocab) if with_head else None
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

    def forward(self, x: Tensor, targets_bs: Tensor | None = None) -> Tensor:
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
            if self.positions is not None:
                x = x + self.positions(self._positions_of(x))
        cos, sin = (self.rotary.cos, self.rotary.sin) if self.rotary is not None else (None, None)
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        if self.norm is not None and self.output is not None:
            x = self.output(self.norm(x), targets_bs)
        return x

    def _positions_of(self, x_bsh: Tensor) -> Tensor:
        """Positions [1, S] of the hidden states that this rank holds."""
        if self.position_ids is not None:
            return self.position_ids[None]
        return torch.arange(x_bsh.shape[1], device=x_bsh.device)[None]


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
