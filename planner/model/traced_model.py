"""From a traced graph to a ModelSpec: pieces, the blocks they repeat, and what each layer class costs.

The file of a traced model: what `plan trace` writes, and `--model` reads.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from planner.foundation.decode import decode, load_json_object, to_json, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec, Norm, Segment
from planner.model.traced_graph import Chain, OperatorGraph, Piece, Run, pieces, runs
from planner.model.traced_layer import MatrixProduct, TracedLayer


def traced_model(graph: OperatorGraph, *, name: str, sources: tuple[str, ...] = ()) -> ModelSpec:
    """The model of a traced module: its layers in order, without an embedding or head of ours."""
    segments = _segments(_layers(graph))
    widest = max(segments, key=lambda s: s.count).block
    return ModelSpec(
        name=name,
        model_type="traced",
        hidden=widest.stream_width,
        vocab=0,
        max_positions=graph.tokens,
        learned_positions=0,
        rope_theta=0.0,
        norm=Norm.LAYERNORM_WITHOUT_PARAMETERS,
        norm_eps=0.0,
        initializer_range=0.0,
        tied_embeddings=False,
        segments=segments,
        sources=sources,
        final_norms=0,
    )


def _segments(layers: Sequence[TracedLayer]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for layer in layers:
        if segments and segments[-1].block == layer:
            segments[-1] = Segment(block=layer, count=segments[-1].count + 1)
        else:
            segments.append(Segment(block=layer, count=1))
    return tuple(segments)


def _layers(graph: OperatorGraph) -> list[TracedLayer]:
    """One TracedLayer for every layer in order; equal structure makes equal layers.

    Where members of a class differ in what they keep, as the first of several readers of one tensor does,
    the class has their mean, so that the sum over the model stays exact; of messages it has the largest.
    """
    chain = Chain(graph)
    layers = layer_pieces(chain)
    held = _held_parameters(chain, layers)
    saved = _saved_values(chain, layers)
    keys = [
        hashlib.sha256(f"{chain.key(piece)}|{held[i]}".encode()).hexdigest()[:16]
        for i, piece in enumerate(layers)
    ]
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    known = {
        key: _layer(chain, layers, same, key=key, held=held[same[0]], saved=saved)
        for key, same in members.items()
    }
    return [known[key] for key in keys]


def _layer(
    chain: Chain,
    layers: list[Piece],
    same: list[int],
    *,
    key: str,
    held: tuple[int, int, int],
    saved: list[float],
) -> TracedLayer:
    graph, piece = chain.graph, layers[same[0]]
    operators = [graph.operators[chain.order[place]] for place in range(piece.first, piece.end)]
    counts = Counter[tuple[float, float, float]]()
    for product in (p for operator in operators for p in operator.products):
        counts[product.m, product.n, product.k] += product.count
    params, tensors, shared = held
    return TracedLayer(
        key=f"traced-{key}",
        tokens=graph.tokens,
        params=params,
        tensors=tensors,
        products=tuple(MatrixProduct(m=m, n=n, k=k, count=count) for (m, n, k), count in counts.items()),
        core_flops=sum((operator.core_flops for operator in operators), 0.0),
        moved_values=sum((operator.moved_values for operator in operators), 0.0),
        saved_values=sum(saved[index] for index in same) / len(same),
        input_values=max(chain.input_values(layers[i]) for i in same),
        message_values=max(chain.crossing_values(layers[i].end) for i in same),
        shared_params=shared,
        operators=len(operators),
    )


# Pieces to layers
def layer_pieces(chain: Chain) -> list[Piece]:
    """The layers: periods of repeated pieces, and the pieces between them, joined until they compute."""
    finest = pieces(chain)

    def usable(first: int, end: int) -> bool:
        return any(chain.computes(piece) for piece in finest[first:end])

    def misfit(first: int, period: int) -> float:
        return chain.depth(finest[first].first) + chain.depth(finest[first + period - 1].end)

    layers: list[Piece] = []
    between: list[Piece] = []
    for run in runs([chain.key(piece) for piece in finest], usable=usable, misfit=misfit):
        if run.count == 1:
            between += finest[run.first : run.end]
            continue
        layers += [*_joined(chain, between), *_periods(finest, run)]
        between = []
    return layers + _joined(chain, between)


def _periods(finest: list[Piece], run: Run) -> list[Piece]:
    starts = range(run.first, run.end, run.period)
    return [Piece(first=finest[i].first, end=finest[i + run.period - 1].end) for i in starts]


def _joined(chain: Chain, between: list[Piece]) -> list[Piece]:
    """Neighbours joined so that each holds a matrix product; what is left joins the last one."""
    joined: list[Piece] = []
    open_piece: Piece | None = None
    for piece in between:
        open_piece = Piece(first=open_piece.first if open_piece else piece.first, end=piece.end)
        if chain.computes(piece):
            joined.append(open_piece)
            open_piece = None
    if open_piece is None:
        return joined
    if joined:
        return [*joined[:-1], Piece(first=joined[-1].first, end=open_piece.end)]
    return [open_piece]


def _held_parameters(chain: Chain, layers: list[Piece]) -> list[tuple[int, int, int]]:
    """Of each layer: parameters and tensors that it holds, and parameters that an earlier layer holds."""
    graph = chain.graph
    owner: dict[int, int] = {}
    unused: dict[int, list[int]] = {}
    for parameter, operator in graph.unused:
        unused.setdefault(operator, []).append(parameter)
    held = []
    for index, piece in enumerate(layers):
        places = chain.order[piece.first : piece.end]
        used = {p for place in places for p in graph.operators[place].parameters}
        used |= {p for place in places for p in unused.get(place, ())}
        for parameter in used:
            owner.setdefault(parameter, index)
        own = [graph.parameters[p].count for p in used if owner[p] == index]
        shared = sum(graph.parameters[p].count for p in used if owner[p] != index)
        held.append((sum(own), len(own), shared))
    return held


def _saved_values(chain: Chain, layers: list[Piece]) -> list[float]:
    """Values that each layer keeps for the backward pass; every tensor counts once in the model.

    A tensor that several layers keep counts where it arrives first, so that a layer's figure includes its
    input and not its output.
    """
    graph = chain.graph
    maker: dict[int, int] = {}
    keeper: dict[int, int] = {}
    for index, piece in enumerate(layers):
        for place in chain.order[piece.first : piece.end]:
            operator = graph.operators[place]
            maker |= dict.fromkeys(operator.writes, index)
            for value in operator.saves:
                kept_by = keeper.setdefault(value, index)
                if kept_by == maker.get(value, -1):
                    keeper[value] = index
    saved = [0.0] * len(layers)
    for value, index in keeper.items():
        saved[index] += graph.values[value].size
    return saved


KEY = "traced_model"
MOST_LAYERS = 100_000
MOST_BYTES = 8 * 1024 * 1024
"""A traced model has as many entries as it has layer classes: a hundred classes are a few hundred KiB."""


@frozen
class TracedFile:
    """The document: a version and the model."""

    traced_model: ModelSpec
    schema_version: int = 1


def write_traced_model(model: ModelSpec, path: Path) -> None:
    """Writes a traced model, whole or not at all."""
    write_atomic(path, to_json(TracedFile(traced_model=model)))


def read_traced_model(path: Path) -> ModelSpec | None:
    """The traced model in a JSON file; None where the file holds something else, such as a config.json.

    Raises InputError with every fault of a file that says that it is one.
    """
    table = load_json_object(path, MOST_BYTES)
    if KEY not in table:
        return None
    document = decode(TracedFile, table, source=str(path))
    problems = [Problem(where=f"{path}: {where}", fault=fault) for where, fault in _faults(document)]
    if problems:
        raise InputError(*problems)
    return document.traced_model


def _faults(document: TracedFile) -> Iterator[tuple[str, str]]:
    model = document.traced_model
    if document.schema_version != 1:
        yield "schema_version", f"{document.schema_version} is not known; this version reads 1."
    if model.vocab or model.learned_positions:
        yield KEY, "has an embedding of ours, which a traced model has not."
    if not model.segments:
        yield f"{KEY}.segments", "is empty: a model has layers."
    for index, segment in enumerate(model.segments):
        where = f"{KEY}.segments.{index}"
        if not 1 <= segment.count <= MOST_LAYERS:
            yield f"{where}.count", f"{segment.count} is not between 1 and {MOST_LAYERS} layers."
        if not isinstance(segment.block, TracedLayer):
            yield f"{where}.block", "is no traced layer."
            continue
        yield from ((f"{where}.block.{name}", fault) for name, fault in _layer_faults(segment.block))
        if segment.block.tokens != model.max_positions:
            yield (
                f"{where}.block.tokens",
                f"{segment.block.tokens} differs from the model's {model.max_positions}.",
            )


def _layer_faults(layer: TracedLayer) -> Iterator[tuple[str, str]]:
    if layer.tokens < 1:
        yield "tokens", f"{layer.tokens} is not a number of tokens."
    figures = ("params", "tensors", "core_flops", "moved_values", "saved_values", "input_values")
    for name in (*figures, "message_values", "shared_params", "operators"):
        if getattr(layer, name) < 0:
            yield name, f"{getattr(layer, name)} is negative."
    for index, product in enumerate(layer.products):
        if min(product.m, product.n, product.k, product.count) <= 0:
            yield f"products.{index}", "has a dimension or count that is not positive."
