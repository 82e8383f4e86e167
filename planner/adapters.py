"""LoRA: matrices of low rank beside the weights of a model, and how many parameters they train."""

from __future__ import annotations

from planner.attention import Attention
from planner.feed_forward import Mlp
from planner.matrix import Matrix
from planner.model import Block, Layer, ModelSpec
from planner.workload import AdapterModules, Adapters

_PLACES = {
    AdapterModules.QV: (0, 2),
    AdapterModules.QKV: (0, 1, 2),
    AdapterModules.ATTENTION: (0, 1, 2, 3),
    AdapterModules.ALL: (0, 1, 2, 3),
}
"""Which of an attention's query, key, value and output projections get adapters."""


def adapted(layer: Layer, modules: AdapterModules) -> tuple[Matrix, ...]:
    """The weights of a layer that get adapters; routers and experts never do.

    Mixers that have no query and value of their own are adapted whole: of latent attention the projections
    to and from its latents, by PEFT's names q_a_proj and q_b_proj or q_proj, kv_a_proj_with_mqa, kv_b_proj,
    and o_proj; of state spaces all.
    """
    if not isinstance(layer, Block):
        return ()
    found: list[Matrix] = []
    for mixer in layer.mixers:
        matrices = mixer.matrices(layer.hidden)
        found += [matrices[place] for place in _PLACES[modules]] if isinstance(mixer, Attention) else matrices
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
    held = layer.held(tp) if isinstance(layer, Block) else layer
    shards = [matrix.shard(tp) for matrix in adapted(held, adapters.modules)]
    return adapters.rank * sum(inputs + outputs for inputs, outputs in shards)
