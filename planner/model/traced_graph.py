"""OperatorGraph: what one forward pass of a module computes, operator by operator, as tracing saw it.

It is plain data: the runtime writes it, the planner linearises it. Values are tensors with storage of
their own; views are not operators, and a write in place makes a new value. Parameters and buffers are not
values: every stage has its own.

Repetition: the runs of equal neighbours in a sequence of keys, such as the blocks of a model.

Models as networkx graphs, made into a chain: layers of a ModelSpec, operators of a traced module.

A pipeline needs a chain. Where a graph branches, the chain is its topological order, cut where few values
cross: at a cut vertex the one residual stream, behind an encoder its result as well, which later layers
read. What crosses a cut is the message between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from planner.foundation.frozen import frozen
from planner.model.spec import Block
from planner.model.traced_layer import MatrixProduct

if TYPE_CHECKING:
    from planner.model.spec import ModelSpec


@frozen
class Value:
    """A tensor of `size` values of the compute precision, of one sample.

    `differentiable` tells apart float inputs, and results of parameters and of other such values, from
    masks and indices, which any stage computes again from the inputs.
    """

    size: float
    differentiable: bool
    is_input: bool = False


@frozen
class ParameterTensor:
    """One parameter tensor; a tied one has several names and is still one tensor."""

    name: str
    count: int


@frozen
class Operator:
    """One operator call. Operands are indices into the graph's values and parameters.

    `signature` holds the operator's name, its constants and the shapes of its operands: two calls of the
    same signature cost the same. `scope` is the path of the innermost module that called it. `saves` are
    the values that autograd keeps for it.
    """

    signature: str
    scope: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    parameters: tuple[int, ...] = ()
    saves: tuple[int, ...] = ()
    products: tuple[MatrixProduct, ...] = ()
    core_flops: float = 0.0
    moved_values: float = 0.0


@frozen
class OperatorGraph:
    """The operators of a forward pass in the order in which they ran.

    All figures are of one sample: those of the batch that was traced, divided. `tokens` is what a sample
    stands for in the workload's sequence. `unused` are parameters that the forward pass does not meet, each
    with the operator whose module holds it.
    """

    tokens: int
    operators: tuple[Operator, ...]
    values: tuple[Value, ...]
    parameters: tuple[ParameterTensor, ...]
    unused: tuple[tuple[int, int], ...] = ()


MOST_PERIOD = 512
"""Longest period that is looked for, so that a sequence of tens of thousands of keys takes seconds."""

Usable = Callable[[int, int], bool]
Misfit = Callable[[int, int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`count` repetitions of `period` neighbours, from index `first` on."""

    first: int
    period: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.period * self.count


def _anything(first: int, end: int) -> bool:
    return True


def _nowhere(first: int, period: int) -> float:
    return 0.0


def longest_run(
    keys: Sequence[str],
    first: int,
    end: int,
    *,
    usable: Usable = _anything,
    misfit: Misfit = _nowhere,
) -> Run | None:
    """The repetition within [first, end) that covers most, or None where nothing repeats.

    Of equal coverage, the shortest period counts, then the phase with the least `misfit(first, period)`.
    `usable(first, end)` says whether a period may be repeated at all.
    """
    best: tuple[int, int, float, int] | None = None
    found: Run | None = None
    for period in range(1, min((end - first) // 2, MOST_PERIOD) + 1):
        for start, length in _stretches(keys, first, end, period):
            count = 1 + length // period
            for phase in range(start, start + length % period + 1):
                rank = (-count * period, period, misfit(phase, period), phase)
                if (best is None or rank < best) and usable(phase, phase + period):
                    best, found = rank, Run(first=phase, period=period, count=count)
    return found


def _stretches(keys: Sequence[str], first: int, end: int, period: int) -> list[tuple[int, int]]:
    """(start, length) of the stretches, at least a period long, whose keys recur `period` later."""
    stretches, length = [], 0
    for index in range(first, end - period + 1):
        if index < end - period and keys[index] == keys[index + period]:
            length += 1
            continue
        if length >= period:
            stretches.append((index - length, length))
        length = 0
    return stretches


def runs(
    keys: Sequence[str],
    *,
    usable: Usable = _anything,
    misfit: Misfit = _nowhere,
) -> list[Run]:
    """The sequence as runs in order, each as long as can be; what does not repeat has count 1.

    A period that itself repeats something more often than it is repeated is taken apart: of four times
    (five local layers, one global) come local x 5, global x 1, and so on.
    """

    def split(first: int, end: int) -> list[Run]:
        if first == end:
            return []
        run = longest_run(keys, first, end, usable=usable, misfit=misfit)
        if run is None:
            return [Run(first=index, period=1, count=1) for index in range(first, end)]
        inner = longest_run(keys, run.first, run.first + run.period, usable=usable)
        if inner is not None and inner.count > run.count:
            bounds = range(run.first, run.end, run.period)
            middle = [part for begin in bounds for part in split(begin, begin + run.period)]
        else:
            middle = [run]
        return [*split(first, run.first), *middle, *split(run.end, end)]

    return split(0, len(keys))


SMALL_VALUES = 256
"""A value of at most so many values, and below a SMALL_SHARE of what it crosses a cut with, does not hinder
the cut: sums of auxiliary losses, scores of routers."""

SMALL_SHARE = 1 / 16

MOST_CARRIED = 2
"""Values that may travel along with the stream: an encoder's result, a table of relative positions."""

MOST_LIVE = 256
"""Where more values are live, there is no cut: as within a loop over time steps whose results are joined."""


# Layers of a ModelSpec
def layer_network(model: ModelSpec) -> Any:
    """The layers as a networkx DiGraph: an edge for the stream, and from the encoder to cross-attention.

    Nodes are layer indices with their `block`. The decoder's first layer reads token embeddings, which its
    own stage looks up, and the encoder's result.
    """
    import networkx

    network: Any = networkx.DiGraph(name=model.name)
    last = model.encoder_layers - 1
    for index, block in enumerate(model.blocks()):
        network.add_node(index, block=block)
        if index and index != model.encoder_layers:
            network.add_edge(index - 1, index)
        if last >= 0 and index > last and isinstance(block, Block) and block.cross is not None:
            network.add_edge(last, index)
    return network


def boundary_values(model: ModelSpec) -> tuple[int, ...]:
    """Values a token that cross each of the boundaries between neighbouring layers, layers - 1 of them.

    Of a chain, the stream of the layer before. Where the graph branches, the streams of all layers before
    the boundary that a layer behind it reads, each once.
    """
    blocks = list(model.blocks())
    if not model.encoder_layers:
        return tuple(block.stream_width for block in blocks[:-1])
    import networkx

    network = layer_network(model)
    order = list(networkx.lexicographical_topological_sort(network))
    place = {layer: index for index, layer in enumerate(order)}
    until = [max((place[reader] for reader in network[layer]), default=place[layer]) for layer in order]
    return tuple(
        sum(blocks[order[i]].stream_width for i in range(bound) if until[i] >= bound)
        for bound in range(1, len(order))
    )


# Operators of a traced module
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The operators [first, end) of the linear order, between two cuts."""

    first: int
    end: int


class Chain:
    """The linear order of a traced graph's operators, and what is live before each of them."""

    def __init__(self, graph: OperatorGraph) -> None:
        import networkx

        self.graph = graph
        self.network = operator_network(graph)
        self.order: list[int] = list(networkx.lexicographical_topological_sort(self.network))
        self.lives = _lives(graph, self.order)
        self.live = _live_values(self.lives, len(self.order))
        self.has_product = [bool(graph.operators[index].products) for index in self.order]

    def crossing(self, cut: int) -> frozenset[int]:
        """The values that operators before place `cut` made and later ones read; only for real cuts."""
        live = self.live[cut]
        assert live is not None
        return live

    def crossing_values(self, cut: int) -> float:
        """Their size, of one sample."""
        return sum((self.graph.values[value].size for value in self.crossing(cut)), 0.0)

    def input_values(self, piece: Piece) -> float:
        """Size of what a piece begins with: what crosses into it, and inputs of the model that it reads."""
        places = self.order[piece.first : piece.end]
        reads = {v for index in places for v in self.graph.operators[index].reads}
        own = (self.graph.values[v] for v in reads)
        return self.crossing_values(piece.first) + sum(value.size for value in own if value.is_input)

    def is_cut(self, cut: int, carried: frozenset[int] = frozenset()) -> bool:
        """Whether one value at most crosses here, besides those that are carried and small ones."""
        live = self.live[cut]
        if live is None:
            return False
        sizes = sorted(self.graph.values[value].size for value in live - carried)
        hindering = [s for s in sizes if s > SMALL_VALUES or s > SMALL_SHARE * sizes[-1]]
        return len(hindering) <= 1

    def computes(self, piece: Piece) -> bool:
        """Whether a piece holds a matrix product."""
        return any(self.has_product[piece.first : piece.end])

    def depth(self, cut: int) -> int:
        """How deep in the module tree a cut lies: the modules that hold operators of both its sides."""
        if cut in (0, len(self.order)):
            return 0
        before, after = (self.graph.operators[self.order[i]].scope.split(".") for i in (cut - 1, cut))
        shared = 0
        while shared < min(len(before), len(after)) and before[shared] == after[shared]:
            shared += 1
        return shared

    def key(self, piece: Piece) -> str:
        """A text that is equal for pieces of equal structure: operators, shapes, and how they connect.

        Values are numbered as they are met, so names and places do not matter.
        """
        numbers: dict[int, int] = {}
        tensors: dict[int, int] = {}
        lines = []
        for place in range(piece.first, piece.end):
            operator = self.graph.operators[self.order[place]]
            reads = [numbers.setdefault(v, len(numbers)) for v in operator.reads]
            writes = [numbers.setdefault(v, len(numbers)) for v in operator.writes]
            held = [tensors.setdefault(p, len(tensors)) for p in operator.parameters]
            lines.append(f"{operator.signature}{reads}{writes}{held}")
        return "\n".join(lines)


def operator_network(graph: OperatorGraph) -> Any:
    """The operators as a networkx DiGraph: an edge from the maker of a value to each of its readers."""
    import networkx

    network: Any = networkx.DiGraph()
    network.add_nodes_from(range(len(graph.operators)))
    maker: dict[int, int] = {}
    for index, operator in enumerate(graph.operators):
        network.add_edges_from(
            (maker[v], index, {"values": graph.values[v].size}) for v in operator.reads if v in maker
        )
        maker |= dict.fromkeys(operator.writes, index)
    return network


def _lives(graph: OperatorGraph, order: list[int]) -> dict[int, tuple[int, int]]:
    """Of every differentiable value that is read, the places where it is made and where it is last read."""
    made: dict[int, int] = {}
    lives: dict[int, tuple[int, int]] = {}
    for place, index in enumerate(order):
        operator = graph.operators[index]
        lives |= {value: (made[value], place) for value in operator.reads if value in made}
        made |= {value: place for value in operator.writes if graph.values[value].differentiable}
    return lives


def _live_values(lives: dict[int, tuple[int, int]], places: int) -> list[frozenset[int] | None]:
    """For every place, the values made before it and read at or behind it; None for more than MOST_LIVE."""
    born: dict[int, list[int]] = {}
    dying: dict[int, list[int]] = {}
    for value, (first, last) in lives.items():
        born.setdefault(first, []).append(value)
        dying.setdefault(last, []).append(value)
    live: set[int] = set()
    before: list[frozenset[int] | None] = []
    for place in range(places + 1):
        before.append(frozenset(live) if len(live) <= MOST_LIVE else None)
        live.update(born.get(place, ()))
        live.difference_update(dying.get(place, ()))
    return before


def pieces(chain: Chain) -> list[Piece]:
    """The finest pieces between cuts: single operators, sublayers with their residual connection.

    A piece that hides a repetition behind a value that all of it reads, as a decoder does that reads an
    encoder's result, is cut further, with this value carried.
    """
    return list(_cut(chain, Piece(first=0, end=len(chain.order)), frozenset()))


def _cut(chain: Chain, whole: Piece, carried: frozenset[int]) -> Iterator[Piece]:
    found = _between_cuts(chain, whole, carried)
    for run in runs([chain.key(piece) for piece in found]):
        own = found[run.first : run.end]
        if run.count > 1 or len(carried) == MOST_CARRIED:
            yield from own
            continue
        for piece in own:
            more = _carrying(chain, piece, carried)
            yield from [piece] if more is None else _cut(chain, piece, more)


def _between_cuts(chain: Chain, whole: Piece, carried: frozenset[int]) -> list[Piece]:
    inner = [cut for cut in range(whole.first + 1, whole.end) if chain.is_cut(cut, carried)]
    bounds = [whole.first, *inner, whole.end]
    return [Piece(first=a, end=b) for a, b in pairwise(bounds)]


def _carrying(chain: Chain, piece: Piece, carried: frozenset[int]) -> frozenset[int] | None:
    """What must be carried through a piece for a repetition to show, or None. Longest-lived values first."""
    if sum(chain.has_product[piece.first : piece.end]) < 2:
        return None
    spans = {
        value: min(last, piece.end - 1) - max(first, piece.first)
        for value, (first, last) in chain.lives.items()
        if value not in carried
    }
    longest = sorted(spans, key=lambda value: (-spans[value], value))[: MOST_CARRIED - len(carried)]
    for value in longest:
        carried |= {value}
        found = _between_cuts(chain, piece, carried)
        repeated = (run for run in runs([chain.key(part) for part in found]) if run.count > 1)
        if any(chain.computes(part) for run in repeated for part in found[run.first : run.end]):
            return carried
    return None
