"""Where each of our parameters lies in Hugging Face's tensors: an exact map, row by row.

    ours [rows, ...]  =  pieces, each some consecutive rows of one tensor of theirs

A weight that they store as [inputs, outputs] is meant transposed: its rows are its columns in the file. Of
stacked experts each is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn

from planner.model.feed_forward import Mlp
from planner.model.spec import ModelSpec
from planner.strategy.engines.runtime_support import plain_parts
from runtime.model.huggingface.names import Fused, Names, names_of
from runtime.model.transformer import build_transformer


@dataclass(frozen=True, slots=True)
class Piece:
    """Our rows [first, first + rows) are the rows of `key` from `begin` on; our row `first` alone is the
    whole of `key` where that is one of `stacked` tensors."""

    key: str
    first: int
    begin: int
    rows: int
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Mapped:
    """One of our parameters: its shape, and the pieces that cover its rows in order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class KeyMap:
    """All parameters of a model; `shapes` are those of their tensors as they lie in files, by key."""

    parameters: tuple[Mapped, ...]
    shapes: dict[str, tuple[int, ...]]
    transposed: frozenset[str]


@cache
def key_map(spec: ModelSpec) -> KeyMap:
    """The map of a whole model. Raises InputError for a family whose names are not known."""
    names = names_of(spec)
    model = build_transformer(spec, 0, spec.layers, True, True, seq=1)
    parameters, turned = [], set()
    for name, tensor in _weights(model):
        shape = tuple(tensor.shape)
        pieces = tuple(_pieces(name, shape[0], names, spec))
        if len(shape) > 1 and _is_transposed(pieces[0].key, names):
            turned.add(pieces[0].key)
        parameters.append(Mapped(name, shape, pieces))
    return KeyMap(tuple(parameters), _shapes(parameters, turned), frozenset(turned))


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what is kept beside them: the bias that corrects a router's choice."""
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".correction"))


def _pieces(name: str, rows: int, names: Names, spec: ModelSpec) -> Iterator[Piece]:
    if not name.startswith("layers."):
        module, leaf = name.rsplit(".", 1)
        own = {
            "tok_embeddings": names.embedding,
            "positions": names.positions,
            "norm": names.norm,
            "output": names.head,
        }
        yield Piece(f"{own[module]}.{leaf}", 0, 0, rows)
        return
    _, layer, inner = name.split(".", 2)
    module, leaf = inner.rsplit(".", 1)
    prefix = names.layer.format(layer)
    if module == "mlp.experts":
        for expert in range(rows):
            key = f"{prefix}{names.expert[leaf].format(expert)}.weight"
            yield Piece(key, expert, 0, 1, stacked=True)
        return
    if leaf == "correction":
        yield Piece(f"{prefix}{names.correction}", 0, 0, rows)
        return
    fused = next((fused for fused in names.fused if module in fused.members), None)
    if fused is None:
        yield Piece(f"{prefix}{names.block[module]}.{leaf}", 0, 0, rows)
    else:
        yield from _fused_pieces(fused, module, f"{prefix}{fused.name}.{leaf}", spec, int(layer))


def _fused_pieces(fused: Fused, module: str, key: str, spec: ModelSpec, layer: int) -> Iterator[Piece]:
    """The rows of one member of a fused tensor, group by group."""
    heights = {member: _rows_of(member, spec, layer) for member in fused.members}
    _, mixer, _ = plain_parts(spec.block(layer))
    groups = fused.groups or mixer.kv_heads
    height = sum(heights.values()) // groups
    before = sum(heights[m] for m in fused.members[: fused.members.index(module)]) // groups
    own = heights[module] // groups
    for group in range(groups):
        yield Piece(key, group * own, group * height + before, own)


def _rows_of(member: str, spec: ModelSpec, layer: int) -> int:
    _, mixer, mlp = plain_parts(spec.block(layer))
    if member.startswith("mlp."):
        assert isinstance(mlp, Mlp), (member, mlp)
        return mlp.width
    return mixer.query_width if member == "attention.wq" else mixer.kv_heads * mixer.head_dim


def _is_transposed(key: str, names: Names) -> bool:
    return any(key.endswith(f".{module}.weight") for module in names.transposed)


def _shapes(parameters: list[Mapped], turned: set[str]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the files: all rows of its pieces, by the width of ours."""
    shapes: dict[str, tuple[int, ...]] = {}
    for mapped in parameters:
        for piece in mapped.pieces:
            if piece.stacked:
                shapes[piece.key] = mapped.shape[1:]
                continue
            rows = shapes.get(piece.key, (0,))[-1 if piece.key in turned else 0]
            whole = (rows + piece.rows, *mapped.shape[1:])
            shapes[piece.key] = whole[::-1] if piece.key in turned else whole
    return shapes
