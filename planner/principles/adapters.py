"""LoRA: matrices of low rank beside the weights of a model, and how many parameters they train."""

from __future__ import annotations

from planner.codec import noun
from planner.feed_forward import Mlp
from planner.matrix import Matrix
from planner.mixers import Attention
from planner.model import Block, Layer, ModelSpec


@noun
class Adapters:
    """Adapters of one rank on `modules`: qv (query and value), attention, or all (and the dense MLP).

    Source: LoRA, arXiv 2106.09685, which adapts query and value; all linear layers: QLoRA, arXiv 2305.14314.
    """

    rank: int
    modules: str


def adapted(layer: Layer, modules: str) -> tuple[Matrix, ...]:
    """The weights of a layer that get adapters; routers and experts never do.

    Mixers that have no query and value of their own (latent attention, state spaces) are adapted whole.
    """
    if not isinstance(layer, Block):
        return ()
    found: list[Matrix] = []
    for mixer in layer.mixers:
        matrices = mixer.matrices(layer.hidden)
        query_and_value = modules == "qv" and isinstance(mixer, Attention)
        found += [matrices[0], matrices[2]] if query_and_value else matrices
    if modules == "all" and isinstance(layer.mlp, Mlp):
        found += layer.mlp.matrices(layer.hidden)
    return tuple(found)


def adapter_params(adapters: Adapters, model: ModelSpec) -> int:
    """r (in + out) for each adapted weight of every layer."""
    return sum(
        segment.count * adapters.rank * (matrix.inputs + matrix.outputs)
        for segment in model.segments
        for matrix in adapted(segment.block, adapters.modules)
    )


def adapted_weights(adapters: Adapters, model: ModelSpec) -> int:
    """How many weights of the model get adapters."""
    return sum(segment.count * len(adapted(segment.block, adapters.modules)) for segment in model.segments)
