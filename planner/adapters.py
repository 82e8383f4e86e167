"""LoRA: matrices of low rank beside the weights of a model, and how many parameters they train."""

from __future__ import annotations

from planner.attention import Attention
from planner.feed_forward import Mlp
from planner.matrix import Matrix
from planner.model import Block, Layer, ModelSpec
from planner.workload import AdapterModules, Adapters


def adapted(layer: Layer, modules: AdapterModules) -> tuple[Matrix, ...]:
    """The weights of a layer that get adapters; routers and experts never do.

    Mixers that have no query and value of their own (latent attention, state spaces) are adapted whole.
    """
    if not isinstance(layer, Block):
        return ()
    found: list[Matrix] = []
    for mixer in layer.mixers:
        matrices = mixer.matrices(layer.hidden)
        query_and_value = modules is AdapterModules.QV and isinstance(mixer, Attention)
        found += [matrices[0], matrices[2]] if query_and_value else matrices
    if modules is AdapterModules.ALL and isinstance(layer.mlp, Mlp):
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


def layer_adapter_params(adapters: Adapters, layer: Layer, tp: int = 1) -> float:
    """Adapter parameters on one of `tp` tensor-parallel ranks: r (in + out) of each weight's shard.

    The half beside the split dimension is sharded with it; the other half is whole on every rank.
    """
    shards = [matrix.shard(tp) for matrix in adapted(layer, adapters.modules)]
    return adapters.rank * sum(inputs + outputs for inputs, outputs in shards)


def frozen_product_share(adapters: Adapters | None, layer: Layer) -> float:
    """Share of a layer's weight-gradient products that a frozen base spares, adapters' own work taken off.

    A full backward pass has, for each forward product, one product for the input's gradient and one for
    the weight's. A frozen weight spares the second; its adapter adds three passes of r (in + out) instead
    of in x out: 1 - 3 sum r (in + out) / sum in out. 0 where everything is trained.
    """
    if adapters is None or not isinstance(layer, Block):
        return 0.0
    whole = sum(matrix.used * matrix.inputs * matrix.outputs for matrix in layer.matrices())
    return max(0.0, 1.0 - 3.0 * layer_adapter_params(adapters, layer) / whole) if whole else 0.0
