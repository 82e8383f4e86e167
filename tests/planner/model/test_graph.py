"""Graphs made into chains: repetition, cuts of operator graphs written by hand, boundaries of layers."""

from __future__ import annotations

import random

import pytest

from planner.model.attention import CAUSAL, Attention, AttentionSpan, Reach
from planner.model.feed_forward import Activation, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.traced_graph import (
    Chain,
    Operator,
    OperatorGraph,
    ParameterTensor,
    Piece,
    Run,
    Value,
    boundary_values,
    layer_network,
    pieces,
    runs,
)
from planner.model.traced_layer import MatrixProduct, TracedLayer
from planner.model.traced_model import layer_pieces, traced_model

# Repetition


def cover(keys: str) -> list[tuple[str, int]]:
    return [(keys[run.first : run.first + run.period], run.count) for run in runs(keys)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", []),
        ("a", [("a", 1)]),
        ("aaaa", [("a", 4)]),
        ("eababababh", [("e", 1), ("ab", 4), ("h", 1)]),
        ("saaatbbb", [("s", 1), ("a", 3), ("t", 1), ("b", 3)]),
        ("llllgllllg", [("l", 4), ("g", 1), ("l", 4), ("g", 1)]),  # within, something repeats more often
        ("abbabbabbabb", [("abb", 4)]),
        ("abcabd", [(key, 1) for key in "abcabd"]),
    ],
)
def test_runs_cover_as_much_as_can_be(keys: str, expected: list[tuple[str, int]]) -> None:
    assert cover(keys) == expected


@pytest.mark.parametrize("seed", range(40))
def test_runs_are_the_sequence_in_order(seed: int) -> None:
    draw = random.Random(seed)
    keys = "".join(draw.choice("abc") * draw.randint(1, 4) for _ in range(draw.randint(1, 12)))
    found = runs(keys)
    assert [run.first for run in found] == [0, *(run.end for run in found)][:-1]
    assert found[-1].end == len(keys)
    for run in found:
        assert keys[run.first : run.end] == keys[run.first : run.first + run.period] * run.count


def test_a_phase_is_chosen_by_misfit_and_periods_by_use() -> None:
    keys = "babababa" + "b"
    assert runs(keys, misfit=lambda first, period: first != 1)[1] == Run(first=1, period=2, count=4)
    assert all(run.count == 1 for run in runs("aaaa", usable=lambda first, end: False))


# Operator graphs


class Draft:
    """An operator graph under construction: every call makes one value of 1000."""

    def __init__(self) -> None:
        self.values = [Value(size=1000.0, differentiable=True, is_input=True)]
        self.operators: list[Operator] = []
        self.parameters: list[ParameterTensor] = []

    def call(self, name: str, *reads: int, weight: int = 0, size: float = 1000.0) -> int:
        """An operator; with a weight it is a product."""
        self.values.append(Value(size=size, differentiable=True))
        held: tuple[int, ...] = ()
        if weight:
            held = (len(self.parameters),)
            self.parameters.append(ParameterTensor(name=name, count=weight))
        products = (MatrixProduct(m=10.0, n=10.0, k=float(weight)),) if weight else ()
        self.operators.append(
            Operator(
                signature=name,
                scope="",
                reads=reads,
                writes=(len(self.values) - 1,),
                parameters=held,
                saves=reads if weight else (),
                products=products,
                moved_values=0.0 if weight else size,
            )
        )
        return len(self.values) - 1

    def sublayer(self, x: int, kind: str, *memory: int) -> int:
        """x + product(norm(x)), which may read more."""
        inner = self.call(f"{kind}-product", self.call("norm", x), *memory, weight=10)
        return self.call("add", x, inner)

    def graph(self) -> OperatorGraph:
        return OperatorGraph(
            tokens=10,
            operators=tuple(self.operators),
            values=tuple(self.values),
            parameters=tuple(self.parameters),
        )


def residual(layers: int, *, small: bool = False) -> Draft:
    draft = Draft()
    x = draft.call("embedding", 0, weight=50)
    losses = []
    for _ in range(layers):
        x = draft.sublayer(draft.sublayer(x, "mix"), "mlp")
        if small:
            losses.append(draft.call("loss", x, size=1.0))
    draft.call("head", x, *losses, weight=70)
    return draft


def test_a_residual_stream_is_cut_at_its_additions() -> None:
    spec = traced_model(residual(6).graph(), name="residual")
    assert [segment.count for segment in spec.segments] == [1, 6, 1]
    assert [segment.block.params for segment in spec.segments] == [50, 20, 70]
    assert boundary_values(spec) == (100,) * 7
    assert spec.params_total == 50 + 6 * 20 + 70


def test_a_chain_without_branches_is_cut_everywhere() -> None:
    draft = Draft()
    x = 0
    for _ in range(5):
        x = draft.call("relu", draft.call("linear", x, weight=3))
    chain = Chain(draft.graph())
    assert pieces(chain) == [Piece(first=i, end=i + 1) for i in range(10)]
    assert layer_pieces(chain) == [Piece(first=i, end=i + 2) for i in range(0, 10, 2)]


def test_small_values_do_not_hinder_a_cut() -> None:
    spec = traced_model(residual(6, small=True).graph(), name="losses")
    assert [segment.count for segment in spec.segments] == [1, 6, 1]


def test_what_many_layers_read_is_carried() -> None:
    draft = Draft()
    memory = draft.call("encoder", 0, weight=5)
    x = draft.call("embedding", 0, weight=50)
    for _ in range(4):
        x = draft.sublayer(draft.sublayer(x, "mix"), "cross", memory)
    draft.call("head", x, weight=70)
    spec = traced_model(draft.graph(), name="decoder")
    assert [segment.count for segment in spec.segments] == [1, 1, 4, 1]
    decoder = spec.segments[2].block
    assert isinstance(decoder, TracedLayer)
    assert (decoder.input_values, decoder.message_values) == (2000.0, 2000.0)
    assert decoder.stream_width == 200


def test_relative_positions_and_an_encoders_result_are_both_carried() -> None:
    """As in T5: the first layer of a stack makes the table that all layers of it read."""
    draft = Draft()
    memory = draft.call("embedding", 0, weight=50)
    bias = draft.call("encoder-bias", weight=3, size=500.0)
    for _ in range(4):
        memory = draft.sublayer(draft.sublayer(memory, "mix", bias), "mlp")
    memory, x = draft.call("norm", memory), draft.call("embedding", 0, weight=50)
    bias = draft.call("decoder-bias", weight=3, size=500.0)
    for _ in range(5):
        x = draft.sublayer(draft.sublayer(draft.sublayer(x, "mix", bias), "cross", memory), "mlp")
    draft.call("head", x, weight=70)
    spec = traced_model(draft.graph(), name="t5")
    repeated = [segment for segment in spec.segments if segment.count > 1]
    assert [(segment.count, segment.block.params) for segment in repeated] == [(4, 20), (5, 30)]
    assert [segment.block.stream_width for segment in repeated] == [150, 250]


def test_values_that_several_layers_keep_count_once() -> None:
    draft = residual(3)
    spec = traced_model(draft.graph(), name="residual")
    kept = {value for operator in draft.operators for value in operator.saves}
    found = sum(block.saved_values for block in spec.blocks() if isinstance(block, TracedLayer))
    assert found == 1000.0 * len(kept)


def test_inputs_that_a_layer_reads_count_to_what_it_begins_with() -> None:
    draft = residual(2)
    extra = draft.call("late", len(draft.values) - 1, 0, weight=4)
    assert extra == len(draft.values) - 1
    spec = traced_model(draft.graph(), name="late")
    first, *_, last = [block for block in spec.blocks() if isinstance(block, TracedLayer)]
    assert first.input_values == 1000.0
    assert last.input_values == 2000.0


def test_a_loop_over_many_steps_is_not_cut() -> None:
    draft = Draft()
    x = draft.call("enter", 0, weight=2)
    steps = [draft.call("step", x) for _ in range(400)]
    draft.call("leave", *steps, weight=2)
    chain = Chain(draft.graph())
    assert [piece.first for piece in layer_pieces(chain)] == [0, 1]


def test_a_graph_that_never_narrows_is_one_layer() -> None:
    draft = Draft()
    a, b = draft.call("left", 0, weight=2), draft.call("right", 0, weight=2)
    for depth in range(3):
        a, b = draft.call(f"mix{depth}", a, b, weight=2), draft.call(f"exchange{depth}", a, b, weight=2)
    draft.call("join", a, b, weight=2)
    spec = traced_model(draft.graph(), name="crossed")
    assert spec.params_total == 18
    assert spec.layers <= 3


# Layers of a ModelSpec


def block(hidden: int, *, cross: bool = False, span: AttentionSpan = CAUSAL) -> Block:
    attention = Attention(heads=4, kv_heads=4, head_dim=hidden // 4, span=span)
    every = AttentionSpan(reach=Reach.ALL)
    return Block(
        hidden=hidden,
        norm=Norm.RMSNORM,
        mixer=attention,
        mlp=Mlp(width=4 * hidden, gated=False, activation=Activation.RELU),
        norms=3 if cross else 2,
        cross=Attention(heads=4, kv_heads=4, head_dim=hidden // 4, span=every, cross=True) if cross else None,
    )


def model(*segments: Segment, encoder_layers: int = 0) -> ModelSpec:
    return ModelSpec(
        name="t5",
        model_type="t5",
        hidden=64,
        vocab=128,
        max_positions=512,
        learned_positions=0,
        rope_theta=0.0,
        norm=Norm.RMSNORM,
        norm_eps=1e-6,
        initializer_range=0.02,
        tied_embeddings=True,
        segments=segments,
        encoder_layers=encoder_layers,
    )


def test_a_chain_of_blocks_sends_its_stream() -> None:
    assert boundary_values(model(Segment(block=block(64), count=4))) == (64, 64, 64)


def test_behind_an_encoder_its_result_travels_along() -> None:
    encoder = Segment(block=block(64, span=AttentionSpan(reach=Reach.ALL)), count=3)
    spec = model(encoder, Segment(block=block(64, cross=True), count=3), encoder_layers=3)
    assert boundary_values(spec) == (64, 64, 64, 128, 128)
    network = layer_network(spec)
    assert set(network.edges) == {(0, 1), (1, 2), (2, 3), (2, 4), (2, 5), (3, 4), (4, 5)}


def test_the_encoders_result_ends_with_the_last_layer_that_reads_it() -> None:
    encoder = Segment(block=block(64), count=2)
    reads, plain = Segment(block=block(64, cross=True), count=2), Segment(block=block(64), count=3)
    spec = model(encoder, reads, plain, encoder_layers=2)
    assert boundary_values(spec) == (64, 64, 128, 64, 64, 64)
